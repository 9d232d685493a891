"""Laplace-LoRA: after training, a Gaussian around LoRA's numbers, and answers that are its mean.

    W ~ N(W*, (F + prior I)^-1)    f ~ N(f*(x), J Sigma J^T)    p = E[softmax(f)]      W: A and B of every place

W* is what was trained, f* the logits there, J their Jacobian. F is the curvature of the training loss, summed over the
model's own answers, as a product of two factors for each matrix: the mean of a a^T over tokens, a what it reads, and
the sum of g g^T, g the gradient of what it gives. Of a wide factor the `directions` largest eigenvectors are kept.

It stands beside LoRA, `lora+laplace_lora`. Training is LoRA's to the bit; then the training rows are read once more.
`predict` and `evaluate` answer by p, and the run reports loss and calibration error with and without.

Yang, Robeyns, Wang, Aitchison 2023, "Bayesian Low-rank Adaptation for Large Language Models", arXiv:2308.13111,
section 4. A run holds rows out of training (`eval.share`) and takes the prior's precision with which these are answered
best; without such rows it is where the evidence is greatest, found exactly and not by steps, which is too wide wherever
training rows are fitted well. A new head stays at its point estimate. Averaging sampled logits, as one public version
does, gives the plain answers back.

Count: none of its own; the file holds rank^2 + directions * d more for each matrix.
Claims: better calibrated answers at LoRA's accuracy.
Measured: on 300 rows of trec6 (`python -m experiments.rows FOLDER`, then there `luthier train sample:minilm-l6 --data
few.csv --test held.csv --method lora+laplace_lora --epochs 20`), one seed, 400 other rows: loss 0.346 in place of
0.368, calibration error 0.039 in place of 0.054. On all rows of sample:trec6, three epochs, LoRA alone is calibrated
already (loss 0.213, error 0.027): no prior did better, and that of the evidence, with ten directions, did much worse
(0.360, 0.195).
Cost: one pass over the training rows after the last step, and a backward pass for each class, then and in each answer.
Use it when: probabilities are acted upon, and rows are few or epochs many.
Not when: answers must be fast, or there are hundreds of classes; merged, the model gives its plain answers.
Pitfalls: dropout has to be off while it measures; the labels of the rows would give another matrix than F; factors are
summed over all rows once.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier import kernels
from luthier.anatomy import Anatomy, Site, at_site
from luthier.core import CompositionError, ConfigError, above, at_least, between
from luthier.methods.parts.low_rank import ThinUpdate
from luthier.methods.parts.masks import first_share, no_trace
from luthier.methods.parts.modifier import Modifier
from luthier.methods.parts.posterior import (
    Call,
    Posterior,
    Root,
    evidence_precision,
    matrix_gradients,
    watched_calls,
)
from luthier.surgery import METHODS, Batches, Method, Objective, TunedView, keyed, passes_of

PRIORS = tuple(10 ** (n / 2) for n in range(-2, 13))
"""Precisions that are tried where rows are held out: from 0.1 to a million, at which the answers are the plain ones."""
Jacobian = dict[Posterior, list[Tensor]]  # of each matrix, for each class: (rows, n_out, n_in)
Seen = Sequence[Sequence[Call]]  # of each module, its calls


@METHODS.register("laplace_lora", family="reparameterised", paper="arXiv:2308.13111")
@dataclass(frozen=True, kw_only=True)
class LaplaceLoRA(Modifier):
    """Settings of Laplace-LoRA."""

    prior: Annotated[float | None, "precision of the prior; left out, chosen on held-out rows", above(0)] = None
    directions: Annotated[int, "eigenvectors that are kept of a wide factor", at_least(1)] = 10
    data: Annotated[float, "share of the training rows that is read again", between(0.001, 1)] = 1.0
    layers: Annotated[Literal["all", "last"], "over the numbers of all layers, or of the last one that has any"] = "all"
    answers: Annotated[Literal["sample", "probit"], "the mean of the softmax: by sampling, or an approximation"] = (
        "sample"
    )
    samples: Annotated[int, "draws for the mean, the same for every row", at_least(2)] = 2000

    mergeable: ClassVar[bool] = True
    classes_only: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("lora",)

    def n_beside(self, others: Sequence[Method], anatomy: Anatomy) -> int:
        return sum(
            Posterior.size(*shape, self.directions)
            for other in others
            for site, rank, train_a in _sites_of(other, anatomy, self.layers)
            for shape in [(rank, site.d_in)] * train_a + [(site.d_out, rank)]
        )

    def conflicts(self, other: Method) -> str | None:
        if not other.is_a("lora"):
            return f"the posterior is over LoRA's two matrices, and {other.name} has none. Put it beside lora alone."
        return None

    def begin(self, tuned: TunedView) -> None:
        modules = self._modules(tuned)
        if not modules:
            raise CompositionError("laplace_lora: there is no LoRA beside it. Write lora+laplace_lora.")
        for module in modules:
            for name, matrix in (("a", module.a), ("b", module.b)):
                if matrix.requires_grad:
                    made = Posterior(matrix.shape[0], matrix.shape[1], self.directions)
                    module.add_module(f"posterior_{name}", made.to(matrix.device))

    def __post_init__(self) -> None:
        object.__setattr__(self, "holds_out", self.prior is None)

    def conclude(self, tuned: TunedView, batches: Batches, held: Batches = ()) -> None:
        modules = self._modules(tuned)
        roots = {p: (Root(p.inputs), Root(p.outputs)) for m in modules for p in _posteriors(m).values()}
        tokens, looked = [0 for _ in modules], first_share(batches, self.data)
        with no_trace(tuned, training=False), kernels.plain(), torch.enable_grad():
            for one in (one for batch in looked for one in passes_of(batch)):
                with watched_calls(modules) as seen:
                    logits = one().logits
                if logits is None or logits.dim() != 2 or logits.shape[1] < 2:
                    raise ConfigError(
                        "laplace_lora: a pass gave no logits of classes, (rows, classes). It measures a "
                        "classification alone."
                    )
                tokens = [n + more for n, more in zip(tokens, _measure(modules, seen, logits, roots), strict=True)]
        if not any(tokens):
            raise ConfigError(
                "laplace_lora: there was no training row to measure the curvature with, and so no posterior. Give "
                "conclude() steps whose `passes` have logits, or train without it."
            )
        for module, n in zip(modules, tokens, strict=True):
            for posterior in _posteriors(module).values():
                inputs, outputs = (root.rows() for root in roots[posterior])
                posterior.inputs.copy_(inputs / max(1, n) ** 0.5)
                posterior.outputs.copy_(outputs * (len(batches) / len(looked)) ** 0.5)
        if self.prior is not None:
            prior = self.prior
        elif len(held):
            prior = self._by_held(tuned, modules, held)
        else:
            square = sum(float(p.detach().double().square().sum()) for m in modules for p in _matrices(m))
            prior = evidence_precision(list(roots), square)
        for posterior in roots:
            posterior.precision.fill_(prior)

    def _by_held(self, tuned: TunedView, modules: Sequence[ThinUpdate], held: Batches) -> float:
        """The precision with which rows that nothing learnt from are answered with the least loss."""
        losses = dict.fromkeys(PRIORS, 0.0)
        with no_trace(tuned, training=False):
            for one in (one for batch in held for one in passes_of(batch)):
                found, jacobian = _with_jacobian(modules, one)
                means = found.logits.detach().double()
                for prior in PRIORS:
                    answers = self._mean(means, _spread(jacobian, prior))
                    losses[prior] += float(F.nll_loss(answers, found.labels, reduction="sum"))
        return min(PRIORS, key=lambda prior: losses[prior])

    def answer(self, tuned: TunedView, forward: Objective) -> Any:
        modules = self._modules(tuned)
        if not all(p.fitted for m in modules for p in _posteriors(m).values()):
            return forward()  # in evaluations between steps nothing has been measured yet
        found, jacobian = _with_jacobian(modules, forward)
        means = found.logits.detach()
        with torch.no_grad(), _exactly(means):
            found.logits = self._mean(means.double(), _spread(jacobian)).to(means.dtype)
        return found

    def _mean(self, means: Tensor, spread: Tensor) -> Tensor:
        """log E[softmax(f)] of f ~ N(means, spread). (rows, classes), (rows, classes, classes)"""
        if self.answers == "probit":
            wide = spread.diagonal(dim1=1, dim2=2)
            return (means / (1 + torch.pi / 8 * wide).sqrt()).log_softmax(-1)
        n_classes = means.shape[1]
        with keyed(0, "laplace"):
            half = torch.randn(-(-self.samples // 2), n_classes, dtype=torch.float64)
        draws = torch.cat([half, -half]).to(means.device)  # (samples, classes), with a mean of zero
        near = 1e-6 * torch.eye(n_classes, dtype=torch.float64, device=means.device)
        roots = torch.linalg.cholesky(spread + near)
        logits = torch.stack([m + draws @ r.T for m, r in zip(means, roots, strict=True)])  # (rows, samples, classes)
        return logits.softmax(-1).mean(1).log()

    def _modules(self, tuned: TunedView) -> list[ThinUpdate]:
        """The updates that it speaks of, in the order of the model, whether they learn or not."""
        held = [t for t in tuned.tunings.values() if t.active and t.made_by(self)]
        found = {k: m for t in held for k, m in t.modules_by_key().items() if isinstance(m, ThinUpdate)}
        layers = {site.key: site.layer for site in tuned.anatomy.all_sites}
        at = [layers[key.rpartition(":")[2]] for key in found]
        last = max((layer for layer in at if layer is not None), default=None)
        return [m for m, layer in zip(found.values(), at, strict=True) if self.layers == "all" or layer == last]


def _with_jacobian(modules: Sequence[ThinUpdate], forward: Callable[[], Any]) -> tuple[Any, Jacobian]:
    """What a pass gave, and of its logits the gradient in every matrix."""
    with torch.enable_grad(), kernels.plain():
        with watched_calls(modules) as seen:
            found = forward()
        logits = found.logits
        each = torch.eye(logits.shape[1], device=logits.device, dtype=logits.dtype)
        with _exactly(logits):
            return found, _jacobian(modules, seen, logits, each)


def _exactly(logits: Tensor) -> torch.autocast:
    """Within, products are in the precision of their factors, where a run's passes are in halves."""
    return torch.autocast(logits.device.type, enabled=False)


