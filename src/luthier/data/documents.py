"""Documents that questions are answered from: read with their names, laid out in a prompt, quoted word for word."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from luthier.core import ConfigError, DataError, near
from luthier.data.columns import Columns, is_blank
from luthier.data.rows import load_rows, normalised
from luthier.runs.spec import DataSpec

__all__ = ["BEGIN", "END", "Documents", "beside", "load_documents", "quotes_in", "refuse_beside"]

BEGIN, END = "##begin_quote##", "##end_quote##"
"""What stands around words that are copied from a document."""
QUOTE = re.compile(f"{re.escape(BEGIN)}(.*?){re.escape(END)}", re.DOTALL)


@dataclass(frozen=True)
class Documents:
    """Texts, and the name of each: its `id`, or where it stands in its file."""

    texts: tuple[str, ...]
    names: tuple[str, ...]
    source: str

    def __len__(self) -> int:
        return len(self.texts)

    def number(self, told: object, where: str) -> int:
        """The number of the document that a row names, by its id or by its whole text.

        Raises:
            DataError: there is none. Of several with that text it is the first.
        """
        wanted = str(told).strip() if not is_blank(told) else ""
        if not wanted:
            raise DataError(f"{where} is empty; it must name a document of {self.source}, by its id or its text.")
        if wanted in self.names:
            return self.names.index(wanted)
        own = normalised(wanted)
        found = [n for n, text in enumerate(self._plain) if text == own]
        if not found:
            raise DataError(
                f"{where} is {wanted[:60]!r}, which is neither the id nor the text of a document of {self.source}."
                f"{near(wanted, self.names)} Add the document, or mend the row."
            )
        return found[0]

    def alike(self, number: int) -> set[int]:
        """The numbers of all documents with the text of this one, itself among them."""
        return {n for n, text in enumerate(self._plain) if text == self._plain[number]}

    @cached_property
    def _plain(self) -> list[str]:
        return [normalised(text) for text in self.texts]


def load_documents(source: str | None, asked_by: str, rows: DataSpec) -> Documents:
    """Read the documents of a file: a column `text`, and `id` where they have names.

    Args:
        asked_by: the recipe, for the errors.
        rows: of the run: what it says of how a table of text is stored holds here too.

    Raises:
        ConfigError: none is named.
        DataError: no such column, an empty text, or one id for two documents.
    """
    if not source:
        raise ConfigError(f"{asked_by} needs documents: --set {asked_by}.documents=FILE, rows with a column text.")
    table, _ = load_rows(source, **rows.stored(source))
    if "text" not in table.columns:
        columns = ", ".join(map(repr, table.columns))
        raise DataError(f"{table.source}: documents need a column 'text'. Its columns are {columns}.")
    texts, names = [], []
    for row, place in zip(table.rows, table.places, strict=True):
        text = row.get("text")
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{place}: field 'text' is {text!r}; a document must have words. Leave the row out.")
        texts.append(text.strip())
        names.append(str(row["id"]) if not is_blank(row.get("id")) else place)
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise DataError(f"{table.source}: two documents have the id {twice[0]!r}. Give each its own.")
    return Documents(tuple(texts), tuple(names), table.source)


def refuse_beside(columns: Columns, who: str, *known: str | None) -> None:
    """Refuse rows with more around a question than is read: it would be lost without a word.

    Args:
        known: columns that are read otherwise.

    Raises:
        ConfigError: names the column.
    """
    around = (columns.context, columns.system, columns.history, columns.tools)
    if more := next((name for name in around if name is not None and name not in known), None):
        raise ConfigError(
            f"{who} reads a question and its answer, and the rows have {more!r} beside them, which would be lost. "
            "Write it into the question, or leave the column out."
        )


def beside(question: str, texts: Sequence[str]) -> str:
    """A question behind the documents that are read with it.

    >>> print(beside("How far?", ["Two miles.", "A moon."]))
    Document 1: Two miles.
    <BLANKLINE>
    Document 2: A moon.
    <BLANKLINE>
    Question: How far?
    """
    return "\n\n".join([*(f"Document {n}: {text}" for n, text in enumerate(texts, 1)), f"Question: {question}"])


def quotes_in(answer: str, where: str) -> list[str]:
    """What an answer quotes, between its marks.

    Raises:
        DataError: a mark without its other half.

    >>> quotes_in("It is ##begin_quote##two miles##end_quote## away.", "row 1")
    ['two miles']
    """
    found = QUOTE.findall(answer)
    if answer.count(BEGIN) != len(found) or answer.count(END) != len(found):
        raise DataError(f"{where}: {BEGIN} and {END} do not stand in pairs. Close each quote.")
    return [str(quote).strip() for quote in found]
