"""Programs that a model wrote, run in a jail: arithmetic and lists, and nothing of the machine.

Three walls. The text is parsed and every piece of its syntax must be on a list: no classes, no exceptions, no names or
attributes that lead to the interpreter. What it may call are the functions below; modules are replaced by records of
chosen functions. It runs in a fresh process of `jail`: limits on memory, processor time and files, no network, an audit
hook that refuses files, imports, processes and sockets. What it prints is kept up to a limit.
"""

from __future__ import annotations

import ast
import importlib
import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from luthier.core.errors import LuthierError, Refused
from luthier.trust import jail

__all__ = ["Outcome", "checked", "run", "runner"]

CHARS = 20_000  # of a program
PRINTED = 10_000  # characters that it may print
SAID = 1_000  # characters of its answer

NODES = (
    ast.Module, ast.Expr, ast.Assign, ast.AugAssign, ast.AnnAssign, ast.If, ast.For, ast.While, ast.Break, ast.Continue,
    ast.Pass, ast.FunctionDef, ast.Lambda, ast.Return, ast.arguments, ast.arg, ast.Import, ast.ImportFrom, ast.alias,
    ast.Call, ast.keyword, ast.Name, ast.Constant, ast.Attribute, ast.Subscript, ast.Slice, ast.Starred, ast.List,
    ast.Tuple, ast.Dict, ast.Set, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.comprehension,
    ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.JoinedStr, ast.FormattedValue, ast.expr_context,
    ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
)  # fmt: skip
# Attributes that begin so lead from a value to the frame, the code or the class behind it.
LEADS = ("_", "gi_", "f_", "tb_", "co_", "cr_", "ag_", "func_", "format", "mro")
BUILTINS = (
    abs, all, any, bool, chr, dict, divmod, enumerate, filter, float, frozenset, int, isinstance, len, list, map, max,
    min, ord, pow, range, reversed, round, set, sorted, str, sum, tuple, zip,
)  # fmt: skip
MODULES = {
    "math": ("*",),
    "itertools": ("*",),
    "fractions": ("Fraction",),
    "decimal": ("Decimal",),
    "statistics": ("mean", "median", "mode", "stdev", "pstdev", "variance", "pvariance", "fmean"),
    "collections": ("Counter", "defaultdict", "deque"),
    "functools": ("reduce",),
    "datetime": ("date", "datetime", "timedelta"),
}
INNER = ("time", "_strptime")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a program: its answer as text, or why it has none; and what it printed."""

    answer: str | None
    error: str = ""
    printed: str = ""


def run(program: str, *, seconds: float = 2.0, bytes_: int = 256_000_000) -> Outcome:
    """Run a program in a process of its own, and read what it has assigned to `ans`.

    Args:
        seconds: of processor time.
        bytes_: of memory.

    >>> run("total = sum(range(5))\\nans = total / 4")
    Outcome(answer='2.5', error='', printed='')
    """
    if len(program) > CHARS:
        return Outcome(answer=None, error=f"the program has {len(program)} characters; {CHARS} are allowed")
    try:
        found = jail.run(
            "luthier.trust.programs:runner", None, program, what="the program", seconds=seconds, bytes_=bytes_,
            preload=[*sorted(MODULES), *INNER], answer_bytes=1_000_000,
        )  # fmt: skip
    except Refused as error:
        # The interpreter looks for the line of a wrong syntax in a file, which the walls refuse.
        told = "it is no Python" if "'/<unknown>'" in str(error) else str(error).removeprefix("the program: ")
        return Outcome(answer=None, error=told)
    except LuthierError as error:
        return Outcome(answer=None, error=str(error))
    return Outcome(answer=found["answer"], error=found["error"], printed=found["printed"])


def checked(program: str) -> ast.Module:
    """The program's syntax, of which every piece is allowed.

    Raises:
        SyntaxError: one is not; says which, and where.
    """
    tree = ast.parse(program)
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if not isinstance(node, NODES):
            raise SyntaxError(f"line {line}: {type(node).__name__.lower()} is not allowed")
        name = getattr(node, "attr", None) or getattr(node, "id", None) or getattr(node, "arg", None)
        if isinstance(node, ast.FunctionDef):
            name = node.name
            if node.decorator_list:
                raise SyntaxError(f"line {line}: decorators are not allowed")
        if isinstance(name, str) and name.startswith(LEADS if isinstance(node, ast.Attribute) else ("__",)):
            raise SyntaxError(f"line {line}: the name {name[:40]!r} is not allowed")
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            raise SyntaxError(f"line {line}: setting .{node.attr[:40]} is not allowed")
        if isinstance(node, ast.alias):  # `from math import __dict__ as d` is an attribute too, and leads anywhere
            for word in (node.name, node.asname or ""):
                if word.startswith(LEADS):
                    raise SyntaxError(f"line {line}: the name {word[:40]!r} is not allowed")
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names]
            if strange := [module for module in modules if module not in MODULES]:
                raise SyntaxError(f"line {line}: importing {strange[0][:40]!r} is not allowed")
    return tree


def runner(_: None) -> Callable[[str], dict[str, Any]]:
    """In the child: what runs one program."""
    modules = {name: _record(name, given) for name, given in MODULES.items()}
    # What dates are written and read with: their C code imports it by the builtins of the program. A program cannot.
    inner = {name: sys.modules[name] for name in INNER}

    def imported(name: str, *rest: Any) -> Any:
        return modules[name] if name in modules else inner[name]

    def handle(program: str) -> dict[str, Any]:
        printed: list[str] = []
        room = PRINTED

        def show(*values: Any, sep: str = " ", end: str = "\n") -> None:
            nonlocal room
            printed.append(str(sep).join(str(value) for value in values) + str(end))
            room -= len(printed[-1]) + 1
            if room < 0:
                raise MemoryError("it prints too much")

        allowed: dict[str, Any] = {made.__name__: made for made in BUILTINS} | {"print": show, "__import__": imported}
        allowed |= {"True": True, "False": False, "None": None}
        scope: dict[str, Any] = {"__builtins__": allowed, **modules}
        error, answer = "", None
        try:
            exec(compile(checked(program), "<program>", "exec"), scope)
            if "ans" in scope:
                answer = str(scope["ans"])[:SAID]
            else:
                error = "the program assigns nothing to ans"
        except Exception as raised:  # of any kind: it is the program's own
            error = f"{type(raised).__name__}: {str(raised)[:200]}"
        return {
            "answer": answer and _whole(answer),
            "error": _whole(error),
            "printed": _whole("".join(printed)[:PRINTED]),
        }

    return handle


def _whole(text: str) -> str:
    """Halves of characters, which no file takes, written out: \\ud800."""
    return text.encode("utf-8", "backslashreplace").decode()


def _record(name: str, given: tuple[str, ...]) -> SimpleNamespace:
    """The chosen functions of a module: the module itself leads to others."""
    if given == ("*",):
        module: Any = {"math": math, "itertools": itertools}[name]
        return SimpleNamespace(**{n: value for n, value in vars(module).items() if not n.startswith("_")})
    module = importlib.import_module(name)
    return SimpleNamespace(**{n: getattr(module, n) for n in given})
