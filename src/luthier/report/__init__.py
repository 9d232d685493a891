"""A report on runs or a comparison: words, tables, charts and rows, in one page that fetches nothing.

gather     from folders to what can be told: runs, a judgement, the command
read       one run's folder, whatever became of it
words      findings of runs that no comparison judged
numbers    fronts, curves, bins of certainty, confusions, rows on which runs disagree
tables     the tables, as plain cells
svg        a small writer of charts
charts     the charts
html       elements of a page; there text is made inert
page       the page
sheets     Markdown, and a row for each run
follow     runs while they go on
write      to a file
"""

from luthier.report.follow import Follower, Progress, spark
from luthier.report.gather import Story, gather
from luthier.report.page import page_of
from luthier.report.read import Run, read_run
from luthier.report.sheets import as_csv, as_markdown, flat_rows
from luthier.report.write import FORMATS, format_of, write_report

__all__ = [
    "FORMATS",
    "Follower",
    "Progress",
    "Run",
    "Story",
    "as_csv",
    "as_markdown",
    "flat_rows",
    "format_of",
    "gather",
    "page_of",
    "read_run",
    "spark",
    "write_report",
]
