"""`luthier train`: fine-tune a model on rows, from options or from a spec file."""

from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.cli._shared_options import AsJson, Out
from luthier.cli._spec_options import check_names, overlay, settings_of
from luthier.core import UsageError

__all__ = ["NEEDS_WORDS", "command"]

NEEDS_WORDS = True

DATA, LEARN, CARE = "Data", "Learning", "Care"


def command(
    model: Annotated[str, typer.Argument(help="A model folder, sample:NAME, a hub name; or a spec.toml.")],
    data: Annotated[
        str | None,
        typer.Option(help="Rows: .csv, .tsv, .jsonl, .parquet, a folder of .txt, sample:NAME.", rich_help_panel=DATA),
    ] = None,
    test: Annotated[str | None, typer.Option(help="Held-out rows, named likewise.", rich_help_panel=DATA)] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="auto, classification, regression, token_classification, causal_lm, seq2seq.", rich_help_panel=DATA
        ),
    ] = None,
    text: Annotated[str | None, typer.Option(help="Column with the text.", rich_help_panel=DATA)] = None,
    pair: Annotated[str | None, typer.Option(help="Column with the second text.", rich_help_panel=DATA)] = None,
    label: Annotated[str | None, typer.Option(help="Column with the label.", rich_help_panel=DATA)] = None,
    prompt: Annotated[str | None, typer.Option(help="Column with the prompt.", rich_help_panel=DATA)] = None,
    context: Annotated[str | None, typer.Option(help="Column that follows the prompt.", rich_help_panel=DATA)] = None,
    response: Annotated[str | None, typer.Option(help="Column with the answer.", rich_help_panel=DATA)] = None,
    messages: Annotated[str | None, typer.Option(help="Column with chat messages.", rich_help_panel=DATA)] = None,
    tokens: Annotated[str | None, typer.Option(help="Column with words to tag.", rich_help_panel=DATA)] = None,
    tags: Annotated[str | None, typer.Option(help="Column with their tags.", rich_help_panel=DATA)] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop when test rows stand in the training half.", rich_help_panel=DATA)
    ] = False,
    method: Annotated[
        str | None, typer.Option(help="lora, bitfit, lora+prefix_tuning, ... [default: lora]", rich_help_panel=LEARN)
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="A setting of the method (rank=16), or a field of the run (optim.warmup=0.1, run.threads=1).",
            rich_help_panel=LEARN,
        ),
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the rows. [default: 3]", rich_help_panel=LEARN)
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps, instead.", rich_help_panel=LEARN)] = None,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate. [default: the method's]", rich_help_panel=LEARN)
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Rows a step. [default: 16]", rich_help_panel=LEARN)] = None,
    seed: Annotated[int | None, typer.Option(help="Names every draw. [default: 0]", rich_help_panel=LEARN)] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest row, in tokens.", rich_help_panel=LEARN)] = None,
    precision: Annotated[
        str | None, typer.Option(help="auto, bf16, fp32, fp16. [default: auto]", rich_help_panel=CARE)
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, mps. [default: auto]", rich_help_panel=CARE)] = (
        None
    ),
    threads: Annotated[int | None, typer.Option(help="CPU threads.", rich_help_panel=CARE)] = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model on your rows. The run's folder holds its spec: `luthier train FOLDER/spec.toml` repeats it.

    Examples:

      luthier train sample:minilm-l6 --data sample:trec6 --method lora

      luthier train ./model --data rows.csv --text question --label kind --method ia3

      luthier train sample:smollm2-135m --data sample:chitchat --steps 20

      luthier train spec.toml --seed 1 --out runs/again
    """
    changes: dict[str, Any] = {
        "data.source": data, "data.test": test, "task": task, "data.text": text, "data.pair": pair,
        "data.label": label, "data.prompt": prompt, "data.context": context, "data.response": response,
        "data.messages": messages, "data.tokens": tokens, "data.tags": tags, "data.strict": strict or None,
        "method": method, "epochs": epochs, "steps": steps, "optim.lr": lr, "batch.size": batch, "seed": seed,
        "max_length": max_length, "precision": precision, "device": device, "threads": threads, "out": out,
    }  # fmt: skip
    if epochs is not None and steps is not None:
        raise UsageError(f"--epochs {epochs:g} and --steps {steps}: give one of the two.")
    changes |= settings_of(settings or [])
    from_file = model.endswith(".toml")
    if not from_file and data is None:
        raise UsageError("train: no rows to learn from. Name them: --data FILE, or --data sample:trec6 to begin with.")
    check_names(method, None if from_file else model, data, test)

    from luthier.cli._progress import Watcher, show_result
    from luthier.core import plain
    from luthier.runs.spec import RunSpec
    from luthier.workflow import train

    values = plain(RunSpec.from_toml(Path(model))) if from_file else {"model": model, "data": {}}
    if from_file:
        # The file may come from a finished run; its folder is occupied, and another is wanted.
        values["out"] = None
        if method is not None and method != values["method"]:
            values["settings"] = {}
    spec = RunSpec.from_plain(overlay(values, changes))
    show_result(train(spec, listener=Watcher(title=spec.method)))
