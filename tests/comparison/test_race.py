"""A race: who leaves and why is written down before the next rung, and a race that was killed keeps its decisions."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from races import Here, base_in, here

from luthier.cli._main import main
from luthier.comparison import Budget, budget_of, compare, entrant_of, statistics
from luthier.comparison import race as race_file
from luthier.comparison import run as run_file
from luthier.comparison.cells import cells_of
from luthier.comparison.race import _decide, _Rung
from luthier.comparison.tuning import Trial
from luthier.core import ConfigError, LuthierError
from luthier.core.config import read_word
from luthier.report.gather import gather
from luthier.runs.ledger import Entry


@pytest.fixture(autouse=True)
def _fewer_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "DRAWS", 100)


def test_the_worse_half_leaves_and_a_killed_race_keeps_its_decisions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, done, lines = replace(base_in(tmp_path), steps=8), list[str](), list[str]()
    entrants = [entrant_of(name, read_word) for name in ("bitfit", "lora:rank=2")]
    monkeypatch.setattr(run_file, "engine_named", here(done))

    def once() -> tuple[str, ...]:
        return compare(
            base, entrants, seeds=1, home=tmp_path / "r", tune_lr=2, budget=Budget(), say=lines.append
        ).findings

    first = once()
    told = json.loads((tmp_path / "r" / "race.json").read_text())
    assert [len(d["kept"]) for d in told["decisions"]] == [2, 1, 1] and len(told["candidates"]) == 4
    assert len(done) == 4 + 2 + 1 + 1, "the winner alone reads the test half"
    assert first[0].startswith("The race of 4 candidates was won by ") and len(told["decisions"][0]["left"]) == 2
    assert all("behind" in why and "rows move a score" in why for why in told["decisions"][0]["left"].values())
    told["decisions"][1]["kept"] = told["decisions"][0]["kept"][1:]  # as another clock would have decided
    told["decisions"] = told["decisions"][:2]
    (tmp_path / "r" / "race.json").write_text(json.dumps(told))
    assert f"won by {told['decisions'][1]['kept'][0]}" in once()[0], "what was decided holds"
    with pytest.raises(ConfigError, match="a race of others"):
        compare(base, entrants[:1], seeds=1, home=tmp_path / "r", tune_lr=2, budget=Budget())
    for one, metric, budget in (
        (replace(base, steps=6), "accuracy", Budget()),
        (base, "mcc", Budget()),
        (base, "accuracy", Budget(minutes=5)),
    ):
        with pytest.raises(ConfigError, match="other rows, steps, metric or budget"):
            compare(one, entrants, seeds=1, home=tmp_path / "r", metric=metric, tune_lr=2, budget=budget)


def test_a_kill_within_a_rung_gives_no_minutes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, done, clock = replace(base_in(tmp_path), steps=4), list[str](), [0.0]
    entrants = [entrant_of(name, read_word) for name in ("bitfit", "ia3")]
    monkeypatch.setattr(race_file, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    class Killed(BaseException):
        pass

    class Slow(Here):
        def begin(self, entries: Sequence[Entry]) -> None:
            for entry in entries:
                super().begin([entry])
                clock[0] += 100.0
                if len(done) == 1:
                    raise Killed

    monkeypatch.setattr(run_file, "engine_named", lambda name, ledger, workers: Slow(ledger, done, ""))

    def once() -> None:
        compare(base, entrants, seeds=1, home=tmp_path / "r", tune_lr=2, budget=Budget(minutes=9))

    with pytest.raises(Killed):
        once()
    assert json.loads((tmp_path / "r" / "race.json").read_text())["unfinished"] == 100.0
    once()
    told = json.loads((tmp_path / "r" / "race.json").read_text())
    assert told["decisions"][0]["seconds"] == 400.0, "four runs, one of which a killed call had made"
    assert len(told["decisions"][0]["kept"]) == 1, "with two the next rung would end after 600 of 540 seconds"


def test_a_race_in_which_all_failed_is_run_again_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, entrants = replace(base_in(tmp_path), steps=8), [entrant_of("bitfit", read_word)]

    def once() -> tuple[str, ...]:
        return compare(base, entrants, seeds=1, home=tmp_path / "r", tune_lr=3, budget=Budget()).findings

    monkeypatch.setattr(run_file, "engine_named", here([], fail="bitfit"))
    for _ in range(2):
        with pytest.raises(LuthierError, match=r"no candidate has a result.*it failed: it may not"):
            once()
    told = json.loads((tmp_path / "r" / "race.json").read_text())
    assert told["decisions"] == [] and told["unfinished"] > 0, "what failed has cost its time"
    monkeypatch.setattr(run_file, "engine_named", here([]))
    assert once()[0].startswith("The race of 3 candidates was won by bitfit")


def test_whoever_exceeds_the_budget_leaves_and_is_told_by_how_much(tmp_path: Path) -> None:
    base = base_in(tmp_path)
    entrants = [entrant_of(name, read_word) for name in ("bitfit", "ia3", "lora", "vera")]
    trials = {e.name: Trial(cells_of(base, [e], [0], tmp_path)[0], 1.0) for e in entrants}
    peaks = {"bitfit": 1_000, "ia3": 3_000_000_000, "lora": 2_000, "vera": 1_500}
    scores = {"bitfit": 0.9, "ia3": 0.99, "lora": 0.85, "vera": 0.2}
    told = {n: {"scores": {"accuracy": scores[n]}, "peak_bytes": peaks[n]} for n in trials}
    rung = _Rung(0.25, seconds=60.0, ahead=40.0, rows=500)
    found = _decide(rung, told, {}, "accuracy", Budget(minutes=10, memory=1_000_000_000), trials)
    assert found.kept == ("bitfit", "lora") and set(found.left) == {"ia3", "vera"}
    assert "2.00 GB more than the budget" in found.left["ia3"] or "2.0 GB more" in found.left["ia3"]
    assert "would have to learn faster later" in found.left["vera"]
    found = _decide(rung, told, {}, "accuracy", Budget(minutes=2), trials)
    assert found.kept == ("ia3",) and "the budget is 2 minutes" in found.left["bitfit"]
    near = _decide(rung, {**told, "lora": {"scores": {"accuracy": 0.895}}}, {}, "accuracy", Budget(), trials)
    assert near.kept == ("ia3", "bitfit") and "another seed may have kept it" in near.left["lora"]
    failed = _decide(rung, {**told, "lora": None}, {"lora": "no such file"}, "accuracy", Budget(), trials)
    assert failed.left["lora"] == "it failed: no such file" and failed.scores["lora"] is None


@pytest.mark.parametrize(
    "word",
    [
        "minutes",
        "minutes=0",
        "memory=8",
        "memory=8TB",
        "steps=0",
        "steps=1.5",
        "minutes=soon",
        "params=few",
        "params=0",
    ],
)
def test_a_budget_that_is_none_is_refused(word: str) -> None:
    assert budget_of(["minutes=1.5", "memory=500MB"]) == Budget(minutes=1.5, memory=500_000_000)
    assert budget_of(["steps=40", "params=12.5k"]) == Budget(steps=40, params=12_500)
    with pytest.raises(ConfigError, match="write minutes=20, memory=8GB, steps=400 or params=100k"):
        budget_of([word])


@pytest.mark.parametrize(
    ("word", "means"),
    [
        ("params=0.4", "0.4 numbers"),
        ("params=1.2345k", "1234.5 numbers"),
        ("memory=0GB", "0 bytes"),
        ("memory=0.0000001MB", "0.1 bytes"),
    ],
)
def test_a_budget_that_is_no_whole_number_is_not_rounded(word: str, means: str) -> None:
    with pytest.raises(ConfigError, match=rf"--budget {word}: is {means}. Write a whole number .* at least 1, such as"):
        budget_of([word])
    assert budget_of(["params=1.234567M"]).params == 1_234_567, "whole: not a bit beside it"


def test_a_budget_that_is_given_twice_is_refused_with_both(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", "sample:minilm-l6", "--data", "sample:trec6", "--method", "lora,ia3", "--race"]
    assert main([*words, "--budget", "minutes=1", "--budget", "minutes=2"]) == 2
    assert "minutes=1 and minutes=2" in capsys.readouterr().err
    assert main([*words, "--budget", "minutes=1,minutes=2"]) == 2
    assert "--budget minutes=1 and minutes=2: minutes is one number" in capsys.readouterr().err


def test_the_report_of_a_race_names_the_command_that_goes_on_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, home, budget = base_in(tmp_path), tmp_path / "r", Budget(minutes=0.7, memory=12_345_678_901)
    asked = ["lora:rank=2", "bitfit"]
    monkeypatch.setattr(run_file, "engine_named", here([]))
    compare(
        replace(base, steps=4), [entrant_of(name, read_word) for name in asked], seeds=1, home=home, budget=budget,
        tune_lr=2,
    )  # fmt: skip
    words = shlex.split(gather([home]).commands[0])
    told = dict(pairwise(words))
    assert "--race" in words and told["--method"].split(",") == asked and told["--tune-lr"] == "2"
    assert budget_of(told["--budget"].split(",")) == budget
    assert "--lr" not in words, "the rate that won is no rate that was asked for"


def test_a_budget_without_a_race_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", "sample:minilm-l6", "--data", "sample:trec6", "--method", "lora", "--budget", "minutes=1"]
    assert main(words) == 2 and "Add --race" in capsys.readouterr().err
    assert race_file.FILE == "race.json"
