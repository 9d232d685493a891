"""Rows from anywhere, in one shape; the split; duplicates, counted.

A source is a file (.csv, .tsv, .jsonl, .parquet), a folder of .txt, `sample:NAME`, or a data set's name on the hub.
The bytes of files are read by `luthier.trust.row_files`, which complains about each malformed line; here we only ask.
"""

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from luthier.core import DataError, key, near
from luthier.runs.spec import DataSpec
from luthier.trust import row_files as trusted

__all__ = [
    "Duplicates",
    "Table",
    "count_duplicates",
    "fold_of",
    "halves",
    "hold_out",
    "load_halves",
    "load_rows",
    "normalised",
    "rows_of",
    "split_rows",
]

Row = dict[str, Any]

FILE_ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".txt", ".json", ".xlsx", ".gz")
TEST_NAMES = ("test", "validation", "dev")


@dataclass(frozen=True)
class Table:
    """Rows and where each stands, such as `questions.csv:12`."""

    rows: list[Row] = field(repr=False)
    places: list[str] = field(repr=False)
    source: str
    notes: tuple[str, ...] = ()
    """what was recognised when the rows were read, in sentences"""
    origin: str = ""
    """digest of the bytes that all rows were read from, in this order; empty where there is none"""

    def __post_init__(self) -> None:
        assert len(self.rows) == len(self.places)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> list[str]:
        """Every column, in the order of first appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def take(self, indices: Iterable[int]) -> "Table":
        """The rows at `indices`, in that order."""
        chosen = list(indices)
        return Table([self.rows[i] for i in chosen], [self.places[i] for i in chosen], self.source)

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of all rows in order: changes when any value of any row does. Rows do not change
        once they have been read, so it is computed once.
        """
        return self._digest[0]

    def is_plain(self) -> bool:
        """Whether every value has a JSON of its own; a date, say, has only that of its text."""
        return self._digest[1]

    def known(self, fingerprint: str, is_plain: bool) -> "Table":
        """This table, told what was found out about the same rows before. Returns itself."""
        self.__dict__["_digest"] = (fingerprint, is_plain)
        return self

    @cached_property
    def _digest(self) -> tuple[str, bool]:
        others: list[str] = []

        def as_text(value: Any) -> str:
            others.append(type(value).__name__)
            return str(value)

        digest = hashlib.sha256()
        encode = json.JSONEncoder(sort_keys=True, default=as_text, ensure_ascii=True).encode
        for row in self.rows:
            digest.update(encode(row).encode())
            digest.update(b"\n")
        return digest.hexdigest(), not others


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """Rows whose content repeats, after case and white space are made alike."""

    in_train: int
    in_test: int
    across: int
    """rows of the test half whose content also stands in the training half"""
    conflicts: int
    """contents that stand in the data with more than one label"""
    examples: tuple[tuple[str, str], ...] = ()
    """a few (place in train, place in test) of the rows counted in `across`"""

    def sentence(self) -> str:
        """What was found, for the log."""
        text = f"duplicates: {self.in_train} in train, {self.in_test} in test, {self.across} of test also in train"
        if self.examples:
            text += f" (such as {self.examples[0][1]} = {self.examples[0][0]})"
        if self.conflicts:
            text += f"; {self.conflicts} texts carry more than one label"
        return text

    def refuse_leakage(self) -> None:
        """Stop when the halves share rows.

        Raises:
            DataError: some do; names places.
        """
        if self.across:
            pairs = "; ".join(f"{test} = {train}" for train, test in self.examples)
            raise DataError(
                f"{self.across} rows of the test half also stand in the training half ({pairs}), so the score would"
                " reward memory. Remove them, let luthier split the data (leave out --test), or go on without --strict."
            )


