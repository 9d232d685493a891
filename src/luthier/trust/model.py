"""A local Hugging Face model folder, checked before transformers sees it.

Remote code has no flag here. A configuration that names code is refused, and so are weights that exist only as pickle.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from luthier.core import ModelError, Refused, near
from luthier.trust import safetensors
from luthier.trust._bytes import identity, open_regular, read_capped, show
from luthier.trust._limits import Limits
from luthier.trust.config import NAMES_CODE, read_json

__all__ = ["PICKLES", "ModelFolder", "cache_folder", "check_config", "check_folder"]

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".msgpack", ".h5")

# Each has been a way to run code from a file, or to make a loader fetch something.
_REMOTE = frozenset(
    {
        "auto_map",
        "custom_pipelines",
        "custom_generate",
        "code_revision",
        "custom_object",
        "kernel_config",
        "use_kernels",
    }
    | {
        "parent_library",
        "megatron_core",
        "megatron_config",
        "tokenizer_kwargs",
        "model_kwargs",
        "hub_kwargs",
        "proxies",
    }
    | NAMES_CODE
)
# A key with a leading underscore is private to the loader: only these are let through, and what they hold is checked.
_PRIVATE = frozenset(
    {"_name_or_path", "_commit_hash", "_attn_implementation", "_attn_implementation_autoset", "_num_labels"}
    | {"_from_model_config", "_diffusers_version", "_sliding_window_pattern", "_flash_attn_2_enabled"}
)
# Numbers and switches that configuration classes of transformers write of themselves (OPT, Mimi, SmolVLM, Perceiver).
_PRIVATE_NUMBERS = frozenset(
    {"_remove_final_layer_norm", "_frame_rate", "_pad_token_id", "_label_trainable_num_channels"}
)
_ATTENTION = frozenset({"eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"})
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja"),
)


@dataclass(frozen=True)
class ModelFolder:
    """A folder that passed: what may be handed to transformers, and what was read on the way."""

    path: Path
    config: Mapping[str, Any]
    weights: tuple[Path, ...]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    tokenizer_files: tuple[Path, ...]
    tokenizer_config: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | None = None

    @cached_property
    def digest(self) -> str:
        """The sha256 over config.json and all weights, by which a tuning names its base. Cached between runs."""
        total = hashlib.sha256()
        for path in (self.path / "config.json", *self.weights):
            total.update(f"{path.name}\x1f{_file_digest(path)}\x1e".encode())
        return total.hexdigest()


def check_folder(path: str | os.PathLike[str], *, limits: Limits = Limits()) -> ModelFolder:  # noqa: B008  # frozen
    """Check a model folder: its configurations as data, the headers of its weights, the files of its tokenizer.

    Raises:
        ModelError: no such folder, no config.json, no weights, shards missing.
        Refused: it asks for remote code, has only pickled weights, or a file of it is not what it claims to be.
    """
    folder = Path(path)
    where = show(str(folder), 200)
    if not folder.is_dir():
        names = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise ModelError(
            f"{where}: there is no such folder.{near(folder.name, names)} Models are read from local folders; "
            "nothing is fetched. Give the path of a downloaded model, or the name of a sample (`luthier samples`)."
        )
    if not (folder / "config.json").exists() and (folder / "run.json").exists():
        raise ModelError(
            f"{where}: is a run, and holds a tuning without its base. Name the model that it was made of (spec.toml in "
            f"it says which), or the folder that `luthier merge {where} --out FOLDER` writes."
        )
    if not (folder / "config.json").exists():
        raise ModelError(f"{where}: holds no config.json, so it is no model folder. Give the folder that holds one.")
    config = check_config(folder / "config.json", limits)
    weights = _weights(folder, limits)
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    for shard, header in weights.items():
        for name, entry in header.entries.items():
            if name in shapes:
                raise Refused(
                    f"{show(str(shard), 200)}: tensor {show(name)} is also in another shard. Fetch the model again."
                )
            shapes[name], dtypes[name] = entry.shape, entry.dtype
    for other in ("generation_config.json", "preprocessor_config.json", "processor_config.json", "adapter_config.json"):
        if (folder / other).exists():
            check_config(folder / other, limits)
    files = tuple(folder / name for name in _TOKENIZER_FILES if (folder / name).exists())
    tokenizer = _tokenizer(folder, files, limits)
    return ModelFolder(
        folder, config, tuple(weights), shapes, dtypes, files, tokenizer, _chat_template(folder, tokenizer, limits)
    )


def refuse_code(value: Any, where: str) -> None:
    """Refuse a configuration in which any key, at any depth, names code, a private switch of a loader, or an address.

    Raises:
        Refused: with the key.
    """
    for key, item in _items(value):
        if key == "trust_remote_code" and item is False:
            continue
        if key in _REMOTE or key == "trust_remote_code":
            raise Refused(
                f"{where}: asks for remote code (key {show(key)}). There is no flag for that. If transformers "
                "knows this model_type itself, remove the key; if not, install the model's code "
                "as a package of your own."
            )
        if key.startswith("_") and key not in _PRIVATE and not _is_plain(key, item):
            raise Refused(f"{where}: the key {show(key)} is private to a loader and has no place in a file. Remove it.")
        if key in ("_attn_implementation", "attn_implementation") and item is not None:
            kinds = list(item.values()) if isinstance(item, dict) else [item]
            if not all(kind is None or (isinstance(kind, str) and kind in _ATTENTION) for kind in kinds):
                raise Refused(f"{where}: {key} is {show(str(item))}, which would be fetched and run. Remove it.")
        if isinstance(item, str) and re.match(r"\s*[a-zA-Z][a-zA-Z0-9+.-]*://", item):
            raise Refused(
                f"{where}: {show(key)} is the address {show(item)}. Nothing is fetched from a file's word: remove it."
            )


def _is_plain(key: str, item: Any) -> bool:
    """A private key that can only be a number: one of transformers' own, or its way to spell an infinite one."""
    if key == "__float__":
        return item in ("Infinity", "-Infinity", "NaN")
    return key in _PRIVATE_NUMBERS and (item is None or isinstance(item, bool | int | float))


