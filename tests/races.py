"""Little comparisons, whose runs are made in this process."""

from collections.abc import Callable, Sequence
from pathlib import Path

from little import little_data, little_model

from luthier.comparison.worker import digest_of
from luthier.runs.ledger import Entry, Ledger
from luthier.runs.spec import BatchSpec, DataSpec, RunSpec
from luthier.training import Listener
from luthier.workflow.run import Rung, run_to_end

__all__ = ["Here", "base_in", "here"]


def base_in(folder: Path) -> RunSpec:
    return RunSpec(
        model=str(little_model(folder / "bert", "bert")), data=DataSpec(source=str(little_data(folder / "rows.csv"))),
        steps=1, batch=BatchSpec(size=8), precision="fp32", threads=1,
    )  # fmt: skip


class Here:
    """An engine that computes the cells one after another in this process, as soon as they are wanted."""

    def __init__(self, ledger: Ledger, done: list[str], fail: str) -> None:
        self.ledger, self.done, self.fail = ledger, done, fail

    def begin(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            claim = self.ledger.claim(entry.id)
            assert claim is not None
            if entry.spec["method"] == self.fail:
                self.ledger.fail(claim, "it may not", 3)
                continue
            folder = self.ledger.home / entry.run
            spec = RunSpec.from_plain({**entry.spec, "out": str(folder)})
            made = run_to_end(spec, Listener(), Rung(entry.until) if entry.until < 1 else None)
            assert made is not None
            facts = {"scores": made.scores, "run": entry.run, "sha256": digest_of(folder), "status": made.record.status}
            self.ledger.commit(claim, {**facts, "seconds": made.seconds, "stored": made.stored_bytes})
            self.done.append(folder.name)

    def check(self) -> Sequence[str]:
        return ()

    def stop(self) -> None:
        pass

    def close(self) -> None:
        pass


def here(done: list[str], fail: str = "") -> Callable[[str, Ledger, int], Here]:
    """In place of processes: the cells one after another in this one."""
    return lambda name, ledger, workers: Here(ledger, done, fail)
