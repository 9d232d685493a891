"""`luthier convert`: a pickled checkpoint becomes safetensors, in a jailed process."""

from pathlib import Path
from typing import Annotated

import typer

from luthier.cli._output import screen
from luthier.cli._shared_options import AsJson

__all__ = ["NEEDS_WORDS", "command"]

NEEDS_WORDS = True


def command(
    source: Annotated[str, typer.Argument(help="A torch checkpoint: .bin, .pt, .pth (torch 1.6 or later).")],
    target: Annotated[str | None, typer.Argument(help="The file to write. [default: beside it, .safetensors]")] = None,
    as_json: AsJson = False,
) -> None:
    """Read the tensors of a pickled checkpoint without running anything of it, and write them as safetensors.

    Examples:

      luthier convert pytorch_model.bin

      luthier convert old.pt new/model.safetensors
    """
    from luthier.trust import convert

    goal = Path(target) if target is not None else Path(source).with_suffix(".safetensors")
    done = convert.pickle_to_safetensors(source, goal)
    screen().result(
        {"path": str(done.path), "tensors": done.tensors, "left_out": list(done.left_out), "sha256": done.sha256}
    )
    screen().show(f"{done.path}: {done.tensors} tensors, sha256 {done.sha256[:12]}")
    if done.left_out:
        screen().show(f"left out, being no tensors: {', '.join(done.left_out)}")