def cache_folder() -> Path:
    """Where digests are kept between runs: $LUTHIER_CACHE, or luthier below $XDG_CACHE_HOME or ~/.cache."""
    if given := os.environ.get("LUTHIER_CACHE"):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path(os.path.expanduser("~")) / ".cache") / "luthier"  # noqa: PTH111  # never raises


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield from item.items()
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)


def check_config(path: Path, limits: Limits = Limits()) -> dict[str, Any]:  # noqa: B008  # frozen
    """Read a configuration as data.

    Raises:
        Refused, ConfigError: no object of JSON, or one that names code.
    """
    where = show(str(path), 200)
    # Mamba's configuration holds Infinity, so non-finite numbers stand.
    value = read_json(path, allow_nonfinite=True, limits=limits)
    if not isinstance(value, dict):
        raise Refused(f"{where}: must be an object, got {type(value).__name__}. Fetch the model again.")
    refuse_code(value, where)
    if "model_type" in value and not (
        isinstance(value["model_type"], str) and re.fullmatch(r"[\w.-]{1,100}", value["model_type"])
    ):
        raise Refused(
            f"{where}: model_type {show(str(value['model_type']))} is no name of a model. Fetch the model again."
        )
    architectures = value.get("architectures")
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(a, str) and a.isidentifier() for a in architectures)
    ):
        raise Refused(f"{where}: architectures {show(str(architectures))} must be names of classes of transformers.")
    return value


def _weights(folder: Path, limits: Limits) -> dict[Path, safetensors.Header]:
    where = show(str(folder), 200)
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.exists():
        return _shards(folder, index, limits)
    if single.exists():
        return {single: safetensors.check_header(single, limits=limits)}
    names = sorted(p.name for p in folder.iterdir())
    pickled = [n for n in names if n.endswith(PICKLES)]
    others = [n for n in names if n.endswith(".safetensors")]
    if pickled:
        raise Refused(
            f"{where}: has its weights only as pickle ({show(pickled[0])}), which can run code when it is read. "
            f"`luthier convert {show(str(folder / pickled[0]), 200)}` makes a safetensors file of it in a jail."
        )
    if others:
        raise ModelError(f"{where}: no model.safetensors, but {show(others[0])}. Rename it, or add its index file.")
    raise ModelError(f"{where}: holds no weights (model.safetensors, or shards with an index). Fetch the model again.")


