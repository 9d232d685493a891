"""The acid tests of mixtures: which rows make a step, and that further rows are refused where they do not fit."""

import csv
import dataclasses

import numpy as np
import pytest
import torch
from in_memory import Runs
from little import Heard, little_data, little_spec

from luthier.core import ConfigError, DataError, IntegrityError
from luthier.data.order import Order
from luthier.data.sets import Sets
from luthier.runs.spec import BatchSpec
from luthier.training import STRATEGIES
from luthier.workflow import resume, train
from luthier.workflow.resume_proof import run_digests

torch.set_num_threads(1)
Replay, MTL, Curriculum, DataSelect = (
    STRATEGIES.get(name) for name in ("replay", "mtl_sampling", "curriculum", "data_select")
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("mixture"))


@pytest.fixture
def spec(tmp_path):
    return little_spec(tmp_path)


def usual(n=80, size=8):
    return Order(np.random.default_rng(0).integers(3, 12, n), size, 0)


# --- replay


@pytest.mark.acid("replay", 2)
def test_replay_the_share_of_old_rows_is_the_one_asked_for(spec):
    order = Replay(share=0.1).order(usual(), Sets(("train", "old"), (0, 80, 130)), spec)
    steps = [order.rows(e, s) for e in range(40) for s in range(10)]
    old = np.concatenate([rows[rows >= 80] for rows in steps])
    assert len(old) / sum(map(len, steps)) == pytest.approx(0.1, abs=0.01)
    assert all(np.array_equal(rows[:8], usual().rows(i // 10, i % 10)) for i, rows in enumerate(steps)), "new rows stay"
    assert all(len(set(rows)) == len(rows) for rows in steps)
    assert np.bincount(old - 80, minlength=50).min() > 0


@pytest.mark.acid("replay", 1)
def test_replay_the_memory_takes_each_old_row_with_the_same_chance(spec):
    counts = np.zeros(50)
    for seed in range(200):
        order = Replay(share=0.5, memory=5).order(usual(), Sets(("train", "old"), (0, 80, 130)), spec_of(spec, seed))
        seen = {int(r) - 80 for s in range(10) for r in order.rows(0, s) if r >= 80}
        assert len(seen) <= 5
        counts[sorted(seen)] += 1
    assert counts.mean() == pytest.approx(20, abs=0.5) and counts.min() > 5 and counts.max() < 40


def spec_of(spec, seed):
    return dataclasses.replace(spec, seed=seed)


@pytest.mark.acid("replay", 4)
def test_replay_never_learns_a_row_of_the_test_half(tmp_path):
    spec = little_spec(tmp_path, steps=1)
    from luthier.workflow.preparation import prepare

    plain = prepare(spec)
    leaked = tmp_path / "old.csv"
    with leaked.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("text", "label"), *((r["text"], r["label"]) for r in plain.test_table.rows[:3])])
        writer.writerow(("ab cd", "good"))
    lines = []
    prepared = prepare(dataclasses.replace(spec, strategy="replay", also=(f"old={leaked}",)), lines.append)
    assert prepared.sets.rows("old").tolist() == [len(plain.train)]
    assert any("3 rows also stand in the test half" in line for line in lines)


# --- mtl_sampling


def shares_of(order, sets, epochs=1):
    rows = np.concatenate([order.rows(e, s) for e in range(epochs) for s in range(order.steps_per_epoch)])
    return np.bincount(sets.numbers(rows), minlength=len(sets.names)) / len(rows)


SETS = Sets(("train", "a", "b"), (0, 80, 120, 130))


@pytest.mark.acid("mtl_sampling", 1, 2)
@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, (80, 40, 10)),
        ({"temperature": 1e9}, (1, 1, 1)),
        ({"temperature": 2.0}, (80**0.5, 40**0.5, 10**0.5)),
        ({"cap": 20}, (20, 20, 10)),
    ],
)
def test_mtl_sampling_each_set_is_seen_as_its_formula_says(settings, wanted, single, spec):
    order = MTL(**settings, single=single).order(usual(), SETS, dataclasses.replace(spec, steps=None, epochs=2.0))
    found, share = shares_of(order, SETS, 2), np.asarray(wanted) / sum(wanted)
    assert np.abs(found - share).max() < (0.07 if single else 0.01)
    if single:
        assert all(len(set(SETS.numbers(order.rows(0, s)))) == 1 for s in range(order.steps_per_epoch))


@pytest.mark.acid("mtl_sampling", 3)
def test_mtl_sampling_annealing_goes_from_proportional_to_nearly_equal(spec):
    order = MTL(by="annealed").order(usual(), SETS, dataclasses.replace(spec, steps=None, epochs=3.0))
    for epoch, power in ((0, 1.0), (1, 0.6), (2, 0.2)):
        rows = np.concatenate([order.rows(epoch, s) for s in range(order.steps_per_epoch)])
        wanted = np.asarray([80.0, 40.0, 10.0]) ** power
        assert np.abs(np.bincount(SETS.numbers(rows)) / len(rows) - wanted / wanted.sum()).max() < 0.01, power


