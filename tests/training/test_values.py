"""The values of schedules, losses, scores and thresholds, against formulas written out here with plain numbers."""

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import inputs, tiny

from luthier.data.batches import Batch
from luthier.data.examples import IGNORED
from luthier.data.tasks import Task
from luthier.surgery import attach
from luthier.training.evaluate import Evaluator, _tags
from luthier.training.guards import NumberGuard
from luthier.training.objective import Objective
from luthier.training.precision import Precision
from luthier.training.schedule import factor

# --- schedules


def rates(schedule: str, total: int, warmup: float) -> list[float]:
    return [factor(schedule, step, total, warmup) for step in range(1, total + 1)]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_during_the_warm_up_the_rate_rises_by_equal_parts_to_its_peak(schedule: str) -> None:
    found = rates(schedule, 40, 0.25)
    assert found[:10] == pytest.approx([n / 10 for n in range(1, 11)])
    assert max(found) == found[9] == 1.0


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_without_a_warm_up_the_first_step_is_the_fastest(schedule: str) -> None:
    found = rates(schedule, 40, 0.0)
    # The fall begins one step before the first, so that no two steps have the same rate.
    first = {"linear": 40 / 41, "cosine": (1 + math.cos(math.pi / 41)) / 2, "constant": 1.0}
    assert max(found) == found[0] == pytest.approx(first[schedule])


def test_a_warm_up_shorter_than_a_step_is_one_step() -> None:
    assert rates("constant", 5, 0.01) == [1.0] * 5
    assert rates("linear", 5, 0.01)[:2] == pytest.approx([1.0, 4 / 5])


def test_a_constant_rate_stays_at_its_peak() -> None:
    assert rates("constant", 20, 0.1)[1:] == [1.0] * 19


def test_a_linear_rate_falls_by_equal_parts_and_its_last_step_still_moves() -> None:
    found = rates("linear", 12, 0.25)
    assert found[2:] == pytest.approx([1 - n / 10 for n in range(10)])
    assert found[-1] == pytest.approx(1 / 10)


def test_a_cosine_rate_falls_at_every_step_along_half_a_cosine() -> None:
    found = rates("cosine", 24, 1 / 6)[3:]
    # From the peak at step 4, half a turn of a cosine would reach zero one step after the last.
    assert found == pytest.approx([(1 + math.cos(math.pi * n / 21)) / 2 for n in range(21)])
    assert all(later < earlier for earlier, later in pairwise(found))
    assert found[0] == pytest.approx(1.0) and 0 < found[-1] < 0.01


# --- losses


def bert(task: Task, **changes: int) -> Objective:
    return Objective(attach(tiny("bert", "classification", **changes), "lora"), task)


def test_the_loss_of_several_labels_is_the_sum_over_rows_of_the_mean_over_labels() -> None:
    logits = [[0.5, -1.0, 2.0], [0.0, 3.0, -0.25]]
    wanted = [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]
    by_hand = 0.0
    for row, truth in zip(logits, wanted, strict=True):
        terms = [-math.log(1 / (1 + math.exp(-x if t else x))) for x, t in zip(row, truth, strict=True)]
        by_hand += sum(terms) / 3
    task = Task(name="classification", labels=("a", "b", "c"), multi_label=True)
    found = bert(task, num_labels=3).loss(torch.tensor(logits), torch.tensor(wanted))
    assert float(found) == pytest.approx(by_hand, rel=1e-6)


def test_the_loss_of_a_regression_is_the_sum_of_the_squares() -> None:
    found = bert(Task(name="regression"), num_labels=1).loss(
        torch.tensor([[0.5], [-1.0], [2.0]]), torch.tensor([1.0, 1.0, -1.0])
    )
    assert float(found) == pytest.approx(0.5**2 + 2.0**2 + 3.0**2)


def test_the_loss_of_classes_is_the_sum_of_the_surprises() -> None:
    logits = [[0.5, -1.0, 2.0], [0.0, 3.0, -0.25]]
    by_hand = sum(math.log(sum(map(math.exp, row))) - row[right] for row, right in zip(logits, (0, 2), strict=True))
    task = Task(name="classification", labels=("a", "b", "c"))
    found = bert(task, num_labels=3).loss(torch.tensor(logits), torch.tensor([0, 2]))
    assert float(found) == pytest.approx(by_hand, rel=1e-6)


def test_the_loss_of_tags_leaves_out_what_carries_none() -> None:
    logits = torch.tensor([[[1.0, 0.0], [5.0, -5.0], [0.0, 2.0]]])
    by_hand = math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2))
    task = Task(name="token_classification", labels=("O", "X"))
    tuned = attach(tiny("bert", "tokens", num_labels=2), "lora")
    found = Objective(tuned, task).loss(logits, torch.tensor([[0, IGNORED, 0]]))
    assert float(found) == pytest.approx(by_hand, rel=1e-6)


