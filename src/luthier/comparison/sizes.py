"""Sizes for a budget of trained numbers: each method as large as it may be, counted on the model's structure alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from luthier.comparison.cells import Entrant
from luthier.core import ConfigError, LuthierError, human_count
from luthier.data.tasks import Task
from luthier.runs.spec import RunSpec
from luthier.workflow.counting import Counting, whole_settings

__all__ = ["SIZES", "Sized", "sized"]

SIZES = ("rank", "width", "length", "reduction", "n", "dimension", "block", "group")
"""Settings that make a method larger or smaller; of several the first is moved, the others stay as they are."""
GRID = tuple(2**k for k in range(17))


@dataclass(frozen=True)
class Sized:
    """The methods at the sizes that were found.

    Attributes:
        entrants: those that train no more than the budget.
        refused: the others, and why.
        said: what was found, in sentences.
    """

    entrants: tuple[Entrant, ...]
    refused: dict[str, str]
    said: tuple[str, ...]


def sized(base: RunSpec, entrants: Sequence[Entrant], task: Task, most: int) -> Sized:
    """Make each method as large as `most` trained numbers allow; a new head's numbers are not counted.

    A method that is named with its size keeps it, and one without a size stays as it is: both are counted.

    Raises:
        ConfigError: none trains so few, or two are the same.
        ModelError, AnatomyError: the model cannot be read.
    """
    counting = Counting(base, task)
    found, refused, told = list[Entrant](), dict[str, str](), list[str]()
    for entrant in entrants:
        field = _field(base, entrant)
        try:
            one, count = (
                (entrant, _trained(counting, entrant)) if field is None else _largest(counting, entrant, field, most)
            )
        except LuthierError as error:
            refused[entrant.name] = str(error)
            continue
        if one.name in (e.name for e in found):
            raise ConfigError(
                f"--method {entrant.name}: at --budget params={most} it is {one.name}, which stands twice."
            )
        if count <= most:
            found.append(one)
            told.append(f"{one.name} {human_count(count)}")
            continue
        given = "its size is given" if set(SIZES) & {*entrant.settings, *base.settings} else "it has no size to choose"
        least = given if field is None or field not in one.settings else f"{field}={one.settings[field]} trains fewest"
        refused[entrant.name] = (
            f"it trains {count:,} numbers, {count - most:,} more than --budget params={most} ({least}). "
            f"--budget params={count} lets it in."
        )
    if not found:
        why = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise ConfigError(f"--budget params={most}: no method trains so few numbers. {why}")
    said = (
        f"Each method is as large as {human_count(most)} trained numbers beside the head allow (--budget "
        f"params={most}), counted on the model's structure: {', '.join(told)}."
    )
    return Sized(tuple(found), refused, (said,))


def _field(base: RunSpec, entrant: Entrant) -> str | None:
    """The setting that is moved; None where there is none, or it is given."""
    there = whole_settings(entrant.method)
    own = [name for name in SIZES if name in there]
    given = {*entrant.settings, *base.settings}
    return own[0] if own and not given & set(own) else None


def _largest(counting: Counting, entrant: Entrant, field: str, most: int) -> tuple[Entrant, int]:
    """The method at the size that trains most numbers within `most`, or at the one that trains fewest of all."""

    def at(size: int) -> int | None:
        try:
            return _trained(counting, _named(entrant, field, size))
        except LuthierError:
            return None  # no size of this method, or none for a model of these widths

    counts = {size: count for size in GRID if (count := at(size)) is not None}
    if not counts:
        return entrant, _trained(counting, entrant)
    within = {size: count for size, count in counts.items() if count <= most}
    if not within:
        least = min(counts, key=lambda size: (counts[size], size))
        return _named(entrant, field, least), counts[least]
    best = max(within, key=lambda size: (within[size], -size))
    # Between the best of the powers of two and its neighbour that trains more: whatever is larger lies there.
    inside, outside = best, 2 * best if counts.get(2 * best, most + 1) > within[best] else best // 2
    while abs(outside - inside) > 1:
        middle = (inside + outside) // 2
        count = at(middle)
        if count is not None and count <= most:
            inside = middle
            if count > within[best]:
                best, within[middle] = middle, count
        else:
            outside = middle
    return _named(entrant, field, best), within[best]


def _named(entrant: Entrant, field: str, size: int) -> Entrant:
    return replace(entrant, name=f"{entrant.name}:{field}={size}", settings={**entrant.settings, field: size})


def _trained(counting: Counting, entrant: Entrant) -> int:
    return counting.trained(entrant.method, entrant.settings)
