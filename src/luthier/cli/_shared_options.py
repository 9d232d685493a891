"""Options that several verbs share."""

from typing import Annotated

import typer

__all__ = ["AsJson", "Out"]

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.", show_default=False)]
Out = Annotated[str | None, typer.Option(help="Folder of the run; must not exist yet. [default: below runs/]")]
