"""What a run shows of itself in Python: what it says, and a bar, in a terminal or a notebook."""

from __future__ import annotations

from typing import Any

from luthier.training import Listener

__all__ = ["listener_of"]


def listener_of(progress: bool | None) -> Listener:
    """A listener that shows the run, or a silent one.

    Args:
        progress: None for whether somebody looks: a terminal or a notebook.
    """
    if progress is False:
        return Listener()
    from rich.console import Console

    console = Console(stderr=True)
    seen = console.is_terminal or console.is_jupyter
    return _Bar(console) if progress or seen else Listener()


class _Bar(Listener):
    def __init__(self, console: Any) -> None:
        self.console = console
        self.bar: Any = None

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False)

    def start(self, total: int, done: int) -> None:
        from rich.progress import Progress

        self.end()
        self.bar = Progress(console=self.console, transient=True)
        self.bar.start()
        self.task = self.bar.add_task("training", total=total, completed=done)

    def step(self, step: int, row: dict[str, Any], tokens: int, rows: int) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=step, description=f"training: loss {row['loss']:.3f}")

    def scores(self, step: int, scores: dict[str, float]) -> None:
        self.say(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))

    def end(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
