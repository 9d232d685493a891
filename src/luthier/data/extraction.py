r"""What stands in a text, as a typed structure: entities, relations or events; written as a line and read back.

    ner        person: Ada; place: Paris
    relation   born in: Ada, Paris
    event      attack: bombed (place: Paris, target: the old bridge)

Nothing found is written "none". A backslash stands before each sign of the format that is part of a name or a span, so
that reading gives what was written, whatever the text holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from luthier.core import DataError, near

__all__ = ["NOTHING", "Item", "Kind", "Read", "micro_f1", "read_items", "read_line", "units", "written"]

Kind = Literal["ner", "relation", "event"]
NOTHING = "none"
SIGNS = "\\;:,()"
FIELDS: dict[str, tuple[str, ...]] = {
    "ner": ("type", "text"),
    "relation": ("type", "head", "tail"),
    "event": ("type", "trigger", "arguments"),
}


@dataclass(frozen=True)
class Item:
    """One entity (its span), relation (head and tail) or event (its trigger), with (role, span) of its arguments."""

    type: str
    spans: tuple[str, ...]
    arguments: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Read:
    """What a line says, and what of it could not be read."""

    items: tuple[Item, ...]
    problems: tuple[str, ...] = ()


def read_items(value: Any, kind: Kind, text: str, where: str) -> tuple[Item, ...]:
    """The items of a row, from a list of objects; every span must stand in the text, letter for letter.

    Raises:
        DataError: says which item, and what of it.
    """
    if not isinstance(value, list | tuple):
        raise DataError(f"{where} is {str(value)[:60]!r}; it must be a list of objects with {', '.join(FIELDS[kind])}.")
    found = []
    for number, given in enumerate(value, 1):
        at = f"{where}, item {number}"
        if not isinstance(given, dict):
            raise DataError(f"{at} is {str(given)[:60]!r}; it must have {', '.join(FIELDS[kind])}.")
        strange = [str(name) for name in given if name not in FIELDS[kind]]
        if strange:
            raise DataError(f"{at}: no field {strange[0]!r} is read.{near(strange[0], FIELDS[kind])}")
        names = [name for name in FIELDS[kind] if name != "arguments"]
        values = [_said(given.get(name), f"{at}: {name}") for name in names]
        arguments = []
        for k, one in enumerate(given.get("arguments") or (), 1):
            if not isinstance(one, dict) or set(one) != {"role", "text"}:
                raise DataError(f"{at}: argument {k} is {str(one)[:60]!r}; it must have role and text.")
            arguments.append((_said(one["role"], f"{at}: role"), _said(one["text"], f"{at}: argument {k}")))
        lost = [span for span in (*values[1:], *(span for _, span in arguments)) if span not in text]
        if lost:
            raise DataError(f"{at}: {lost[0]!r} does not stand in the text {text[:60]!r}. Give it letter for letter.")
        found.append(Item(values[0], tuple(values[1:]), tuple(arguments)))
    return tuple(found)


def _said(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value or value != value.strip():
        raise DataError(f"{where} is {value!r}; it must be words, without a blank before or behind them.")
    if value == NOTHING and where.endswith("type"):
        raise DataError(f"{where} is {value!r}, which stands for nothing found. Give the type another name.")
    return value


def written(items: Sequence[Item], kind: Kind) -> str:
    """The items as a line."""
    return "; ".join(_one(item, kind) for item in items) or NOTHING


def _one(item: Item, kind: Kind) -> str:
    said = f"{_marked(item.type)}: {', '.join(map(_marked, item.spans))}"
    if kind != "event":
        return said
    return f"{said} ({', '.join(f'{_marked(role)}: {_marked(span)}' for role, span in item.arguments)})"


def _marked(text: str) -> str:
    return "".join(f"\\{sign}" if sign in SIGNS else sign for sign in text).replace("\n", "\\n")


def _plain(text: str) -> str:
    return re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], text.strip(), flags=re.DOTALL)


def _parted(text: str, sign: str) -> list[str]:
    """The pieces between a sign, where no backslash stands before it and no bracket is open around it."""
    pieces, depth, start, i = [], 0, 0, 0
    while i < len(text):
        if text[i] == "\\":
            i += 2
            continue
        depth += (text[i] == "(") - (text[i] == ")")
        if text[i] == sign and depth <= 0:
            pieces.append(text[start:i])
            start = i + 1
        i += 1
    return [*pieces, text[start:]]


def read_line(
    line: str, kind: Kind, *, types: Sequence[str] = (), text: str | None = None, strict: bool = False
) -> Read:
    """Read a line that a model wrote; what cannot be read is a problem, and no error.

    Args:
        types: those that were asked for; another one is a problem, and stays: it is a wrong answer.
        text: what was read; a span that does not stand in it is a problem, and stays.
        strict: a line with any problem of form gives no item at all.
    """
    items: list[Item] = []
    broken: list[str] = []
    wrong: list[str] = []
    for piece in [] if line.strip() == NOTHING else _parted(line, ";"):
        item = _read_one(piece, kind)
        if isinstance(item, str):
            broken.append(item)
            continue
        items.append(item)
        if types and item.type not in types:
            wrong.append(f"the type {item.type!r} was not asked for")
        spans = (*item.spans, *(span for _, span in item.arguments))
        wrong += [f"{span!r} does not stand in the text" for span in spans if text is not None and span not in text]
    return Read(() if strict and broken else tuple(items), (*broken, *wrong))


def _read_one(piece: str, kind: Kind) -> Item | str:
    """An item, or why there is none."""
    shown = piece.strip()[:60]
    if not shown:
        return "a piece is empty"
    if _open(piece):
        return f"{shown!r}: its brackets are not balanced"
    arguments: list[tuple[str, str]] = []
    if kind == "event":
        start = _bracket(piece)
        if start < 0 or not piece.rstrip().endswith(")"):
            return f"{shown!r}: no brackets with arguments"
        piece, inside = piece[:start], piece.rstrip()[start + 1 : -1]
        for part in _parted(inside, ",") if inside.strip() else []:
            both = [_plain(half) for half in _parted(part, ":")]
            if len(both) != 2 or not all(both):
                return f"{shown!r}: {part.strip()!r} is not role: words"
            arguments.append((both[0], both[1]))
    halves = _parted(piece, ":")
    if len(halves) != 2:
        return f"{shown!r}: not one colon between type and words"
    spans = [_plain(half) for half in (_parted(halves[1], ",") if kind == "relation" else [halves[1]])]
    if not _plain(halves[0]) or not all(spans):
        return f"{shown!r}: no type, or no words"
    if len(spans) != (2 if kind == "relation" else 1):
        return f"{shown!r}: {len(spans)} parts, where a relation has a head and a tail"
    return Item(_plain(halves[0]), tuple(spans), tuple(arguments))


def _bracket(piece: str) -> int:
    """Where the first bracket opens that no backslash stands before; -1 without one."""
    match = re.match(r"(?:[^\\(]|\\.)*\(", piece, re.DOTALL)
    return match.end() - 1 if match else -1


def _open(piece: str) -> bool:
    """Whether a bracket is not closed, or closed before it was opened."""
    depth = 0
    for sign in re.sub(r"\\.", "", piece, flags=re.DOTALL):
        depth += (sign == "(") - (sign == ")")
        if depth < 0:
            return True
    return depth != 0


def units(items: Iterable[Item], kind: Kind) -> set[tuple[str, ...]]:
    """What counts as one thing found: an entity, a relation; of an event its trigger, and each argument."""
    found: set[tuple[str, ...]] = set()
    for item in items:
        found.add((item.type, *item.spans))
        found |= {(item.type, "argument", role, span) for role, span in item.arguments} if kind == "event" else set()
    return found


def micro_f1(wanted: Sequence[Iterable[Item]], found: Sequence[Iterable[Item]], kind: Kind) -> dict[str, float]:
    """Precision, recall and F1 over all rows together; a thing is right where type and words are all the same.

    >>> ada, paris = Item("person", ("Ada",)), Item("place", ("Paris",))
    >>> micro_f1([[ada, paris], []], [[ada], [paris]], "ner")["micro_f1"]
    0.5
    """
    pairs = [(units(w, kind), units(f, kind)) for w, f in zip(wanted, found, strict=True)]
    right = sum(len(w & f) for w, f in pairs)
    n_wanted, n_found = sum(len(w) for w, _ in pairs), sum(len(f) for _, f in pairs)
    return {
        "precision": right / n_found if n_found else 0.0,
        "recall": right / n_wanted if n_wanted else 0.0,
        "micro_f1": 2 * right / (n_wanted + n_found) if n_wanted + n_found else 1.0,
        "right": right,
        "wanted": n_wanted,
        "found": n_found,
    }
