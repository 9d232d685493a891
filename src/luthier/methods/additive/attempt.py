"""ATTEMPT: each text's prompt is the task's own plus a mixture of it and of frozen prompts of other tasks.

    x = max over tokens of E(text)        u = LN(W_up SiLU(W_down x))        a_j = softmax_j(max(P_j) · u / τ)

    prompt = P_own + Σ_j a_j P_j          j over the N sources and P_own; max over the P vectors of each

The sources are tunings of prompt_tuning on the same base, named with --source, copied and frozen. P_own, W_down, W_up
and LN train. τ is d times e unless set: scores of max-pooled words are large.

Asai et al. 2022, "ATTEMPT: Parameter-Efficient Multi-task Tuning via Attentional Mixtures of Soft Prompts",
arXiv:2205.11961, section 3; in the form of the authors' code.

Count: P d + 2 h d + 2 d, with h = 100; the N sources are stored with it.
Claims: prompts of large tasks help small ones, text by text, with 232 k numbers for T5-base.
Cost: prompt tuning's: every row grows by P tokens; the mixture is two thin products a row.
Use it when: several trained prompts are there and texts differ in which of them helps.
Not when: a decoder writes: in training the pooled text holds the answer too, and in generation only the prompt.
Pitfalls: without τ one source takes all; padding must not be pooled, as the authors' code does.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Self

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy
from luthier.core import ConfigError, above, at_least
from luthier.methods.parts.adopted import agreed, no_sources, own_sites
from luthier.methods.parts.own_tensors import group_names
from luthier.methods.parts.prompt import Prompt, prompt_width
from luthier.surgery import METHODS, Context, Edit, Group, Method, PrependTokens, Source, TunedView


@METHODS.register("attempt", family="additive", paper="arXiv:2205.11961")
@dataclass(frozen=True, kw_only=True)
class Attempt(Method):
    """Settings of ATTEMPT. The first two are the sources' own."""

    prompts: Annotated[int | None, "how many are mixed in; left out, as many as sources", at_least(1)] = None
    length: Annotated[int | None, "vectors of each; left out, as many as the sources have", at_least(1)] = None
    hidden: Annotated[int, "width inside the network that reads the text", at_least(1)] = 100
    temperature: Annotated[float | None, "τ, which divides the scores; left out, d times e", above(0)] = None
    network_rate: Annotated[float, "times the prompt's learning rate at which the network learns", above(0)] = 1.0

    starts_at_base: ClassVar[bool] = False
    looks_ahead: ClassVar[bool] = True
    default_lr: ClassVar[float] = 0.3
    sources: ClassVar[tuple[str, ...]] = ("prompt_tuning", "spot")
    tiny: ClassVar[dict[str, int | float]] = {"prompts": 2, "length": 3, "hidden": 5, "temperature": 1.0, "lr": 0.1}

    def fitted(self, sources: Sequence[Source]) -> Self:
        if self.prompts not in (None, len(sources)):
            raise ConfigError(f"attempt: prompts={self.prompts}, and {len(sources)} sources are named.")
        return replace(self, prompts=len(sources), length=agreed(self, sources, "length"))

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        if self.prompts is None:
            raise no_sources(self, "prompts to mix")
        length = self.length or 100
        yield PrependTokens(Mixture(self, length, prompt_width(anatomy, "attempt")), length)

    def n_params(self, anatomy: Anatomy) -> int:
        d = prompt_width(anatomy, "attempt")
        return (self.length or 100) * d + 2 * self.hidden * d + 2 * d

    def n_stored(self, anatomy: Anatomy) -> int:
        held = (self.prompts or 2) * (self.length or 100) * prompt_width(anatomy, "attempt")
        return self.n_params(anatomy) + held

    def groups(self, tuned: TunedView) -> list[Group]:
        if self.network_rate == 1.0:
            return []
        network = [p for _, m in own_sites(self, tuned, Mixture) for n, p in m.named_parameters() if n != "vectors"]
        return [Group(group_names(tuned, network), lr_factor=self.network_rate)]

    @torch.no_grad()
    def adopt(self, tuned: TunedView, sources: Sequence[Source]) -> None:
        for _, mixture in own_sites(self, tuned, Mixture):
            mixture.others.copy_(torch.stack([source.tensors["prompt.vectors"] for source in sources]))


class Mixture(Prompt):
    """The task's own prompt, those of others, and the network that chooses among them."""

    reads_whole_text = True

    others: Tensor  # (N, P, d), frozen

    def __init__(self, settings: Attempt, length: int, d: int) -> None:
        super().__init__(length, d)
        self.length, self.temperature = length, settings.temperature or d * math.e
        # Numbers of the sources, or of the saved tuning that is loaded; drawn only so that they are of some size.
        self.register_buffer("others", torch.randn(settings.prompts or 1, length, d) / math.sqrt(d))
        self.down, self.up = nn.Linear(d, settings.hidden, bias=False), nn.Linear(settings.hidden, d, bias=False)
        self.norm = nn.LayerNorm(d)

    def shares(self, embeds: Tensor, mask: Tensor | None) -> Tensor:
        """a, of each text. embeds: (rows, T, d) -> (rows, N + 1)."""
        words = embeds.to(self.vectors.dtype)
        if mask is not None:
            words = words.masked_fill(mask[:, : words.shape[1], None] == 0, -torch.inf)
        u = self.norm(self.up(nn.functional.silu(self.down(words.amax(1)))))  # (rows, d)
        return torch.softmax(u @ self._all().amax(1).T / self.temperature, dim=-1)

    def rows(self, context: Context, embeds: Tensor, mask: Tensor | None) -> Tensor:
        """Each text's prompt, (rows, P, d); in a generation, of the text that it began with."""
        return context.once(self, lambda: self._mixed(self.shares(embeds, mask)))

    def _mixed(self, shares: Tensor) -> Tensor:
        return self.vectors + torch.einsum("rn,npd->rpd", shares, self._all())

    def _all(self) -> Tensor:
        return torch.cat([self.others, self.vectors[None]])  # (N + 1, P, d)
