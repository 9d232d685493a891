"""Saved tunings read as the material of another: as data, checked by digest, and held against the base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from luthier.anatomy import Anatomy
from luthier.core import ConfigError
from luthier.surgery.edited_model import EditedModel
from luthier.surgery.same_base import refuse_other_shape, refuse_other_weights
from luthier.surgery.source import Source
from luthier.surgery.tuning_files import read_tuning, vouched, weights_digest
from luthier.trust import safetensors as trusted_tensors

__all__ = ["check_shapes", "check_weights", "open_source", "opened"]


def open_source(folder: Path | str) -> Source:
    """Read a saved tuning, or that of a finished run. Its method need not be on a shelf here: it is data.

    Raises:
        ConfigError: no such folder.
        Refused, IntegrityError: the files are not what they claim to be.
    """
    given = Path(folder)
    if not given.is_dir():
        raise ConfigError(f"source {str(folder)!r}: no such folder. Name that of a finished run, or its `tuning`.")
    place = given / "tuning" if (given / "tuning").is_dir() else given
    facts = read_tuning(place)
    expect = {n: tuple(shape) for n, shape in facts["tensors"].items()}
    digest = weights_digest(place)
    with vouched(place / "tuning.safetensors"):
        tensors = trusted_tensors.read(place / "tuning.safetensors", expect=expect, digest=digest)
    named = place.resolve().parent if place.name == "tuning" else place
    return Source(
        name=named.name,
        folder=str(folder),
        method=facts["method"],
        settings=facts["settings"],
        tensors={n: t for n, t in tensors.items() if not n.startswith("head/")},
        base=facts["base"],
        digest=digest,
    )


def opened(sources: Sequence[Source | Path | str]) -> tuple[Source, ...]:
    """Every one of them read; one that is read already stays."""
    return tuple(s if isinstance(s, Source) else open_source(s) for s in sources)


def check_shapes(anatomy: Anatomy, sources: Sequence[Source]) -> None:
    """Raises: WrongBase, where one is of a model of another kind or size. Needs no weights."""
    for source in sources:
        refuse_other_shape(anatomy, source.base, source.folder)


def check_weights(edited: EditedModel, sources: Sequence[Source]) -> None:
    """Raises: WrongBase, where one is of other weights."""
    check_shapes(edited.anatomy, sources)
    for source in sources:
        # A source was perhaps trained under another head, which is no part of what is taken of it.
        refuse_other_weights(edited, source.base, source.folder, trunk=True)
