"""That resuming changes nothing, shown on the user's own run; and the digests by which runs are compared."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from luthier.core import ConfigError
from luthier.runs import RunFolder, load_newest
from luthier.runs.spec import RunSpec
from luthier.training.loop import Listener
from luthier.workflow.start import resume, train

__all__ = ["run_digests", "verify_resume"]


def verify_resume(spec: RunSpec, steps: int, folder: Path, *, listener: Listener | None = None) -> dict[str, Any]:
    """Prove on the user's own run that resuming changes nothing: 2 N steps against N and N, digests compared.

    Returns:
        for each file of state its two digests, and `equal`.
    """
    whole = replace(spec, steps=2 * steps, epochs=None, out=str(folder / "whole"))
    halves = replace(whole, out=str(folder / "halves"))
    train(whole, listener=listener)
    train(halves, listener=listener, stop_at=steps)
    resume(folder / "halves", listener=listener)
    digests = {name: run_digests(folder / name) for name in ("whole", "halves")}
    rows = {part: {"whole": digests["whole"][part], "resumed": digests["halves"][part]} for part in digests["whole"]}
    return {"steps": 2 * steps, "parts": rows, "equal": digests["whole"] == digests["halves"]}


def run_digests(path: Path) -> dict[str, str]:
    """sha256 of a run's tuning, of its last state's tensors, and of its log's rows.

    Raises:
        ConfigError: no run, or one without a checkpoint.
        IntegrityError: no checkpoint verifies.
    """
    run = RunFolder.open(path, write=False)
    checkpoint, _ = load_newest(run)
    if checkpoint is None:
        raise ConfigError(f"{path}: this run has no checkpoint yet. Let it go on with `luthier resume {path}`.")
    found = {}
    for stem, tensors in checkpoint.tensors.items():
        summed = hashlib.sha256()
        for name in sorted(tensors):
            summed.update(name.encode())
            summed.update(tensors[name].detach().contiguous().flatten().view(torch.uint8).numpy().data)
        found[stem] = summed.hexdigest()
    weights = run.tuning / "tuning.safetensors"
    found["tuning"] = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.exists() else ""
    rows = [repr(e) for e in run.events() if "at" not in e]
    found["log"] = hashlib.sha256("\n".join(rows).encode()).hexdigest()
    return found