def load_rows(source: str, *, delimiter: str | None = None, encoding: str | None = None) -> tuple[Table, Table | None]:
    """Read all rows of a source.

    Args:
        delimiter, encoding: of a .csv file; recognised where they are not given.

    Returns:
        The training rows, and the test rows where the source itself has a test half (samples and hub names may).

    Raises:
        DataError: nothing of that name, an unreadable or malformed file, or no rows at all.
        UnknownName: no sample of that name.
    """
    if source == "-":
        raise DataError(
            "-: rows of standard input can be answered, and not learnt from: a run must find its rows again. "
            "Write them to a file, and name that."
        )
    if source.startswith("sample:"):
        train, test = _load_sample(source)
    elif (path := Path(source).expanduser()).exists():
        train, test = _load_path(path, delimiter, encoding), None
    elif path.suffix.lower() in FILE_ENDINGS or source.startswith((".", "/", "~")):
        raise DataError(_no_such_file(path))
    else:
        train, test = _load_hub(source)
    for table in (train, test):
        if table is not None and not table.rows:
            raise DataError(f"{table.source}: holds no rows. Give a source with at least one row of text.")
    return train, test


def load_halves(spec: DataSpec) -> tuple[Table, Table | None]:
    """The training rows of a spec, and its test rows: those of `test` where that is named, else the source's own.

    Where `test` has two halves itself, its test half is meant.

    Raises:
        See `load_rows`.
    """
    train, held = load_rows(spec.source, delimiter=spec.delimiter, encoding=spec.encoding)
    if spec.test is not None:
        first, second = load_rows(spec.test, **spec.stored(spec.test))
        held = second if second is not None else first
    return train, held


def rows_of(data: Any) -> list[Row]:
    """The rows of a table in memory: a DataFrame, a data set of `datasets`, or a list of dictionaries.

    Raises:
        DataError: it is none of these, or holds no row.
    """
    if hasattr(data, "to_dict") and hasattr(data, "columns"):
        rows = data.to_dict("records")
    elif hasattr(data, "features") and hasattr(data, "column_names"):
        rows = _with_label_names(data)
    elif isinstance(data, Sequence) and not isinstance(data, str | bytes):
        rows = list(data)
    else:
        raise DataError(
            f"data: {type(data).__name__} is no table. Give a file, sample:NAME, a DataFrame, a data set of "
            "`datasets`, or a list of dictionaries, one for each row."
        )
    if not rows:
        raise DataError("data: holds no rows. Give at least one row of text.")
    wrong = next((i for i, row in enumerate(rows) if not isinstance(row, Mapping)), None)
    if wrong is not None:
        raise DataError(
            f"data[{wrong}]: {type(rows[wrong]).__name__} is no row. Give a dictionary for each, such as "
            '{"text": "...", "label": "..."}.'
        )
    return [dict(row) for row in rows]


def _no_such_file(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else None
    hint = (
        near(path.name, [p.name for p in folder.iterdir()]) if folder else f" The folder {path.parent} does not exist."
    )
    return f"{path}: no such file.{hint} Give a .csv, .tsv, .jsonl or .parquet file, a folder of .txt, or sample:NAME."


def _load_path(path: Path, delimiter: str | None, encoding: str | None) -> Table:
    found = trusted.read(path, as_found=True, delimiter=delimiter, encoding=encoding)
    notes = tuple(f"{path.name}: {note}" for note in found.notes)
    return Table(found.rows, found.places, str(path), notes, found.digest)


def _load_sample(source: str) -> tuple[Table, Table | None]:
    from luthier import samples

    loaded = samples.load_sample(source.removeprefix("sample:"))
    return _named(loaded.train, source, "train"), _named(loaded.test, source, "test")


def _named(rows: Sequence[Row] | None, source: str, half: str) -> Any:
    if rows is None:
        return None
    name = f"{source}[{half}]"
    return Table(list(rows), [f"{name}:{i + 1}" for i in range(len(rows))], name)


def _load_hub(source: str) -> tuple[Table, Table | None]:
    # Imported here: `datasets` takes a second to import, and only hub names need it.
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{source!r} is no file here, and data sets of the hub need the package datasets, which is not installed. "
            f"Check the path, or install it: pip install 'luthier[hub]'.{_near_file(source)}"
        ) from error

    name, _, config = source.partition(":")
    try:
        # No remote code: data sets that are scripts are refused by `datasets` itself since 4.0.
        halves = datasets.load_dataset(name, config or None)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise DataError(
            f"{source!r} is no file here and could not be loaded as a data set from the hub"
            f" ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'})."
            f" Check the path, or the connection; `luthier samples` lists data sets that need no hub."
            f"{_near_file(source)}"
        ) from error
    if "train" not in halves:
        raise DataError(
            f"{source}: has the halves {', '.join(halves)}, but no 'train'. Save one as a file and name that."
        )
    test = next((n for n in TEST_NAMES if n in halves), None)
    return (
        _named(_with_label_names(halves["train"]), source, "train"),
        _named(_with_label_names(halves[test]), source, test) if test else None,
    )


