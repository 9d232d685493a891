"""`luthier report`: runs or a comparison as one page."""

from pathlib import Path
from typing import Annotated

import typer

from luthier.cli._output import screen
from luthier.cli._shared_options import AsJson

__all__ = ["NEEDS_WORDS", "command"]

NEEDS_WORDS = True


def command(
    runs: Annotated[list[str], typer.Argument(help="Folders of runs, or the folder of a comparison.")],
    out: Annotated[str | None, typer.Option(help="The file to write. [default: report.html]")] = None,
    format: Annotated[
        str | None, typer.Option(help="html, md, csv or parquet. [default: what the ending of --out says]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show runs, or a comparison, as one page: findings in words, tables, charts, and the rows on which runs disagree.

    The page fetches nothing and holds all of its numbers. With --format md or csv and no --out it is printed.

    Examples:

      luthier report runs/x

      luthier report runs/compare-minilm-l6-trec6 --out report.html

      luthier report runs/a runs/b --out table.csv
    """
    from luthier.report import as_csv, as_markdown, format_of, gather, write_report
    from luthier.report.write import check_target

    kind = format_of(None if out is None else Path(out), format)
    to = screen()
    if out is None and kind in ("md", "csv"):
        story = gather(runs)
        made = as_markdown(story) if kind == "md" else as_csv(story)
        to.result({"format": kind, "text": made, "findings": list(story.findings)})
        to.show(made.rstrip("\n"))
        return
    path = Path(out if out is not None else f"report.{kind}")
    check_target(path)
    story = gather(runs)
    write_report(story, path, format=kind)
    for number, line in enumerate(story.findings):
        (to.headline if number == 0 else to.show)(line)
    to.show(f"\n{path}: {path.stat().st_size / 1000:.0f} kB, {len(story.runs)} run{'s' * (len(story.runs) > 1)}")
    to.result(
        {"path": str(path), "format": kind, "runs": [run.name for run in story.runs], "findings": list(story.findings)}
    )
