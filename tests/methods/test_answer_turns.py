"""answer_turns: a head that reads the text again between its turns."""

import pytest
import torch
from methods.checks import logits, stir
from tiny import inputs, tiny

from luthier.core import AnatomyError, ConfigError, ModelError
from luthier.methods.additive.answer_turns import Turns
from luthier.surgery import attach, compose, method


def tuned_on(arch="bert", **settings):
    model = tiny(arch, "classification", num_labels=5)
    tuned = attach(model, "answer_turns", **{"turns": 4, **settings})
    stir(tuned)
    tuned.model.eval()
    (turns,) = tuned.modules(Turns).values()
    return tuned, turns


def test_the_turns_are_those_of_a_gru_that_attends_to_the_real_tokens():
    _, turns = tuned_on()
    states, d = torch.randn(2, 5, 48), 48
    cell = torch.nn.GRUCell(d, d)
    cell.load_state_dict(
        {
            "weight_ih": turns.read.weight, "bias_ih": turns.read.bias,
            "weight_hh": turns.keep.weight, "bias_hh": turns.keep.bias,
        }
    )  # fmt: skip
    turns.context.masks = {"": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])}
    turns.text.states, x = states, torch.randn(2, d)
    with torch.no_grad():
        found = turns.before(x)
        for row, n in enumerate((5, 3)):
            memory, state = torch.nn.functional.layer_norm(states[row, :n], (d,)), x[row]
            for k in range(4):
                weights = (memory @ (turns.look.weight @ state) / d**0.5).softmax(0)
                state = cell((weights @ memory)[None], state[None])[0]
                torch.testing.assert_close(found[row, k], state, rtol=1e-5, atol=1e-5)


def test_in_answers_all_turns_count_and_in_training_a_drawn_part_never_none():
    _, turns = tuned_on(left_out=0.9)
    y = torch.randn(64, 4, 3)
    turns.eval()
    torch.testing.assert_close(turns.after(y, y).exp(), y.softmax(-1).mean(1))
    turns.train()
    torch.manual_seed(1)
    taken = turns.taken(y)
    assert bool(taken.any(1).all()) and 0.2 < float(taken.float().mean()) < 0.4
    torch.manual_seed(1)
    shares = taken / taken.sum(1, keepdim=True)  # (rows, turns)
    torch.testing.assert_close(turns.after(y, y).exp(), (y.softmax(-1) * shares[..., None]).sum(1))


def test_each_task_has_chances_of_its_own():
    _, turns = tuned_on(labels=(2, 1 + 2))
    y = torch.randn(3, 4, 5)
    found = turns.after(y, y).exp()
    torch.testing.assert_close(found[:, :2].sum(1), torch.ones(3))
    torch.testing.assert_close(found[:, 2:], y[..., 2:].softmax(-1).mean(1))
    chosen = compose.for_labels(method("lora+answer_turns"), [4, 2])
    assert [getattr(part, "labels", None) for part in chosen.parts()] == [None, (4, 2)]


@pytest.mark.parametrize("arch", ["bert", "roberta", "t5"])
def test_another_token_of_the_text_changes_the_answer_through_the_turns_alone(arch):
    tuned, turns = tuned_on(arch)
    batch = inputs(tuned.model)
    wanted = logits(tuned.model, batch)
    heard = turns.before

    def elsewhere(x):
        turns.text.states = turns.text.states.roll(1, -1)
        return heard(x)

    turns.before = elsewhere
    assert float((logits(tuned.model, batch) - wanted).abs().max()) > 1e-4


def test_what_it_cannot_answer_is_refused():
    for arch, task, words in (("gpt2", "classification", "from left to right"), ("t5", "seq2seq", "no new task head")):
        with pytest.raises(AnatomyError, match=words):
            attach(tiny(arch, task), "answer_turns")
    tuned = attach(tiny("bert", "tokens"), "answer_turns")
    with pytest.raises(ModelError, match="once for each text"):
        logits(tuned.model)
    with pytest.raises(ConfigError, match=r"labels: 2, 2 are 4 labels, and the head has 5"):
        tuned_on(labels=(2, 2))
    with pytest.raises(ConfigError, match=r"labels is \[2, 2\], and the tasks of the rows have \[3, 1\]"):
        compose.for_labels(method("answer_turns", {"labels": (2, 2)}), [3, 1])
    with pytest.raises(ConfigError, match="turns"):
        method("answer_turns", {"turns": 0})
    assert tuned.anatomy.head_tensors
