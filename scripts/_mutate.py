"""Small wrong changes of a source file, made from its syntax tree."""

import ast
import copy
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Mutant", "mutants_of"]

COMPARED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
COMPUTED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Pow: ast.Mult, ast.Mod: ast.Mult, ast.MatMult: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
# What these say is for readers, for a debugger or for mypy.
SILENT_KEYWORDS = {"strict", "repr", "msg", "stacklevel", "fmt"}
SILENT_CALLS = {"say", "cast", "Annotated", "TypeVar", "getLogger", "error", "warning"}
SILENT_FUNCTIONS = {"__repr__", "sentence", "__str__"}


@dataclass(frozen=True)
class Mutant:
    """One change: `start` to `end` (bytes of the file) become other text.

    Attributes:
        file: below the package, such as "training/schedule.py".
        function: qualified name of the innermost function around it; "" outside any.
        nth: which of the same changes in the same function, from 0.
    """

    file: str
    function: str
    line: int
    kind: str
    was: str
    becomes: str
    nth: int
    start: int
    end: int

    @property
    def name(self) -> str:
        """Names it for good: lines may move, and other files may change."""
        words = "\0".join([self.file, self.function, self.kind, self.was, self.becomes, str(self.nth)])
        return hashlib.sha256(words.encode()).hexdigest()[:16]

    def applied(self, source: bytes) -> bytes:
        """The file with the change."""
        return source[: self.start] + self.becomes.encode() + source[self.end :]

    def parses(self, source: bytes) -> bool:
        """Whether what comes out is Python."""
        try:
            ast.parse(self.applied(source))
        except (SyntaxError, ValueError):
            return False
        return True

    def __str__(self) -> str:
        was, becomes = (" ".join(text.split()) for text in (self.was, self.becomes))
        return f"{self.file}:{self.line}: {self.kind}: {was[:90]}  ->  {becomes[:90]}"


def mutants_of(path: Path, file: str) -> list[Mutant]:
    """Every mutant of a file, in the order of the file; inside an f-string, say, one may not parse."""
    source = path.read_bytes()
    starts = [0]
    for line in source.split(b"\n"):
        starts.append(starts[-1] + len(line) + 1)
    found: list[Mutant] = []
    counts: dict[tuple[str, str, str, str], int] = {}
    for node, function, kind, new in _changes(ast.parse(source)):
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[(node.end_lineno or node.lineno) - 1] + (node.end_col_offset or 0)
        was = source[start:end].decode()
        text = ast.unparse(ast.fix_missing_locations(new))
        if isinstance(new, ast.expr):
            text = f"({text})"
        key = (function, kind, was, text)
        nth = counts[key] = counts.get(key, -1) + 1
        found.append(Mutant(file, function, node.lineno, kind, was, text, nth, start, end))
    return found


Change = tuple[ast.expr | ast.stmt, str, str, ast.AST]


def _changes(tree: ast.Module) -> Iterator[Change]:
    """(node, function around it, kind of change, what stands there instead)."""
    yield from _inside(tree, "", "")


def _inside(node: ast.AST, scope: str, function: str) -> Iterator[Change]:
    for name, value in ast.iter_fields(node):
        # Types are mypy's matter, decorators are facts of a class, a docstring says nothing to the machine.
        if name in ("annotation", "returns", "decorator_list", "type_params", "bases"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not _silent(child):
                yield from _at(child, scope, function)


def _at(node: ast.AST, scope: str, function: str) -> Iterator[Change]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        if node.name in SILENT_FUNCTIONS:
            return
        inner = f"{scope}.{node.name}" if scope else node.name
        if isinstance(node, ast.ClassDef):
            yield from _inside(node, inner, function)
        else:
            yield from _inside(node, f"{inner}.<locals>", inner)
        return
    if isinstance(node, ast.expr | ast.stmt) and hasattr(node, "lineno"):
        for kind, new in _of(node):
            yield node, function, kind, new
        if isinstance(node, ast.Raise):
            return  # what it says is for readers
        if isinstance(node, ast.If | ast.While) and not _flips(
            node.test
        ):  # at the test alone: the block keeps its text
            yield node.test, function, "condition negated", _not(node.test)
    yield from _inside(node, scope, function)


def _silent(node: ast.AST) -> bool:
    """Whether nothing below this is worth a mutant: messages, types, checks for mypy, lists of names."""
    if isinstance(node, ast.Assert | ast.Import | ast.ImportFrom | ast.JoinedStr):
        return True
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return True
    if isinstance(node, ast.Assign):
        return any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    if isinstance(node, ast.Call):
        return getattr(node.func, "attr", getattr(node.func, "id", "")) in SILENT_CALLS
    return isinstance(node, ast.keyword) and node.arg in SILENT_KEYWORDS


def _of(node: ast.expr | ast.stmt) -> Iterator[tuple[str, ast.AST]]:
    match node:
        case ast.Compare(ops=[op]) if type(op) in COMPARED:
            yield "comparison flipped", _with(node, ops=[COMPARED[type(op)]()])
        case ast.BoolOp():
            other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
            yield "and for or", _with(node, op=other)
        case ast.BinOp() if type(node.op) in COMPUTED and not _is_text(node):
            yield "arithmetic", _with(node, op=COMPUTED[type(node.op)]())
        case ast.AugAssign() if type(node.op) in COMPUTED:
            yield "arithmetic", _with(node, op=COMPUTED[type(node.op)]())
            yield "statement deleted", ast.Pass()
        case ast.UnaryOp(op=ast.USub() | ast.Not()):
            if not isinstance(node.operand, ast.Constant):
                yield "sign or not dropped", node.operand
        case ast.Constant(value=bool()):
            yield "True for False", ast.Constant(not node.value)
        case ast.Constant(value=int()):
            yield "constant changed", ast.Constant(node.value + 1)
        case ast.Constant(value=float()):
            yield "constant changed", ast.Constant(2 * node.value or 1.0)
        case ast.IfExp() if not _flips(node.test):
            yield "condition negated", _with(node, test=_not(node.test))
        case ast.Call() if node.keywords:
            for i, keyword in enumerate(node.keywords):
                if keyword.arg is not None and keyword.arg not in SILENT_KEYWORDS:
                    rest = [*node.keywords[:i], *node.keywords[i + 1 :]]
                    yield "keyword argument dropped", _with(node, keywords=rest)
        case ast.Return(value=ast.expr() as value) if not (isinstance(value, ast.Constant) and value.value is None):
            if not isinstance(value, ast.Constant):
                yield "return value changed", ast.Return(ast.Constant(None))
        case ast.Raise() | ast.Continue() | ast.Break():
            yield "statement deleted", ast.Pass()
        case ast.Expr(value=ast.Call()):
            yield "statement deleted", ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield "statement deleted", ast.Pass()


def _is_text(node: ast.BinOp) -> bool:
    values = [getattr(side, "value", None) for side in (node.left, node.right) if isinstance(side, ast.Constant)]
    joined = isinstance(node.left, ast.JoinedStr) or isinstance(node.right, ast.JoinedStr)
    return joined or any(isinstance(value, str) for value in values)


def _flips(test: ast.expr) -> bool:
    """Whether the comparison's own mutant already negates it."""
    exact = (ast.Eq, ast.NotEq, ast.In, ast.NotIn, ast.Is, ast.IsNot)
    return isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], exact)


def _not(test: ast.expr) -> ast.expr:
    negated = isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)
    return test.operand if negated else ast.UnaryOp(ast.Not(), test)  # type: ignore[attr-defined]


def _with(node: ast.AST, **fields: object) -> ast.AST:
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new
