"""The order in which a module calls its children, read from the source of its `forward`.

No forward pass is made: it would need real inputs, and on the meta device many models cannot run. The order of
registration is no substitute: Llama registers its norms last and calls one of them first.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from torch import nn

__all__ = [
    "calls_in_order",
    "goes_through_interface",
    "is_dropout",
    "n_tensor_arguments",
    "reads_without_calling",
]

# Reading and parsing sources is the slow part of an anatomy, and a model has few classes.
_STEPS: dict[tuple[type[nn.Module], str], tuple[tuple[str, ...], ...]] = {}
_SOURCES: dict[tuple[type[nn.Module], str], str] = {}
_CLASS_SOURCES: dict[type[nn.Module], str] = {}


def calls_in_order(module: nn.Module) -> list[str]:
    """Paths (relative to `module`) of the modules below it that own parameters or have no children, as called.

    A module that is called twice, or in both branches of an `if`, is listed twice. Modules that no readable source
    mentions come last, in order of registration, dropouts left out: a dropout that nobody calls (ALBERT has one) ends
    nothing.
    """
    found = list(_walk(module, ""))
    seen = set(found)
    for path, leaf in module.named_modules():
        if path and path not in seen and not is_dropout(path, leaf) and (_owns(leaf) or not any(leaf.children())):
            found.append(path)
    return found


def is_dropout(path: str, module: nn.Module) -> bool:
    """Whether `module` is a dropout, or the identity that stands for one of probability 0."""
    return isinstance(module, nn.Dropout) or (isinstance(module, nn.Identity) and "drop" in path.rsplit(".", 1)[-1])


def _owns(module: nn.Module) -> bool:
    return any(p is not None for p in module._parameters.values())


def goes_through_interface(module: nn.Module) -> bool:
    """Whether the module's forward asks transformers' registry of attention functions for its attention."""
    return "ALL_ATTENTION_FUNCTIONS" in _source(type(module), "forward")


def reads_without_calling(module: nn.Module, child: str) -> bool:
    """Whether the module's sources take the weight of `child` and never call it (WavLM's attention does)."""
    source = _class_source(type(module))
    return f"self.{child}.weight" in source and not any(f"self.{child}{mark}" in source for mark in ("(", ",", ")"))


def n_tensor_arguments(module: nn.Module) -> int:
    """How many arguments without a default the module's forward takes."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.default is inspect.Parameter.empty and p.kind in kinds for p in parameters)


def _walk(module: nn.Module, prefix: str, method: str = "forward", open_methods: tuple[str, ...] = ()) -> Iterator[str]:
    for step in _steps(type(module), method):
        if len(step) == 1 and step[0] not in module._modules:
            if step[0] not in open_methods and inspect.isfunction(getattr(type(module), step[0], None)):
                yield from _walk(module, prefix, step[0], (*open_methods, step[0]))
            continue
        for path, child in _resolve(module, step):
            if any(child.children()):
                yield from _walk(child, f"{prefix}{path}.")
            if _owns(child) or not any(child.children()):
                yield f"{prefix}{path}"


def _resolve(module: nn.Module, step: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    """Follow `self.a[0].b` to the module it names; `self.a[i]` names every element."""
    options: list[tuple[list[str], nn.Module]] = [([], module)]
    for word in step:
        further: list[tuple[list[str], nn.Module]] = []
        for path, here in options:
            names = list(here._modules)
            if word == "*":
                wanted = names
            elif word.lstrip("-").isdigit() and word not in names:
                wanted = names[int(word) :][:1] if -len(names) <= int(word) < len(names) else []
            else:
                wanted = [word] if word in names else []
            for name in wanted:
                child = here._modules[name]
                if child is not None:
                    further.append(([*path, name], child))
        options = further
    for path, child in options:
        yield ".".join(path), child


def _steps(cls: type[nn.Module], method: str) -> tuple[tuple[str, ...], ...]:
    """What `method` of `cls` calls on self, arguments before the call they belong to."""
    if (cls, method) in _STEPS:
        return _STEPS[cls, method]
    source = _source(cls, method)
    if not source:
        return ()
    steps: list[tuple[str, ...]] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Call):
            for argument in (*node.args, *node.keywords):
                visit(argument)
            if (chain := _chain(node.func)) is not None:
                steps.append(chain)
            else:
                visit(node.func)
        elif isinstance(node, ast.Attribute) and (chain := _chain(node)) is not None and len(chain) == 1:
            if inspect.isfunction(getattr(cls, chain[0], None)):
                steps.append(chain)  # a method handed on to be called, as BERT does with its chunks
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) and node.value is not None:
            visit(node.value)
        else:
            for child in ast.iter_child_nodes(node):
                visit(child)

    visit(ast.parse(source).body[0])
    _STEPS[cls, method] = tuple(steps)
    return _STEPS[cls, method]


def _chain(node: ast.expr) -> tuple[str, ...] | None:
    """`self.a[0].b` as ("a", "0", "b"); None for anything that does not hang on self."""
    if isinstance(node, ast.Attribute):
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            return (node.attr,)
        head = _chain(node.value)
        return None if head is None else (*head, node.attr)
    if isinstance(node, ast.Subscript):
        head = _chain(node.value)
        if head is None:
            return None
        try:
            return (*head, str(ast.literal_eval(node.slice)))
        except ValueError:
            return (*head, "*")
    return None


def _class_source(cls: type[nn.Module]) -> str:
    # Finding a class in its file parses the whole file: 40 ms, for every site of a model.
    if cls not in _CLASS_SOURCES:
        try:
            _CLASS_SOURCES[cls] = inspect.getsource(cls)
        except (OSError, TypeError):
            _CLASS_SOURCES[cls] = ""
    return _CLASS_SOURCES[cls]


def _source(cls: type[nn.Module], method: str) -> str:
    if (cls, method) not in _SOURCES:
        function: Any = getattr(cls, method, None)
        try:
            _SOURCES[cls, method] = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
        except (OSError, TypeError):  # typed in by hand, compiled, or built in: there is no source
            _SOURCES[cls, method] = ""
    return _SOURCES[cls, method]
