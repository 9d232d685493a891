"""`luthier predict`: ask a finished run."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Annotated, Any

import typer

from luthier.cli._answer_file import AnswerFile
from luthier.cli._output import screen
from luthier.cli._shared_options import AsJson, Delimiter, Encoding
from luthier.core import UsageError

__all__ = ["NEEDS_WORDS", "answer_of", "cells_of", "command"]

NEEDS_WORDS = True
UNSURE = "unsure"


def command(
    run: Annotated[str, typer.Argument(help="The folder of a finished run.")],
    text: Annotated[list[str] | None, typer.Option(help="A text to answer; may be given several times.")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="A file of rows, with the columns of the training rows; - reads standard input."),
    ] = None,
    delimiter: Delimiter = None,
    encoding: Encoding = None,
    out: Annotated[
        str | None, typer.Option(help="A new .csv, .jsonl or .parquet file for the rows with their answers.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest generated answer, in tokens.")] = 64,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token each time; higher is more varied.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that make up this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many of the likeliest tokens; 0, from all.")] = 0,
    repetition: Annotated[
        float | None,
        typer.Option(
            "--repetition",
            "--repetition-penalty",
            help="Make what an answer has said already less likely by this factor, such as 1.2; 1 not, even where the "
            "model's own files say so. [default: as these say]",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Names the draws: each row has its own, whatever the others.")] = 0,
    unsure: Annotated[
        float | None,
        typer.Option(metavar="NUMBER 0..1", help="Answer `unsure` where the probability is lower than this."),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Answer no row where one of them cannot be read.")] = False,
    as_json: AsJson = False,
) -> None:
    """Answer texts, or the rows of a file, with a finished run. Answers come in the order of the rows.

    A row that cannot be read gets its reason in place of an answer.

    Examples:

      luthier predict runs/x --text "How tall is the Eiffel tower?"

      luthier predict runs/x --data questions.csv --out answers.csv

      luthier predict runs/x --data questions.csv --unsure 0.6 --out answers.csv

      luthier predict runs/x --data prompts.jsonl --temperature 0.7 --top-p 0.9 --seed 1 --out answers.jsonl

      cat questions.jsonl | luthier predict runs/x --data - --json
    """
    if bool(text) == (data is not None):
        raise UsageError("predict: give --text, or --data with a file of rows: one of the two.")
    if text and (delimiter, encoding) != (None, None):
        raise UsageError("predict: --delimiter and --encoding are of the file that --data names. Leave them out.")
    if unsure is not None and not 0 < unsure <= 1:
        raise UsageError(f"--unsure {unsure:g}: it is a probability, above 0 and at most 1, such as 0.6.")
    into = None if out is None else AnswerFile(out)

    from luthier.data.load_data import load_inputs
    from luthier.workflow import Predictor
    from luthier.workflow.controls import Controls, own_changes, own_words
    from luthier.workflow.unsure import check_unsure

    controls = Controls(
        temperature=temperature, top_p=top_p, top_k=top_k, repetition=repetition, seed=seed,
        max_new_tokens=max_new_tokens,
    )  # fmt: skip
    predictor = Predictor(run)
    if unsure is not None:
        check_unsure(unsure, predictor.task)
    own = own_changes(predictor.tuned.model, repetition) if predictor.task.writes else {}
    if told := own_words(own):
        screen().say(told)
    if text:
        table = predictor.table_of(text)
    else:
        table, _ = load_inputs(str(data), predictor.columns, delimiter=delimiter, encoding=encoding)
    for note in table.notes:
        screen().say(note)
    many = data is not None or len(table) > 1
    answers: list[dict[str, Any]] = []
    no_answer: list[str] = []
    n_unsure = 0
    in_part: list[str] = []
    with ExitStack() as stack:
        if into is not None:
            answered = () if unsure is None else ("answer",)
            stack.enter_context(into).start(table.columns, (*answered, *COLUMNS[predictor.task.name]))
        stream: Iterator[dict[str, Any]] = predictor.stream(table, strict=strict, unsure=unsure, controls=controls)
        for number, answer in enumerate(stream, start=1):
            place = table.places[number - 1]
            if "refused" in answer:
                no_answer.append(f"{place}: {answer['refused']}")
            elif "note" in answer:
                in_part.append(f"{place}: {answer['note']}")
            n_unsure += bool(answer.get("unsure"))
            if into is not None:
                into.add(table.rows[number - 1], _columns_of(answer))
                if not as_json:
                    continue
            elif not (as_json or screen().for_eyes):  # a program has each answer as soon as it is there
                screen().row(*([number] if many else []), *cells_of(answer))
            answers.append(answer)
    wrote = {} if into is None else {"out": str(into.path)}
    written_by = {"generation_config": own} if own else {}
    screen().result({"run": run, "answers": answers, **written_by, **wrote})
    if into is not None:
        screen().show(f"{into.path}: {len(table)} rows")
    elif screen().for_eyes and many:
        rows = [(number, answer_of(answer)) for number, answer in enumerate(answers, start=1)]
        screen().table(("row", "answer"), rows, right=("row",))
    elif screen().for_eyes:
        screen().show(answer_of(answers[0]))
    if unsure is not None:
        screen().say(f"{n_unsure} of {len(table)} rows are unsure: below {unsure:g}")
    for what, found in (("cannot be answered", no_answer), ("are read in part", in_part)):
        if found:
            more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
            screen().say(f"{len(found)} of {len(table)} rows {what}: {'; '.join(found[:3])}{more}")


COLUMNS = {
    "classification": ("label", "probability", "note"),
    "regression": ("value", "note"),
    "token_classification": ("tags", "note"),
    "causal_lm": ("answer", "note"),
    "preference": ("answer", "note"),
    "judged": ("answer", "note"),
    "prompts": ("answer", "note"),
    "reward": ("value", "note"),
    "seq2seq": ("answer", "note"),
}


def _columns_of(answer: dict[str, Any]) -> dict[str, Any]:
    """One answer as the cells of a file."""
    cells = {"note": answer.get("refused", answer.get("note"))}
    if "label" in answer:
        label, shares = answer["label"], answer["probabilities"]
        share = [shares[name] for name in label] if isinstance(label, list) else shares[label]
        return {**cells, "answer": said_of(answer), "label": label, "probability": share}
    if "tags" in answer:
        return {**cells, "answer": said_of(answer), "tags": answer["tags"]}
    return {**cells, **({"value": answer["value"]} if "value" in answer else {"answer": answer.get("text")})}


def said_of(answer: dict[str, Any]) -> Any:
    """The label, labels or tags that are answered, with `unsure` in place of what is less sure than was asked for."""
    doubted = answer.get("unsure", ())
    if "tags" in answer:
        return [UNSURE if i in doubted else tag for i, tag in enumerate(answer["tags"])]
    label = answer["label"]
    if isinstance(label, list):
        kept = [name for name in label if name not in doubted] if doubted else label
        return [*kept, UNSURE] if doubted else kept
    return UNSURE if doubted else label


def cells_of(answer: dict[str, Any]) -> tuple[str, ...]:
    """One answer for a program: a label and its probability are two cells; a row without one has them empty."""
    if "refused" in answer:
        return "", "", str(answer["refused"])
    label = answer.get("label")
    if isinstance(label, str):
        return said_of(answer), f"{answer['probabilities'][label]:.6g}"
    return (answer_of(answer),)


def answer_of(answer: dict[str, Any]) -> str:
    """One answer in words: a label with its probability, a number, tags, or text; or why there is none."""
    if "refused" in answer:
        return f"(no answer: {answer['refused']})"
    if "label" in answer:
        label, said = answer["label"], said_of(answer)
        if isinstance(label, list):
            doubted = f"  (unsure: {', '.join(answer['unsure'])})" if answer.get("unsure") else ""
            return (", ".join(n for n in label if n in said) or "(none)") + doubted
        likeliest = f"{label} " if said == UNSURE else ""
        return f"{said}  ({likeliest}{answer['probabilities'][label]:.1%})"
    if "value" in answer:
        return f"{answer['value']:.4g}"
    if "tags" in answer:
        return " ".join("(unread)" if tag is None else str(tag) for tag in said_of(answer))
    return str(answer["text"])
