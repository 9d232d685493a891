"""The search for a front: on planted landscapes, whose best is known, and through the ledger of a comparison."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from races import base_in, here

from luthier.cli import main
from luthier.cli._front_space import front_space
from luthier.comparison import Front, compare, entrant_of, statistics
from luthier.comparison import run as run_file
from luthier.comparison.front import Config, Space, Tried, area, front_of, propose
from luthier.core import ConfigError
from luthier.core.config import read_word
from luthier.data.load_data import load_data

FLOOR = 0.5


def planted(layers: int = 6, d: int = 64) -> Space:
    sizes = (0, *sorted({d >> k for k in range(10)} - {0}))
    adapter, prefix = [s and 2 * d * s + s + d for s in sizes], [2 * d * s for s in sizes]
    return Space(sizes, np.array([[adapter, adapter, prefix]] * layers))


def score(space: Space, config: Config) -> float:
    """The upper half of the layers helps, a serial adapter most, a prefix a little; a parallel one harms."""
    share = sum(config.layers[space.layers // 2 :]) / (space.layers / 2)
    serial, parallel, prefix = (size / (len(space.sizes) - 1) for size in config.sizes)
    gain = 0.1 * share + 0.25 * (1 - np.exp(-3 * serial * share)) + 0.08 * (1 - np.exp(-4 * prefix)) - 0.05 * parallel
    return float(FLOOR + gain)


def search(space: Space, n: int, seed: int, initial: int, noise: float = 0.0) -> list[Tried]:
    rng = np.random.default_rng(seed + 99)
    tried: list[Tried] = []
    while len(tried) < n:
        for config in propose(space, tried, min(4, n - len(tried)), seed, initial, FLOOR):
            tried.append(Tried(config, space.count(config), score(space, config) + noise * rng.standard_normal()))
    return tried


def truly(space: Space, tried: list[Tried]) -> float:
    return area([replace(t, score=score(space, t.config)) for t in tried], space.whole(), FLOOR)


@pytest.mark.acid("autopeft", 4)
def test_it_finds_a_better_front_than_as_many_random_runs() -> None:
    space = planted()
    asked = [truly(space, search(space, 20, seed, 12, noise=0.02)) for seed in range(10)]
    drawn = [truly(space, search(space, 20, seed, 20, noise=0.02)) for seed in range(10)]
    assert np.mean(asked) > np.mean(drawn) + 0.02 and np.sum(np.array(asked) > np.array(drawn)) >= 8


@pytest.mark.acid("autopeft", 1, 2)
def test_no_plan_of_the_front_beats_another_and_the_area_under_it_never_falls() -> None:
    space = planted(4)
    tried = search(space, 24, 3, 16, noise=0.03)
    found = front_of(tried)
    for one in found:
        beaten = [t for t in tried if t.count <= one.count and t.score >= one.score and t is not one]  # type: ignore[operator]
        assert not [t for t in beaten if (t.count, t.score) != (one.count, one.score)]
    assert max(t.score for t in tried) == found[-1].score  # type: ignore[type-var]
    areas = [area(tried[:n], space.whole(), FLOOR) for n in range(len(tried) + 1)]
    assert areas == sorted(areas) and areas[0] == 0 < areas[-1]
    three = [Tried(tried[0].config, count, s) for count, s in ((10, 0.6), (20, 0.55), (50, 0.8))]
    assert area(three, 100, FLOOR) == pytest.approx(0.4 * 0.1 + 0.5 * 0.3)


@pytest.mark.acid("autopeft", 3)
def test_nothing_is_asked_twice_and_nothing_that_trains_nothing() -> None:
    space = planted(3, 8)
    tried = search(space, 200, 0, 188)
    assert len({t.config for t in tried}) == 200
    assert all(any(t.config.layers) and any(t.config.sizes) and t.count > 0 for t in tried)


def test_a_space_that_is_used_up_has_no_more_to_ask() -> None:
    space = planted(1, 1)
    tried = [Tried(c, space.count(c), 0.6) for c in propose(space, [], 7, 0, 7, FLOOR)]
    assert len(tried) == space.choices() == 7
    assert propose(space, tried, 4, 0, 7, FLOOR) == propose(space, tried, 4, 0, 9, FLOOR) == []


@pytest.mark.acid("autopeft", 6)
def test_from_the_same_history_the_same_is_proposed() -> None:
    space = planted()
    tried = search(space, 16, 1, 12)
    copied = [Tried(Config(tuple(t.config.layers), t.config.sizes), t.count, t.score) for t in tried]
    assert propose(space, tried, 4, 1, 12, FLOOR) == propose(space, copied, 4, 1, 12, FLOOR)
    assert propose(space, tried, 4, 1, 12, FLOOR) != propose(space, tried[:12], 4, 1, 12, FLOOR)
    failed = [*tried[:-1], replace(tried[-1], score=None)]
    assert tried[-1].config not in propose(space, failed, 4, 1, 12, FLOOR)


def test_runs_of_the_search_never_see_the_test_half_and_a_second_call_makes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(statistics, "DRAWS", 100)
    base, done, home = base_in(tmp_path), list[str](), tmp_path / "r"
    monkeypatch.setattr(run_file, "engine_named", here(done))
    entrants = [entrant_of("autopeft", read_word)]
    found = compare(base, entrants, seeds=1, home=home, front=Front(5, front_space))
    told = json.loads((home / "front.json").read_bytes())
    assert len(told["tried"]) == 5 and len(done) == 5 + len(told["front"])
    assert {s.name for s in found.standings} == {one["name"] for one in told["front"]}
    assert all(one["test"] == next(s.score for s in found.standings if s.name == one["name"]) for one in told["front"])
    assert {one["name"]: one["trained"] for one in told["front"]} == {s.name: s.costs.trained for s in found.standings}
    test = {row["text"] for row in load_data(base.data, base.task).test.rows}  # type: ignore[union-attr]
    (written,) = home.glob("train-*.jsonl")
    assert not test & {json.loads(line)["text"] for line in written.read_text().splitlines()}
    for run in (home / "front").iterdir():
        assert json.loads((run / "run.json").read_text())["spec"]["data"]["source"] == str(written)
    before, made = (home / "front.json").read_bytes(), len(done)
    for forget in (False, True):
        if forget:  # the ledger alone is enough
            (home / "front.json").unlink()
        compare(base, entrants, seeds=1, home=home, front=Front(5, front_space))
        assert len(done) == made and (home / "front.json").read_bytes() == before
    with pytest.raises(ConfigError, match="is of another search"):
        compare(replace(base, steps=2), entrants, seeds=1, home=home, front=Front(5, front_space))
    words = ["compare", base.model, "--data", base.data.source, "--method", "autopeft", "--seeds", "1", "--steps", "1"]
    words += ["--front", "5", "--batch", "8", "--precision", "fp32", "--threads", "1", "--out", str(home)]
    capfd.readouterr()
    assert main(words) == 0 and len(done) == made
    out = capfd.readouterr().out
    assert "chosen by" in out and told["front"][0]["name"].partition(":")[2] in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "autopeft", "--front", "3"], "give at least 4 runs"),
        (["--method", "lora", "--front", "8"], "and lora is named"),
        (["--method", "autopeft:serial=3", "--front", "8"], "without settings"),
        (["--method", "autopeft", "--front", "8", "--tune-lr", "3"], "takes no --tune-lr"),
    ],
)
def test_what_cannot_be_searched_is_refused(words: list[str], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["compare", "sample:minilm-l6", "--data", "sample:trec6", *words, "--out", "runs/none"]
    assert main(words) == 2 and said in capfd.readouterr().err
