"""`luthier export`: a tuning as files that another library reads."""

from pathlib import Path
from typing import Annotated

import typer

from luthier.cli._output import screen
from luthier.cli._shared_options import AsJson

__all__ = ["NEEDS_WORDS", "command"]

NEEDS_WORDS = True


def command(
    run: Annotated[str, typer.Argument(help="The folder of a finished run.")],
    target: Annotated[str, typer.Argument(help="The folder to write; it must not exist.")],
    accept: Annotated[
        bool, typer.Option("--accept", help="Write it although, read back, it is not the model that was trained.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a run's tuning as the peft library reads it: lora, dora and ia3, the same numbers to the bit.

    Examples:

      luthier export runs/x adapter
    """
    from luthier.core import ConfigError
    from luthier.workflow import Predictor
    from luthier.workflow.export import export_peft

    if Path(target).exists():  # said before the model is loaded
        raise ConfigError(f"{target}: is there already. Name a folder that does not exist.")
    written = export_peft(Predictor(run), target, accept=accept)
    files = [path for path in sorted(written.path.rglob("*")) if path.is_file()]
    sizes = {str(path.relative_to(written.path)): path.stat().st_size for path in files}
    screen().result(
        {"path": str(written.path), "format": "peft", "bytes": sizes, "python": written.line, "notes": written.notes}
    )
    screen().show(f"{written.path}: {', '.join(sizes)}")
    for note in written.notes:
        screen().say(f"  {note}")
    screen().show(f"read it with: {written.line}")
