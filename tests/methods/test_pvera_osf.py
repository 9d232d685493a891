"""PVeRA's draws and OSF's subspace, beside what tests/methods/test_against_peft_more.py compares of both."""

from pathlib import Path

import peft
import pytest
import torch
from methods.checks import logits, stir
from safetensors.torch import load_file, save_file
from tiny import inputs, tiny

from luthier.core import ConfigError, IntegrityError
from luthier.surgery import attach, from_peft, to_peft

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Specified to not"),
]


def test_in_training_pvera_draws_as_peft_does_and_outside_of_it_takes_the_mean(tmp_path: Path) -> None:
    model = tiny("llama", attention_dropout=0.0)
    tuned = attach(model, "pvera", rank=7)
    stir(tuned, 0.2)
    to_peft(tuned, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny("llama", attention_dropout=0.0), str(tmp_path / "ours"))
    batch = inputs(model)
    outs = []
    for one in (model, theirs):
        one.train()
        torch.manual_seed(3)
        outs.append(one(**batch).logits.detach())
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(outs[0], logits(model, batch), atol=1e-3)
    assert torch.equal(logits(model, batch), logits(model, batch))


def test_plain_steps_of_osf_never_turn_into_the_directions_that_stay() -> None:
    tuned = attach(tiny("bert", "classification"), "osf", kept=0.5, sites=("attn.q", "ffn.up"))
    moves = torch.optim.SGD(tuned.trained().values(), lr=1)
    tuned.model.train()
    for seed in range(3):
        tuned.model(**inputs(tuned.model, seed=seed)).loss.backward()
        moves.step()
        moves.zero_grad()
    for key, module in tuned.modules().items():
        assert (module.u - module.u0).abs().max() > 1e-4, key
        torch.testing.assert_close(
            module.u_kept.T @ module.u, torch.zeros_like(module.u_kept.T @ module.u), atol=1e-5, rtol=0
        )
        torch.testing.assert_close(
            module.v @ module.v_kept.T, torch.zeros_like(module.v @ module.v_kept.T), atol=1e-5, rtol=0
        )


def test_what_leaves_nothing_to_train_is_refused() -> None:
    for kept in (48, 0.001):
        with pytest.raises(ConfigError, match=r"osf\.kept: .* leaves"):
            attach(tiny("bert"), "osf", kept=kept)
    with pytest.raises(ConfigError, match=r"shira\.rank: 4800 of the 2304 entries of attn\.q@0"):
        attach(tiny("bert"), "shira", rank=50)
    with pytest.raises(ConfigError, match=r"supertuning\.sparsity: 0 of the 2304 entries"):
        attach(tiny("bert"), "supertuning", sparsity=0.9999)


@pytest.mark.parametrize(
    ("name", "wrong"), [("shira", -1), ("shira", 10**6), ("supertuning", -1), ("supertuning", 10**6)]
)
def test_places_of_a_file_that_the_weight_does_not_have_are_refused(name: str, wrong: int, tmp_path: Path) -> None:
    to_peft(attach(tiny("bert"), name), tmp_path / "theirs")
    file = tmp_path / "theirs" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(t for n, t in tensors.items() if n.endswith("_indices")).view(-1)[-1] = wrong
    save_file(tensors, file)
    with pytest.raises(IntegrityError, match="does not have"):
        from_peft(tiny("bert"), tmp_path / "theirs")


def test_a_number_of_directions_that_is_not_whole_is_refused() -> None:
    with pytest.raises(ConfigError, match="neither a share below 1 nor a whole number"):
        attach(tiny("bert"), "osf", kept=3.7)
