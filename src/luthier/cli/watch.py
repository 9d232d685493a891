"""`luthier watch`: runs while they go on."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli._output import Screen, screen
from luthier.cli._shared_options import AsJson
from luthier.core import human_seconds, plain, several
from luthier.trust.text import for_terminal

if TYPE_CHECKING:
    from luthier.report import Progress

__all__ = ["NEEDS_WORDS", "command"]

NEEDS_WORDS = True
HEAD = ("run", "state", "step", "loss", "", "score")


def command(
    folder: Annotated[str, typer.Argument(help="The folder of a run, of a comparison, or of several runs.")],
    every: Annotated[float, typer.Option(help="Seconds between two looks. [default: 1]", min=0.1)] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and end, in a terminal too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Follow a run or a comparison that another process works at, until nobody does. Nothing in the folder is changed.

    Where the output is no terminal, one look is printed.

    Examples:

      luthier watch runs/x

      luthier watch runs/compare-minilm-l6-trec6

      luthier watch runs --once
    """
    from luthier.report import Follower

    to = screen()
    follower = Follower(folder)
    seen: Sequence[Progress] = follower.look()
    if to.lively and to.for_eyes and not once:
        seen = _live(to, follower, seen, every)
    to.result({"folder": folder, "runs": [_facts(one) for one in seen], "ended": follower.ended(seen)})
    if not seen:
        to.show(f"{folder}: no run has begun here")
        return
    to.table(HEAD, [_cells(one) for one in seen], right=("step", "loss"))
    to.show(f"\n{_summary(seen)}")
    for one in seen:
        if one.why:
            to.show(f"{one.run}: {one.why}")


def _live(to: Screen, follower: Any, seen: "Sequence[Progress]", every: float) -> "Sequence[Progress]":
    """Draw what moves until nothing does; Ctrl-C ends the drawing, and nothing else."""
    from rich.live import Live

    with to.drawing() as console, Live(console=console, transient=True, auto_refresh=False) as live:
        try:
            while True:
                live.update(_drawn(seen), refresh=True)
                if seen and follower.ended(seen):
                    break
                time.sleep(every)
                seen = follower.look()
        except KeyboardInterrupt:
            pass
    return seen


def _drawn(seen: "Sequence[Progress]") -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for name in HEAD:
        table.add_column(name, justify="right" if name in ("step", "loss") else "left", overflow="fold")
    going = sorted(seen, key=lambda one: not one.going_on)[:30]  # more than a terminal's height would not move
    for one in going:
        table.add_row(*(Text(for_terminal(cell), style="bold" if one.going_on else "") for cell in _cells(one)))
    return Group(table, Text(f"{_summary(seen)} · Ctrl-C stops looking, not the runs"))


def _cells(one: "Progress") -> tuple[str, ...]:
    from luthier.report import spark

    step = f"{one.step}/{one.total}" if one.total else str(one.step)
    state = one.state if one.left is None else f"{one.state}, {human_seconds(one.left)} left"
    score = next((f"{name} {value:.3f}" for name, value in one.scores.items() if name != "loss"), "")
    return one.run, state, step, "" if one.loss is None else f"{one.loss:.3f}", spark(one.curve), score


def _summary(seen: "Sequence[Progress]") -> str:
    states: dict[str, int] = {}
    for one in seen:
        states[one.state] = states.get(one.state, 0) + 1
    return f"{several(len(seen), 'run')}: {', '.join(f'{n} {state}' for state, n in states.items())}"


def _facts(one: "Progress") -> dict[str, Any]:
    return {name: value for name, value in plain(one).items() if name != "curve"}
