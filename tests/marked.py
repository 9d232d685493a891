"""The tests that are marked with what they show, read from their source: the marks `acid` and `fault`."""

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["TESTS", "Marks", "all_marked", "marked"]

TESTS = Path(__file__).resolve().parent

Marks = dict[tuple[str, Any], list[str]]


def marked(kind: str, source: str, name: str) -> Marks:
    """(what, number or part of it) -> the tests of one file that carry @pytest.mark.KIND(what, ...)."""
    found: Marks = defaultdict(list)
    for node in ast.parse(source).body:
        for decorator in getattr(node, "decorator_list", ()):
            if not isinstance(decorator, ast.Call) or ast.unparse(decorator.func) != f"pytest.mark.{kind}":
                continue
            what, *parts = (ast.literal_eval(given) for given in decorator.args)
            assert isinstance(node, ast.FunctionDef) and node.name.startswith("test_"), f"{name}: {node} is no test"
            assert parts, f"{name}::{node.name}: say which of {what} it shows, by number or by part"
            for part in parts:
                found[what, part].append(f"{name}::{node.name}")
    return dict(found)


@cache
def all_marked(kind: str) -> Marks:
    """The marks of one kind in every test file."""
    found: Marks = defaultdict(list)
    for path in sorted(TESTS.rglob("test_*.py")):
        for mark, tests in marked(kind, path.read_text(encoding="utf-8"), path.relative_to(TESTS).as_posix()).items():
            found[mark] += tests
    return dict(found)
