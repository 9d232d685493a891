"""Twelve short runs as one comparison, against the same twelve as commands of their own.

    python benchmarks/compare_speed.py            both, one after the other; the bar is 0.6

The runs of a comparison are forks of one process that has loaded the libraries. Wall time on a busy machine says
little, so processor seconds of all processes stand beside it. Both end with the same bits, which is checked.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from luthier.comparison.worker import digest_of

BAR = 0.6
METHODS = ("head_only", "bitfit", "ia3", "lora")
SEEDS = 3
WORDS = ["sample:minilm-l6", "--data", "sample:trec6", "--threads", "1", "--eval-rows", "64", "--precision", "fp32"]


def timed(commands: list[list[str]]) -> tuple[float, float]:
    """Seconds on the wall, and of processors in all processes."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    for words in commands:
        done = subprocess.run([sys.executable, "-m", "luthier", *words], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(words)}\n{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - begun, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4)
    steps = ["--steps", str(parser.parse_args().steps)]
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        alone = [
            ["train", *WORDS, *steps, "--method", m, "--seed", str(s), "--out", str(home / f"{m}-{s}")]
            for s in range(SEEDS)
            for m in METHODS
        ]
        race = ["compare", *WORDS, *steps, "--method", ",".join(METHODS), "--seeds", str(SEEDS)]
        apart = timed(alone)
        together = timed([[*race, "--out", str(home / "race")]])
        for cell in (home / "race" / "cells").iterdir():
            method, _, rest = cell.name.partition("-seed")
            same = digest_of(cell) == digest_of(home / f"{method}-{rest[0]}")
            assert same, f"{cell.name} has other bits than the command's run"
    print("| twelve runs | wall | processors |\n| --- | --- | --- |")
    print(f"| `luthier train`, twelve times | {apart[0]:.0f} s | {apart[1]:.0f} s |")
    print(f"| `luthier compare` | {together[0]:.0f} s | {together[1]:.0f} s |")
    wall, used = together[0] / apart[0], together[1] / apart[1]
    print(f"| ratio | {wall:.2f} | {used:.2f} |")
    if min(wall, used) > BAR:
        raise SystemExit(f"missed: more than {BAR}")


if __name__ == "__main__":
    main()
