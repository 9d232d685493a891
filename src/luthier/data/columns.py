"""Which column is which: found by the names that data sets use, or told by flags, and always said aloud."""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from luthier.core import DataError, near
from luthier.data.rows import Row, Table, normalised
from luthier.runs.spec import DataSpec

__all__ = ["Columns", "find_columns"]

# The first of two names in a tuple is no better than the second: two that are both there are ambiguous.
TEXT = ("text", "sentence", "question", "content", "review", "tweet", "comment", "document", "query", "utterance")
LABEL = ("label", "labels", "target", "class", "category", "score", "rating", "intent", "sentiment", "stars")
PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("text", "text_pair"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("sentence_a", "sentence_b"),
    ("question", "passage"),
    ("question", "context"),
    ("question", "sentence"),
    ("query", "passage"),
)
PROMPT = ("prompt", "instruction", "question", "query", "source", "article", "document")
CONTEXT = ("input", "context")
RESPONSE = ("response", "output", "completion", "answer", "target", "summary", "highlights")
CHOSEN = ("chosen", "preferred")
REJECTED = ("rejected", "dispreferred")
JUDGED = ("label", "liked", "desirable")
MESSAGES = ("messages", "conversations", "conversation", "dialog", "dialogue", "turns")
TOKENS = ("tokens", "words")
TAGS = ("tags", "ner_tags", "pos_tags", "labels")

LOOKED_AT = 1000
"""Rows that a suggestion is made from."""

