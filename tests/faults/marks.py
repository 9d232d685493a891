"""The list of faults, and where its page says that each is tried.

`PYTHONPATH=tests python tests/faults/marks.py` writes the table of docs/reliability.md.
"""

import tomllib
from pathlib import Path

from marked import TESTS, all_marked

__all__ = ["PAGE", "listed", "on_page", "table"]

PAGE = TESTS.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- begin faults -->\n", "<!-- end faults -->"


def listed() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Number -> what it is, and its parts."""
    found = tomllib.loads((Path(__file__).parent / "list.toml").read_text(encoding="utf-8"))
    return {number: (entry["what"], tuple(entry["parts"])) for number, entry in found.items()}


def table() -> str:
    """One row a fault: what it is, its parts, and the files whose tests are about it."""
    marks = all_marked("fault")
    lines = ["| fault | what | tried | tests |", "| --- | --- | --- | --- |"]
    for number, (what, parts) in listed().items():
        files = sorted({test.split("::")[0] for (n, _), tests in marks.items() if n == number for test in tests})
        lines.append(f"| {number} | {what} | {'; '.join(parts)} | {', '.join(f'`{f}`' for f in files)} |")
    return "\n".join([*lines, ""])


def on_page(page: str) -> str:
    """What stands between the signs on the page."""
    return page.partition(BEGIN)[2].partition(END)[0]


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text.replace(BEGIN + on_page(text) + END, BEGIN + table() + END), encoding="utf-8")
