"""Learn how a teacher's tokens look at one another in one layer: relations of queries, keys and values (MiniLMv2).

    L = (1 - alpha) task + alpha sum_X KL(A_t(X) || A_s(X)),   A(X) = softmax(X X^T / sqrt(d / R))    X: q, k, v
        averaged over R relation heads and over the tokens of a row

X (tokens, d) is what a projection gives, cut into R heads of equal width, so widths and numbers of heads may differ
between the two models: only tokens times tokens is compared. Padding is left out; in a decoder a token looks at those
before it. The student's last layer learns from the teacher's `layer`, counted from 1; 0 is its last one.

The teacher reads every batch in the student's tokens, so both have one vocabulary. Projections are compared before
positions are rotated into them. Queries and keys of the first paper, whose attention itself is compared, are not here.

Paper: arXiv:2012.15828; the first form is arXiv:2002.10957. There alpha is 1, on unlabelled text: a task of words on
plain text is that.

Neutral: alpha = 0, where the teacher is not asked.
Cost: one forward pass of the teacher in every step, and tokens x tokens numbers for each relation head. Frozen features
and the first-token block are switched off: all tokens of the last layer are needed.
Claims: a student of any shape that comes near a larger teacher.
Pitfalls: R must divide all widths. Below the student's last layer nothing is told directly. Methods with a prompt in
front of the text are refused. The divergence of three relations is large beside the task's loss (logged as relations):
9.1 nats beside 1.8 at the start, where minilm-l3 learns from minilm-l6 (LoRA, 600 rows of trec6, 200 steps, one seed;
the plain run 0.817). There alpha = 0.5 gives 0.740, the default 0.810, and relations alone for the first half of the
steps 0.480. It is made for much text without labels. `python -m experiments.strategies --only kd_minilm`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.anatomy import Anatomy, Site
from luthier.core import ConfigError, at_least, between
from luthier.runs.spec import RunSpec
from luthier.training.course import Course, Piece
from luthier.training.strategy import STRATEGIES, Strategy
from luthier.training.taps import heads_apart, layer_sites, real_pairs, seen_inside, targets_by_row

KINDS = ("attn.q", "attn.k", "attn.v")


@STRATEGIES.register("kd_minilm", family="distillation", paper="arXiv:2012.15828")
@dataclass(frozen=True, kw_only=True)
class KDMiniLM(Strategy):
    """Self-attention relations of a teacher."""

    neutral: ClassVar[dict[str, Any] | None] = {"alpha": 0.0}
    reads: ClassVar[tuple[str, ...]] = ("attention",)
    roles: ClassVar[tuple[str, ...]] = ("teacher",)
    live: ClassVar[bool] = True
    tiny: ClassVar[dict[str, Any]] = {"heads": 4}

    teacher: Annotated[str, "the model to learn from: a finished run, or a model folder with its head"] = ""
    alpha: Annotated[float, "share of the relations in the loss; the rest is the task's", between(0, 1)] = 0.05
    heads: Annotated[int, "relation heads R", at_least(1)] = 12
    layer: Annotated[int, "the teacher's layer; 0, its last", at_least(0)] = 0

    def check(self, spec: RunSpec) -> None:
        if not self.teacher:
            raise ConfigError("kd_minilm.teacher: no teacher is named. Give a finished run: --set teacher=runs/large.")

    def start(self, course: Course) -> None:
        theirs = course.models["teacher"].anatomy
        for who, anatomy, layer in (("the student", course.tuned.anatomy, 0), ("the teacher", theirs, self.layer)):
            for site in self._sites(who, anatomy, layer):
                if site.d_out % self.heads:
                    raise ConfigError(
                        f"kd_minilm.heads: {self.heads} does not divide {who}'s {site.key}, {site.d_out} wide. Use a "
                        "number that divides the widths of queries, keys and values in both models."
                    )

    def loss(self, course: Course, piece: Piece, forward: Callable[[], Any]) -> Any:
        if not self.alpha:
            return forward()
        student: Any = course.tuned.model
        teacher, anatomy = course.models["teacher"], course.tuned.anatomy
        mine = self._sites("the student", anatomy, 0)
        theirs = self._sites("the teacher", teacher.anatomy, self.layer)
        with seen_inside(student, mine) as ours:
            result = forward()
        with seen_inside(teacher.model, theirs) as wanted:
            teacher.logits(piece.batch)
        pairs = real_pairs(piece.batch, ours[mine[0].key].shape[1], causal=anatomy.is_decoder)
        rows = sum(
            (apart(wanted[b.key], ours[a.key], pairs, self.heads) for a, b in zip(mine, theirs, strict=True)),
            start=torch.zeros((), device=pairs.device),
        )
        course.note("relations", float(rows.detach().mean()))
        weights = targets_by_row(course.task, piece.batch)
        result.loss = (1 - self.alpha) * result.loss + self.alpha * (weights * rows).sum()
        return result

    def _sites(self, who: str, anatomy: Anatomy, layer: int) -> list[Site]:
        if anatomy.is_encoder_decoder:
            raise ConfigError(
                f"kd_minilm cannot learn from relations where {who} has an encoder and a decoder: which of their "
                "attentions is meant is not said. Use kd_logits."
            )
        if layer > anatomy.n_layers:
            raise ConfigError(f"kd_minilm.layer: {who} has {anatomy.n_layers} layers, and {layer} is named. Use less.")
        return [layer_sites(anatomy, kind)[(layer or anatomy.n_layers) - 1] for kind in KINDS]


def apart(theirs: Tensor, ours: Tensor, pairs: Tensor, heads: int) -> Tensor:
    """KL of the relations in (rows, tokens, width), a mean over heads and tokens: (rows,)."""
    p, q = (_relations(x.float(), pairs, heads) for x in (theirs, ours))  # (rows, heads, tokens, tokens)
    each = F.kl_div(q, p, reduction="none", log_target=True).masked_fill(~pairs[:, None], 0.0).sum(-1).mean(1)
    real = pairs.diagonal(dim1=1, dim2=2)  # (rows, tokens)
    return (each * real).sum(-1) / real.sum(-1)


def _relations(x: Tensor, pairs: Tensor, heads: int) -> Tensor:
    cut = heads_apart(x, heads)
    scores = cut @ cut.transpose(-1, -2) / cut.shape[-1] ** 0.5
    # Not minus infinity: a row of padding would be all of it, and its gradient no number.
    return F.log_softmax(scores.masked_fill(~pairs[:, None], -1e9), -1)
