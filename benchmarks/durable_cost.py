"""R4: what a verified durable save costs, against writing the same bytes and an fsync.

    python benchmarks/durable_cost.py                         figures into docs/reliability.md
    python benchmarks/durable_cost.py --megabytes 5 --json    other sizes, another --folder or --repeats: printed only

Three ways of putting the same tensors on the disk, taken in turn within each repeat, so that a slow moment of the disk
hits all three; the ratio is taken within each repeat, and its median is reported.

plain_one     one file holding all bytes: open, write, fsync
plain_files   the same number of files as the checkpoint has: open, write, fsync, each
durable       save_checkpoint: digests, manifest, all fsyncs, one rename, fsync of the folder, finite gate
digest        SHA-256 of the same bytes in one thread, nothing written: what the digests alone cost
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import _marks
import torch

from luthier.core import human_bytes
from luthier.runs import RunFolder, environment, save_checkpoint

GOAL = 1.25  # times the same files written plainly and fsynced, at the largest size
MEGABYTES = (0.2, 1, 5, 50, 200)
REPEATS = 21


def plain(folder: Path, contents: list[bytes]) -> None:
    folder.mkdir()
    for number, content in enumerate(contents):
        fd = os.open(folder / str(number), os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            view = memoryview(content)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(n_bytes: int, repeats: int, place: Path) -> dict[str, object]:
    """Medians for a checkpoint of `n_bytes`: a third weights, two thirds moments, in eight tensors each."""
    n = n_bytes // 4 // 3 // 8
    made = torch.Generator().manual_seed(0)
    tensors = {
        "adapter": {f"w{i}": torch.randn(n, generator=made) for i in range(8)},
        "optimizer": {f"{m}{i}": torch.randn(n, generator=made) for i in range(8) for m in "mv"},
    }
    state = {"step": 0, "cursor": 12345, "schedule": {"lr": 2e-4}}
    times: dict[str, list[float]] = {"plain_one": [], "plain_files": [], "durable": [], "digest": []}
    with RunFolder.create(place / "run", {}) as run:
        made_once = save_checkpoint(run, 0, tensors, state)
        contents = [path.read_bytes() for path in sorted(made_once.path.iterdir())]
        joined = [b"".join(contents)]
        for repeat in range(1, repeats + 1):
            # Old files go first: removing them must not fall into the time of any of the three.
            for path in [*place.glob("plain-*"), *run.ckpt.iterdir()]:
                shutil.rmtree(path)
            os.sync()
            order: list[tuple[str, Callable[[], object]]] = [
                ("plain_one", lambda: plain(place / "plain-one", joined)),
                ("plain_files", lambda: plain(place / "plain-files", contents)),
                ("durable", partial(save_checkpoint, run, repeat, tensors, state)),
            ]
            for name, work in order[repeat % 3 :] + order[: repeat % 3]:
                times[name].append(seconds(work))
            times["digest"].append(seconds(lambda: hashlib.sha256(joined[0]).digest()))
    found: dict[str, object] = {"bytes": len(joined[0]), "files": len(contents)}
    for name, values in times.items():
        found[f"{name}_ms"] = round(1e3 * statistics.median(values), 2)
    for name in ("plain_one", "plain_files"):
        ratios = sorted(ours / theirs for ours, theirs in zip(times["durable"], times[name], strict=True))
        low, middle, high = statistics.quantiles(ratios, n=4)
        found[f"durable_over_{name}"] = {"median": round(middle, 2), "quartiles": [round(low, 2), round(high, 2)]}
    return found


def as_table(rows: list[dict[str, Any]], repeats: int) -> list[str]:
    """For the page."""
    lines = [
        "| bytes | four files, written plainly, fsynced | one such file | verified durable save | SHA-256 alone |"
        " save / four files (quartiles) | save / one file |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        files, one = row["durable_over_plain_files"], row["durable_over_plain_one"]
        lines.append(
            f"| {human_bytes(row['bytes'])} | {row['plain_files_ms']} ms | {row['plain_one_ms']} ms"
            f" | {row['durable_ms']} ms | {row['digest_ms']} ms"
            f" | {files['median']} ({files['quartiles'][0]} to {files['quartiles'][1]}) | {one['median']} |"
        )
    cores = len(os.sched_getaffinity(0))
    return [*lines, "", f"{cores} cores, medians of {repeats} repeats; `python benchmarks/durable_cost.py`."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--megabytes", type=float, nargs="*")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the temporary one")
    parser.add_argument("--json", action="store_true", help="print JSON and leave the page as it is")
    words = parser.parse_args()
    torch.set_num_threads(1)
    repeats, rows = words.repeats or REPEATS, []
    for megabytes in words.megabytes or MEGABYTES:
        place = Path(tempfile.mkdtemp(dir=words.folder))
        try:
            rows.append(measure(int(megabytes * 1e6), repeats, place))
        finally:
            shutil.rmtree(place)
    if words.json:
        print(json.dumps({"goal": GOAL, "repeats": repeats, "sizes": rows, "environment": environment()}, indent=1))
        return
    lines = as_table(rows, repeats)
    print("\n".join(lines))
    if not (words.repeats or words.megabytes or words.folder):
        _marks.write_block("durable_cost", lines)


if __name__ == "__main__":
    main()
