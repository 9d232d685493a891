"""LoRA: leave the weight frozen, train a product of two thin matrices beside it.

    y = x W^T + b + (alpha / rank) dropout(x) A^T B^T          A: (rank, d_in)    B: (d_out, rank)

B starts at zero, so the tuned model starts as the base model.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1. A is drawn from
U(±1/sqrt(d_in)), as the authors' code does; the paper says Gaussian.

`scaling=root` divides by sqrt(rank) instead (arXiv:2312.03732), `b_rate` is how many times faster B learns than A
(arXiv:2402.12354), `train_a=false` leaves A as it was drawn (arXiv:2308.03303), and `start` takes A and B from the
weight itself: its largest singular values (svd, arXiv:2404.02948), its smallest (minor), or Q and R of it (qr,
arXiv:2406.01775); the update is then how far they have moved. Or rows are looked at first: `eva` takes A from what the
layer reads (arXiv:2410.07170), `corda` both from the weight, weighed by that (arXiv:2406.05223), `lora_ga` both from
the weight's gradient (arXiv:2407.05000). `mica` (arXiv:2604.01694) starts B at the smallest left singular vectors and A
at zero; `orthogonal` draws both so that their product is zero. `scope` takes it to first order around its start
(arXiv:2310.04742; see l_lora). `rslora`, `lora_plus`, `lora_fa`, `pissa`, `olora`,
`eva`, `corda`, `lora_ga`, `mica` and `l_lora` are LoRA with these, and all of them go together.

Count: sum over sites of rank * (d_in + d_out); rank * d_out where A is frozen. With a start that is not zero the file
holds the start too.
Claims: quality of full fine-tuning with a fraction of its trained numbers; no cost at inference once merged.
Use it when: in doubt. It is close to full fine-tuning, costs little, merges, and many tools read it.
Not when: the model must learn what is far from it, such as a new language, where low rank is too little.
Pitfalls: the effective scale is alpha / rank, so raising the rank alone weakens the update; dropout belongs on the
branch, never on the base path; a bf16 merge loses most of a small update, so merging is done in fp32 and cast once;
at the first step A has no gradient at all, because B is zero.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from luthier.anatomy import Anatomy, NumberBySite, Site, WholeBySite
from luthier.core import above, at_least, between
from luthier.methods.parts.first_order import Scope, check_scope, check_scoped_sites, kinds_of
from luthier.methods.parts.low_rank_axes import LowRankAxes
from luthier.methods.parts.starts import Start
from luthier.surgery import METHODS, Attachment, Base, Edit, Linearise, Method


@METHODS.register("lora", family="reparameterised", paper="arXiv:2106.09685")
@dataclass(frozen=True, kw_only=True)
class LoRA(LowRankAxes):
    """Settings of LoRA."""

    sites: Annotated[tuple[str, ...], "where to attach: attn.q, ffn, attn.q@0-5, *@last4"] = ("attn.q", "attn.v")
    rank: Annotated[int | WholeBySite, "width of the two thin matrices; by place: 8, attn.q@0: 16", at_least(1)] = 8
    alpha: Annotated[float | NumberBySite, "the update is scaled by alpha / rank", above(0)] = 16.0
    dropout: Annotated[float, "share of the branch's input dropped in training", between(0, 0.99)] = 0.0
    scaling: Annotated[Literal["rank", "root"], "alpha is divided by the rank, or by its square root"] = "rank"
    b_rate: Annotated[float, "times the learning rate of A at which B learns", above(0)] = 1.0
    train_a: Annotated[bool, "A learns too, and is not left as it was drawn"] = True
    train_b: Annotated[bool, "B learns too, and is not left where it started"] = True
    start: Annotated[Start, "where A and B start: zero, in the weight (svd, minor, qr), or where rows say"] = "zero"
    data: Annotated[float, "eva, corda, lora_ga: share of the first epoch looked at", between(0.001, 1)] = 0.1
    scope: Annotated[Scope, "to first order: not, each module by itself, or the model as a whole (l_lora)"] = "none"

    mergeable: ClassVar[bool] = True
    default_lr: ClassVar[float] = 2e-3
    tiny: ClassVar[dict[str, int]] = {"rank": 3}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scope(self.scope, self.start, self.train_a, self._label)
        object.__setattr__(self, "mergeable", self.scope != "model")

    def places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        sites = super().places(anatomy)
        check_scoped_sites(self.scope, sites, self._label)
        return sites

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        if self.scope == "model":
            yield Linearise()
        yield from super().edits(anatomy)

    def conflicts(self, other: Method) -> str | None:
        if self.scope == "model":
            return f"scope=model takes a derivative through the model alone, not through {other.name}. Use scope=layer."
        return None

    @classmethod
    def lends(cls, settings: Mapping[str, Any]) -> str | None:
        return "acts to first order of the whole model" if settings.get("scope") == "model" else None

    def build(self, site: Site, base: Base) -> Attachment:
        made: Attachment = self.update_at(site, base, kinds_of(self.scope))
        return made
