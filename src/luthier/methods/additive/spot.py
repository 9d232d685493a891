"""SPoT: prompt tuning that starts from prompts of other tasks.

    E_p <- E_1                         one source
    E_p <- Σ_j w_j E_j                 several: pick=mean, w_j = 1/k; pick=similar, w_j in proportion to sim(E_j, early)
    sim(A, B) = cos(mean over rows of A, mean over rows of B)

The sources are tunings of prompt_tuning on the same base, named with --source and copied: they never change. With
`early`, one of them is a prompt of the task itself from the beginning of its training: it is not mixed in, and the
`top` sources that are most like it are. With top=1 that is the most similar one.

Vu et al. 2022, "SPoT: Better Frozen Model Adaptation through Soft Prompt Transfer", arXiv:2110.07904, sections 2 and 3.

Count: P times the width of the word embedding.
Claims: closes much of the distance between prompt tuning and full fine-tuning on small models.
Cost: prompt tuning's: every row grows by P tokens. The sources have to be trained first.
Use it when: prompts of larger tasks are there, and prompt tuning alone starts too slowly.
Not when: no task is near: it is prompt tuning then.
Pitfalls: prompts of another length or base do not fit; prompts that were trained very long are no longer alike for like
tasks: compare early ones. Choosing `top` by test scores leaks them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, Self

import torch
from torch import Tensor

from luthier.anatomy import Anatomy
from luthier.core import ConfigError, at_least, near
from luthier.methods.parts.adopted import agreed, no_sources, own_sites
from luthier.methods.parts.prompt import Prompt, prompt_width
from luthier.surgery import METHODS, Edit, Method, PrependTokens, Source, TunedView


@METHODS.register("spot", family="additive", paper="arXiv:2110.07904")
@dataclass(frozen=True, kw_only=True)
class SPoT(Method):
    """Settings of SPoT."""

    length: Annotated[int | None, "vectors before the text; left out, as many as the sources have", at_least(1)] = None
    pick: Annotated[Literal["mean", "similar"], "what several sources become: their mean, or weighted by likeness"] = (
        "mean"
    )
    early: Annotated[str | None, "the source that is an early prompt of the task itself, by its folder's name"] = None
    top: Annotated[int | None, "of the sources, so many that are most like `early`; left out, all", at_least(1)] = None

    starts_at_base: ClassVar[bool] = False
    default_lr: ClassVar[float] = 0.3
    sources: ClassVar[tuple[str, ...]] = ("prompt_tuning", "spot")
    tiny: ClassVar[dict[str, int]] = {"length": 3}

    def __post_init__(self) -> None:
        if self.early is None and (self.pick == "similar" or self.top is not None):
            asked = "pick=similar" if self.pick == "similar" else f"top={self.top}"
            raise ConfigError(
                f"spot: {asked} needs something to compare with. Name an early prompt of this task among the sources, "
                "as early=NAME."
            )

    def fitted(self, sources: Sequence[Source]) -> Self:
        others = self._others(sources)
        if not others:
            raise ConfigError(f"spot: early={self.early!r} is the only source. Name at least one other.")
        if self.top is not None and self.top > len(others):
            raise ConfigError(f"spot: top={self.top}, and there are {len(others)} sources beside the early prompt.")
        return replace(self, length=agreed(self, sources, "length"))

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        if self.length is None:
            raise no_sources(self, "prompt to start from")
        yield PrependTokens(Prompt(self.length, prompt_width(anatomy, "spot")), self.length)

    def n_params(self, anatomy: Anatomy) -> int:
        return (self.length or 20) * prompt_width(anatomy, "spot")

    @torch.no_grad()
    def adopt(self, tuned: TunedView, sources: Sequence[Source]) -> None:
        start = self.start_from(sources)
        for _, prompt in own_sites(self, tuned, Prompt):
            prompt.vectors.copy_(start)

    def start_from(self, sources: Sequence[Source]) -> Tensor:
        """What the prompt starts as. (P, d)."""
        prompts = [s.tensors["prompt.vectors"] for s in self._others(sources)]
        if self.early is None:
            return torch.stack(prompts).mean(0)
        aim = next(s.tensors["prompt.vectors"] for s in sources if s.name == self.early)
        likeness = torch.stack([similarity(prompt, aim) for prompt in prompts])
        best = likeness.topk(self.top or len(prompts)).indices
        chosen, weights = torch.stack(prompts)[best], likeness[best].clamp(min=0)
        if self.pick == "mean" or float(weights.sum()) == 0:
            return chosen.mean(0)
        return torch.einsum("k,kpd->pd", weights / weights.sum(), chosen)

    def _others(self, sources: Sequence[Source]) -> list[Source]:
        names = [s.name for s in sources]
        if self.early is not None and self.early not in names:
            raise ConfigError(f"spot: no source is called {self.early!r}.{near(self.early, names)} There are {names}.")
        return [s for s in sources if s.name != self.early]


def similarity(one: Tensor, other: Tensor) -> Tensor:
    """The cosine of two prompts' means over their vectors: their order does not matter. (P, d), (Q, d) -> ()."""
    return torch.cosine_similarity(one.mean(0), other.mean(0), dim=0)