def _near_file(source: str) -> str:
    path = Path(source)
    return near(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""


def _with_label_names(half: Any) -> list[Row]:
    """Rows with the names of the labels in place of their numbers; -1, the hub's 'no label', stays a number."""
    named = {c: f for c, f in half.features.items() if type(f).__name__ == "ClassLabel"}
    rows: list[Row] = [dict(row) for row in half]
    for row in rows:
        for column, feature in named.items():
            if isinstance(row[column], int) and row[column] >= 0:
                row[column] = feature.int2str(row[column])
    return rows


def normalised(value: Any) -> str:
    """The content of a cell with case and white space made alike.

    >>> normalised("  How  FAR\\nis it? ")
    'how far is it?'
    """
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)
    if text.isascii():  # the same, in half the time
        return " ".join(text.lower().split())
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def count_duplicates(
    train: Table, test: Table | None, content: Callable[[Row], str], label: Callable[[Row], str] | None = None,
    whole: Callable[[Row], str] | None = None,
) -> Duplicates:  # fmt: skip
    """Count repeated rows within and across the halves.

    Args:
        content: what makes two rows the same, such as `Columns.content`.
        label: what they should agree on, such as `Columns.outcome`.
        whole: what makes a row a copy within its half, where that is more: `Columns.whole`.
    """
    in_train = [content(row) for row in train.rows]
    in_test = [content(row) for row in test.rows] if test is not None else []
    first = dict(
        zip(reversed(in_train), range(len(in_train) - 1, -1, -1), strict=True)
    )  # the row where it stands first
    across = [i for i, same in enumerate(in_test) if same in first]
    examples = [(train.places[first[in_test[i]]], test.places[i]) for i in across[:3]] if test is not None else []
    repeats, repeats_in_test = len(in_train) - len(first), len(in_test) - len(set(in_test))
    if whole is not None and repeats:
        repeats = _copies(train, in_train, whole)
    if whole is not None and repeats_in_test and test is not None:
        repeats_in_test = _copies(test, in_test, whole)
    labels: dict[str, set[str]] = {}
    if label is not None and (repeats or repeats_in_test or across):
        # Only contents that repeat can disagree, and most do not.
        times = Counter(in_train)
        times.update(in_test)
        for same, row in zip(in_train + in_test, train.rows + (test.rows if test is not None else []), strict=True):
            if times[same] > 1:
                labels.setdefault(same, set()).add(label(row))
    return Duplicates(
        in_train=repeats,
        in_test=repeats_in_test,
        across=len(across),
        conflicts=sum(len(found) > 1 for found in labels.values()),
        examples=tuple(examples),
    )


def _copies(table: Table, contents: Sequence[str], whole: Callable[[Row], str]) -> int:
    """Rows that are copies of an earlier one, asked of those alone whose content is not their own."""
    times = Counter(contents)
    asked = [row for row, same in zip(table.rows, contents, strict=True) if times[same] > 1]
    return len(asked) - len({whole(row) for row in asked})


