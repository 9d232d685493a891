"""The words that choose places of a model: in `sites` of every method, and where a setting has a value for each place.

    attn.q              every query projection
    ffn                 all that the model has of a family
    attn.q@0-5          in layers 0 to 5, both included; attn.q@0,3 in these two
    *@last4             whatever the method can take in the last four layers; first2 counts from the other end
    attn.q@decoder.0-5  in the layers of one stack; attn.q@decoder in all of it

    rank = 16                        one value for every place
    rank = "8, attn.q@0-1: 16"       8, but 16 at these; a later rule stands above an earlier one
    rank = {default = 8, "attn.q@0-1" = 16}     the same as a table of TOML

Layers are counted from 0, in each stack. No torch.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

from luthier.anatomy.site import Site
from luthier.core import AnatomyError, ConfigError, near
from luthier.core.config import read_word

__all__ = [
    "BySite",
    "NumberBySite",
    "Selector",
    "WholeBySite",
    "at_site",
    "is_projection",
    "is_sublayer",
    "joined",
    "selectors",
]

EVERY = "*"
_ITEM = re.compile(r"(?P<low>\d+)(-(?P<high>\d+))?|(?P<end>first|last)(?P<n>\d+)")
_STACK = re.compile(r"(?!(first|last)\d)(?P<name>[A-Za-z_]\w*)(\.|$)")

T = TypeVar("T", int, float)


@dataclass(frozen=True)
class Selector:
    """One choice, such as `attn.q@decoder.0-5`.

    Attributes:
        text: as it was written.
        kind: a kind of site, a family of kinds, or `*`.
        stack: only this one; "" for each.
        layers: as written after the `@` and the stack; "" for all.
    """

    text: str
    kind: str
    stack: str = ""
    layers: str = ""

    @classmethod
    def read(cls, text: str, asked_by: str = "") -> "Selector":
        """Read one choice.

        Raises:
            ConfigError: it is not written as a choice is; says which part.
        """
        kind, at, where = text.strip().partition("@")
        if not kind:
            raise ConfigError(f"{asked_by}{text!r} names layers and no site. Write *{text} for every site there.")
        if at and not where:
            raise ConfigError(f"{asked_by}{text!r}: no layer after the @. Write {kind}@0-3, {kind}@last2, or {kind}.")
        stack = match["name"] if (match := _STACK.match(where)) else ""
        layers = where[len(match[0]) :] if match else where
        for item in layers.split(",") if layers else ():
            found = _ITEM.fullmatch(item.strip())
            if found is None:
                raise ConfigError(
                    f"{asked_by}{text!r}: {item.strip()!r} is no layer. Write a number, 0-5, last4 or first2, with "
                    "commas between several, and encoder. or decoder. before them where a model has both."
                )
            if found["high"] is not None and int(found["high"]) < int(found["low"]):
                raise ConfigError(
                    f"{asked_by}{text!r}: {item.strip()} counts down. Write {found['high']}-{found['low']}."
                )
            if found["n"] is not None and int(found["n"]) == 0:
                raise ConfigError(f"{asked_by}{text!r}: {item.strip()} is no layer. Write {found['end']}1 or more.")
        return cls(text.strip(), kind, stack, layers.replace(" ", ""))

    def chosen(self, depths: Mapping[str, int], asked_by: str = "") -> set[tuple[str, int]] | None:
        """The (stack, layer) pairs that it names in a model of so many layers a stack; None where it names no layer.

        Raises:
            AnatomyError: a layer or stack that the model does not have.
        """
        if self.stack and self.stack not in depths:
            there = [name for name in depths if name]
            raise AnatomyError(
                f"{asked_by}{self.text!r}: no stack is called {self.stack!r}.{near(self.stack, there)} This model has "
                f"{', '.join(there) or 'one alone'}; layers are written {self.kind}@0-3 or {self.kind}@last4."
            )
        if not self.layers:
            return None
        meant = {stack: depth for stack, depth in depths.items() if self.stack in ("", stack)}
        found: set[tuple[str, int]] = set()
        for item in self.layers.split(","):
            reached = {(stack, layer) for stack, depth in meant.items() for layer in _layers(item, depth)}
            if not reached:
                counts = " and ".join(f"0 to {n - 1}{f' in the {s}' if s else ''}" for s, n in meant.items())
                raise AnatomyError(f"{asked_by}{self.text!r}: there is no layer {item}; the model has {counts}.")
            found |= reached
        return found

    def means(self, site: Site, fits: Callable[[Site], bool] | None = None) -> bool:
        """Whether a site is of the kind that is meant, in whatever layer."""
        if self.kind == EVERY:
            return fits is None or fits(site)
        return site.kind == self.kind or site.kind.startswith(f"{self.kind}.")

    def matches(self, site: Site, depths: Mapping[str, int], fits: Callable[[Site], bool] | None = None) -> bool:
        """Whether a site is meant."""
        chosen = self.chosen(depths)
        return (
            self.means(site, fits)
            and self.stack in ("", site.stack)
            and (chosen is None or (site.stack, site.layer) in chosen)
        )


def _layers(item: str, depth: int) -> range:
    """The layers that one item means among `depth`; empty where one of them is not there."""
    found = _ITEM.fullmatch(item)
    assert found is not None  # `Selector.read` has looked
    if found["end"] is not None:
        n = int(found["n"])
        if n > depth:
            return range(0)
        return range(n) if found["end"] == "first" else range(depth - n, depth)
    low, high = int(found["low"]), int(found["high"] or found["low"])
    return range(low, high + 1) if high < depth else range(0)


def is_projection(site: Site) -> bool:
    """Whether a site is a projection inside a layer: a weight that turns what it reads into what it gives."""
    return site.layer is not None and site.kind != "norm" and not site.kind.endswith("_out")


def is_sublayer(site: Site) -> bool:
    """Whether a site is what a sublayer gives, before the residual sum."""
    return site.kind.endswith("_out") and site.kind != "block_out"


def joined(words: Iterable[str]) -> list[str]:
    """Choices as they were meant: `attn.q@0,3` may come as two words, because a list is written with commas too."""
    whole: list[str] = []
    for word in words:
        word = word.strip()
        if whole and "@" in whole[-1] and _ITEM.fullmatch(word):
            whole[-1] += f",{word}"
        else:
            whole.append(word)
    return whole


def selectors(words: Iterable[str], asked_by: str = "") -> list[Selector]:
    """Read the choices of one setting.

    Raises:
        ConfigError: one of them is not written as a choice is.
    """
    return [Selector.read(word, asked_by) for word in joined(words)]


# --- a value for each place


@dataclass(frozen=True)
class BySite:
    """A number that differs from place to place.

    Attributes:
        default: where no rule says another; None, then every place needs a rule.
        rules: (choice, value), a later one above an earlier one.
        table: key of a site -> its value, once the model is known.
    """

    default: Any
    rules: tuple[tuple[str, Any], ...]
    table: tuple[tuple[str, Any], ...] = ()

    kind: ClassVar[type] = float
    says: ClassVar[str] = 'numbers by site ("8, attn.q@0: 16")'

    @classmethod
    def from_text(cls, value: Any, label: str) -> "BySite":
        """From `"8, attn.q@0,3: 16"` or a table with a `default`.

        Raises:
            ConfigError: neither of the two, or a value that is no number of the kind.
        """
        if isinstance(value, BySite):
            return value
        if isinstance(value, str):
            if ":" not in value:
                raise ConfigError(f"{label}: must be {cls.says}, got {value!r}.")
            value = dict(_rules(value))
        if not isinstance(value, Mapping):
            raise ConfigError(f"{label}: must be {cls.says}, got {value!r}.")
        read = {str(k): cls._number(read_word(v.strip()) if isinstance(v, str) else v, label) for k, v in value.items()}
        default = read.pop("default", None)
        selectors(read, f"{label}: ")
        return cls(default, tuple(read.items()))

    @classmethod
    def _number(cls, value: Any, label: str) -> Any:
        right = isinstance(value, int if cls.kind is int else (int, float)) and not isinstance(value, bool)
        if not right:
            raise ConfigError(f"{label}: {value!r} is no {'whole ' if cls.kind is int else ''}number.")
        return cls.kind(value)

    def to_text(self) -> str:
        """As `from_text` reads it."""
        parts = [] if self.default is None else [f"{self.default}"]
        return ", ".join([*parts, *(f"{choice}: {value}" for choice, value in self.rules)])

    @property
    def numbers(self) -> tuple[Any, ...]:
        """Every value, for its limits."""
        return (*([] if self.default is None else [self.default]), *(value for _, value in self.rules))

    def resolved(
        self, places: Sequence[Site], depths: Mapping[str, int], label: str, fits: Callable[[Site], bool] | None = None
    ) -> "BySite":
        """With a value for each of these places.

        Raises:
            AnatomyError: a rule for no place of them, or a place without a value.
        """
        kinds = list(dict.fromkeys(site.kind for site in places))
        table = {site.key: self.default for site in places}
        for choice, value in self.rules:
            selector = Selector.read(choice, f"{label}: ")
            selector.chosen(depths, f"{label}: ")
            met = [site.key for site in places if selector.matches(site, depths, fits)]
            if not met:
                raise AnatomyError(
                    f"{label}: {choice!r} is none of the places that are tuned: {', '.join(kinds)}."
                    f"{near(selector.kind, kinds)} Name it in `sites`, or leave the rule out."
                )
            table |= dict.fromkeys(met, value)
        without = [key for key, value in table.items() if value is None]
        if without:
            raise AnatomyError(
                f"{label}: no value for {', '.join(without[:3])}. Begin with one for all others: "
                f'{label.rpartition(".")[2]} = "8, {self.to_text()}".'
            )
        return replace(self, table=tuple(table.items()))

    def at(self, site: Site) -> Any:
        """The value at one place."""
        return dict(self.table)[site.key]


class WholeBySite(BySite):
    """Whole numbers that differ from place to place."""

    kind = int
    says = 'whole numbers by site ("8, attn.q@0: 16")'


class NumberBySite(BySite):
    """Numbers that differ from place to place."""


def at_site(value: T | BySite, site: Site) -> T:
    """A setting's value at one place, be it one for all places or one for each."""
    return value.at(site) if isinstance(value, BySite) else value


def _rules(text: str) -> Iterable[tuple[str, str]]:
    """`8, attn.q@0,3: 16` as ("default", "8") and ("attn.q@0,3", "16")."""
    waiting: list[str] = []
    for number, part in enumerate(text.split(",")):
        choice, colon, value = part.rpartition(":")
        if colon:
            yield ",".join([*waiting, choice.strip()]), value
            waiting = []
        elif number == 0:
            yield "default", part
        else:
            waiting.append(part.strip())
    if waiting:
        yield ",".join(waiting), ""
