"""What LoRA and DoRA have in common beside their forward: how A and B are scaled, where they start, who of them learns.

    scaling   alpha over the rank, or over its root
    start     at zero, in the weight, or where rows say
    b_rate    how many times faster B learns than A
    train_a, train_b

A method names the settings itself, so that they stand on its page, and takes what follows from them from here.
"""

import math
from collections.abc import Iterable
from typing import Any

from luthier.anatomy import Anatomy, NumberBySite, Site, WholeBySite, at_site
from luthier.core import ConfigError
from luthier.methods.parts.low_rank import MovedUpdate, ThinUpdate
from luthier.methods.parts.masks import first_share
from luthier.methods.parts.own_tensors import group_names, own_modules
from luthier.methods.parts.projections import AtProjections
from luthier.methods.parts.row_starts import FROM_ROWS, FromRows, start_from_rows
from luthier.methods.parts.starts import AT_ZERO, Start, check_start, thin_start
from luthier.surgery import Base, Batches, Edit, Group, TunedView

__all__ = ["LowRankAxes"]


class LowRankAxes(AtProjections):
    """A method of two thin matrices at each site, with these settings of its own."""

    rank: int | WholeBySite
    alpha: float | NumberBySite
    dropout: float
    scaling: str
    b_rate: float
    train_a: bool
    train_b: bool
    start: Start
    data: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "looks_at_data", self.start in FROM_ROWS)
        # One of them may start at zero: if it stays there, the other has no gradient.
        why = None if self.train_a or self.train_b else ("train_b", "neither A nor B learns")
        if not self.train_b and self.start in ("zero", "eva"):
            why = ("train_b", "B stays zero")
        if not self.train_a and self.start == "mica":
            why = ("train_a", "A stays zero")
        if why:
            advice = "Leave it out" if self.start == "mica" else "Use start=mica"
            raise ConfigError(f"{self._label}.{why[0]}: false, and {why[1]}: nothing would be learnt. {advice}.")

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        here = self.on(anatomy)
        for site in self.places(anatomy):
            check_start(at_site(here.rank, site), self.start, site, f"{self._label}.rank")
        return super().edits(anatomy)

    def params_at(self, site: Site) -> int:
        return at_site(self.rank, site) * (site.d_in * self.train_a + site.d_out * self.train_b)

    def n_stored(self, anatomy: Anatomy) -> int:
        here = self.on(anatomy)
        held = sum(at_site(here.rank, site) * (site.d_in + site.d_out) for site in self.places(anatomy))
        return held if self.start in AT_ZERO else 2 * held

    def update_at(
        self, site: Site, base: Base, kinds: tuple[type[ThinUpdate], type[MovedUpdate], type[FromRows]]
    ) -> Any:
        """The update at a site, begun as `start` says.

        Args:
            kinds: what it is where A and B act as they are, as far as they have moved, and from where rows say.
        """
        plain, moved, from_rows = kinds
        rank = at_site(self.rank, site)
        scale = at_site(self.alpha, site) / (math.sqrt(rank) if self.scaling == "root" else rank)
        if self.start in FROM_ROWS:
            return from_rows(base, rank, scale, self.dropout, (self.train_a, self.train_b), self.start)
        learn = {"train_a": self.train_a, "train_b": self.train_b}
        made = plain(site.d_in, site.d_out, rank, scale, self.dropout, **learn)
        if self.start == "zero":
            return made
        a, b = thin_start(base.weight(), rank, self.start, scale)
        if self.start not in AT_ZERO:
            return moved(a, b, scale, self.dropout, **learn)
        made.a.data, made.b.data = a, b
        return made

    def prepare(self, tuned: TunedView, batches: Batches) -> None:
        if self.start == "eva" or self.start == "corda" or self.start == "lora_ga":
            start_from_rows(self.start, own_modules(self, tuned, FromRows), tuned, first_share(batches, self.data))

    def groups(self, tuned: TunedView) -> list[Group]:
        if self.b_rate == 1.0:
            return []
        return [Group(group_names(tuned, (m.b for m in own_modules(self, tuned, ThinUpdate))), lr_factor=self.b_rate)]
