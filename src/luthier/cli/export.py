"""`luthier export`: a finished run as files that another program reads."""

from typing import TYPE_CHECKING, Annotated

import typer

from luthier.cli._output import screen
from luthier.cli._rank import rank_asked
from luthier.cli._shared_options import AsJson

if TYPE_CHECKING:
    from luthier.workflow.certificate import Step

__all__ = ["NEEDS_WORDS", "command"]

NEEDS_WORDS = True


def command(
    run: Annotated[str, typer.Argument(help="The folder of a finished run.")],
    target: Annotated[str, typer.Argument(help="The folder to write; it must not exist.")],
    to: Annotated[
        str, typer.Option(help="What to write: peft, merged, onnx, gguf, gguf-adapter, lycoris or vllm.")
    ] = "peft",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Type of the weights. gguf: f32, f16 (as it is), bf16, q8_0. merged: as luthier merge has it."
        ),
    ] = None,
    as_: Annotated[
        str | None,
        typer.Option("--as", help="lora: write a LoRA of --rank that is near the tuning."),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of the LoRA that --as lora writes.")] = None,
    accept: Annotated[
        bool, typer.Option("--accept", help="Write it although, read back, it is not the model that was trained.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a run for another program, which reads it back first: what it computes must be what was trained.

    peft      the tuning alone, for the peft library: the same numbers to the bit

    merged    a model folder of transformers, the tuning in its weights

    onnx      a classifier or an encoder as a graph for onnxruntime

    gguf      a decoder as one file for llama.cpp, the tuning in its weights

    gguf-adapter   the tuning alone as a LoRA for llama.cpp, of a method that is one

    lycoris   the tuning alone, of lokr or loha, as a file of LyCORIS

    vllm      the tuning alone as a LoRA that vLLM loads; its limits are checked

    With --as lora --rank N, any change of weights as the nearest LoRA: peft, gguf-adapter, vllm.

    Examples:

      luthier export runs/x adapter

      luthier export runs/x graph --to onnx

      luthier export runs/x thin --as lora --rank 16
    """
    from luthier.workflow.formats import export

    rank = rank_asked(as_, rank)
    written = export(run, target, to=to, dtype=dtype, rank=rank, accept=accept)
    files = [path for path in sorted(written.path.rglob("*")) if path.is_file()]
    sizes = {str(path.relative_to(written.path)): path.stat().st_size for path in files}
    step = written.step
    screen().result(
        {"path": str(written.path), "format": to, "bytes": sizes, "python": written.line, "notes": written.notes,
         "status": None if step is None else step.status, "gap": None if step is None else step.gap,
         "same_answers": None if step is None else step.likeliest, "shares": written.shares}
    )  # fmt: skip
    screen().show(f"{written.path}: {', '.join(sizes)}")
    for note in written.notes:
        screen().say(f"  {note}")
    if step is not None:
        screen().show(_checked(step))
    screen().show(f"read it with: {written.line}")


def _checked(step: "Step") -> str:
    """What reading it back showed."""
    if step.gap is None:
        return f"not compared: {step.reason}"
    said = [f"largest gap of a logit {step.gap:.2g}"]
    if step.tolerance is not None and step.off is not None:
        said.append(f"{step.off:.2g} on average, {step.tolerance:.2g} allowed")
    if step.likeliest is not None:
        said.append(f"same answer at {step.likeliest:.1%} of the places")
    if step.greedy is not None:
        said.append(f"{step.greedy:.1%} of written tokens the same")
    beside = f", {step.reason}" if step.reason else ""
    return f"{step.status} on the rows that the run kept{beside}: {'; '.join(said)}"
