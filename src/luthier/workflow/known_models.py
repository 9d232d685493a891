"""What a look at rows needs of a model beside its files, kept between calls: with it no torch is loaded.

<cache>/models/<digest>.json    {"digest": of the rest, "kind", "config", "text", "tokenizer": [module, class]}

transformers alone decides the class of a tokenizer and the values that a configuration leaves out, and loads torch with
its compiler to tell. The name is a digest of all that decides it: configuration and tokenizer files, the versions of
the libraries, our own text. What is damaged, or does not load, is asked for anew.
"""

from __future__ import annotations

import hashlib
import re
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from luthier.data import infer_task, known_config
from luthier.data.disk_cache import limit
from luthier.data.infer_task import kind_of_model
from luthier.data.known_config import READ, KnownConfig
from luthier.runs import kept_json
from luthier.trust.model import cache_folder
from luthier.workflow import model_files
from luthier.workflow.model_files import Source, load_config, load_tokenizer, quiet

__all__ = ["known_model"]

MOST = 64  # files; what was written longest ago goes first
LIBRARIES = ("transformers", "tokenizers", "huggingface_hub", "torch")
_MODULE = re.compile(r"transformers\.(tokenization_utils_tokenizers|models\.\w+\.tokenization_\w+)")


def known_model(source: Source) -> tuple[Any, Any]:
    """(configuration, tokenizer) of a model; the configuration answers what rows are read by.

    Raises:
        ModelError: the folder has no tokenizer that can be read.
    """
    path = _address(source)
    found = None if path is None else _read(path, source)
    if found is not None:
        return found
    config, tokenizer = load_config(source), load_tokenizer(source)
    if path is not None:
        _keep(path, config, tokenizer)
    return config, tokenizer


def _address(source: Source) -> Path | None:
    """The file for this model; None where nothing is to be kept."""
    if not limit():
        return None
    summed = hashlib.sha256()
    ours = (Path(str(module.__file__)) for module in (sys.modules[__name__], known_config, infer_task, model_files))
    for file in (source.path / "config.json", *source.folder.tokenizer_files, *ours):
        try:
            summed.update(f"{file.name}\x1f{hashlib.sha256(file.read_bytes()).hexdigest()}\x1e".encode())
        except OSError:
            return None
    summed.update("\x1f".join(f"{library} {version(library)}" for library in LIBRARIES).encode())
    return cache_folder().expanduser() / "models" / f"{summed.hexdigest()[:40]}.json"


def _read(path: Path, source: Source) -> tuple[Any, Any] | None:
    try:
        content = kept_json.kept(path)
        module, name = content["tokenizer"]
        if not _MODULE.fullmatch(module):
            return None
        config = KnownConfig(content["kind"], content["config"], content["text"], lambda: load_config(source))
        with quiet():
            return config, getattr(import_module(module), name).from_pretrained(source.path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RecursionError):
        return None


def _keep(path: Path, config: Any, tokenizer: Any) -> None:
    """Keep what was told. Where it cannot be written, or is more than JSON holds, it is asked for anew."""
    kind = type(tokenizer)
    values, text = _values(config), _values(config.get_text_config())
    plain = all(v is None or isinstance(v, bool | int | str) for v in (*values.values(), *text.values()))
    if not plain or not _MODULE.fullmatch(kind.__module__):
        return
    if getattr(import_module(kind.__module__), kind.__name__, None) is not kind:
        return
    content = {
        "kind": kind_of_model(config), "config": values, "text": text, "tokenizer": [kind.__module__, kind.__name__],
    }  # fmt: skip
    kept_json.keep(path, content, MOST)


def _values(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in READ if hasattr(config, name)}
