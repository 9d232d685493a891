"""R4: what a verified durable save costs, against writing the same bytes and an fsync.

    python benchmarks/durable_cost.py [--repeats 21] [--folder DIR]      prints JSON

Three ways of putting the same tensors on the disk, taken in turn within each repeat, so that a slow moment of the disk
hits all three; the ratio is taken within each repeat, and its median is reported.

plain_one     one file holding all bytes: open, write, fsync
plain_files   the same number of files as the checkpoint has: open, write, fsync, each
durable       save_checkpoint: digests, manifest, all fsyncs, one rename, fsync of the folder, finite gate
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from luthier.runs import RunFolder, environment, save_checkpoint


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
    times: dict[str, list[float]] = {"plain_one": [], "plain_files": [], "durable": []}
    with RunFolder.create(place / "run", {}) as run:
        made_once = save_checkpoint(run, 0, tensors, state)
        contents = [path.read_bytes() for path in sorted(made_once.path.iterdir())]
        joined = [b"".join(contents)]
        for repeat in range(1, repeats + 1):
            # Old files go first: removing them must not fall into the time of any of the three.
            for path in [*place.glob("plain-*"), *run.ckpt.iterdir()]:
                shutil.rmtree(path)
            os.sync()
            order = [
                ("plain_one", lambda: plain(place / "plain-one", joined)),
                ("plain_files", lambda: plain(place / "plain-files", contents)),
                ("durable", partial(save_checkpoint, run, repeat, tensors, state)),
            ]
            for name, work in order[repeat % 3 :] + order[: repeat % 3]:
                times[name].append(seconds(work))
    ratios = {}
    for name in ("plain_one", "plain_files"):
        pairs = zip(times["durable"], times[name], strict=True)
        ratios[f"durable_over_{name}"] = round(statistics.median(ours / theirs for ours, theirs in pairs), 3)
    return {
        "bytes": sum(len(content) for content in contents),
        "files": len(contents),
        **{f"{name}_ms": round(1e3 * statistics.median(values), 3) for name, values in times.items()},
        **ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--megabytes", type=float, nargs="*", default=[0.5, 5, 50])
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure; default: the temporary one")
    words = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for megabytes in words.megabytes:
        place = Path(tempfile.mkdtemp(dir=words.folder))
        try:
            rows.append(measure(int(megabytes * 1e6), words.repeats, place))
        finally:
            shutil.rmtree(place)
    found = {"goal": 1.25, "repeats": words.repeats, "sizes": rows, "environment": environment()}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
