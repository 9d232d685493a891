"""Poly: each place has a few skills, and each task its own mixture of them, for every slice of the layer by itself.

    y = x W^T + b + B_j A_j x / rank      A_j = [sum_s w_jqs A_qs]_q,   B_j alike      w_jq = g_jq / sum_s g_jqs

    g = sigmoid(z_j) in answers, and drawn around it in training (a relaxed Bernoulli)      q: `splits` slices

A_qs: (rank, d_in / splits), B_qs: (d_out / splits, rank), z_j: (splits, skills) for each task and site. The matrices
are mixed, not what they give. B starts at zero, so the tuned model starts as the base model.

Polytropon, arXiv:2202.13914, with one slice; Multi-Head Routing, arXiv:2211.03831, with several. The form is that of
peft 0.21.

Count: sum over sites of skills rank (d_in + d_out) + tasks splits skills.
Claims: tasks that share skills learn from each other, and a new one needs few numbers.
Use it when: the rows name their task, in training and afterwards, and tasks are many.
Not when: there is one task: then it is LoRA with a drawn mixture.
Pitfalls: two matrices are made for each row of a batch; every layer has a mixture of its own; rows without a task are
refused where there are several.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import RelaxedBernoulli

from luthier.anatomy import Anatomy, Site
from luthier.anatomy.selection import is_projection
from luthier.core import at_least
from luthier.methods.parts.kronecker import check_divides
from luthier.methods.parts.low_rank import check_rows
from luthier.methods.parts.peft_layers import shared_form
from luthier.surgery import METHODS, Attachment, Edit, Method, PeftForm, attach_each


@METHODS.register("poly", family="reparameterised", paper="arXiv:2202.13914")
@dataclass(frozen=True, kw_only=True)
class Poly(Method):
    """Settings of Poly."""

    sites: Annotated[tuple[str, ...], "where to attach: attn.q, ffn, attn.q@0-5, *@last4"] = ("attn.q", "attn.v")
    tasks: Annotated[int | None, "how many tasks there are; left out, as many as the rows say", at_least(1)] = None
    rank: Annotated[int, "width of a skill", at_least(1)] = 8
    skills: Annotated[int, "skills at each place", at_least(1)] = 4
    splits: Annotated[int, "slices with a mixture of their own: a divisor of every width", at_least(1)] = 1

    draws: ClassVar[bool] = True
    default_lr: ClassVar[float] = 1e-3
    reads_rows: ClassVar[tuple[str, ...]] = ("task",)
    tiny: ClassVar[dict[str, float]] = {"rank": 3, "skills": 2, "splits": 2, "lr": 2e-2}
    peft: ClassVar[PeftForm | None] = shared_form(
        "POLY",
        {"a": "poly_lora_A", "b": "poly_lora_B", "logits": "poly_router.module_logits"},
        {},
        settings={"r": "rank", "n_skills": "skills", "n_splits": "splits"},
        write=lambda method: {"n_tasks": method.tasks or 1},
        read=lambda facts: {"tasks": int(facts.get("n_tasks", 1))},
        also=("n_tasks",),
        fixed={"poly_type": "poly"},
        transposed=False,
    )

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        yield from attach_each(self.places(anatomy), lambda site, base: Skills(self, site))

    def n_params(self, anatomy: Anatomy) -> int:
        of_tasks = (self.tasks or 1) * self.splits
        return sum(self.skills * (self.rank * (s.d_in + s.d_out) + of_tasks) for s in self.places(anatomy))

    def places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        sites = anatomy.sites(*self.sites, asked_by="poly.sites", fits=is_projection)
        for site in check_rows(anatomy, sites, "poly", 0.0):
            check_divides(self.splits, "poly.splits", site, "d_in", "d_out")
        return sites


class Skills(Attachment):
    """Adds the update of each row's task.

    a: (splits, skills, d_in / splits, rank)   b: (splits, skills, rank, d_out / splits)
    logits: (tasks, splits skills)
    """

    kind = "delta"

    def __init__(self, settings: Poly, site: Site) -> None:
        super().__init__()
        q, s, r = settings.splits, settings.skills, settings.rank
        bound = 1 / math.sqrt(site.d_in // q)
        self.a = nn.Parameter(torch.empty(q, s, site.d_in // q, r).uniform_(-bound, bound))
        self.b = nn.Parameter(torch.zeros(q, s, r, site.d_out // q))
        self.logits = nn.Parameter(torch.empty(settings.tasks or 1, q * s).uniform_(-1e-3, 1e-3))

    def weights(self, task: Tensor) -> Tensor:
        """How much each skill counts. (rows,) -> (rows, splits, skills), each slice's summing to one."""
        logits = self.logits[task].view(-1, *self.a.shape[:2])
        if self.training:  # from the ambient generator, which activation checkpointing restores
            one = logits.new_ones(())
            gates: Tensor = RelaxedBernoulli(one, logits=logits).rsample()
        else:
            gates = logits.sigmoid()
        return gates / (gates.sum(-1, keepdim=True) + 1e-12)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        weights = self.weights(self.context.row("task").to(x.device)).to(self.a.dtype)
        a = torch.einsum("bqs,qsdr->bqdr", weights, self.a).flatten(1, 2)  # (rows, d_in, rank)
        b = torch.einsum("bqs,qsrd->brqd", weights, self.b).flatten(2)  # (rows, rank, d_out)
        rows = x.reshape(len(weights), -1, x.shape[-1])  # some models flatten rows and tokens
        return y + (rows @ a @ b).reshape(y.shape) / self.a.shape[-1]
