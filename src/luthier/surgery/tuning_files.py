"""A saved tuning: one folder of safetensors and JSON, small, without a base weight, bound to its base by digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from luthier.__version__ import __version__
from luthier.core import IntegrityError, LuthierError, ResourceError, WrongBase
from luthier.runs import durable
from luthier.surgery import compose
from luthier.surgery.tuned import Tuned, attach
from luthier.surgery.tuning import Tuning
from luthier.trust import config as trusted_config
from luthier.trust import safetensors as trusted_tensors

__all__ = ["FORMAT", "base_digest", "load", "read_tuning", "save", "stored_tensors"]

FORMAT = 1
_KEYS = {
    "format", "luthier", "method", "settings", "base", "head", "labels", "task", "contract", "tensors",
    "precision",
}  # fmt: skip


@torch.no_grad()
def base_digest(tuned: Tuned, dtype: torch.dtype = torch.bfloat16) -> str:
    """sha256 over the base's tensors: names, shapes and values rounded to `dtype`. New task heads are left out;
    tensors that a tuning trains count with their original value.

    As bf16 it is the same for a base loaded in fp32 or bf16, as fp16 for one loaded in fp32 or fp16. A checkpoint that
    holds bf16 is the same by either, whatever it is loaded in.
    """
    if dtype not in tuned._digest:
        originals: dict[int, Tensor] = {
            id(u.parameter): u.kept for t in tuned.tunings.values() for u in t.unfrozen.values()
        }
        for held, kept in tuned._folded or ():
            originals.setdefault(id(held), kept)
        summed = hashlib.sha256()
        heads = set(tuned.anatomy.head_tensors)
        for name in sorted(tuned.anatomy.tensors):
            if name in heads:
                continue
            parameter = tuned._parameters[name]
            value: Tensor = originals[id(parameter)] if id(parameter) in originals else parameter  # noqa: SIM401
            value = value.detach()
            # The path inside the backbone: the same encoder may stand in a classifier or alone.
            short = name.removeprefix(f"{tuned.anatomy.backbone}.") if tuned.anatomy.backbone else name
            summed.update(f"{short}{tuple(value.shape)}".encode())
            summed.update(value.to("cpu", dtype).contiguous().view(torch.uint8).numpy().data)
        tuned._digest[dtype] = summed.hexdigest()
    return tuned._digest[dtype]


def stored_tensors(tuning: Tuning) -> dict[str, Tensor]:
    """What a tuning's file holds, by canonical name: the deployed form of every part.

    Tensors may lie in the model's own memory: with full fine-tuning a copy would be a second model.
    """
    tensors: dict[str, Tensor] = {}
    for key_, module in tuning.modules_by_key().items():
        give = getattr(module, "stored", module.state_dict)
        parts: dict[str, Tensor] = give()
        for short, tensor in parts.items():
            tensors[f"{key_}.{short}"] = tensor.detach().cpu().contiguous()
    for key_, unfrozen in tuning.unfrozen.items():
        value = unfrozen.parked if unfrozen.parked is not None else unfrozen.parameter.detach()
        if unfrozen.mask is None or not unfrozen.holds:
            tensors[key_] = value.cpu().contiguous()
        else:
            # New values of the changed entries, not differences: fl(a + fl(b - a)) need not be b.
            index = unfrozen.mask.flatten().nonzero().flatten()
            small = index.numel() == 0 or int(index[-1]) < 2**31
            tensors[f"{key_}|index"] = index.to(torch.int32 if small else torch.int64).cpu()
            tensors[f"{key_}|values"] = value.flatten()[index].cpu().contiguous()
    return tensors


def save(tuned: Tuned, folder: Path | str, *, name: str | None = None, about: dict[str, Any] | None = None) -> str:
    """Write one tuning; returns the sha256 of its weights file.

    `about` adds plain facts to tuning.json: task, labels, the prompt contract.

    Raises:
        IntegrityError: a tensor is not finite; nothing is written then.
        ResourceError: the folder cannot be written.
    """
    tuning = tuned.tuning(name)
    tensors = stored_tensors(tuning)
    for full, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise IntegrityError(f"{full} is not finite: this tuning is broken and will not be saved as a result.")
    anatomy = tuned.anatomy
    facts = {
        "format": FORMAT,
        "luthier": __version__,
        "method": compose.spell(tuning.method),
        "settings": tuning.method.settings(),
        "base": {
            "name": str(getattr(tuned.model.config, "name_or_path", "")) if not _is_path(tuned.model) else "",
            "model_type": anatomy.model_type,
            "sha256_bf16": base_digest(tuned),
            "sha256_fp16": base_digest(tuned, torch.float16),
            "loaded_in": _precision(tuned),
            "d": anatomy.d,
            "layers": anatomy.n_layers,
            "vocabulary": anatomy.vocab_size,
        },
        "head": sorted(k for k in tuning.unfrozen if k.startswith("head/")),
        "tensors": {n: list(t.shape) for n, t in tensors.items()},
        **(about or {}),
    }
    target = Path(folder)
    with durable.folder(target, {"format": "luthier-tuning", "version": FORMAT}) as draft:
        draft.write_tensors("tuning.safetensors", tensors)
        draft.write_json("tuning.json", facts)
    return weights_digest(target)


def weights_digest(folder: Path) -> str:
    """sha256 of the weights file, as the folder's manifest states it.

    Raises:
        IntegrityError: the manifest or a file is not what it claims to be.
    """
    with _vouched(folder / durable.MANIFEST):
        manifest = trusted_config.read_json(folder / durable.MANIFEST)
    try:
        if manifest["digest"] != durable.manifest_digest(manifest):
            raise IntegrityError(f"{folder / durable.MANIFEST}: damaged. Restore the tuning from a copy.")
        return str(manifest["files"]["tuning.safetensors"]["sha256"])
    except (KeyError, TypeError) as error:
        raise IntegrityError(f"{folder / durable.MANIFEST}: not whole. Restore the tuning from a copy.") from error


@contextmanager
def _vouched(where: Path) -> Iterator[None]:
    """What we wrote ourselves has no mistakes of a user in it: whatever is wrong there is damage."""
    try:
        yield
    except (IntegrityError, ResourceError):
        raise
    except LuthierError as error:
        told = str(error) if str(where) in str(error) else f"{where}: {error}"
        raise IntegrityError(f"{told} The file is not as luthier wrote it: restore it from a copy.") from error


def _is_path(model: Any) -> bool:
    return Path(str(getattr(model.config, "name_or_path", "")) or "\0").is_absolute()


def read_tuning(folder: Path | str) -> dict[str, Any]:
    """The facts of a saved tuning, checked as data: method, settings, base, labels.

    Raises:
        Refused, IntegrityError: the file is not what we write.
    """
    where = Path(folder) / "tuning.json"
    if not where.exists():
        raise IntegrityError(f"{folder}: holds no tuning (no tuning.json). Name the `tuning` folder of a finished run.")
    with _vouched(where):
        facts = trusted_config.read_json(where, allowed_keys=_KEYS)
    if facts.get("format") != FORMAT:
        raise IntegrityError(
            f"{where}: format {facts.get('format')!r}; this luthier ({__version__}) reads format {FORMAT}. "
            "Install the version that wrote it, or train again."
        )
    missing = {"method", "settings", "base", "tensors"} - set(facts)
    if missing:
        raise IntegrityError(
            f"{where}: no {', '.join(sorted(missing))}; the file is not whole. Train again or restore it."
        )
    kinds = {"method": str, "settings": dict, "base": dict, "tensors": dict, "head": list}
    for name, kind in kinds.items():
        if name in facts and not isinstance(facts[name], kind):
            raise IntegrityError(f"{where}: {name} is {facts[name]!r}, not a {kind.__name__}; restore it from a copy.")
    return dict(facts)


def load(model: Any, folder: Path | str, *, name: str = "default", trainable: bool = False) -> Tuned:
    """Attach a saved tuning to its base, in eval mode and frozen; with `trainable`, ready to learn on.

    Raises:
        WrongBase: the tuning was made for another model.
        Refused, IntegrityError: the files are not what they claim to be.
    """
    facts = read_tuning(folder)
    base = facts["base"]
    heads = [str(k).removeprefix("head/") for k in facts.get("head", ())]
    _same_shape(model, base, heads, folder)
    with _vouched(Path(folder) / "tuning.json"):
        method = compose.method(facts["method"], facts["settings"])
    before = Tuned.of(model)
    awake = [] if before is None else [t.tuning_name for t in before.tunings.values() if t.active]
    tuned = attach(model, method, name=name, train_head=bool(heads), new_tensors=heads)
    try:
        _same_weights(tuned, base, folder)
        expect = {n: tuple(s) for n, s in facts["tensors"].items()}
        digest = weights_digest(Path(folder))
        with _vouched(Path(folder) / "tuning.safetensors"):
            tensors = trusted_tensors.read(Path(folder) / "tuning.safetensors", expect=expect, digest=digest)
        restore(tuned.tuning(name), tensors, str(folder))
    except BaseException:
        tuned.remove(name)
        tuned.activate(*awake)
        if not tuned.tunings:
            tuned._strip()
        raise
    if not trainable:
        tuned.train_only(*[t.tuning_name for t in tuned.tunings.values() if t.trainable and t.tuning_name != name])
    model.eval()
    tuned._refresh()
    return tuned


def _same_shape(model: Any, base: dict[str, Any], heads: list[str], folder: Path | str) -> None:
    from luthier.anatomy import Anatomy

    held = Tuned.of(model)
    anatomy = held.anatomy if held is not None else Anatomy.read(model)
    here = {
        "model_type": anatomy.model_type,
        "d": anatomy.d,
        "layers": anatomy.n_layers,
        "vocabulary": anatomy.vocab_size,
    }
    differs = [f"{k} {base.get(k)!r} here {v!r}" for k, v in here.items() if base.get(k) != v]
    differs += [f"its head {name!r} is not here" for name in heads if name not in anatomy.tensors]
    if differs:
        raise WrongBase(f"{folder}: made for another model: {'; '.join(differs)}. Load the base it was trained on.")


def _same_weights(tuned: Tuned, base: dict[str, Any], folder: Path | str) -> None:
    found = base_digest(tuned)
    if found == base.get("sha256_bf16"):
        return
    here, there = _precision(tuned), base.get("loaded_in")
    # Tunings of older versions state the first digest alone.
    if "sha256_fp16" in base and base_digest(tuned, torch.float16) == base["sha256_fp16"]:
        return
    advice = "Load the base it was trained on."
    if here == "float16" and "sha256_fp16" not in base:
        advice += (
            " If this is that base: an older luthier saved this tuning, and knows no base in float16. Load the base in "
            "float32 once, load the tuning, save it again, and the new one is accepted in float16."
        )
    elif {here, there} == {"float16", "bfloat16"}:
        advice += (
            f" If this is that base: it was {there} when the tuning was saved and is {here} here, and the two round "
            f"differently. Load it in {there} or float32."
        )
    raise WrongBase(
        f"{folder}: made for {base.get('name') or base['model_type']} with weights "
        f"{str(base.get('sha256_bf16'))[:12]}; this model's are {found[:12]}. {advice}"
    )


def _precision(tuned: Tuned) -> str:
    """The type that most of the base's numbers are held in, such as "float16"."""
    sizes: dict[torch.dtype, int] = {}
    trained = {id(u.parameter): u for t in tuned.tunings.values() for u in t.unfrozen.values()}
    for name in tuned.anatomy.tensors:
        parameter = tuned._parameters[name]
        held = trained.get(id(parameter))
        dtype = parameter.dtype if held is None else held.dtype
        sizes[dtype] = sizes.get(dtype, 0) + parameter.numel()
    return str(max(sizes, key=lambda d: sizes[d])).removeprefix("torch.")


