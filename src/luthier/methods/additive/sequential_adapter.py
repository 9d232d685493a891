"""Sequential adapter: a small residual bottleneck closes each sublayer, and the norms of the blocks train with it.

    s <- s + W_u σ(W_d s + b_d) + b_u          W_d: (r, d)    W_u: (d, r)

s is what attention, and again what the feed-forward layer, gives: after its dropout, before the residual sum and any
norm. The weights start so small that the model starts near the base model; with init="zero_up" it starts at it.

Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", arXiv:1902.00751, section 2.1.

Count: per sublayer 2 d r + r + d; the norms of the blocks, 4 d per block of BERT; `embedding_norm` adds that norm.
Claims: within 0.4 % of full fine-tuning on GLUE with 3.6 % of its numbers per task.
Cost: two bottlenecks in every block, one behind the other, and gradients of the norms: a quarter more than LoRA on
short rows (docs/benchmarks.md).
Use it when: a well-worn method is wanted whose parts other tools know, and depth may grow.
Not when: answers must cost what the base's cost: it adds layers in a row and does not merge.
Pitfalls: placed after the norm or after the residual sum it is another method; the norms must train, and must not be
decayed; a start much above 1e-2 hurts badly. The paper's text says 1e-2, its released code 1e-3: we follow the code.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from luthier.anatomy import Anatomy, Site, is_sublayer
from luthier.core import AnatomyError, at_least
from luthier.methods.parts.bottleneck import Activation, biases_rest, bottleneck_params, check_sublayers, width_of
from luthier.methods.parts.closing import Closing
from luthier.surgery import METHODS, Edit, Group, Method, TunedView, Unfreeze, attach_each


@METHODS.register("sequential_adapter", family="additive", paper="arXiv:1902.00751")
@dataclass(frozen=True, kw_only=True)
class SequentialAdapter(Method):
    """Settings of the sequential adapter."""

    sites: Annotated[tuple[str, ...], "where to attach; none: attn_out and ffn_out of every layer"] = ()
    width: Annotated[int, "width of the bottleneck", at_least(1)] = 64
    activation: Annotated[Activation, "between its two layers"] = "gelu"
    init: Annotated[Literal["paper", "zero_up"], "small normal weights, or a second layer of zeros"] = "paper"
    train_norms: Annotated[bool, "also train the norms of the blocks that have an adapter"] = True
    embedding_norm: Annotated[bool, "also train the norm of the embeddings"] = False
    cross: Annotated[bool, "also close cross-attention, where there is one"] = False

    starts_at_base: ClassVar[bool] = False
    default_lr: ClassVar[float] = 1e-3
    tiny: ClassVar[dict[str, int]] = {"width": 6}
    trains_base: ClassVar[bool] = True

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        yield from attach_each(
            self._sites(anatomy), lambda site, base: Closing(width_of(site), self.width, self.activation, self.init)
        )
        yield from (Unfreeze(name) for name in self._norms(anatomy))

    def n_params(self, anatomy: Anatomy) -> int:
        norms = 0
        for name in self._norms(anatomy):
            (length,) = anatomy.tensors[name]
            norms += length
        return bottleneck_params(self._sites(anatomy), self.width) + norms

    def groups(self, tuned: TunedView) -> list[Group]:
        return biases_rest(self, tuned, Closing)

    def _sites(self, anatomy: Anatomy) -> tuple[Site, ...]:
        kinds = ["attn_out", "ffn_out"] + (["cross_out"] if self.cross and anatomy.is_encoder_decoder else [])
        found = anatomy.sites(*(self.sites or kinds), asked_by="sequential_adapter.sites", fits=is_sublayer)
        return check_sublayers(found, "sequential_adapter")

    def _norms(self, anatomy: Anatomy) -> list[str]:
        norms = anatomy.sites("norm", asked_by="sequential_adapter") if self.train_norms or self.embedding_norm else ()
        outside = [s for s in norms if s.layer is None and s.part == "embed"]
        if self.embedding_norm and not outside:
            raise AnatomyError(
                f"sequential_adapter: this {anatomy.model_type} model has no norm behind its embeddings. "
                "Leave embedding_norm=false."
            )
        layers = {(s.stack, s.layer) for s in self._sites(anatomy)}
        wanted = [s for s in norms if self.train_norms and s.layer is not None and (s.stack, s.layer) in layers]
        wanted += outside if self.embedding_norm else []
        paths = {s.path for s in wanted}
        return [n for n in anatomy.norm_tensors() if n.rpartition(".")[0] in paths]