def _spread(jacobian: Jacobian, precision: float | None = None) -> Tensor:
    """The covariance of the logits of each row. (rows, classes, classes)"""
    return torch.stack([p.covariance(torch.stack(j, 1), precision) for p, j in jacobian.items()]).sum(0)


def _matrices(module: ThinUpdate) -> list[Tensor]:
    """Those of A and B that learnt."""
    return [getattr(module, name) for name in _posteriors(module)]


def _posteriors(module: ThinUpdate) -> dict[str, Posterior]:
    held = {name: getattr(module, f"posterior_{name}", None) for name in ("a", "b")}
    return {name: found for name, found in held.items() if isinstance(found, Posterior)}


def _sites_of(lora: Any, anatomy: Anatomy, layers: str) -> Iterator[tuple[Site, int, bool]]:
    """The places of a LoRA, each with its rank and whether A learns."""
    here, places = lora.on(anatomy), lora.places(anatomy)
    last = max((site.layer for site in places if site.layer is not None), default=None)
    for site in places:
        if layers == "all" or site.layer == last:
            yield site, at_site(here.rank, site), here.train_a


def _backwards(logits: Tensor, seen: Seen, of: Iterable[Tensor]) -> Iterator[list[list[Tensor]]]:
    """For each of `of`, (rows, classes), the gradient of its product with the logits at what each call gave."""
    outs = [call.out for calls in seen for call in calls]
    for vector in of:
        found = torch.autograd.grad(logits, outs, vector, retain_graph=True, allow_unused=True)
        grads = iter([torch.zeros_like(o) if g is None else g for o, g in zip(outs, found, strict=True)])
        yield [[next(grads) for _ in calls] for calls in seen]


