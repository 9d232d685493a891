"""A method's card: what it is, where it comes from, and what can be said of it without running it."""

from dataclasses import dataclass, field

__all__ = ["Card", "Setting"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting of a method, as its page and `--help` show it."""

    name: str
    type: str
    default: str
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Card:
    """What `luthier methods` shows. Read from the file's syntax tree, so no torch is needed to list a shelf."""

    name: str
    family: str
    paper: str
    title: str
    path: str
    mergeable: bool
    starts_at_base: bool
    page: str
    facts: dict[str, object] = field(default_factory=dict)
    settings: tuple[Setting, ...] = ()
