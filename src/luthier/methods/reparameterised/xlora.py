"""X-LoRA: frozen LoRAs of other tasks, mixed for every token by shares that a first pass of the base model decides.

    h = the base model's last hidden states          g_t = softmax(G(h_t) / temperature)          g_t: (N,)

    y_t = x_t W^T + b + strength s sum_n g_tn x_t A_n^T B_n^T          A_n: (rank, d_in)    B_n: (d_out, rank)

Every pass runs twice: first the base without a gradient, then the model with the LoRAs. G is linear, or `depth` layers
of `width` with a ReLU and dropout between them; it gives N numbers, or N for each place with layerwise=true. With `top`
only the largest shares of a token act; softmax=top takes the softmax over those alone, softmax=none takes the numbers
as they are. The sources are tunings of lora on the same base, alike in rank, sites and scale, named with --source:
copied and frozen, or trained on with train=true. The tuned model does not start as the base model.

Buehler, Buehler 2024, "X-LoRA: Mixture of Low-Rank Adapter Experts, a Flexible Framework for Large Language Models with
Applications in Protein Mechanics and Molecular Design", arXiv:2402.07148. The form is that of peft 0.21, with one
difference: peft generates without a cache; here the first pass has keys and values of its own in the model's.

Count: d N + N for depth 1, times the places behind it if layerwise; the LoRAs are stored too.
Claims: knowledge of several fields in one model, weighed anew at every token.
Cost: two passes through the model for each, one of them with a gradient; in generation twice the cache, too.
Use it when: LoRAs of several tasks are there, and texts need more than one of them.
Not when: one LoRA would do, or one mixture for all tokens: `lorahub`. Not with vectors before the text.
Pitfalls: so few numbers want a large rate: on trec6 with a new head 1e-3 gave 0.31 and 1e-2 0.51 (one seed, `python -m
experiments.methods --only xlora`); top without a softmax over what is left makes the sum of shares less than one; peft
has no file that holds all of it: see docs/peft.md.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site, is_projection
from luthier.core import ConfigError, above, at_least, between
from luthier.methods.parts.adopted import agreed, no_sources, own_sites
from luthier.methods.parts.low_rank import check_rows
from luthier.surgery import METHODS, Attachment, Edit, LookFirst, Method, Source, TunedView, attach_each


@METHODS.register("xlora", family="reparameterised", paper="arXiv:2402.07148")
@dataclass(frozen=True, kw_only=True)
class XLoRA(Method):
    """Settings of X-LoRA. The first five are the sources' own."""

    loras: Annotated[int | None, "how many are mixed; left out, as many as sources", at_least(1)] = None
    rank: Annotated[int | None, "of the LoRAs; left out, the sources'", at_least(1)] = None
    alpha: Annotated[float | None, "of the LoRAs; left out, the sources'", above(0)] = None
    scaling: Annotated[Literal["rank", "root"] | None, "of the LoRAs; left out, the sources'"] = None
    sites: Annotated[tuple[str, ...], "where to attach; none: where the sources are"] = ()
    softmax: Annotated[Literal["all", "top", "none"], "over all LoRAs, over the `top` that act, or none"] = "all"
    temperature: Annotated[float, "softmax=all: what numbers are divided by before it", above(0)] = 1.0
    top: Annotated[int | None, "so many LoRAs act on a token; left out, all", at_least(1)] = None
    layerwise: Annotated[bool, "shares of its own for every place"] = False
    depth: Annotated[int, "layers of the network that gives the shares", at_least(1)] = 1
    width: Annotated[int, "of its inner layers", at_least(1)] = 2048
    dropout: Annotated[float, "between its layers", between(0, 0.99)] = 0.2
    strength: Annotated[float, "times which the mixture is added", above(0)] = 1.0
    train: Annotated[bool, "let the LoRAs train on"] = False

    starts_at_base: ClassVar[bool] = False
    default_lr: ClassVar[float] = 1e-2
    sources: ClassVar[tuple[str, ...]] = ("lora",)
    least_sources: ClassVar[int] = 2
    tiny: ClassVar[dict[str, Any]] = {"loras": 3, "rank": 3, "alpha": 6.0, "layerwise": True, "lr": 3e-2}

    def __post_init__(self) -> None:
        if self.softmax == "top" and self.top is None:
            raise ConfigError("xlora.softmax: top, and no number says how many LoRAs act. Set top, such as top=2.")
        if self.top is not None and self.loras is not None and self.top > self.loras:
            raise ConfigError(f"xlora.top: {self.top} of {self.loras} LoRAs. Give at most {self.loras}.")

    def fitted(self, sources: Sequence[Source]) -> Self:
        for source in sources:
            if source.settings.get("start", "zero") != "zero" or not isinstance(source.settings.get("rank"), int):
                raise ConfigError(
                    f"xlora: {source.folder} is a LoRA with a start of its own, or with other ranks at some places. "
                    "Train it with start=zero and one rank."
                )
        if self.loras not in (None, len(sources)):
            raise ConfigError(f"xlora.loras: {self.loras}, and {len(sources)} sources are given. Leave it out.")
        names = ("rank", "alpha", "scaling", "sites")
        made = replace(self, loras=len(sources), **{name: agreed(self, sources, name) for name in names})
        return self if made == self else made  # fitted twice it is one method, which finds its own modules

    def places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        """Where the LoRAs are."""
        given = self.sites or ("attn.q", "attn.v")
        return check_rows(anatomy, anatomy.sites(*given, asked_by="xlora.sites", fits=is_projection), "xlora", 0.0)

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        if self.loras is None or self.rank is None:
            raise no_sources(self, "LoRAs to mix")
        places = self.places(anatomy)
        shares = Shares(self, last_width(anatomy), len(places) if self.layerwise else 1)
        yield LookFirst(shares)
        number = {site.key: i if self.layerwise else 0 for i, site in enumerate(places)}
        yield from attach_each(places, lambda site, base: Mixed(self, site, shares, number[site.key]))

    def n_params(self, anatomy: Anatomy) -> int:
        places, n = self.places(anatomy), self.loras or 2
        widths = [last_width(anatomy), *[self.width] * (self.depth - 1), n * (len(places) if self.layerwise else 1)]
        network = sum((a + 1) * b for a, b in pairwise(widths))
        return network + self._of_loras(places) * self.train

    def n_stored(self, anatomy: Anatomy) -> int:
        return self.n_params(anatomy) + self._of_loras(self.places(anatomy)) * (not self.train)

    def conflicts(self, other: Method) -> str | None:
        if other.is_a("prompt_tuning", "p_tuning", "spot", "attempt", "mpt", "cpt", "warp", "soft_prompt_mixture"):
            return f"the first pass reads the text alone, and {other.name} puts vectors before it. Use lora with it."
        if other.is_a("lst", "tiny_attention", "attention_fusion"):
            return f"{other.name} follows every pass, and here there are two. Use lora with it."
        return None

    @torch.no_grad()
    def adopt(self, tuned: TunedView, sources: Sequence[Source]) -> None:
        for key, module in own_sites(self, tuned, Mixed):
            parts = [source.part(key) for source in sources]
            module.a.copy_(torch.stack([part["a"] for part in parts]))
            module.b.copy_(torch.stack([part["b"] for part in parts]))

    def _of_loras(self, places: Sequence[Site]) -> int:
        return (self.loras or 2) * (self.rank or 8) * sum(s.d_in + s.d_out for s in places)


