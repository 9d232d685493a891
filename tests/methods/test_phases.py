"""Phases of a run, and the methods made of them: LP-FT, lottery-ticket sparse fine-tuning, gradual unfreezing."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from little import at_call, little_spec
from methods.checks import logits
from methods.course import Course, equal
from methods.sizes import stored, trained
from tiny import inputs, tiny

from luthier import train as run
from luthier.core import AnatomyError, CompositionError, ConfigError, Interrupted
from luthier.methods.partial.lt_sft import LTSFT
from luthier.runs import RunFolder, load_newest
from luthier.runs.spec import OptimSpec
from luthier.surgery import Phase, Phases, attach, load, method
from luthier.training.loop import Loop
from luthier.training.stop_signals import StopRequested
from luthier.workflow import resume
from luthier.workflow.resume_proof import run_digests


@dataclass
class Cut:
    """A method as far as its phases go."""

    of: tuple[Phase, ...]
    name: str = "cut"

    def __post_init__(self):
        self.entered = []

    def phases(self, tuned):
        return self.of

    def enter(self, tuned, phase):
        self.entered.append(phase)


def cut(*phases):
    made = Cut(phases)
    return made, Phases(None, [made])


# --- phases themselves


def test_a_phase_follows_from_the_step_and_is_entered_once():
    made, phases = cut(Phase(1), Phase(2), Phase(1))
    assert phases.bounds(8) == [2, 6, 8]
    assert [phases.number(s, 8) for s in range(1, 9)] == [0, 0, 1, 1, 1, 1, 2, 2]
    for step in (1, 1, 2, 3, 3, 5, 7):  # a step may be begun again
        phases.enter(step, 8)
    assert made.entered == [0, 1, 2]
    assert phases.number(1, 8) == 2, "a longer run does not lead back into a phase that is over"


def test_a_schedule_begins_anew_with_a_fresh_phase_alone():
    _, phases = cut(Phase(1), Phase(1, fresh=False, rate=0.5), Phase(2, rate=3))
    assert [phases.schedule(s, 8) for s in (1, 4, 5, 8)] == [(1, 4, 1), (4, 4, 0.5), (1, 4, 3), (4, 4, 3)]
    assert Phases(None, []).schedule(3, 8) == (3, 8, 1.0)


def test_a_run_too_short_for_its_phases_is_refused():
    _, phases = cut(Phase(0.9), Phase(0.1))
    phases.check(10)
    with pytest.raises(ConfigError, match="would last 4, 0 steps in a run of 4"):
        phases.check(4)


def test_two_methods_with_phases_do_not_train_together():
    with pytest.raises(CompositionError, match="both cut the run"):
        Phases(None, [Cut((Phase(1),)), Cut((Phase(1),))])


def test_what_is_scored_to_select_by_is_of_the_last_fresh_phase():
    _, phases = cut(Phase(1), Phase(1), Phase(2, fresh=False))
    assert [phases.settled(s, 8) for s in (2, 3, 8)] == [False, True, True]
    assert Phases(None, []).settled(0, 8)


WORDS = ["lp_ft", "lt_sft", "gradual_unfreezing"]


@pytest.mark.acid("gradual_unfreezing", 4)
@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("stop", [3, 6, 7, 10])
def test_a_run_stopped_anywhere_goes_on_to_the_bit(words, stop, runs, tmp_path):
    whole = runs(words)
    spec = little_spec(whole.parent, words, out=str(tmp_path / "run"))
    run(spec, stop_at=stop)
    resume(tmp_path / "run")
    assert run_digests(tmp_path / "run") == run_digests(whole)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made = {}

    def get(words):
        if words not in made:
            home = tmp_path_factory.mktemp(words)
            run(little_spec(home, words))
            made[words] = home / "run"
        return made[words]

    return get


def test_what_a_method_keeps_for_a_later_phase_lasts_over_a_stop(tmp_path):
    spec = little_spec(tmp_path, "lt_sft", settings={"share": 0.3, "rounds": 3})
    run(replace(spec, out=str(tmp_path / "whole")))
    for stop in (5, 6):  # within a full phase that has to go back to where it began, and after it
        run(replace(spec, out=str(tmp_path / f"stopped-{stop}")), stop_at=stop)
        resume(tmp_path / f"stopped-{stop}")
        assert run_digests(tmp_path / f"stopped-{stop}") == run_digests(tmp_path / "whole")


def test_a_stop_within_the_first_step_of_a_phase_enters_it_once(tmp_path, monkeypatch):
    def stopped():
        raise StopRequested(15)

    spec = little_spec(tmp_path, "lt_sft")
    run(replace(spec, out=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        at_call(patch, Loop, "_gradient_norm", 7, stopped)  # step 7 is the first of the second phase
        with pytest.raises(Interrupted):
            run(spec)
    with RunFolder.open(tmp_path / "run") as folder:
        checkpoint, _ = load_newest(folder)
    assert (checkpoint.state["step"], checkpoint.state["phase"]) == (6, 1)
    entered, inner = [], LTSFT.enter
    monkeypatch.setattr(LTSFT, "enter", lambda self, tuned, phase: (entered.append(phase), inner(self, tuned, phase)))
    resume(tmp_path / "run")
    assert not entered
    assert run_digests(tmp_path / "run") == run_digests(tmp_path / "whole")


@pytest.mark.parametrize("words", WORDS)
def test_another_trainer_is_told_that_it_cannot(words):
    tuned = attach(tiny("bert"), words)
    tuned.model(**inputs(tuned.model)).loss.backward()
    with pytest.raises(ConfigError, match="phases"):
        torch.optim.SGD(tuned.trained().values(), lr=0.1).step()


def test_descent_inside_the_backward_pass_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="only some of what trains learn at a time"):
        run(little_spec(tmp_path, "lp_ft", optim=OptimSpec(name="lomo", lr=1e-3)))


# --- lp_ft


def test_lp_ft_counts_everything():
    assert trained("bert-for-two", "lp_ft") == 109_482_240


@pytest.mark.acid("lp_ft", 1, 2)
def test_the_head_goes_on_from_the_probe_and_nothing_else_has_moved_then():
    course = Course("lp_ft", 8)
    start = course.values()
    course.run(4)
    probed = course.values()
    course.begin()
    begun = course.values()
    heads = [n for n in start if n.startswith("head/")]
    assert all(torch.equal(begun[n], probed[n]) and not torch.equal(begun[n], start[n]) for n in heads)
    assert all(torch.equal(begun[n], start[n]) for n in start if n not in heads)
    assert not any(t.any() for t in course.optimiser.first.values())
    assert set(course.optimiser.counts.values()) == {0}


@pytest.mark.acid("lp_ft", 3)
def test_the_second_phase_trains_every_tensor():
    course = Course("lp_ft", 8)
    start = course.values()
    course.run(8)
    still = [n for n, v in course.values().items() if torch.equal(v, start[n]) and "key.bias" not in n]
    assert not [n for n in still if "token_type" not in n]


def test_the_probe_has_a_rate_and_a_schedule_of_its_own(tmp_path):
    run(little_spec(tmp_path, "lp_ft", settings={"probe_rate": 10.0}))
    with RunFolder.open(tmp_path / "run", write=False) as folder:
        rates = [e["lr"] for e in folder.events() if e["event"] == "step"]
    assert len(rates) == 12
    assert [r / 10 for r in rates[:6]] == pytest.approx(rates[6:])
    assert rates[0] > rates[5]


# --- lt_sft


def test_lt_sft_stores_its_share_of_what_is_no_norm():
    below = 109_482_240 - 38_400
    assert trained("bert", "lt_sft") == below
    assert stored("bert", "lt_sft") == 2 * math.floor(0.01 * below)


@pytest.mark.acid("lt_sft", 1, 2)
def test_the_second_phase_begins_at_the_base_bit_for_bit_with_the_entries_that_moved_most():
    course = Course("lt_sft", 8, share=0.05)
    start = course.values()
    course.run(4)
    drift = {n: (v - start[n]).abs() for n, v in course.values().items()}
    course.begin()
    assert equal(course.values(), start)
    unfrozen = course.tuned.tuning().unfrozen
    mask = torch.cat([u.mask.flatten() for k, u in unfrozen.items() if k.startswith("model/")])
    moved = torch.cat([drift[k].flatten() for k in unfrozen if k.startswith("model/")])
    assert int(mask.sum()) == math.floor(0.05 * len(mask))
    assert moved[mask].min() >= moved[~mask].max()
    assert not any("LayerNorm" in k for k in unfrozen)
    size = torch.cat([start[k].abs().flatten() for k in unfrozen if k.startswith("model/")])
    assert bool(size[mask].min() < size[~mask].max())  # not by magnitude


@pytest.mark.acid("lt_sft", 3)
def test_what_it_gives_is_sparse_and_saved_so(tmp_path):
    course = Course("lt_sft", 8, share=0.05, decay=0.1)
    start = course.values()
    course.run(8)
    for key, unfrozen in course.tuned.tuning().unfrozen.items():
        if key.startswith("model/"):
            assert torch.equal(unfrozen.value[~unfrozen.mask], start[key][~unfrozen.mask])
    course.tuned.save(tmp_path / "tuning")
    again = tiny("bert")
    load(again, tmp_path / "tuning")
    assert torch.equal(logits(again), logits(course.tuned.model))


@pytest.mark.acid("lt_sft", 5)
def test_with_rounds_entries_are_added_and_those_of_before_keep_their_values():
    course = Course("lt_sft", 12, share=0.06, rounds=3)
    unfrozen = {k: u for k, u in course.tuned.tuning().unfrozen.items() if k.startswith("model/")}
    masks, ends, begins = [], [], []
    for _ in range(3):
        course.run(2)
        course.begin()
        masks.append(torch.cat([u.mask.flatten() for u in unfrozen.values()]))
        begins.append(torch.cat([u.value.flatten() for u in unfrozen.values()]))
        course.run(2)
        ends.append(torch.cat([u.value.flatten() for u in unfrozen.values()]))
    total = math.floor(0.06 * len(masks[0]))
    assert [int(m.sum()) for m in masks] == [total // 3, total * 2 // 3, total]
    assert not bool((masks[0] & ~masks[1]).any()) and not bool((masks[1] & ~masks[2]).any())
    assert torch.equal(begins[1], ends[0]) and torch.equal(begins[2], ends[1])


def test_the_penalty_is_the_mean_distance_from_the_base():
    tuned = attach(tiny("bert"), "lt_sft", l1=0.5)
    made = tuned.tuning().method
    assert float(made.extra_loss(tuned).detach()) == 0
    with torch.no_grad():
        for n, p in tuned.trained().items():
            if n.startswith("model/"):
                p.add_(0.2)
    assert float(made.extra_loss(tuned).detach()) == pytest.approx(0.1, rel=1e-4)
    assert method("lt_sft", {}).extra_loss(tuned) is None


# --- gradual_unfreezing


@pytest.mark.acid("gradual_unfreezing", 1, 2)
def test_each_group_joins_at_its_step_and_lies_bit_for_bit_still_until_then_under_decay():
    course = Course("gradual_unfreezing", 20, until=0.8, decay=0.1)  # five groups: one more every four steps
    groups = course.tuned.tuning().method._groups(course.tuned)
    assert [len(g) > 0 for g in groups] == [True] * 5
    assert any("layer.2." in n for n in groups[1]) and any("embeddings" in n for n in groups[4])
    start = course.values()
    for awake in range(1, 6):
        course.run(4)
        now = course.values()
        for i, group in enumerate(groups):
            moved = [not torch.equal(now[n], start[n]) for n in group]
            assert any(moved) if i < awake else not any(moved)
    counts = course.optimiser.counts
    assert [max(counts[n] for n in g) for g in groups] == [
        20,
        16,
        12,
        8,
        4,
    ]  # Adam counts from a group's own first step


@pytest.mark.acid("gradual_unfreezing", 3)
def test_rates_of_neighbours_are_apart_by_exactly_the_ratio():
    tuned = attach(tiny("bert"), "gradual_unfreezing", ratio=2.6)
    factors = [g.lr_factor for g in tuned.groups()]
    assert factors[0] == 1.0 and len(factors) == 5
    assert all(above / below == pytest.approx(2.6) for above, below in pairwise(factors))
    assert attach(tiny("bert"), "gradual_unfreezing").groups() == []


# --- wrong inputs


@pytest.mark.parametrize(
    ("words", "settings", "says"),
    [
        ("lp_ft", {"probe": 0.0}, "which is full"),
        ("lp_ft", {"probe": 1.0}, "which is head_only"),
        ("lt_sft", {"share": 0.0}, "keeps none"),
        ("lt_sft", {"share": 1.0}, "Use full"),
        ("lt_sft", {"rounds": 0}, "at least 1"),
        ("gradual_unfreezing", {"until": 0.0}, "use full"),
        ("gradual_unfreezing", {"until": 1.0}, "for the last group"),
    ],
)
def test_settings_that_leave_out_a_phase_are_refused(words, settings, says):
    with pytest.raises(ConfigError, match=says):
        attach(tiny("bert"), words, **settings)


def test_a_model_without_a_head_has_nothing_to_probe_with_and_a_short_run_no_room(tmp_path):
    with pytest.raises(AnatomyError, match="no new task head, and there is nothing to probe"):
        attach(tiny("llama"), "lp_ft")
    with pytest.raises(ConfigError, match="5 phases would last"):
        run(little_spec(tmp_path, "gradual_unfreezing", steps=3))
