"""Parallel adapter: a bottleneck that reads what the sublayer reads, added to what the sublayer gives.

    f(z) <- f(z) + s (W_u ReLU(W_d z + b_d) + b_u)          W_d: (r, d)    W_u: (d, r)

W_u starts at zero, so the tuned model starts as the base model.

He et al. 2022, "Towards a Unified View of Parameter-Efficient Transfer Learning", arXiv:2110.04366, section 3.3.

Count: per sublayer 2 d r + r + d; one more where the scale is learned.
Claims: better than the sequential adapter and than LoRA at equal size, at the feed-forward layer above all.
Cost: at its default width of 512 the branch multiplies by a fifth of what a block of minilm-l6 does: a third more than
LoRA there, a fifth on smollm2-135m (docs/benchmarks.md).
Use it when: quality counts more than size, and the tuning may stay beside the weights.
Not when: no cost at inference is allowed: it does not merge.
Pitfalls: the branch has no residual of its own; the scale acts in training and evaluation alike. In a model that norms
before its sublayers the released code reads the stream before that norm, not the normed vector: reads="residual". In
post-norm models both are the same tensor.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from luthier.anatomy import Anatomy, Site, is_sublayer
from luthier.core import above, at_least, between
from luthier.methods.parts.bottleneck import Activation, bottleneck_params, check_sublayers
from luthier.methods.parts.parallel_branch import Beside
from luthier.surgery import METHODS, Edit, Method, attach_each


@METHODS.register("parallel_adapter", family="additive", paper="arXiv:2110.04366")
@dataclass(frozen=True, kw_only=True)
class ParallelAdapter(Method):
    """Settings of the parallel adapter."""

    width: Annotated[int, "width of the bottleneck", at_least(1)] = 512
    scale: Annotated[float, "multiplies the branch; the paper's 4 for generation, 2 for GLUE", above(0)] = 4.0
    learn_scale: Annotated[bool, "let the scale train; the paper then starts it at 1"] = False
    placement: Annotated[Literal["ffn", "attn", "both"], "beside which sublayer"] = "ffn"
    sites: Annotated[tuple[str, ...], "where to attach, in place of `placement`: ffn_out@last4, *@0-2"] = ()
    reads: Annotated[Literal["residual", "normed"], "the stream, or what the sublayer reads of it"] = "residual"
    activation: Annotated[Activation, "between its two layers"] = "relu"
    dropout: Annotated[float, "share of the bottleneck dropped in training", between(0, 0.99)] = 0.1

    default_lr: ClassVar[float] = 1e-4
    tiny: ClassVar[dict[str, int]] = {"width": 6}

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        yield from attach_each(self._sites(anatomy), lambda site, base: self._branch(site))

    def n_params(self, anatomy: Anatomy) -> int:
        sites = self._sites(anatomy)
        return bottleneck_params(sites, self.width) + (len(sites) if self.learn_scale else 0)

    def _sites(self, anatomy: Anatomy) -> tuple[Site, ...]:
        kinds = {"ffn": ("ffn_out",), "attn": ("attn_out",), "both": ("attn_out", "ffn_out")}[self.placement]
        found = anatomy.sites(*(self.sites or kinds), asked_by="parallel_adapter.sites", fits=is_sublayer)
        return check_sublayers(found, "parallel_adapter")

    def _branch(self, site: Site) -> Beside:
        return Beside(
            site.d_out,
            self.width,
            self.activation,
            scale=self.scale,
            learn_scale=self.learn_scale,
            dropout=self.dropout,
            reads="residual" if self.reads == "residual" else "input",
        )
