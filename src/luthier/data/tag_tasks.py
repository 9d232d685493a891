"""The task of rows that hold one tag for each word."""

from typing import Any

from luthier.core import DataError
from luthier.data.columns import Columns, cell, label_name
from luthier.data.label_cells import sorted_names, written_list
from luthier.data.rows import Table
from luthier.data.tasks import Task

__all__ = ["token_classification", "words_and_tags"]


def words_and_tags(table: Table, index: int, columns: Columns) -> tuple[list[str], list[str] | None]:
    """The words of one row and their tags (`None` where there is no column of tags, as in prediction).

    Lists, the JSON of lists, or text parted by blanks.

    Raises:
        DataError: not as many tags as words, or neither list nor text.
    """
    assert columns.tokens is not None
    place = table.places[index]
    words = _word_list(cell(table, index, columns.tokens), place, columns.tokens)
    if columns.tags is None:
        return words, None
    tags = _word_list(cell(table, index, columns.tags), place, columns.tags)
    if len(words) != len(tags):
        raise DataError(
            f"{place}: {len(words)} words in {columns.tokens!r} but {len(tags)} tags in {columns.tags!r}."
            " Give each word one tag."
        )
    return words, tags


def _word_list(value: Any, place: str, column: str) -> list[str]:
    if isinstance(value, str):
        if not value.lstrip().startswith("["):
            return value.split()
        found = written_list(value)
        if found is None:
            return value.split()
        value = found
    if not isinstance(value, list | tuple):
        raise DataError(
            f"{place}: field {column!r} is {value!r}; it must be a list of words, or words parted by blanks."
        )
    return [label_name(v) for v in value]


def token_classification(table: Table, columns: Columns) -> Task:
    names: set[str] = set()
    for i in range(len(table)):
        tags = words_and_tags(table, i, columns)[1]
        names.update(tags or ())
    labels = sorted_names(names)
    if len(labels) < 2:
        what = f"all tags are {labels[0]!r}" if labels else "there are no tags"
        raise DataError(f"{table.source}: {what} in column {columns.tags!r}: there is nothing to learn. Check --tags.")
    spans = "O" in labels and all(n == "O" or n[:2] in ("B-", "I-") for n in labels)
    kind = "B-/I-/O tags, scored as spans" if spans else "tags, scored token by token"
    return Task(name="token_classification", labels=labels, spans=spans, notes=(f"{len(labels)} {kind}",))
