"""The list of faults, and the tests that are marked with them, read from their source.

`python tests/faults/marks.py` writes the table of docs/reliability.md.
"""

import ast
import tomllib
from collections import defaultdict
from pathlib import Path

__all__ = ["PAGE", "Marks", "listed", "marked", "on_page", "table"]

TESTS = Path(__file__).resolve().parents[1]
PAGE = TESTS.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- begin faults -->\n", "<!-- end faults -->"

Marks = dict[tuple[str, str], list[str]]


def listed() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Number -> what it is, and its parts."""
    found = tomllib.loads((Path(__file__).parent / "list.toml").read_text(encoding="utf-8"))
    return {number: (entry["what"], tuple(entry["parts"])) for number, entry in found.items()}


def marked(source: str, name: str) -> Marks:
    """(number, part) -> the tests of one file that carry it; a mark without a part stands under the part ""."""
    found: Marks = defaultdict(list)
    for node in ast.parse(source).body:
        for decorator in getattr(node, "decorator_list", ()):
            if not isinstance(decorator, ast.Call) or ast.unparse(decorator.func) != "pytest.mark.fault":
                continue
            number, *parts = (ast.literal_eval(given) for given in decorator.args)
            assert isinstance(node, ast.FunctionDef) and node.name.startswith("test_"), f"{name}: {node} is no test"
            for part in parts or [""]:
                found[number, part].append(f"{name}::{node.name}")
    return dict(found)


def all_marked() -> Marks:
    """The marks of every test file."""
    found: Marks = defaultdict(list)
    for path in sorted(TESTS.rglob("test_*.py")):
        for mark, tests in marked(path.read_text(encoding="utf-8"), path.relative_to(TESTS).as_posix()).items():
            found[mark] += tests
    return dict(found)


def table() -> str:
    """One row a fault: what it is, its parts, and the files whose tests are about it."""
    marks = all_marked()
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
