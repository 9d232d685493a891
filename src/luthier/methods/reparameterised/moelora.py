"""MOELoRA: one LoRA cut into small experts, which the task of a row mixes.

    y = x W^T + b + s sum_n w_jn B_n A_n x      w_j = softmax(G e_j)      s = alpha / rank

    A_n: (rank / N, d_in)    B_n: (d_out, rank / N)    e_j: (width,) of task j    G: (N, width)

All experts act in every row; j is the task of the row. B starts at zero, so the tuned model starts as the base model.

Liu et al. 2023, "When MOE Meets LLMs: Parameter Efficient Fine-tuning for Multi-task Medical Applications",
arXiv:2310.18339. One gate for the whole model, as there; the variant with one for each layer is not built. The paper's
places are all projections; here they are LoRA's usual ones.

Count: sum over sites of rank (d_in + d_out), and (N + tasks) width once.
Claims: several tasks in one tuning, without one spoiling another.
Use it when: the rows name their task, in training and afterwards.
Not when: there is one task: then it is LoRA with a constant weight for each part.
Pitfalls: the scale has rank in it, not rank / N; rows without a task are refused where there are several.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.anatomy.selection import is_projection
from luthier.core import ConfigError, above, at_least, between
from luthier.methods.parts.low_rank import SmallDropout, check_rows
from luthier.surgery import METHODS, Attachment, Edit, Method, attach_each


@METHODS.register("moelora", family="reparameterised", paper="arXiv:2310.18339")
@dataclass(frozen=True, kw_only=True)
class MOELoRA(Method):
    """Settings of MOELoRA."""

    sites: Annotated[tuple[str, ...], "where to attach: attn.q, ffn, attn.q@0-5, *@last4"] = ("attn.q", "attn.v")
    tasks: Annotated[int | None, "how many tasks there are; left out, as many as the rows say", at_least(1)] = None
    rank: Annotated[int, "width of all experts together", at_least(1)] = 16
    experts: Annotated[int, "how many parts: a divisor of the rank", at_least(1)] = 8
    alpha: Annotated[float, "the update is scaled by alpha / rank", above(0)] = 32.0
    width: Annotated[int, "width of the vectors of the tasks", at_least(1)] = 64
    dropout: Annotated[float, "share of the branch's input dropped in training", between(0, 0.99)] = 0.0

    default_lr: ClassVar[float] = 1e-3
    reads_rows: ClassVar[tuple[str, ...]] = ("task",)
    tiny: ClassVar[dict[str, float]] = {"rank": 6, "experts": 2, "width": 5, "alpha": 12.0, "lr": 2e-2}

    def __post_init__(self) -> None:
        if self.rank % self.experts:
            raise ConfigError(
                f"moelora.experts: {self.experts} does not divide the rank {self.rank}. Set the rank to "
                f"{-(-self.rank // self.experts) * self.experts}, or the experts to a divisor of {self.rank}."
            )

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        gate = Gate(self.tasks or 1, self.experts, self.width)
        yield from attach_each(self.places(anatomy), lambda site, base: Mixed(self, gate, site), shared={"gate": gate})

    def n_params(self, anatomy: Anatomy) -> int:
        thin = sum(self.rank * (site.d_in + site.d_out) for site in self.places(anatomy))
        return thin + (self.experts + (self.tasks or 1)) * self.width

    def places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        sites = anatomy.sites(*self.sites, asked_by="moelora.sites", fits=is_projection)
        return check_rows(anatomy, sites, "moelora", self.dropout)


class Gate(nn.Module):
    """From a task to the weights of the experts."""

    def __init__(self, tasks: int, experts: int, width: int) -> None:
        super().__init__()
        self.tasks = nn.Embedding(tasks, width)
        self.gate = nn.Linear(width, experts, bias=False)

    def forward(self, task: Tensor) -> Tensor:
        """(rows,) -> (rows, experts), each row's weights summing to one."""
        weights: Tensor = self.gate(self.tasks(task)).softmax(-1)
        return weights


class Mixed(Attachment):
    """Adds the experts' updates. a: (rank, d_in) and b: (d_out, rank); expert n has the n-th part of the rank."""

    kind = "delta"

    def __init__(self, settings: MOELoRA, gate: Gate, site: Site) -> None:
        super().__init__()
        self.__dict__["gate"] = gate  # registered once, on the tuning
        self.scale, self.dropout = settings.alpha / settings.rank, SmallDropout(settings.dropout)
        self.a = nn.Parameter(torch.randn(settings.rank, site.d_in) * 0.01)
        self.b = nn.Parameter(torch.zeros(site.d_out, settings.rank))

    def weights(self, task: Tensor) -> Tensor:
        """How much each row of A counts. (rows,) -> (rows, rank)."""
        gate: Gate = self.__dict__["gate"]
        of_experts: Tensor = gate(task)
        return of_experts.repeat_interleave(len(self.a) // of_experts.shape[1], dim=1)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        weights = self.weights(self.context.row("task").to(x.device)).to(self.a.dtype)
        thin = self.dropout(x, self.training) @ self.a.T
        thin = thin.reshape(len(weights), -1, thin.shape[-1]) * weights[:, None]  # some models flatten rows and tokens
        update: Tensor = (thin @ self.b.T).reshape(y.shape) * self.scale
        return y + update
