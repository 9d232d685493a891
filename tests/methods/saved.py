"""Saved tunings on tiny models, for methods that are made of them."""

from pathlib import Path
from typing import Any

from methods.checks import stir
from tiny import tiny

from luthier.surgery import attach

__all__ = ["saved"]


def saved(folder: Path, seed: int = 0, words: str = "pfeiffer_adapter", arch: str = "bert", **settings: Any) -> Path:
    """A tuning whose numbers are nowhere zero, in a folder that is called after its seed."""
    given = settings or ({"reduction": 8} if words == "pfeiffer_adapter" else {"length": 3})
    tuned = attach(tiny(arch), words, seed=seed, **given)
    stir(tuned, seed=seed)
    folder.mkdir(exist_ok=True)
    place = folder / f"from-{seed}"
    tuned.save(place)
    return place