def last_width(anatomy: Anatomy) -> int:
    """Width of the last hidden state: OPT may project it on, to the width of its head."""
    heads = [s for s in anatomy.all_sites if s.kind == "head"]
    return heads[0].d_in if heads else anatomy.d


class Shares(nn.Module):
    """How much of each LoRA acts: (rows, tokens, d) -> (rows, tokens, places or 1, N)."""

    def __init__(self, settings: XLoRA, d: int, places: int) -> None:
        super().__init__()
        self.settings, self.places = settings, places
        layers: list[nn.Module] = []
        for _ in range(settings.depth - 1):
            layers += [nn.Linear(d, settings.width), nn.ReLU(), nn.Dropout(settings.dropout)]
            d = settings.width
        self.layers = nn.Sequential(*layers, nn.Linear(d, places * (settings.loras or 2)))

    def forward(self, states: Tensor) -> Tensor:
        how = self.settings
        shares = torch.unflatten(self.layers(states), -1, (self.places, -1))
        if how.softmax == "all":
            shares = (shares / how.temperature).softmax(-1)
        if how.top is not None:
            acts = torch.zeros_like(shares, dtype=torch.bool).scatter(-1, shares.topk(how.top, -1).indices, value=True)
            if how.softmax == "top":
                shares = shares.masked_fill(~acts, -torch.inf).softmax(-1)
            shares = shares.masked_fill(~acts, 0.0)
        return shares


class Mixed(Attachment):
    """The LoRAs of one place, weighed token by token.

    a: (N, rank, d_in)    b: (N, d_out, rank)
    """

    kind = "delta"
    per_token = False  # the last block's first token alone is not enough: the shares are of all

    def __init__(self, settings: XLoRA, site: Site, shares: Shares, number: int) -> None:
        super().__init__()
        n, rank = settings.loras or 2, settings.rank or 8
        by = math.sqrt(rank) if settings.scaling == "root" else rank
        self.scale = settings.strength * (settings.alpha or 16.0) / by
        self.key, self.number = id(shares), number
        # Numbers of the sources, or of the saved tuning that is loaded; drawn only so that they are of some size.
        self.a = nn.Parameter(torch.randn(n, rank, site.d_in) / site.d_in**0.5, requires_grad=settings.train)
        self.b = nn.Parameter(torch.randn(n, site.d_out, rank) / rank**0.5, requires_grad=settings.train)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        shares = self.context.looked.get(self.key)
        if shares is None:  # the first pass
            return y
        n, rank, d_in = self.a.shape
        weights = shares[:, :, self.number].reshape(-1, n).to(self.a.dtype)  # (tokens, N); some models flatten rows
        thin = x.reshape(-1, d_in) @ self.a.view(n * rank, d_in).T
        thin = (thin.view(-1, n, rank) * weights[:, :, None]).view(-1, n * rank)
        wide = thin @ self.b.permute(0, 2, 1).reshape(n * rank, -1)  # (N, d_out, rank) -> (N rank, d_out)
        return y + wide.view(y.shape) * self.scale
