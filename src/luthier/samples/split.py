"""The standard split: made once, after duplicates are gone, stratified, and the same on every machine.

Two texts are the same when they agree after runs of white space become one blank, the ends are stripped and case is
folded. A row is its inputs where it has a label (`text`, `text_pair`), else the whole row.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from luthier.core import DataError, key
from luthier.samples.parsers import Parsed, Row

__all__ = ["SEED", "TEST_SHARE", "Halves", "same", "standard_split"]

TEST_SHARE = 0.2
SEED = 0


@dataclass(frozen=True, kw_only=True)
class Halves:
    """The two halves and the ledger of how they came about.

    `counts` holds: shipped (rows read), left_out (by the reader, for its reasons), unique (rows that remain after
    exact duplicates went), dropped_within (copies inside one half), dropped_across (rows of the source's own training
    half whose inputs also stand in its test half), conflicts (inputs that carry two labels), dropped_conflicts (rows
    that went because of them), train, test.
    """

    train: list[Row]
    test: list[Row]
    counts: dict[str, int]
    conflicts: list[str]
    left_out: dict[str, int]


def same(value: Any) -> str:
    """The form in which two values are compared.

    >>> same("  How  tall?") == same("how tall?")
    True
    """
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)
    return " ".join(text.split()).casefold()


def standard_split(name: str, parsed: Parsed) -> Halves:
    """Remove duplicates and label conflicts, then split where the source did not.

    Raises:
        DataError: a half ends up empty.
    """

    def identity(row: Row) -> str:
        if "label" in row:
            return same(row["text"]) + "\x1f" + same(row.get("text_pair", ""))
        return same({k: same(v) for k, v in row.items()})

    shipped = len(parsed.rows) + len(parsed.test or []) + sum(parsed.left_out.values())
    rows, copies = _first_of_each(parsed.rows, identity)
    own_test, copies_in_test = _first_of_each(parsed.test or [], identity)
    unique = len({identity(row) for row in rows + own_test})

    conflicts = _conflicts(rows + own_test, identity)
    before = len(rows) + len(own_test)
    rows = [row for row in rows if identity(row) not in conflicts]
    own_test = [row for row in own_test if identity(row) not in conflicts]
    dropped_conflicts = before - len(rows) - len(own_test)

    held = {identity(row) for row in own_test}
    train = [row for row in rows if identity(row) not in held]
    across = len(rows) - len(train)
    if parsed.test is None:
        in_test = _choose_test(name, train, parsed.source or identity)
        own_test = [row for row, chosen in zip(train, in_test, strict=True) if chosen]
        train = [row for row, chosen in zip(train, in_test, strict=True) if not chosen]
    if not train or not own_test:
        raise DataError(f"{name}: {len(train)} rows to train on and {len(own_test)} to test on; both must have some.")
    counts = {
        "shipped": shipped,
        "left_out": sum(parsed.left_out.values()),
        "unique": unique,
        "dropped_within": copies + copies_in_test,
        "dropped_across": across,
        "conflicts": len(conflicts),
        "dropped_conflicts": dropped_conflicts,
        "train": len(train),
        "test": len(own_test),
    }
    return Halves(
        train=train,
        test=own_test,
        counts=counts,
        conflicts=sorted(conflicts.values()),
        left_out=dict(parsed.left_out),
    )


def _first_of_each(rows: list[Row], identity: Callable[[Row], str]) -> tuple[list[Row], int]:
    """Keep the first row of each (inputs, label); say how many copies went."""
    seen: set[tuple[str, str]] = set()
    kept = []
    for row in rows:
        mark = (identity(row), str(row.get("label", "")))
        if mark not in seen:
            seen.add(mark)
            kept.append(row)
    return kept, len(rows) - len(kept)


def _conflicts(rows: list[Row], identity: Callable[[Row], str]) -> dict[str, str]:
    """Identity -> a line that shows the text and its labels, for inputs that carry more than one label."""
    labels: dict[str, set[str]] = defaultdict(set)
    shown: dict[str, str] = {}
    for row in rows:
        if "label" in row:
            labels[identity(row)].add(row["label"])
            shown.setdefault(identity(row), " | ".join(str(row[k]) for k in ("text", "text_pair") if k in row))
    return {i: f"{' / '.join(sorted(ls))}: {shown[i][:200]}" for i, ls in labels.items() if len(ls) > 1}


def _choose_test(name: str, rows: list[Row], source: Callable[[Row], str]) -> list[bool]:
    """Which rows go to the test half: a fifth of the rows of each class, all rows of one source together.

    A source belongs to the class that most of its rows have. Sources are drawn in the order of a keyed number of their
    content, so a changed order of the file does not change the split.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[same(source(row))].append(index)
    strata: dict[str, list[str]] = defaultdict(list)
    for group, members in groups.items():
        labels = Counter(str(rows[i].get("label", "")) for i in members)
        strata[min(labels, key=lambda label: (-labels[label], label))].append(group)
    chosen = [False] * len(rows)
    for label in sorted(strata):
        drawn = sorted(strata[label], key=lambda group: (key(SEED, "standard split", name, group), group))
        wanted = round(TEST_SHARE * sum(len(groups[group]) for group in drawn))
        for group in drawn:
            if wanted <= 0:
                break
            for index in groups[group]:
                chosen[index] = True
            wanted -= len(groups[group])
    return chosen
