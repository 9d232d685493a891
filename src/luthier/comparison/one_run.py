"""One cell of a comparison, in a process of its own, which renews its lease; what came of it is its last line."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from luthier.core import Interrupted, Locked, LuthierError
from luthier.runs.ledger import Claim, Ledger
from luthier.runs.parent import end_with_the_parent
from luthier.runs.spec import RunSpec

__all__ = ["ERROR", "RESULT", "warm", "work"]

ERROR = "luthier-error "
RESULT = "luthier-result "
WAIT_FOR_LOCK = 20.0
"""Seconds that an earlier attempt, which is just making its last step safe, is waited for."""


def work(home: str, id: str, n: int, lease: float) -> None:
    """Train the run of a cell, or go on with it; an error's message is the last line printed.

    Args:
        home, id, n, lease: the ledger's folder, the cell, the number of the claim, and its seconds.
    """
    end_with_the_parent()
    import torch

    ledger = Ledger(home, lease=lease)
    entry, claim = ledger.entry(id), Claim(id, n, ledger.path / "claims" / f"{id}.{n}")
    folder = Path(home).absolute() / entry.run
    if Path(entry.cwd).is_dir():  # elsewhere, names are meant where the worker was started
        os.chdir(entry.cwd)
    torch.set_num_threads(entry.threads or os.cpu_count() or 1)
    try:
        with beating(claim, lease / 6):
            spec = RunSpec.from_plain({**entry.spec, "out": str(folder)}, where=f"cell {id[:16]}")
            facts = _trained(spec, n, entry.until)
        print(RESULT + json.dumps(facts), flush=True)
    except LuthierError as error:
        print(ERROR + json.dumps(str(error)), flush=True)
        raise
    except KeyboardInterrupt:
        print(ERROR + json.dumps("interrupted"), flush=True)
        raise Interrupted("interrupted", signal.SIGINT) from None


def warm(model: str) -> None:
    """What every cell of a model would import for itself, and most of a short run's time: the code of its class.

    Nothing is computed: a process that forks has no threads.
    """
    import torch
    import transformers

    from luthier.workflow.load_model import find_model, load_config, load_tokenizer, quiet

    with suppress(ImportError):
        import sklearn.feature_extraction.text
        import sklearn.linear_model  # noqa: F401
    source = find_model(model)
    load_tokenizer(source)
    with quiet(), torch.device("meta"):
        transformers.AutoModel.from_config(load_config(source))


def _trained(spec: RunSpec, n: int, until: float) -> dict[str, object]:
    """Run to the end of the cell; in a folder beside its own where a process without its lease still holds that."""
    from luthier.runs import Record
    from luthier.training.listener import Listener
    from luthier.workflow.run import Rung, run_to_end

    stop, deadline = Rung(until) if until < 1 else None, time.monotonic() + WAIT_FOR_LOCK
    while True:
        try:
            made = run_to_end(spec, Listener(), stop)
            break
        except Locked:
            if time.monotonic() > deadline:
                spec, deadline = replace(spec, out=f"{spec.out}~{n}"), time.monotonic() + WAIT_FOR_LOCK
            else:
                time.sleep(0.2)
    folder = Path(str(spec.out))
    record = made.record if made is not None else Record.from_json((folder / "record.json").read_bytes())
    return {
        "run": folder.name, "status": record.status, "scores": record.scores, "seconds": record.seconds,
        "peak_bytes": record.peak_bytes, "trained": record.trained, "stored": record.stored,
    }  # fmt: skip


@contextmanager
def beating(claim: Claim, every: float) -> Iterator[None]:
    """Renew a lease while the block runs. A process that is stopped or hangs as a whole does not."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(every):
            claim.beat()

    claim.beat()
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
