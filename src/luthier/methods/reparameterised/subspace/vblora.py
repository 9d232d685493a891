"""VB-LoRA: both thin matrices are put together from pieces, each a mixture of a few vectors of one bank.

    y = x W^T + b + B A x      piece = sum_k softmax(top-k logits)_k bank_k      bank: (vectors, length)

A row of A is d_in / length pieces, a column of B is d_out / length; each piece has `vectors` logits of its own. The
bank and the logits train. The bank starts in +-0.02, so the tuned model starts near the base model and not at it.

Li, Han, Ji 2024, "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks", arXiv:2405.15179. The form is
that of peft 0.21.

Count: vectors length, plus vectors rank (d_in + d_out) / length for each site in training. What a tuning needs for
answers is far less (the chosen vectors and their weights); this file stores the logits, so that it can train on.
Claims: LoRA's quality at a hundredth of its stored size.
Use it when: thousands of tunings are kept and packed afterwards.
Not when: memory in training counts: the logits are more numbers than LoRA's own.
Pitfalls: the length must divide every width; the choice of vectors has no gradient, only their weights have.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.anatomy.selection import is_projection
from luthier.core import ConfigError, at_least, between
from luthier.methods.parts.kronecker import check_divides
from luthier.methods.parts.low_rank import Thin, check_projections
from luthier.methods.parts.own_tensors import group_names, own_modules
from luthier.methods.parts.peft_layers import shared_form
from luthier.surgery import METHODS, Base, Edit, Group, Method, PeftForm, TunedView, attach_each


@METHODS.register("vblora", family="reparameterised", paper="arXiv:2405.15179")
@dataclass(frozen=True, kw_only=True)
class VBLoRA(Method):
    """Settings of VB-LoRA."""

    sites: Annotated[tuple[str, ...], "where to attach: attn.q, ffn, attn.q@0-5, *@last4"] = ("attn.q", "attn.v")
    rank: Annotated[int, "width of the two thin matrices", at_least(1)] = 4
    vectors: Annotated[int, "vectors in the bank", at_least(2)] = 256
    length: Annotated[int, "length of a vector: a divisor of every width", at_least(1)] = 128
    top: Annotated[int, "vectors mixed in one piece", at_least(1)] = 2
    bound: Annotated[float, "the bank starts between minus this and this", between(0, 1)] = 0.02
    logits_rate: Annotated[float, "rate of the logits, as a multiple of the bank's", at_least(0)] = 10.0
    dropout: Annotated[float, "share of the branch's input dropped in training", between(0, 0.99)] = 0.0

    mergeable: ClassVar[bool] = True
    starts_at_base: ClassVar[bool] = False
    default_lr: ClassVar[float] = 1e-3
    tiny: ClassVar[dict[str, float]] = {"rank": 3, "vectors": 12, "length": 8, "bound": 0.1, "lr": 1e-2}
    peft: ClassVar[PeftForm | None] = shared_form(
        "VBLORA",
        {"a": "vblora_logits_A", "b": "vblora_logits_B"},
        {"bank.vectors": "base_model.vblora_vector_bank"},
        settings={"r": "rank", "num_vectors": "vectors", "vector_length": "length", "topk": "top"},
        fixed={"save_only_topk_weights": False},
        ignored=("vblora_dropout", "init_vector_bank_bound", "init_logits_std"),
    )

    def __post_init__(self) -> None:
        if self.top > self.vectors:
            raise ConfigError(f"vblora.top: {self.top} is above the {self.vectors} vectors of the bank. Set it lower.")

    def places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        """The sites, in the order of the model."""
        sites = anatomy.sites(*self.sites, asked_by="vblora.sites", fits=is_projection)
        check_projections(anatomy, sites, "vblora", self.dropout)
        for site in sites:
            check_divides(self.length, "vblora.length", site, "d_in", "d_out")
        return sites

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        bank = Bank(self.vectors, self.length, self.bound)
        yield from attach_each(self.places(anatomy), partial(self._mixed, bank), shared={"bank": bank})

    def n_params(self, anatomy: Anatomy) -> int:
        pieces = sum(self.rank * (s.d_in + s.d_out) // self.length for s in self.places(anatomy))
        return self.vectors * (self.length + pieces)

    def groups(self, tuned: TunedView) -> list[Group]:
        logits = (p for m in own_modules(self, tuned, BankedUpdate) for p in (m.a, m.b))
        return [Group(group_names(tuned, logits), lr_factor=self.logits_rate)]

    def _mixed(self, bank: "Bank", site: Site, base: Base) -> "BankedUpdate":
        return BankedUpdate(bank, site.d_in, site.d_out, self.rank, self.top, self.dropout)


class Bank(nn.Module):
    """vectors: (how many, length), for the whole model."""

    def __init__(self, vectors: int, length: int, bound: float) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(vectors, length).uniform_(-bound, bound))


class BankedUpdate(Thin):
    """Adds `B A x`. a: (rank, d_in / length, vectors) and b: (d_out / length, rank, vectors) are logits."""

    def __init__(self, bank: Bank, d_in: int, d_out: int, rank: int, top: int, dropout: float) -> None:
        super().__init__(1.0, dropout)
        self.__dict__["bank"] = bank  # registered once, on the tuning
        vectors, length = bank.vectors.shape
        self.top = top
        self.a = nn.Parameter(torch.randn(rank, d_in // length, vectors) * 0.1)
        self.b = nn.Parameter(torch.randn(d_out // length, rank, vectors) * 0.1)

    def thin(self) -> tuple[Tensor, Tensor]:
        a = self._pieces(self.a).flatten(1)  # (rank, d_in)
        b = self._pieces(self.b).transpose(1, 2).flatten(0, 1)  # (d_out / length, length, rank) -> (d_out, rank)
        return a, b

    def _pieces(self, logits: Tensor) -> Tensor:
        """(..., vectors) -> (..., length)."""
        bank: Bank = self.__dict__["bank"]
        best, which = logits.topk(self.top, dim=-1)
        weights = best.softmax(-1).to(bank.vectors.dtype)
        return torch.einsum("...k,...kl->...l", weights, bank.vectors[which])