SHAPES = {
    "labelled": "a text with a label",
    "tagged": "words with tags",
    "dialogue": "chat messages",
    "answered": "a prompt with its response",
    "preferred": "two answers, one better",
    "judged": "an answer that is liked or not",
    "asked": "a prompt to be answered",
    "plain": "text alone",
}
SHAPES_OF = {
    "auto": tuple(shape for shape in SHAPES if shape not in ("judged", "asked")),  # prompts with responses, at first
    "classification": ("labelled",),
    "regression": ("labelled",),
    "token_classification": ("tagged",),
    "causal_lm": ("dialogue", "answered", "plain"),
    "seq2seq": ("answered",),
    "masked_lm": ("plain",),
    "span_corruption": ("plain",),
    "preference": ("preferred",),
    "judged": ("judged",),
    "reward": ("preferred",),
    "prompts": ("asked",),
}


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns that a task reads; those that the shape of the data does not have are `None`."""

    shape: str
    """one of SHAPES: labelled, tagged, dialogue, answered, preferred, judged, asked, plain"""
    text: str | None = None
    pair: str | None = None
    label: str | None = None
    prompt: str | None = None
    context: str | None = None
    response: str | None = None
    messages: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    margin: str | None = None
    share: str | None = None
    tokens: str | None = None
    tags: str | None = None
    system: str | None = None
    history: str | None = None
    tools: str | None = None
    row_task: str | None = None
    unused: tuple[str, ...] = ()

    def used(self) -> dict[str, str]:
        """Role -> column, of the roles that are filled."""
        roles = (
            *("text", "pair", "label", "prompt", "context", "response", "messages", "tokens", "tags"),
            *("chosen", "rejected", "margin", "share"),
            *("system", "history", "tools"),  # what stands around a conversation
            "row_task",
        )
        return {role: column for role in roles if (column := getattr(self, role)) is not None}

    def inputs(self) -> "Columns":
        """The columns that a model reads, without those that it is to answer: what a row to predict has.

        Where a pair's prompt stands in its answers alone, it is read from the better one.
        """
        chosen = self.chosen if self.prompt is None else None
        nothing: dict[str, Any] = dict.fromkeys(("label", "tags", "response", "rejected", "margin", "share"))
        return replace(self, chosen=chosen, **nothing)

    def sentence(self) -> str:
        """The choice in words, for the log."""
        chosen = ", ".join(f"{role} = {column!r}" for role, column in self.used().items())
        rest = f"; not used: {', '.join(repr(c) for c in self.unused)}" if self.unused else ""
        return f"columns: {SHAPES[self.shape]} ({chosen}{rest})"

    def content(self, row: Row) -> str:
        """What makes two rows the same: the inputs where there is a label, else the whole."""
        return "\x1f".join([normalised(row.get(name) or "") for name in self._content_columns])

    def whole(self, row: Row) -> str:
        """What makes a row a copy of another: its content, and the answers of which one prompt may have many."""
        told = (self.chosen, self.rejected, self.response, self.label)
        names = told if self.shape in ("preferred", "judged", "asked") else ()
        return "\x1f".join(
            [self.content(row), *(normalised(row.get(name) or "") for name in names if name is not None)]
        )

    @cached_property
    def _content_columns(self) -> list[str]:
        # Pairs of one prompt are no two prompts: else a half could be scored on what the other has learnt.
        asked = ("system", "history", "prompt", "context") if self.prompt is not None else ("chosen", "rejected")
        roles = {
            "labelled": ("text", "pair"),
            "tagged": ("tokens",),
            "preferred": asked,
            "judged": asked,
            "asked": asked,
        }.get(self.shape, ("system", "history", "messages", "prompt", "context", "response", "text"))
        return [name for role in (*roles, "row_task") if (name := getattr(self, role)) is not None]

    def outcome(self, row: Row) -> str:
        """The label or tags, as text; empty where the shape has none."""
        name = self.label if self.shape == "labelled" else self.tags if self.shape == "tagged" else None
        value = None if name is None else row.get(name)
        return "" if name is None else normalised(value) if isinstance(value, list | dict) else label_name(value)


class _Finder:
    """Finds one role after another in one table, each by its flag or by its usual names."""

    def __init__(self, table: Table, flags: DataSpec) -> None:
        self.table = table
        self.flags = flags
        self.names = table.columns
        self.lower = {name.lower(): name for name in self.names}
        if len(self.lower) < len(self.names):
            twice = [n for n in self.names if self.lower[n.lower()] != n]
            raise DataError(
                f"{table.source}: columns that differ only in case ({', '.join(twice)}; all: {self.listed})."
                " Rename one of each."
            )

    @property
    def listed(self) -> str:
        return ", ".join(repr(n) for n in self.names) or "none"

    def flag(self, role: str) -> str | None:
        """The column that the flag of `role` names, which must be there."""
        wanted: str | None = getattr(self.flags, role)
        if wanted is None or wanted in self.names:
            return wanted
        raise DataError(
            f"{self.table.source}: no column {wanted!r} (asked for by --{role.replace('_', '-')})."
            f"{near(wanted, self.names)}"
            f" Its columns are {self.listed}."
        )

    def usual(self, role: str, names: Iterable[str], taken: Iterable[str | None] = ()) -> str | None:
        """The one column with a usual name.

        Raises:
            DataError: there are two.
        """
        found = [self.lower[n] for n in names if n in self.lower and self.lower[n] not in set(taken)]
        if len(found) > 1:
            raise DataError(
                f"{self.table.source}: {' and '.join(repr(n) for n in found)} could each be the {role}."
                f" Say which with --{role}, for example --{role} {found[0]}. Its columns are {self.listed}."
            )
        return found[0] if found else None

    def pick(self, role: str, names: Iterable[str], taken: Iterable[str | None] = ()) -> str | None:
        return self.flag(role) or self.usual(role, names, taken)


def find_columns(table: Table, flags: DataSpec, task: str = "auto") -> Columns:
    """Find the columns that `task` needs.

    Args:
        flags: `text`, `label` and so on are taken where they are given; the rest is found by convention.
        task: one of `luthier.runs.spec.TASKS`; "auto" takes the one shape that the columns have.

    Raises:
        DataError: a named column is not there, one role could be several columns, or no shape fits; the message lists
            the columns and the flag to use.
    """
    finder = _Finder(table, flags)
    makers = {
        "labelled": _labelled,
        "tagged": _tagged,
        "dialogue": _dialogue,
        "answered": _answered,
        "preferred": _preferred,
        "judged": _judged,
        "asked": _asked,
        "plain": _plain,
    }
    asked = _shapes_of_flags(flags)
    allowed = [s for s in SHAPES_OF[task] if not asked or s in asked]
    if not allowed:
        raise DataError(
            f"task {task} needs {' or '.join(SHAPES[s] for s in SHAPES_OF[task])}, but the flags name columns of"
            f" {' or '.join(SHAPES[s] for s in asked)}. Change --task or the flags."
        )
    found: dict[str, dict[str, str | None]] = {}
    unclear: dict[str, DataError] = {}
    for shape in allowed:
        try:
            roles = makers[shape](finder)
        except DataError as error:
            unclear[shape] = error
            continue
        if roles is not None:
            found[shape] = roles
    if unclear and (not found or set(found) == {"plain"}):
        raise next(iter(unclear.values()))
    if task == "auto" and not asked and set(found) <= {"plain"}:
        _refuse_half_labelled(finder, found.get("plain"))
    # Text alone is the weakest reading: Alpaca-like files carry a ready-made `text` beside prompt and response.
    if len(found) > 1:
        found.pop("plain", None)
    if len(found) > 1:
        raise DataError(
            f"{table.source}: the columns could be {' or '.join(SHAPES[s] for s in found)}."
            f" Say which with --task, or name columns with {_flags_for(found)}. Its columns are {finder.listed}."
        )
    if not found:
        raise DataError(
            f"{table.source}: no columns for {' or '.join(SHAPES[s] for s in allowed)}. Its columns are"
            f" {finder.listed}. Name them with {_flags_for(allowed)}."
        )
    shape, roles = next(iter(found.items()))
    chosen = {role: column for role, column in roles.items() if column is not None}
    if len(set(chosen.values())) < len(chosen):
        raise DataError(
            f"{table.source}: one column stands for two roles ({chosen}). Name different columns. "
            f"Its columns are {finder.listed}."
        )
    told = finder.flag("row_task")
    unused = tuple(n for n in finder.names if n not in chosen.values() and n != told)
    return Columns(shape=shape, unused=unused, row_task=told, **roles)


def _refuse_half_labelled(finder: _Finder, plain: dict[str, str | None] | None) -> None:
    """A label without its text, or a text beside what looks like labels: ask for the other one alone.

    Raises:
        DataError: names what is certain, and the flag for what is not.
    """
    text = plain["text"] if plain is not None else None
    label = next((finder.lower[n] for n in LABEL if n in finder.lower and _holds_labels(finder)), None)
    if text is None and label is not None:
        texts = _longest_texts(finder.table, [n for n in finder.names if n != label])
        if texts:
            some = "" if len(texts) == 1 else f" (or {', '.join(map(repr, texts[1:4]))})"
            raise DataError(
                f"{finder.table.source}: label = {label!r}; which column is the text? For example --text "
                f"{_shell(texts[0])}{some}. Its columns are {finder.listed}."
            )
    if text is not None and label is None:
        classes = [n for n in finder.names if n != text and _looks_like_classes(finder.table, n)]
        if classes:
            raise DataError(
                f"{finder.table.source}: text = {text!r}; is {classes[0]!r} its label? Say so with --label "
                f"{_shell(classes[0])}, or learn the text alone with --task causal_lm. Its columns are {finder.listed}."
            )
        flags = [n for n in finder.names if n != text and _holds_flags(finder.table, n)]
        if len(flags) > 1:
            raise DataError(
                f"{finder.table.source}: text = {text!r}; {', '.join(map(repr, flags[:5]))} hold 0 and 1 alone. For "
                f"several labels a row name them together, --label {_shell(','.join(flags))}; for one of them, "
                f"--label {_shell(flags[0])}."
            )
    if text is None and label is None and plain is None:
        texts, flags = (
            _longest_texts(finder.table, finder.names),
            [n for n in finder.names if _holds_flags(finder.table, n)],
        )
        if texts and len(flags) > 1:
            raise DataError(
                f"{finder.table.source}: {texts[0]!r} looks like the text, and {', '.join(map(repr, flags[:5]))} hold "
                f"0 and 1 alone. Name them: --text {_shell(texts[0])} --label {_shell(','.join(flags))} for several "
                "labels a row."
            )
        classes = [n for n in finder.names if n not in texts[:1] and _looks_like_classes(finder.table, n)]
        if texts and classes:
            raise DataError(
                f"{finder.table.source}: no column has a usual name; {texts[0]!r} looks like a text and "
                f"{classes[0]!r} like its label. Say so with --text {_shell(texts[0])} --label {_shell(classes[0])}. "
                f"Its columns are {finder.listed}."
            )


def _shell(column: str) -> str:
    """A column's name as one word of a command line."""
    return shlex.quote(column)


