"""Methods at sizes that fit a tiny model, as their own files give them: no list here that a new file must join."""

from typing import Any

from luthier.surgery import METHODS, Combined, Method, method
from luthier.surgery.compose import spelling

__all__ = ["learning_rate", "settings", "small", "spelling"]


def settings(words: str) -> dict[str, Any]:
    """The settings that the files call tiny; for methods of several parts, prefixed."""
    parts = spelling(words).split("+")
    found: dict[str, Any] = {}
    for part in parts:
        cls = METHODS.get(part)
        if issubclass(cls, Combined):
            words_of, given = cls.spelt  # what a preset switches off stays off
            found |= {n: v for n, v in settings(words_of).items() if given.get(n, True)}
        else:
            alone = len(parts) == 1
            found |= {n if alone else f"{part}.{n}": v for n, v in cls.tiny.items() if n != "lr"}
    return found


def small(words: str) -> Method:
    """The method, everything else at its default."""
    return method(words, settings(words))


def learning_rate(chosen: Method) -> float:
    """At which it learns on a tiny model within thirty steps."""
    return max(float(part.tiny.get("lr", max(part.default_lr, 3e-3))) for part in chosen.parts())
