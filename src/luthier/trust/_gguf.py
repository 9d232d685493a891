"""The header of a GGUF file, read in the child process. Every count is compared with the bytes that are left."""

import os
import struct
from collections.abc import Callable
from io import BufferedReader
from typing import Any

from luthier.core.errors import Refused

__all__ = ["BLOCKS", "start"]

# Type number -> (elements per block, bytes per block), as the format's quantisation tables give them.
BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 10: (256, 84),
    11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66), 17: (256, 74),
    18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1),
    25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66),
    39: (32, 17),
}  # fmt: skip
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_KEPT_CHARS = 100_000  # a chat template; longer texts are counted, not handed over


class _Reader:
    def __init__(self, file: BufferedReader, size: int, most: int) -> None:
        self.file, self.size, self.at, self.most = file, size, 0, min(size, most)

    def left(self) -> int:
        return self.most - self.at

    def take(self, count: int, what: str) -> bytes:
        if count > self.left():
            raise Refused(f"{what} claims {count} bytes, but {self.left()} are left. It is cut off or hostile.")
        self.at += count
        return self.file.read(count)

    def number(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def text(self, what: str, most: int) -> str:
        length = self.number("Q", what)
        if length > most:
            raise Refused(f"{what} claims a text of {length} bytes; at most {most} are read.")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise Refused(f"{what} is not UTF-8.") from None


def start(args: dict[str, Any]) -> Callable[[Any], Any]:
    """The handler reads the header of `args["path"]` within `args`' limits."""
    return lambda question: _read(args)


def _read(args: dict[str, Any]) -> dict[str, Any]:
    with open(args["path"], "rb") as file:  # noqa: PTH123  # a path object imports late
        size = os.fstat(file.fileno()).st_size
        reader = _Reader(file, size, args["header_bytes"])
        if reader.take(4, "the file") != b"GGUF":
            raise Refused("it does not begin with GGUF.")
        version = reader.number("I", "the version")
        if version not in (2, 3):
            raise Refused(f"version {version} is not read; 2 and 3 are (a big-endian file looks like another version).")
        tensors, pairs = reader.number("Q", "the tensor count"), reader.number("Q", "the key count")
        # The shortest tensor entry has 25 bytes, the shortest pair 13.
        if tensors > args["tensors"] or tensors * 25 > reader.left():
            raise Refused(f"it claims {tensors} tensors; at most {args['tensors']} fit and are read.")
        if pairs > args["pairs"] or pairs * 13 > reader.left():
            raise Refused(f"it claims {pairs} metadata keys; at most {args['pairs']} fit and are read.")
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = reader.text("a metadata key", 65_535)
            if not key or not key.isprintable() or key in metadata:
                raise Refused(f"the metadata key {ascii(key)[:80]} is empty, not printable or there twice.")
            metadata[key] = _value(reader, reader.number("I", f"key {key[:80]!r}"), f"key {key[:80]!r}", args, 0)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= 65_536 or alignment & (alignment - 1):
            raise Refused(f"general.alignment is {alignment!r}; it must be a power of two between 8 and 65536.")
        found = _tensors(reader, tensors, alignment)
        base = reader.at + -reader.at % alignment
        end = 0
        for name, entry in sorted(found.items(), key=lambda item: item[1]["offset"]):
            if entry["offset"] < end:
                raise Refused(f"tensor {ascii(name)[:80]} overlaps the one before it.")
            end = entry["offset"] + entry["bytes"]
            if base + end > size:
                raise Refused(f"tensor {ascii(name)[:80]} ends at byte {base + end}, the file at {size}.")
        return {"version": version, "metadata": metadata, "tensors": found, "data_start": base}


def _tensors(reader: _Reader, count: int, alignment: int) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for _ in range(count):
        name = reader.text("a tensor's name", 512)
        label = f"tensor {ascii(name)[:80]}"
        if not name or not name.isprintable() or name in found:
            raise Refused(f"{label}: its name is empty, not printable or there twice.")
        dims = reader.number("I", label)
        if not 1 <= dims <= 4:
            raise Refused(f"{label} has {dims} dimensions; 1 to 4 are possible.")
        shape = [reader.number("Q", label) for _ in range(dims)]
        kind, offset = reader.number("I", label), reader.number("Q", label)
        if kind not in BLOCKS:
            raise Refused(f"{label} has the type {kind}, which is not known.")
        elements = 1
        for n in shape:
            elements *= n
            if not 0 < elements < 2**60:
                raise Refused(f"{label}: shape {shape} is empty or overflows.")
        block, width = BLOCKS[kind]
        if shape[0] % block:
            raise Refused(f"{label}: rows of {shape[0]} do not divide into blocks of {block}.")
        if offset % alignment or offset >= 2**62:
            raise Refused(f"{label}: offset {offset} is not a multiple of {alignment}, or too large.")
        found[name] = {"shape": shape, "type": kind, "offset": offset, "bytes": elements // block * width}
    return found


def _value(reader: _Reader, kind: int, what: str, args: dict[str, Any], depth: int) -> Any:
    if kind in _SCALARS:
        if kind == 7:
            flag = reader.number("B", what)
            if flag > 1:
                raise Refused(f"{what}: {flag} is neither true nor false.")
            return bool(flag)
        return reader.number(_SCALARS[kind], what)
    if kind == _STRING:
        text = reader.text(what, 4_000_000)
        return text if len(text) <= _KEPT_CHARS else f"(text of {len(text)} characters)"
    if kind != _ARRAY:
        raise Refused(f"{what}: the value type {kind} is not known.")
    inner, count = reader.number("I", what), reader.number("Q", what)
    if inner == _ARRAY and depth >= 2:
        raise Refused(f"{what}: arrays nested deeper than 3.")
    least = struct.calcsize("<" + _SCALARS[inner]) if inner in _SCALARS else {_STRING: 8, _ARRAY: 12}.get(inner, 0)
    if not least:
        raise Refused(f"{what}: the element type {inner} is not known.")
    if count > args["array"] or count * least > reader.left():
        raise Refused(f"{what}: claims {count} elements; at most {args['array']} fit and are read.")
    if inner in _SCALARS:
        reader.take(count * least, what)
    else:
        for _ in range(count):
            if inner == _STRING:
                reader.take(reader.number("Q", what), what)
            else:
                _value(reader, inner, what, args, depth + 1)
    return f"(array of {count})"
