"""`luthier evaluate`: a finished run against labelled rows."""

from typing import Annotated

import typer

from luthier.cli._output import screen
from luthier.cli._shared_options import AsJson

__all__ = ["NEEDS_WORDS", "command"]

NEEDS_WORDS = True
SHOWN = 5


def command(
    run: Annotated[str, typer.Argument(help="The folder of a finished run.")],
    data: Annotated[str, typer.Option(help="Rows with the columns of the training rows, the label too.")],
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Go on without all rows that cannot be used, however many.")
    ] = False,
    out: Annotated[str | None, typer.Option(help="Write each row's answer to this .csv file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Score a finished run on rows that say what is right, as its held-out rows were scored.

    Examples:

      luthier evaluate runs/x --data december.csv

      luthier evaluate runs/x --data december.csv --out answers.csv
    """
    from luthier.cli._quality import show_quality
    from luthier.core import plain
    from luthier.training.evaluate import plain_scores
    from luthier.workflow import evaluate

    found = evaluate(run, data, skip_bad=skip_bad, out=out)
    scores = plain_scores(found.scores)
    screen().result({**plain(found), "run": run, "data": data, "scores": scores, "out": out})
    if found.quality is not None:
        show_quality(screen(), found.quality, rows="rows", answers=out or "--out FILE.csv shows them", more="--json")
    screen().headline("\n" + " · ".join(f"{name} {value:.4g}" for name, value in found.scores.items()))
    screen().show(f"{found.rows} rows of {data}{_left_out(found.left_out)}")


def _left_out(places: tuple[tuple[str, str], ...]) -> str:
    if not places:
        return ""
    shown = "; ".join(f"{place}: {why}" for place, why in places[:SHOWN])
    more = f"; and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
    return f"; {len(places)} could not be used: {shown}{more}"
