"""Child-Tuning_F: its own tests, beside those that every method passes."""

import math

import pytest
import torch
from little import little_model, little_spec
from methods.checks import train
from methods.sizes import trained
from tiny import inputs, tiny

from luthier import train as run
from luthier.core import ConfigError
from luthier.methods.partial.child_tuning_f import ChildTuningF
from luthier.runs.spec import BatchSpec
from luthier.surgery import attach, keyed, method

STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}


def gradients_of(tuned, made, step):
    """The masked gradients of one step, and those before the mask."""
    tuned.model.zero_grad()
    tuned.model(**inputs(tuned.model)).loss.backward()
    before = {n: p.grad.clone() for n, p in tuned.trained().items() if p.grad is not None}
    with keyed(0, "before step", step):
        made.before_step(tuned, step, 100)
    made.after_backward(tuned, step, 100)
    return before, {n: tuned.trained()[n].grad for n in before}


def test_every_number_trains():
    assert trained("bert", "child_tuning_f") == 109_482_240


@pytest.mark.acid("child_tuning_f", 1)
def test_in_expectation_the_masked_gradient_is_the_gradient():
    made = method("child_tuning_f", {"p": 0.25})
    tuned = attach(tiny("bert", **STILL), made)
    bias = tuned.model.bert.encoder.layer[0].output.dense.bias
    for parameter in tuned.trained().values():
        parameter.grad = None
    total, draws = torch.zeros_like(bias), 10_000
    for step in range(1, draws + 1):
        bias.grad = torch.ones_like(bias)
        made.before_step(tuned, step, draws)
        made.after_backward(tuned, step, draws)
        total += bias.grad
    deviation = math.sqrt((1 - 0.25) / 0.25 / draws)
    assert (total / draws - 1).abs().max() < 4.5 * deviation


@pytest.mark.acid("child_tuning_f", 2)
def test_masks_are_of_every_entry_and_anew_at_every_step_at_their_density():
    made = method("child_tuning_f", {"p": 0.3})
    tuned = attach(tiny("bert", **STILL), made)
    found = []
    for step in (1, 2, 1):
        before, masked = gradients_of(tuned, made, step)
        name = "model/bert.encoder.layer.1.intermediate.dense.weight"
        kept = masked[name] != 0
        n = kept.numel()
        assert abs(int(kept.sum()) / n - 0.3) < 3 * math.sqrt(0.3 * 0.7 / n)
        torch.testing.assert_close(masked[name][kept], before[name][kept] / 0.3)
        found.append(kept.clone())
        assert not any(n.startswith("head/") and not torch.equal(masked[n], before[n]) for n in masked), "head is whole"
    assert not torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.acid("child_tuning_f", 3)
def test_by_plain_descent_what_is_not_drawn_stays_exactly():
    made = method("child_tuning_f", {})
    tuned = attach(tiny("bert", **STILL), made)
    start = {n: p.detach().clone() for n, p in tuned.trained().items()}
    _, masked = gradients_of(tuned, made, 1)
    tuned.calls_hooks = True
    torch.optim.SGD(tuned.trained().values(), lr=0.1).step()
    for name, grad in masked.items():
        assert torch.equal(tuned.trained()[name].detach()[grad == 0], start[name][grad == 0])


@pytest.mark.parametrize("masked_update", [False, True])
def test_momentum_and_decay_leak_as_in_the_authors_code_unless_the_update_is_masked(masked_update):
    tuned = attach(tiny("bert", **STILL), method("child_tuning_f", {"masked_update": masked_update}))
    values, masks = [], []
    made = tuned.tuning().method
    name, inner = "model/bert.encoder.layer.1.intermediate.dense.weight", made.on_step

    def watched(held, step, total):
        masks.append(tuned.trained()[name].grad != 0)
        inner(held, step, total)
        values.append(tuned.trained()[name].detach().clone())

    made.__dict__["on_step"] = watched
    train(tuned, 3, decay=0.1)
    for step in (1, 2):
        moved = values[step] != values[step - 1]
        assert bool(moved[~masks[step]].any()) != masked_update
        assert bool(moved[masks[step]].any())


def test_one_mask_for_a_step_however_memory_cuts_it(tmp_path, monkeypatch):
    drawn = []
    inner = ChildTuningF.after_backward

    def watched(self, tuned, step, total):
        drawn.append((step, self.__dict__["drawn"]))
        inner(self, tuned, step, total)

    monkeypatch.setattr(ChildTuningF, "after_backward", watched)
    for name, cut in {"pieces": BatchSpec(size=8, tokens=32, accumulate=4), "whole": BatchSpec(size=8)}.items():
        little_model(tmp_path / name / "bert", "bert")
        run(little_spec(tmp_path / name, "child_tuning_f", batch=cut, steps=2))
    assert drawn[:2] == drawn[2:] and [step for step, _ in drawn[:2]] == [1, 2]


def test_all_and_nothing_and_a_loop_that_does_not_ask_are_refused():
    for p, says in ((1.0, "which is full"), (0.0, "above 0")):
        with pytest.raises(ConfigError, match=says):
            method("child_tuning_f", {"p": p})
    made = method("child_tuning_f", {})
    tuned = attach(tiny("bert"), made)
    with pytest.raises(ConfigError, match="before_step"):
        made.after_backward(tuned, 1, 1)
    tuned.model(**inputs(tuned.model)).loss.backward()
    with pytest.raises(ConfigError, match="before_step, on_step"):
        torch.optim.SGD(tuned.trained().values(), lr=0.1).step()