def _cells(table: Table, column: str) -> list[Any]:
    return [row.get(column) for row in table.rows[:LOOKED_AT]]


def _longest_texts(table: Table, names: Iterable[str]) -> list[str]:
    """Columns of text with several words each, those with the most first."""
    words = {}
    for name in names:
        cells = [c for c in _cells(table, name) if isinstance(c, str) and c.strip()]
        if len(cells) > len(table.rows[:LOOKED_AT]) / 2:
            words[name] = sum(len(c.split()) for c in cells) / len(cells)
    return sorted((n for n, mean in words.items() if mean >= 2), key=lambda n: -words[n])


def _looks_like_classes(table: Table, name: str) -> bool:
    """Few different short words, each in several rows."""
    cells = [c for c in _cells(table, name) if not is_blank(c)]
    if len(cells) < 4 or not all(isinstance(c, str | int | bool) for c in cells):
        return False
    names = {label_name(c) for c in cells}
    short = all(len(n.split()) <= 4 for n in names)
    return short and 2 <= len(names) <= min(50, len(cells) / 2) and not _holds_flags(table, name)


def _holds_flags(table: Table, name: str) -> bool:
    return {label_name(c) for c in _cells(table, name)} == {"0", "1"}


def _shapes_of_flags(flags: DataSpec) -> set[str]:
    """Which shapes the given flags leave open; empty where no flag was given."""
    homes: dict[str, set[str]] = {
        "text": {"labelled", "plain"},
        "pair": {"labelled"},
        "label": {"labelled", "judged"},
        "prompt": {"answered", "preferred", "judged", "asked"},
        "context": {"answered", "preferred", "judged", "asked"},
        "response": {"answered", "judged", "asked"},
        "chosen": {"preferred"},
        "rejected": {"preferred"},
        "messages": {"dialogue"},
        "tokens": {"tagged"},
        "tags": {"tagged"},
    }
    given = [homes[role] for role in homes if getattr(flags, role) is not None]
    if not given:
        return set()
    left = set.intersection(*given)
    if not left:
        names = ", ".join(f"--{role}" for role in homes if getattr(flags, role) is not None)
        raise DataError(f"{names} do not belong together: they describe {len(given)} different shapes of data.")
    return left