def _shards(folder: Path, index: Path, limits: Limits) -> dict[Path, safetensors.Header]:
    where = show(str(index), 200)
    table = read_json(index, limits=limits)
    table = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(table, dict) or not table or not all(isinstance(v, str) for v in table.values()):
        raise Refused(f"{where}: must hold a weight_map of tensor names to file names. Fetch the model again.")
    headers: dict[Path, safetensors.Header] = {}
    for file in sorted(set(table.values())):
        if not re.fullmatch(r"[\w.-]{1,200}\.safetensors", file) or file.startswith("."):
            raise Refused(f"{where}: {show(file)} is not the plain name of a safetensors file in this folder.")
        if not (folder / file).exists():
            raise ModelError(f"{where}: the shard {show(file)} is not in the folder. Fetch it too.")
        headers[folder / file] = safetensors.check_header(folder / file, limits=limits)
    for name, file in table.items():
        if name not in headers[folder / file].entries:
            raise Refused(f"{where}: says that {show(name)} is in {show(file)}, but it is not. Fetch the model again.")
    held = sum(len(header.entries) for header in headers.values())
    if held != len(table):
        raise Refused(f"{where}: names {len(table)} tensors, the shards hold {held}. Fetch the model again.")
    return headers


def _tokenizer(folder: Path, files: tuple[Path, ...], limits: Limits) -> dict[str, Any]:
    for path in files:
        if path.suffix == ".json":
            value = read_json(path, allow_nonfinite=True, limits=limits)
            if not isinstance(value, dict):
                raise Refused(f"{show(str(path), 200)}: must be an object, got {type(value).__name__}. Fetch it again.")
        else:
            read_capped(path, limits.json_bytes, "a tokenizer file")
    path = folder / "tokenizer_config.json"
    if path not in files:
        return {}
    where = show(str(path), 200)
    found: dict[str, Any] = read_json(path, allow_nonfinite=True, limits=limits)
    # The texts of tokens and templates may look like anything; only the other keys are settings.
    refuse_code({k: v for k, v in found.items() if k not in ("added_tokens_decoder", "chat_template")}, where)
    named = found.get("tokenizer_class")
    if named is not None and not (
        isinstance(named, str)
        and re.fullmatch(r"[A-Za-z]\w{0,80}Tokenizer(Fast)?|TokenizersBackend|SentencePieceBackend", named)
    ):
        raise Refused(
            f"{where}: tokenizer_class {show(str(named))} is no tokenizer of transformers. Fetch the model again."
        )
    return found


def _chat_template(folder: Path, tokenizer: Mapping[str, Any], limits: Limits) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        content = read_capped(path, limits.template_chars, "a chat template")
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise Refused(f"{show(str(path), 200)}: byte {error.start} is not UTF-8. Fetch the model again.") from None
    found = tokenizer.get("chat_template")
    if isinstance(found, list):  # several templates by name
        named = {t["name"]: t["template"] for t in found if isinstance(t, dict) and {"name", "template"} <= set(t)}
        found = named.get("default")
    if found is not None and not isinstance(found, str):
        raise Refused(
            f"{show(str(folder), 200)}: chat_template in tokenizer_config.json is no text. Fetch the model again."
        )
    return found


def _file_digest(path: Path) -> str:
    """The sha256 of a file, from the cache if size, time and inode are those of the file that was read then."""
    with open_regular(path) as file:
        facts = identity(file)
        kept = cache_folder() / ".digests" / hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
        try:
            known = json.loads(kept.read_text(encoding="ascii"))
            if known["facts"] == list(facts) and re.fullmatch("[0-9a-f]{64}", known["sha256"]):
                return str(known["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # no entry, or a torn one: read the file
        found = hashlib.file_digest(file, "sha256").hexdigest()
        if identity(file) != facts:
            raise ModelError(f"{show(str(path), 200)}: changed while it was read. Let its writer finish and try again.")
    _keep(kept, {"facts": list(facts), "sha256": found})
    return found


def _keep(path: Path, value: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w", encoding="ascii") as file:
            json.dump(value, file)
        os.replace(name, path)  # noqa: PTH105
    except OSError:
        pass  # a home that cannot be written costs a second reading next time, nothing else
