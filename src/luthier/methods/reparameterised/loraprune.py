"""LoRAPrune: LoRA that also says which heads and feed-forward channels go, and takes them out while it trains.

    y = (x * m) W^T + b + (alpha / rank) (x * m) A^T B^T         A: (rank, d_in)   B: (d_out, rank)   m: (d_in,), 0 or 1
    G = g_B A + B g_A - g_B g_A                                  g: gradients of the step     G: (d_out, d_in)

m stands before the output projection of an attention and before the last layer of a feed-forward block; elsewhere there
is none. A group is a key-value head with all its query heads, or one channel. G is how A and B would change the weight
in a step of size 1; |G * (W + s B A)| summed over the group's rows (q, k, v, up, gate) and columns (o, down) is what
the group is worth: each matrix's sums are divided by their length, then added up and smoothed over the steps. Every
`every` steps each layer loses its least worthy groups, as many as a cubic says, and none comes back. m starts at one
and B at zero, so the tuned model starts as the base model.

Zhang M. et al. 2023, "LoRAPrune: Structured Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning", arXiv:2305.18403.
The paper masks rows and columns; what nobody reads needs no mask, so the columns' alone computes the same. The
authors' code stops short of its target, and spares the first tenth of the layers and the last without saying what that
leaves; here the target is reached, and `keep_first` and `keep_last` are 0. Of two forms of the worth, absolute value
and square, this is that of their code.

Count: sum over sites of rank * (d_in + d_out); masks do not train.
Claims: the authors prune half of LLaMA with less memory than methods that need the weight's gradient.
Merged: rows and columns are cut out where the model's configuration can say so: `luthier merge` tells what was cut. It
names one width for all layers, so with `keep_first` or `keep_last` nothing is cut and zeros are written; nor are heads
of a model whose configuration has their width follow from the hidden size, such as BERT (use sites=ffn there).
Cost: while it prunes, each step looks at every weight once, and makes one like it for a moment.
Use it when: the model has to become smaller, and there are rows to make up for what goes.
Not when: nothing needs to be smaller, or the run has a few dozen steps only.
Pitfalls: a head's share is in whole key-value heads, so `ratio` is met to one group; worth is measured by few steps if
`every` and `warmup` leave few; what is cut early is not missed yet.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from luthier.anatomy import Anatomy, Site
from luthier.core import AnatomyError, ConfigError, above, at_least, between
from luthier.methods.parts.low_rank import ThinUpdate
from luthier.methods.parts.masks import pack, top_k, unpack
from luthier.methods.parts.own_tensors import own_modules
from luthier.methods.parts.projections import AtProjections
from luthier.surgery import METHODS, Attachment, Base, Edit, TunedView, attach_each

READERS = {"attn.o": "heads", "ffn.down": "channels"}
"""The site that reads what a group gives, and what its groups are called."""


@METHODS.register("loraprune", family="reparameterised", paper="arXiv:2305.18403")
@dataclass(frozen=True, kw_only=True)
class LoRAPrune(AtProjections):
    """Settings of LoRAPrune."""

    sites: Annotated[tuple[str, ...], "where LoRA attaches; heads are pruned where attn.o is, channels: ffn.down"] = (
        "attn.q", "attn.k", "attn.v", "attn.o", "ffn",
    )  # fmt: skip
    rank: Annotated[int, "width of the two thin matrices", at_least(1)] = 8
    alpha: Annotated[float, "the update is scaled by alpha / rank", above(0)] = 16.0
    dropout: Annotated[float, "share of the branch's input dropped in training", between(0, 0.99)] = 0.0
    ratio: Annotated[float, "share of a layer's groups that is gone at the end", between(0, 1)] = 0.5
    initial: Annotated[float, "share that goes at the first pruning", between(0, 1)] = 0.0
    warmup: Annotated[float, "share of the run before the first pruning", between(0, 1)] = 0.1
    settled: Annotated[float, "share of the run after the last pruning", between(0, 1)] = 0.1
    every: Annotated[int, "optimiser steps from one pruning to the next", at_least(1)] = 10
    beta: Annotated[float, "how slowly the worth follows", between(0, 0.999)] = 0.9
    keep_first: Annotated[int, "layers at the bottom of which nothing is pruned", at_least(0)] = 0
    keep_last: Annotated[int, "layers at the top of which nothing is pruned", at_least(0)] = 0

    default_lr: ClassVar[float] = 2e-3
    tiny: ClassVar[dict[str, Any]] = {"rank": 3}

    def __post_init__(self) -> None:
        if self.initial > self.ratio:
            raise ConfigError(f"loraprune: initial {self.initial:g} is above ratio {self.ratio:g}, where it ends.")
        if self.warmup + self.settled >= 1:
            raise ConfigError(
                f"loraprune: warmup {self.warmup:g} and settled {self.settled:g} leave no part of the run to prune in; "
                "their sum must be below 1."
            )

    def places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        sites = super().places(anatomy)
        for site in sites:
            if site.expert is not None:
                raise AnatomyError(f"loraprune.sites: {site.key} is an expert, whose channels are none. Leave it out.")
        return sites

    def params_at(self, site: Site) -> int:
        return self.rank * (site.d_in + site.d_out)

    def n_groups(self, anatomy: Anatomy) -> dict[str, int]:
        """Key of each site whose rows or columns belong to groups -> how many groups its layer has.

        Raises:
            ConfigError: nothing to prune, or a ratio that keeps or prunes none of a layer's groups.
        """
        sites = self.places(anatomy)
        found: dict[str, int] = {}
        readers = [site for site in sites if site.kind in READERS and not self._spared(site, anatomy)]
        if not readers:
            what = "the layers that keep_first and keep_last leave" if self.keep_first + self.keep_last else "sites"
            raise ConfigError(f"loraprune: {what} hold neither attn.o nor ffn.down, so nothing can be pruned.")
        for reader in readers:
            n = self._groups_of(reader, anatomy)
            if not 0 < self._gone(self.ratio, n) < n:
                does = "prunes none" if self._gone(self.ratio, n) == 0 else "keeps none"
                raise ConfigError(
                    f"loraprune.ratio: {self.ratio:g} {does} of the {n} {READERS[reader.kind]} of {reader.key}. Set it "
                    f"from {0.5 / n:.3g} to below {1 - 0.5 / n:.3g}, or leave {reader.kind} out of sites."
                )
            family = reader.kind.partition(".")[0]
            for site in sites:
                same = (site.layer, site.stack) == (reader.layer, reader.stack)
                if same and site.kind.partition(".")[0] == family:
                    if (site.d_in if site is reader else site.d_out) % n:
                        raise AnatomyError(f"loraprune: {site.key} has no {n} equal {READERS[reader.kind]}.")
                    found[site.key] = n
        return found

    def _groups_of(self, reader: Site, anatomy: Anatomy) -> int:
        if reader.kind == "ffn.down":
            return reader.d_in
        for attention in anatomy.attentions:
            if not attention.cross and (attention.layer, attention.stack) == (reader.layer, reader.stack):
                return attention.n_kv_heads
        raise AnatomyError(f"loraprune: nothing is known of the heads before {reader.key}. Use sites=ffn.")

    def _spared(self, site: Site, anatomy: Anatomy) -> bool:
        depth, layer = anatomy.depths[site.stack], site.layer or 0
        return layer < self.keep_first or layer >= depth - self.keep_last

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        yield from attach_each(self.places(anatomy), partial(self._made, self.n_groups(anatomy)))

    def build(self, site: Site, base: Base) -> Attachment:
        return self._made({}, site, base)

    def _made(self, groups: dict[str, int], site: Site, base: Base) -> Attachment:
        shape = (site.d_in, site.d_out, self.rank, self.alpha / self.rank, self.dropout)
        if site.key not in groups:
            return ThinUpdate(*shape)
        if not base.readable:
            base.weight()  # says why it is not
        kind = PrunedReader if site.kind in READERS else Felt
        return kind(base, groups[site.key], *shape)

    # ------------------------------------------------------------------ training

    def share_at(self, step: int, total: int) -> float:
        """Share of a layer's groups that is gone after `step` of `total` steps."""
        first, last = self.warmup * total, (1 - self.settled) * total
        if step <= first:
            return 0.0
        left = max(0.0, 1 - (step - first) / (last - first))
        return self.ratio + (self.initial - self.ratio) * left**3

    def _gone(self, share: float, n: int) -> int:
        return math.floor(share * n + 0.5)

    def due(self, step: int, total: int) -> bool:
        """Whether groups go after this step. Arriving is tried again: a step may be skipped."""
        last = (1 - self.settled) * total
        at_end = step >= last and (step - 1 < last or step == total)
        return step > self.warmup * total and (step % self.every == 0 or at_end)

    def after_backward(self, tuned: TunedView, step: int, total: int) -> None:
        modules = own_modules(self, tuned, Felt)
        for module in modules:
            module.sensed = None
        if step - 1 >= (1 - self.settled) * total:
            return  # what is gone is settled
        found = [module.feel() for module in modules]
        if all(worth is not None and bool(torch.isfinite(worth).all()) for worth in found):
            for module, worth in zip(modules, found, strict=True):
                module.sensed = worth

    def on_step(self, tuned: TunedView, step: int, total: int) -> None:
        modules = own_modules(self, tuned, Felt)
        readers = [m for m in modules if isinstance(m, PrunedReader)]
        for reader in readers:
            reader.remember([m.sensed for m in modules if m.belongs_to(reader) and m.sensed is not None], self.beta)
        if self.due(step, total):
            for reader in readers:
                reader.prune(self._gone(self.share_at(step, total), reader.n))


