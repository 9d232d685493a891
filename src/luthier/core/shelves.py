"""Where the files of a catalogue lie: in our package, in other installed packages, in folders of one's own.

    our package          every file below it
    another package      names a module of its own in the entry point group of the catalogue, such as `luthier.methods`
    a folder             is named by the environment variable LUTHIER_SHELF, or handed to `Catalogue.add_shelf`

Nothing is imported to find a file: of another package only the place on the disk is looked up.
"""

import hashlib
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from luthier.core.errors import ConfigError
from luthier.core.read_card import registers

__all__ = [
    "OURS",
    "VARIABLE",
    "Place",
    "forget",
    "in_folder",
    "in_package",
    "in_packages",
    "is_of_a_folder",
    "named_folders",
    "run",
]

OURS = "luthier"
VARIABLE = "LUTHIER_SHELF"
_PREFIX = "luthier_shelf_"


@dataclass(frozen=True)
class Place:
    """One file of a shelf.

    Attributes:
        path: the file.
        module: dotted name under which it is imported.
        origin: "luthier", or the package or folder that it comes from, as a listing names it.
    """

    path: Path
    module: str
    origin: str


def in_package(package: str) -> Iterator[Place]:
    """Our own files. What starts with an underscore, or lies in a folder `parts`, is a piece that the others share."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations is not None
    for root in map(Path, spec.submodule_search_locations):
        for path in sorted(root.rglob("*.py")):
            inner = path.relative_to(root)
            if not path.name.startswith("_") and "parts" not in inner.parts:
                yield Place(path, ".".join((package, *inner.with_suffix("").parts)), OURS)


def in_folder(folder: Path, registry: str) -> Iterator[Place]:
    """The files of a folder that register with `registry`; others may stand beside them, such as helpers.

    The folder is a package of its own while it is on the shelf: `from . import helper` works in it.
    """
    name = package_of(folder)
    for path in sorted(folder.glob("*.py")):
        if not path.name.startswith("_") and registers(path, registry):
            yield Place(path, f"{name}.{path.stem}", f"folder {folder}")


def package_of(folder: Path) -> str:
    """Make a folder importable under a name that only its path decides."""
    name = f"{_PREFIX}{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]}"
    if name not in sys.modules:
        module = types.ModuleType(name, f"The shelf {folder}.")
        module.__path__ = [str(folder)]
        sys.modules[name] = module
    return name


def is_of_a_folder(module: str) -> bool:
    """Whether a module was imported from a folder on the shelf."""
    return module.startswith(_PREFIX)


def run(place: Place) -> None:
    """Import the file, which registers what it holds."""
    if is_of_a_folder(place.module):
        package_of(place.path.parent)
    importlib.import_module(place.module)


def forget() -> None:
    """Folders' files are imported, and installed packages looked for, anew when next asked for."""
    _entry_points.cache_clear()
    importlib.invalidate_caches()
    for name in [m for m in sys.modules if is_of_a_folder(m)]:
        del sys.modules[name]


def named_folders() -> tuple[Path, ...]:
    """The folders that LUTHIER_SHELF names.

    Raises:
        ConfigError: one of them is no folder.
    """
    folders = tuple(Path(word).expanduser() for word in os.environ.get(VARIABLE, "").split(os.pathsep) if word.strip())
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(
                f"{VARIABLE}: {str(folder)!r} is no folder. Name the folder that holds your files; "
                f"several are separated by {os.pathsep!r}."
            )
    return folders


@cache
def _entry_points(group: str) -> tuple[importlib.metadata.EntryPoint, ...]:
    return tuple(importlib.metadata.entry_points(group=group))


def in_packages(group: str, registry: str) -> Iterator[Place]:
    """What installed packages offer: an entry point names one file, or a folder of files.

    Raises:
        ConfigError: an entry point names a module that is not there.
    """
    for point in sorted(_entry_points(group), key=lambda p: (p.module, p.name)):
        owner = point.dist.name if point.dist is not None else point.module.partition(".")[0]
        found = _found(point.module, f"the entry point {point.name!r} in {group} of the package {owner}")
        if found.name != "__init__.py":
            yield Place(found, point.module, f"package {owner}")
            continue
        for path in sorted(found.parent.rglob("*.py")):
            inner = path.relative_to(found.parent).with_suffix("")
            if not path.name.startswith("_") and registers(path, registry):
                yield Place(path, ".".join((point.module, *inner.parts)), f"package {owner}")


def _found(module: str, asked_by: str) -> Path:
    """The file of a module. `importlib.util.find_spec` would run the packages above it."""
    search: Sequence[str] | None = None
    spec = None
    names = module.split(".")
    for i in range(len(names)):
        spec = importlib.machinery.PathFinder.find_spec(".".join(names[: i + 1]), search)
        search = spec.submodule_search_locations if spec is not None else None
        if spec is None or (search is None and i + 1 < len(names)):
            spec = None
            break
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise ConfigError(
            f"{asked_by} names the module {module!r}, which is no Python file. Mend its entry point, or uninstall it."
        )
    return Path(spec.origin)
