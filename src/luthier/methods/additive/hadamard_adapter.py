"""Hadamard adapter: what self-attention gives is scaled and shifted number by number, and the norm behind it trains.

    A' = w * A + b      w, b: (d,) per layer, 1 and 0 at the start

The tuned model starts as the base model. A run has two phases: the head alone on the frozen model, then everything but
the head, which stays as the first phase left it.

Chen et al. 2023, "Hadamard Adapter: An Extreme Parameter-Efficient Adapter Tuning Method for Pre-trained Language
Models", arXiv:2407.11033. Which norm trains was not checked: the one that reads what attention gives, which agrees with
the paper's count. How long the first phase lasts, and the rates, are ours.

Count: 2 d for each layer, and its norm: 4 d L with norms of scale and shift.
Claims: 0.033 % of BERT-base trained.
Use it when: the smallest file is wanted that still merges.
Not when: the task is far from what the model knows.
Pitfalls: one phase instead of two; decay pulls w towards 1 here, towards zero it would undo the layer; all norms
instead of one a layer are twice the count; behind the norm it would be tuning of the norm.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.core import AnatomyError, ConfigError, above, between
from luthier.kernels import scale
from luthier.methods.parts.own_tensors import group_names, own_modules, own_unfrozen
from luthier.methods.parts.scales import Scales
from luthier.surgery import METHODS, Edit, Group, Method, Phase, TunedView, Unfreeze, attach_each, is_head


@METHODS.register("hadamard_adapter", family="additive", paper="arXiv:2407.11033")
@dataclass(frozen=True, kw_only=True)
class HadamardAdapter(Method):
    """Settings of the Hadamard adapter."""

    sites: Annotated[tuple[str, ...], "whose output is scaled, such as attn.o@last8"] = ("attn.o",)
    at: Annotated[Literal["output", "input"], "what of the projection is scaled"] = "output"
    norms: Annotated[bool, "also train the norm behind attention, where there is an adapter"] = True
    probe: Annotated[float, "share of the run in which the head alone learns; 0 for one phase", between(0, 1)] = 0.3
    probe_rate: Annotated[float, "learning rate of that part, as a multiple of the run's", above(0)] = 1.0

    mergeable: ClassVar[bool] = True
    default_lr: ClassVar[float] = 1e-2

    def __post_init__(self) -> None:
        if self.probe == 1:
            raise ConfigError("hadamard_adapter.probe: 1 leaves no step for the adapter, which is head_only. Lower it.")

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        kind = Affine if self.at == "output" else AffineInput
        yield from attach_each(self._sites(anatomy), lambda site, base: kind(self._width(site)))
        yield from (Unfreeze(name) for name in self._norms(anatomy))

    def n_params(self, anatomy: Anatomy) -> int:
        norms = sum(math.prod(anatomy.tensors[n]) for n in self._norms(anatomy))
        return sum(2 * self._width(s) for s in self._sites(anatomy)) + norms

    def phases(self, tuned: TunedView) -> Sequence[Phase]:
        if self.probe == 0 or not any(map(is_head, tuned.trained())):
            return ()
        probe = Phase(self.probe, trains=is_head, rate=self.probe_rate)
        return probe, Phase(1 - self.probe, trains=lambda name: not is_head(name))

    def groups(self, tuned: TunedView) -> list[Group]:
        modules = own_modules(self, tuned, Affine)
        rest = [m.shift for m in modules] + [u.parameter for u in own_unfrozen(self, tuned)]
        return [
            Group(group_names(tuned, [m.scale for m in modules]), decay_to=1.0),
            Group(group_names(tuned, rest), weight_decay=0.0),
        ]

    def _sites(self, anatomy: Anatomy) -> tuple[Site, ...]:
        found = anatomy.sites(*self.sites, asked_by="hadamard_adapter.sites", fits=lambda site: site.kind == "attn.o")
        for site in found:
            if site.kind not in ("attn.o", "cross.o"):
                raise AnatomyError(f"hadamard_adapter.sites: {site.key} does not end an attention. Use attn.o.")
        return found

    def _width(self, site: Site) -> int:
        return site.d_out if self.at == "output" else site.d_in

    def _norms(self, anatomy: Anatomy) -> list[str]:
        """The norm behind attention: the block's first, or where sublayers read a normed stream its second."""
        layers = {(s.stack, s.layer) for s in self._sites(anatomy)}
        part = "1" if anatomy.pre_norm else "0"
        paths = {
            s.path
            for s in anatomy.all_sites
            if self.norms and s.kind == "norm" and s.part == part and (s.stack, s.layer) in layers
        }
        return [n for n in anatomy.norm_tensors() if n.rpartition(".")[0] in paths]


class Affine(Scales):
    """Scales and shifts what a layer gives."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.shift = nn.Parameter(torch.zeros(width))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return scale(y, self.scale) + self.shift

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * self.scale[:, None], self.shift if bias is None else bias * self.scale + self.shift


class AffineInput(Affine):
    """Scales and shifts what a layer reads."""

    def before(self, x: Tensor) -> Tensor:
        return scale(x, self.scale) + self.shift

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        moved = weight @ self.shift
        return weight * self.scale[None, :], moved if bias is None else bias + moved