class Felt(ThinUpdate):
    """An update of a layer whose rows belong to `n` groups; it can say what each of them is worth there."""

    def __init__(
        self, base: Base, n: int, d_in: int, d_out: int, rank: int, scale: float, dropout: float = 0.0
    ) -> None:
        super().__init__(d_in, d_out, rank, scale, dropout)
        self.base, self.n = base, n
        self.sensed: Tensor | None = None

    def belongs_to(self, reader: "PrunedReader") -> bool:
        """Whether its groups are those that `reader` reads."""
        mine, other = self.base.site, reader.base.site
        families = {site.kind.partition(".")[0] for site in (mine, other)}
        return (mine.layer, mine.stack) == (other.layer, other.stack) and len(families) == 1

    @torch.no_grad()
    def feel(self, rows: int = 1024) -> Tensor | None:
        """What each group is worth by the gradients that are there, of length 1: (n,); None without gradients."""
        g_a, g_b = self.a.grad, self.b.grad
        if g_a is None or g_b is None:
            return None
        weight = self.base.weight()
        # g_B A + B g_A - g_B g_A as one product of twice the rank.
        left = torch.cat([g_b, self.b], 1).float()  # (d_out, 2 rank)
        right = torch.cat([self.a - g_a, g_a]).float()  # (2 rank, d_in)
        found = []
        for begin in range(0, len(weight), rows):
            here = slice(begin, begin + rows)
            now = weight[here].float() + (self.b[here] @ self.a).float() * self.scale
            found.append(self._summed((left[here] @ right * now).abs_()))
        sums = self._gathered(found).view(self.n, -1).sum(1)  # rows or columns of a group lie together
        worth: Tensor = sums / torch.linalg.vector_norm(sums).clamp_min(torch.finfo(sums.dtype).tiny)
        return worth

    def _summed(self, felt: Tensor) -> Tensor:
        return felt.sum(1)

    def _gathered(self, found: list[Tensor]) -> Tensor:
        return torch.cat(found)


