"""A shelf of files of one shape: listed without importing them, imported one by one when asked for.

A file registers the one class it adds, under its own name:

    @METHODS.register("lora", family="reparameterised", paper="arXiv:2106.09685")
    @dataclass(frozen=True, kw_only=True)
    class LoRA(PerSite): ...

or another entry with other defaults:

    METHODS.preset("rslora", of="lora", family="reparameterised", paper="arXiv:2312.03732", scaling="root")

The facts that a listing shows (family, paper, mergeable, settings, the docstring) are read from the syntax tree, so
that `luthier methods` answers without importing torch. A test compares them with the imported class.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Generic, TypeVar, get_type_hints

from luthier.core import shelves
from luthier.core.card import Card
from luthier.core.config import checked
from luthier.core.errors import ConfigError, UnknownName, near
from luthier.core.read_card import Preset, as_card, read_card
from luthier.core.shelves import OURS, Place

__all__ = ["Catalogue"]

T = TypeVar("T")
C = TypeVar("C", bound=type)  # the class that is registered, as itself: a type checker knows its settings


class Catalogue(Generic[T]):
    """All files that register a class: ours, those that installed packages offer, and those in folders of one's own.

    Ours lie below `package`. Other packages name theirs in the entry point group of the same name; folders are named
    by the environment variable LUTHIER_SHELF, or handed to `add_shelf`. No file may have the name of another.

    >>> from luthier import METHODS, STRATEGIES
    >>> METHODS["lora"](rank=4).rank, "ia3" in METHODS, [name for name in STRATEGIES if name == "llrd"]
    (4, True, ['llrd'])

    Args:
        package: dotted name of the folder that holds the shelf, such as `luthier.methods`.
        word: what one entry is called in messages, such as "method".
        verb: the command that lists them; left out, the word's plural.
    """

    def __init__(self, package: str, word: str, verb: str = "") -> None:
        self.package = package
        self.word = word
        self.plural = f"{word.removesuffix('y')}ies" if word.endswith("y") else f"{word}s"
        self.registry = self.plural.upper()  # what files call this catalogue
        self.verb = verb or self.plural
        # Makes the class of a preset that is a sum of entries: (its name, "a+b", values) -> class.
        self.combine: Callable[[str, str, dict[str, Any]], type[T]] | None = None
        self._classes: dict[str, type[T]] = {}
        self._homes: dict[str, str] = {}  # name -> the module that registered it
        self._cards: dict[str, Card] = {}
        self._added: list[Path] = []
        self._places: dict[str, Place] | None = None
        self._named: tuple[Path, ...] = ()

    def register(self, name: str, **facts: Any) -> Callable[[C], C]:
        """Put the decorated class on the shelf; its constructor checks its settings. `name` must be the file's name."""

        def keep(cls: C) -> C:
            self._classes[name] = cls
            cls.name = name  # type: ignore[attr-defined]
            cls.facts = facts  # type: ignore[attr-defined]
            return checked(cls)

        return keep

    def preset(self, name: str, *, of: str, family: str, paper: str, **defaults: Any) -> None:
        """Put another entry on the shelf again, under this name and with other defaults.

        Args:
            name: the file's name.
            of: the entry, or a sum such as "lora+prompt_tuning", whose settings are named `**{"lora.rank": 4}`.
            family: the folder.
            paper: where it comes from.
            defaults: of settings, or of class facts such as `default_lr`, of a sum that one alone. Written out, never
                computed.

        Raises:
            UnknownName: no such entry, or it has no such setting.
            ConfigError: a sum where entries cannot be added up.
        """
        facts = {"of": of, "family": family, "paper": paper}
        if "+" in of:
            if self.combine is None:
                raise ConfigError(f"{name}: {of!r} is a sum, and {self.plural} do not add up. Name one.")
            self.register(name, **facts)(self.combine(name, of, defaults))
            return
        base: Any = self.get(of)
        hints = get_type_hints(base, include_extras=True)
        settings = {f.name for f in dataclasses.fields(base)}
        strange = [n for n in defaults if n not in settings and not hasattr(base, n)]
        if strange:
            raise UnknownName(
                f"{name}: {of} has no setting {strange[0]!r}.{near(strange[0], sorted(settings))}"
                f" Its settings are {', '.join(sorted(settings))}."
            )
        place = self.places().get(name)
        body = {
            **defaults,
            "__annotations__": {n: hints[n] for n in defaults if n in settings},
            "__module__": place.module if place else base.__module__,
            "__doc__": f"{of} with other defaults.",
        }
        title = "".join(part.capitalize() for part in name.split("_"))
        made: type[T] = dataclasses.dataclass(frozen=True, kw_only=True)(type(title, (base,), body))
        self.register(name, **facts)(made)

    def add_shelf(self, folder: Path) -> None:
        """Also list the files of `folder`, as LUTHIER_SHELF does.

        Raises:
            ConfigError: one of them has the name of another entry.
        """
        self._added.append(Path(folder))
        self._places = None
        try:
            self.places()
        except ConfigError:
            self.remove_shelf(folder)
            raise

    def remove_shelf(self, folder: Path) -> None:
        """Undo `add_shelf`."""
        self._added = [path for path in self._added if path != Path(folder)]
        self.refresh()

    def refresh(self) -> None:
        """Look again for files, after a package was installed or a folder's files were changed."""
        shelves.forget()
        self._drop(lambda name, home: shelves.is_of_a_folder(home))
        self._cards.clear()
        self._places = None

    def _drop(self, gone: Callable[[str, str], bool]) -> None:
        for name, home in [(n, h) for n, h in self._homes.items() if gone(n, h)]:
            del self._homes[name]
            self._classes.pop(name, None)
            sys.modules.pop(home, None)

    def places(self) -> dict[str, Place]:
        """Name -> where its file is, without importing anything on the shelf.

        Raises:
            ConfigError: two files have one name, or a folder or entry point leads nowhere.
        """
        named = shelves.named_folders()
        if self._places is None or named != self._named:
            found: dict[str, Place] = {}
            for place in self._all(named):
                known = found.setdefault(place.path.stem, place)
                if known.path.resolve() != place.path.resolve():
                    raise ConfigError(
                        f"{place.path}: {place.path.stem!r} is the name of {_whose(self.word, known)} ({known.path}). "
                        "Rename your file, and the name that it registers."
                    )
            if named != self._named:
                self.refresh()
            self._drop(lambda name, home: name not in found or found[name].module != home)
            self._places, self._named = found, named
        return self._places

    def _all(self, named: tuple[Path, ...]) -> Iterator[Place]:
        folders = dict.fromkeys((*named, *self._added))
        return chain(
            shelves.in_package(self.package),
            shelves.in_packages(self.package, self.registry),
            *(shelves.in_folder(folder, self.registry) for folder in folders),
        )

    def names(self) -> list[str]:
        """Every name on the shelf, in alphabetical order."""
        return sorted(self.places())

    def ours(self) -> list[str]:
        """The names that this package brings, in alphabetical order."""
        return [name for name in self.names() if self.places()[name].origin == OURS]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.places())

    def __contains__(self, name: object) -> bool:
        return name in self.places()

    def __getitem__(self, name: str) -> type[T]:
        return self.get(name)

    def __repr__(self) -> str:
        """All names, by the folders they stand in."""
        by_family: dict[str, list[str]] = {}
        for card in self.cards():
            by_family.setdefault(card.family, []).append(card.name)
        lines = [f"{len(self)} {self.plural}; {self.registry}[name] is the class, help(...) of it its page"]
        return "\n".join([*lines, *(f"  {family}: {', '.join(names)}" for family, names in by_family.items())])

    def get(self, name: str) -> type[T]:
        """Import and return the class called `name`.

        Raises:
            UnknownName: nothing on the shelf has that name; the message offers near ones.
            ConfigError: its file registers another name.
        """
        self.places()  # a folder may have come or gone
        if name not in self._classes:
            place = self._place(name)
            shelves.run(place)
            self._homes[name] = place.module
            if name not in self._classes:
                raise ConfigError(
                    f"{place.path}: registers no {self.word} called {name!r}, which is the file's name. Let it say "
                    f"@{self.registry}.register({name!r}, ...), or rename the file."
                )
        return self._classes[name]

    def card(self, name: str) -> Card:
        """Read the card of `name` from its file's syntax tree.

        Raises:
            UnknownName: nothing on the shelf has that name.
            ConfigError: the file cannot be read as a card.
        """
        place = self._place(name)
        if name not in self._cards:
            found = read_card(place.path)
            if isinstance(found, Preset):
                found = as_card(found, {part: self.card(part) for part in found.of.split("+")})
            self._cards[name] = dataclasses.replace(found, origin=place.origin)
        return self._cards[name]

    def cards(self) -> list[Card]:
        """The cards of all files, in alphabetical order of their names."""
        return [self.card(name) for name in self.names()]

    def _place(self, name: str) -> Place:
        places = self.places()
        if name not in places:
            raise UnknownName(
                f"No {self.word} is called {name!r}.{near(name, self.names())}"
                f" `luthier {self.verb}` lists all {len(places)}."
                f" One of your own is found where {shelves.VARIABLE} names its folder."
            )
        return places[name]


def _whose(word: str, place: Place) -> str:
    return f"a {word} of luthier's" if place.origin == OURS else f"another {word}, from {place.origin}"
