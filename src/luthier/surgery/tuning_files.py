"""A saved tuning: one folder of safetensors and JSON, small, without a base weight, bound to its base by digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from luthier.__version__ import __version__
from luthier.core import IntegrityError, LuthierError, ResourceError
from luthier.runs import durable
from luthier.surgery import compose
from luthier.surgery.edited_model import EditedModel
from luthier.surgery.tuning import Tuning
from luthier.trust import config as trusted_config

__all__ = [
    "FORMAT",
    "base_digest",
    "precision_of",
    "read_tuning",
    "restore",
    "save",
    "stored_tensors",
    "vouched",
    "weights_digest",
]

FORMAT = 1
_KEYS = {
    "format", "luthier", "method", "settings", "base", "head", "labels", "task", "contract", "tensors",
    "precision", "sources",
}  # fmt: skip


@torch.no_grad()
def base_digest(edited: EditedModel, dtype: torch.dtype = torch.bfloat16, *, trunk: bool = False) -> str:
    """sha256 over the base's tensors: names, shapes and values rounded to `dtype`. New task heads are left out;
    tensors that a tuning trains count with their original value.

    As bf16 it is the same for a base loaded in fp32 or bf16, as fp16 for one loaded in fp32 or fp16. A checkpoint that
    holds bf16 is the same by either, whatever it is loaded in.

    Args:
        trunk: of embeddings and blocks alone. A model with its pretrained head of words and one with a new classifier
            have the same: a pooler and a head are not of it.
    """
    heads = set(edited.anatomy.head_tensors)
    names = [n for n in sorted(edited.anatomy.tensors) if n not in heads]
    inside = [n for n in names if _of_trunk(n, edited.anatomy)] if trunk else names
    known = (dtype, inside != names)  # of a model that is all trunk both are one
    if known not in edited.digests:
        originals: dict[int, Tensor] = {
            id(u.parameter): u.kept for t in edited.tunings.values() for u in t.unfrozen.values()
        }
        for tensor, copy in edited.base_copies or ():
            originals.setdefault(id(tensor), copy)
        summed = hashlib.sha256()
        for name in inside:
            value = _base_value(edited, name, originals)
            # The path inside the backbone: the same encoder may stand in a classifier or alone.
            short = name.removeprefix(f"{edited.anatomy.backbone}.") if edited.anatomy.backbone else name
            summed.update(f"{short}{tuple(value.shape)}".encode())
            summed.update(value.to("cpu", dtype).contiguous().view(torch.uint8).numpy().data)
        edited.digests[known] = summed.hexdigest()
    return edited.digests[known]


def _of_trunk(name: str, anatomy: Any) -> bool:
    inside = f"{anatomy.backbone}." if anatomy.backbone else ""
    return name.startswith(inside) and not name.removeprefix(inside).startswith("pooler.")


def _base_value(edited: EditedModel, name: str, originals: dict[int, Tensor]) -> Tensor:
    """A tensor of the base as it was, decoded where it is held in codes."""
    codes = edited.stored.get(name)
    if codes is not None:
        moved = {n: originals[id(b)] for n, b in codes.named_buffers() if id(b) in originals}
        weight = codes.decoded(moved)
        return weight.T if codes.transposed else weight  # (d_in, d_out)
    parameter = edited.parameters[name]
    return originals.get(id(parameter), parameter).detach()


def stored_tensors(tuning: Tuning) -> dict[str, Tensor]:
    """What a tuning's file holds, by canonical name: the deployed form of every part.

    Tensors may lie in the model's own memory: with full fine-tuning a copy would be a second model.
    """
    tensors: dict[str, Tensor] = {}
    for key_, module in tuning.modules_by_key().items():
        give = getattr(module, "stored", module.state_dict)
        parts: dict[str, Tensor] = give()
        for short, tensor in parts.items():
            mask = tuning.masks.get(f"{key_}.{short}")
            if mask is None or mask.shape != tensor.shape or tensor[~mask].any():  # made of what is masked, perhaps
                tensors[f"{key_}.{short}"] = tensor.detach().cpu().contiguous()
            else:  # what is held at zero takes a bit
                bits = np.packbits(mask.flatten().cpu().numpy(), bitorder="little")
                tensors[f"{key_}.{short}|bits"] = torch.from_numpy(bits)
                tensors[f"{key_}.{short}|values"] = tensor.detach()[mask].cpu().contiguous()
    for key_, unfrozen in tuning.unfrozen.items():
        value = unfrozen.value
        if unfrozen.mask is None or not unfrozen.holds:
            tensors[key_] = value.cpu().contiguous()
        else:
            # New values of the changed entries, not differences: fl(a + fl(b - a)) need not be b.
            index = unfrozen.mask.flatten().nonzero().flatten()  # (changed entries,)
            small = index.numel() == 0 or int(index[-1]) < 2**31
            if unfrozen.derived:
                tensors[f"{key_}|places"] = _sum_of(unfrozen.mask)
            else:
                tensors[f"{key_}|index"] = index.to(torch.int32 if small else torch.int64).cpu()
            tensors[f"{key_}|values"] = value.flatten()[index].cpu().contiguous()
    return tensors


def _sum_of(mask: Tensor) -> Tensor:
    """One number that tells whether a mask chosen again is the one that was saved. (1,)"""
    summed = hashlib.sha256(mask.cpu().contiguous().numpy().data)
    return torch.tensor([int.from_bytes(summed.digest()[:7], "little")])


def save(
    edited: EditedModel, folder: Path | str, *, name: str | None = None, about: dict[str, Any] | None = None
) -> str:
    """Write one tuning; returns the sha256 of its weights file.

    `about` adds plain facts to tuning.json: task, labels, the prompt contract.

    Raises:
        IntegrityError: a tensor is not finite; nothing is written then.
        ResourceError: the folder cannot be written.
    """
    tuning = edited.tuning(name)
    tensors = stored_tensors(tuning)
    for full, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise IntegrityError(f"{full} is not finite: this tuning is broken and will not be saved as a result.")
    anatomy = edited.anatomy
    facts = {
        "format": FORMAT,
        "luthier": __version__,
        "method": compose.spell(tuning.method),
        "settings": tuning.method.settings(),
        "base": {
            "name": str(getattr(edited.model.config, "name_or_path", "")) if not _is_path(edited.model) else "",
            "model_type": anatomy.model_type,
            "sha256_bf16": base_digest(edited),
            "sha256_fp16": base_digest(edited, torch.float16),
            "trunk_bf16": base_digest(edited, trunk=True),
            "loaded_in": precision_of(edited),
            "d": anatomy.d,
            "layers": anatomy.n_layers,
            "vocabulary": anatomy.vocab_size,
        },
        "head": sorted(k for k in tuning.unfrozen if k.startswith("head/")),
        "tensors": {n: list(t.shape) for n, t in tensors.items()},
        **({"sources": tuning.sources} if tuning.sources else {}),
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
    with vouched(folder / durable.MANIFEST):
        manifest = trusted_config.read_json(folder / durable.MANIFEST)
    try:
        if manifest["digest"] != durable.manifest_digest(manifest):
            raise IntegrityError(f"{folder / durable.MANIFEST}: damaged. Restore the tuning from a copy.")
        return str(manifest["files"]["tuning.safetensors"]["sha256"])
    except (KeyError, TypeError) as error:
        raise IntegrityError(f"{folder / durable.MANIFEST}: not whole. Restore the tuning from a copy.") from error


@contextmanager
def vouched(where: Path) -> Iterator[None]:
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
    with vouched(where):
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
    kinds = {"method": str, "settings": dict, "base": dict, "tensors": dict, "head": list, "sources": list}
    for name, kind in kinds.items():
        if name in facts and not isinstance(facts[name], kind):
            raise IntegrityError(f"{where}: {name} is {facts[name]!r}, not a {kind.__name__}; restore it from a copy.")
    return dict(facts)


def precision_of(edited: EditedModel) -> str:
    """The type that most of the base's numbers are held in, such as "float16"."""
    sizes: dict[torch.dtype, int] = {}
    trained = {id(u.parameter): u for t in edited.tunings.values() for u in t.unfrozen.values()}
    for name in edited.anatomy.tensors:
        if name in edited.stored:
            codes = edited.stored[name]
            sizes[codes.dtype] = sizes.get(codes.dtype, 0) + codes.in_features * codes.out_features
            continue
        parameter = edited.parameters[name]
        unfrozen = trained.get(id(parameter))
        dtype = parameter.dtype if unfrozen is None else unfrozen.dtype
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
        fit = getattr(module, "fit", None)  # to what is stored, where that may be narrower
        if fit is not None:
            fit(mine)
        mine |= _thickened(tuning, key_, module, mine)
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
            # value as (entries,), of the same memory
            value.view(-1)[index.to(value.device)] = values.to(value.device, value.dtype)
            mask = torch.zeros(value.numel(), dtype=torch.bool)
            mask[index] = True
            unfrozen.mask = mask.view(value.shape).to(value.device)
        elif unfrozen.derived and {f"{key_}|places", f"{key_}|values"} <= set(left):
            values, summed = left.pop(f"{key_}|values"), left.pop(f"{key_}|places")
            assert unfrozen.mask is not None, "a mask that follows from the base is chosen by `begin`"
            if not torch.equal(_sum_of(unfrozen.mask), summed):
                raise IntegrityError(
                    f"{where}: the entries of {unfrozen.name} that follow from the base are others than when it was "
                    "saved. Load the base in the precision it was trained in, or in float32."
                )
            value[unfrozen.mask] = values.to(value.device, value.dtype)
        else:
            raise IntegrityError(f"{where}: no values for {key_}; the file is not whole.")
    if left:
        raise IntegrityError(f"{where}: tensors that this method does not have: {', '.join(sorted(left)[:5])}.")
    tuning.finished = True


def _thickened(tuning: Tuning, key_: str, module: nn.Module, mine: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take tensors with numbers held at zero out of `mine`, and give them whole; their masks hold again."""
    whole: dict[str, Tensor] = {}
    for short, parameter in module.named_parameters():
        if f"{short}|bits" in mine and f"{short}|values" in mine:
            bits, values = mine.pop(f"{short}|bits"), mine.pop(f"{short}|values")
            flat = np.unpackbits(bits.numpy(), count=parameter.numel(), bitorder="little").astype(bool)
            mask = torch.from_numpy(flat).view(parameter.shape)
            whole[short] = torch.zeros(parameter.shape, dtype=values.dtype)
            whole[short][mask] = values
            tuning.masks[f"{key_}.{short}"] = mask.to(parameter.device)
    return whole


def _follow(module: nn.Module, like: Tensor | None) -> None:
    if like is not None:
        module.to(like.device)
