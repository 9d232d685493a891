"""One small reader per shipped file format. Each gives rows in the shape of its task, in the file's order.

A reader raises where a line does not look as it should; it never skips one in silence. What a reader leaves out on
purpose (a text rated exactly neutral, a conversation of one speaker) it counts by reason.
"""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.core import DataError

__all__ = ["PARSERS", "Members", "Parsed", "Row"]

Row = dict[str, Any]
Members = dict[str, Path]
"""Member path inside its archive -> file that holds its bytes."""

PASSAGE = 1000  # characters; paragraphs of a play are joined until a passage has that many
LETTERED = re.compile(r"\n(?=[A-E]\. )")


@dataclass(kw_only=True)
class Parsed:
    """The rows as shipped.

    Args:
        rows: all rows, or the training half where the source has its own split.
        test: the source's own test half.
        left_out: reason -> number of shipped rows that are not in `rows`.
        source: names what a row was made from; rows of one source stay in one half.
    """

    rows: list[Row]
    test: list[Row] | None = None
    left_out: Counter[str] = field(default_factory=Counter)
    source: Callable[[Row], str] | None = None


def trec6(members: Members) -> Parsed:
    """Lines of `COARSE:fine the question itself`."""
    rows = []
    for where, line in _lines(*members.items()):
        label, gap, text = line.partition(" ")
        coarse, colon, _ = label.partition(":")
        if not (gap and colon and coarse and text.strip()):
            raise DataError(f"{where}: expected 'COARSE:fine question', got {line[:60]!r}.")
        rows.append({"text": text.strip(), "label": coarse})
    return Parsed(rows=rows)


def sms_spam(members: Members) -> Parsed:
    """CSV with the columns (number), spam, text; messages may span lines."""
    ((name, path),) = members.items()
    rows = []
    reader = csv.DictReader(io.StringIO(_text(name, path), newline=""), strict=True)
    for line in reader:
        if line.get("spam") not in ("0", "1") or not line.get("text", "").strip() or None in line:
            raise DataError(f"{name}:{reader.line_num}: expected a number, 0 or 1, and a text; got {line!r}.")
        rows.append({"text": line["text"], "label": "spam" if line["spam"] == "1" else "ham"})
    return Parsed(rows=rows)


def movie_snippets(members: Members) -> Parsed:
    """Tab-separated id, mean rating from -4 to 4, text; the label is the rating's sign."""
    rows, left_out = [], Counter[str]()
    header, *lines = _lines(*members.items())
    if header[1].split("\t") != ["id", "sentiment", "text"]:
        raise DataError(f"{header[0]}: expected the header id, sentiment, text; got {header[1][:60]!r}.")
    for where, line in lines:
        _, rating, text = _fields(where, line, 3)
        if (value := _number(where, rating)) == 0:
            left_out["mean rating is exactly 0"] += 1
        else:
            rows.append({"text": text.strip(), "label": "positive" if value > 0 else "negative"})
    return Parsed(rows=rows, left_out=left_out)


def sarcasm(members: Members) -> Parsed:
    """JSONL of chats: the user's message is the headline, `ideal` is "1" or "0"."""
    rows = []
    for where, value in _json_lines(*members.items()):
        try:
            label = {"1": "sarcastic", "0": "not sarcastic"}[value["ideal"]]
            (text,) = [m["content"] for m in value["input"] if m["role"] == "user"]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{where}: expected one user message and an ideal of '0' or '1' ({error!r}).") from error
        rows.append({"text": text, "label": label})
    return Parsed(rows=rows)


def tab_halves(members: Members) -> Parsed:
    """Two Orange files (`...-train.tab`, `...-test.tab`): three header lines, then category, tab, text."""
    halves: dict[str, list[Row]] = {}
    for name, path in members.items():
        # The third header line is `class` and an empty cell; further ones are not skipped, they would be data.
        lines = list(_lines((name, path)))
        if [line for _, line in lines[:3]] != ["Category\tText", "d\tstring", "class\t"]:
            raise DataError(f"{name}: expected the three header lines of an Orange file with Category and Text.")
        halves[name.rsplit("-", 1)[-1]] = [
            {"text": text, "label": label} for label, text in (_fields(where, line, 2) for where, line in lines[3:])
        ]
    return Parsed(rows=halves["train.tab"], test=halves["test.tab"])


