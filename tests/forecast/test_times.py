"""Work is counted, rates are measured, and intervals of seconds come from finished runs."""

import math
import random
from typing import Any

import pytest
import torch
from cells import fresh, inputs
from tiny_methods import small
from torch.utils.flop_counter import FlopCounterMode

from luthier.data.tasks import Task
from luthier.forecast import Rates, Span, TimePair, Way, Work, growth, measured_rates, residuals_of_times, span
from luthier.forecast.work import Counting
from luthier.training.precision import Precision

torch.set_num_threads(1)
PLAIN = Precision("fp32", "as asked")


def pair(
    ratio: float, *, method: str = "x", device: str = "cpu", family: str = "partial", how: Any = "counted"
) -> TimePair:
    return TimePair(model="m", method=method, family=family, device=device, how=how, forecast=2.0, measured=2.0 * ratio)


def test_operations_are_those_of_the_products_and_views_cost_nothing() -> None:
    x, w = torch.ones(3, 4, requires_grad=True), torch.ones(5, 4, requires_grad=True)
    with Counting() as counted:
        torch.nn.functional.linear(x, w).sum().backward()
    assert counted.work.products == 3 * 2 * 3 * 4 * 5
    before = counted.work
    with Counting() as views:
        x.detach().view(4, 3).transpose(0, 1)[1:]
    assert views.work == Work() and before.moved > 4 * (12 + 20 + 15)


@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_a_whole_model_has_the_operations_that_torch_itself_counts(arch: str) -> None:
    model = fresh(arch, "lm" if arch == "llama" else "classification")
    batch = inputs(model)
    with Counting() as ours, FlopCounterMode(display=False) as theirs:
        model(**batch).logits.sum().backward()
    assert ours.work.products == pytest.approx(theirs.get_total_flops(), rel=0.05)


def test_work_grows_with_rows_tokens_and_what_trains() -> None:
    model, task = fresh("bert", "classification"), Task(name="classification", labels=("a", "b"))

    def of(name: str, tokens: int, *, twice: bool = False) -> Work:
        def make(config: Any, dtype: torch.dtype) -> Any:
            return type(model)(config).to(dtype)

        found = growth(
            small(name),
            model.config,
            task,
            make,
            tokens,
            rows=4,
            dtype=torch.float32,
            precision=PLAIN,
            way=Way(checkpointing=twice),
        )
        return found.row_work

    few, many = of("lora", 6), of("lora", 12)
    assert 1.5 * few.products < many.products < 4 * few.products and few.moved < many.moved
    assert few.products < of("full", 6).products, "no gradients of frozen weights"
    again = of("lora", 6, twice=True)
    assert again.products > few.products, "activations are computed twice"


def test_a_width_is_followed_along_a_line_and_a_square() -> None:
    def at(share: float) -> Work:
        return Work(3.0 * share + 50.0 * share**2, 7.0 * share, 11.0)

    whole = at(0.125).widened(at(0.25), 0.125)
    assert whole.products == pytest.approx(at(1).products) and whole.moved == pytest.approx(at(1).moved)
    assert whole.calls == 11.0


def test_seconds_grow_with_every_part_of_the_work_and_fall_with_every_rate() -> None:
    rates, work = Rates(products=1e9, moved=1e8, calls=1e5), Work(2e9, 3e8, 4e5)
    assert rates.seconds(work) == pytest.approx(2 + 3 + 4)
    for more in (Work(3e9, 3e8, 4e5), Work(2e9, 4e8, 4e5), Work(2e9, 3e8, 5e5)):
        assert rates.seconds(more) > rates.seconds(work)
    assert Rates(products=2e9, moved=1e8, calls=1e5).seconds(work) == pytest.approx(8)


def test_a_probe_measures_and_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    found = measured_rates(torch.device("cpu"), torch.float32, rows=64, width=64, seconds=0.02)
    assert min(found.products, found.moved, found.calls) > 1000
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("how", ["counted", "probed", "loading"])
def test_without_runs_the_ends_are_assumed_and_no_forecast_is_a_point(how: Any) -> None:
    found = span(3.0, how, "cpu", "partial", [pair(1.0)] * 18 + [pair(1.0, device="cuda", how=how)] * 40)
    assert found.n == 0 and found.low < 0.7 * found.likely and found.high >= 2 * found.likely


def test_nineteen_runs_give_their_smallest_and_largest_ratio_and_the_middle_moves_with_them() -> None:
    pairs = [pair(2 + i / 10) for i in range(19)]
    found = span(1.0, "counted", "cpu", "unified", pairs)
    assert (found.low, found.likely, found.high) == (pytest.approx(2.0), pytest.approx(2.9), pytest.approx(3.8))
    assert found.n == 19 and found.times(10) == Span(*(10 * v for v in (found.low, found.likely, found.high)), 19)
    own = span(1.0, "counted", "cpu", "additive", [*pairs, *[pair(5.0, family="additive")] * 20])
    assert own.likely == pytest.approx(5.0) and own.n == 20


def test_nine_in_ten_of_new_runs_fall_inside() -> None:
    draw, inside = random.Random(0), 0
    for _ in range(400):
        known = [pair(math.exp(draw.gauss(0.7, 0.4))) for _ in range(60)]
        found = span(1.0, "counted", "cpu", "partial", known)
        inside += found.low <= math.exp(draw.gauss(0.7, 0.4)) <= found.high
    assert 0.86 < inside / 400 < 0.95


def test_planted_runs_are_judged_by_those_of_other_methods() -> None:
    good = [pair(2 * (1 + (i % 5 - 2) / 100), method="a") for i in range(40)]
    known = [pair(2 * (1 + (i % 5 - 2) / 100), method="c") for i in range(40)]
    slow = [pair(9.0, method="b")] * 2
    found = residuals_of_times([*good, *slow], known)
    assert found is not None and found.n == 42
    assert found.above == pytest.approx(2 / 42) and found.median_error < 0.03 and found.covered > 0.9
    assert residuals_of_times(good) is None, "a method is no witness of itself"
    fast = residuals_of_times([pair(0.1, method="b")], known)
    assert fast is not None and fast.above == 0 and fast.covered == 0
