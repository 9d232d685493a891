"""Every moment, by strategies of a test's own: memory lasts, what rests lies still, a penalty counts once."""

import dataclasses

import pytest
import torch
from little import little_spec

from luthier.core import ConfigError
from luthier.runs.spec import BatchSpec
from luthier.training import STRATEGIES
from luthier.workflow import resume, train
from luthier.workflow.resume_proof import run_digests

torch.set_num_threads(1)

HEAD = '''"""A strategy of a test.

Paper: none.
"""
from dataclasses import dataclass
from typing import Annotated
import torch
from luthier.training.strategy import STRATEGIES, Strategy

'''

REMEMBERS = (
    HEAD
    + """
@STRATEGIES.register("remembers", family="test", paper="arXiv:0000.00000")
@dataclass(frozen=True, kw_only=True)
class Remembers(Strategy):
    def start(self, course):
        course.memory.facts["steps"] = 0
        course.memory.tensors.update({n.replace("|", "/"): p.detach().clone() for n, p in course.weights().items()})

    def before_step(self, course):
        course.memory.facts["begun"] = course.step

    def penalty(self, course):
        held = course.memory.tensors
        return 0.1 * sum(((p - held[n.replace("|", "/")]) ** 2).sum() for n, p in course.weights().items())

    def after_step(self, course):
        course.memory.facts["steps"] += 1
        for n, p in course.weights().items():  # an average of the weights: it differs at each step
            course.memory.tensors[n.replace("|", "/")].lerp_(p.detach(), 0.1)
        course.note("steps", course.memory.facts["steps"])

    def loss(self, course, piece, forward):
        result = forward()
        noise = torch.rand((), generator=course.generator("noise"))
        result.loss = result.loss * (1 + 0.1 * float(noise) * course.memory.facts["steps"])
        return result
"""
)

RESTS = (
    HEAD
    + """
@STRATEGIES.register("rests", family="test", paper="arXiv:0000.00000")
@dataclass(frozen=True, kw_only=True)
class Rests(Strategy):
    until: Annotated[int, "steps in which the head alone learns"] = 3

    def trains(self, course):
        return [n for n in course.weights() if course.step > self.until or "head/" in n]
"""
)


@pytest.fixture
def shelf(tmp_path):
    folder = tmp_path / "shelf"
    folder.mkdir()
    (folder / "remembers.py").write_text(REMEMBERS)
    (folder / "rests.py").write_text(RESTS)
    STRATEGIES.add_shelf(folder)
    yield folder
    STRATEGIES.remove_shelf(folder)


@pytest.mark.parametrize("where", [0, 1, 3, 5])
def test_what_a_strategy_remembers_lasts_over_a_stop(where, shelf, tmp_path):
    spec = little_spec(tmp_path, "lora", steps=6, strategy="remembers")
    train(dataclasses.replace(spec, out=str(tmp_path / "whole")))
    train(dataclasses.replace(spec, out=str(tmp_path / "stopped")), stop_at=where)
    resume(tmp_path / "stopped")
    assert run_digests(tmp_path / "stopped") == run_digests(tmp_path / "whole")


def test_a_strategy_that_forgot_would_be_noticed(shelf, tmp_path, monkeypatch):
    from luthier.training.moments import Moments

    spec = little_spec(tmp_path, "lora", steps=6, strategy="remembers")
    train(dataclasses.replace(spec, out=str(tmp_path / "whole")))
    train(dataclasses.replace(spec, out=str(tmp_path / "stopped")), stop_at=3)
    inner = Moments.load

    def careless(self, state, tensors):
        inner(self, state, {})
        for _, course in self._asked:
            course.memory.tensors.update({n: p.detach().clone() for n, p in course.weights().items()})

    monkeypatch.setattr(Moments, "load", careless)
    resume(tmp_path / "stopped")
    assert run_digests(tmp_path / "stopped") != run_digests(tmp_path / "whole")


def test_noted_numbers_stand_in_the_log(shelf, tmp_path):
    from luthier.runs import RunFolder

    train(little_spec(tmp_path, "lora", steps=3, strategy="remembers"))
    rows = [e for e in RunFolder.open(tmp_path / "run", write=False).events() if e["event"] == "step"]
    assert [row["remembers.steps"] for row in rows] == [1, 2, 3]


def test_a_penalty_counts_once_however_a_step_is_cut(shelf, tmp_path):
    found = []
    for tokens in (24, 4096):
        out = tmp_path / f"run-{tokens}"
        spec = little_spec(tmp_path, "ia3", steps=4, strategy="remembers", out=str(out), trunk_dropout="off")
        tuned = train(dataclasses.replace(spec, batch=BatchSpec(size=8, tokens=tokens))).tuned
        found.append({n: p.detach().clone() for n, p in tuned.trained().items()})
    assert all(torch.allclose(found[0][n], found[1][n], atol=1e-5) for n in found[0])


@pytest.mark.parametrize("method", ["lora", "full", "bitfit"])
def test_what_rests_lies_still_and_wakes_again(method, shelf, tmp_path):
    spec = little_spec(tmp_path, method, steps=3, strategy="rests", out=str(tmp_path / "still"))
    still = train(spec).tuned
    awake = train(dataclasses.replace(spec, steps=6, out=str(tmp_path / "awake"))).tuned
    tuning = still.tuning()
    for name, unfrozen in tuning.unfrozen.items():
        same = torch.equal(unfrozen.parameter.detach(), unfrozen.original)
        assert same == (not name.startswith("head/")), name
    moved = [
        n for n, u in awake.tuning().unfrozen.items() if not torch.equal(u.parameter.detach(), u.original)
    ]  # fmt: skip
    assert method == "lora" or any(not n.startswith("head/") for n in moved)
    if method == "lora":
        b = {n: p for n, p in still.trained().items() if n.endswith(".b")}
        assert b and not any(p.any() for p in b.values()), "LoRA's B starts at zero"
        assert any(p.any() for n, p in awake.trained().items() if n.endswith(".b"))


def test_a_run_with_resting_numbers_resumes_to_the_bit(shelf, tmp_path):
    spec = little_spec(tmp_path, "lora", steps=6, strategy="rests+remembers")
    train(dataclasses.replace(spec, out=str(tmp_path / "whole")))
    for stop in (1, 2, 3, 4):
        out = tmp_path / f"stopped-{stop}"
        train(dataclasses.replace(spec, out=str(out)), stop_at=stop)
        resume(out)
        assert run_digests(out) == run_digests(tmp_path / "whole")


def test_nothing_left_to_train_is_refused(shelf, tmp_path):
    with pytest.raises(ConfigError, match="step 1: rests leave nothing to train"):
        train(little_spec(tmp_path, "lora", "llama", steps=4, strategy="rests"))