def chitchat(members: Members) -> Parsed:
    """One JSON object of conversations, each a list of turns of one sender, each a list of messages.

    Messages of one sender that follow one another become one turn; who speaks first is the user.
    """
    ((name, path),) = members.items()
    rows, left_out = [], Counter[str]()
    for identity, conversation in json.loads(_text(name, path)).items():
        turns: list[tuple[str, str]] = []
        for message in (message for turn in conversation["messages"] for message in turn):
            sender, text = message["sender"], message["text"].strip()
            if not text:
                continue  # an empty message says nothing; its conversation stays
            if turns and turns[-1][0] == sender:
                turns[-1] = (sender, turns[-1][1] + "\n" + text)
            else:
                turns.append((sender, text))
        speakers = {sender for sender, _ in turns}
        if len(speakers) > 2:
            raise DataError(f"{name}: conversation {identity} has {len(speakers)} speakers; at most two were known.")
        if len(speakers) < 2:
            left_out["fewer than two speakers"] += 1
        elif len(turns) < 4:
            left_out["fewer than four turns"] += 1
        else:
            first = turns[0][0]
            rows.append(
                {"messages": [{"role": "user" if s == first else "assistant", "content": text} for s, text in turns]}
            )
    return Parsed(rows=rows, left_out=left_out)


def chatterbot(members: Members) -> Parsed:
    """YAML files with `conversations`: lists that start with a question and an answer.

    Some lists go on, in some files with other answers to the same question, in others with further turns, and no file
    says which. So the first two lines are taken and nothing is guessed.
    """
    import yaml  # quick, but wanted by this reader only

    rows, left_out = [], Counter[str]()
    for name, path in members.items():
        try:
            read = yaml.safe_load(_text(name, path))
            conversations = read["conversations"]
        except (yaml.YAMLError, KeyError, TypeError) as error:
            raise DataError(f"{name}: expected YAML with a list called conversations ({error}).") from error
        for lines in conversations:
            if not isinstance(lines, list) or len(lines) < 2 or not all(isinstance(x, str) for x in lines):
                left_out["not a question and an answer"] += 1
                continue
            question, answer = lines[0].strip(), lines[1].strip()
            rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    return Parsed(rows=rows, left_out=left_out, source=lambda row: str(row["messages"][0]["content"]))


def nq_open(members: Members) -> Parsed:
    """JSONL of a question and one or several accepted answers; the first is the response."""
    rows = []
    for where, value in _json_lines(*members.items()):
        answers = value.get("answer")
        if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
            raise DataError(f"{where}: expected a list of answers, got {answers!r}.")
        rows.append({"prompt": _word(where, value, "question"), "response": answers[0].strip(), "answers": answers})
    return Parsed(rows=rows, source=_prompt)


def boolq(members: Members) -> Parsed:
    """JSONL of question, passage and "True" or "False"; questions on one passage stay together."""
    rows = _pairs(members, "passage")
    return Parsed(rows=rows, source=lambda row: str(row["text_pair"]))


def privacy_policy(members: Members) -> Parsed:
    """JSONL of question, clause and "True" or "False" (relevant or not); clauses of one question stay together."""
    rows = _pairs(members, "context")
    return Parsed(rows=rows, source=lambda row: str(row["text"]))


def multiple_choice(members: Members) -> Parsed:
    """JSONL of question, lettered options and the marked one."""
    rows = []
    for where, value in _json_lines(*members.items()):
        question, choices, answer = _choices(where, value)
        lettered = [f"{letter}. {choice}" for letter, choice in zip("ABCDE", choices, strict=False)]
        rows.append(
            {
                "prompt": "\n".join([question, *lettered]),
                "response": lettered[answer],
                "question": question,
                "choices": choices,
                "answer": answer,
            }
        )
    return Parsed(rows=rows, source=lambda row: str(row["question"]))


def marked_preference(members: Members) -> Parsed:
    """The same files read as pairs: the marked option is chosen, each other one makes a pair with it."""
    rows, left_out = [], Counter[str]()
    for where, value in _json_lines(*members.items()):
        question, choices, answer = _choices(where, value)
        context = value.get("passage", "")
        prompt = f"{context}\n{question}" if context else question
        for place, choice in enumerate(choices):
            if place == answer:
                continue
            if choice == choices[answer]:
                left_out["both options are one text"] += 1
                continue
            rows.append({"prompt": prompt, "chosen": choices[answer], "rejected": choice})
    return Parsed(rows=rows, left_out=left_out, source=lambda row: str(row["prompt"]).split("\n", 1)[0])


