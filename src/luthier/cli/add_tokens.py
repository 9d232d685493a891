"""`luthier add-tokens`: a model with further tokens, as a folder."""

from typing import Annotated

import typer

from luthier.cli._output import screen
from luthier.cli._shared_options import AsJson

__all__ = ["NEEDS_WORDS", "command"]

NEEDS_WORDS = True


def command(
    model: Annotated[str, typer.Argument(help="A model folder, sample:NAME, or a hub name.")],
    tokens: Annotated[str, typer.Option(help="A file with a token on each line.")],
    out: Annotated[str, typer.Option(help="The folder to write; it must not exist.")],
    as_json: AsJson = False,
) -> None:
    """Write the model with further tokens, which begin as the mean of all others: a base like any other.

    Examples:

      luthier add-tokens sample:smollm2-135m --tokens tokens.txt --out with-tokens
    """
    from luthier.workflow.more_tokens import add_tokens, read_tokens

    named = read_tokens(tokens)
    ids = add_tokens(model, named, out)
    screen().result({"path": out, "tokens": dict(zip(named, ids, strict=True))})
    screen().show(f"{out}: {model} and {len(ids)} tokens, with the ids {ids[0]} to {ids[-1]}.")
    listed = ",".join(map(str, ids))
    screen().show(
        f"Next: luthier train {out} --data ... --method trainable_tokens+lora --set trainable_tokens.tokens={listed}\n"
        "  (of the tables only their rows train, and only these are saved)"
    )
