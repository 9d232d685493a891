"""A shelf of files of one shape: listed without importing them, imported one by one when asked for.

A file registers the one class it adds, under its own name:

    @METHODS.register("lora", family="reparameterised", paper="arXiv:2106.09685")
    @dataclass(frozen=True, kw_only=True)
    class LoRA(PerSite): ...

The facts that a listing shows (family, paper, mergeable, settings, the docstring) are read from the syntax tree, so
that `luthier methods` answers without importing torch. A test compares them with the imported class.
"""

import ast
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from luthier.core.card import Card, Setting
from luthier.core.errors import UnknownName, near

__all__ = ["Catalogue"]

T = TypeVar("T")


class Catalogue(Generic[T]):
    """All files below one package (and below any folder added with `add_shelf`) that register a class.

    Files whose name starts with an underscore, and those of a folder `parts`, are pieces that the others share.

    Args:
        package: dotted name of the folder that holds the shelf, such as `luthier.methods`.
        word: what one entry is called in messages, such as "method".
    """

    def __init__(self, package: str, word: str) -> None:
        self.package = package
        self.word = word
        self._classes: dict[str, type[T]] = {}
        self._facts: dict[str, dict[str, Any]] = {}
        self._shelves: list[tuple[Path, str | None]] = []
        self._files: dict[str, tuple[Path, str]] | None = None

    def register(self, name: str, **facts: Any) -> Callable[[type[T]], type[T]]:
        """Put the decorated class on the shelf. `name` must be the file's name; a test checks it."""

        def keep(cls: type[T]) -> type[T]:
            self._classes[name] = cls
            self._facts[name] = facts
            cls.name = name  # type: ignore[attr-defined]
            cls.facts = facts  # type: ignore[attr-defined]
            return cls

        return keep

    def add_shelf(self, folder: Path) -> None:
        """Also list the files of `folder`: a shelf outside the package (a third party's, or a test's)."""
        self._shelves.append((Path(folder), None))
        self._files = None

    def remove_shelf(self, folder: Path) -> None:
        """Undo `add_shelf`."""
        for name, (path, _) in list(self.files().items()):
            if path.is_relative_to(folder):
                self._classes.pop(name, None)
                self._facts.pop(name, None)
        self._shelves = [s for s in self._shelves if s[0] != Path(folder)]
        self._files = None

    def files(self) -> dict[str, tuple[Path, str]]:
        """Name -> (file, dotted module), without importing anything on the shelf."""
        if self._files is None:
            spec = importlib.util.find_spec(self.package)
            assert spec is not None and spec.submodule_search_locations is not None
            found: dict[str, tuple[Path, str]] = {}
            root = Path(next(iter(spec.submodule_search_locations)))
            for path in sorted(root.rglob("*.py")):
                if not path.name.startswith("_") and "parts" not in path.relative_to(root).parts:
                    dotted = ".".join((self.package, *path.relative_to(root).with_suffix("").parts))
                    found[path.stem] = (path, dotted)
            for folder, _ in self._shelves:
                for path in sorted(folder.glob("*.py")):
                    if not path.name.startswith("_"):
                        found[path.stem] = (path, f"luthier_shelf_{abs(hash(str(folder)))}_{path.stem}")
            self._files = found
        return self._files

    def names(self) -> list[str]:
        """Every name on the shelf, in alphabetical order."""
        return sorted(self.files())

    def get(self, name: str) -> type[T]:
        """Import and return the class called `name`.

        Raises:
            UnknownName: nothing on the shelf has that name; the message offers near ones.
        """
        if name not in self._classes:
            if name not in self.files():
                raise UnknownName(
                    f"No {self.word} is called {name!r}.{near(name, self.names())}"
                    f" `luthier {self.word.removesuffix('y') + 'ies' if self.word.endswith('y') else self.word + 's'}`"
                    f" lists all {len(self.names())}."
                )
            path, dotted = self.files()[name]
            if dotted.startswith("luthier_shelf_"):
                module_spec = importlib.util.spec_from_file_location(dotted, path)
                assert module_spec is not None and module_spec.loader is not None
                module = importlib.util.module_from_spec(module_spec)
                sys.modules[dotted] = module
                module_spec.loader.exec_module(module)
            else:
                importlib.import_module(dotted)
        return self._classes[name]

    def card(self, name: str) -> Card:
        """Read the card of `name` from its file's syntax tree.

        Raises:
            UnknownName: nothing on the shelf has that name.
        """
        if name not in self.files():
            self.get(name)  # raises with near names
        path, _ = self.files()[name]
        return read_card(path)

    def cards(self) -> list[Card]:
        """The cards of all files, in alphabetical order of their names."""
        return [self.card(name) for name in self.names()]


def read_card(path: Path) -> Card:
    """Read one file's card: the class below `@X.register(...)`, its settings and its constants."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    page = ast.get_docstring(tree) or ""
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        for decorator in node.decorator_list:
            if (
                isinstance(decorator, ast.Call)
                and isinstance(decorator.func, ast.Attribute)
                and decorator.func.attr == "register"
            ):
                facts: dict[str, Any] = {k.arg: ast.literal_eval(k.value) for k in decorator.keywords if k.arg}
                constants, settings = _fields(node, _assigned(tree))
                facts = {**constants, **facts}
                return Card(
                    name=ast.literal_eval(decorator.args[0]),
                    family=str(facts.get("family", path.parent.name)),
                    paper=str(facts.get("paper", "")),
                    title=page.split("\n", 1)[0].rstrip("."),
                    path=str(path),
                    mergeable=bool(facts.get("mergeable", False)),
                    starts_at_base=bool(facts.get("starts_at_base", True)),
                    page=page,
                    facts=facts,
                    settings=tuple(settings),
                )
    raise UnknownName(
        f"{path}: no class in this file is registered; decorate one with @METHODS.register({path.stem!r})."
    )


def _assigned(tree: ast.Module) -> dict[str, ast.expr]:
    """The constants of a file, by name: a setting's default may be one of them, and its page shows the value."""
    return {
        target.id: item.value
        for item in tree.body
        if isinstance(item, ast.Assign)
        for target in item.targets
        if isinstance(target, ast.Name)
    }


def _fields(node: ast.ClassDef, assigned: dict[str, ast.expr]) -> tuple[dict[str, Any], list[Setting]]:
    constants: dict[str, Any] = {}
    settings: list[Setting] = []
    for item in node.body:
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        text = ast.unparse(item.annotation)
        value = assigned.get(item.value.id, item.value) if isinstance(item.value, ast.Name) else item.value
        default = ast.unparse(value) if value is not None else ""
        if text.startswith("ClassVar"):
            try:
                constants[item.target.id] = ast.literal_eval(item.value) if item.value is not None else None
            except ValueError:
                constants[item.target.id] = default
        elif isinstance(item.annotation, ast.Subscript) and text.startswith("Annotated"):
            parts = item.annotation.slice
            assert isinstance(parts, ast.Tuple)
            meaning = next((p.value for p in parts.elts[1:] if isinstance(p, ast.Constant)), "")
            settings.append(
                Setting(name=item.target.id, type=ast.unparse(parts.elts[0]), default=default, meaning=str(meaning))
            )
    return constants, settings