def plays(members: Members) -> Parsed:
    """Plain text files, one per work; whole paragraphs joined to passages of at least `PASSAGE` characters."""
    rows = []
    for name, path in members.items():
        work = name.rsplit("/", 1)[-1].removesuffix(".txt").removesuffix("_gut")
        text = "\n".join(line.rstrip() for line in _text(name, path).splitlines())
        passage = ""
        for paragraph in re.split(r"\n{2,}", text.strip("\n")):
            passage = f"{passage}\n\n{paragraph}" if passage else paragraph
            if len(passage) >= PASSAGE:
                rows.append({"text": passage, "work": work})
                passage = ""
        if passage:
            rows.append({"text": passage, "work": work})
    return Parsed(rows=rows, source=lambda row: str(row["work"]))


PARSERS: dict[str, Callable[[Members], Parsed]] = {
    parser.__name__: parser
    for parser in (
        trec6,
        sms_spam,
        movie_snippets,
        sarcasm,
        tab_halves,
        chitchat,
        chatterbot,
        nq_open,
        boolq,
        privacy_policy,
        multiple_choice,
        marked_preference,
        plays,
    )
}


def _prompt(row: Row) -> str:
    return str(row["prompt"])


def _pairs(members: Members, second: str) -> list[Row]:
    rows = []
    for where, value in _json_lines(*members.items()):
        if value.get("answer") not in ("True", "False"):
            raise DataError(f"{where}: expected the answer 'True' or 'False', got {value.get('answer')!r}.")
        text, pair = _word(where, value, "question"), _word(where, value, second)
        rows.append({"text": text, "text_pair": pair, "label": value["answer"]})
    return rows


def _choices(where: str, value: Row) -> tuple[str, list[str], int]:
    """Question, choices without their letters, and the place of the marked one.

    A few lines were cut in the wrong place when they were made: an option stands in the question, or the question's
    full stop or question mark stands in the options. Reading both as one text puts them right.
    """
    question, options, marked = (_word(where, value, name) for name in ("question", "options", "answer"))
    glue = "" if value["options"].startswith(("\n", ".\n")) else "\n"
    question, *lettered = LETTERED.split(value["question"] + glue + value["options"])
    letters = [option[0] for option in lettered]
    choices = [option[2:].strip() for option in lettered]
    if letters != list("ABCDE"[: len(letters)]) or len(letters) < 2 or marked[0] not in letters:
        raise DataError(f"{where}: expected options A., B., ... and one of them as the answer; got {options!r}.")
    if not glue and not question.rstrip().endswith("?") and choices[-1].endswith("?"):
        question, choices[-1] = question.rstrip() + "?", choices[-1].removesuffix("?").strip()
    answer = letters.index(marked[0])
    if choices[answer] != marked[2:].strip():
        raise DataError(f"{where}: the answer {marked!r} is not the option of that letter, {choices[answer]!r}.")
    return question.strip(), choices, answer


def _word(where: str, value: Row, name: str) -> str:
    word = value.get(name)
    if not isinstance(word, str) or not word.strip():
        raise DataError(f"{where}: expected some text as {name!r}, got {word!r}.")
    return word.strip()


def _number(where: str, word: str) -> float:
    try:
        return float(word)
    except ValueError as error:
        raise DataError(f"{where}: expected a number, got {word[:60]!r}.") from error


def _fields(where: str, line: str, n: int) -> list[str]:
    cells = line.split("\t")
    if len(cells) != n or not cells[-1].strip():
        raise DataError(f"{where}: expected {n} cells between tabs, the last not empty; got {line[:60]!r}.")
    return cells


def _json_lines(member: tuple[str, Path]) -> Iterator[tuple[str, Row]]:
    for where, line in _lines(member):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: not JSON ({error}).") from error
        if not isinstance(value, dict):
            raise DataError(f"{where}: expected a JSON object, got {line[:60]!r}.")
        yield where, value


def _lines(member: tuple[str, Path]) -> list[tuple[str, str]]:
    """Pairs of (place for messages, line without its end), empty lines left out."""
    name, path = member
    # Not splitlines(): it also cuts at characters such as U+2028 that stand inside texts.
    numbered = enumerate(_text(name, path).replace("\r\n", "\n").split("\n"), 1)
    return [(f"{name}:{n}", line) for n, line in numbered if line.strip()]


def _text(name: str, path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: byte {error.start} is not UTF-8.") from error
