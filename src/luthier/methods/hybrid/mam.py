"""MAM adapter: a short prefix for the attention heads, and the rest of the budget beside the feed-forward layer.

    Attn(q, [P_k ; K], [P_v ; V])          f(z) <- f(z) + s (ReLU(z W_d + b_d) W_u + b_u)

P_k, P_v: (l, d) per layer, from a small network during training; W_d: (d, r), W_u: (r, d); z is what the feed-forward
layer reads. W_u starts at zero; the prefix takes attention from the text, so the model starts elsewhere than the base.

He et al. 2022, "Towards a Unified View of Parameter-Efficient Transfer Learning", arXiv:2110.04366, section 4.6.

Count: stored 2 l d L + (2 d r + r + d) L; the network trains l d + (d + 1) q + (q + 1) 2 L d instead of the 2 l d L.
Claims: 6.7 % of the numbers of BART-large match full fine-tuning in summarisation and translation.
Cost: 16 more keys in every attention, the network that makes them, and a branch beside every feed-forward layer: three
tenths more than LoRA on short rows (docs/benchmarks.md).
Use it when: quality counts more than size, and keys and a branch may stay beside the weights.
Not when: the tuning must be small, or must merge.
Measured: `python -m experiments.rates mam --seed 1`, 300 questions of trec6 that the table does not score: 0.91. The
rate is the authors' for GLUE. A new head learns at 5e-3, which is ours: at 1e-4 it had hardly moved when a run of
luthier's own length ended, and the table's rows gave 0.74.
Pitfalls: soft tokens before the text would be another method; the scale acts on the branch alone; the branch reads the
input of the feed-forward layer, not its output. The settings are those of GLUE; l=30, r=512, s=4 are the paper's for
generation. Without the network (mlp_width=0) the default rate is too small: keys and values of noise stay as they are.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

from luthier.anatomy import Anatomy, Site
from luthier.core import above, at_least, between
from luthier.methods.parts.bottleneck import bottleneck_params
from luthier.methods.parts.parallel_branch import Beside
from luthier.methods.parts.prefixes import Prefixes, drop_networks, prefix_params, prefix_stored
from luthier.surgery import METHODS, Edit, Method, PrependKeys, TunedView, attach_each


@METHODS.register("mam", family="hybrid", paper="arXiv:2110.04366")
@dataclass(frozen=True, kw_only=True)
class MAM(Method):
    """Settings of the MAM adapter."""

    length: Annotated[int, "keys and values before the text", at_least(1)] = 16
    mlp_width: Annotated[int, "inner width of the prefix's network in training; 0 for none", at_least(0)] = 800
    width: Annotated[int, "width of the bottleneck beside the feed-forward layer", at_least(1)] = 16
    scale: Annotated[float, "multiplies that branch", above(0)] = 2.0
    dropout: Annotated[float, "share of prefix and bottleneck dropped in training", between(0, 0.99)] = 0.1

    starts_at_base: ClassVar[bool] = False
    default_lr: ClassVar[float] = 1e-4
    default_head_lr: ClassVar[float | None] = 5e-3
    tiny: ClassVar[dict[str, int]] = {"length": 3, "width": 6, "mlp_width": 7}

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        source = Prefixes(anatomy, self.length, self.mlp_width, self.dropout, asked_by="mam")
        yield PrependKeys(source, anatomy.acting_attentions, self.length)
        yield from attach_each(self._sites(anatomy), lambda site, base: self._branch(site))

    def n_params(self, anatomy: Anatomy) -> int:
        beside = bottleneck_params(self._sites(anatomy), self.width)
        return prefix_params(anatomy, self.length, self.mlp_width, "mam") + beside

    def n_stored(self, anatomy: Anatomy) -> int:
        beside = bottleneck_params(self._sites(anatomy), self.width)
        return prefix_stored(anatomy, self.length, "mam") + beside

    def finish(self, tuned: TunedView) -> None:
        drop_networks(tuned)

    def _sites(self, anatomy: Anatomy) -> tuple[Site, ...]:
        return anatomy.sites("ffn_out", asked_by="mam")

    def _branch(self, site: Site) -> Beside:
        return Beside(site.d_out, self.width, "relu", scale=self.scale, dropout=self.dropout)