def test_the_loss_of_a_word_is_that_of_the_place_before_it() -> None:
    logits = torch.tensor([[[3.0, 0.0, 0.0], [0.0, 0.0, 2.0], [9.0, -9.0, 0.0]]])
    by_hand = (math.log(math.exp(3) + 2) - 0.0) + (math.log(math.exp(2) + 2) - 2.0)
    objective = Objective(attach(tiny("llama", "lm"), "lora"), Task(name="causal_lm"), full_logits=True)
    found = objective.loss(logits, torch.tensor([[0, 1, 2]]))
    assert float(found) == pytest.approx(by_hand, rel=1e-6)


# --- scores


def test_a_word_is_guessed_right_where_the_place_before_it_names_it() -> None:
    tuned = attach(tiny("llama", "lm"), "lora")
    given = inputs(tuned.model, batch=6, length=9)
    labels = given.pop("labels").clone()
    with torch.no_grad():
        best = tuned.model(**given).logits.argmax(-1)
    # Half of the words become what the model guesses, so that there is something to count.
    told = labels[:, 1:] != IGNORED
    guessed = torch.arange(told.numel()).view_as(told) % 2 == 0
    labels[:, 1:] = torch.where(guessed & told, best[:, :-1], labels[:, 1:])
    by_hand = sum(
        int(best[row, place - 1]) == int(labels[row, place])
        for row in range(6)
        for place in range(1, 9)
        if labels[row, place] != IGNORED
    )
    batch = Batch(inputs=given, labels=labels, rows=np.arange(6), n_targets=int(told.sum()), n_tokens=0)
    objective = Objective(tuned, Task(name="causal_lm"), full_logits=True)
    batches: Any = SimpleNamespace(tokens=100, examples=None)  # the batch is handed over here
    evaluator = Evaluator(tuned, objective, batches, Precision("fp32", "for this test"), torch.device("cpu"))
    with torch.inference_mode():
        _, _, right, _ = evaluator._one(batch)
    assert right == by_hand > 10


# --- guards


def watched(noise: float) -> tuple[NumberGuard, float, float]:
    """A guard that has seen 32 losses around a low level, after a high start; their mean and deviation."""
    guard = NumberGuard()
    losses = [10.0, *[10.0 + noise * (1 if n % 2 else -1) for n in range(31)]]
    for loss in losses:
        assert guard.judge(loss, 1.0) is None
    mean = sum(losses) / len(losses)
    return guard, mean, math.sqrt(sum((v - mean) ** 2 for v in losses) / len(losses))


@pytest.mark.parametrize("noise", [2.0, 4.0])
def test_a_loss_is_a_spike_from_six_deviations_above_the_mean_where_it_is_also_twice_the_start(noise: float) -> None:
    guard, mean, deviation = watched(noise)
    limit = max(mean + 6 * deviation, 2 * (10 + noise))
    assert guard.judge(limit - 0.01, 1.0) is None
    guard, *_ = watched(noise)
    assert guard.judge(limit + 0.01, 1.0) == "loss spike"


def test_the_two_limits_of_a_spike_are_each_the_wider_one_somewhere() -> None:
    (_, mean, deviation), (_, other_mean, other) = watched(2.0), watched(4.0)
    assert mean + 6 * deviation < 2 * 12.0
    assert other_mean + 6 * other > 2 * 14.0


def test_before_sixteen_losses_nothing_is_a_spike_and_at_sixteen_it_is() -> None:
    guard = NumberGuard()
    for _ in range(15):
        assert guard.judge(1.0, 1.0) is None
    young = NumberGuard()
    young.load(guard.state())
    assert young.judge(1e6, 1.0) is None
    assert guard.judge(1.0, 1.0) is None
    assert guard.judge(1e6, 1.0) == "loss spike"


def test_the_start_that_a_spike_is_measured_by_is_the_highest_of_the_first_eight() -> None:
    guard = NumberGuard()
    for loss in (*[1.0] * 7, 3.0, 5.0, *[1.0] * 60):
        assert guard.judge(loss, 1.0) is None
    assert guard.first == [*[1.0] * 7, 3.0]


def test_the_tags_of_a_row_are_those_of_its_words_alone() -> None:
    held: Any = SimpleNamespace(labels=np.asarray([IGNORED, 2, IGNORED, 1, 0]), offsets=np.asarray([0, 3, 5]))
    assert _tags(held) == [[2], [1, 0]]
