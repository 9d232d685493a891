"""`luthier evaluate`: a finished run against labelled rows, or under tasks of lm-evaluation-harness."""

from typing import Annotated

import typer

from luthier.cli._output import screen
from luthier.cli._shared_options import AsJson, Delimiter, Encoding
from luthier.core import UsageError

__all__ = ["NEEDS_WORDS", "command"]

NEEDS_WORDS = True
SHOWN = 5


def command(
    run: Annotated[str, typer.Argument(help="The folder of a finished run.")],
    data: Annotated[str | None, typer.Option(help="Rows with the columns of the training rows, the label too.")] = None,
    delimiter: Delimiter = None,
    encoding: Encoding = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Go on without all rows that cannot be used, however many.")
    ] = False,
    out: Annotated[str | None, typer.Option(help="Write each row's answer to this .csv file.")] = None,
    harness: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK", help="A task of lm-evaluation-harness, or a .yaml file of one; may be given several times."
        ),
    ] = None,
    harness_limit: Annotated[int | None, typer.Option(min=1, help="Rows of each task, at most.")] = None,
    harness_shots: Annotated[
        int | None, typer.Option(min=0, help="Solved examples before each question; left out, as the task says.")
    ] = None,
    harness_chat: Annotated[
        bool, typer.Option("--harness-chat", help="Put each question into the run's chat template.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Score a finished run on rows that say what is right, as its held-out rows were scored.

    Examples:

      luthier evaluate runs/x --data december.csv

      luthier evaluate runs/x --data december.csv --out answers.csv

      luthier evaluate runs/x --harness arc_easy --harness-limit 100
    """
    if bool(harness) == (data is not None):
        raise UsageError(
            "evaluate: give --data with a file of rows, or --harness with a task, one of the two. luthier evaluate "
            "--help says more."
        )
    _refuse_idle(
        bool(harness), delimiter=delimiter is not None, encoding=encoding is not None, skip_bad=skip_bad,
        out=out is not None, harness_limit=harness_limit is not None,
        harness_shots=harness_shots is not None, harness_chat=harness_chat,
    )  # fmt: skip
    if harness:
        _by_harness(run, harness, harness_limit, harness_shots, harness_chat)
        return
    assert data is not None
    from luthier.cli._quality import show_quality
    from luthier.core import plain
    from luthier.training.evaluate import plain_scores
    from luthier.workflow import evaluate

    found = evaluate(run, data, delimiter=delimiter, encoding=encoding, skip_bad=skip_bad, out=out)
    for note in found.notes:
        screen().say(note)
    scores = plain_scores(found.scores)
    screen().result({**plain(found), "run": run, "data": data, "scores": scores, "out": out})
    if found.quality is not None:
        show_quality(screen(), found.quality, rows="rows", answers=out or "--out FILE.csv shows them", more="--json")
    screen().headline("\n" + " · ".join(f"{name} {value:.4g}" for name, value in found.scores.items()))
    screen().show(f"{found.rows} rows of {data}{_left_out(found.left_out)}")


def _refuse_idle(asked: bool, **given: bool) -> None:
    """Refuse options that would say nothing: those of tasks beside rows, and those of rows beside tasks."""
    for name, is_given in given.items():
        if is_given and name.startswith("harness_") != asked:
            word = f"--{name.replace('_', '-')}"
            of = "rows, by --data" if asked else "a task, by --harness"
            raise UsageError(f"evaluate: {word} is said of {of}, and there is none here. Leave it out.")


def _by_harness(run: str, tasks: list[str], limit: int | None, shots: int | None, chat: bool) -> None:
    from luthier.workflow.harness import harness

    with screen().busy("asking"):
        found = harness(run, tasks, limit=limit, shots=shots, chat=chat)
    screen().result({"run": run, "scores": found.scores, "rows": found.rows, "harness": found.harness})
    rows = [
        (task, str(found.rows.get(task, "")), name, f"{value:.4g}")
        for task, scores in found.scores.items()
        for name, value in scores.items()
    ]
    screen().table(("task", "rows", "score", "value"), rows, right=("rows", "value"))
    screen().show(f"lm-evaluation-harness {found.harness}")


def _left_out(places: tuple[tuple[str, str], ...]) -> str:
    if not places:
        return ""
    shown = "; ".join(f"{place}: {why}" for place, why in places[:SHOWN])
    more = f"; and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
    return f"; {len(places)} could not be used: {shown}{more}"
