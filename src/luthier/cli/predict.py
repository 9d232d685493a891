"""`luthier predict`: ask a finished run."""

from typing import Annotated, Any

import typer

from luthier.cli._output import screen
from luthier.cli._shared_options import AsJson
from luthier.core import UsageError

__all__ = ["NEEDS_WORDS", "answer_of", "cells_of", "command"]

NEEDS_WORDS = True


def command(
    run: Annotated[str, typer.Argument(help="The folder of a finished run.")],
    text: Annotated[list[str] | None, typer.Option(help="A text to answer; may be given several times.")] = None,
    data: Annotated[str | None, typer.Option(help="A file of rows, with the columns of the training rows.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest generated answer, in tokens.")] = 64,
    as_json: AsJson = False,
) -> None:
    """Answer texts, or the rows of a file, with a finished run. Answers come in the order of the rows.

    Examples:

      luthier predict runs/x --text "How tall is the Eiffel tower?"

      luthier predict runs/x --data questions.csv --json
    """
    if bool(text) == (data is not None):
        raise UsageError("predict: give --text, or --data with a file of rows: one of the two.")

    from luthier.workflow import predict

    answers = predict(run, texts=text or [], data=data, max_new_tokens=max_new_tokens)
    screen().result({"run": run, "answers": answers})
    many = data is not None or len(answers) > 1
    if not screen().for_eyes:
        for number, answer in enumerate(answers, start=1):
            screen().row(*([number] if many else []), *cells_of(answer))
    elif many:
        rows = [(number, answer_of(answer)) for number, answer in enumerate(answers, start=1)]
        screen().table(("row", "answer"), rows, right=("row",))
    else:
        screen().show(answer_of(answers[0]))


def cells_of(answer: dict[str, Any]) -> tuple[str, ...]:
    """One answer for a program: a label and its probability are two cells."""
    label = answer.get("label")
    if isinstance(label, str):
        return label, f"{answer['probabilities'][label]:.6g}"
    return (answer_of(answer),)


def answer_of(answer: dict[str, Any]) -> str:
    """One answer in words: a label with its probability, a number, tags, or text."""
    if "label" in answer:
        label = answer["label"]
        if isinstance(label, list):
            return ", ".join(label) or "(none)"
        return f"{label}  ({answer['probabilities'][label]:.1%})"
    if "value" in answer:
        return f"{answer['value']:.4g}"
    if "tags" in answer:
        return " ".join(str(tag) for tag in answer["tags"])
    return str(answer["text"])
