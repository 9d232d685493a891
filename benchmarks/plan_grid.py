"""What was forecast and what was measured: short runs of every method, two models, two lengths, two batch sizes.

    python benchmarks/plan_grid.py --out /tmp/grid --minutes 30     trains what is not there yet, for half an hour
    python benchmarks/plan_grid.py --out /tmp/grid --minutes 0 --write memory     writes pairs of bytes, trains nothing
    python benchmarks/plan_grid.py --out /tmp/grid --minutes 0 --probe --write all     those of seconds too
    python benchmarks/plan_grid.py --page     writes the tables of docs from these files, trains nothing

Each run is `luthier train` in a process of its own, one after another. A method runs in as many of the four shapes
(length x rows at once) of its model as `--shapes` says, beginning with another one than the method before it; the first
two have different lengths. On a machine of several cores, `--part 1/2` and `--part 2/2` with folders of their own run
beside each other, a core for each: seconds are then those of a machine whose cores all do such work. Begun again, the
command goes on: a finished run stands, and what a method refused is kept beside the runs and not tried again. Bytes may
be measured beside other work; seconds may not, so `--write memory` leaves their file alone. What is written takes the
place of the same runs' pairs and leaves all others.
Intervals of `luthier plan` come from these pairs; docs/howto/plan.md says what they are worth.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from luthier.forecast import (
    Interval,
    Pair,
    TimePair,
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
from luthier.samples.data import load_sample
from luthier.surgery import METHODS
from luthier.surgery.compose import spelling

FIRST_ENCODER = (
    "lora", "dora", "adalora", "vera", "ia3", "bitfit", "head_only", "layernorm_tuning", "sequential_adapter",
    "parallel_adapter", "compacter", "prompt_tuning", "prefix_tuning", "mam", "unipelt", "top_k_layers", "fish_mask",
    "full", "diff_pruning", "lst",
)  # fmt: skip
FIRST_DECODER = ("lora", "ia3", "sequential_adapter", "prefix_tuning", "layernorm_tuning", "top_k_layers", "full")
PAIRS = Path(__file__).parent.parent / "src" / "luthier" / "forecast" / "pairs.json"
TIMES = PAIRS.parent / "time_pairs.json"
ENCODER_SHAPES = ((16, 64, 10), (64, 16, 10), (16, 16, 20), (64, 64, 6))  # length, rows, steps; lengths take turns
DECODER_SHAPES = ((48, 8, 6), (160, 8, 4), (48, 2, 8), (160, 2, 6))  # a second of steps, or rates are not measured
PAGE = Path(__file__).parent.parent / "docs" / "howto" / "plan.md"
RESIDUALS = PAGE.parent.parent / "plan-residuals.md"
RESIDUALS_HEAD = """# Forecast and measured memory, run by run

Written by `python benchmarks/plan_grid.py --page` from the pairs that come with the package;
[plan a run](howto/plan.md) says how they were made. Bytes in MB: `counted` is the program as the run saw it, the
counted parts and the forecast of activations; `forecast` the interval from runs of other methods, without this one;
`off` measured against its middle.

