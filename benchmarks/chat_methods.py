"""What each method makes of a chat model in a few steps: perplexity of held-out turns before and after, and whether
what ships is what was trained.

    python benchmarks/chat_methods.py runs/chat --methods lora,dora,ia3,prefix_tuning,sequential_adapter,bitfit

Each line is a run: `luthier train sample:smollm2-135m --data sample:chitchat --method METHOD --steps 60`, its held-out
rows scored with the tuning and without, and `luthier certify`. A run that is there already is read, not made again.
With `--batch 4 --max-length 64` a step is a fortieth of the usual one, for a machine with little time. bitfit finds no
bias in this model, and needs `--methods bitfit --set add_missing_biases=true`.
"""

import argparse
import math
from collections import Counter
from pathlib import Path

import torch

from luthier import DataSpec, RunSpec, train
from luthier.core.config import replace_word
from luthier.runs.spec import BatchSpec, EvalSpec
from luthier.training.evaluate import Evaluator
from luthier.workflow import Predictor, certify, prepare
from luthier.workflow.evaluate_run import evaluator_of


def spec_of(method: str, given: argparse.Namespace) -> RunSpec:
    """The run of one method."""
    return RunSpec(
        model="sample:smollm2-135m", data=DataSpec(source="sample:chitchat", accept_refused=0.3),
        method=method, settings=dict(replace_word(word) for word in given.set), steps=given.steps,
        batch=BatchSpec(size=given.batch), max_length=given.max_length, eval=EvalSpec(rows=given.eval_rows),
        out=str(given.home / method),
    )  # fmt: skip


def perplexities(path: Path) -> tuple[float, float]:
    """Of the run's held-out turns, by the base and by the tuned model."""
    predictor = Predictor(path)
    held = prepare(predictor.spec, begun=True).test
    assert held is not None
    scorer: Evaluator = evaluator_of(predictor, held)
    with torch.no_grad():
        after = scorer.outputs()["loss"]
        with predictor.tuned.base_only():
            before = scorer.outputs()["loss"]
    return math.exp(before), math.exp(after)


def main() -> None:
    told = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    told.add_argument("home", type=Path)
    told.add_argument("--methods", default="lora,dora,ia3,prefix_tuning,sequential_adapter,bitfit")
    told.add_argument("--steps", type=int, default=60)
    told.add_argument("--eval-rows", type=int, default=64)
    told.add_argument("--batch", type=int, default=16)
    told.add_argument("--max-length", type=int, default=None)
    told.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    given = told.parse_args()
    print("| method | perplexity before | after | change | certificate |")
    print("|---|---|---|---|---|")
    for method in given.methods.split(","):
        path = given.home / method
        if not (path / "tuning").exists():
            train(spec_of(method, given))
        before, after = perplexities(path)
        steps = certify(path).steps
        counts = Counter(step.status for step in steps)
        said = ", ".join(f"{counts[status]} {status}" for status in ("passed", "failed", "not done") if counts[status])
        print(f"| {method} | {before:.2f} | {after:.2f} | {after / before - 1:+.1%} | {said} |", flush=True)


if __name__ == "__main__":
    main()
