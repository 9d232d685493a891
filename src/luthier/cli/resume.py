"""`luthier resume`: go on with a run that was stopped, to the bit where nothing has changed."""

from typing import Annotated

import typer

from luthier.cli._shared_options import AsJson
from luthier.cli._track import Track, tracked, tracker_names
from luthier.core import UsageError
from luthier.core.config import replace_word

__all__ = ["NEEDS_WORDS", "command"]

NEEDS_WORDS = True


def command(
    run: Annotated[str, typer.Argument(help="The run's folder.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Change a field of the run, such as optim.lr=1e-4."),
    ] = None,
    accept_drift: Annotated[
        list[str] | None,
        typer.Option(help="Go on although this has changed: data, model or tokenizer. Recorded in the folder."),
    ] = None,
    track: Track = None,
    as_json: AsJson = False,
) -> None:
    """Go on with a stopped run: from its newest checkpoint that verifies, with the same rows and the same dropout.

    Examples:

      luthier resume runs/x

      luthier resume runs/x --set optim.lr=5e-4 --set epochs=6

      luthier resume runs/x --accept-drift data
    """
    changed = dict(replace_word(word) for word in settings or [])

    from luthier.cli._progress import Watcher, show_result
    from luthier.workflow import resume
    from luthier.workflow.cross_validation import is_cross_validation
    from luthier.workflow.recipes import is_recipe

    names = tracker_names(track, one=not is_cross_validation(run) and not is_recipe(run))
    if is_cross_validation(run):
        if changed or accept_drift:
            raise UsageError(
                f"resume: {run} is a cross-validation, whose folds must be alike: nothing of it can be changed. Leave "
                "--set and --accept-drift out."
            )
        from luthier.cli._cross_validation import train_folds

        train_folds(run, None)
        return

    if is_recipe(run):
        if changed or accept_drift:
            raise UsageError(
                f"resume: {run} is a recipe, whose runs are gone on with as they were. Leave --set and --accept-drift "
                "out."
            )
        from luthier.cli._recipe import follow_recipe

        follow_recipe(run)
        return

    with tracked(names, Watcher(), run) as listener:
        show_result(resume(run, changed=changed, accept_drift=accept_drift or [], listener=listener))
