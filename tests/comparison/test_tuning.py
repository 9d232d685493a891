"""The search of learning rates: as many runs for each method, chosen without the test half."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from races import Here, base_in, here

from luthier.comparison import compare, entrant_of, statistics
from luthier.comparison import run as run_file
from luthier.comparison.cells import Failure, Sweep
from luthier.comparison.rates import Rates, said_of
from luthier.comparison.tuning import choose_rates, factors, rates_of, trials_of
from luthier.core import ConfigError, UsageError
from luthier.core.config import read_word
from luthier.data.load_data import load_data
from luthier.runs.ledger import Entry, Ledger
from luthier.surgery import compose


@pytest.fixture(autouse=True)
def _fewer_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "DRAWS", 100)


def test_the_methods_own_rate_is_always_among_those_tried() -> None:
    for n in range(2, 10):
        made = factors(n)
        assert len(made) == n and 1.0 in made and list(made) == sorted(made)
    for n in (1, 10):
        with pytest.raises(ConfigError, match="between 2 and 9"):
            factors(n)


def test_a_factor_scales_the_rate_of_the_head_too(tmp_path: Path) -> None:
    base, lora = base_in(tmp_path), entrant_of("lora", read_word)
    method = compose.method("lora", {})
    found = rates_of(base, lora, 10.0)
    assert found.lr == pytest.approx(10 * method.default_lr)
    assert found.head_lr == pytest.approx(10 * (method.default_head_lr or method.default_lr))


def test_every_method_has_as_many_runs_and_none_sees_the_test_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, done, lines = base_in(tmp_path), list[str](), list[str]()
    entrants = [entrant_of(name, read_word) for name in ("bitfit", "lora:rank=2", "ia3")]
    monkeypatch.setattr(run_file, "engine_named", here(done, fail="ia3"))
    found = compare(base, entrants, seeds=1, home=tmp_path / "race", tune_lr=2, say=lines.append)
    assert len(done) == 2 * 2 + 2
    assert set(found.rates) == {"bitfit", "lora:rank=2"} and all(len(r.rates) == 2 for r in found.rates.values())
    assert found.failed["ia3"] == "none of its 2 rates gave a result. it may not"
    test = {row["text"] for row in load_data(base.data, base.task).test.rows}  # type: ignore[union-attr]
    (written,) = (tmp_path / "race").glob("train-*.jsonl")
    assert not test & {json.loads(line)["text"] for line in written.read_text().splitlines()}
    for run in (tmp_path / "race" / "rates").iterdir():
        assert json.loads((run / "run.json").read_text())["spec"]["data"]["source"] == str(written)
    for name, one in found.rates.items():
        spec = json.loads((tmp_path / "race" / found.runs[name][0] / "run.json").read_text())["spec"]
        assert spec["optim"]["lr"] == one.rates[one.chosen] and spec["data"]["source"] == base.data.source
    assert all(s.nll and s.brier and s.calibration_error is not None for s in found.standings)
    assert any("2 runs of each method with one seed" in line for line in found.findings)
    compare(base, entrants, seeds=1, home=tmp_path / "race", tune_lr=2, say=lines.append)
    assert len(done) == 6, "nothing that is finished is computed again"


def test_a_rate_whose_run_failed_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, entrant = base_in(tmp_path), entrant_of("bitfit", read_word)
    home = _made(tmp_path / "race")
    trials = trials_of(base, [entrant], 3, home, load_data(base.data, base.task))
    sweep = Sweep(Ledger(home, make=True), lambda n: here([])("local", sweep.ledger, n))
    sweep.settle([t.cell for t in trials["bitfit"]], lambda cell, failure, told: None)
    whole, none = choose_rates(base, trials, {}, "accuracy")
    assert not none
    best = trials["bitfit"][whole["bitfit"].chosen].cell.path
    rest, _ = choose_rates(base, trials, {best: Failure("it burst", 1)}, "accuracy")
    assert rest["bitfit"].chosen != whole["bitfit"].chosen
    assert rest["bitfit"].scores[whole["bitfit"].chosen] is None


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_best_rate_at_the_edge_is_said() -> None:
    inside = Rates(
        rates=(1e-4, 1e-3, 1e-2), factors=(0.1, 1.0, 10.0), scores=(0.1, 0.2, 0.1), chosen=1, rows=9, seconds=1
    )
    edge = Rates(rates=(1e-4, 1e-3), factors=(0.1, 1.0), scores=(0.1, None), chosen=0, rows=9, seconds=1)
    assert len(said_of({"lora": inside})) == 1
    assert said_of({"lora": inside, "ia3": edge})[1].startswith("ia3: the best rate is the lowest or highest")


def test_a_halved_search_ends_with_the_bits_of_whole_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, done, lines = replace(base_in(tmp_path), steps=8), list[str](), list[str]()
    monkeypatch.setattr(run_file, "engine_named", here(done))
    entrants = [entrant_of("bitfit", read_word)]
    halved = compare(
        base, entrants, seeds=1, home=tmp_path / "half", tune_lr=4, search="halving", say=lines.append
    ).rates["bitfit"]
    assert len(done) == 4 + 2 + 1 + 1 and sorted(halved.until) == [0.25, 0.25, 0.5, 1.0]
    assert sum("rates of" in line and "are left" in line for line in lines) == 2
    full = compare(base, entrants, seeds=1, home=tmp_path / "full", tune_lr=4).rates["bitfit"]
    assert halved.scores[halved.chosen] == full.scores[halved.chosen]
    of = {
        kind: {
            told["run"].partition("-seed")[0] + str(told["scores"]["loss"]): told["sha256"]
            for path in (tmp_path / kind / "ledger" / "results").glob("*.json")
            if (told := json.loads(path.read_bytes()))["status"] == "finished" and told["run"].startswith("rates/")
        }
        for kind in ("half", "full")
    }
    assert len(of["half"]) == 1 and of["half"].items() <= of["full"].items()


def test_a_killed_optuna_search_asks_the_same_again_and_computes_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    base, entrants = base_in(tmp_path), [entrant_of(name, read_word) for name in ("bitfit", "ia3")]
    whole, done = list[str](), list[str]()
    monkeypatch.setattr(run_file, "engine_named", here(whole))
    found = compare(base, entrants, seeds=1, home=tmp_path / "whole", tune_lr=4, search="optuna").rates
    assert all(r.factors[0] == 1.0 and len(set(r.factors)) == 4 for r in found.values())
    assert found["bitfit"].factors[1:] != found["ia3"].factors[1:], "each method has a search of its own"

    class Killed(BaseException):
        pass

    def dying(name: str, ledger: Ledger, workers: int) -> Here:
        class Dying(Here):
            def begin(self, entries: Sequence[Entry]) -> None:
                super().begin(entries[:1])
                if len(self.done) == 5:
                    raise Killed
                super().begin(entries[1:])

        return Dying(ledger, done, "")

    monkeypatch.setattr(run_file, "engine_named", dying)
    with pytest.raises(Killed):
        compare(base, entrants, seeds=1, home=tmp_path / "killed", tune_lr=4, search="optuna")
    again = compare(base, entrants, seeds=1, home=tmp_path / "killed", tune_lr=4, search="optuna").rates
    assert {n: r.factors for n, r in again.items()} == {n: r.factors for n, r in found.items()}
    assert len(done) == len(set(done)) == len(whole)


def test_a_search_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, entrants = base_in(tmp_path), [entrant_of("bitfit", read_word)]
    with pytest.raises(ConfigError, match="Did you mean 'halving'"):
        compare(base, entrants, seeds=1, home=tmp_path / "r", tune_lr=2, search="halvng")
    monkeypatch.setattr("luthier.comparison.choices.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"luthier\[search\]"):
        compare(base, entrants, seeds=1, home=tmp_path / "r", tune_lr=2, search="optuna")
