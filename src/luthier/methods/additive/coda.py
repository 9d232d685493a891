"""CoDA: each block is run for a part of the tokens, chosen by a router, and a light adapter beside it for all.

    λ = SoftTopK(X w, k)        I = the k tokens with the largest λ        ΔF(X_I) = block(X_I) - X_I

    Y = X + A(X) + scatter_I(λ_I ΔF(X_I))        A: W_u ReLU(W_d x + b_d) + b_u

k is a row's own length divided by `reduction`, rounded up; the tokens that are picked see one another alone (k-to-k).
SoftTopK solves max λ s + ε H(λ) under 0 <= λ <= 1, Σλ = k: `iterative` by the paper's twenty steps, which at small ε
stop before Σλ is k, `exact` by bisection. In an encoder-decoder the encoder's blocks are run so.

Lei et al. 2023, "Conditional Adapters: Parameter-efficient Transfer Learning with Fast Inference", arXiv:2304.04947,
section 3. Its continued pretraining, in which the converted model learns to do without the tokens that are left out, is
not offered as a part of the method; without it results are those of a model that was not made for this. Its k-to-all
form, in which picked tokens see all others, is not offered either.

Count: per block 2 d r + r + d, and d for the router.
Claims: three times as fast in answers at a point less than a parallel adapter, for large T5 encoders.
Measured: `luthier train sample:minilm-l6 --data sample:trec6 --method coda --steps 300`: accuracy 0.668 on 1,076
held-out rows, one seed, where head_only reaches 0.572; with first=false 0.404 after 729 steps, below it: the token that
the head reads is then run through a block only where the router happens to pick it. No rate of the head makes up for
the tokens that are left out: `python -m experiments.rates coda` scores 0.53, with `optim.head_lr=1e-2` 0.58, and there
the loss on rows held out rises from step 123 on.
Cost: less than the base's own: attention and feed-forward layers see one token in `reduction`.
Use it when: texts are long, answers must be fast, and there is time for continued pretraining.
Not when: texts are short, a decoder reads them, or rows are few: skipped tokens cost more than they save.
Pitfalls: without λ in the sum the router never learns; at the paper's ε of 0.03 every picked λ is exactly 1 for scores
of usual size, and it does not learn either: the default here is 1, the largest that the paper's range has. k counts a
row's own tokens, or padding would change the answer. `first` is ours: the paper's models write their answers, and none
of them reads a row's first token alone.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.core import above, at_least
from luthier.methods.parts.bottleneck import Bottleneck
from luthier.methods.parts.encoder_ends import encoder_ends
from luthier.methods.parts.trial_pass import try_pass
from luthier.surgery import METHODS, Attach, Edit, Method, TunedView

FAR = 100.0  # above all other scores, so that λ is 1 at any ε of the paper's


@METHODS.register("coda", family="additive", paper="arXiv:2304.04947")
@dataclass(frozen=True, kw_only=True)
class CoDA(Method):
    """Settings of CoDA."""

    reduction: Annotated[float, "of so many tokens one goes through the block", at_least(1)] = 3.0
    width: Annotated[int, "of the adapter's bottleneck", at_least(1)] = 64
    solver: Annotated[Literal["iterative", "exact"], "how λ is found"] = "iterative"
    epsilon: Annotated[float, "of SoftTopK: the smaller, the nearer λ is to 0 and 1", above(0)] = 1.0
    first: Annotated[bool, "a row's first token always goes through the block: a head of labels reads it"] = True

    starts_at_base: ClassVar[bool] = False
    looks_ahead: ClassVar[bool] = True
    default_lr: ClassVar[float] = 1e-3
    tiny: ClassVar[dict[str, int | float]] = {"width": 6, "reduction": 2.0}

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        for site in self._blocks(anatomy):
            yield Attach(site, lambda base, s=site: Routed(self, s), takes_over=True)  # type: ignore[misc]

    def n_params(self, anatomy: Anatomy) -> int:
        return sum(2 * s.d_out * self.width + self.width + 2 * s.d_out for s in self._blocks(anatomy))

    def begin(self, tuned: TunedView) -> None:
        try_pass(tuned, "coda")

    def conflicts(self, other: Method) -> str | None:
        if other.is_a("lst", "pasta"):
            return f"coda takes the calls of blocks over, which {other.name} reads or changes. Use one of them."
        return None

    def _blocks(self, anatomy: Anatomy) -> tuple[Site, ...]:
        why = "would pick tokens by later ones, which are not there when it writes. Use parallel_adapter."
        return encoder_ends(anatomy, "coda", why)


class Routed(Bottleneck):
    """Runs its block for the tokens that the router picks, and the adapter for all."""

    kind = "parallel"
    per_token = False

    def __init__(self, settings: CoDA, site: Site) -> None:
        super().__init__(site.d_out, settings.width, "relu")
        self.settings, self.stack = settings, site.stack
        self.router = nn.Parameter(torch.randn(site.d_out) / math.sqrt(site.d_out))
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)

    def around(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        real = self._real(x)  # (rows, T)
        k = torch.ceil(real.sum(-1) / self.settings.reduction).long()  # (rows,)
        with torch.autocast(x.device.type, enabled=False):
            scores = x.float() @ self.router.float()  # (rows, T)
            shares = soft_top_k(scores, k, real, self.settings.epsilon, self.settings.solver)
            if self.settings.first:
                first = real & (real.cumsum(-1) == 1)
                scores = torch.where(first, scores.detach().amax() + FAR, scores)
                others = soft_top_k(scores, k, real, self.settings.epsilon, self.settings.solver)
                # 1, with the gradient of what it would be: the last block's router has no other.
                shares = torch.where(first, 1 + (shares - shares.detach()), others)
        best = scores.detach().masked_fill(~real, -torch.inf).topk(int(k.max())).indices  # (rows, k)
        kept = torch.arange(best.shape[1], device=x.device) < k[:, None]
        pick, order = best.sort(-1)  # in the text's order
        kept = kept.gather(-1, order)
        rows = torch.arange(len(x), device=x.device)[:, None]
        change = call(x, pick, kept) - x[rows, pick]  # (rows, k, d)
        change = change * (shares.gather(-1, pick) * kept)[..., None].to(x.dtype)
        wide = x.to(self.up.weight.dtype)
        light = self.add(wide, wide).to(x.dtype)
        return light.index_put((rows, pick), change, accumulate=True)

    def _real(self, x: Tensor) -> Tensor:
        mask, around = self.context.mask_for(self.stack), self.context.around
        if mask is None:
            return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        return (mask if around is None else around.filled(mask, 1)) != 0


def soft_top_k(scores: Tensor, k: Tensor, real: Tensor, epsilon: float, solver: str, steps: int = 20) -> Tensor:
    """λ of each token, in [0, 1]; 1 where k is all that there is. scores, real: (rows, T), k: (rows,) -> (rows, T)."""
    shares = _iterative(scores, k, real, epsilon, steps) if solver == "iterative" else _exact(scores, k, real, epsilon)
    shares = torch.where((k >= real.sum(-1))[:, None], torch.ones_like(shares), shares)
    return shares * real


def _iterative(scores: Tensor, k: Tensor, real: Tensor, epsilon: float, steps: int) -> Tensor:
    """Dual ascent, with an ε that falls from 4 by three tenths a step."""
    now, wanted = max(4.0, epsilon), k.to(scores.dtype).log()[:, None]
    a, b = torch.zeros_like(wanted), -scores
    for _ in range(steps):
        a = now * (wanted - ((scores + b) / now).masked_fill(~real, -torch.inf).logsumexp(-1, keepdim=True))
        b = -torch.relu(scores + a)
        now = max(now * 0.7, epsilon)
    return ((scores + a + b) / now).exp().clamp(max=1.0)


def _exact(scores: Tensor, k: Tensor, real: Tensor, epsilon: float) -> Tensor:
    """λ = min(1, exp((s + a) / ε)), with the a for which they sum to k: bisection, then that equation's gradient."""
    fixed = scores.detach().double().masked_fill(~real, -torch.inf)
    low = -fixed.amax(-1, keepdim=True) - epsilon * fixed.shape[-1]
    high = -scores.detach().double().masked_fill(~real, torch.inf).amin(-1, keepdim=True)
    for _ in range(200):
        middle = (low + high) / 2
        enough = ((fixed + middle) / epsilon).exp().clamp(max=1.0).sum(-1, keepdim=True) >= k[:, None]
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    shares = ((fixed + high) / epsilon).exp()
    # Those below 1 share what is left: log λ = s / ε + log(left) - logsumexp(s / ε), which has the right gradient.
    free = (shares < 1) & real
    left = (k[:, None] - ((shares >= 1) & real).sum(-1, keepdim=True)).clamp(min=1e-30).to(scores.dtype)
    inside = (scores / epsilon).masked_fill(~free, -torch.inf)
    below = left * torch.softmax(inside.masked_fill(~free.any(-1, keepdim=True), 0.0), -1)
    return torch.where(free, below, torch.ones_like(scores))
