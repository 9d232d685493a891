"""Strategies that move the numbers themselves (mezo, lomo), and numbers of a strategy's own."""

import dataclasses
import json
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from in_memory import Runs, alike, checkpoint, same
from little import little_spec

from luthier.core import CompositionError, ConfigError, key
from luthier.runs import RunFolder
from luthier.runs.spec import BatchSpec, OptimSpec
from luthier.strategies.gradient.lomo import AdaLomo
from luthier.training import STRATEGIES
from luthier.training.seeded_descent import SeededDescent
from luthier.workflow import resume, train
from luthier.workflow.resume_proof import run_digests

torch.set_num_threads(1)
WHOLE = BatchSpec(size=6, tokens=4096)
MeZO = STRATEGIES.get("mezo")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("updates"))


def values(loop):
    return {n: p.detach().clone() for n, p in loop.optimiser.named.items()}


# --- mezo


@pytest.mark.acid("mezo", 1)
def test_mezo_without_a_rate_leaves_the_weights_within_rounding(runs):
    loop = runs.loop("mezo", "full", optim=OptimSpec(lr=1e-30))
    before = values(loop)
    loop.moments.start()
    for step in range(3):
        loop._train_step(step, loop.feed.cut(step))
    drift = max(float((p - before[n]).abs().max()) for n, p in values(loop).items())
    assert 0 <= drift < 1e-6, "three moves of 1e-3 there and back, in fp32"


@pytest.mark.acid("mezo", 2)
def test_mezo_is_replayed_from_its_log_alone(runs):
    loop = runs.loop("mezo", "lora", optim=OptimSpec(lr=1e-2, clip=0.0), steps=5)
    again = runs.loop("mezo", "lora", optim=OptimSpec(lr=1e-2, clip=0.0), steps=5)
    loop.run_to()
    rows = [row for row in loop.run.rows if row["event"] == "step"]
    assert len(rows) == 5
    for row in json.loads(json.dumps(rows)):
        seed = key(loop.spec.seed, "mezo", row["step"], 0)
        for by in (1e-3, -2e-3, 1e-3):  # to either side and back: their rounding is part of the run
            again.optimiser.shift(seed, by)
        again.optimiser.slopes = [(seed, row["mezo.slope"])]
        again.optimiser.step(row["lr"] / again.optimiser.lr)
    assert all(torch.equal(p, values(again)[n]) for n, p in values(loop).items())


@pytest.mark.acid("mezo", 3)
def test_mezos_mean_over_many_directions_points_along_the_gradient(runs):
    def cosine(seeds):
        loop = runs.loop("mezo", "lora", "bert-dry", values={"mezo.seeds": seeds}, batch=WHOLE)
        plain = runs.loop(None, "lora", "bert-dry", batch=WHOLE)
        for one in (loop, plain):
            one.moments.start()
            one.set_mode(training=True)
            one.moments.before_step(0, one.total, 0)
            one._gradients(0, one.feed.cut(0))
        found = {n: torch.zeros_like(p) for n, p in loop.optimiser.named.items()}
        for seed, slope in loop.optimiser.slopes:
            for name, _, z in loop.optimiser.direction(seed):
                found[name] += slope * z / seeds
        true = torch.cat([p.grad.flatten() for p in plain.optimiser.named.values()])
        return float(torch.cosine_similarity(torch.cat([f.flatten() for f in found.values()]), true, dim=0))

    few, many = cosine(4), cosine(200)
    assert 0 < few < many and many > 0.3


@pytest.mark.acid("mezo", 4)
def test_mezo_builds_no_graph_and_holds_one_draw_at_a_time(runs, monkeypatch):
    loop = runs.loop("mezo", "full")
    graphs, inner = [], type(loop)._loss

    def seen(self, *args):
        found = inner(self, *args)
        graphs.append(found.grad_fn)
        return found

    monkeypatch.setattr(type(loop), "_loss", seen)
    there, most, drawn = weakref.WeakValueDictionary(), [], torch.randn

    def draw(*args, **more):
        most.append(len(there))
        made = there[len(most)] = drawn(*args, **more)
        return made

    monkeypatch.setattr("luthier.training.seeded_descent.torch.randn", draw)
    loop.run_to(2)
    assert len(most) > 2 * len(loop.optimiser.named) and max(most) == 0, "a draw is gone before the next one is made"
    assert graphs and not any(graphs)
    assert all(p.grad is None for p in loop.optimiser.named.values())
    assert loop.optimiser.state_bytes() == loop.optimiser.gradient_bytes() == 0


