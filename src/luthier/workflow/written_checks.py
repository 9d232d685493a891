"""Whether rows have an answer that a written one can be compared with, and what it is."""

from __future__ import annotations

from luthier.core import ConfigError
from luthier.data.chat import read_messages
from luthier.data.columns import Columns
from luthier.data.rows import Table
from luthier.data.tasks import Task
from luthier.runs.spec import GENERATED, EvalSpec
from luthier.training import metrics

__all__ = ["check_written", "wanted_of"]


def check_written(spec: EvalSpec, task: Task, columns: Columns) -> None:
    """Refuse what cannot be scored, before a weight is read.

    Raises:
        ConfigError: rows without an answer in text.
        UsageError: a library is missing.
    """
    if spec.forgetting and (not task.writes or task.name == "seq2seq"):
        raise ConfigError(
            f"eval.forgetting reads a general text from left to right, and this task is {task.name}. Leave it out."
        )
    if not spec.writes:
        return
    if not task.answers or columns.shape == "plain":
        what = "plain text" if task.answers else f"task {task.name}"
        raise ConfigError(
            f"eval.written: rows of {what} have no one answer that a written one can be compared with. Leave "
            "eval.written out, and metrics of written text."
        )
    metrics.score(GENERATED, ["a"], ["a"])


def wanted_of(table: Table, row: int, columns: Columns) -> str:
    """The answer of a row: its response, or what the assistant says last."""
    name = columns.response or columns.messages
    assert name is not None, "rows without an answer were refused"
    value = table.rows[row].get(name)
    if columns.response is not None and isinstance(value, str):
        return value
    said = [m["content"] for m in read_messages(value, name) if m["role"] == "assistant"]
    return str(said[-1]) if said else ""
