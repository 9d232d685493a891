"""Tiny attention: behind each attention a second one, one number wide, that edits a token by the others of its row.

    u <- u + MHA(q, k, v) W_2^T + b_2        [q; k; v] = LN(u) W_1^T + b_1        each of width a, with a = 1

u is the stream behind the attention's residual sum and norm, before the feed-forward layer. Padding is not attended to,
and in a decoder nothing later is; what a step of a generation needs of earlier tokens lies in the model's own cache.

With `experts` above 1 a run has two parts: one expert trains, then all, begun as its copies with small noise, one after
another, each adding its share. What is stored and served is one module with the mean of their numbers.

Zhao, Tan, Mei 2022, "Tiny-Attention Adapter: Contexts Are More Important Than the Number of Parameters",
arXiv:2211.01979, section 3; in the form of the authors' code, option m0.

Count: per layer and expert 2 d + (3 a d + 3 a) + (4 a^2 + 4 a) + (a d + d); stored, that of one expert.
Claims: as good as adapters on GLUE with 0.05 % of RoBERTa-large's numbers.
Measured: `luthier train sample:minilm-l6 --data sample:trec6 --method tiny_attention`: accuracy 0.917 on 1,076 held-
out rows, one seed, where head_only reaches 0.572.
Cost: a norm and an attention of width one in each layer, for each expert while they train.
Use it when: a tuning must be tiny and should still let tokens tell each other something new.
Not when: several texts stand in one row, packed: they would see each other, so that is refused.
Pitfalls: experts that start apart must not be averaged; averaging what they give costs M times as much in answers; a
causal mask and the padding are as due here as in the large attention.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.core import ModelError, at_least, between
from luthier.methods.parts.behind import closing_norm
from luthier.methods.parts.cache_room import kept_keys
from luthier.methods.parts.own_tensors import own_modules
from luthier.surgery import METHODS, Attachment, Edit, Method, Phase, TunedView, attach_each
from luthier.surgery.prompts import with_vectors


@METHODS.register("tiny_attention", family="additive", paper="arXiv:2211.01979")
@dataclass(frozen=True, kw_only=True)
class TinyAttention(Method):
    """Settings of tiny attention."""

    width: Annotated[int, "of queries, keys and values", at_least(1)] = 1
    experts: Annotated[int, "how many train side by side in the second part of a run", at_least(1)] = 4
    first: Annotated[float, "share of the run in which one expert trains", between(0.01, 0.99)] = 0.5
    dropout: Annotated[float, "of the attention's shares", between(0, 0.99)] = 0.1

    starts_at_base: ClassVar[bool] = False
    default_lr: ClassVar[float] = 5e-3
    tiny: ClassVar[dict[str, int | float]] = {"width": 2, "experts": 2, "lr": 0.05}

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        yield from attach_each(self._places(anatomy), lambda site, base: Experts(self, site, anatomy))

    def n_params(self, anatomy: Anatomy) -> int:
        return self.experts * self.n_stored(anatomy)

    def n_stored(self, anatomy: Anatomy) -> int:
        a, widths = self.width, [s.d_out for s in self._places(anatomy)]
        return sum(2 * d + (3 * a * d + 3 * a) + (4 * a * a + 4 * a) + (a * d + d) for d in widths)

    def phases(self, tuned: TunedView) -> Sequence[Phase]:
        if self.experts == 1:
            return ()
        mine = {id(p) for m in own_modules(self, tuned, Experts) for p in m.experts[1:].parameters()}
        others = {name for name, p in tuned.trained().items() if id(p) in mine}
        return Phase(self.first, trains=lambda name: name not in others), Phase(1 - self.first, fresh=False)

    def enter(self, tuned: TunedView, phase: int) -> None:
        for module in own_modules(self, tuned, Experts):
            module.open(1 if phase == 0 else self.experts)

    def finish(self, tuned: TunedView) -> None:
        for module in own_modules(self, tuned, Experts):
            module.settle()

    def _places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        """Where the stream stands behind an attention: its closing norm, or its end where norms come first."""
        ends = anatomy.sites("attn_out", asked_by="tiny_attention")
        if anatomy.pre_norm:
            return ends
        norms = {(s.stack, s.layer, s.part): s for s in anatomy.all_sites if s.kind == "norm"}
        return tuple(norms[e.stack, e.layer, closing_norm(anatomy, e, "tiny_attention")] for e in ends)


class Experts(Attachment):
    """The experts of one layer; how many act is a number that is kept with them."""

    kind = "sequential"
    reads = "residual"
    per_token = False
    keeps_keys = True

    def __init__(self, settings: TinyAttention, site: Site, anatomy: Anatomy) -> None:
        super().__init__()
        self.stack, self.layer = site.stack, site.layer or 0
        self.causal = anatomy.is_decoder or site.stack == "decoder"
        self.of_norm, self.depth = site.kind == "norm", anatomy.depths[site.stack]
        d, a, dropout = site.d_out, settings.width, settings.dropout
        self.experts = nn.ModuleList(Tiny(d, a, dropout) for _ in range(settings.experts))
        self.acting = 1

    def get_extra_state(self) -> Tensor:
        """How many act, kept with the numbers and not on the device, where every pass would wait for it."""
        return torch.tensor(self.acting)

    def set_extra_state(self, state: Tensor) -> None:
        self.acting = int(state)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        if self.context.packed:
            raise ModelError("tiny_attention: texts stand one behind the other in a row. Give each a row of its own.")
        start = y if self.of_norm else y + x
        u = start if start.dim() == 3 else start.view(self.context.batch, -1, start.shape[-1])
        stream = u
        for number, expert in enumerate(self.experts[: self.acting]):
            stream = stream + expert(stream, lambda kv, n=number: self._with_past(n, kv), self._seen) / self.acting
        return y + (stream - u).view(y.shape)

    def _with_past(self, number: int, kv: Tensor) -> Tensor:
        """Keys and values of the text so far: (rows, tokens, 2 a) -> (rows, all tokens, 2 a)."""
        if not self.causal or self.context.cache is None:
            return kv
        return kept_keys(self.context.cache, self.layer, self.depth, (id(self), number), kv, "tiny_attention")

    def _seen(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """(rows or 1, queries, keys), True where a token is seen; each sees itself."""
        seen = torch.ones(1, queries, keys, dtype=torch.bool, device=device)
        seen = seen.tril(keys - queries) if self.causal else seen
        mask = self.context.mask_for(self.stack)
        if mask is not None:
            mask = mask[:, -keys:] if mask.shape[1] >= keys else with_vectors(mask, keys - mask.shape[1])
            own = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries).triu(keys - queries)
            seen = (seen & (mask != 0)[:, None, :]) | own
        return seen

    @torch.no_grad()
    def open(self, experts: int) -> None:
        """Let so many act; those that have not trained begin as copies of the first."""
        for other in self.experts[1:experts]:
            assert isinstance(other, Tiny)
            other.load_state_dict(self.experts[0].state_dict())
            weight = other.entry.weight
            weight.add_(1e-6 * torch.randn(weight.shape).to(weight.device))  # drawn on the CPU: alike on any device
        self.acting = experts

    @torch.no_grad()
    def settle(self) -> None:
        """One expert with the mean of the numbers."""
        mean = self._mean()
        self.experts = self.experts[:1]
        self.experts[0].load_state_dict(mean)
        self.acting = 1

    def _mean(self) -> dict[str, Tensor]:
        """In double precision, so that copies of one expert have that expert as their mean."""
        each = [expert.state_dict() for expert in self.experts[: self.acting]]
        return {n: torch.stack([one[n].double() for one in each]).mean(0).to(t.dtype) for n, t in each[0].items()}

    def stored(self) -> dict[str, Tensor]:
        """The mean of what acts."""
        return self._mean()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take one expert."""
        self.experts = self.experts[:1]
        self.experts[0].load_state_dict(tensors)
        self.acting = 1


