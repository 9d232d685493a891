"""Match a teacher's embeddings, attention scores and states, layer by layer (TinyBERT).

    L = (1 - alpha) task + alpha [ MSE(E_s W_e, E_t) + sum_m MSE(A_s^m, A_t^g(m)) + MSE(H_s^m W_h, H_t^g(m)) ]

E is what the first block reads, H what block m gives (tokens, d), A = q k^T / sqrt(d_head) the scores before the
softmax, a mean over heads and over pairs of tokens; padding is left out. g(m) = m N_t / N_s, of N_t and N_s layers. W_e
and W_h are the strategy's own, one for all layers; they train, and are dropped at the end. They begin as the identity
where widths are equal, else at random.

The teacher reads every batch in the student's tokens, so both have one vocabulary. Scores are computed from the
projections: without rotated positions or biases of distance, where a model has such. The paper's second stage, the
prediction layer, is `kd_logits`, beside this (`--strategy kd_tinybert+kd_logits`) or in a run of its own after it.

Paper: arXiv:1909.10351. Its stages on general text and twentyfold augmented rows are runs of their own.

Neutral: alpha = 0, where the teacher is not asked.
Cost: one forward pass of the teacher in every step; states and scores of all layers of both are held. Frozen features
and the first-token block are switched off.
Claims: a small student learns more of a large teacher than from its answers alone.
Pitfalls: both need the same number of heads. The sum is large beside the task's loss, and of it the scores: see the
logged parts. Measured (minilm-l3 from minilm-l6, LoRA, 600 rows of trec6, 200 steps, one seed; the plain run 0.817):
scores 28 at the start and 11 at the end, states 1.1 and 0.5, the task 1.8. With alpha = 0.5 the clipped gradient is of
scores alone, and accuracy 0.657; with 0.05, the default, 0.803; the layers alone for the first half of the steps, then
the task alone, 0.597. With all weights the layers first give 0.467, where the plain run has 0.767. So nothing was
gained from few rows: the paper learns layers for 20 epochs, on general text before and on rows augmented twentyfold.
`python -m experiments.strategies --only kd_tinybert`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from luthier.anatomy import Anatomy, Site
from luthier.core import ConfigError, between
from luthier.runs.spec import RunSpec
from luthier.training.course import Course, Piece
from luthier.training.strategy import STRATEGIES, Strategy
from luthier.training.taps import heads_apart, layer_sites, real_pairs, seen_inside, targets_by_row

KINDS = ("attn.q", "attn.k", "block_out")
Inside = dict[str, Tensor]


@STRATEGIES.register("kd_tinybert", family="distillation", paper="arXiv:1909.10351")
@dataclass(frozen=True, kw_only=True)
class KDTinyBERT(Strategy):
    """Layers of a teacher."""

    neutral: ClassVar[dict[str, Any] | None] = {"alpha": 0.0}
    reads: ClassVar[tuple[str, ...]] = ("attention",)
    roles: ClassVar[tuple[str, ...]] = ("teacher",)
    live: ClassVar[bool] = True

    teacher: Annotated[str, "the model to learn from: a finished run, or a model folder with its head"] = ""
    alpha: Annotated[float, "share of the layers in the loss; the rest is the task's", between(0, 1)] = 0.05

    def check(self, spec: RunSpec) -> None:
        if not self.teacher:
            raise ConfigError("kd_tinybert.teacher: no teacher is named. Give a finished run: --set teacher=runs/big.")

    def numbers(self, course: Course) -> dict[str, Tensor]:
        ours, theirs = course.tuned.anatomy, course.models["teacher"].anatomy
        if ours.is_encoder_decoder or theirs.is_encoder_decoder:
            raise ConfigError(
                "kd_tinybert cannot match layers where a model has an encoder and a decoder: which stack is meant is "
                "not said. Use kd_logits."
            )
        if ours.n_heads != theirs.n_heads or ours.n_layers > theirs.n_layers:
            raise ConfigError(
                f"kd_tinybert cannot match {ours.n_layers} layers of {ours.n_heads} heads with the teacher's "
                f"{theirs.n_layers} of {theirs.n_heads}: heads must be as many, layers no more. Use kd_minilm."
            )
        if ours.d == theirs.d:
            return {"embedded": torch.eye(ours.d), "states": torch.eye(ours.d)}
        return {name: torch.randn(ours.d, theirs.d) / ours.d**0.5 for name in ("embedded", "states")}

    def loss(self, course: Course, piece: Piece, forward: Callable[[], Any]) -> Any:
        if not self.alpha:
            return forward()
        student: Any = course.tuned.model
        teacher, anatomy = course.models["teacher"], course.tuned.anatomy
        other = teacher.anatomy
        mine = [_sites(anatomy, m) for m in range(anatomy.n_layers)]
        theirs = [_sites(other, -(-(m + 1) * other.n_layers // anatomy.n_layers) - 1) for m in range(anatomy.n_layers)]
        start = layer_sites(other, "block_out")[0].path
        with seen_inside(student, [site for layer in mine for site in layer], start=mine[0][-1].path) as ours:
            result = forward()
        with seen_inside(teacher.model, [site for layer in theirs for site in layer], start=start) as wanted:
            teacher.logits(piece.batch)
        pairs = real_pairs(piece.batch, ours["start"].shape[1], causal=anatomy.is_decoder)
        real = piece.batch.inputs["attention_mask"].bool()
        turn, layers = course.numbers["states"], list(zip(mine, theirs, strict=True))
        embedded = _states(ours["start"], wanted["start"], course.numbers["embedded"], real)
        scores = torch.stack([_scores(anatomy, ours, a, other, wanted, b, pairs) for a, b in layers]).sum(0)
        states = torch.stack([_states(ours[a[-1].key], wanted[b[-1].key], turn, real) for a, b in layers]).sum(0)
        for name, rows in (("embedded", embedded), ("scores", scores), ("states", states)):
            course.note(name, float(rows.detach().mean()))
        weights = targets_by_row(course.task, piece.batch)
        result.loss = (1 - self.alpha) * result.loss + self.alpha * (weights * (embedded + scores + states)).sum()
        return result


def _sites(anatomy: Anatomy, layer: int) -> list[Site]:
    return [layer_sites(anatomy, kind)[layer] for kind in KINDS]


def _states(ours: Tensor, theirs: Tensor, turn: Tensor, real: Tensor) -> Tensor:
    """(rows,) from states (rows, tokens, d)."""
    each = (ours.float() @ turn - theirs.float()).square().mean(-1)
    return (each * real).sum(-1) / real.sum(-1)


def _scores(
    anatomy: Anatomy, ours: Inside, own: list[Site], other: Anatomy, theirs: Inside, told: list[Site], pairs: Tensor
) -> Tensor:
    """(rows,) from queries and keys (rows, tokens, width)."""
    a, b = _attention(anatomy, ours, own), _attention(other, theirs, told)  # (rows, heads, tokens, tokens)
    each = (a - b).square().mean(1)
    return (each * pairs).sum((-1, -2)) / pairs.sum((-1, -2))


def _attention(anatomy: Anatomy, inside: Inside, sites: list[Site]) -> Tensor:
    q = heads_apart(inside[sites[0].key].float(), anatomy.n_heads)
    k = heads_apart(inside[sites[1].key].float(), anatomy.n_kv_heads)
    k = k.repeat_interleave(anatomy.n_heads // anatomy.n_kv_heads, 1)  # each key's head serves a group of queries
    scores: Tensor = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores
