"""A file of tensors and the tensors themselves, compared bit for bit, one at a time."""

import struct

import pytest
import torch
from safetensors.torch import save_file

from luthier.core import IntegrityError
from luthier.trust.safetensors import read, sha256, unequal


def _held() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "weight": torch.randn(5, 7),
        "small": torch.randn(3, 4).to(torch.bfloat16),
        "whole": torch.arange(9, dtype=torch.int32),
        "mask": torch.tensor([True, False]),
        "one": torch.tensor(0.5),
        "none": torch.zeros(0, 3),
    }


def test_what_was_written_is_equal_however_it_lies_in_memory(tmp_path):
    held, path = _held(), tmp_path / "a.safetensors"
    save_file(held, path)
    assert unequal(path, held, sha256(path)) == []
    held["weight"] = held["weight"].T.contiguous().T
    assert unequal(path, held) == []


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("weight", lambda x: x + 0.0 * x.flatten()[0] + (torch.arange(35).view(5, 7) == 34) * 1e-6),
        ("weight", lambda x: x.double()),
        ("weight", lambda x: x.view(7, 5)),
        ("small", lambda x: x.view(torch.int16).bitwise_xor(1).view(torch.bfloat16)),
        ("mask", lambda x: ~x),
        ("one", lambda x: -x),
        ("whole", lambda x: x.flip(0)),
    ],
)
def test_one_bit_a_type_or_a_shape_makes_a_difference(name, other, tmp_path):
    held, path = _held(), tmp_path / "a.safetensors"
    save_file(held, path)
    held[name] = other(held[name])
    assert unequal(path, held) == [name]


def test_zero_and_minus_zero_differ_and_a_nan_equals_itself(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.tensor([0.0, float("nan")])}, path)
    assert unequal(path, {"a": torch.tensor([0.0, float("nan")])}) == []
    assert unequal(path, {"a": torch.tensor([-0.0, float("nan")])}) == ["a"]


def test_names_on_one_side_only_are_told(tmp_path):
    held, path = _held(), tmp_path / "a.safetensors"
    save_file(held, path)
    held["more"] = held.pop("one")
    assert unequal(path, held) == ["more", "one"]


def test_a_file_that_is_not_the_one_that_was_vouched_for_is_refused(tmp_path):
    held, path = _held(), tmp_path / "a.safetensors"
    save_file(held, path)
    digest = sha256(path)
    content = bytearray(path.read_bytes())
    start = 8 + struct.unpack("<Q", content[:8])[0]
    content[start] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(IntegrityError, match="sha256"):
        unequal(path, held, digest)
    assert unequal(path, read(path)) == []
