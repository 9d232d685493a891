"""Which column is which: found by the names that data sets use, or told by flags, and always said aloud."""

from collections.abc import Iterable
from dataclasses import dataclass
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
MESSAGES = ("messages", "conversations", "conversation", "dialog", "dialogue", "turns")
TOKENS = ("tokens", "words")
TAGS = ("tags", "ner_tags", "pos_tags", "labels")

SHAPES = {
    "labelled": "a text with a label",
    "tagged": "words with tags",
    "dialogue": "chat messages",
    "answered": "a prompt with its response",
    "plain": "text alone",
}
SHAPES_OF = {
    "auto": tuple(SHAPES),
    "classification": ("labelled",),
    "regression": ("labelled",),
    "token_classification": ("tagged",),
    "causal_lm": ("dialogue", "answered", "plain"),
    "seq2seq": ("answered",),
}


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns that a task reads; those that the shape of the data does not have are `None`."""

    shape: str
    """one of SHAPES: labelled, tagged, dialogue, answered, plain"""
    text: str | None = None
    pair: str | None = None
    label: str | None = None
    prompt: str | None = None
    context: str | None = None
    response: str | None = None
    messages: str | None = None
    tokens: str | None = None
    tags: str | None = None
    unused: tuple[str, ...] = ()

    def used(self) -> dict[str, str]:
        """Role -> column, of the roles that are filled."""
        roles = ("text", "pair", "label", "prompt", "context", "response", "messages", "tokens", "tags")
        return {role: column for role in roles if (column := getattr(self, role)) is not None}

    def sentence(self) -> str:
        """The choice in words, for the log."""
        chosen = ", ".join(f"{role} = {column!r}" for role, column in self.used().items())
        rest = f"; not used: {', '.join(repr(c) for c in self.unused)}" if self.unused else ""
        return f"columns: {SHAPES[self.shape]} ({chosen}{rest})"

    def content(self, row: Row) -> str:
        """What makes two rows the same: the inputs where there is a label, else the whole."""
        return "\x1f".join([normalised(row.get(name) or "") for name in self._content_columns])

    @cached_property
    def _content_columns(self) -> list[str]:
        roles = {"labelled": ("text", "pair"), "tagged": ("tokens",)}.get(
            self.shape, ("messages", "prompt", "context", "response", "text")
        )
        return [name for role in roles if (name := getattr(self, role)) is not None]

    def outcome(self, row: Row) -> str:
        """The label or tags, as text; empty where the shape has none."""
        name = self.label if self.shape == "labelled" else self.tags if self.shape == "tagged" else None
        return "" if name is None else normalised(row.get(name))


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
            f"{self.table.source}: no column {wanted!r} (asked for by --{role}).{near(wanted, self.names)}"
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
    return Columns(shape=shape, unused=tuple(n for n in finder.names if n not in chosen.values()), **roles)


def _shapes_of_flags(flags: DataSpec) -> set[str]:
    """Which shapes the given flags leave open; empty where no flag was given."""
    homes: dict[str, set[str]] = {
        "text": {"labelled", "plain"},
        "pair": {"labelled"},
        "label": {"labelled"},
        "prompt": {"answered"},
        "context": {"answered"},
        "response": {"answered"},
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
    return None if messages is None else {"messages": messages}


def _answered(finder: _Finder) -> dict[str, str | None] | None:
    own = "prompt" in finder.lower and "response" in finder.lower  # our own names leave no doubt
    response = finder.flag("response") or finder.usual("response", ("response",) if own else RESPONSE)
    if response is None:
        return None
    if own and finder.flags.prompt is None and finder.flags.context is None and response == finder.lower["response"]:
        context = finder.usual("context", CONTEXT)
        return {"prompt": finder.lower["prompt"], "context": context, "response": response}
    prompt = finder.pick("prompt", PROMPT, taken=(response, finder.flags.context))
    context = finder.pick("context", CONTEXT, taken=(response, prompt))
    if prompt is None:  # `input` and `output`, without an instruction
        prompt, context = context, None
    return None if prompt is None else {"prompt": prompt, "context": context, "response": response}


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
