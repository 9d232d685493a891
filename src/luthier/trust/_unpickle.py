"""The tensors of a torch checkpoint, by the one unpickler of the house. Runs in the jailed child of `convert` only.

No name in the pickle is ever looked up: each allowed one stands for a function below, and every other one ends the
reading. Nothing of torch is imported.
"""

import json
import pickle  # the only import of it; a test reads the syntax tree of every file to make sure
import re
import struct
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.core.errors import Refused

__all__ = ["start"]

# Storage type -> (name in safetensors, bytes of one element).
STORAGES = {
    "FloatStorage": ("F32", 4),
    "DoubleStorage": ("F64", 8),
    "HalfStorage": ("F16", 2),
    "BFloat16Storage": ("BF16", 2),
    "LongStorage": ("I64", 8),
    "IntStorage": ("I32", 4),
    "ShortStorage": ("I16", 2),
    "CharStorage": ("I8", 1),
    "ByteStorage": ("U8", 1),
    "BoolStorage": ("BOOL", 1),
}
_MOST_DIMS = 16


@dataclass(frozen=True)
class _Kind:
    dtype: str
    width: int


@dataclass(frozen=True)
class _Storage:
    kind: _Kind
    key: str
    numel: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Ordered(dict[Any, Any]):
    """Stands for OrderedDict; what a module hung on its state dict (versions of layers) is not wanted."""

    def __setstate__(self, state: object) -> None:
        pass


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Tensor:
    numbers = (offset, *size, *stride)
    if not isinstance(storage, _Storage) or not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
        raise Refused("a tensor is described by something other than whole numbers; it is hostile or damaged.")
    if len(size) != len(stride) or len(size) > _MOST_DIMS:
        raise Refused(f"a tensor has {len(size)} sizes and {len(stride)} strides; it is hostile or damaged.")
    count, last = 1, offset
    for n, step in zip(size, stride, strict=True):
        count *= n
        last += max(n - 1, 0) * step
    if count and last >= storage.numel:
        raise Refused(f"a tensor reaches element {last} of a storage of {storage.numel}; it is hostile or damaged.")
    if count > storage.numel:
        raise Refused(f"a tensor of {count} elements repeats a storage of {storage.numel}; save it contiguously.")
    return _Tensor(storage, offset, tuple(size), tuple(stride))


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


_ALLOWED: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("collections", "OrderedDict"): _Ordered,
    **{("torch", name): _Kind(*facts) for name, facts in STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise Refused(
                f"the pickle asks for {ascii(f'{module}.{name}')[:200]}, which no tensor needs. Do not load it with "
                "anything. If it is your own, save `model.state_dict()` alone and convert that."
            ) from None

    def persistent_load(self, pid: Any) -> _Storage:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[1], _Kind)):
            raise Refused(f"the pickle refers to {ascii(pid)[:200]}, which is no storage of tensors.")
        _, kind, key, _, numel = pid
        if not isinstance(key, str) or not re.fullmatch(r"\w{1,40}", key) or type(numel) is not int or numel < 0:
            raise Refused(f"the pickle names its storage {ascii(key)[:80]} with {ascii(numel)[:40]} elements.")
        return _Storage(kind, key, numel)


def start(args: dict[str, Any]) -> Callable[[Any], Any]:
    """The handler reads `args["source"]` and writes `args["out"]`; answers with names and what was left out."""
    return lambda question: _convert(args["source"], args["out"])


def _convert(source: str, out: str) -> dict[str, Any]:
    with zipfile.ZipFile(source) as archive:
        names = archive.namelist()
        if len(names) > 100_000:
            raise Refused(f"{len(names)} members; no checkpoint has that many.")
        pickles = [n for n in names if n == "data.pkl" or n.endswith("/data.pkl")]
        if len(pickles) != 1 or len(set(names)) != len(names):
            raise Refused("it is no checkpoint of torch: it must hold exactly one data.pkl, and every name once.")
        root = pickles[0].removesuffix("data.pkl")
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise Refused("its members are packed; torch stores them plainly. It is no checkpoint of torch.")
        order = archive.read(root + "byteorder") if root + "byteorder" in names else b"little"
        if order != b"little" or sys.byteorder != "little":
            raise Refused(f"its byte order is {ascii(order)[:20]}; only little-endian checkpoints are converted.")
        with archive.open(pickles[0]) as file:
            content = _Unpickler(file).load()
        tensors, left_out = _flatten(content)
        _write(archive, root, tensors, out)
    return {"tensors": len(tensors), "left_out": left_out[:100], "left_out_count": len(left_out)}


def _flatten(content: Any) -> tuple[dict[str, _Tensor], list[str]]:
    """Name -> tensor. Training frameworks keep the weights one level down, beside counters and settings."""
    if not isinstance(content, dict):
        raise Refused(f"it holds {type(content).__name__}, not a table of tensors. Save `model.state_dict()`.")
    found: dict[str, _Tensor] = {}
    left_out: list[str] = []
    for outer in ("state_dict", "model_state_dict", "model", "module"):
        if isinstance(content.get(outer), dict) and any(isinstance(v, _Tensor) for v in content[outer].values()):
            left_out += [f"{ascii(k)[:80]}" for k in content if k != outer]
            content = content[outer]
            break
    for name, value in content.items():
        if isinstance(value, _Tensor) and isinstance(name, str) and name.isprintable() and 0 < len(name) <= 512:
            found[name] = value
        else:
            left_out.append(ascii(name)[:80])
    if not found:
        raise Refused("it holds no tensors under plain names. Save `model.state_dict()`.")
    return found, left_out


def _write(archive: zipfile.ZipFile, root: str, tensors: dict[str, _Tensor], out: str) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    # Wide types first, so that every tensor stays aligned to its own width.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].storage.kind.width, item[0]))
    for name, tensor in ordered:
        size = tensor.storage.kind.width
        for n in tensor.shape:
            size *= n
        header[name] = {
            "dtype": tensor.storage.kind.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    kept: tuple[str, bytes] = ("", b"")
    with open(out, "xb") as file:  # noqa: PTH123
        file.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in ordered:
            storage = tensor.storage
            if kept[0] != storage.key:  # tied weights follow each other
                kept = ("", b"")
                member = f"{root}data/{storage.key}"
                if member not in archive.NameToInfo:
                    raise Refused(f"the storage {storage.key} is missing. The file is cut off: fetch it again.")
                kept = (storage.key, archive.read(member))
            if len(kept[1]) != storage.numel * storage.kind.width:
                raise Refused(
                    f"the storage {storage.key} has {len(kept[1])} bytes, {storage.numel} elements are claimed."
                )
            flat = np.frombuffer(kept[1], dtype=f"u{storage.kind.width}")
            # Bounds were checked in _rebuild_tensor; as_strided itself checks nothing.
            view = np.lib.stride_tricks.as_strided(
                flat[tensor.offset :],
                tensor.shape,
                [step * storage.kind.width for step in tensor.stride],
                writeable=False,
            )
            file.write(np.ascontiguousarray(view).tobytes())
