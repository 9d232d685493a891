"""What to do with a finished run: the command that asks it, and what is to be known before it is handed on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luthier.surgery import read_tuning

__all__ = ["kept_rows", "predict_command", "short"]


def predict_command(run: Path | str) -> str:
    """The command that asks a run; where a text alone is too little, with the columns that a file must have."""
    said = f"luthier predict {short(run)}"
    columns = _task_of(run).get("columns", {})
    scores_answers = _task_of(run).get("name") == "reward"
    if not scores_answers and not columns.get("pair") and not columns.get("row_task"):
        return f'{said} --text "..."'
    roles = ("text", "pair", "prompt", *(("chosen",) if scores_answers else ()), "messages", "tokens", "row_task")
    return f"{said} --data FILE  (its columns: {', '.join(columns[role] for role in roles if columns.get(role))})"


def kept_rows(run: Path | str) -> str:
    """A sentence on training rows that stand in the run's tuning; nothing where none do."""
    shown = _task_of(run).get("shown") or ()
    if not shown:
        return ""
    return (
        f"Its tuning holds {len(shown)} training rows, texts and labels, which {{shown}} shows beside others "
        "(tuning.json): whoever has it can read them."
    )


def short(run: Path | str) -> str:
    """The path of a run as it is typed from here."""
    path, here = Path(run), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(run)


def _task_of(run: Path | str) -> dict[str, Any]:
    """The task that a run has stored; nothing of one that has stored none yet."""
    folder = Path(run) / "tuning"
    return dict(read_tuning(folder)["task"]) if folder.exists() else {}
