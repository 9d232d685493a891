"""The header of a GGUF file: parsed by us, in a bounded child process, before any other reader gets the file."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from luthier.core import Refused
from luthier.trust import jail
from luthier.trust._bytes import open_regular, show
from luthier.trust._limits import Limits

__all__ = ["GGUFHeader", "check"]


@dataclass(frozen=True)
class GGUFHeader:
    """A header that passed: scalars and texts of the metadata (arrays only counted), and tensors with their places."""

    version: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, Any]]
    data_start: int


def check(path: str | os.PathLike[str], *, limits: Limits = Limits()) -> GGUFHeader:  # noqa: B008  # frozen
    """Check counts, alignment, texts, shapes and offsets against the size of the file; reads no tensor.

    Raises:
        BadInput: no such file.
        Refused: anything that a careful writer would not have written, or a header beyond the caps.
    """
    open_regular(path).close()
    where = show(str(path), 200)
    full = os.path.abspath(path)  # noqa: PTH100  # the child stands in another folder; links are followed there
    args = {
        "path": full,
        "header_bytes": limits.gguf_header_bytes,
        "tensors": limits.gguf_tensors,
        "pairs": limits.gguf_pairs,
        "array": limits.gguf_array,
    }
    try:
        # 10 s: the vocabulary of a real model is a million texts. Hostile counts fail against the file's size at once.
        found = jail.run(
            "luthier.trust._gguf:start", args, what=where, seconds=10.0, bytes_=limits.child_bytes, readable=[full]
        )
    except Refused as error:
        text = str(error)
        raise Refused(
            text if text.startswith(where) else f"{where}: {text} Take the file from its source again."
        ) from None
    return GGUFHeader(found["version"], found["metadata"], found["tensors"], found["data_start"])
