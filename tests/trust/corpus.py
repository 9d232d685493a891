"""Hostile files, generated from code. Each must be refused; `make` writes one into a folder and returns its path.

Where a file could do something if it were believed, what it would do is leave a file called CANARY behind.
"""

# the bytes of a hostile file stand on one line
import gzip
import io
import itertools
import json
import lzma
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CANARY = "CANARY"


@dataclass(frozen=True)
class Case:
    """One hostile file: the reader that must refuse it, and how it is written."""

    name: str
    reader: str
    make: Callable[[Path], Path]
    suffix: str


def _file(name: str, content: bytes | Callable[[], bytes], suffix: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / f"case{suffix}"
        path.write_bytes(content() if callable(content) else content)
        return path

    return make


def _case(reader: str, name: str, content: bytes | str | Callable[[], bytes], suffix: str) -> Case:
    if isinstance(content, str):
        content = content.encode()
    return Case(f"{reader}: {name}", reader, _file(name, content, suffix), suffix)


# ------------------------------------------------------------------------------------------------ safetensors


def st_bytes(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of any header: a table, or raw text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def _t(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": list(shape) if isinstance(shape, tuple) else shape,
        "data_offsets": list(offsets) if isinstance(offsets, tuple) else offsets,
        **more,
    }


def _sparse(length: int) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / "case.safetensors"
        with path.open("wb") as file:
            file.write(struct.pack("<Q", length) + b"{")
            file.truncate(length + 100)
        return path

    return make


def safetensors_cases() -> Iterator[Case]:
    b8 = bytes(8)
    tables: dict[str, bytes | Callable[[], bytes]] = {
        "empty file": b"",
        "seven bytes": b"1234567",
        "length only": struct.pack("<Q", 0),
        "zero header": struct.pack("<Q", 0) + b8,
        "length beyond file": st_bytes({"a": _t()}, b8, 10**6),
        "length 2**63": st_bytes({"a": _t()}, b8, 2**63),
        "length 2**64-1": st_bytes({"a": _t()}, b8, 2**64 - 1),
        "pickle under this name": pickle.dumps({"a": 1}),
        "zip under this name": b"PK\x03\x04" + bytes(100),
        "header is a list": st_bytes([1, 2], b8),
        "header is a number": st_bytes(b"7", b8),
        "header begins with blank": st_bytes(b" {}"),
        "header cut off": st_bytes(b'{"a":{"dtype":"F32"', b8),
        "header not utf-8": st_bytes(b'{"\xff\xfe":1}', b8),
        "header with text behind": st_bytes(b"{} x"),
        "header with NaN": st_bytes(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', b8),
        "header nested 10000 deep": st_bytes(b'{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}"),
        "number of 5000 digits": st_bytes(
            b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', b8
        ),
        "duplicate name": st_bytes(
            b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}',
            bytes(16),
        ),
        "duplicate key in entry": st_bytes(b'{"a":{"dtype":"F32","dtype":"I64","shape":[2],"data_offsets":[0,8]}}', b8),
        "100000 tensors": lambda: st_bytes({f"t{i}": _t(shape=(0,), offsets=(0, 0)) for i in range(100_000)}),
        "8 MB of blanks": lambda: st_bytes(b"{" + b" " * 8_000_001 + b"}"),
        "metadata not text": st_bytes({"__metadata__": {"a": 1}, "a": _t()}, b8),
        "metadata a list": st_bytes({"__metadata__": [1], "a": _t()}, b8),
        "name empty": st_bytes({"": _t()}, b8),
        "name with escape": st_bytes({"\x1b[31m": _t()}, b8),
        "name with newline": st_bytes({"a\nb": _t()}, b8),
        "name of 10000 characters": st_bytes({"a" * 10_000: _t()}, b8),
        "name with surrogate": st_bytes(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b8),
        "gap at the start": st_bytes({"a": _t(offsets=(4, 12))}, bytes(12)),
        "gap between": st_bytes({"a": _t(), "b": _t(offsets=(12, 20))}, bytes(20)),
        "overlap": st_bytes({"a": _t(), "b": _t(offsets=(4, 12))}, bytes(12)),
        "same bytes twice": st_bytes({"a": _t(), "b": _t()}, b8),
        "hole at the end": st_bytes({"a": _t()}, bytes(9)),
        "cut body": st_bytes({"a": _t()}, bytes(7)),
        "no body": st_bytes({"a": _t()}),
        "tensors swapped beyond end": st_bytes({"a": _t(offsets=(8, 0))}, b8),
    }
    entries: dict[str, Any] = {
        "dtype unknown": _t("F33"),
        "dtype object": _t("object"),
        "dtype list": _t(["F32"]),
        "dtype null": _t(None),
        "dtype subbyte": _t("F4"),
        "shape negative": _t(shape=(-2,)),
        "shape float": _t(shape=(2.0,)),
        "shape bool": _t(shape=(True, 2)),
        "shape text": _t(shape="2"),
        "shape null": _t(shape=None),
        "shape product wraps to 2": _t(shape=(2**62, 2, 2, 2)),
        "shape product wraps to 0": _t(shape=(2**32, 2**32), offsets=(0, 0)),
        "shape too large": _t(shape=(10**30,)),
        "shape of 1000 dims": _t(shape=(1,) * 1000),
        "shape too small": _t(shape=(1,)),
        "shape too big": _t(shape=(3,)),
        "offsets negative": _t(offsets=(-8, 0)),
        "offsets three": _t(offsets=(0, 4, 8)),
        "offsets text": _t(offsets="08"),
        "offsets float": _t(offsets=(0.0, 8.0)),
        "offsets huge": _t(offsets=(2**63 - 8, 2**63)),
        "offsets bool": _t(offsets=(False, 8)),
        "extra key": _t(code="import os"),
        "entry a list": [1, 2],
        "entry a number": 3,
        "entry without shape": {"dtype": "F32", "data_offsets": [0, 8]},
        "entry empty": {},
    }
    for name, content in tables.items():
        yield _case("safetensors", name, content, ".safetensors")
    for name, entry in entries.items():
        yield _case("safetensors", name, st_bytes({"a": entry}, b8), ".safetensors")
    yield Case("safetensors: header of 100 MB", "safetensors", _sparse(100_000_000), ".safetensors")
    yield Case("safetensors: header of 10 GB", "safetensors", _sparse(10_000_000_000), ".safetensors")


# ------------------------------------------------------------------------------------------------ GGUF


def gguf_bytes(
    pairs: bytes = b"", n_pairs: int = 0, tensors: bytes = b"", n_tensors: int = 0, version: int = 3, body: bytes = b""
) -> bytes:
    """A GGUF file from its raw parts."""
    head = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_pairs) + pairs + tensors
    return head + bytes(-len(head) % 32) + body


def _s(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def _kv(key: bytes, kind: int, value: bytes) -> bytes:
    return _s(key) + struct.pack("<I", kind) + value


def _ti(
    name: bytes = b"t", shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0, dims: int | None = None
) -> bytes:
    n = len(shape) if dims is None else dims
    return _s(name) + struct.pack("<I", n) + struct.pack(f"<{len(shape)}Q", *shape) + struct.pack("<IQ", kind, offset)


def gguf_cases() -> Iterator[Case]:
    u32 = struct.pack("<I", 7)
    b64 = bytes(64)
    align = lambda n: _kv(b"general.alignment", 4, struct.pack("<I", n))
    files: dict[str, bytes | Callable[[], bytes]] = {
        "empty": b"",
        "magic only": b"GGUF",
        "wrong magic": b"GGML" + bytes(100),
        "version 0": gguf_bytes(version=0),
        "version 1": gguf_bytes(version=1),
        "version big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(100),
        "2**64-1 tensors": gguf_bytes(n_tensors=2**64 - 1, body=b64),
        "2**64-1 keys": gguf_bytes(n_pairs=2**64 - 1, body=b64),
        "10**6 tensors": gguf_bytes(n_tensors=10**6, body=b64),
        "10**5 keys in a big file": lambda: gguf_bytes(n_pairs=10**5, body=bytes(2_000_000)),
        "one tensor, no info": b"GGUF" + struct.pack("<IQQ", 3, 1, 0),
        "key of 2**63 bytes": gguf_bytes(_s(b"k", 2**63), 1, body=b64),
        "key of 2**64-1 bytes": gguf_bytes(_s(b"k", 2**64 - 1), 1, body=b64),
        "key empty": gguf_bytes(_kv(b"", 4, u32), 1, body=b64),
        "key twice": gguf_bytes(_kv(b"k", 4, u32) * 2, 2, body=b64),
        "key not utf-8": gguf_bytes(_kv(b"\xff", 4, u32), 1, body=b64),
        "key with escape": gguf_bytes(_kv(b"\x1b[31m", 4, u32), 1, body=b64),
        "value type 99": gguf_bytes(_kv(b"k", 99, u32), 1, body=b64),
        "bool 7": gguf_bytes(_kv(b"k", 7, b"\x07"), 1, body=b64),
        "text of 2**40 bytes": gguf_bytes(_kv(b"k", 8, _s(b"x", 2**40)), 1, body=b64),
        "text not utf-8": gguf_bytes(_kv(b"k", 8, _s(b"\xff\xff")), 1, body=b64),
        "array of 2**60 bytes": gguf_bytes(_kv(b"k", 9, struct.pack("<IQ", 0, 2**60)), 1, body=b64),
        "array of 10**9 texts": gguf_bytes(_kv(b"k", 9, struct.pack("<IQ", 8, 10**9)), 1, body=b64),
        "array of unknown type": gguf_bytes(_kv(b"k", 9, struct.pack("<IQ", 42, 1)), 1, body=b64),
        "array with text bomb": gguf_bytes(
            _kv(b"k", 9, struct.pack("<IQ", 8, 2) + _s(b"a") + _s(b"b", 2**62)), 1, body=b64
        ),
        "arrays nested 1000 deep": gguf_bytes(_kv(b"k", 9, struct.pack("<IQ", 9, 1) * 1000), 1, body=b64),
        "alignment 0": gguf_bytes(align(0), 1, _ti(), 1, body=b64),
        "alignment 3": gguf_bytes(align(3), 1, _ti(), 1, body=b64),
        "alignment 2**31": gguf_bytes(align(2**31), 1, _ti(), 1, body=b64),
        "alignment text": gguf_bytes(_kv(b"general.alignment", 8, _s(b"32")), 1, _ti(), 1, body=b64),
        "tensor of 0 dims": gguf_bytes(tensors=_ti(shape=()), n_tensors=1, body=b64),
        "tensor of 5 dims": gguf_bytes(tensors=_ti(shape=(1,) * 5), n_tensors=1, body=b64),
        "tensor of 2**31 dims": gguf_bytes(tensors=_ti(dims=2**31), n_tensors=1, body=b64),
        "tensor shape zero": gguf_bytes(tensors=_ti(shape=(0,)), n_tensors=1, body=b64),
        "tensor shape wraps": gguf_bytes(tensors=_ti(shape=(2**32, 2**32)), n_tensors=1, body=b64),
        "tensor shape 2**63": gguf_bytes(tensors=_ti(shape=(2**63,)), n_tensors=1, body=b64),
        "tensor beyond the end": gguf_bytes(tensors=_ti(shape=(1000,)), n_tensors=1, body=b64),
        "tensor offset beyond": gguf_bytes(tensors=_ti(offset=2**20), n_tensors=1, body=b64),
        "tensor offset 2**63": gguf_bytes(tensors=_ti(offset=2**63), n_tensors=1, body=b64),
        "tensor offset odd": gguf_bytes(tensors=_ti(offset=5), n_tensors=1, body=b64),
        "tensor type 200": gguf_bytes(tensors=_ti(kind=200), n_tensors=1, body=b64),
        "tensor part of a block": gguf_bytes(tensors=_ti(kind=8, shape=(5,)), n_tensors=1, body=b64),
        "tensor name twice": gguf_bytes(tensors=_ti() + _ti(offset=32), n_tensors=2, body=b64),
        "tensor name of 10000": gguf_bytes(tensors=_ti(name=b"a" * 10_000), n_tensors=1, body=b64),
        "tensors overlap": gguf_bytes(tensors=_ti(b"a", (16,)) + _ti(b"b", (4,), offset=32), n_tensors=2, body=b64),
        "no body": gguf_bytes(tensors=_ti(), n_tensors=1),
    }
    for name, content in files.items():
        yield _case("gguf", name, content, ".gguf")


# ------------------------------------------------------------------------------------------------ archives


def zip_bytes(members: list[tuple[str, bytes]], mode: int = 0, packing: int = zipfile.ZIP_STORED) -> bytes:
    """A zip; names are written as given."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", packing) as archive:
        for name, content in members:
            info = zipfile.ZipInfo(name)
            info.filename = name  # ZipInfo cleans what it is given
            info.external_attr = mode << 16
            info.compress_type = packing
            archive.writestr(info, content)
    return out.getvalue()


def tar_bytes(members: list[tuple[str, bytes, bytes, str]], form: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar of (name, type, content, link)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for name, kind, content, link in members:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(content), link
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def _raw_tar(name: bytes, kind: bytes = b"0", size: bytes = b"00000000001\0", body: bytes = b"x") -> bytes:
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108] = b"0000644\0"
    block[124:136] = size
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block) + body + bytes(-len(body) % 512) + bytes(1024)


def _pax_tar(records: list[bytes], name: bytes = b"ok") -> bytes:
    body = b""
    for record in records:
        length = len(record) + 3
        while len(str(length)) + 1 + len(record) + 1 != length:
            length = len(str(length)) + 1 + len(record) + 1
        body += str(length).encode() + b" " + record + b"\n"
    return _raw_tar(b"pax", b"x", f"{len(body):011o}\0".encode(), body)[:-1024] + _raw_tar(name)


def archive_cases() -> Iterator[Case]:
    names = {
        "absolute": f"/tmp/{CANARY}",
        "up": f"../{CANARY}",
        "up in the middle": f"a/../../{CANARY}",
        "dot": f"./../{CANARY}",
        "dots only": "..",
        "backslash up": f"..\\{CANARY}",
        "drive": f"C:/{CANARY}",
        "drive relative": f"C:{CANARY}",
        "double slash": f"a//{CANARY}",
        "share": f"//host/share/{CANARY}",
        "newline": f"a\n{CANARY}",
        "escape": "\x1b[31m",
        "bidi": "a\u202etxt.exe",
        "trailing dot": "a./b",
        "trailing blank": "a /b",
        "name of 5000": "a/" * 2_400 + "b",
        "part of 300": "a" * 300,
    }
    for word, name in names.items():
        yield _case("archive", f"zip, {word}", zip_bytes([(name, b"x")]), ".zip")
        if len(name) < 100 and name.isascii():
            yield _case("archive", f"tar, {word}", _raw_tar(name.encode()), ".tar")
    for word, kind in {"symlink": 0o120777, "fifo": 0o010644, "device": 0o060644, "socket": 0o140755}.items():
        yield _case("archive", f"zip, {word}", zip_bytes([("a", b"/etc/passwd")], kind), ".zip")
    kinds = {
        "symlink": b"2",
        "hardlink": b"1",
        "character device": b"3",
        "block device": b"4",
        "fifo": b"6",
        "sparse": b"S",
    }
    for word, kind_b in {**kinds, "contiguous": b"7", "unknown": b"Z"}.items():
        yield _case("archive", f"tar, {word}", _raw_tar(b"a", kind_b, b"00000000000\0", b""), ".tar")
    link = ("a", tarfile.SYMTYPE, b"", "..")
    yield _case(
        "archive", "tar, write through a link", tar_bytes([link, (f"a/{CANARY}", tarfile.REGTYPE, b"x", "")]), ".tar"
    )
    for word, pair in {
        "case": ("A", "a"),
        "the same": ("a", "a"),
        "unicode": ("\u00e9", "e\u0301"),
        "sharp s": ("ss", "\u00df"),
        "file and folder": ("a", "a/b"),
        "folder by case": ("A/x", "a/y"),
    }.items():
        yield _case(
            "archive", f"zip, collision by {word}", lambda pair=pair: _quiet_zip([(n, b"x") for n in pair]), ".zip"
        )
        yield _case(
            "archive",
            f"tar, collision by {word}",
            tar_bytes([(n, tarfile.REGTYPE, b"x", "") for n in pair], tarfile.GNU_FORMAT),
            ".tar",
        )
    bomb = bytes(50_000_000)
    yield _case("archive", "zip, bomb", lambda: zip_bytes([("a", bomb)], packing=zipfile.ZIP_DEFLATED), ".zip")
    yield _case("archive", "tar.gz, bomb", lambda: gzip.compress(tar_bytes([("a", b"0", bomb, "")])), ".tar.gz")
    yield _case(
        "archive", "tar.xz, bomb", lambda: lzma.compress(tar_bytes([("a", b"0", bomb, "")]), preset=0), ".tar.xz"
    )
    yield _case(
        "archive",
        "zip, bomb in many",
        lambda: zip_bytes([(f"a{i}", bytes(900_000)) for i in range(40)], packing=zipfile.ZIP_DEFLATED),
        ".zip",
    )
    yield _case("archive", "zip, 100000 members", lambda: _many(100_000), ".zip")
    yield _case(
        "archive",
        "tar, 100000 members",
        lambda: _raw_tar(b"d%d" % 0, b"5", b"00000000000\0", b"")[:512] * 100_000,
        ".tar",
    )
    yield _case("archive", "tar, 20000 members", lambda: _many_tar(20_000), ".tar")
    good = zip_bytes([("a", b"hello")])
    yield _case("archive", "zip, cut off", good[:-10], ".zip")
    yield _case("archive", "zip, no table", good[:40], ".zip")
    yield _case("archive", "zip, flipped content", good.replace(b"hello", b"hullo"), ".zip")
    yield _case("archive", "zip, claims more", _patched(good, size=500), ".zip")
    yield _case("archive", "zip, claims less", _patched(good, size=2), ".zip")
    yield _case("archive", "zip, encrypted flag", _patched(good, flag=1), ".zip")
    yield _case("archive", "zip, bzip2", zip_bytes([("a", b"x" * 100)], packing=zipfile.ZIP_BZIP2), ".zip")
    yield _case("archive", "zip, NUL in the name", good.replace(b"a", b"\0"), ".zip")
    yield _case("archive", "zip, two members share bytes", lambda: _shared(), ".zip")
    yield _case("archive", "tar, bad checksum", b"b" + _raw_tar(b"a")[1:], ".tar")
    yield _case("archive", "tar, cut off", _raw_tar(b"a", size=b"00000077777\0")[:700], ".tar")
    yield _case("archive", "tar, negative size", _raw_tar(b"a", size=b"\xff" * 12), ".tar")
    yield _case("archive", "tar, size of 2**80", _raw_tar(b"a", size=b"\x80\0" + b"\xff" * 10), ".tar")
    yield _case("archive", "tar, size not octal", _raw_tar(b"a", size=b"0000000009x\0"), ".tar")
    yield _case("archive", "tar, pax path up", _pax_tar([f"path=../{CANARY}".encode()]), ".tar")
    yield _case("archive", "tar, pax size huge", _pax_tar([b"size=999999999999"]), ".tar")
    yield _case("archive", "tar, pax size negative", _pax_tar([b"size=-5"]), ".tar")
    yield _case("archive", "tar, pax sparse", _pax_tar([b"GNU.sparse.major=1"]), ".tar")
    yield _case("archive", "tar, pax header of 8 GB", _raw_tar(b"p", b"x", b"77777777777\0"), ".tar")
    yield _case("archive", "tar, pax garbage", _raw_tar(b"p", b"x", b"00000000007\0", b"garbage"), ".tar")
    yield _case(
        "archive",
        "tar, long name up",
        _raw_tar(b"L", b"L", b"00000000013\0", b"../" + CANARY.encode() + b"\0\0")[:-1024] + _raw_tar(b"ok"),
        ".tar",
    )
    yield _case("archive", "neither", b"hello, I am no archive", ".tar")
    yield _case("archive", "empty", b"", ".zip")


def _quiet_zip(members: list[tuple[str, bytes]]) -> bytes:
    """`zip_bytes`, but zipfile warns of double names: written under other names of the same length, then patched."""
    stand_ins = [
        name if name not in [m[0] for m in members[:at]] else "~" * len(name) for at, (name, _) in enumerate(members)
    ]
    content = zip_bytes([(s, c) for s, (_, c) in zip(stand_ins, members, strict=True)])
    for stand_in, (name, _) in zip(stand_ins, members, strict=True):
        content = content.replace(stand_in.encode(), name.encode())
    return content


def _many(count: int) -> bytes:
    one = zip_bytes([("a", b"")])
    start = one.index(b"PK\x01\x02")
    end = one.index(b"PK\x05\x06")
    table = one[start:end] * count
    return one[:start] + table + struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 0xFFFE, 0xFFFE, len(table), start, 0)


def _many_tar(count: int) -> bytes:
    return b"".join(_raw_tar(b"d%d" % i, b"5", b"00000000000\0", b"")[:512] for i in range(count)) + bytes(1024)


def _patched(good: bytes, size: int | None = None, flag: int | None = None) -> bytes:
    changed = bytearray(good)
    at = good.index(b"PK\x01\x02")
    if size is not None:
        changed[at + 24 : at + 28] = struct.pack("<I", size)
    if flag is not None:
        changed[at + 8 : at + 10] = struct.pack("<H", flag)
    return bytes(changed)


def _shared() -> bytes:
    one = bytearray(zip_bytes([("aa", b"hello"), ("ab", b"hello")]))
    second = one.rindex(b"PK\x01\x02")
    one[second + 42 : second + 46] = struct.pack("<I", 0)
    return bytes(one)


# ------------------------------------------------------------------------------------------------ configurations


def config_cases() -> Iterator[Case]:
    json_files: dict[str, bytes | str | Callable[[], bytes]] = {
        "empty": "",
        "not utf-8": b'{"rank": "\xff"}',
        "NUL": '{"rank": "\x00"}',
        "utf-16": '{"rank": 1}'.encode("utf-16"),
        "cut off": '{"rank": 1',
        "trailing comma": '{"rank": 1,}',
        "comment": '{"rank": 1} // x',
        "single quotes": "{'rank': 1}",
        "NaN": '{"rank": NaN}',
        "Infinity": '{"rank": -Infinity}',
        "overflow": '{"rank": 1e999}',
        "digits": '{"rank": ' + "9" * 5000 + "}",
        "twice": '{"rank": 1, "rank": 2}',
        "deep list": '{"rank": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "deep objects": '{"rank":' * 5000 + "1" + "}" * 5000,
        "open deep": "[" * 1_000_000,
        "list": "[1]",
        "text": '"x"',
        "null": "null",
        "unknown key": '{"rnak": 1}',
        "__class__": '{"__class__": "os.system"}',
        "_target_": '{"rank": {"_target_": "os.system"}}',
        "class_path": '{"rank": {"class_path": "os.system"}}',
        "py/object": '{"rank": [{"py/object": "os.system"}]}',
        "py/reduce": '{"rank": {"py/reduce": []}}',
        "__reduce__": '{"rank": {"__reduce__": 1}}',
        "_instantiator": '{"_instantiator": "x"}',
        "environment": '{"rank": "${HOME}"}',
        "resolver": '{"rank": "${oc.env:HOME}"}',
        "64 MB": lambda: b'{"rank": "' + b"x" * 64_000_001 + b'"}',
        "unpaired quote": '{"rank": "' + "\\" * 99_999,
        "pickle": pickle.dumps({"rank": 1}),
        "two values": '{"rank": 1}{"rank": 2}',
    }
    for name, content in json_files.items():
        yield _case("json", name, content, ".json")
    toml_files: dict[str, bytes | str | Callable[[], bytes]] = {
        "not utf-8": b'rank = "\xff"',
        "NUL": 'rank = "\x00"',
        "no value": "rank =",
        "twice": "rank = 1\nrank = 2",
        "date": "rank = 2020-01-01",
        "inf": "rank = inf",
        "nan": "rank = nan",
        "digits": "rank = " + "9" * 5000,
        "hex digits": "rank = 0x" + "9" * 5000,
        "deep list": "rank = " + "[" * 10_000 + "]" * 10_000,
        "deep table": "rank = " + "{a=" * 10_000 + "1" + "}" * 10_000,
        "deep key": "rank" + ".a" * 100_000 + " = 1",
        "deep heading": "[rank" + ".a" * 100_000 + "]",
        "a million keys": lambda: b"".join(b"k%d=1\n" % i for i in range(1_000_000)),
        "30000 keys": "".join(f"k{i}=1\n" for i in range(30_000)),
        "unknown key": "rnak = 1",
        "_target_": 'rank = {_target_ = "os.system"}',
        "environment": 'rank = "${HOME}"',
        "heading twice": "[rank]\n[rank]",
        "1 MB": lambda: b'rank = "' + b"x" * 1_000_001 + b'"',
        "open text": 'rank = """',
        "quoted deep key": 'rank."a"' + ".a" * 100_000 + " = 1",
    }
    for name, content in toml_files.items():
        yield _case("toml", name, content, ".toml")
    laughs = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
    )
    tags = [
        "!!python/object/apply:os.system ['touch CANARY']",
        "!!python/name:os.system",
        "!!python/module:os",
        "!!python/object:os.x {}",
        "!!python/object/new:os.system [x]",
        "!ENV x",
        "!include /etc/passwd",
        "!!binary aGk=",
        "!!set {a}",
        "!!timestamp 2020-01-01",
        "!<tag:yaml.org,2002:python/none> x",
        "!!str 5",
        "! 5",
    ]
    for tag in tags:
        yield _case("yaml", f"tag {tag}", f"rank: {tag}\n", ".yaml")
    yaml_files: dict[str, bytes | str] = {
        "billion laughs": laughs,
        "anchor": "rank: &a 1",
        "alias of itself": "rank: &a [*a]",
        "merge": "x: &a {b: 1}\nrank: {<<: *a}",
        "twice": "rank: 1\nrank: 2",
        "key a list": "? [1]\n: 2",
        "key a number": "1: 2",
        "date": "rank: 2020-01-01",
        "nan": "rank: .nan",
        "inf": "rank: .inf",
        "two documents": "rank: 1\n---\nrank: 2",
        "deep list": "rank: " + "[" * 3000 + "]" * 3000,
        "deep blocks": "".join(" " * i + "a:\n" for i in range(200)),
        "not utf-8": b"rank: \xff",
        "NUL": "rank: \x00",
        "tab": "rank:\n\t- 1",
        "64 kB": "rank: " + "x" * 64_001,
        "unknown key": "rnak: 1",
        "_target_": "rank: {_target_: os.system}",
        "environment": "rank: ${HOME}",
        "digits": "rank: " + "9" * 5000,
        "text": "hello",
        "directive": "%TAG ! tag:evil,2000:\n---\nrank: !x 1",
        "yes as a key": "yes: 1",
    }
    for name, content in yaml_files.items():
        yield _case("yaml", name, content, ".yaml")


# ------------------------------------------------------------------------------------------------ templates


TEMPLATES = {
    "memory": '{{ "x"*500000000 }}',
    "memory by join": "{{ (['x'*100000]*100000)|join }}",
    "memory by format": "{{ '%1000000000d' % 1 }}",
    "memory by replace": "{{ ('x'*100000)|replace('x', 'y'*100000) }}",
    "memory by center": "{{ 'x'|center(2000000000) }}",
    "memory by indent": "{{ ('x\n'*100000)|indent(100000) }}",
    "output": "{% for i in range(99999) %}{{ 'x'*100 }}{% endfor %}",
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "long range": "{% for a in range(999999999) %}{% endfor %}",
    "power": "{% set x = 9**9**7 %}{{ x }}",
    "recursive macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "macro tree": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "deep nesting": "{% if x %}" * 2000 + "{% endif %}" * 2000,
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class by item": "{{ ''['__class__'] }}",
    "class by attr": "{{ ''|attr('__class__') }}",
    "class by joined attr": "{{ ''|attr('__cl'~'ass__') }}",
    "class by map": "{{ ['']|map(attribute='__class__')|list }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "globals by name": "{{ raise_exception|attr('__glo'~'bals__') }}",
    "init of cycler": "{{ cycler.__init__.__globals__.os.popen('touch CANARY').read() }}",
    "joiner": "{{ joiner.__init__.__globals__ }}",
    "namespace": "{{ namespace.__init__.__globals__ }}",
    "self": "{{ self._TemplateReference__context }}",
    "format attack": "{{ '{0.__class__}'.format(1) }}",
    "format map": "{{ '{a.__class__.__mro__}'.format_map({'a': 1}) }}",
    "format joined": "{{ ('{0._'~'_class_'~'_}').format(1) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'x' as y %}",
    "from import": "{% from 'x' import y %}",
    "extends": "{% extends 'x' %}",
    "mutate the messages": "{{ messages.append(1) }}",
    "mutate a message": "{{ messages[0].update({'role': 'x'}) }}",
    "clear": "{{ messages.clear() }}",
    "raises": "{{ raise_exception('no') }}",
    "raises escapes": "{{ raise_exception('\x1b[31m') }}",
    "division": "{{ 1/0 }}",
    "undefined call": "{{ nothing() }}",
    "drops the assistant": "{{ messages[0].content }}",
    "drops everything": "{# nothing #}x",
    "other text": "{% for m in messages %}{{ m.content|upper }}{% endfor %}",
    "syntax": "{% for %}",
    "open": "{{",
    "unknown tag": "{% exec 'import os' %}",
    "unknown filter": "{{ 'x'|system }}",
    "empty": "",
    "blank": "   \n",
    "date bomb": "{{ strftime_now('%999999999d') }}",
    "date of 1 MB": "{{ strftime_now('%d'*500000) }}",
    "json indent": "{{ messages|tojson(indent=999999999) }}",
    "too long": "x" * 300_000,
    "open file": "{{ open('/etc/passwd').read() }}",
    "dunder import": "{{ __import__('os').system('touch CANARY') }}",
}


def template_cases() -> Iterator[Case]:
    for name, text in TEMPLATES.items():
        yield _case("template", name, text, ".jinja")


# ------------------------------------------------------------------------------------------------ rows


def row_cases() -> Iterator[Case]:
    ok = '{"text": "a", "label": 1}\n'
    jsonl: dict[str, bytes | str] = {
        "empty": "",
        "blank": "\n\n",
        "only a mark": b"\xef\xbb\xbf",
        "cut off": ok + '{"text": "a"',
        "no object": ok + "[1, 2]\n",
        "number": "7\n",
        "latin-1": ok.encode() + b'{"text": "caf\xe9", "label": 1}\n',
        "utf-16": ok.encode("utf-16"),
        "NUL": ok + '{"text": "\x00", "label": 1}\n',
        "NUL escaped": ok + '{"text": "\\u0000\\ud800", "label": 1}\n',
        "lone surrogate": ok + '{"text": "\\ud800", "label": 1}\n',
        "lone low surrogate": ok + '{"text": "\\udc00x", "label": 1}\n',
        "surrogate in a key": '{"\\udfff": 1}\n',
        "raw surrogate": b'{"text": "\xed\xa0\x80"}\n',
        "NaN": '{"text": NaN}\n',
        "Infinity": '{"text": Infinity}\n',
        "overflow": '{"text": 1e999}\n',
        "digits": '{"text": ' + "9" * 5000 + "}\n",
        "twice": '{"text": 1, "text": 2}\n',
        "missing column": ok + '{"text": "a"}\n',
        "extra column": ok + '{"text": "a", "label": 1, "x": 2}\n',
        "other column": ok + '{"txet": "a", "label": 1}\n',
        "blank in the middle": ok + "\n" + ok,
        "deep": '{"text": ' + "[" * 50_000 + "]" * 50_000 + "}\n",
        "open deep": '{"text": ' + "[" * 500_000,
        "python": "{'text': 'a'}\n",
        "two on a line": ok.strip() + ok,
        "pickle": pickle.dumps(1),
        "gzip": gzip.compress(ok.encode()),
        "control character": '{"text": "a\x01", "label": 1}\n',
        "trailing comma": '{"text": "a",}\n',
        "required is empty": '{"text": " ", "label": 1}\n',
        "required is null": '{"text": null, "label": 1}\n',
        "required is missing": '{"label": 1}\n',
    }
    for name, content in jsonl.items():
        yield _case("jsonl", name, content, ".jsonl")
    table: dict[str, bytes | str] = {
        "empty": "",
        "header only": "text,label\n",
        "ragged short": "text,label\na\n",
        "ragged long": "text,label\na,b,c\n",
        "open quote": 'text,label\n"a,b\n',
        "text behind a quote": 'text,label\n"a"b,c\n',
        "twice": "text,text\na,b\n",
        "nameless": "text,\na,b\n",
        "NUL": "text,label\na\x00,b\n",
        "latin-1": b"text,label\ncaf\xe9,b\n",
        "utf-16": "text,label\na,b\n".encode("utf-16"),
        "blank in the middle": "text,label\na,b\n\nc,d\n",
        "5000 columns": ",".join(f"c{i}" for i in range(5000)) + "\n",
        "zip": zip_bytes([("a.csv", b"a,b")]),
        "other columns": "a,b\n1,2\n",
        "semicolons": "text;label\na;b\n",
        "required is empty": "text,label\n,b\n",
    }
    for name, content in table.items():
        yield _case("csv", name, content, ".csv")
    footer = lambda n: b"PAR1" + bytes(20) + struct.pack("<I", n) + b"PAR1"
    for name, content in {
        "empty": b"",
        "magic only": b"PAR1",
        "cut off": b"PAR1" + bytes(50),
        "footer beyond": footer(10**6),
        "footer 2**32-1": footer(2**32 - 1),
    }.items():
        yield _case("parquet", name, content, ".parquet")


# ------------------------------------------------------------------------------------------------ model folders


def model_cases() -> Iterator[Case]:
    good: dict[str, Any] = {"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 4}
    weights = st_bytes({"w": _t()}, bytes(8))
    remote = {"AutoModel": "modeling_evil.Evil", "AutoConfig": "evil/repo--configuration_evil.Evil"}
    evil = f"open({CANARY!r}, 'w').close()\n".encode()
    keys: dict[str, Any] = {
        "auto_map": remote,
        "_attn_implementation_internal": "evil/kernel",
        "_attn_implementation": "evil/kernel",
        "attn_implementation": "https://evil/kernel",
        "_experts_implementation_internal": "evil/x",
        "custom_pipelines": {"x": {"impl": "evil.Evil"}},
        "trust_remote_code": True,
        "_target_": "os.system",
        "class_path": "os.system",
        "parent_library": "evil",
        "megatron_core": "evil",
        "megatron_config": {"megatron_core": "evil"},
        "tokenizer_kwargs": {"trust_remote_code": True},
        "model_kwargs": {"x": 1},
        "code_revision": "main",
        "kernel_config": {"x": "evil/kernel"},
        "use_kernels": True,
        "custom_generate": "evil/repo",
        "_auto_class": "AutoModel",
        "__class__": "x",
        "model_type": "../../evil",
        "architectures": ["os.system"],
        "backbone": "https://evil/model",
        "proxies": {"http": "evil"},
        "hub_kwargs": {"repo": "x"},
        "text_config": {"auto_map": remote},
        "layers": [{"deep": [{"auto_map": remote}]}],
        "source": "file:///etc/passwd",
    }
    folders: dict[str, dict[str, Any]] = {f"config: {k}": {"config.json": {**good, k: v}} for k, v in keys.items()}
    tokenizer: dict[str, Any] = {
        "auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]},
        "tokenizer_class": "os.system",
        "trust_remote_code": True,
        "_target_": "x",
        "tokenizer_file": "https://evil/tokenizer.json",
        "chat_template": 7,
        "use_kernels": True,
    }
    folders |= {f"tokenizer: {k}": {"tokenizer_config.json": {k: v}} for k, v in tokenizer.items()}
    index = lambda table: {"model.safetensors": None, "model.safetensors.index.json": {"weight_map": table}}
    folders |= {
        "no config": {"config.json": None},
        "config a list": {"config.json": [1]},
        "config cut off": {"config.json": b'{"a"'},
        "config deep": {"config.json": b'{"a":' + b"[" * 9999 + b"]" * 9999 + b"}"},
        "config twice": {"config.json": b'{"a":1,"a":2}'},
        "no weights": {"model.safetensors": None},
        "pickle only": {"model.safetensors": None, "pytorch_model.bin": pickle_bytes()},
        "pt only": {"model.safetensors": None, "model.pt": pickle_bytes()},
        "ckpt only": {"model.safetensors": None, "model.ckpt": pickle_bytes()},
        "pickle as safetensors": {"model.safetensors": pickle_bytes()},
        "weights cut off": {"model.safetensors": weights[:-1]},
        "index leaves the folder": index({"w": "../w.safetensors"}),
        "index absolute": index({"w": "/tmp/w.safetensors"}),
        "index to pickle": index({"w": "pytorch_model.bin"}),
        "index to nothing": index({"w": "model-1.safetensors"}),
        "index empty": index({}),
        "index without map": {"model.safetensors.index.json": {}},
        "index lies": {**index({"x": "m1.safetensors"}), "m1.safetensors": weights},
        "index short": {
            **index({"w": "m1.safetensors"}),
            "m1.safetensors": st_bytes({"w": _t(), "v": _t(offsets=(8, 16))}, bytes(16)),
        },
        "index double": {
            **index({"w": "m1.safetensors", "v": "m2.safetensors"}),
            "m1.safetensors": weights,
            "m2.safetensors": st_bytes({"v": _t(), "w": _t(offsets=(8, 16))}, bytes(16)),
        },
        "tokenizer cut off": {"tokenizer.json": b"{"},
        "tokenizer deep": {"tokenizer.json": b"[" * 99_999},
        "generation config": {"generation_config.json": {"custom_generate": "evil/x"}},
        "processor": {"preprocessor_config.json": {"auto_map": remote}},
        "adapter": {"adapter_config.json": {"parent_library": "evil"}},
        "template not utf-8": {"chat_template.jinja": b"\xff"},
        "template too long": {"chat_template.jinja": b"x" * 1_000_000},
        "vocabulary a list": {"vocab.json": []},
    }
    for name, files in folders.items():
        everything = {"config.json": good, "model.safetensors": weights, "modeling_evil.py": evil, **files}

        def make(folder: Path, everything: dict[str, Any] = everything) -> Path:
            place = folder / "model"
            place.mkdir()
            for file, content in everything.items():
                if content is not None:
                    (place / file).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
            return place

        yield Case(f"model: {name}", "model", make, "")


# ------------------------------------------------------------------------------------------------ pickles


def pickle_bytes(module: str = "os", name: str = "system", argument: str = f"touch {CANARY}") -> bytes:
    """A pickle that calls one function with one text when it is loaded."""
    return b"c" + f"{module}\n{name}\n".encode() + b"(X" + struct.pack("<I", len(argument)) + argument.encode() + b"tR."


def checkpoint(data: bytes, storages: dict[str, bytes] | None = None, packing: int = zipfile.ZIP_STORED) -> bytes:
    """A torch checkpoint around a pickle."""
    members = [("archive/data.pkl", data), *((f"archive/data/{k}", v) for k, v in (storages or {}).items())]
    return zip_bytes(members, packing=packing)


def tensor_pickle(
    numel: str = "I4\n",
    offset: str = "I0\n",
    size: str = "I4\n",
    stride: str = "I1\n",
    key: str = "0",
    kind: str = "FloatStorage",
) -> bytes:
    """{"w": one tensor}, written opcode by opcode."""
    storage = f"(S'storage'\nctorch\n{kind}\nS'{key}'\nS'cpu'\n{numel}tQ"
    tensor = (
        f"ctorch._utils\n_rebuild_tensor_v2\n({storage}{offset}({size}t({stride}tI00\nccollections\nOrderedDict\n(tRtR"
    )
    return f"(dS'w'\n{tensor}s.".encode()


def pickle_cases() -> Iterator[Case]:
    calls = [
        ("os", "system"),
        ("posix", "system"),
        ("nt", "system"),
        ("subprocess", "Popen"),
        ("builtins", "eval"),
        ("builtins", "exec"),
        ("__builtin__", "eval"),
        ("builtins", "getattr"),
        ("builtins", "open"),
        ("importlib", "import_module"),
        ("runpy", "run_path"),
        ("socket", "create_connection"),
        ("webbrowser", "open"),
        ("ctypes", "CDLL"),
        ("torch", "load"),
        ("torch.hub", "load"),
        ("torch.storage", "_load_from_bytes"),
        ("torch._utils", "_rebuild_sparse_tensor"),
        ("torch.jit", "load"),
        ("numpy", "load"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("pickle", "loads"),
        ("pip", "main"),
        ("operator", "attrgetter"),
        ("shutil", "rmtree"),
        ("collections", "OrderedDict.__class__"),
        ("torch", "FloatStorage.__init__"),
        ("asyncio.unix_events", "_UnixSubprocessTransport._start"),
        ("timeit", "timeit"),
        ("code", "InteractiveInterpreter"),
        ("torch.serialization", "load"),
        ("_io", "FileIO"),
        ("site", "main"),
    ]
    for module, name in calls:
        yield _case("pickle", f"calls {module}.{name}", checkpoint(pickle_bytes(module, name)), ".bin")
    s16 = {"0": bytes(16)}
    files: dict[str, bytes] = {
        "bare pickle": pickle_bytes(),
        "empty": b"",
        "zip without data.pkl": zip_bytes([("a", b"x")]),
        "two data.pkl": zip_bytes([("a/data.pkl", b"."), ("b/data.pkl", b".")]),
        "packed": checkpoint(tensor_pickle(), s16, zipfile.ZIP_DEFLATED),
        "not a table": checkpoint(b"I5\n."),
        "table without tensors": checkpoint(b"(dS'a'\nI5\ns."),
        "cut off": checkpoint(tensor_pickle()[:-20], s16),
        "garbage": checkpoint(b"\xff\xfe\xfd"),
        "stack underflow": checkpoint(b"0."),
        "storage missing": checkpoint(tensor_pickle()),
        "storage short": checkpoint(tensor_pickle(), {"0": bytes(12)}),
        "storage long": checkpoint(tensor_pickle(), {"0": bytes(20)}),
        "size beyond": checkpoint(tensor_pickle(size="I5\n"), s16),
        "offset beyond": checkpoint(tensor_pickle(offset="I1\n"), s16),
        "stride beyond": checkpoint(tensor_pickle(stride="I2\n"), s16),
        "offset negative": checkpoint(tensor_pickle(offset="I-4\n"), s16),
        "size negative": checkpoint(tensor_pickle(size="I-4\n"), s16),
        "stride negative": checkpoint(tensor_pickle(stride="I-1\n"), s16),
        "size bomb by stride 0": checkpoint(tensor_pickle(size="I9000000000\n", stride="I0\n"), s16),
        "numel bomb": checkpoint(tensor_pickle(numel="I9000000000\n"), s16),
        "numel negative": checkpoint(tensor_pickle(numel="I-4\n"), s16),
        "key leaves": checkpoint(tensor_pickle(key="../../data"), s16),
        "unknown storage": checkpoint(tensor_pickle(kind="QInt8Storage"), s16),
        "size a text": checkpoint(tensor_pickle(size="S'4'\n"), s16),
        "size true": checkpoint(tensor_pickle(size="I01\n"), s16),
        "more strides": checkpoint(tensor_pickle(stride="I1\nI1\n"), s16),
        "persistent id a text": checkpoint(b"(dS'w'\nS'x'\nQs."),
        "extension code": checkpoint(b"\x82\x01."),
        "list bomb": checkpoint(b"(dS'w'\n" + b"(" * 1_000_000 + b"."),
        "memo bomb": checkpoint(b"I1\nr\xff\xff\xff\x7f."),
        "long bomb": checkpoint(b"\x8b\xff\xff\xff\x7f."),
        "bytes bomb": checkpoint(b"\x8e" + struct.pack("<Q", 2**40) + b"."),
        "big-endian": zip_bytes(
            [("archive/data.pkl", tensor_pickle()), ("archive/byteorder", b"big"), ("archive/data/0", bytes(16))]
        ),
        "build on a type": checkpoint(b"ctorch\nFloatStorage\n(dS'dtype'\nS'x'\nsb."),
    }
    for name, content in files.items():
        yield _case("pickle", name, content, ".bin")


def cases() -> list[Case]:
    """The whole corpus."""
    return list(
        itertools.chain(
            safetensors_cases(),
            gguf_cases(),
            archive_cases(),
            config_cases(),
            template_cases(),
            row_cases(),
            model_cases(),
            pickle_cases(),
        )
    )
