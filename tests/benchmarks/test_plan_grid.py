"""The table of the page on plans is that of the pairs that come with the package."""

import argparse
import json
from pathlib import Path

import pytest

from benchmarks import plan_grid
from luthier.forecast import Pair, committed, committed_times, residuals, residuals_of_times
from luthier.runs.spec import RunSpec
from luthier.surgery import METHODS


def test_the_page_says_what_the_pairs_say() -> None:
    text = plan_grid.PAGE.read_text(encoding="utf-8")
    assert plan_grid.paged(text) == text
    assert plan_grid.RESIDUALS.read_text(encoding="utf-8") == plan_grid.residual_table()


def test_our_own_grid_keeps_within_what_was_promised() -> None:
    found = residuals(committed())
    assert found is not None and found.n >= 400
    assert found.median_error <= 0.10 and found.above <= 0.05


def test_our_own_seconds_over_measured_rates_keep_within_what_was_promised() -> None:
    found = residuals_of_times([pair for pair in committed_times() if pair.how == "counted"])
    assert found is not None and found.n >= 400
    assert found.median_error <= 0.5 and found.above <= 0.05


def test_our_own_seconds_of_loading_are_off_by_less_than_a_third_in_the_middle() -> None:
    found = residuals_of_times([pair for pair in committed_times() if pair.how == "loading"])
    assert found is not None and found.n >= 400
    assert found.median_error <= 0.33 and found.covered >= 0.85


def test_both_lengths_of_nearly_every_method_stand_behind_the_intervals() -> None:
    lengths: dict[tuple[str, str], set[int]] = {}
    for pair in committed():
        lengths.setdefault((pair.model, pair.method), set()).add(pair.tokens)
    assert {method for (_, method), found in lengths.items() if len(found) < 2} <= {"bipeft", "glora"}


def test_our_own_seconds_of_real_steps_keep_within_what_was_promised() -> None:
    found = residuals_of_times([pair for pair in committed_times() if pair.how == "probed"])
    assert found is not None and found.n >= 50
    assert found.median_error <= 0.2 and found.covered >= 0.85


def test_first_shapes_of_all_methods_come_first_and_no_run_comes_twice(tmp_path) -> None:  # type: ignore[no-untyped-def]
    first, all_four = plan_grid.specs(tmp_path, 1), plan_grid.specs(tmp_path, 4)
    assert all_four[: len(first)] == first
    assert {s.method.rpartition("+")[2] for s in first} == set(METHODS.ours())
    assert {s.method for s in first if "+" in s.method} == {
        "+".join((*METHODS.get(name).needs, name)) for name in METHODS.ours() if METHODS.get(name).needs
    }
    assert len({s.out for s in all_four}) == len(all_four) == 4 * len(first)
    two: dict[tuple[str, str], set[int | None]] = {}
    for s in plan_grid.specs(tmp_path, 2):
        two.setdefault((s.model, s.method), set()).add(s.max_length)
    assert all(len(lengths) == 2 for lengths in two.values()), "two shapes are two lengths"


def test_parts_of_the_grid_are_the_grid(tmp_path) -> None:  # type: ignore[no-untyped-def]
    whole, of = plan_grid.specs(tmp_path, 1), [plan_grid.specs(tmp_path, 1, (part, 3)) for part in (1, 2, 3)]
    assert sorted(s.out for part in of for s in part) == sorted(s.out for s in whole)
    assert {s.model for s in of[0]} == {s.model for s in whole}
    for wrong in ("0/2", "3/2", "2", "a/b"):
        with pytest.raises(argparse.ArgumentTypeError, match="the first half is 1/2"):
            plan_grid.part_of(wrong)


def test_a_slice_ends_in_time_and_the_next_one_goes_on(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    wanted, made, now = plan_grid.specs(tmp_path, 1)[:6], [], [0.0]

    def run(spec: RunSpec) -> None:
        home = Path(str(spec.out))
        made.append(home.name)
        now[0] += 10
        if len(made) == 2:
            home.with_suffix(".refused").write_text("no bias\n")
        else:
            home.mkdir()
            (home / "record.json").write_text("{}")

    monkeypatch.setattr(plan_grid, "run", run)
    monkeypatch.setattr(plan_grid.time, "monotonic", lambda: now[0])
    assert plan_grid.run_for(25, wanted) == 3 and len(made) == 3
    assert plan_grid.run_for(0, wanted) == 3 and len(made) == 3
    assert plan_grid.run_for(1e9, wanted) == 0
    assert made == [Path(str(s.out)).name for s in wanted], "what is finished or was refused is not made again"


def test_new_pairs_take_the_place_of_the_same_runs_and_leave_the_others(tmp_path) -> None:  # type: ignore[no-untyped-def]
    def pair(method: str, measured: int, tokens: int = 8) -> Pair:
        return Pair(
            model="m", method=method, family="f", device="cpu", rows=1, tokens=tokens, forecast=1, measured=measured
        )

    path = tmp_path / "pairs.json"
    path.write_text("[]")
    plan_grid.merged(path, [pair("lora", 5), pair("ia3", 6)])
    plan_grid.merged(path, [pair("lora", 7), pair("lora", 8, tokens=16)])
    found = [Pair(**values) for values in json.loads(path.read_text())]
    assert sorted(found, key=lambda p: p.measured) == [pair("ia3", 6), pair("lora", 7), pair("lora", 8, tokens=16)]
