"""`luthier look`: rows as the model will see them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.cli._output import screen
from luthier.cli._shared_options import AsJson
from luthier.cli._spec_options import check_names, complete_model, overlay, spec_options, values_of
from luthier.cli._verb import as_verb
from luthier.core import ConfigError, UsageError, plain
from luthier.runs.spec import RunSpec

__all__ = ["NEEDS_WORDS", "command", "command_for"]

NEEDS_WORDS = True
# Fields of a run that decide nothing about what is seen of its rows.
TAKEN = ("data.", "task", "max_length", "batch.", "seed")

HELP = """Show rows as the model will see them: tokens, what carries loss, what is cut, and how full batches are.

Nothing is trained, and no weight is read. Of a large file, 2,000 rows spread over it are encoded.

Examples:

  luthier look sample:smollm2-135m --data chats.jsonl

  luthier look sample:minilm-l6 --data reviews.csv --rows 3 --html rows.html
"""

Model = Annotated[
    str, typer.Argument(help="A model folder, sample:NAME, or a hub name.", autocompletion=complete_model)
]
Rows = Annotated[int, typer.Option("--rows", help="How many rows are shown.", min=1, max=100)]
Html = Annotated[str | None, typer.Option("--html", metavar="FILE", help="Write the same as a page; a new file.")]


def command_for(words: Sequence[str] = ()) -> Callable[..., None]:
    """The verb with the fields of a run that decide what is seen of its rows as its options."""
    options = [o for o in spec_options(RunSpec) if o.field.startswith(TAKEN)]

    def command(model: Model, *, rows: Rows = 5, html: Html = None, as_json: AsJson = False, **given: Any) -> None:
        _look(model, rows, html, values_of(options, given))

    return as_verb(command, HELP, options)


command = command_for()


def _look(model: str, rows: int, html: str | None, changes: dict[str, Any]) -> None:
    if html is not None and Path(html).exists():
        raise ConfigError(f"--html {html}: is there already. Name a file that does not exist.")
    if html is not None and not Path(html).absolute().parent.is_dir():
        raise ConfigError(f"--html {html}: its folder does not exist. Make it, or name another place.")
    check_names(None, model, changes.get("data.source"))
    if changes.get("data.source") is None:
        raise UsageError("look: no rows. Name them: --data FILE, or --data sample:trec6 to begin with.")
    spec = RunSpec.from_plain(overlay({"model": model}, changes), where="the command")

    from luthier.cli._drawn_rows import drawn, page_of
    from luthier.workflow.look_at_rows import look_at

    with screen().busy("reading rows"):
        found = look_at(spec, rows)
    wrote = {}
    if html is not None:
        from luthier.runs import durable

        durable.write_bytes(Path(html), page_of(found).encode())
        wrote = {"html": html}
    screen().result({**plain(found), **wrote})
    for part in drawn(found):
        screen().draw(part)
    if html is not None:
        screen().show(f"written to {html}")
