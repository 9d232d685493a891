"""Tensors from safetensors files, after a check of the header that is stricter than the format's own.

Layout of the file: 8 bytes header length (little-endian), that many bytes of JSON, then the tensors, without gaps.
The check runs before any parser that is not ours sees the file. Small files are read once, and the bytes that were
checked are the bytes that become tensors; large ones are memory-mapped, and must not have changed meanwhile.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core import IntegrityError, LuthierError, Refused, human_bytes
from luthier.trust._bytes import identity, open_regular, show
from luthier.trust._limits import Limits
from luthier.trust.config import parse_json

if TYPE_CHECKING:
    import torch

__all__ = ["DTYPES", "Entry", "Header", "check_header", "read", "sha256", "unequal"]

# Name in the file -> (name in torch, bytes of one element). Types of less than a byte are not read.
DTYPES: Mapping[str, tuple[str, int]] = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}


@dataclass(frozen=True)
class Entry:
    """One tensor as the header describes it; `start` and `stop` are bytes from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """A header that passed the check."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    file_bytes: int


def check_header(path: str | os.PathLike[str], *, limits: Limits = Limits()) -> Header:  # noqa: B008  # frozen
    """Check the header of a safetensors file against the file's size; reads no tensor.

    Raises:
        BadInput: no such file.
        Refused: anything that a careful writer would not have written; the message says what.
    """
    with open_regular(path) as file:
        return _header(file, show(str(path), 200), limits)


def read(
    path: str | os.PathLike[str],
    expect: Mapping[str, Sequence[int]] | None = None,
    digest: str | None = None,
    allow_nonfinite: bool = False,
    limits: Limits = Limits(),  # noqa: B008
) -> "dict[str, torch.Tensor]":
    """Read a safetensors file whose every claim has been checked.

    Args:
        path: a regular file.
        expect: name -> shape of exactly the tensors that must be there; None takes what there is.
        digest: the sha256 (hex) that the whole file must have.
        allow_nonfinite: let NaN and infinity stand.
        limits: caps; files above `limits.in_memory` bytes are memory-mapped.

    Returns:
        Name -> tensor on the CPU, in the order of the names. They own their memory, or map the file (copy on write).

    Raises:
        BadInput: no such file.
        IntegrityError: the digest differs, or the file changed while it was read.
        Refused: a bad header, names or shapes other than expected, a tensor with NaN or infinity (named).
    """
    import torch

    where = show(str(path), 200)
    tensors: dict[str, torch.Tensor] = {}
    with open_regular(path) as file:
        before = identity(file)
        header = _header(file, where, limits)
        if expect is not None:
            _compare(header, expect, where)
        if header.file_bytes <= limits.in_memory:
            file.seek(0)
            content = bytearray(header.file_bytes)
            if file.readinto(content) != header.file_bytes or file.read(1):
                raise IntegrityError(f"{where}: changed while it was read. Let its writer finish and try again.")
            found = hashlib.sha256(content).hexdigest() if digest is not None else None
            # The header is read again from the bytes that are used: between two reads a file can be exchanged.
            if found is not None and found != digest:
                raise _wrong_digest(where, digest, found)
            if _parse(bytes(content[: _start(content)]), len(content), where, limits) != header:
                raise IntegrityError(f"{where}: changed while it was read. Let its writer finish and try again.")
            for name, entry in header.entries.items():
                dtype = getattr(torch, DTYPES[entry.dtype][0])
                piece = content[entry.start : entry.stop]  # a copy: aligned, and freed with its tensor
                flat = torch.frombuffer(piece, dtype=torch.uint8) if piece else torch.empty(0, dtype=torch.uint8)
                tensors[name] = flat.view(dtype).reshape(entry.shape)
        else:
            if digest is not None and (streamed := _sha256(file)) != digest:
                raise _wrong_digest(where, digest, streamed)
            mapped = torch.from_file(str(path), shared=False, size=header.file_bytes, dtype=torch.uint8)
            for name, entry in header.entries.items():
                width = DTYPES[entry.dtype][1]
                piece_u8 = mapped[entry.start : entry.stop]
                if entry.start % width:  # view() needs alignment; the format pads, but need not
                    piece_u8 = piece_u8.clone()
                tensors[name] = piece_u8.view(getattr(torch, DTYPES[entry.dtype][0])).reshape(entry.shape)
        if identity(file) != before or identity_of(path) != before:
            raise IntegrityError(f"{where}: changed while it was read. Let its writer finish and try again.")
    if not allow_nonfinite:
        _finite(tensors, where)
    return {name: tensors[name] for name in sorted(tensors)}


def unequal(
    path: str | os.PathLike[str],
    tensors: "Mapping[str, torch.Tensor]",
    digest: str | None = None,
    limits: Limits = Limits(),  # noqa: B008
) -> list[str]:
    """Names that the file and `tensors` (on the CPU) do not hold alike, bit for bit. One tensor is read at a time, so
    comparing a whole model takes no second one in memory.

    Raises:
        BadInput: no such file.
        IntegrityError: the digest differs, or the file changed while it was read.
        Refused: a bad header.
    """
    import torch

    where = show(str(path), 200)
    with open_regular(path) as file:
        before = identity(file)
        header = _header(file, where, limits)
        wrong = sorted(header.entries.keys() ^ tensors.keys())
        for name in header.entries.keys() & tensors.keys():
            entry, held = header.entries[name], tensors[name]
            alike = getattr(torch, DTYPES[entry.dtype][0]) == held.dtype and entry.shape == tuple(held.shape)
            file.seek(entry.start)
            content = bytearray(entry.stop - entry.start if alike else 0)
            if file.readinto(content) != len(content):
                raise IntegrityError(f"{where}: changed while it was read. Let its writer finish and try again.")
            if alike and content:
                bits = held.detach().contiguous().flatten().view(torch.uint8)
                alike = torch.equal(torch.frombuffer(content, dtype=torch.uint8), bits)
            if not alike:
                wrong.append(name)
        if digest is not None and (streamed := _sha256(file)) != digest:
            raise _wrong_digest(where, digest, streamed)
        if identity(file) != before or identity_of(path) != before:
            raise IntegrityError(f"{where}: changed while it was read. Let its writer finish and try again.")
    return sorted(wrong)


def sha256(path: str | os.PathLike[str]) -> str:
    """The sha256 of a whole file, as 64 hexadecimal digits."""
    with open_regular(path) as file:
        return _sha256(file)


def identity_of(path: str | os.PathLike[str]) -> tuple[int, int, int, int]:
    """`identity` of whatever `path` names now."""
    facts = Path(path).stat()
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def _sha256(file: BufferedReader) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


def _wrong_digest(where: str, expected: str | None, found: str) -> IntegrityError:
    return IntegrityError(
        f"{where}: its sha256 is {found}, expected {show(expected)}. The file was damaged or exchanged: "
        "take it from its source again, or use an older checkpoint."
    )


def _start(content: bytes | bytearray) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def _header(file: BufferedReader, where: str, limits: Limits) -> Header:
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    first = file.read(8)
    brace = file.read(1)
    file.seek(8)
    file.seek(8)
    if len(first) < 8:
        raise Refused(
            f"{where}: {size} bytes; a safetensors file has at least 10. It is empty or cut off: fetch it again."
        )
    # The length of an honest header may begin with the same two bytes as a pickle; its text begins with a brace.
    pickled = first[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") and brace != b"{"
    if pickled or first[:4] == b"PK\x03\x04":
        raise Refused(
            f"{where}: a pickle checkpoint under another name. Pickle can run code: `luthier convert` makes it safe."
        )
    length = int.from_bytes(first, "little")
    if length > limits.header_bytes:
        raise Refused(
            f"{where}: claims a header of {length} bytes; at most {human_bytes(limits.header_bytes)} are read. "
            "It is no safetensors file, or a hostile one."
        )
    if length > size - 8:
        raise Refused(
            f"{where}: claims a header of {length} bytes but the file has {size}. It is cut off: fetch it again."
        )
    return _parse(first + file.read(length), size, where, limits)


def _parse(head: bytes, size: int, where: str, limits: Limits) -> Header:
    """Check `head` (the length and the JSON) against a file of `size` bytes."""
    if len(head) != _start(head):
        raise Refused(f"{where}: cut off inside its header. Fetch it again.")
    if head[8:9] != b"{":
        raise Refused(f"{where}: its header does not begin with '{{', so it is no safetensors file.")
    try:
        text = head[8:].decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused(
            f"{where}: byte {8 + error.start} of its header is not UTF-8. It is damaged: fetch it again."
        ) from None
    # Each tensor needs the word data_offsets, so that counting it is cheap and comes before parsing.
    if text.count('"data_offsets"') > limits.entries:
        raise Refused(
            f"{where}: more than {limits.entries} tensors in one file; no model needs that many in one shard."
        )
    try:
        table = parse_json(text, where, limits=limits)
    except Refused:
        raise
    except LuthierError as error:
        raise Refused(f"{error} This is the header of a safetensors file: it is damaged or hostile.") from None
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise Refused(f"{where}: __metadata__ must map text to text. The file was not written by a safetensors writer.")
    if len(table) > limits.entries:
        raise Refused(f"{where}: {len(table)} tensors in one file; at most {limits.entries} are read.")
    base = len(head)
    entries = {name: _entry(name, facts, base, where, limits) for name, facts in table.items()}
    at = base
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != at:
            word = (
                "overlaps the one before it"
                if entry.start < at
                else f"leaves a gap of {entry.start - at} bytes before it"
            )
            raise Refused(
                f"{where}: tensor {show(name)} {word}. A safetensors writer never does that: refuse its source."
            )
        at = entry.stop
    if at != size:
        word = "cut off" if at > size else "longer than its header says"
        raise Refused(f"{where}: is {word}: the header describes {at} bytes, the file has {size}. Fetch it again.")
    return Header(entries, metadata, size)


def _entry(name: str, facts: Any, base: int, where: str, limits: Limits) -> Entry:
    label = f"{where}: tensor {show(name)}"
    if not name or len(name) > limits.name_chars or not name.isprintable():
        raise Refused(f"{label}: its name is empty, longer than {limits.name_chars} characters, or not printable.")
    if not isinstance(facts, dict) or set(facts) != {"dtype", "shape", "data_offsets"}:
        raise Refused(f"{label}: must have exactly dtype, shape and data_offsets, got {show(facts)}.")
    dtype, shape, offsets = facts["dtype"], facts["shape"], facts["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise Refused(f"{label}: dtype {show(dtype)} is not read; we read {', '.join(DTYPES)}.")
    if not isinstance(shape, list) or len(shape) > limits.dims or not all(_natural(n) for n in shape):
        raise Refused(f"{label}: shape {show(shape)} must be at most {limits.dims} whole numbers, none negative.")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(_natural(n) for n in offsets)
        or offsets[0] > offsets[1]
    ):
        raise Refused(
            f"{label}: data_offsets {show(offsets)} must be two whole numbers, the first not above the second."
        )
    needed = DTYPES[dtype][1]
    for n in shape:
        needed *= n
        if needed >= 2**63:  # a reader in C would overflow here
            raise Refused(f"{label}: shape {show(shape)} overflows 64 bits.")
    if needed != offsets[1] - offsets[0]:
        raise Refused(
            f"{label}: shape {show(shape)} of {dtype} needs {needed} bytes, its data_offsets give "
            f"{offsets[1] - offsets[0]}."
        )
    return Entry(dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _natural(n: object) -> bool:
    return type(n) is int and 0 <= n < 2**63  # type(): True is an int as well


def _compare(header: Header, expect: Mapping[str, Sequence[int]], where: str) -> None:
    wrong = [f"{show(n)} is missing" for n in expect if n not in header.entries]
    wrong += [f"{show(n)} was not expected" for n in header.entries if n not in expect]
    wrong += [
        f"{show(n)} has shape {list(header.entries[n].shape)}, expected {list(shape)}"
        for n, shape in expect.items()
        if n in header.entries and header.entries[n].shape != tuple(shape)
    ]
    if wrong:
        more = f"; and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise Refused(
            f"{where}: not the tensors that belong here: {'; '.join(wrong[:20])}{more}. Was it made for another model?"
        )


def _finite(tensors: "dict[str, torch.Tensor]", where: str) -> None:
    import torch

    bad = []
    for name, tensor in sorted(tensors.items()):
        if tensor.is_floating_point():
            if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
                tensor = tensor.to(torch.float16)
            pieces = torch.split(
                tensor.reshape(-1), 1 << 22
            )  # bounded: isfinite of a whole embedding costs a copy of it
            count = sum(int((~torch.isfinite(piece)).sum()) for piece in pieces)
            if count:
                bad.append(f"{show(name)} ({count} of {tensor.numel()})")
    if bad:
        more = f" and {len(bad) - 20} more" if len(bad) > 20 else ""
        raise Refused(
            f"{where}: NaN or infinity in {', '.join(bad[:20])}{more}. Training from it would give NaN: "
            "take the file from its source again, or an older checkpoint."
        )
