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
    as_json: AsJson = False,
) -> None:
    """Write a run's tuning as the peft library reads it: lora, dora and ia3, the same numbers to the bit.

    Examples:

      luthier export runs/x adapter
    """
    from luthier.core import ConfigError
    from luthier.surgery import to_peft
    from luthier.workflow import Predictor

    if Path(target).exists():
        raise ConfigError(f"{target}: is there already. Name a folder that does not exist.")
    written = to_peft(Predictor(run).tuned, target)
    sizes = {path.name: path.stat().st_size for path in sorted(written.iterdir())}
    screen().result({"path": str(written), "format": "peft", "bytes": sizes})
    screen().show(
        f"{written}: {', '.join(sizes)}; read it with peft.PeftModel.from_pretrained(model, {str(written)!r})"
    )