class Tiny(nn.Module):
    """One attention of width a."""

    def __init__(self, d: int, a: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.entry = nn.LayerNorm(d), nn.Linear(d, 3 * a)
        self.into, self.out = nn.Linear(a, 3 * a), nn.Linear(a, a)
        self.exit, self.dropout = nn.Linear(a, d), dropout
        with torch.no_grad():
            self.exit.weight.mul_(0.01)
            self.exit.bias.mul_(0.01)

    def forward(self, u: Tensor, with_past: Any, seen: Any) -> Tensor:
        """u: (rows, tokens, d), and so the result."""
        parts = zip(
            self.entry(self.norm(u)).chunk(3, -1), self.into.weight.chunk(3), self.into.bias.chunk(3), strict=True
        )
        q, k, v = (nn.functional.linear(x, w, b) for x, w, b in parts)  # (rows, tokens, a)
        k, v = with_past(torch.cat([k, v], -1)).chunk(2, -1)
        mask = seen(q.shape[1], k.shape[1], q.device)
        dropout = self.dropout if self.training else 0.0
        c = nn.functional.scaled_dot_product_attention(
            q, k.to(q.dtype), v.to(q.dtype), attn_mask=mask, dropout_p=dropout
        )
        edit: Tensor = self.exit(self.out(c))
        return edit