def _flags_for(shapes: Iterable[str]) -> str:
    needed = {
        "labelled": "--text and --label",
        "tagged": "--tokens and --tags",
        "dialogue": "--messages",
        "answered": "--prompt and --response",
        "preferred": "--prompt, --chosen and --rejected",
        "judged": "--prompt, --response and --label",
        "asked": "--prompt",
        "plain": "--text",
    }
    return ", or ".join(needed[s] for s in shapes)


def _labelled(finder: _Finder) -> dict[str, str | None] | None:
    label = finder.flag("label") or (finder.usual("label", LABEL) if _holds_labels(finder) else None)
    if label is None:
        return None
    text, pair = finder.flag("text"), finder.flag("pair")
    if text is None and pair is None:
        pairs = [(finder.lower[a], finder.lower[b]) for a, b in PAIRS if a in finder.lower and b in finder.lower]
        pairs = [p for p in pairs if label not in p]
        if len(pairs) > 1:
            raise DataError(
                f"{finder.table.source}: {' and '.join(str(p) for p in pairs)} could each be the two texts."
                f" Say which with --text and --pair. Its columns are {finder.listed}."
            )
        if pairs:
            text, pair = pairs[0]
    if text is None:
        text = finder.usual("text", TEXT, taken=(label, pair))
    return None if text is None else {"text": text, "pair": pair, "label": label}


def _holds_labels(finder: _Finder) -> bool:
    """`labels` beside `tokens` are tags."""
    return not ("labels" in finder.lower and any(n in finder.lower for n in TOKENS))


def _tagged(finder: _Finder) -> dict[str, str | None] | None:
    tokens = finder.pick("tokens", TOKENS)
    if tokens is None:
        return None
    tags = finder.pick("tags", TAGS, taken=(tokens,))
    return None if tags is None else {"tokens": tokens, "tags": tags}


def _dialogue(finder: _Finder) -> dict[str, str | None] | None:
    messages = finder.pick("messages", MESSAGES)
    return None if messages is None else {"messages": messages, **_around(finder), "history": None}


def _answered(finder: _Finder) -> dict[str, str | None] | None:
    own = "prompt" in finder.lower and "response" in finder.lower  # our own names leave no doubt
    response = finder.flag("response") or finder.usual("response", ("response",) if own else RESPONSE)
    if response is None:
        return None
    if own and finder.flags.prompt is None and finder.flags.context is None and response == finder.lower["response"]:
        context = finder.usual("context", CONTEXT)
        return {"prompt": finder.lower["prompt"], "context": context, "response": response, **_around(finder)}
    prompt = finder.pick("prompt", PROMPT, taken=(response, finder.flags.context))
    context = finder.pick("context", CONTEXT, taken=(response, prompt))
    if prompt is None:  # `input` and `output`, without an instruction
        prompt, context = context, None
    if prompt is None:
        return None
    return {"prompt": prompt, "context": context, "response": response, **_around(finder)}


