"""F64: tunings go out to peft's own reader and come in from its own writer: the same bits, the same logits."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from cells import logits, shake
from safetensors.torch import load_file
from tiny import inputs, tiny

from luthier.core import CannotMerge, ConfigError, IntegrityError, LuthierError, ModelError
from luthier.surgery import METHODS, attach, from_peft, to_peft

# peft asks transformers a question by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SITES = {
    "bert": ("attn.q", "attn.v", "ffn.up"),
    "llama": ("attn.k", "ffn.down", "ffn.gate"),
    "t5": ("attn.q", "ffn.down"),
}
CELLS = [(name, arch) for name in ("lora", "dora", "ia3") for arch in SITES]


def settings(name: str, arch: str) -> dict[str, Any]:
    return {} if name == "ia3" else {"sites": SITES[arch], "rank": 3, "alpha": 7.0}


def made(name: str, arch: str) -> tuple[Any, Any]:
    model = tiny(arch)
    tuned = attach(model, name, **settings(name, arch))
    shake(tuned)
    model.eval()
    return tuned, model


@pytest.mark.fault("F64", "peft's reader")
@pytest.mark.parametrize(("name", "arch"), CELLS)
def test_peft_reads_what_we_write_with_the_same_bits_and_logits(name: str, arch: str, tmp_path: Path) -> None:
    tuned, model = made(name, arch)
    to_peft(tuned, tmp_path / "out")
    batch = inputs(model)
    other = peft.PeftModel.from_pretrained(tiny(arch), str(tmp_path / "out")).eval()
    held = load_file(tmp_path / "out" / "adapter_model.safetensors")
    theirs = peft.get_peft_model_state_dict(other)
    assert set(theirs) == set(held) and held
    assert all(torch.equal(theirs[n].flatten(), tensor.flatten()) for n, tensor in held.items())
    torch.testing.assert_close(logits(other, batch), logits(model, batch), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(tiny(arch).eval(), batch), logits(model, batch), atol=1e-3)


@pytest.mark.fault("F64", "peft's writer")
@pytest.mark.parametrize(("name", "arch"), CELLS)
def test_we_read_what_peft_writes_with_the_same_bits_and_logits(name: str, arch: str, tmp_path: Path) -> None:
    tuned, model = made(name, arch)
    to_peft(tuned, tmp_path / "out")
    other = peft.PeftModel.from_pretrained(tiny(arch), str(tmp_path / "out")).eval()
    other.save_pretrained(str(tmp_path / "theirs"))
    again = tiny(arch)
    back = from_peft(again, tmp_path / "theirs")
    ours, found = tuned.trained(), back.trained()
    assert set(found) == set(ours)
    assert all(torch.equal(found[n], p) for n, p in ours.items())
    assert torch.equal(logits(again, inputs(again)), logits(model, inputs(model)))


def test_what_has_no_form_there_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    refused = 0
    for name in METHODS.names():
        if METHODS.get(name).is_a("lora", "dora", "ia3") or METHODS.get(name).peft is not None:
            continue
        try:
            tuned = attach(tiny("bert", "classification"), name)
        except LuthierError:
            continue
        with pytest.raises(CannotMerge, match=r"lora, dora, ia3, .* have one"):
            to_peft(tuned, tmp_path / name)
        refused += 1
        assert not (tmp_path / name).exists()
    assert refused > 8
    with pytest.raises(CannotMerge, match="only a part of"):
        to_peft(attach(tiny("gpt2", "lm"), "lora", rank=3), tmp_path / "fused")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"auto_map": {"x": "evil.X"}}, LuthierError),
        ({"parent_library": "os"}, LuthierError),
        ({"peft_type": "XLORA"}, ConfigError),
        ({"alpha_pattern": {"qu.*": 3}}, ConfigError),
        ({"megatron_config": {"x": 1}}, ConfigError),
    ],
)
def test_a_configuration_that_says_more_is_refused(change: dict[str, Any], error: type, tmp_path: Path) -> None:
    tuned, _ = made("lora", "bert")
    to_peft(tuned, tmp_path / "out")
    path = tmp_path / "out" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    model = tiny("bert")
    before = list(model.state_dict())
    with pytest.raises(error):
        from_peft(model, tmp_path / "out")
    assert list(model.state_dict()) == before


def test_another_base_is_told_by_its_layers_and_shapes(tmp_path: Path) -> None:
    tuned, _ = made("lora", "bert")
    to_peft(tuned, tmp_path / "out")
    with pytest.raises(ModelError, match="no layer of this model"):
        from_peft(tiny("llama"), tmp_path / "out")
    wide = tiny("bert", hidden_size=72)
    with pytest.raises(IntegrityError, match="this model needs"):
        from_peft(wide, tmp_path / "out")
