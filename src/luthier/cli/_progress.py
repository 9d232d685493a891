"""How a run shows itself: a bar on a terminal, a line now and then elsewhere, and its end as a table."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from luthier.cli._next import kept_rows, predict_command, short
from luthier.cli._output import Screen, screen
from luthier.cli._quality import show_quality
from luthier.core import human_bytes, human_count, human_seconds, plain
from luthier.training import Listener

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from luthier.workflow import Result

__all__ = ["Watcher", "facts_of", "show_result"]

EVERY_SECONDS = 10.0


class Watcher(Listener):
    """Draws a run on the screen it is given. Standard output is never touched."""

    def __init__(self, onto: Screen | None = None, title: str = "training", brief: bool = False) -> None:
        self.screen = onto or screen()
        self.title = title
        self.brief = brief  # facts about data and model were said before
        self.total = 0
        self._moving = ExitStack()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._begun = self._said = 0.0
        self._rows = self._tokens = self._first = 0

    def busy(self, what: str) -> None:
        """Show that something goes on, until the next step or the end."""
        self._moving.close()
        self._moving.enter_context(self.screen.busy(f"{self.title}: {what}"))

    def close(self) -> None:
        """Take away whatever moves."""
        self._moving.close()
        self._bar = self._task = None

    def say(self, line: str) -> None:
        if not self.brief:
            self.screen.say(line)

    def start(self, total: int, done: int) -> None:
        self.total, self._first = total, done
        self._begun = self._said = time.monotonic()
        self._rows = self._tokens = 0
        self.close()
        if self.screen.lively:
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=16), TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[numbers]}"), TimeRemainingColumn(compact=True),
                console=self._moving.enter_context(self.screen.drawing()), transient=True,
            )  # fmt: skip
            self._moving.enter_context(self._bar)
            self._task = self._bar.add_task(self.title, total=total, completed=done, numbers="")

    def step(self, step: int, row: dict[str, Any], tokens: int, rows: int) -> None:
        self._rows += rows
        self._tokens += tokens
        now = time.monotonic()
        numbers = f"loss {row['loss']:.3f} · {self._rows / max(now - self._begun, 1e-9):.0f} rows/s"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
        elif now - self._said >= EVERY_SECONDS or step == self.total:
            self._said = now
            left = (now - self._begun) / (step - self._first) * (self.total - step)
            numbers += f" · {self._tokens / max(now - self._begun, 1e-9):.0f} tokens/s · {human_seconds(left)} left"
            self.screen.say(f"{self.title}: step {step}/{self.total} · {numbers}")

    def scores(self, step: int, scores: dict[str, float]) -> None:
        self.screen.say(f"{self.title}: step {step}: " + " · ".join(f"{k} {v:.4g}" for k, v in scores.items()))

    def end(self) -> None:
        self.close()
        if self.brief:
            self.busy("scoring the held-out rows")


def facts_of(result: Result) -> dict[str, Any]:
    """A finished (or paused) run as plain values for --json."""
    trained = result.tuned.n_trained(head=True)
    return {
        "path": str(result.path),
        "status": result.record.status,
        "method": result.record.spec["method"],
        "scores": dict(result.scores),
        "trained": trained,
        "trained_without_head": result.n_params,
        "n_params": result.n_base,
        "share": trained / result.n_base,
        "seconds": result.seconds,
        "peak_bytes": result.peak_bytes,
        "memory": dict(result.memory),
        "stored_bytes": result.stored_bytes,
        "bit_exact": result.record.bit_exact,
        "because": list(result.record.because),
        "quality": None if result.quality is None else plain(result.quality),
    }


def show_result(result: Result) -> None:
    """The end of a run: what came out, what it cost, what to try next."""
    to = screen()
    facts = facts_of(result)
    to.result(facts)
    if result.quality is not None:
        show_quality(to, result.quality)
    if facts["scores"]:
        to.headline("\n" + " · ".join(f"{name} {value:.4g}" for name, value in facts["scores"].items()))
    rows = [
        ("trained", f"{human_count(facts['trained'])} of {human_count(facts['n_params'])} numbers "
                    f"({facts['share']:.2%})"),
        ("training", human_seconds(facts["seconds"])),
        ("peak memory", _memory_line(facts["memory"], facts["peak_bytes"])),
        ("on disk", human_bytes(facts["stored_bytes"])),
        ("folder", facts["path"]),
    ]  # fmt: skip
    to.table(("", ""), rows)
    if result.quality is None or result.quality.is_result:
        to.show(f"\nNext: {predict_command(result.path)}")
    else:
        to.show(f"\nNext: the rows that were answered wrongly stand in {short(facts['path'])}/predictions.csv")
    if said := kept_rows(result.path):
        to.show(said)
    if result.record.status == "finished":
        to.show(f"Report: luthier report {short(facts['path'])}")


def _memory_line(memory: dict[str, int], peak: int | None) -> str:
    """The peak, and its largest parts; docs/memory.md says what each part is."""
    if not peak:
        return "not measured"
    largest = sorted(((n, part) for part, n in memory.items() if n > 0.02 * peak), reverse=True)[:3]
    parts = ", ".join(f"{part} {human_bytes(n)}" for n, part in largest)
    return f"{human_bytes(peak)} ({parts})" if parts else human_bytes(peak)
