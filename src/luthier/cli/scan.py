"""`luthier scan`: what a folder or file from outside holds, by structure; nothing of it is run."""

from typing import Annotated

import typer

from luthier.cli._output import screen
from luthier.cli._shared_options import AsJson
from luthier.core import Refused

__all__ = ["NEEDS_WORDS", "command"]

NEEDS_WORDS = True


def command(
    path: Annotated[str, typer.Argument(help="A folder or a file.")],
    as_json: AsJson = False,
) -> None:
    """Check every file of a model or tuning from elsewhere: headers, configurations, templates; pickle is refused.

    A clean scan means that we would read it, and never that a model is harmless. Exit code 4: something is refused.

    Examples:

      luthier scan ./downloaded-model
    """
    from luthier.trust import scan

    findings = scan.scan(path)
    counts = {level: sum(f.level == level for f in findings) for level in ("refused", "warning", "fine", "unjudged")}
    if not counts["refused"]:
        screen().result({"path": path, "counts": counts, "findings": [vars(f) for f in findings]})
    screen().table(("", "place", "what"), [(f.level, f.place, f.what) for f in findings])
    screen().show("\n" + ", ".join(f"{n} {level}" for level, n in counts.items()))
    if counts["unjudged"] == len(findings):
        screen().show("Nothing here is of a kind that scan judges: weights, configurations, chat templates.")
    if counts["refused"]:
        worst = "\n".join(f"{f.place}: {f.what}" for f in findings if f.level == "refused")
        raise Refused(f"{path}: {counts['refused']} refused, so it would not be read:\n{worst}")
