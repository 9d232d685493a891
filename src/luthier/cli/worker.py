"""`luthier worker`: compute runs of a comparison that another command began, on this machine or another."""

import time
from typing import Annotated

import typer

from luthier.cli._output import screen
from luthier.cli._shared_options import AsJson
from luthier.core import Interrupted, several

__all__ = ["NEEDS_WORDS", "command"]

NEEDS_WORDS = True


def command(
    ledger: Annotated[str, typer.Option(help="Folder of the comparison: the --out of `luthier compare`.")],
    wait: Annotated[
        float, typer.Option(help="Seconds to wait for more, once nothing is left to do. [default: 60]", min=0)
    ] = 60.0,
    lease: Annotated[
        float,
        typer.Option(help="Seconds without a sign of life after which a run is taken over. [default: 60]", min=1),
    ] = 60.0,
    as_json: AsJson = False,
) -> None:
    """Work at the runs of a comparison beside whoever else does: for Slurm, Kubernetes, SkyPilot, or a second terminal.

    All workers see the same folder. It may be started before, beside or after `luthier compare --workers 0`, and killed
    at any time: what was at work is taken over by another. It reads specifications as data, and nothing else.

    Examples:

      luthier worker --ledger runs/compare-minilm-l6-trec6

      srun luthier worker --ledger /shared/race --wait 600
    """
    from luthier.comparison.cells import stopped_softly
    from luthier.comparison.worker import Worker
    from luthier.runs.ledger import Ledger

    to, found = screen(), Ledger(ledger, lease=lease)
    last = [time.monotonic()]

    def go_on() -> bool:
        if any(found.state(entry.id) == "running" for entry in found.entries()):
            last[0] = time.monotonic()  # others' work may come back to us
        return time.monotonic() - last[0] < wait

    def said(run: str, state: str) -> None:
        last[0] = time.monotonic()
        while worker.notes:
            to.say(worker.notes.pop(0))
        to.say(f"{run}: {state}")

    worker = Worker(found, said=said)
    with stopped_softly():
        try:
            count = worker.in_main(found.entries, go_on)
        except (KeyboardInterrupt, Interrupted) as stopped:
            number = stopped.exit_code - 128 if isinstance(stopped, Interrupted) else 2
            raise Interrupted(
                "stopped; the run at work has made its last step safe, and others may take it", number
            ) from None
    to.result({"ledger": ledger, "settled": count})
    to.show(f"{several(count, 'run')} made; nothing is left to do in {ledger}")
