"""A method's card: what it is, where it comes from, and what can be said of it without running it."""

from dataclasses import dataclass, field

__all__ = ["SUM_FACTS", "Card", "Setting"]

SUM_FACTS = ("default_lr",)
"""Class facts that a preset of a sum of entries may have of its own; the others follow from its parts."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting of a method, as its page and `--help` show it."""

    name: str
    type: str
    default: str
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Card:
    """What `luthier methods` shows. Read from the file's syntax tree, so no torch is needed to list a shelf.

    Attributes:
        origin: "luthier", or the package or folder that the file comes from.
        of: what a preset is a preset of, such as "lora"; empty for a class of its own.
    """

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
    origin: str = "luthier"
    of: str = ""