def _measure(
    modules: Sequence[ThinUpdate], seen: Seen, logits: Tensor, sums: Mapping[Posterior, tuple[Root, Root]]
) -> list[int]:
    """Add a pass to the factors. How many tokens of it took part in each module: padding does in none."""
    shares = logits.detach().float().softmax(-1)
    each = torch.eye(logits.shape[1], device=logits.device)
    # The columns of a root of diag(p) - p p^T, which is the curvature of the loss in the logits, whatever the label.
    roots = (shares[:, c, None].sqrt() * (e - shares) for c, e in enumerate(each))
    some = torch.linspace(1, 2, logits.shape[1], device=logits.device).expand_as(logits)
    (first,) = _backwards(logits, seen, [some.to(logits.dtype)])
    real = [[back.flatten(0, 1).any(-1) for back in backs] for backs in first]  # (rows * tokens,) of each call
    for c, backs in enumerate(_backwards(logits, seen, (r.to(logits.dtype) for r in roots))):
        for module, calls, marks, mine in zip(modules, seen, real, backs, strict=True):
            for call, mark, back in zip(calls, marks, mine, strict=True):
                parts = matrix_gradients(module, call.x, back)
                for name, posterior in _posteriors(module).items():
                    read, given = (t.flatten(0, 1)[mark] for t in parts[name])
                    inputs, outputs = sums[posterior]
                    outputs.add(given)
                    if c == 0:
                        inputs.add(read)
    return [sum(int(mark.sum()) for mark in marks) for marks in real]


def _jacobian(modules: Sequence[ThinUpdate], seen: Seen, logits: Tensor, each: Tensor) -> Jacobian:
    """Of every class, the gradient of its logit in every row, by matrix: (rows, n_out, n_in)."""
    found: Jacobian = {p: [] for m in modules for p in _posteriors(m).values()}
    for backs in _backwards(logits, seen, (one.expand_as(logits) for one in each)):
        for module, calls, mine in zip(modules, seen, backs, strict=True):
            parts = [matrix_gradients(module, call.x, back) for call, back in zip(calls, mine, strict=True)]
            for name, posterior in _posteriors(module).items():
                whole = [torch.einsum("nti,nto->noi", *part[name]) for part in parts]
                found[posterior].append(torch.stack(whole).sum(0))
    return found