class PrunedReader(Felt):
    """The layer that reads what the groups give, and reads no more of those that are gone.

    keep: (n,) bool, the groups that are left. worth: (n,), what they are worth, smoothed.
    """

    keep: Tensor
    worth: Tensor

    def __init__(
        self, base: Base, n: int, d_in: int, d_out: int, rank: int, scale: float, dropout: float = 0.0
    ) -> None:
        super().__init__(base, n, d_in, d_out, rank, scale, dropout)
        self.register_buffer("keep", torch.ones(n, dtype=torch.bool))
        self.register_buffer("worth", torch.zeros(n))

    def _summed(self, felt: Tensor) -> Tensor:
        return felt.sum(0)

    def _gathered(self, found: list[Tensor]) -> Tensor:
        return torch.stack(found).sum(0)

    def mask(self) -> Tensor:
        """(d_in,) bool: what is read."""
        return self.keep.repeat_interleave(self.a.shape[1] // self.n)

    def unread(self) -> Tensor:
        return ~self.mask()

    @torch.no_grad()
    def remember(self, sensed: list[Tensor], beta: float) -> None:
        """Let a step's worth, of each matrix, into the moving average; nothing of a step that has none."""
        if sensed:
            self.worth.lerp_(torch.stack(sensed).sum(0).to(self.worth), 1 - beta)

    @torch.no_grad()
    def prune(self, gone: int) -> None:
        """Let the least worthy go until `gone` have gone; none before anything is known of their worth."""
        if not bool(self.worth.any()):
            return
        (left,) = top_k([self.worth.masked_fill(~self.keep, -1.0)], self.n - gone)
        self.keep.logical_and_(left)

    def before(self, x: Tensor) -> Tensor:
        return x * self.mask().to(x.dtype)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return super().after(self.before(x), y)  # x is here what came, and not what `before` made of it

    def fused(self, base: Base, x: Tensor) -> Tensor | None:
        return super().fused(base, self.before(x))

    def still(self, base: Base) -> Callable[[Tensor], Tensor] | None:
        whole, mask = super().still(base), self.mask()
        return None if whole is None else lambda x: whole(x * mask.to(x.dtype))

    @classmethod
    def together(cls, members: Any, dtype: torch.dtype) -> None:  # each has its own mask
        return None

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        weight, bias = super().merged(weight, bias)
        return weight * self.mask().to(weight.dtype), bias

    def stored(self) -> dict[str, Tensor]:
        return {"a": self.a.detach(), "b": self.b.detach(), "keep": pack(self.keep)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        keep = unpack(tensors["keep"], self.keep.shape)
        self.load_state_dict({**tensors, "keep": keep, "worth": torch.zeros_like(self.worth)}, strict=True)
