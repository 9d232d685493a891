"""A sweep of 24 short cells with a random worker killed every few seconds, on both executors, and an undisturbed one.

    python benchmarks/killed_sweep.py                       local and ray, a kill every 20 seconds
    python benchmarks/killed_sweep.py --every 5 --engine local

Killed are the process of a run, the process that it was forked from, a process of Ray, or the driver itself, which is
then called again with the same words. The clock runs while a run is at work: else a machine so busy that the libraries
take longer to load than the time between two kills would never compute anything. The tables are compared byte for byte.
"""

import argparse
import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

METHODS = ("head_only", "bitfit", "ia3", "lora:rank=2", "lora:rank=4", "layernorm_tuning", "vera", "hadamard_adapter")
SEEDS = 3
ROWS = 60
"""So few, and so few steps of the smallest model, that a run ends between two kills on a busy machine too."""


def rows(path: Path) -> Path:
    draw = random.Random(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        for i in range(ROWS):
            label = ("good", "bad", "odd")[i % 3]
            writer.writerow((" ".join([*draw.choices(("how", "far", "is", "the", "moon", "sun"), k=6), label]), label))
    return path


def command(data: Path, home: Path, engine: str, steps: int) -> list[str]:
    return [
        sys.executable, "-m", "luthier", "compare", "sample:minilm-l3", "--data", str(data), "--method",
        ",".join(METHODS), "--seeds", str(SEEDS), "--steps", str(steps), "--batch", "8", "--threads", "1",
        "--precision", "fp32", "--workers", "2", "--engine", engine, "--out", str(home),
    ]  # fmt: skip


def forks(driver: psutil.Process) -> list[psutil.Process]:
    """The processes to fork from, and the runs that were: those whose parent is one too."""
    return [p for p in driver.children(recursive=True) if "luthier.runs.forkserver" in " ".join(p.cmdline())]


def at_work(driver: psutil.Process) -> bool:
    """Whether a run is being computed."""
    there = forks(driver)
    return bool({p.pid for p in there} & {p.ppid() for p in there})


def struck(driver: psutil.Process, draw: random.Random) -> str:
    """Kill one process of the sweep; what it was."""
    tasks = [p for p in driver.children(recursive=True) if p.name().startswith("ray::")]
    kind, chosen = draw.choice(
        [("driver", driver), *(("worker", p) for p in forks(driver)), *(("process of ray", p) for p in tasks)]
    )
    chosen.send_signal(signal.SIGKILL)
    return kind


def disturbed(words: list[str], every: float, draw: random.Random) -> dict[str, int]:
    kills: dict[str, int] = {}
    while True:
        with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as driver:
            mine, worked, before = psutil.Process(driver.pid), 0.0, time.monotonic()
            while driver.poll() is None:
                time.sleep(0.2)
                now = time.monotonic()
                try:
                    worked += (now - before) * at_work(mine)
                    if worked >= every:
                        kind = struck(mine, draw)
                        kills[kind], worked = kills.get(kind, 0) + 1, 0.0
                except (psutil.NoSuchProcess, psutil.ZombieProcess):
                    pass  # it has just ended
                before = now
            assert driver.stderr is not None
            said = driver.stderr.read().decode()
        if driver.returncode == 0:
            return kills
        if driver.returncode != -signal.SIGKILL:
            raise SystemExit(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between two kills")
    parser.add_argument("--engine", choices=("local", "ray"), action="append")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        data = rows(home / "rows.csv")
        subprocess.run(command(data, home / "whole", "local", given.steps), check=True, capture_output=True)
        whole = (home / "whole" / "table.csv").read_bytes()
        print(f"undisturbed: {len(whole.splitlines()) - 1} cells")
        for engine in given.engine or ("local", "ray"):
            out = home / engine
            kills = disturbed(command(data, out, engine, given.steps), given.every, random.Random(given.seed))
            results = len(list((out / "ledger" / "results").glob("*.json")))
            late = len(list((out / "ledger" / "discarded").glob("*.json")))
            attempts = len(list((out / "ledger" / "claims").iterdir()))
            same = (out / "table.csv").read_bytes() == whole
            print(
                f"{engine}: {sum(kills.values())} kills ({', '.join(f'{n} of a {k}' for k, n in kills.items())}), "
                f"{attempts} attempts at {results} cells, {late} late answers; "
                f"the same table: {'yes' if same else 'NO'}"
            )
            if not same:
                raise SystemExit(1)


if __name__ == "__main__":
    main()
