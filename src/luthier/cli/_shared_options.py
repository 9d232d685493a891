"""Options that several verbs share."""

from typing import Annotated

import typer

__all__ = ["AsJson", "Delimiter", "Encoding"]

Delimiter = Annotated[
    str | None, typer.Option(help="What parts the columns of a .csv file; left out, what its lines show.")
]
Encoding = Annotated[
    str | None, typer.Option(help="How a .csv file is written, such as latin-1; left out, what its bytes show.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.", show_default=False)]
