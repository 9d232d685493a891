"""Robust adapters: adapters that first read the task's texts without their labels, and then learn the labels.

    first run, on texts alone (masked_lm, causal_lm):    s <- s + W_u σ(W_d s + b_d) + b_u
    second run, on labels, --source runs/first:          the same, from where the first run ended, with a new head

s is what each sublayer gives, as in sequential_adapter; no norm trains, and the base is frozen in both runs. The head
of words that a first run may train is left behind.

Han, Pang, Wu 2021, "Robust Transfer Learning with Pretrained Language Models through Adapters", arXiv:2108.02340,
section 2. Width of the adapters, length of the first run and rates could not be checked: they are ours.

Count: per sublayer 2 d r + r + d, 2.4 M for BERT-base with r = 64.
Claims: results vary less from seed to seed, and attacks on words do less harm, than with full fine-tuning.
Cost: that of sequential_adapter, twice: the texts are read by a run of their own first.
Use it when: labels are few, texts of the task are many, and a run must not depend on its seed.
Not when: there are no more texts than labels, or one run must do.
Pitfalls: new adapters in the second run make the first one worthless; a base that trains in the second run is another
method. A base with a head of words and one with a new classifier are one base here as far as their blocks and
embeddings are the same numbers.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, Self

import torch

from luthier.anatomy import Anatomy, Site, is_sublayer
from luthier.core import ConfigError, at_least
from luthier.methods.parts.adopted import agreed, own_sites
from luthier.methods.parts.bottleneck import Activation, biases_rest, bottleneck_params, check_sublayers, width_of
from luthier.methods.parts.closing import Closing
from luthier.surgery import METHODS, Edit, Group, Method, Source, TunedView, attach_each


@METHODS.register("robust_adapter", family="additive", paper="arXiv:2108.02340")
@dataclass(frozen=True, kw_only=True)
class RobustAdapter(Method):
    """Settings of robust adapters; those that are left out are the source's."""

    sites: Annotated[tuple[str, ...], "where to attach; none: attn_out and ffn_out of every layer"] = ()
    width: Annotated[int | None, "width of the bottleneck; left out, 64 or the source's", at_least(1)] = None
    activation: Annotated[Activation, "between its two layers"] = "gelu"
    init: Annotated[Literal["paper", "zero_up"], "small normal weights, or a second layer of zeros"] = "paper"

    starts_at_base: ClassVar[bool] = False
    default_lr: ClassVar[float] = 1e-3
    sources: ClassVar[tuple[str, ...]] = ("robust_adapter",)
    least_sources: ClassVar[int] = 0
    tiny: ClassVar[dict[str, int]] = {"width": 6}

    def fitted(self, sources: Sequence[Source]) -> Self:
        if not sources:
            return self
        if len(sources) > 1:
            raise ConfigError(f"robust_adapter: goes on from one first run, and {len(sources)} are named. Name one.")
        agreed(self, sources, "activation")
        return replace(self, width=agreed(self, sources, "width") or 64, sites=agreed(self, sources, "sites"))

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        yield from attach_each(
            self._sites(anatomy), lambda site, base: Closing(width_of(site), self._width, self.activation, self.init)
        )

    def n_params(self, anatomy: Anatomy) -> int:
        return bottleneck_params(self._sites(anatomy), self._width)

    def groups(self, tuned: TunedView) -> list[Group]:
        return biases_rest(self, tuned, Closing)

    @torch.no_grad()
    def adopt(self, tuned: TunedView, sources: Sequence[Source]) -> None:
        for source in sources:
            for key, module in own_sites(self, tuned, Closing):
                module.load_state_dict(source.part(key))

    @property
    def _width(self) -> int:
        return self.width or 64

    def _sites(self, anatomy: Anatomy) -> tuple[Site, ...]:
        found = anatomy.sites(
            *(self.sites or ("attn_out", "ffn_out")), asked_by="robust_adapter.sites", fits=is_sublayer
        )
        return check_sublayers(found, "robust_adapter")
