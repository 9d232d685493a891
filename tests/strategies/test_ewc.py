"""The acid tests of elastic weight consolidation."""

from types import SimpleNamespace

import pytest
import torch
from in_memory import Runs, alike

from luthier.training import STRATEGIES
from luthier.training.course import Memory

torch.set_num_threads(1)
EWC = STRATEGIES.get("ewc")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("ewc"))


def begun(runs, **settings):
    values = {"ewc.answers": "labels", "ewc.rows": 1, **{f"ewc.{k}": v for k, v in settings.items()}}
    loop = runs.loop("ewc", "full", kind="bert-dry", values=values)
    loop.moments.start()
    (one, course), *_ = loop.moments._asked
    return loop, one, course


@pytest.mark.acid("ewc", 1)
def test_ewc_with_one_row_the_information_is_the_squared_gradient(runs):
    _, _, course = begun(runs)
    old = course.rows.rows("old")
    found = []
    for row in old:
        (batch,) = course.cut(old[old == row])
        loss = course.forward(batch).loss
        slopes = torch.autograd.grad(loss, [*course.weights().values()], allow_unused=True)
        found.append(
            all(
                torch.allclose(course.memory.tensors[f"fisher {n}"], torch.zeros_like(p) if g is None else g.square())
                for (n, p), g in zip(course.weights().items(), slopes, strict=True)
            )
        )
    assert sum(found) == 1, "of one of the old rows"


def test_ewc_several_rows_are_asked_one_at_a_time(runs):
    _, one, course = begun(runs, rows=20)
    old = course.rows.rows("old")
    mean = {n: torch.zeros_like(p) for n, p in course.weights().items()}
    for row in old:
        (batch,) = course.cut(old[old == row])
        for n, g in zip(mean, one._slopes(course, batch), strict=True):
            mean[n] += 0 if g is None else g.square() / len(old)
    assert all(torch.allclose(course.memory.tensors[f"fisher {n}"], m, atol=1e-7) for n, m in mean.items())


def noted(course):
    return course.progress.numbers["ewc.penalty"]


@pytest.mark.acid("ewc", 2, 3)
def test_ewc_pulls_nothing_at_the_start_and_numbers_without_information_are_free(runs):
    _, one, course = begun(runs)
    one.penalty(course)
    assert noted(course) == 0 and not any(p.grad.any() for p in course.weights().values())
    name, parameter = next(
        (n, p) for n, p in course.weights().items() if (course.memory.tensors[f"fisher {n}"] == 0).any()
    )
    with torch.no_grad():
        parameter[course.memory.tensors[f"fisher {name}"] == 0] += 3.0
    one.penalty(course)
    assert noted(course) == 0 and not any(p.grad.any() for p in course.weights().values())
    with torch.no_grad():
        parameter += 1.0
    one.penalty(course)
    assert noted(course) > 0 and parameter.grad.any(), "what has information is not"


@pytest.mark.acid("ewc", 4)
def test_ewc_at_the_same_new_loss_the_old_loss_is_lower():
    # Old: curvature a around 0. New: curvature b around 1. What mattered to the old task is left to the others.
    a, b = torch.tensor([10.0, 0.1]), torch.tensor([1.0, 1.0])
    old_losses = []
    for weight in (0.0, 5.0):
        theta = torch.zeros(2, requires_grad=True)
        memory = Memory(tensors={"fisher t": a, "start t": torch.zeros(2)})
        course = SimpleNamespace(memory=memory, weights=lambda theta=theta: {"t": theta}, note=lambda *told: None)
        new = theta.new_ones(())
        while new > 0.6:
            new = (b * (theta - 1).square()).sum() / 2
            new.backward()
            EWC(weight=weight).penalty(course)
            with torch.no_grad():
                theta -= 0.01 * theta.grad
            theta.grad = None
        old_losses.append(float((a * theta.detach().square()).sum() / 2))
    assert old_losses[1] < 0.5 * old_losses[0]


def test_ewc_what_mattered_moves_less_in_a_run(runs):
    found = []
    for weight in (0.0, 3000.0):
        settings = {"ewc.weight": weight, "ewc.answers": "labels", "ewc.rows": 20}
        loop = runs.after("ewc", "full", kind="bert-dry", steps=8, values=settings)
        (_, course), *_ = loop.moments._asked
        held = course.memory.tensors
        with torch.no_grad():
            moves = [
                (held[f"fisher {n}"] * (p - held[f"start {n}"]).square()).sum() for n, p in course.weights().items()
            ]
        found.append(float(sum(moves)))
    assert found[1] < 0.3 * found[0]


def test_ewc_the_models_own_answers_are_drawn_the_same_each_time(runs):
    again = [runs.after("ewc", values={"ewc.rows": 5, "ewc.weight": 1e4}, steps=2) for _ in range(2)]
    assert alike(*again, bound=0)
