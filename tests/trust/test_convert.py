"""Pickle checkpoints become safetensors, with nothing run and nothing lost unsaid."""

from pathlib import Path

import pytest
import torch

from luthier.core import BadInput, Refused
from luthier.trust import convert, safetensors


def test_every_tensor_of_a_checkpoint_comes_through_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    kinds = [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.uint8,
    ]
    state = {f"k{n}": torch.randint(0, 9, (3, n + 2)).to(kind) for n, kind in enumerate(kinds)}
    base = torch.randn(5, 7)
    state |= {"base": base, "turned": base.t(), "part": base[1:4, 2::2], "tied": base, "one": torch.tensor(2.5)}
    state |= {"none": torch.zeros(0, 3), "flag": torch.tensor([True, False, True])}
    source, target = tmp_path / "model.bin", tmp_path / "model.safetensors"
    torch.save(state, source)
    done = convert.pickle_to_safetensors(source, target)
    found = safetensors.read(target, digest=done.sha256, expect={n: tuple(t.shape) for n, t in state.items()})
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in state.items())
    assert done.tensors == len(state) and done.left_out == ()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_state_dict_one_level_down_is_found_and_the_rest_is_named(tmp_path: Path) -> None:
    source = tmp_path / "a.ckpt"
    module = torch.nn.Linear(3, 4)
    torch.save({"epoch": 3, "state_dict": module.state_dict(), "arguments": {"lr": 0.1}}, source)
    done = convert.pickle_to_safetensors(source, tmp_path / "a.safetensors")
    assert done.tensors == 2 and done.left_out == ("'epoch'", "'arguments'")
    found = safetensors.read(done.path)
    assert torch.equal(found["weight"], module.weight) and torch.equal(found["bias"], module.bias)


def test_parameters_are_tensors(tmp_path: Path) -> None:
    torch.save({"p": torch.nn.Parameter(torch.ones(3))}, tmp_path / "a.pt")
    convert.pickle_to_safetensors(tmp_path / "a.pt", tmp_path / "a.safetensors")
    assert safetensors.read(tmp_path / "a.safetensors")["p"].tolist() == [1, 1, 1]


def test_a_whole_module_is_refused_by_the_name_it_asks_for(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(3, 4), tmp_path / "a.pt")
    with pytest.raises(Refused, match=r"asks for 'torch\.nn\.modules\.linear\.Linear', which no tensor needs"):
        convert.pickle_to_safetensors(tmp_path / "a.pt", tmp_path / "a.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt"]


def test_a_target_that_exists_is_never_written_over(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    (tmp_path / "b").write_text("mine")
    with pytest.raises(BadInput, match="there already"):
        convert.pickle_to_safetensors(tmp_path / "a.pt", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "mine"


def test_the_old_format_of_torch_is_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(Refused, match=r"torch\.save"):
        convert.pickle_to_safetensors(tmp_path / "a.pt", tmp_path / "a.safetensors")
