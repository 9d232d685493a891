"""Prefix tuning: train a few keys and values before those of the text, in every attention.

    Attn(q, [P_k ; K], [P_v ; V])          P_k, P_v: (P, n_kv d_head) per attention

With `mlp_width` q they come, during training, from W_2 tanh(W_1 E + b_1) + b_2, with E: (P, d): one network per kind of
attention (encoder, decoder, cross). It is evaluated once at the end and dropped. Prefixes take attention from the
text, so the model starts elsewhere than the base model: even zeros take their share.

Li, Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv:2101.00190, section 4.

Count: without network 2 L P d (grouped heads: their width for d); with it P d + (d + 1) q + (q + 1) 2 L d, of which
2 L P d are stored.
Claims: near full fine-tuning in generation with 0.1 % of its numbers; ahead of it with little data.
Use it when: the task is generation, the weights may not be touched, and rows are few.
Not when: the model is small, the training short, or every token of the context is needed.
Measured: `python -m experiments.rates prefix_tuning --seed 1`, 300 questions of trec6 that the table does not score:
0.90; with optim.lr=1e-3 for all 0.59. The rate is the authors'. A new head learns at 5e-3, which is ours: at 5e-5 it
had hardly moved when a run of luthier's own length ended, and the table's rows gave 0.60 and 0.23.
Pitfalls: no position moves and no key of the prefix is rotated, unlike prefixes handed over as a cache, which shift
every word by P; training needs the network at this learning rate, or a larger one without it; stored numbers are those
without the network. Without one, rows start normal with deviation 0.02: our choice.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

from luthier.anatomy import Anatomy
from luthier.core import at_least, between
from luthier.methods.parts.peft_prefixes import prefix_form
from luthier.methods.parts.prefixes import Prefixes, drop_networks, prefix_params, prefix_stored
from luthier.surgery import METHODS, Edit, Method, PeftForm, PrependKeys, TunedView


@METHODS.register("prefix_tuning", family="additive", paper="arXiv:2101.00190")
@dataclass(frozen=True, kw_only=True)
class PrefixTuning(Method):
    """Settings of prefix tuning."""

    length: Annotated[int, "keys and values before the text", at_least(0)] = 20
    mlp_width: Annotated[int, "inner width of the network that computes them in training; 0 for none", at_least(0)] = (
        512
    )
    dropout: Annotated[float, "share of the prefix dropped in training", between(0, 0.99)] = 0.0

    starts_at_base: ClassVar[bool] = False
    default_lr: ClassVar[float] = 5e-5
    default_head_lr: ClassVar[float | None] = 5e-3
    tiny: ClassVar[dict[str, int]] = {"length": 3, "mlp_width": 7}
    peft: ClassVar[PeftForm | None] = prefix_form(
        "PREFIX_TUNING",
        lambda going: {"encoder_hidden_size": going.anatomy.n_kv_heads * going.anatomy.d_head},
        lambda facts: {"mlp_width": 0},
        lambda rows, facts: {"prefix.self": rows},
        ignored=("encoder_hidden_size", "prefix_projection", "init_weights"),
    )

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        source = Prefixes(anatomy, self.length, self.mlp_width, self.dropout)
        yield PrependKeys(source, anatomy.acting_attentions, self.length)

    def n_params(self, anatomy: Anatomy) -> int:
        return prefix_params(anatomy, self.length, self.mlp_width, "prefix_tuning")

    def n_stored(self, anatomy: Anatomy) -> int:
        return prefix_stored(anatomy, self.length, "prefix_tuning")

    def finish(self, tuned: TunedView) -> None:
        drop_networks(tuned)
