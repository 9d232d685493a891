"""Who works at the cells of a ledger: takes one, has it computed in a process of its own, writes down what came out.

Every executor is made of these: threads of `luthier compare`, `luthier worker` on any machine, tasks of Ray.
"""

from __future__ import annotations

import hashlib
import json
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from luthier.comparison import one_run
from luthier.comparison.answers import answers_of
from luthier.core import Interrupted, ResourceError
from luthier.runs.forkserver import Outcome, Template
from luthier.runs.ledger import MOST_ATTEMPTS, Claim, Entry, Ledger

__all__ = ["PRELOADED", "Worker", "template"]

PRELOADED = ("torch", "luthier.workflow", "luthier.methods")
POLL = 0.1
"""Seconds between two looks for a cell, where none was free just now."""
MOST_POLL = 2.0
"""The same where none has been free for long: a look reads a file or two for each cell, of a shared disk perhaps."""
RETRY = (75, 130, 143)
"""Exit codes after which a cell is tried again: nothing was wrong with it."""


def template() -> Template:
    """A process that has loaded the libraries; each cell is a fork of it."""
    return Template(PRELOADED)


class Worker:
    """Takes cells one after another.

    Args:
        ledger: whose cells.
        made: a process to fork from; left out, one is started.
        said: called with the name of a run's folder, and what became of it.
    """

    def __init__(
        self, ledger: Ledger, made: Template | None = None, said: Callable[[str, str], None] = lambda run, state: None
    ) -> None:
        self.ledger, self.said = ledger, said
        self.template = made if made is not None else template()
        self.now: Claim | None = None
        self._warm: list[Any] = []  # models whose code the process to fork from has loaded
        self.stopping = False
        self.awake = threading.Event()
        """Set by whoever has something new, so that it is looked for at once."""
        self.notes: list[str] = []
        """What went wrong and cost time alone."""

    def work(self, wanted: Callable[[], Sequence[Entry]], go_on: Callable[[], bool]) -> int:
        """Work at what is wanted until nothing is and `go_on` says no.

        Returns:
            how many cells it has settled.

        Raises:
            Interrupted: `stop` was called, or a signal has reached the run at work; it can go on from there.
            ResourceError: the disk takes no claims or results.
        """
        count, pause = 0, POLL
        while not self.stopping:
            self.awake.clear()
            claim, entry = self._next(wanted())
            if claim is not None and entry is not None:
                count, pause = count + self.one(claim, entry), POLL
            elif go_on():
                pause = POLL if self.awake.wait(pause) else min(MOST_POLL, 1.5 * pause)
            else:
                break
        return count

    def in_main(self, wanted: Callable[[], Sequence[Entry]], go_on: Callable[[], bool], *, keep: bool = False) -> int:
        """The same for a process that is one worker: the main thread looks after the one that works.

        Args:
            keep: the process that cells are forked from, for the next call.

        Raises:
            Any LuthierError: of `work`; what a signal handler raises, after the run at work has made itself safe.
        """
        found: list[int] = []
        wrong: list[BaseException] = []

        def work() -> None:
            try:
                found.append(self.work(wanted, go_on))
            except BaseException as error:
                wrong.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                thread.join(POLL)
                self.watch()
        except BaseException:
            self.stop()
            thread.join()
            raise
        finally:
            if not keep:
                self.template.close()
        if wrong:
            raise wrong[0]
        return found[0]

    def _next(self, entries: Sequence[Entry]) -> tuple[Claim | None, Entry | None]:
        for entry in entries:
            claim = self.ledger.claim(entry.id, behind=steps_safe(self.ledger.home / entry.run))
            if claim is None:
                continue
            if self.ledger.attempts(entry.id) > MOST_ATTEMPTS:
                self.ledger.fail(claim, _killed(MOST_ATTEMPTS), 5)
                continue
            return claim, entry
        return None, None

    def one(self, claim: Claim, entry: Entry) -> bool:
        """One attempt at one cell; whether it is settled now."""
        self.now = claim
        try:
            outcome = self._outcome(claim, entry)
            return self._settled(claim, entry, outcome)
        finally:
            self.now = None

    def _outcome(self, claim: Claim, entry: Entry) -> Outcome:
        words: dict[str, Any] = {
            "home": str(self.ledger.home), "id": claim.id, "n": claim.n, "lease": self.ledger.lease,
        }  # fmt: skip
        try:
            if entry.spec.get("model") not in self._warm:
                self._warm.append(entry.spec.get("model"))
                wrong = self.template.warm(one_run.__file__, "warm", {"model": entry.spec.get("model")})
                if wrong:  # a run that fails for the same reason says so itself
                    self.notes.append(
                        f"{entry.spec.get('model')}: what its runs share could not be loaded ahead, so each loads it "
                        f"for itself and is slower ({wrong})"
                    )
            return self.template.run(one_run.__file__, "work", words, timeout_s=None)
        except ResourceError:  # the template itself was ended
            if not self.stopping:
                self.template.close()
                self.template, self._warm = template(), []
            return Outcome(-signal.SIGKILL, "")

    def _settled(self, claim: Claim, entry: Entry, outcome: Outcome) -> bool:
        name = Path(entry.run).name
        if outcome.status == 0:
            counts = self.ledger.commit(claim, _result(self.ledger.home / entry.run, outcome))
            self.said(name, "done" if counts else "too late: another process had taken it over, and its answer counts")
            return counts
        if outcome.status in RETRY or self.stopping:
            self.ledger.release(claim)
            if outcome.status == 75 and not self.stopping:
                return False
            raise Interrupted("stopped; what was at work goes on where it is", max(outcome.status - 128, signal.SIGINT))
        if outcome.status < 0:
            self.ledger.ended(claim)
            return False
        message, code = _failure(outcome)
        self.ledger.fail(claim, message, code)
        self.said(name, message)
        return True

    def watch(self) -> None:
        """End a run that has given no sign of life for the length of the lease; its cell is taken again."""
        claim = self.now
        if claim is None:
            return
        if not self.template.at_work:  # it is still loading the libraries, from a slow disk perhaps
            claim.beat()
        elif self.ledger.silent(claim.path):
            self.template.signal(signal.SIGKILL)

    def end(self) -> None:
        """Take no other cell; what is still computed is nobody's any more, and is ended."""
        self.stopping = True
        self.awake.set()
        self.template.signal(signal.SIGKILL)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Take no other cell, and let the run at work make its last step safe."""
        self.stopping = True
        self.awake.set()
        self.template.signal(number)


def steps_safe(run: Path) -> int:
    """Steps of a run that are in a checkpoint."""
    numbers = [int(p.name[5:]) for p in (run / "ckpt").glob("step-*") if p.name[5:].isdecimal()]
    return max(numbers, default=0)


def digest_of(run: Path) -> str:
    """SHA-256 of what was trained, and of what it answers to each row; not of where these rows lie."""
    summed = hashlib.sha256()
    for path in sorted((run / "tuning").glob("*.safetensors")):
        with path.open("rb") as file:
            summed.update(hashlib.file_digest(file, "sha256").digest())
    if (run / "predictions.csv").is_file():
        answers = answers_of(run)
        summed.update(json.dumps([answers.said, answers.sure]).encode())
    return summed.hexdigest()


def _result(run: Path, outcome: Outcome) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(_marked(outcome, one_run.RESULT) or "{}")
    folder = run.with_name(str(facts.pop("run", run.name)))
    return {**facts, "run": f"{folder.parent.name}/{folder.name}", "sha256": digest_of(folder)}


def _failure(outcome: Outcome) -> tuple[str, int]:
    """What the process said last: the message of an error of ours, or the last line of a bug's."""
    told = _marked(outcome, one_run.ERROR)
    if told is not None:
        return str(json.loads(told)), outcome.status
    lines = outcome.output.strip().splitlines() or ["it said nothing"]
    return f"a bug of ours: {lines[-1]}", 1


def _marked(outcome: Outcome, mark: str) -> str | None:
    lines = [line.removeprefix(mark) for line in outcome.output.splitlines() if line.startswith(mark)]
    return lines[-1] if lines else None


def _killed(times: int) -> str:
    return f"its process was ended from outside {times} times, and got no further. Less memory: a smaller --batch."