@torch.no_grad()
def restore(tuning: Tuning, tensors: dict[str, Tensor], where: str) -> None:
    """Put stored tensors into a freshly attached tuning.

    Raises:
        IntegrityError: tensors are missing or left over.
    """
    left = dict(tensors)
    for key_, module in tuning.modules_by_key().items():
        mine = {n.removeprefix(f"{key_}."): left.pop(n) for n in list(left) if n.startswith(f"{key_}.")}
        put = getattr(module, "restore", None)
        try:
            if put is not None:
                put(mine)
            else:
                module.load_state_dict(mine, strict=True)
        except (RuntimeError, KeyError) as error:
            raise IntegrityError(f"{where}: {key_} does not fit: {error}") from error
        _follow(module, next(iter(tuning.parameters()), None))
    for key_, unfrozen in tuning.unfrozen.items():
        value = unfrozen.parameter.data
        if key_ in left:
            value.copy_(left.pop(key_))
        elif f"{key_}|index" in left:
            index, values = left.pop(f"{key_}|index").long(), left.pop(f"{key_}|values")
            value.view(-1)[index.to(value.device)] = values.to(value.device, value.dtype)
            mask = torch.zeros(value.numel(), dtype=torch.bool)
            mask[index] = True
            unfrozen.mask = mask.view(value.shape).to(value.device)
        else:
            raise IntegrityError(f"{where}: no values for {key_}; the file is not whole.")
    if left:
        raise IntegrityError(f"{where}: tensors that this method does not have: {', '.join(sorted(left)[:5])}.")
    tuning.finished = True


def _follow(module: nn.Module, like: Tensor | None) -> None:
    if like is not None:
        module.to(like.device)