@pytest.mark.acid("mezo", 5)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_by_a_count_of_errors_mezo_learns_what_has_no_gradient(seed):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 4, generator=draw)
    labels = (x @ torch.randn(4, 3, generator=draw)).argmax(-1)
    weight = torch.nn.Parameter(torch.zeros(4, 3))
    course = SimpleNamespace(
        optimiser=SeededDescent({"w": weight}, [], OptimSpec(lr=1.0, clip=0.0), 1.0), trying=False, seed=seed, step=0,
        still=nullcontext, note=lambda *_: None, forward=lambda _: SimpleNamespace(logits=x @ weight, labels=labels),
        tuned=SimpleNamespace(state=SimpleNamespace(constrain=lambda: None)),
    )  # fmt: skip
    one, shares = MeZO(aim="errors", eps=0.3, seeds=4), []
    for course.step in range(60):
        (share,) = one.gradient(course, [SimpleNamespace(n_targets=60)], None)
        assert share.grad_fn is None and weight.grad is None
        course.optimiser.step(1.0)
        course.optimiser.zero_grad()
        shares.append(float((x @ weight).argmax(-1).ne(labels).float().mean()))
    assert shares[-1] < 0.15 and float(labels.bincount().max()) < 0.8 * 60, shares


def test_in_a_run_mezos_slopes_are_of_whole_numbers_of_errors(runs):
    given = {"values": {"mezo.aim": "errors", "mezo.eps": 0.1, "mezo.seeds": 4}, "optim": OptimSpec(lr=0.05)}
    loop = runs.loop("mezo", "lora", steps=6, batch=WHOLE, **given)
    before = values(loop)
    loop.run_to()
    assert any(not torch.equal(p, before[n]) for n, p in values(loop).items())
    slopes = [row["mezo.slope"] for row in loop.run.rows if row["event"] == "step"]
    wrong = [s * 2 * 0.1 * 6 for s in slopes]  # a difference of whole numbers of wrong answers
    assert any(slopes) and all(abs(w - round(w)) < 1e-4 for w in wrong)
    with pytest.raises(CompositionError, match="focal changes the loss, and wrong answers are counted"):
        runs.loop("mezo+focal", "lora", **given)
    with pytest.raises(ConfigError, match="mezo cannot learn the task causal_lm: wrong answers are counted"):
        runs.loop("mezo", "lora", "llama", values={"mezo.aim": "errors"})


def test_mezo_on_disk_resumes_and_the_trial_moves_nothing(runs, tmp_path):
    spec = little_spec(runs.home, "lora", steps=4, strategy="mezo")
    train(dataclasses.replace(spec, out=str(tmp_path / "whole")))
    train(dataclasses.replace(spec, out=str(tmp_path / "stopped")), stop_at=0)
    resume(tmp_path / "stopped")
    assert run_digests(tmp_path / "stopped") == run_digests(tmp_path / "whole")


# --- lomo


@pytest.mark.acid("lomo", 1, 5)
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_lomo_is_descent_to_the_bit_clipped_or_not(clip, runs):
    optim = OptimSpec(lr=0.1, clip=clip)
    loop = runs.after("lomo", "full", batch=WHOLE, optim=optim)
    plain = runs.after(None, "full", batch=WHOLE, optim=dataclasses.replace(optim, name="sgd"))
    assert alike(loop, plain, 1e-7)
    named = runs.after(None, "full", batch=WHOLE, optim=dataclasses.replace(optim, name="lomo"))
    assert checkpoint(loop)[0].keys() == checkpoint(named)[0].keys() and alike(loop, named, 0.0)


