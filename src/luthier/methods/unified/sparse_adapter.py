"""SparseAdapter: most of another method's matrices are held at zero from the start; what is left trains.

    W * M      M: over all matrices of the methods beside it, the 1 - sparsity of the entries with the largest score
    snip: |g * W|    magnitude: |W|    random, er: by lot      g: the gradient of the mean loss, summed over the data
    synflow: |dR/dW * W|, R the sum of what each attachment gives of ones with |W| for W; in a hundred rounds

It stands beside another method, `lora+sparse_adapter`; alone it stands beside the sequential adapter. It starts as that
method does, with most entries gone.

He, Ding, Dong, Zhang, Tao 2022, "SparseAdapter: An Easy Approach for Improving the Parameter-Efficiency of Adapters",
arXiv:2210.04284, section 3. What their code calls sparsity is the share that is kept; here it is the share that goes.
Scores are taken in evaluation mode. GraSP, which they compare too, is not offered; SynFlow runs each attachment alone,
as their code does, but in rounds, as its own paper does.

Count: that of the methods beside it, less what is taken from their matrices: n - floor((1 - sparsity) n) of n. Biases
and norms stay whole.
Claims: at 80 % no loss; a wider adapter with the same count does better (large_sparse).
Cost: a pass over `steps` steps before the first one. A step costs what it costs without: products stay dense.
Use it when: what is stored must be small.
Not when: steps must be cheaper: only the file is smaller. With `compact`, units of a bottleneck that read nothing, or
of which nothing is read, are taken out when training ends: the same answers from narrower layers.
Pitfalls: a second matrix of zeros, as LoRA's B, gives scores of zero to both, and nothing can be told apart: refused; a
threshold instead of a rank keeps or drops whole groups of equal scores; one scope for the whole model can empty a
matrix: scope=tensor keeps the same share of each.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from luthier import kernels
from luthier.anatomy import Anatomy
from luthier.core import CompositionError, ConfigError, at_least, between
from luthier.methods.parts.bottleneck import Bottleneck, without_units
from luthier.methods.parts.masks import no_trace, top_k
from luthier.methods.parts.modifier import Modifier
from luthier.methods.parts.own_tensors import attached, own_tunings
from luthier.surgery import METHODS, Attachment, Batches, Method, TunedView, TuningView, gradients, matrices

ROUNDS = 100
"""Of SynFlow: the share that is kept falls by the same factor in each."""


@METHODS.register("sparse_adapter", family="unified", paper="arXiv:2210.04284")
@dataclass(frozen=True, kw_only=True)
class SparseAdapter(Modifier):
    """Settings of SparseAdapter."""

    sparsity: Annotated[float, "share of the matrices' entries that is held at zero", between(0, 1)] = 0.8
    score: Annotated[Literal["snip", "magnitude", "random", "er", "synflow"], "what entries are kept by"] = "snip"
    scope: Annotated[Literal["model", "tensor"], "best of all matrices, or of each"] = "model"
    steps: Annotated[int, "steps of the first epoch that are looked at, at most", at_least(1)] = 100
    compact: Annotated[bool, "units of a bottleneck that are held at zero as a whole are taken out in the end"] = False

    starts_at_base: ClassVar[bool] = False
    looks_at_data: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("sequential_adapter",)
    tiny: ClassVar[Mapping[str, Any]] = {"sparsity": 0.5}

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            what = "everything, so leave sparse_adapter out" if self.sparsity == 0 else "nothing"
            raise ConfigError(f"sparse_adapter.sparsity: {self.sparsity:g} keeps {what}. Set it between 0 and 1.")

    def n_removed(self, others: Sequence[Method], anatomy: Anatomy) -> int:
        sizes = [math.prod(shape) for other in others for shape in matrices(other, anatomy)]
        if not sizes:
            raise CompositionError(
                f"sparse_adapter: {' and '.join(o.name for o in others)} attach no matrix that could be masked. "
                "Put it beside an adapter or lora."
            )
        return sum(sizes) - self._kept(sizes)

    def prepare(self, tuned: TunedView, batches: Batches) -> None:
        for tuning in own_tunings(self, tuned):
            named = _matrices_of(tuning)
            if self.score == "synflow":
                scores = self._flow(tuned, tuning, list(named.values()))
            else:
                scores = self._scores(tuned, list(named.values()), batches)
            if not all(bool(torch.isfinite(s).all()) for s in scores):
                raise ConfigError("sparse_adapter: a score is not finite. Look at the data or the precision.")
            masks = self._masks(scores)
            if any(int((s > 0).sum()) == 0 for s in scores):
                empty = next(n for n, s in zip(named, scores, strict=True) if not (s > 0).any())
                raise ConfigError(
                    f"sparse_adapter.score: every {self.score} score of {empty} is zero, so nothing in it can be told "
                    "apart: one of two matrices starts at zero. Start it otherwise (init=paper, init=gaussian), or use "
                    "score=random."
                )
            tuning.masks.update(zip(named, masks, strict=True))
            with torch.no_grad():
                for parameter, mask in zip(named.values(), masks, strict=True):
                    parameter.mul_(mask)

    def finish(self, tuned: TunedView) -> None:
        for tuning in own_tunings(self, tuned) if self.compact else ():
            for key, module in tuning.modules_by_key().items():
                down, up = (tuning.masks.get(f"{key}.{n}.weight") for n in ("down", "up"))
                if isinstance(module, Bottleneck) and down is not None and up is not None:
                    left = without_units(module, down, up)
                    tuning.masks |= dict(zip((f"{key}.down.weight", f"{key}.up.weight"), left, strict=True))

    def after_backward(self, tuned: TunedView, step: int, total: int) -> None:
        if not all(t.masks for t in own_tunings(self, tuned)):
            raise ConfigError("sparse_adapter: nothing was masked. Call prepare(tuned, batches) before training.")

    def conflicts(self, other: Method) -> str | None:
        if other.is_a("p_tuning", "hiwi"):
            return f"a network makes the numbers of {other.name}, and would be masked instead. Use one of them."
        if other.is_a("adamix", "propetl"):
            return f"{other.name} averages or masks its matrices itself, which breaks the density. Use one of them."
        return None

    def _flow(self, tuned: TunedView, tuning: TuningView, parameters: list[nn.Parameter]) -> list[Tensor]:
        """The scores of the last round: zero for what an earlier one has cut."""
        masks = [torch.ones_like(p, dtype=torch.bool) for p in parameters]
        for turn in range(1, ROUNDS + 1):
            scores = flow(tuned, tuning, parameters, masks)
            masks = self._masks(scores, 1 - (1 - self.sparsity) ** (turn / ROUNDS))
        return scores

    def _kept(self, sizes: Sequence[int], sparsity: float | None = None) -> int:
        density = 1 - (self.sparsity if sparsity is None else sparsity)
        if self.scope == "model":
            return math.floor(density * sum(sizes) + 1e-6)
        return sum(math.floor(density * n + 1e-6) for n in sizes)

    def _masks(self, scores: list[Tensor], sparsity: float | None = None) -> list[Tensor]:
        if self.scope == "model":
            return top_k(scores, self._kept([s.numel() for s in scores], sparsity))
        return [top_k([s], self._kept([s.numel()], sparsity))[0] for s in scores]

    def _scores(self, tuned: TunedView, parameters: list[nn.Parameter], batches: Batches) -> list[Tensor]:
        if self.score == "magnitude":
            return [p.detach().abs() for p in parameters]
        if self.score in ("random", "er"):
            with no_trace(tuned, training=False):
                lots = [torch.rand(p.shape, device="cpu").to(p.device) + 1e-6 for p in parameters]
            # Erdos-Renyi: a layer's density goes with (in + out) / (in out), so u^(1 / that) competes with the others'.
            ways = [sum(p.shape) / p.numel() if self.score == "er" else 1.0 for p in parameters]
            return [lot.pow(1 / way) if self.score == "er" else lot for lot, way in zip(lots, ways, strict=True)]
        looked = batches[: self.steps]
        if len(looked) == 0:
            raise ConfigError("sparse_adapter: no batch to score with. Give prepare() at least one.")
        summed = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        with no_trace(tuned, training=False):
            for batch in looked:
                for total, grad in zip(summed, gradients(batch, parameters), strict=True):
                    if grad is not None:
                        total += grad / len(looked)
        return [(g * p.detach()).abs() for g, p in zip(summed, parameters, strict=True)]


def flow(tuned: TunedView, tuning: TuningView, parameters: list[nn.Parameter], masks: Sequence[Tensor]) -> list[Tensor]:
    """SynFlow's scores of one round: every attachment reads ones, with |W| * M for W and biases of zero."""
    sites = {site.key: site for site in tuned.anatomy.all_sites}
    everything = [p for m in tuning.modules_by_key().values() for p in m.parameters()]
    before = [(p, p.detach().clone()) for p in everything]
    held = {id(p): mask for p, mask in zip(parameters, masks, strict=True)}
    try:
        with no_trace(tuned, training=False), kernels.plain():
            for p, value in before:
                p.data.copy_(value.abs() * held.get(id(p), p.dim() > 1))
            given = torch.zeros((), device=parameters[0].device)
            for key, module in tuning.modules_by_key().items():
                site = sites.get(key.rpartition(":")[2].partition("~")[0])
                if site is not None and isinstance(module, Attachment):
                    wide = site.d_out if site.kind.endswith("_out") else site.d_in
                    x, y = (torch.ones(1, n, device=given.device) for n in (wide, site.d_out))
                    given = given + module.after(x, y).sum()
            grads = torch.autograd.grad(given, parameters, allow_unused=True)
            return [
                torch.zeros_like(p) if g is None else (g * p.detach()).abs()
                for p, g in zip(parameters, grads, strict=True)
            ]
    finally:
        for p, value in before:
            p.data.copy_(value)


def _matrices_of(tuning: TuningView) -> dict[str, nn.Parameter]:
    """The attached tensors of two dimensions or more that learn, by canonical name."""
    return {name: p for name, p in attached(tuning).items() if p.dim() > 1}
