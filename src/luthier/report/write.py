"""A report as a file that appears whole."""

from __future__ import annotations

from pathlib import Path

from luthier.core import ConfigError, UsageError
from luthier.report.gather import Story
from luthier.report.page import MARK, page_of
from luthier.report.sheets import as_csv, as_markdown, write_parquet
from luthier.runs import durable

__all__ = ["FORMATS", "check_target", "format_of", "write_report"]

FORMATS = ("html", "md", "csv", "parquet")
ENDINGS = {".html": "html", ".htm": "html", ".md": "md", ".csv": "csv", ".parquet": "parquet"}


def format_of(out: Path | None, named: str | None) -> str:
    """The format that is named, or else that of the file's ending.

    Raises:
        UsageError: there is no such format, or the ending says none.
    """
    if named is not None:
        if named not in FORMATS:
            raise UsageError(f"--format {named}: a report is {', '.join(FORMATS)}. Choose one of these.")
        return named
    if out is None:
        return "html"
    if out.suffix.lower() not in ENDINGS:
        raise UsageError(f"--out {out}: its ending says no format. Name one: --format {', '.join(FORMATS)}.")
    return ENDINGS[out.suffix.lower()]


def check_target(path: Path) -> None:
    """Refuse a place where no report can be written, before anything is read.

    Raises:
        ConfigError: something is there that is no page of ours, or the folder is not there.
    """
    if path.is_dir():
        raise ConfigError(f"--out {path}: is a folder. Name a file, such as {path / 'report.html'}.")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--out {path}: its folder does not exist. Make it, or name another place.")
    if path.exists():
        with path.open("rb") as file:
            ours = file.read(len(MARK)) == MARK.encode()
        if not ours:
            raise ConfigError(f"--out {path}: is there already, and no page of a report. Name another file.")


def write_report(story: Story, out: Path | str, *, format: str | None = None) -> Path:
    """Write a report; a page that stands there already is written anew.

    Args:
        format: html, md, csv or parquet; left out, what the file's ending says.

    Raises:
        UsageError: a format that there is not.
        ConfigError: something else is there.
        DiskFull, ResourceError: it cannot be written.
    """
    path = Path(out)
    kind = format_of(path, format)
    check_target(path)
    if kind == "parquet":
        write_parquet(story, path)
        return path
    made = {"html": page_of, "md": as_markdown, "csv": as_csv}[kind](story)
    durable.write_bytes(path, made.encode("utf-8", "backslashreplace"))
    return path
