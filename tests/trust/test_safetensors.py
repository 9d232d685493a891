"""Reading safetensors: what honest writers write comes back bit for bit; nothing else does."""

import json
import random
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from trust.corpus import st_bytes

from luthier.core import BadInput, IntegrityError, LuthierError, Refused
from luthier.trust import Limits, safetensors

KINDS = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
        torch.bool,
    ),
]


def written(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A file with a tensor of each kind, of different odd shapes, one empty and one of no dimensions."""
    torch.manual_seed(0)
    tensors = {
        str(kind).removeprefix("torch."): torch.randint(0, 2, (3, 2 * n + 1)).to(kind) for n, kind in enumerate(KINDS)
    }
    tensors |= {"none": torch.zeros(0, 4), "one": torch.tensor(2.5), "bf": torch.randn(5, 7).bfloat16()}
    path = folder / "model.safetensors"
    save_file(tensors, path, {"format": "pt"})
    return path, tensors


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(
        a[n].dtype == b[n].dtype
        and a[n].shape == b[n].shape
        and torch.equal(a[n].reshape(-1).view(torch.uint8), b[n].reshape(-1).view(torch.uint8))
        for n in a
        if a[n].numel()
    )


def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path, tensors = written(tmp_path)
    assert same(safetensors.read(path), tensors)


def test_the_memory_mapped_way_gives_the_same(tmp_path: Path) -> None:
    path, tensors = written(tmp_path)
    mapped = safetensors.read(path, digest=safetensors.sha256(path), limits=Limits(in_memory=10))
    assert same(mapped, tensors)
    mapped["bf"].zero_()  # copy on write: the file stays
    assert same(safetensors.read(path), tensors)


def test_names_and_shapes_other_than_expected_are_all_listed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4)}, path)
    assert set(safetensors.read(path, expect={"a": (2, 3), "b": [4]})) == {"a", "b"}
    wrong = r"'c' is missing.*'b' was not expected.*'a' has shape \[2, 3\], expected \[3, 2\]"
    with pytest.raises(Refused, match=wrong):
        safetensors.read(path, expect={"a": (3, 2), "c": (4,)})


@pytest.mark.parametrize("in_memory", [10, 10**9])
def test_a_wrong_digest_is_an_integrity_error_with_both_digests(tmp_path: Path, in_memory: int) -> None:
    path, _ = written(tmp_path)
    good = safetensors.sha256(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=good):
        safetensors.read(path, digest=good, limits=Limits(in_memory=in_memory))


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_tensor_that_is_not_finite_is_named(tmp_path: Path, kind: torch.dtype, value: float) -> None:
    path = tmp_path / "a.safetensors"
    bad = torch.zeros(3, 5)
    bad[1, 2] = value
    save_file({"fine": torch.zeros(2), "layer.bad": bad.to(kind)}, path)
    with pytest.raises(Refused, match=r"NaN or infinity in 'layer.bad' \(1 of 15\)"):
        safetensors.read(path)
    assert not torch.isfinite(safetensors.read(path, allow_nonfinite=True)["layer.bad"].float()).all()


def test_a_missing_file_names_near_ones(tmp_path: Path) -> None:
    written(tmp_path)
    with pytest.raises(BadInput, match=r"Did you mean 'model\.safetensors'"):
        safetensors.read(tmp_path / "modle.safetensors")


def test_the_header_says_where_each_tensor_lies(tmp_path: Path) -> None:
    path, tensors = written(tmp_path)
    header = safetensors.check_header(path)
    assert {n: e.shape for n, e in header.entries.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    assert header.metadata == {"format": "pt"} and header.file_bytes == path.stat().st_size


def test_a_tensor_that_is_not_aligned_to_its_width_is_still_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    header = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
    }
    path.write_bytes(st_bytes(header, b"\1\2\3" + struct.pack("<2f", 1.5, -2.5)))
    for in_memory in (1, 10**6):
        found = safetensors.read(path, limits=Limits(in_memory=in_memory))
        assert found["a"].tolist() == [1, 2, 3] and found["b"].tolist() == [1.5, -2.5]


def test_a_damaged_file_is_read_or_refused_but_never_crashes(tmp_path: Path) -> None:
    good, _ = written(tmp_path)
    content, draw = good.read_bytes(), random.Random(0)
    outcomes = set()
    for _ in range(400):
        changed = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            changed[draw.randrange(1 + draw.choice([8, 200, len(content) - 1]))] = draw.randrange(256)
        if draw.random() < 0.3:
            del changed[draw.randrange(len(changed)) :]
        path = tmp_path / "bad.safetensors"
        path.write_bytes(changed)
        try:
            safetensors.read(path)
            outcomes.add("read")
        except LuthierError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_every_flipped_bit_is_found_when_a_digest_is_given(tmp_path: Path) -> None:
    good, _ = written(tmp_path)
    digest, content, draw = safetensors.sha256(good), good.read_bytes(), random.Random(1)
    for _ in range(200):
        changed = bytearray(content)
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        good.write_bytes(changed)
        with pytest.raises(IntegrityError):
            safetensors.read(good, digest=digest)


def test_caps_are_those_of_the_limits_object(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(st_bytes({f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(20)}))
    assert len(safetensors.check_header(path).entries) == 20
    with pytest.raises(Refused, match="more than 19 tensors"):
        safetensors.check_header(path, limits=Limits(entries=19))
    with pytest.raises(Refused, match="claims a header"):
        safetensors.check_header(path, limits=Limits(header_bytes=100))


@pytest.mark.parametrize("first", [b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"])
def test_an_honest_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path, first: bytes) -> None:
    text = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    padded = text.ljust(int.from_bytes(first, "little"))
    path = tmp_path / "a.safetensors"
    path.write_bytes(st_bytes(padded, b"\7"))
    assert path.read_bytes()[:2] == first
    assert safetensors.read(path)["a"].tolist() == [7]
