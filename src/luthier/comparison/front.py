"""A search for the configurations of autopeft of which none is better at its size, and what it asks next.

Half of the questions are drawn at random. Then a surrogate guesses the scores, and the next questions are where the
front is expected to gain most area: a configuration's count is known, so the expected gain is a sum of one-dimensional
expected improvements, one for each stretch of counts between two points of the front. What follows from the answers and
the seed alone is all there is: asked again with the same answers, the same is proposed.

Zhou, Wan, Vulić, Korhonen 2024, arXiv:2301.12132; expected gains of area with noise: Daulton et al. 2021,
arXiv:2105.08195, of which this takes the surrogate's means in place of scores with noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from luthier.comparison.surrogate import Surrogate, quantiles

__all__ = ["BATCH", "Config", "Space", "Tried", "area", "front_of", "propose", "words_of"]

BATCH = 4
"""Questions that are asked together once the surrogate asks."""
LOOKS = 2000
"""Configurations that are weighed for one question."""
RESTARTS = 10
KINDS = ("serial", "parallel", "prefix")


@dataclass(frozen=True)
class Config:
    """Which layers hold something, and the places of the three sizes in the space's list."""

    layers: tuple[bool, ...]
    sizes: tuple[int, int, int]


@dataclass(frozen=True)
class Tried:
    """A configuration, its trained numbers, and its score; None where the run failed."""

    config: Config
    count: int
    score: float | None


@dataclass(frozen=True)
class Space:
    """All configurations: sizes[0] is 0, and costs[layer, kind, i] the numbers that sizes[i] trains there."""

    sizes: tuple[int, ...]
    costs: NDArray[np.int64] = field(repr=False)

    @property
    def layers(self) -> int:
        """How many layers are switched."""
        return len(self.costs)

    def count(self, config: Config) -> int:
        """Trained numbers."""
        own = self.costs[list(config.layers)]
        return int(sum(own[:, kind, size].sum() for kind, size in enumerate(config.sizes)))

    def whole(self) -> int:
        """Trained numbers of the largest one."""
        return int(self.costs[:, :, -1].sum())

    def choices(self) -> int:
        """How many configurations train something."""
        return int(2**self.layers - 1) * (len(self.sizes) ** 3 - 1)

    def settings(self, config: Config) -> dict[str, Any]:
        """Of the method autopeft."""
        chosen = [number for number, on in enumerate(config.layers) if on]
        named = {kind: self.sizes[size] for kind, size in zip(KINDS, config.sizes, strict=True)}
        return {"layers": words_of(chosen), **named}

    def draw(self, rng: np.random.Generator) -> Config:
        """One of them, each as likely as another."""
        while True:
            layers = tuple(bool(on) for on in rng.integers(0, 2, self.layers))
            one, two, three = (int(n) for n in rng.integers(0, len(self.sizes), 3))
            if any(layers) and (one or two or three):
                return Config(layers, (one, two, three))

    def near(self, config: Config) -> list[Config]:
        """Those one size larger or smaller, or with one layer more or less."""
        found = []
        for number, on in enumerate(config.layers):
            layers = (*config.layers[:number], not on, *config.layers[number + 1 :])
            found += [Config(layers, config.sizes)] if any(layers) else []
        for kind in range(3):
            for size in (config.sizes[kind] - 1, config.sizes[kind] + 1):
                one, two, three = (size if n == kind else old for n, old in enumerate(config.sizes))
                if 0 <= size < len(self.sizes) and (one or two or three):
                    found.append(Config(config.layers, (one, two, three)))
        return found

    def point(self, config: Config) -> list[float]:
        """Where it lies for the surrogate."""
        return [*map(float, config.layers), *(size / (len(self.sizes) - 1) for size in config.sizes)]