@pytest.mark.acid("mtl_sampling", 5)
def test_mtl_sampling_no_set_starves_and_all_rows_of_one_come_as_often(spec):
    sets = Sets(("train", "tiny"), (0, 80, 81))
    order = MTL().order(usual(), sets, spec)
    rows = np.concatenate([order.rows(0, s) for s in range(order.steps_per_epoch)])
    counts = np.bincount(rows[rows < 80], minlength=80)
    assert 80 in rows and counts.min() >= 1 and counts.max() - counts.min() <= 1
    again = MTL().order(usual(), sets, spec)
    assert np.array_equal(rows, np.concatenate([again.rows(0, s) for s in range(again.steps_per_epoch)]))


# --- curriculum


@pytest.mark.acid("curriculum", 1, 2)
def test_curriculum_nothing_above_the_competence_is_served_and_all_rows_come_later(spec):
    one, base, spec = Curriculum(c0=0.1, until=0.5), usual(), dataclasses.replace(spec, steps=40)
    order = one.order(base, Sets(("train",), (0, 80)), spec)
    easier = np.asarray([(base.lengths < n).mean() for n in base.lengths])
    for t in range(20):
        rows = order.rows(*divmod(t, 10))
        assert easier[rows].max() <= one.competence(t, 40) and 0 < len(rows) <= 8 and len(set(rows)) == len(rows)
    later = np.concatenate([order.rows(*divmod(t, 10)) for t in range(20, 40)])
    assert set(later) == set(range(80))
    assert one.competence(0, 40) == pytest.approx(0.1) and one.competence(20, 40) == 1


@pytest.mark.acid("curriculum", 4)
def test_curriculum_rows_of_one_difficulty_are_the_usual_run(spec):
    base = Order(np.full(80, 5), 8, 0)
    order = Curriculum().order(base, Sets(("train",), (0, 80)), spec)
    assert all(np.array_equal(order.rows(e, s), base.rows(e, s)) for e in (0, 1) for s in range(10))


# --- data_select


@pytest.mark.acid("data_select", 2)
def test_data_select_the_rows_are_those_of_a_sort_by_loss(runs):
    loop = runs.loop("data_select", kind="bert-dry", batch=BatchSpec(size=8, tokens=40))
    loop.set_mode(training=True)
    given = loop.feed.cut(0)
    losses = {}
    for batch in given:
        with torch.no_grad():
            logits = loop.tuned.model(**batch.inputs).logits
        each = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none")
        losses |= dict(zip(batch.rows.tolist(), each.tolist(), strict=True))
    kept = loop.moments.batches(given)
    wanted = sorted(losses, key=lambda row: -losses[row])[: -(-len(losses) // 2)]
    assert sorted(int(r) for b in kept for r in b.rows) == sorted(wanted) and 0 < len(wanted) < len(losses)


# --- further rows in a run


def test_labels_that_only_a_further_set_has_follow_those_of_the_run(tmp_path):
    spec = little_spec(tmp_path, steps=3, strategy="mtl_sampling")
    other = little_data(tmp_path / "other.csv", rows=12, seed=3)
    other.write_text(other.read_text().replace(",good", ",blue"))
    result = train(dataclasses.replace(spec, also=(f"other={other}",)), listener=(heard := Heard()))
    assert "also.other: labels that the run's own rows lack: 'blue'" in heard.text
    assert result.tuned.model.config.num_labels == 4
    assert result.record.spec["also"] == ["other=" + str(other)]


def test_a_run_with_further_rows_resumes_to_the_bit_and_refuses_others(tmp_path):
    old = little_data(tmp_path / "old.csv", rows=12, seed=3)
    spec = little_spec(tmp_path, steps=7, strategy="replay+ewc", also=(f"old={old}",))
    spec = dataclasses.replace(spec, settings=spec.settings | {"share": 0.3, "ewc.rows": 4})
    train(dataclasses.replace(spec, out=str(tmp_path / "whole")))
    train(dataclasses.replace(spec, out=str(tmp_path / "stopped")), stop_at=3)
    kept = old.read_text()
    old.write_text(kept.replace("good", "bad"))
    with pytest.raises(IntegrityError, match=r"data changed since the run began \(also old\)"):
        resume(tmp_path / "stopped")
    old.write_text(kept)
    resume(tmp_path / "stopped")
    assert run_digests(tmp_path / "stopped") == run_digests(tmp_path / "whole")


def test_further_rows_that_do_not_fit_are_refused_before_work_starts(tmp_path):
    old = little_data(tmp_path / "old.csv", rows=12)

    def refused(error, words, **changes):
        with pytest.raises(error, match=words):
            train(little_spec(tmp_path, **changes))
        assert not (tmp_path / "run").exists()

    refused(ConfigError, "replay needs further rows: --also old=FILE", strategy="replay")
    refused(ConfigError, "mtl_sampling needs further rows: --also NAME=FILE", strategy="mtl_sampling")
    refused(ConfigError, "also old: no strategy of this run reads such rows", also=(f"old={old}",))
    refused(ConfigError, "also fresh: no strategy", strategy="replay", also=(f"old={old}", f"fresh={old}"))
    refused(ConfigError, "name a set and its rows, such as", strategy="replay", also=(str(old),))
    refused(ConfigError, "stand there twice", strategy="replay", also=(f"old={old}", f"old={old}"))
    refused(ConfigError, "are the rows of data.source", strategy="mtl_sampling", also=(f"train={old}",))
    refused(DataError, "no-file", strategy="replay", also=(f"old={tmp_path / 'no-file.csv'}",))
    turns = little_data(tmp_path / "turns.csv", kind="turns")
    refused(DataError, "answer|label", strategy="replay", also=(f"old={turns}",))
