"""`luthier verify-resume`: prove on your own run that stopping and resuming changes nothing."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from luthier.cli._output import screen
from luthier.cli._shared_options import AsJson
from luthier.core import IntegrityError

__all__ = ["NEEDS_WORDS", "command"]

NEEDS_WORDS = True


def command(
    spec: Annotated[str, typer.Argument(help="A spec.toml, such as the one in a run's folder.")],
    steps: Annotated[int, typer.Option(min=1, help="Compare 2 N steps with N steps, a stop, and N more.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Train 2 N steps at once, and N, stop, N more; compare every byte of the results.

    Examples:

      luthier verify-resume runs/x/spec.toml --steps 10
    """
    from luthier.cli._progress import Watcher
    from luthier.runs.spec import RunSpec
    from luthier.workflow import verify_resume

    read = RunSpec.from_toml(Path(spec))
    with tempfile.TemporaryDirectory(prefix="luthier-verify-") as folder:
        proof = verify_resume(read, steps, Path(folder), listener=Watcher(title="verify"))
    rows = [(name, d["whole"][:12], d["resumed"][:12]) for name, d in proof["parts"].items()]
    screen().table(("part", "at once", "resumed"), rows)
    if not proof["equal"]:
        differs = ", ".join(name for name, d in proof["parts"].items() if d["whole"] != d["resumed"])
        raise IntegrityError(
            f"{spec}: the resumed run differs from the one made at once ({differs}). Do not rely on resuming this run "
            "on this machine; please report the spec."
        )
    screen().result(proof)
    screen().show(f"\n{proof['steps']} steps at once and in two halves: every byte is the same.")
