"""Runs in children that are killed."""

import json
import os
import threading
from pathlib import Path
from typing import Any

from luthier.runs import RunFolder
from luthier.runs.spec import RunSpec
from luthier.training import Listener
from luthier.workflow import resume, train
from luthier.workflow.recipes import is_recipe
from luthier.workflow.resume_proof import run_digests

__all__ = [
    "HERE",
    "PRELOAD",
    "as_json",
    "begin_or_resume",
    "digests",
    "kinds_of_events",
    "steps_done",
]

HERE = Path(__file__)
PRELOAD = (
    "torch",
    "safetensors.torch",
    "transformers",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "luthier.training",
    "luthier.samples",
    "luthier.methods",
)


class _Stopper(Listener):
    """Sends a signal to this process `delay` seconds after the `steps`-th step of this attempt (0: from now on)."""

    def __init__(self, number: int, steps: int, delay: float) -> None:
        self.number, self.steps, self.delay, self.made = number, steps, delay, 0
        if steps == 0:
            self._start()

    def step(self, step: int, row: dict[str, Any], tokens: int, rows: int) -> None:
        self.made += 1
        if self.made == self.steps:
            self._start()

    def _start(self) -> None:
        timer = threading.Timer(self.delay, os.kill, (os.getpid(), self.number))
        timer.daemon = True
        timer.start()


def begin_or_resume(spec: str, number: int = 0, steps: int = 0, delay: float = 0.0) -> None:
    """In a child: begin the run, or go on with it; exits with 143 where a signal stopped it.

    Args:
        spec: a RunSpec as JSON.
        number: a signal to send to this process; 0, none.
        steps, delay: when: so many seconds after so many steps of this attempt.
    """
    listener = _Stopper(number, steps, delay) if number else Listener()
    wanted = RunSpec.from_plain(json.loads(spec))
    out = Path(str(wanted.out))
    if (out / "run.json").exists() or is_recipe(out):
        resume(out, listener=listener)
    else:
        train(wanted, listener=listener)


def digests(out: Path) -> dict[str, str]:
    """sha256 of adapter, optimiser, saved tuning and log rows."""
    return run_digests(out)


def steps_done(out: Path) -> int:
    """The last step in the log."""
    if not (out / "run.json").exists():
        return 0
    steps = [e["step"] for e in RunFolder.open(out, write=False).events() if e["event"] == "step"]
    return max(steps, default=0)


def kinds_of_events(out: Path) -> dict[str, int]:
    """How often each kind of fact stands in the log."""
    found: dict[str, int] = {}
    for event in RunFolder.open(out, write=False).events():
        found[event["event"]] = found.get(event["event"], 0) + 1
    return found


def as_json(spec: RunSpec) -> str:
    """For `begin_or_resume`."""
    from luthier.core import plain

    values: dict[str, Any] = plain(spec)
    return json.dumps(values)
