"""What a search of learning rates found for one method."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from luthier.core import human_seconds, listed, several

__all__ = ["MOST_RATES", "Rates", "said_of", "said_of_parts"]

MOST_RATES = 9


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What was tried for one method. Plain values only.

    Attributes:
        factors: of the method's own rate, or of `--lr`.
        scores: on the rows held out to select by; None where the run failed.
        rows: that they were scored on.
        seconds: of these runs together.
        given: lr and head_lr of the command, around which they were tried; None for the method's own.
        search: how they were chosen: grid, halving or optuna.
        until: share of the steps that each run has made, where some were left early.
    """

    rates: tuple[float, ...]
    factors: tuple[float, ...]
    scores: tuple[float | None, ...]
    chosen: int
    rows: int
    seconds: float
    given: tuple[float | None, float | None] = (None, None)
    search: str = "grid"
    until: tuple[float, ...] = ()

    @property
    def factor(self) -> float:
        """Of the best rate."""
        return self.factors[self.chosen]

    @property
    def at_the_edge(self) -> bool:
        """Whether the best was the lowest or the highest that was tried."""
        return self.factor in (min(self.factors), max(self.factors))


def said_of(rates: Mapping[str, Rates]) -> list[str]:
    """What was searched and found, in sentences."""
    if not rates:
        return []
    first = next(iter(rates.values()))
    chosen = listed([f"{name} {r.rates[r.chosen]:.2g} ({_times(r.factors[r.chosen])})" for name, r in rates.items()])
    way = {
        "halving": ", the worse half of which was left after a quarter and after a half of the steps",
        "optuna": ", each where Optuna expected most of those before",
    }.get(first.search, "")
    took = listed([f"{name} {human_seconds(r.seconds)}" for name, r in rates.items()])
    lines = [
        f"Learning rates were chosen by {several(len(first.rates), 'run')} of each method with one seed{way}, scored "
        f"on {first.rows} rows of the training half: {chosen}. The same for all in runs and steps; in time: {took}."
    ]
    if edge := [name for name, one in rates.items() if one.at_the_edge]:
        lines.append(
            f"{listed(edge)}: the best rate is the lowest or highest of those tried, so a better one may lie beyond. "
            f"Try more (--tune-lr {min(MOST_RATES, len(first.rates) + 2)}) or another middle (--lr)."
        )
    return lines


def said_of_parts(parts: Sequence[Mapping[str, Rates]]) -> list[str]:
    """The same of the folds of a cross-validation, in each of which rates were searched anew."""
    if len(parts) < 2:
        return said_of(parts[0]) if parts else []
    first = next(iter(parts[0].values()), None)
    if first is None:
        return []
    names = [name for name in parts[0] if all(name in part for part in parts)]
    chosen = "; ".join(f"{name} {', '.join(f'{p[name].rates[p[name].chosen]:.2g}' for p in parts)}" for name in names)
    lines = [
        f"Learning rates were chosen anew in each of {len(parts)} folds, by {several(len(first.rates), 'run')} of each "
        f"method with one seed on the rows that the fold learns: {chosen}. The same for all in runs and steps."
    ]
    if edge := [name for name in names if any(part[name].at_the_edge for part in parts)]:
        lines.append(
            f"{listed(edge)}: in some folds the best rate is the lowest or highest of those tried. Try more (--tune-lr "
            f"{min(MOST_RATES, len(first.rates) + 2)}) or another middle (--lr)."
        )
    return lines


def _times(factor: float) -> str:
    return "its own" if factor == 1 else f"{factor:.2g} times its own"
