"""Kernel-mix: each attention head has a low-rank update of its own, on top of one that the heads share.

    W_h <- W_h + B_h A + B'_h A'_h      A: (shared, d)    B_h: (d_head, shared)    A'_h: (own, d)    B'_h: (d_head, own)

Both B start at zero, so the tuned model starts as the base model. For attn.o the heads lie on the inputs, and A and B
change sides. A projection with fewer heads (grouped keys and values) has as many parts as it has heads.

Chen Y. et al. 2022, "Empowering Parameter-Efficient Transfer Learning by Recognizing the Kernel Structure in
Self-Attention", arXiv:2205.03720. Built is the form that reads the hidden states (the code's option X). The code draws
all factors by default, and so starts elsewhere; its biases are left out.

Count: for a projection of h heads: shared * (d_in + d_out) + h * own * (d + d_head).
Claims: heads differ in what they need, and the rank of the whole can reach shared + h own.
Use it when: the attention is what has to change.
Not when: sites outside the attention: they have no heads.
Pitfalls: heads are runs of outputs, in the model's order; own ranks multiply by the number of heads.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.core import AnatomyError, ConfigError, above, at_least
from luthier.methods.parts.low_rank import Thin
from luthier.methods.parts.projections import AtProjections
from luthier.surgery import METHODS, Attachment, Base, Edit, attach_each


@METHODS.register("kernel_mix", family="reparameterised", paper="arXiv:2205.03720")
@dataclass(frozen=True, kw_only=True)
class KernelMix(AtProjections):
    """Settings of Kernel-mix."""

    sites: Annotated[tuple[str, ...], "projections of an attention: attn.q, attn.v, attn.o"] = ("attn.q", "attn.v")
    shared: Annotated[int, "rank of the part that all heads share; 0: none", at_least(0)] = 2
    own: Annotated[int, "rank of each head's own part; 0: none", at_least(0)] = 1
    scale: Annotated[float, "multiplies the update", above(0)] = 1.0

    default_lr: ClassVar[float] = 5e-3

    def __post_init__(self) -> None:
        if not self.shared and not self.own:
            raise ConfigError("kernel_mix: shared and own are both 0, and nothing would train. Set one above 0.")

    def heads(self, anatomy: Anatomy, site: Site) -> int:
        """How many heads a projection serves."""
        for a in anatomy.attentions:
            cross = site.kind.startswith("cross.")
            if (a.layer, a.stack, a.cross) == (site.layer, site.stack, cross) and site.kind.partition(".")[0] in (
                "attn",
                "cross",
            ):
                return a.n_kv_heads if site.kind.endswith((".k", ".v")) else a.n_heads
        raise AnatomyError(f"kernel_mix: {site.key} is no projection of an attention, so it has no heads. Use attn.q.")

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        for site in self.places(anatomy):
            yield from attach_each([site], partial(self._mixed, self.heads(anatomy, site)))

    def n_params(self, anatomy: Anatomy) -> int:
        return sum(self._numbers(site, self.heads(anatomy, site)) for site in self.places(anatomy))

    def params_at(self, site: Site) -> int:
        return self._numbers(site, 1)

    def build(self, site: Site, base: Base) -> Attachment:
        return self._mixed(1, site, base)

    def _numbers(self, site: Site, heads: int) -> int:
        narrow, wide = (site.d_in, site.d_out) if site.kind.endswith(".o") else (site.d_out, site.d_in)
        return self.shared * (site.d_in + site.d_out) + self.own * (heads * wide + narrow)

    def _mixed(self, heads: int, site: Site, base: Base) -> Attachment:
        return Mixed(site.d_in, site.d_out, heads, self.shared, self.own, self.scale, turned=site.kind.endswith(".o"))


class Mixed(Thin):
    """Adds a shared thin product and one for each head: those outputs, or inputs, are its own."""

    def __init__(self, d_in: int, d_out: int, heads: int, shared: int, own: int, scale: float, *, turned: bool) -> None:
        super().__init__(scale)
        self.turned = turned
        size = (d_in if turned else d_out) // heads
        self.a = nn.Parameter(torch.empty(shared, d_in).uniform_(-1, 1) / math.sqrt(d_in))
        self.b = nn.Parameter(torch.zeros(d_out, shared))
        ends = (size, d_out) if turned else (d_in, size)
        self.own_a = nn.Parameter(torch.empty(heads, own, ends[0]).uniform_(-1, 1) / math.sqrt(ends[0]))
        self.own_b = nn.Parameter(torch.zeros(heads, ends[1], own))

    def thin(self) -> tuple[Tensor, Tensor]:
        heads, own = self.own_a.shape[:2]
        one = torch.eye(heads, dtype=self.a.dtype, device=self.a.device)
        if self.turned:
            a = torch.einsum("hg,hri->hrgi", one, self.own_a).reshape(heads * own, self.a.shape[1])
            b = self.own_b.permute(1, 0, 2).reshape(len(self.b), heads * own)  # from (d_out, heads, own)
        else:
            a = self.own_a.reshape(heads * own, self.a.shape[1])
            b = torch.einsum("hg,hor->hogr", one, self.own_b).reshape(len(self.b), heads * own)
        return torch.cat([self.a, a]), torch.cat([self.b, b], 1)
