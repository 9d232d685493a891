"""The table of the page on plans is that of the pairs that come with the package."""

from benchmarks import plan_grid
from luthier.forecast import committed, committed_times, residuals, residuals_of_times


def test_the_page_says_what_the_pairs_say() -> None:
    text = plan_grid.PAGE.read_text(encoding="utf-8")
    assert plan_grid.paged(text) == text


def test_our_own_grid_keeps_within_what_was_promised() -> None:
    found = residuals(committed())
    assert found is not None and found.n >= 25
    assert found.median_error <= 0.10 and found.above <= 0.05


def test_our_own_seconds_over_measured_rates_keep_within_what_was_promised() -> None:
    found = residuals_of_times([pair for pair in committed_times() if pair.how == "counted"])
    assert found is not None and found.n >= 19
    assert found.median_error <= 0.5 and found.above <= 0.05


def test_first_shapes_of_all_methods_come_first_and_no_run_comes_twice(tmp_path) -> None:  # type: ignore[no-untyped-def]
    first, all_four = plan_grid.specs(tmp_path), plan_grid.specs(tmp_path, 4)
    assert all_four[: len(first)] == first
    assert {s.method for s in first} == {*plan_grid.ENCODER, *plan_grid.DECODER}
    assert len({s.out for s in all_four}) == len(all_four) == 4 * len(first)
