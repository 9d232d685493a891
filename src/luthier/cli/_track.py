"""`--track`: trackers that are told of a run, beside what the screen shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.core import UsageError, plain
from luthier.runs.spec import RunSpec

if TYPE_CHECKING:
    from luthier.training import Listener

__all__ = ["Track", "tracked", "tracker_names"]

Track = Annotated[
    list[str] | None,
    typer.Option(
        "--track",
        metavar="NAMES",
        help="Tell trackers too, with commas between: mlflow, tensorboard, trackio, wandb. Their packages are yours.",
    ),
]


def tracker_names(given: Sequence[str] | None, *, one: bool) -> list[str]:
    """The trackers that are asked for.

    Args:
        one: whether it is one run.

    Raises:
        UnknownName: no tracker is called so.
        UsageError: its package is not installed, or there is more than one run to tell of.
    """
    names = [name.strip() for words in given or () for name in words.split(",") if name.strip()]
    if not names:
        return []
    from luthier.report.track import check_trackers

    check_trackers(names)
    if not one:
        raise UsageError(
            "--track: tells of one run, and this is several. Leave it out; `luthier report` shows them all."
        )
    return names


@contextmanager
def tracked(names: Sequence[str], listener: Listener, run: RunSpec | str) -> Iterator[Listener]:
    """The listener, with the trackers beside it where any is asked for.

    Args:
        run: its specification, or the folder of one to go on with.
    """
    if not names:
        yield listener
        return
    from luthier.report.track import Tracked
    from luthier.runs import RunFolder
    from luthier.workflow.run import default_out

    if isinstance(run, RunSpec):
        name, facts = Path(run.out).name if run.out else default_out(run).name, plain(run)
    else:
        name, facts = Path(run).name, RunFolder.open(run, write=False).spec
    told: dict[str, Any] = dict(facts)
    with Tracked(names, listener, name, told) as both:
        yield both