def _judged(finder: _Finder) -> dict[str, str | None] | None:
    answered = _answered(finder)
    label = finder.pick("label", JUDGED, taken=tuple((answered or {}).values()))
    return None if answered is None or label is None else {**answered, "label": label}


def _asked(finder: _Finder) -> dict[str, str | None] | None:
    """A prompt; what is right, where a column says so, is for whoever rewards an answer."""
    known = "prompt" in finder.lower and finder.flags.prompt is None  # our own name leaves no doubt
    response = finder.flag("response") or finder.usual("response", RESPONSE, taken=(finder.flags.prompt,))
    prompt = finder.lower["prompt"] if known else finder.pick("prompt", PROMPT, taken=(response, finder.flags.context))
    context = finder.pick("context", CONTEXT, taken=(response, prompt))
    if prompt is None:
        prompt, context = context, None
    if prompt is None:
        return None
    return {"prompt": prompt, "context": context, "response": response, **_around(finder)}


def _preferred(finder: _Finder) -> dict[str, str | None] | None:
    chosen, rejected = finder.pick("chosen", CHOSEN), finder.pick("rejected", REJECTED)
    if chosen is None or rejected is None:
        return None
    prompt = finder.pick("prompt", PROMPT, taken=(chosen, rejected))
    if prompt is None and any(isinstance(row.get(chosen), str) for row in finder.table.rows[:1]):
        raise DataError(
            f"{finder.table.source}: {chosen!r} and {rejected!r} are texts; which column is the prompt that they "
            f"answer? For example --prompt {_shell(finder.names[0])}. Its columns are {finder.listed}."
        )
    context = finder.pick("context", CONTEXT, taken=(prompt,)) if prompt is not None else None
    more = {name: finder.lower.get(name) for name in ("margin", "share")}
    return {"prompt": prompt, "context": context, "chosen": chosen, "rejected": rejected, **more, **_around(finder)}


def _around(finder: _Finder) -> dict[str, str | None]:
    """What stands around a conversation in columns of its own."""
    return {name: finder.lower.get(name) for name in ("system", "history", "tools")}


def _plain(finder: _Finder) -> dict[str, str | None] | None:
    text = finder.pick("text", TEXT)
    return None if text is None else {"text": text}


def cell(table: Table, index: int, column: str) -> Any:
    """One cell, with an error that names its place where the row lacks the column.

    Raises:
        DataError: the row has no such field.
    """
    row = table.rows[index]
    if column not in row:
        raise DataError(
            f"{table.places[index]}: no field {column!r}; its fields are {', '.join(map(repr, row)) or 'none'}."
            " Add the field, or remove the row."
        )
    return row[column]


def text_complaint(value: Any, role: str) -> str | None:
    """Why a cell is no usable text, or nothing."""
    if value is None:
        return f"{role} is missing"
    if not isinstance(value, str):
        return f"{role} is {value!r} ({type(value).__name__}), not text"
    return None if value.strip() else f"{role} is empty"


def label_name(value: Any) -> str:
    """The name of a class as a cell has it: one rule for split, task and messages.

    >>> [label_name(v) for v in (True, "True", 1, 1.0, "1.0", " Yes ")]
    ['true', 'true', '1', '1', '1', 'Yes']
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    text = str(value).strip()
    if text in ("True", "False", "TRUE", "FALSE"):  # as Python and Excel write what JSON has as true and false
        return text.lower()
    whole, dot, rest = text.partition(".")
    # 1.0 in one half and 1 in the other are one class.
    return whole if dot and not rest.strip("0") and rest and whole.lstrip("+-").isdigit() else text


NO_LABELS = frozenset(
    ("na", "nan", "none", "null", "nil", "unknown", "unk", "undefined", "tbd", "todo", "fixme", "xxx", "asdf")
)


def reads_like_no_label(name: str) -> bool:
    """Whether a class is called as people write that there is none.

    >>> [reads_like_no_label(n) for n in ("?", "n/a", "Unknown", "+1", "nanny")]
    [True, True, True, False, False]
    """
    letters = "".join(ch for ch in name.casefold() if ch.isalnum())
    return letters in NO_LABELS or (not letters and all(ch in "?-–—_./#*" for ch in name))


def is_blank(value: Any) -> bool:
    """Whether a cell of a label holds nothing: no value, no text, or a number that is none."""
    return value is None or (isinstance(value, str) and not value.strip()) or bool(value != value)
