"""What was forecast and what was measured: short runs of many methods, two models, two lengths, two batch sizes.

    python benchmarks/plan_grid.py --out /tmp/grid     trains what is not there yet
    python benchmarks/plan_grid.py --out /tmp/grid --probe --write     also writes the pairs of src/luthier/forecast
    python benchmarks/plan_grid.py --page     writes the table of docs/howto/plan.md from that file, and trains nothing

Each run is `luthier train` in a process of its own, one after another. A method runs in as many of the four shapes
(length x rows at once) of its model as `--shapes` says, beginning with another one than the method before it.
Intervals of `luthier plan` come from these pairs; docs/howto/plan.md says what they are worth.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from luthier.forecast import (
    Pair,
    committed,
    committed_times,
    constant_of,
    interval,
    leave_out,
    residuals,
    residuals_of_times,
)
from luthier.runs import Record
from luthier.runs.spec import BatchSpec, DataSpec, EvalSpec, RunSpec

ENCODER = (
    "lora", "dora", "adalora", "vera", "ia3", "bitfit", "head_only", "layernorm_tuning", "sequential_adapter",
    "parallel_adapter", "compacter", "prompt_tuning", "prefix_tuning", "mam", "unipelt", "top_k_layers", "fish_mask",
    "full", "diff_pruning", "lst",
)  # fmt: skip
DECODER = ("lora", "ia3", "sequential_adapter", "prefix_tuning", "layernorm_tuning", "top_k_layers", "full")
PAIRS = Path(__file__).parent.parent / "src" / "luthier" / "forecast" / "pairs.json"
TIMES = PAIRS.parent / "time_pairs.json"
ENCODER_SHAPES = ((16, 64), (64, 64), (64, 16), (16, 16))
DECODER_SHAPES = ((48, 8), (160, 8), (160, 2), (48, 2))
PAGE = Path(__file__).parent.parent / "docs" / "howto" / "plan.md"
BEGIN, END = "<!-- begin plan_grid -->\n", "<!-- end plan_grid -->\n"
COUNTED = ("weights", "trained", "gradients", "optimiser")


def specs(out: Path, shapes: int = 1) -> list[RunSpec]:
    """The runs of the grid; the first shape of every method comes before any second one."""
    rows, found = out / "rows.csv", []
    if not rows.exists():
        out.mkdir(parents=True, exist_ok=True)
        kinds = ("red", "green", "blue")
        lines = [f"{'word ' * (3 + number % 60)}{number},{kinds[number % 3]}" for number in range(300)]
        rows.write_text("\n".join(["text,label", *lines]) + "\n", encoding="utf-8")
    for turn in range(shapes):
        for model, data, methods, its in (
            ("sample:minilm-l6", str(rows), ENCODER, ENCODER_SHAPES),
            ("sample:smollm2-135m", "sample:chitchat", DECODER, DECODER_SHAPES),
        ):
            for i, method in enumerate(methods):
                length, size = its[(i + turn) % len(its)]
                found.append(
                    RunSpec(
                        model=model, data=DataSpec(source=data, accept_refused=1.0), method=method, steps=6,
                        max_length=length, threads=1, batch=BatchSpec(size=size), eval=EvalSpec(rows=16),
                        out=str(out / f"{model.partition(':')[2]}-{method}-{length}x{size}"),
                    )
                )  # fmt: skip
    return found


def run(spec: RunSpec) -> None:
    """One run, started as a user starts it; what it refuses is said, and is no pair."""
    home = Path(str(spec.out))
    if (home / "record.json").exists():
        return
    asked = home.with_suffix(".toml")
    asked.write_text(spec.to_toml(), encoding="utf-8")
    words = [sys.executable, "-m", "luthier.cli", "train", str(asked), "--out", str(home)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    said = "" if done.returncode == 0 else f": exit code {done.returncode}, {done.stderr.strip()[-300:]}"
    print(f"{home.name}{said}", flush=True)


def not_counted(out: Path) -> list[str]:
    """The parts of finished runs that were not held to the byte as they were counted before."""
    wrong = []
    for path in sorted(out.glob("*/record.json")):
        record = Record.from_json(path.read_bytes())
        for part in COUNTED:
            said, held = record.forecast.get(part), record.memory.get(part)
            if said != held:
                wrong.append(f"{path.parent.name}: {part} counted {said}, held {held}")
    return wrong


def table() -> str:
    """What the committed pairs say, each run forecast from the runs of other methods."""
    pairs = sorted(committed(), key=lambda p: (p.model, p.method, p.tokens, p.rows))
    lines = ["| model | method | rows x tokens | counted | forecast | measured | off |", "| --- " * 7 + "|"]
    for pair, made in zip(pairs, leave_out(pairs), strict=True):
        ends = f"{made.low / 1e6:.0f} to {made.high / 1e6:.0f}" if made else "assumed"
        off = f"{pair.measured / made.likely - 1:+.1%}" if made else "-"
        lines.append(
            f"| {pair.model.partition(':')[2]} | {pair.method} | {pair.rows} x {pair.tokens} | "
            f"{pair.forecast / 1e6:.0f} | {ends} | {pair.measured / 1e6:.0f} | {off} |"
        )
    found, constant = residuals(pairs), constant_of(pairs)
    said = f"{len(pairs)} runs; constant {constant / 1e6:.0f} MB."
    if found is not None:
        said += (
            f" Of {found.n} with an interval the median error is {found.median_error:.1%}, {found.covered:.0%} lie "
            f"inside, {found.above:.0%} above."
        )
    return "\n".join([said, *_of_new_models(pairs), "", *lines, ""])


def _of_new_models(pairs: list[Pair]) -> list[str]:
    """For every model that the runs of the others say enough of: what those were worth."""
    found = []
    for model in sorted({p.model for p in pairs}):
        others = [p for p in pairs if p.model != model]
        judged = [(p, interval(p.forecast, p.device, p.family, others, 0, 0)) for p in pairs if p.model == model]
        judged = [(p, made) for p, made in judged if made.n]
        if judged:
            errors = sorted(abs(p.measured / made.likely - 1) for p, made in judged)
            found.append(
                f"With {model.partition(':')[2]} left out whole, {len(judged)} of its runs get an interval from the "
                f"others: median error {errors[len(errors) // 2]:.1%}, "
                f"{sum(made.low <= p.measured <= made.high for p, made in judged)} inside, "
                f"{sum(p.measured > made.high for p, made in judged)} above."
            )
    return found


def time_table() -> str:
    """What the committed pairs of seconds say, each run forecast from the runs of other methods."""
    said = {"counted": "a step, over measured rates", "probed": "a step, from real steps", "loading": "loading"}
    lines = [
        "| seconds of | runs | measured / forecast: least, middle, most | median error | inside | above |",
        "| --- " * 6 + "|",
    ]
    for how, words in said.items():
        own = [pair for pair in committed_times() if pair.how == how]
        off = sorted(pair.measured / pair.forecast for pair in own)
        found = residuals_of_times(own)
        spread = f"{off[0]:.2f}, {off[len(off) // 2]:.2f}, {off[-1]:.2f}" if off else "-"
        judged = [f"{v:.0%}" for v in (found.median_error, found.covered, found.above)] if found else ["-"] * 3
        lines.append(f"| {words} | {len(own)} | {spread} | {' | '.join(judged)} |")
    return "\n".join(lines)


def paged(text: str) -> str:
    """The page with the table as it is now."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{time_table()}\n\n{END}{rest.partition(END)[2]}"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path)
    options.add_argument("--page", action="store_true")
    options.add_argument("--shapes", type=int, default=1, choices=range(5))
    options.add_argument("--probe", action="store_true", help="also make real steps of every run, for --write")
    options.add_argument("--write", action="store_true")
    given = options.parse_args()
    if given.page:
        PAGE.write_text(paged(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        return
    if given.out is None:
        options.error("--out is missing: the folder of the runs")
    from luthier.workflow.forecasts import pairs_of

    for spec in specs(given.out, given.shapes):
        run(spec)
    for line in not_counted(given.out):
        print(line)
    pairs, times, silent = pairs_of([given.out], real_steps=given.probe)
    for path, why in silent.items():
        print(f"{path.name}: {why}")
    print(f"{len(pairs)} pairs", residuals(pairs))
    for how in ("counted", "probed", "loading"):
        own = [pair for pair in times if pair.how == how]
        print(f"{how}: {len(own)} pairs of seconds", residuals_of_times(own))
    if given.write:
        PAIRS.write_text(json.dumps([vars(pair) for pair in pairs], indent=0) + "\n", encoding="utf-8")
        TIMES.write_text(json.dumps([vars(pair) for pair in times], indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
