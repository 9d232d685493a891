"""`luthier merge`: a finished run as a plain model folder."""

from typing import Annotated

import typer

from luthier.cli._output import screen
from luthier.cli._shared_options import AsJson
from luthier.core import human_bytes

__all__ = ["NEEDS_WORDS", "command"]

NEEDS_WORDS = True


def command(
    run: Annotated[str, typer.Argument(help="The folder of a finished run.")],
    out: Annotated[str, typer.Option(help="The folder to write; it must not exist.")],
    dtype: Annotated[str, typer.Option(help="Type of the weights: auto (as the base is stored), fp32, bf16, fp16.")] = (
        "auto"
    ),
    accept: Annotated[
        bool, typer.Option("--accept", help="Write it although, read back, it is not the model that was trained.")
    ] = False,
    add: Annotated[
        list[str] | None,
        typer.Option(help="Another run on the same base, whose change of the weights is added; repeat."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a model folder that transformers loads without luthier: the tuning is computed into the weights.

    Examples:

      luthier merge runs/x --out for-a-colleague

      luthier merge runs/task --add runs/language --out both
    """
    from luthier.workflow import merge

    written = merge(run, out, dtype=dtype, accept=accept, add=add or (), say=screen().say)  # type: ignore[arg-type]  # others are refused
    sizes = {path.name: path.stat().st_size for path in sorted(written.iterdir())}
    screen().result({"path": str(written), "bytes": sizes})
    screen().show(f"{out}: {human_bytes(sum(sizes.values()))}, {', '.join(sizes)}. README.md there says how to use it.")
