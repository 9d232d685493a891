"""What was forecast and what was measured: short runs of many methods, two models, two lengths.

    python benchmarks/plan_grid.py --out /tmp/grid     trains what is not there yet
    python benchmarks/plan_grid.py --out /tmp/grid --write     also writes src/luthier/forecast/pairs.json

Each run is a process of its own. Intervals of `luthier plan` come from these pairs; docs/howto/plan.md says what they
are worth.
"""

import argparse
import json
import multiprocessing
from pathlib import Path

from luthier.core import LuthierError
from luthier.runs.spec import BatchSpec, DataSpec, EvalSpec, OptimSpec, RunSpec

ENCODER = (
    "lora", "dora", "adalora", "vera", "ia3", "bitfit", "head_only", "layernorm_tuning", "sequential_adapter",
    "parallel_adapter", "compacter", "prompt_tuning", "prefix_tuning", "mam", "unipelt", "top_k_layers", "fish_mask",
    "full", "diff_pruning", "lst",
)  # fmt: skip
DECODER = ("lora", "ia3", "sequential_adapter", "prefix_tuning", "layernorm_tuning", "top_k_layers", "full")
PAIRS = Path(__file__).parent.parent / "src" / "luthier" / "forecast" / "pairs.json"


def specs(out: Path) -> list[RunSpec]:
    """The runs of the grid, in an order that leaves no kind to the end."""
    rows, found = out / "rows.csv", []
    if not rows.exists():
        out.mkdir(parents=True, exist_ok=True)
        kinds = ("red", "green", "blue")
        lines = [f"{'word ' * (3 + number % 60)}{number},{kinds[number % 3]}" for number in range(300)]
        rows.write_text("\n".join(["text,label", *lines]) + "\n", encoding="utf-8")
    for model, data, methods, lengths, size in (
        ("sample:smollm2-135m", "sample:chitchat", DECODER, (48, 160), 8),
        ("sample:minilm-l6", str(rows), ENCODER, (16, 64), 64),
    ):
        for method in methods:
            for length in lengths:
                name = f"{model.partition(':')[2]}-{method}-{length}"
                found.append(
                    RunSpec(
                        model=model, data=DataSpec(source=data, accept_refused=1.0), method=method, steps=2,
                        max_length=length, threads=1,
                        batch=BatchSpec(size=size), eval=EvalSpec(rows=16), optim=OptimSpec(), out=str(out / name),
                    )
                )  # fmt: skip
    return sorted(found, key=lambda spec: spec.digest())


def run(spec: RunSpec) -> None:
    """One run; what it refuses is said, and is no pair."""
    from luthier.workflow import train

    try:
        train(spec)
    except LuthierError as error:
        print(f"{spec.out}: {error}", flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--write", action="store_true")
    given = options.parse_args()
    from luthier.forecast import residuals
    from luthier.workflow.forecasts import pairs_of

    for spec in specs(given.out):
        if not (Path(str(spec.out)) / "record.json").exists():
            child = multiprocessing.get_context("fork").Process(target=run, args=(spec,))
            child.start()
            child.join()
    pairs, silent = pairs_of([given.out])
    print(f"{len(pairs)} pairs, {len(silent)} runs say too little", residuals(pairs))
    if given.write:
        PAIRS.write_text(json.dumps([vars(pair) for pair in pairs], indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
