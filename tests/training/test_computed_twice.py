"""Activations computed twice change no number, on any architecture, with dropout configured."""

import functools
import inspect
from typing import Any

import pytest
import torch
from cells import small
from tiny import ALSO, TINY, inputs, tiny
from torch import Tensor, nn

from luthier.core import AnatomyError
from luthier.surgery import attach
from luthier.surgery.checkpointing import _as_trained, checkpoints_itself

QUICK = ("bert", "gpt2", "llama", "bart", "opt", "t5")


def cells(methods: tuple[str, ...]) -> list[Any]:
    return [
        pytest.param(name, method, id=f"{name}-{method}", marks=() if quick else pytest.mark.slow)
        for name in (*TINY, *ALSO)
        for method in methods
        for quick in [name in QUICK and method == "lora"]
    ]


def step(name: str, method: str, *, twice: bool, trunk_dropout: bool) -> tuple[Tensor, dict[str, Any]]:
    """One step as the loop makes it: the trunk draws dropout or not, what is attached always may."""
    model = tiny(name)
    tuned = attach(model, small(method))
    if twice:
        if not model.supports_gradient_checkpointing:
            pytest.skip("transformers offers no checkpointing there")
        tuned.checkpoint_activations()
    model.train(trunk_dropout)
    model.luthier.train(True)
    if twice:
        for module in model.modules():
            if checkpoints_itself(module):
                module.training = True
    batch: dict[str, Any] = inputs(model, batch=2)
    if not twice and "use_cache" in inspect.signature(model.forward).parameters:
        batch["use_cache"] = False  # which is asked for where activations are computed twice
    torch.manual_seed(5)
    out = model(**batch)
    loss = out.loss if getattr(out, "loss", None) is not None else out[0].float().square().mean()
    loss.backward()
    return loss.detach(), {k: p.grad for k, p in tuned.trained().items()}


@pytest.mark.parametrize(("name", "method"), cells(("lora", "prefix_tuning", "unipelt", "sequential_adapter")))
@pytest.mark.parametrize("trunk_dropout", [False, True])
def test_loss_and_gradients_are_the_same_to_the_bit(name: str, method: str, trunk_dropout: bool) -> None:
    try:
        loss, grads = step(name, method, twice=False, trunk_dropout=trunk_dropout)
    except AnatomyError:
        pytest.skip("the method does not go there")
    loss_again, grads_again = step(name, method, twice=True, trunk_dropout=trunk_dropout)
    assert torch.equal(loss_again, loss)
    assert {k for k, g in grads.items() if g is None} == {k for k, g in grads_again.items() if g is None}
    if method == "unipelt" and name.startswith("t5"):
        # The encoder's states get their gradient from more places at once, which are summed in another order.
        torch.testing.assert_close(grads_again, grads, atol=1e-5, rtol=1e-4)
        return
    assert not [k for k, g in grads.items() if g is not None and not torch.equal(g, grads_again[k])]


def test_a_block_is_run_in_the_models_mode_however_it_is_handed_over() -> None:
    model, layer, x = nn.Identity().eval(), nn.Dropout(0.5).train(), torch.ones(64)
    for block in (layer.forward, layer.__call__, functools.partial(nn.Dropout.__call__, layer)):
        assert torch.equal(_as_trained(block, model)(x), x)
        assert layer.training
        assert _as_trained(block, model.train()) is block
        assert not torch.equal(block(x), x)
        model.eval()
    for block in (torch.relu, functools.partial(torch.relu)):  # no module's: nothing that draws
        assert _as_trained(block, model) is block