def test_adalomo_steps_as_its_equations_say_and_resumes(runs):
    p, q = torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(4))
    matrix, vector = p.detach().clone(), q.detach().clone()
    optimiser = AdaLomo({"p": p, "q": q}, [], OptimSpec(lr=0.1, clip=0.0), 0.1)
    v_row, v_column, v = torch.zeros(3), torch.zeros(4), torch.zeros(4)
    for t in (1, 2, 3):
        slopes = torch.randn(3, 4), torch.randn(4)
        with optimiser.applying(1.0):
            ((p * slopes[0]).sum() + (q * slopes[1]).sum()).backward()
        b = 1 - t**-0.8
        v_row = b * v_row + (1 - b) * (slopes[0] ** 2).mean(1)
        v_column = b * v_column + (1 - b) * (slopes[0] ** 2).mean(0)
        v = b * v + (1 - b) * slopes[1] ** 2
        for x, g, second in (
            (matrix, slopes[0], torch.outer(v_row, v_column) / v_row.mean()), (vector, slopes[1], v),
        ):  # fmt: skip
            u = g / second.sqrt()
            u = u / max(1.0, float((u**2).mean().sqrt()))
            x -= 0.1 * max(1e-3, float((x**2).mean().sqrt())) * u
        assert torch.allclose(p, matrix, atol=1e-5) and torch.allclose(q, vector, atol=1e-5)
        assert p.grad is None and q.grad is None
    assert optimiser.state_bytes() == 4 * (3 + 4 + 4), "sums of rows and columns alone"
    given = {"values": {"lomo.form": "adalomo"}, "batch": WHOLE, "steps": 4}
    assert same(runs.resumed(2, "lomo", "full", **given), runs.after("lomo", "full", **given))


# --- both


@pytest.mark.acid("lomo", 4)
def test_who_moves_the_numbers_is_said_once_and_needs_a_rate(runs, tmp_path):
    def refused(words, strategy="mezo", **changes):
        spec = little_spec(runs.home, changes.pop("method", "lora"), strategy=strategy, out=str(tmp_path / "run"))
        with pytest.raises((ConfigError, CompositionError), match=words):
            train(dataclasses.replace(spec, **changes))
        assert not (tmp_path / "run").exists()

    refused("no AdamW, for which the methods' own rates.*--lr", optim=OptimSpec())
    refused("optim.name is sgd, and strategy mezo moves the numbers itself", optim=OptimSpec(name="sgd", lr=0.1))
    refused("precision fp16 needs all gradients", precision="fp16")
    refused("recheck = 2 needs all gradients.*recheck = 0", recheck=2)
    refused("mezo makes no backward pass: strategy l2_sp fills penalty. Leave it or mezo out", strategy="mezo+l2_sp")
    refused("mezo makes no backward pass: adalora looks at the gradients", method="adalora")
    refused(
        "needs the rows of a step together: batch.accumulate is 2",
        strategy="lomo",
        batch=BatchSpec(size=8, tokens=48, accumulate=2),
    )
    refused("lomo updates inside.*l2_sp fills penalty", strategy="lomo+l2_sp", batch=WHOLE)
    refused("'optimiser'", strategy="mezo+lomo")


# --- numbers of a strategy's own

SCALES = '''"""A strategy of a test.

Paper: none.
"""
from dataclasses import dataclass
import torch
from luthier.training.strategy import STRATEGIES, Strategy

@STRATEGIES.register("scales", family="test", paper="arXiv:0000.00000")
@dataclass(frozen=True, kw_only=True)
class Scales(Strategy):
    def numbers(self, course):
        return {"scale": torch.rand(2)}

    def loss(self, course, piece, forward):
        result = forward()
        result.loss = result.loss * course.numbers["scale"].square().sum()
        return result
'''


def test_numbers_of_its_own_train_last_and_are_no_part_of_the_tuning(runs, tmp_path):
    (tmp_path / "shelf").mkdir()
    (tmp_path / "shelf" / "scales.py").write_text(SCALES)
    STRATEGIES.add_shelf(tmp_path / "shelf")
    try:
        optim = OptimSpec(lr=3e-3, weight_decay=0.1)
        loop = runs.loop("scales", steps=4, optim=optim)
        start = loop.optimiser.named["scales/scale"].detach().clone()
        assert "scales/scale" not in loop.tuned.trained() and not loop.moments._asked[0][1].weights().keys() & {
            "scales/scale"
        }
        assert loop.optimiser._pace("scales/scale", 1.0)[1] == 0.0, "it does not decay"
        loop.run_to()
        assert not torch.equal(loop.optimiser.named["scales/scale"].detach(), start)
        for stop in (0, 2):
            assert same(runs.resumed(stop, "scales", steps=4, optim=optim), loop)
        spec = little_spec(runs.home, "lora", steps=4, strategy="scales+gradual_unfreeze")
        train(dataclasses.replace(spec, out=str(tmp_path / "whole")))
        train(dataclasses.replace(spec, out=str(tmp_path / "stopped")), stop_at=2)
        resume(tmp_path / "stopped")
        assert run_digests(tmp_path / "stopped") == run_digests(tmp_path / "whole")
        assert RunFolder.open(tmp_path / "whole", write=False).tuning.exists()
    finally:
        STRATEGIES.remove_shelf(tmp_path / "shelf")