def words_of(numbers: Iterable[int]) -> str:
    """How a command names these layers.

    >>> words_of([0, 1, 2, 5])
    '0-2+5-5'
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "+".join(f"{first}-{last}" for first, last in runs)


def front_of(tried: Sequence[Tried]) -> list[Tried]:
    """Those of which no other has a score as high with as few numbers, the smallest first."""
    found: list[Tried] = []
    for one in sorted((t for t in tried if t.score is not None), key=lambda t: (t.count, -(t.score or 0.0))):
        if not found or (one.score or 0.0) > (found[-1].score or 0.0):
            found.append(one)
    return found


def area(tried: Sequence[Tried], whole: int, floor: float) -> float:
    """What the front covers of scores above `floor` and counts below `whole`; counts as shares of `whole`."""
    inside = [t for t in front_of(tried) if t.count < whole and (t.score or 0.0) > floor]
    ends = [*(t.count for t in inside[1:]), *([whole] if inside else [])]
    return sum((end - t.count) / whole * ((t.score or 0.0) - floor) for t, end in zip(inside, ends, strict=True))


def propose(space: Space, tried: Sequence[Tried], n: int, seed: int, initial: int, floor: float = 0.0) -> list[Config]:
    """What to try next, at most n: never what was tried, nothing twice, fewer where no more are left to find.

    Args:
        tried: all before, in the order in which they were proposed.
        initial: of the whole search, drawn at random.
        floor: scores below it are worth nothing.
    """
    rng = np.random.default_rng([seed, len(tried)])
    seen = {t.config for t in tried}
    scored = [t for t in tried if t.score is not None]
    if len(tried) < initial or len(scored) < 2:
        found: list[Config] = []
        for _ in range(100 * n):
            one = space.draw(rng)
            if one not in seen and len(found) < n:
                seen.add(one)
                found.append(one)
        return found
    worth = _Worth(space, scored, floor)
    found = []
    for _ in range(n):
        best = _climb(space, worth, seen, rng, [t.config for t in front_of(scored)])
        if best is None:
            break
        seen.add(best)
        found.append(best)
        worth.also(best)
    return found


class _Worth:
    """By how much a configuration is expected to widen the front."""

    def __init__(self, space: Space, scored: Sequence[Tried], floor: float) -> None:
        self.space = space
        values = quantiles([*(t.score or 0.0 for t in scored), floor])
        self.low = float(min(values[-1], values[:-1].min()))  # a floor above some score bounds nothing but itself
        self.model = Surrogate(np.array([space.point(t.config) for t in scored]), values[:-1])
        self.configs = [t.config for t in scored]

    def also(self, config: Config) -> None:
        self.model.also(np.array([self.space.point(config)]))
        self.configs.append(config)

    def begin(self) -> None:
        """Take stock of the front, by the surrogate's means: a lucky run must not stand for its configuration."""
        means, _ = self.model.guess(np.array([self.space.point(c) for c in self.configs]))
        whole = self.space.whole()
        counts = np.array([self.space.count(c) / whole for c in self.configs])
        order = np.lexsort((-means, counts))
        self.starts, self.highs = [0.0], [self.low]
        for i in order:
            if means[i] > self.highs[-1]:
                self.starts.append(float(counts[i]))
                self.highs.append(float(means[i]))
        self.ends = [*self.starts[1:], 1.0]

    def of(self, configs: Sequence[Config]) -> NDArray[np.float64]:
        mean, spread = self.model.guess(np.array([self.space.point(c) for c in configs]))
        whole = self.space.whole()
        counts = np.array([self.space.count(c) / whole for c in configs])
        widths = np.array(self.ends)[None] - np.maximum(np.array(self.starts)[None], counts[:, None])
        z = (mean[:, None] - np.array(self.highs)[None]) / spread[:, None]
        normal = torch.from_numpy(z)
        above = torch.special.ndtr(normal).numpy()
        gain = spread[:, None] * (z * above + np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi))
        return np.asarray((np.maximum(widths, 0.0) * gain).sum(1))


def _climb(
    space: Space, worth: _Worth, seen: set[Config], rng: np.random.Generator, front: Sequence[Config]
) -> Config | None:
    """The most promising of those that a climb from some starts meets, of those not seen; None where all are."""
    worth.begin()
    known: dict[Config, float] = {}

    def weigh(configs: Sequence[Config]) -> None:
        fresh = [c for c in dict.fromkeys(configs) if c not in known]
        if fresh:
            known.update(zip(fresh, worth.of(fresh).tolist(), strict=True))

    drawn = [space.draw(rng) for _ in range(20 * RESTARTS)]
    weigh([*drawn, *(near for one in front for near in space.near(one))])
    begins = sorted((c for c in known if c not in seen), key=lambda c: -known[c])[:RESTARTS]
    for at in begins:
        while len(known) < LOOKS:
            around = [c for c in space.near(at) if c not in seen]
            weigh(around)
            best = max(around, key=lambda c: known[c], default=at)
            if known[best] <= known[at]:
                break
            at = best
    left = [c for c in known if c not in seen]
    return max(left, key=lambda c: known[c], default=None)