def split_rows(
    table: Table, share: float, seed: int, content: Callable[[Row], str], stratum: Callable[[Row], str] | None = None
) -> tuple[Table, Table | None]:
    """`hold_out` and `halves` in one; with a share of 0 all rows stay, and there is no second half."""
    if share == 0:
        return table, None
    return halves(table, hold_out(table, share, seed, content, stratum))


def halves(table: Table, held: Sequence[int]) -> tuple[Table, Table]:
    """The rows that are not held out, and those that are; both in the order of the table."""
    chosen = bytearray(len(table))
    for i in held:
        chosen[i] = 1
    return (
        table.take(i for i, out in enumerate(chosen) if not out),
        table.take(i for i, out in enumerate(chosen) if out),
    )


def hold_out(
    table: Table, share: float, seed: int, content: Callable[[Row], str], stratum: Callable[[Row], str] | None = None
) -> list[int]:
    """Choose a share of the rows, of each stratum alike.

    A row's half follows from its content and the seed alone, so repeated rows stay together and the order of the file
    does not matter. Each stratum keeps at least one content for training.

    Args:
        share: of the rows, above 0.
        stratum: such as the label; rows of one content share the stratum of the first.

    Returns:
        The numbers of the rows held out, ascending.

    Raises:
        DataError: no row can be held out.
    """
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(table.rows):
        groups.setdefault(content(row), []).append(i)
    strata: dict[str, list[str]] = {}
    for same, members in groups.items():
        strata.setdefault(stratum(table.rows[members[0]]) if stratum else "", []).append(same)
    # The share is met over all strata together: the rest that one stratum cannot give is carried to the next.
    held: list[int] = []
    owed = 0.0
    for name in sorted(strata):
        ranked = sorted(strata[name], key=lambda same: key(seed, "split", same))
        owed += share * sum(len(groups[same]) for same in ranked)
        for same in ranked[:-1]:
            if len(groups[same]) > owed + 0.5:
                break
            held += groups[same]
            owed -= len(groups[same])
    if not held:
        counts = Counter({name: len(members) for name, members in strata.items()})
        raise DataError(
            f"{table.source}: {len(groups)} different rows ({dict(counts.most_common(5))}) are too few to hold out"
            f" {share:.0%}. Name test rows with --test, or train without any by --test-share 0."
        )
    return sorted(held)


def fold_of(
    table: Table, number: int, folds: int, seed: int, content: Callable[[Row], str],
    stratum: Callable[[Row], str] | None = None,
) -> list[int]:  # fmt: skip
    """The rows of fold `number` (from 1) of `folds`: each row is in one fold, of each stratum alike.

    As in `hold_out` a row's fold follows from its content and the seed, and repeated rows stay together. A stratum of
    one content is in no fold: it is always learnt.

    Returns:
        Their numbers, ascending.

    Raises:
        DataError: fewer contents than folds.
    """
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(table.rows):
        groups.setdefault(content(row), []).append(i)
    strata: dict[str, list[str]] = {}
    for same, members in groups.items():
        strata.setdefault(stratum(table.rows[members[0]]) if stratum else "", []).append(same)
    held: list[int] = []
    dealt = 0  # on from one stratum to the next, so that small strata do not all lie in the first folds
    for name in sorted(strata):
        if len(strata[name]) == 1:
            continue
        for same in sorted(strata[name], key=lambda same: key(seed, "fold", same)):
            if dealt % folds == number - 1:
                held += groups[same]
            dealt += 1
    if dealt < folds:
        raise DataError(
            f"{table.source}: {dealt} different rows that can be scored are too few for {folds} folds. Fewer folds, or "
            "more rows: a class of one row is learnt and never scored."
        )
    return sorted(held)
