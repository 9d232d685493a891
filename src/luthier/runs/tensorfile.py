"""The safetensors layout, written without a copy of the data.

8 bytes: length of the header; the header: JSON, padded with blanks to a multiple of 8; then the tensors, one after
another. Wide types come first, so that each tensor starts at a multiple of its element's size, and names are sorted,
so that the same tensors always give the same bytes.
"""

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from luthier.core import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["pieces", "read_arrays", "read_tensors", "size_of"]

TYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "complex64": "C64",
}


def pieces(tensors: Mapping[str, "Tensor | NDArray[Any]"], metadata: Mapping[str, str]) -> list[bytes | memoryview]:
    """The file's bytes as a list of buffers: the header, then each tensor's own memory where it lies contiguous on the
    CPU (a copy where not). Arrays of numpy give the bytes that tensors of the same numbers do, without torch.

    Raises:
        ConfigError: a tensor is of a type that safetensors cannot hold, or is sparse.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    data: list[bytes | memoryview] = []
    start = 0
    for name in order:
        tensor = tensors[name]
        word = TYPES.get(str(tensor.dtype).removeprefix("torch."))
        if word is None or getattr(tensor, "is_sparse", False):
            raise ConfigError(
                f"tensor {name!r}: {getattr(tensor, 'layout', '')} {tensor.dtype} cannot be stored in safetensors;"
                f" convert it to a dense tensor of one of {', '.join(TYPES)}."
            )
        end = start + math.prod(tensor.shape) * tensor.itemsize
        header[name] = {"dtype": word, "shape": list(tensor.shape), "data_offsets": [start, end]}
        if end > start:
            data.append(_memory(tensor))
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *data]


def size_of(tensors: Mapping[str, "Tensor"]) -> int:
    """Bytes of the tensors' numbers, without the header."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _memory(tensor: "Tensor | NDArray[Any]") -> memoryview:
    import numpy as np

    if isinstance(tensor, np.ndarray):
        return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data
    import torch  # late: only here are tensors touched, and the rest of the room must start fast

    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
    return flat.numpy().data


def read_arrays(content: bytes) -> "dict[str, NDArray[Any]]":
    """The same as arrays of numpy that may be written to, without torch.

    Raises:
        safetensors.SafetensorError: they are no safetensors file.
    """
    from safetensors.numpy import load

    return {name: array.copy() for name, array in load(content).items()}


def read_tensors(content: bytes) -> dict[str, "Tensor"]:
    """Parse bytes that have been verified already.

    Raises:
        safetensors.SafetensorError: they are no safetensors file.
    """
    from safetensors.torch import load  # late: imports torch

    return load(content)
