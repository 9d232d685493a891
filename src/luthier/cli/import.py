"""`luthier import`: an adapter of the peft library as a tuning."""

from typing import Annotated

import typer

from luthier.cli._output import screen
from luthier.cli._rank import rank_asked
from luthier.cli._shared_options import AsJson
from luthier.core import ConfigError, human_bytes

__all__ = ["NEEDS_WORDS", "command"]

NEEDS_WORDS = True


def command(
    adapter: Annotated[
        str,
        typer.Argument(
            help="A folder with adapter_config.json and adapter_model.safetensors; or a file of LyCORIS (lokr, loha)."
        ),
    ],
    out: Annotated[str, typer.Option(help="The folder to write; it must not exist.")],
    model: Annotated[str | None, typer.Option(help="Its base; left out, the one that the adapter names.")] = None,
    as_: Annotated[
        str | None, typer.Option("--as", help="lora: write a LoRA of --rank that is near the adapter, in its place.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of the LoRA that --as lora writes.")] = None,
    as_json: AsJson = False,
) -> None:
    """Read what the peft library or LyCORIS saved, and write it as a tuning; what it computes is compared first.

    Examples:

      luthier import ./adapter --model ./llama-1b --out tuning

      luthier import ./lokr --model ./llama-1b --out thin --as lora --rank 16

      luthier import ./lokr.safetensors --model ./llama-1b --out tuning
    """
    from luthier.workflow.import_peft import import_peft
    from luthier.workflow.lycoris import import_lycoris

    wanted, lycoris = rank_asked(as_, rank), adapter.endswith(".safetensors")
    if lycoris and wanted is not None:
        raise ConfigError(
            "--as lora: not of a file of LyCORIS. Import it, then export the tuning's run with --as lora."
        )
    found = (
        import_lycoris(adapter, out, model=model) if lycoris else import_peft(adapter, out, model=model, rank=wanted)
    )
    sizes = {path.name: path.stat().st_size for path in sorted(found.path.iterdir())}
    line = f"luthier.load(model, {out!r})"
    screen().result(
        {
            "path": out,
            "method": found.method,
            "model": found.model,
            "gap": found.gap,
            "bytes": sizes,
            "python": line,
            "notes": found.notes,
        }
    )
    screen().show(f"{out}: {found.method} on {found.model}, {human_bytes(sum(sizes.values()))}")
    for note in found.notes:
        screen().show(note)
    if found.gap is None and not lycoris:
        screen().say("peft is not installed here, so it was not compared with what peft computes")
    elif found.gap is not None:
        screen().show(f"largest difference of a logit from peft's own: {found.gap:.2g}, of {found.size:.2g}")
    screen().show(f"read it with: {line}")
