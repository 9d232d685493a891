"""Methods as a command names several of them: with commas, by family, or all."""

from collections.abc import Sequence

from luthier.cli._shelf import SHELF, of_families
from luthier.core import UsageError

__all__ = ["method_names"]


def method_names(words: Sequence[str]) -> list[str]:
    """Every method that the words name: families and `all` are spelt out.

    >>> method_names(["lora,ia3", "lora:rank=4"])
    ['lora', 'ia3', 'lora:rank=4']

    Raises:
        UnknownName: no such family.
        UsageError: one stands twice.
    """
    names: list[str] = []
    for word in (part.strip() for given in words for part in given.split(",")):
        if word == "all":
            names += [name for name in sorted(SHELF.names()) if name not in names]
        elif word.startswith("family:"):
            names += [c.name for c in of_families(SHELF, [word.partition(":")[2]]) if c.name not in names]
        elif word and (names[-1:] and "=" in word.partition(":")[0]):
            names[-1] += f",{word}"
        elif word:
            names.append(word)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"--method {twice} stands twice. Name each once; settings tell two apart: {twice}:rank=4.")
    return names