"""
BEGIN, END = "<!-- begin plan_grid -->\n", "<!-- end plan_grid -->\n"
WRONG_USE = (2, 3)  # exit codes of a run that the same words will never make
COUNTED = ("weights", "trained", "gradients", "optimiser")

T = TypeVar("T")


def methods_of(first: tuple[str, ...]) -> list[str]:
    """All methods, those first that the grid began with."""
    names = [*first, *(name for name in METHODS.ours() if name not in first)]
    return [spelling(name) for name in names]


def specs(out: Path, shapes: int = 2, part: tuple[int, int] = (1, 1)) -> list[RunSpec]:
    """The runs of the grid; the first shape of every method comes before any second one.

    Args:
        part: the first of so many equal parts is (1, parts).
    """
    rows, found = out / "rows.csv", []
    if not rows.exists():
        out.mkdir(parents=True, exist_ok=True)
        kinds = ("red", "green", "blue")
        lines = [f"{'word ' * (3 + number % 60)}{number},{kinds[number % 3]}" for number in range(300)]
        rows.write_text("\n".join(["text,label", *lines]) + "\n", encoding="utf-8")
    talk = out / "talk.jsonl"
    if not talk.exists():  # few rows: some methods look at all of them first
        told = load_sample("chitchat").train[:120]
        talk.write_text("".join(json.dumps(row) + "\n" for row in told), encoding="utf-8")
    for turn in range(shapes):
        for model, data, methods, its in (
            ("sample:minilm-l6", str(rows), methods_of(FIRST_ENCODER), ENCODER_SHAPES),
            ("sample:smollm2-135m", str(talk), methods_of(FIRST_DECODER), DECODER_SHAPES),
        ):
            for i, method in enumerate(methods):
                length, size, steps = its[(i + turn) % len(its)]
                found.append(
                    RunSpec(
                        model=model, data=DataSpec(source=data, accept_refused=1.0), method=method, steps=steps,
                        max_length=length, threads=1, batch=BatchSpec(size=size), eval=EvalSpec(rows=16),
                        out=str(out / f"{model.partition(':')[2]}-{method}-{length}x{size}"),
                    )
                )  # fmt: skip
    return of_part(found, part)


def part_of(text: str) -> tuple[int, int]:
    """I/N as two numbers."""
    number, _, of = text.partition("/")
    if not (number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of)):
        raise argparse.ArgumentTypeError(f"{text}: give it as I/N, the first half is 1/2")
    return int(number), int(of)


def of_part(rows: list[T], part: tuple[int, int]) -> list[T]:
    """Every so many-eth: the first of so many equal parts is (1, parts)."""
    return rows[part[0] - 1 :: part[1]]


def run(spec: RunSpec) -> None:
    """One run, started as a user starts it; what it refuses is said, kept, and no pair."""
    home = Path(str(spec.out))
    refused = home.with_suffix(".refused")
    if (home / "record.json").exists() or refused.exists():
        return
    asked = home.with_suffix(".toml")
    asked.write_text(spec.to_toml(), encoding="utf-8")
    if home.exists():  # begun, and ended from outside
        shutil.rmtree(home)
    words = [sys.executable, "-m", "luthier.cli", "train", str(asked), "--out", str(home)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    why = (done.stderr.strip().splitlines() or [""])[-1][:300]
    if done.returncode in WRONG_USE:
        refused.write_text(f"{why}\n", encoding="utf-8")
    shutil.rmtree(home / "ckpt", ignore_errors=True)  # pairs need no weights, and those of hundreds of runs fill a disk
    for weights in home.rglob("*.safetensors"):
        weights.unlink()
    print(f"{home.name}{f': exit code {done.returncode}, {why}' if done.returncode else ''}", flush=True)


def run_for(seconds: float, wanted: Iterable[RunSpec]) -> int:
    """Make runs that are not there yet until so much time is over; returns how many are left."""
    ends, left = time.monotonic() + seconds, 0
    for spec in wanted:
        home = Path(str(spec.out))
        if (home / "record.json").exists() or home.with_suffix(".refused").exists():
            continue
        if time.monotonic() < ends:
            run(spec)
        else:
            left += 1
    return left


def merged(path: Path, pairs: Iterable[Pair | TimePair]) -> None:
    """Write pairs to a file, in place of those of the same runs; all others stay."""

    def key(values: dict[str, object]) -> tuple[str, ...]:
        return tuple(str(values.get(name, "")) for name in ("model", "method", "device", "rows", "tokens", "how"))

    known = {key(values): values for values in json.loads(path.read_text(encoding="utf-8"))}
    new = [vars(pair) for pair in pairs]
    if path == TIMES:  # their shapes are not kept: one run of a method gives way to all its new ones
        again = {key(values) for values in new}
        kept = [values for values in json.loads(path.read_text(encoding="utf-8")) if key(values) not in again]
        path.write_text(json.dumps([*kept, *new], indent=0) + "\n", encoding="utf-8")
        return
    known |= {key(values): values for values in new}
    path.write_text(json.dumps([known[k] for k in sorted(known)], indent=0) + "\n", encoding="utf-8")


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


def judged() -> list[tuple[Pair, Interval | None]]:
    """The committed pairs, each with its interval from the runs of other methods."""
    pairs = sorted(committed(), key=lambda p: (p.model, p.method, p.tokens, p.rows))
    return list(zip(pairs, leave_out(pairs), strict=True))


def table() -> str:
    """What the committed pairs say, by model and family."""
    known = judged()
    pairs = [pair for pair, _ in known]
    groups: dict[tuple[str, str], list[tuple[Pair, Interval]]] = {}
    for pair, made in known:
        if made is not None:
            groups.setdefault((pair.model, pair.family), []).append((pair, made))
    lines = ["| model | family | runs | off, in the middle | inside | above | furthest off |", "| --- " * 7 + "|"]
    for (model, family), own in sorted(groups.items()):
        errors = sorted(_off(pair, made) for pair, made in own)
        furthest, last = max(own, key=lambda one: abs(_off(*one))), len(own) // 2
        lines.append(
            f"| {model.partition(':')[2]} | {family} | {len(own)} | {errors[last]:+.1%} | "
            f"{sum(made.low <= pair.measured <= made.high for pair, made in own)} | "
            f"{sum(pair.measured > made.high for pair, made in own)} | {furthest[0].method} {_off(*furthest):+.0%} |"
        )
    found, constant = residuals(pairs), constant_of(pairs)
    said = f"{len(pairs)} runs; constant {constant / 1e6:.0f} MB."
    if found is not None:
        said += (
            f" Of {found.n} with an interval the median error is {found.median_error:.1%}, {found.covered:.0%} lie "
            f"inside, {found.above:.0%} above."
        )
    return "\n".join([said, *_of_new_models(pairs), "", *lines, ""])


def residual_table() -> str:
    """Every committed pair: docs/plan-residuals.md."""
    lines = ["| model | method | rows x tokens | counted | forecast | measured | off |", "| --- " * 7 + "|"]
    for pair, made in judged():
        ends = f"{made.low / 1e6:.0f} to {made.high / 1e6:.0f}" if made else "assumed"
        off = f"{_off(pair, made):+.1%}" if made else "-"
        lines.append(
            f"| {pair.model.partition(':')[2]} | {pair.method} | {pair.rows} x {pair.tokens} | "
            f"{pair.forecast / 1e6:.0f} | {ends} | {pair.measured / 1e6:.0f} | {off} |"
        )
    return RESIDUALS_HEAD + "\n".join(lines) + "\n"


def _off(pair: Pair, made: Interval) -> float:
    return pair.measured / made.likely - 1


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
    options.add_argument("--shapes", type=int, default=2, choices=range(5))
    options.add_argument("--part", type=part_of, default=(1, 1), metavar="I/N", help="the I-th of N parts of the runs")
    options.add_argument("--minutes", type=float, default=1e9, help="begin no run after so long; the next call goes on")
    options.add_argument("--probe", action="store_true", help="also make real steps of every run, for --write all")
    options.add_argument(
        "--write", choices=("memory", "all"), help="all: seconds too, of a machine that did nothing else"
    )
    given = options.parse_args()
    if given.page:
        PAGE.write_text(paged(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        RESIDUALS.write_text(residual_table(), encoding="utf-8")
        return
    if given.out is None:
        options.error("--out is missing: the folder of the runs")
    from luthier.workflow.forecasts import pairs_of

    left = run_for(60 * given.minutes, specs(given.out, given.shapes, given.part))
    print(f"{left} runs are left" if left else "all runs are there")
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
        merged(PAIRS, pairs)
    if given.write == "all":
        merged(TIMES, times)


if __name__ == "__main__":
    main()
