"""The same numbers for other readers: Markdown for a page of text, one row a run for a spreadsheet or a program."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from luthier.core import UsageError
from luthier.report.gather import Story
from luthier.report.tables import tables_of
from luthier.trust.text import for_csv, for_markdown, for_terminal

__all__ = ["as_csv", "as_markdown", "flat_rows", "write_parquet"]


def as_markdown(story: Story) -> str:
    """Findings, tables and commands as Markdown."""
    lines = [f"# {for_markdown(story.title)}", "", *(f"- {for_markdown(line)}" for line in story.findings)]
    for table in tables_of(story):
        lines += ["", f"## {for_markdown(table.caption)}", ""]
        lines.append(f"| {' | '.join(for_markdown(name) for name in table.head)} |")
        right = {i for row in table.rows for i, cell in enumerate(row) if cell.value is not None}
        lines.append(f"| {' | '.join('---:' if i in right else '---' for i in range(len(table.head)))} |")
        lines += [f"| {' | '.join(for_markdown(cell.shown) for cell in row)} |" for row in table.rows]
        if table.note:
            lines += ["", for_markdown(table.note)]
    if story.commands:
        lines += ["", "## The command", "", *(f"    {for_terminal(line)}" for line in story.commands)]
    return "\n".join(lines) + "\n"


def flat_rows(story: Story) -> list[dict[str, Any]]:
    """One row a run, failed ones too: what it is, its scores, its costs, its memory by part."""
    rows = []
    for run in story.runs:
        record = run.record
        row: dict[str, Any] = {
            "run": run.name, "method": run.method, "seed": run.seed, "state": run.state, "why": run.why,
            "model": str(run.spec.get("model", "")), "data": run.data if run.spec else "",
        }  # fmt: skip
        if record is not None:
            row |= {name: float(value) for name, value in record.scores.items()}
            row |= {"trained": record.trained, "stored_bytes": record.stored, "seconds": record.seconds}
            row |= {"peak_bytes": record.peak_bytes}
            row |= {f"{part}_bytes": n for part, n in record.memory.items()}
            row |= {f"{part}_forecast": n for part, n in record.forecast.items()}
        if (error := (run.quality or {}).get("calibration_error")) is not None:
            row["calibration_error"] = float(error)
        rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in names} for row in rows]


def as_csv(story: Story) -> str:
    """The rows as a sheet; no cell of it is a formula."""
    rows = flat_rows(story)
    sheet = io.StringIO(newline="")
    writer = csv.writer(sheet, lineterminator="\n")
    writer.writerow([for_csv(name) for name in rows[0]])
    for row in rows:
        writer.writerow([for_csv(v) if isinstance(v, str) else v for v in row.values()])
    return sheet.getvalue()


def write_parquet(story: Story, path: Path) -> None:
    """The rows as a Parquet file.

    Raises:
        UsageError: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError("--format parquet: needs pyarrow. pip install 'luthier[parquet]', or write csv.") from error
    rows = flat_rows(story)
    table = pyarrow.table({name: [row[name] for row in rows] for name in rows[0]})
    pyarrow.parquet.write_table(table, path)
