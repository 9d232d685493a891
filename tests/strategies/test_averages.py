"""The average that is scored and kept."""

import dataclasses
import json

import torch
from in_memory import Runs
from little import little_spec

from luthier.runs import RunFolder, load_step
from luthier.runs.spec import EvalSpec, OptimSpec
from luthier.workflow import train


def test_the_average_is_that_of_the_formula_and_is_what_is_kept(tmp_path):
    loop = Runs(tmp_path).loop("ema", values={"ema.decay": 0.3}, steps=4)
    seen = []
    inner = loop.moments.after_step

    def after_step(step, total):
        inner(step, total)
        seen.append({n: p.detach().clone() for n, p in loop.tuned.trained().items()})

    loop.moments.after_step = after_step
    start = {n: p.detach().clone() for n, p in loop.tuned.trained().items()}
    loop.run_to()
    wanted = start
    for t, weights in enumerate(seen, 1):
        d = min(0.3, (1 + t) / (10 + t))
        wanted = {n: d * wanted[n] + (1 - d) * w for n, w in weights.items()}
    last = {n: p.detach().clone() for n, p in loop.tuned.trained().items()}
    with loop.moments.keeping():
        assert all(torch.allclose(p, wanted[n], atol=1e-6) for n, p in loop.tuned.trained().items())
    assert all(torch.equal(p, last[n]) for n, p in loop.tuned.trained().items()), "training goes on where it was"
    loop.moments.finish()
    assert all(torch.allclose(p, wanted[n], atol=1e-6) for n, p in loop.tuned.trained().items())


def test_the_best_evaluation_is_of_the_average_that_is_kept(tmp_path):
    spec = little_spec(tmp_path, steps=4, strategy="ema", eval=EvalSpec(every=2, best=True, metric="loss"))
    spec = dataclasses.replace(spec, optim=OptimSpec(lr=0.3, schedule="constant"))  # it gets worse again
    result = train(dataclasses.replace(spec, settings={**spec.settings, "ema.decay": 0.8}))
    rows = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    scored = [row for row in rows if row["event"] == "scores"][:2]  # the third is of the test half
    scores = {row["step"]: row["loss"] for row in scored}
    taken = next(row["step"] for row in rows if row["event"] == "best_taken")
    assert taken == min(scores, key=scores.get) < 4
    with RunFolder.open(tmp_path / "run", write=False) as run:
        held = load_step(run, taken).tensors["strategies"]
    assert held
    for name, parameter in result.tuned.trained().items():
        assert torch.equal(parameter.detach(), torch.as_tensor(held[f"ema|{name}"])), name
