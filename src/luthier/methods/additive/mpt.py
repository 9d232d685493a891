"""MPT: one prompt for all tasks, and for each task a matrix of rank one that it is multiplied by, entry by entry.

    P_k = P * (u_k v_k^T)          P: (P, d), shared    u_k: (P,)    v_k: (d,)

P starts at word embeddings or, with --source, at the mean of prompts that were trained by prompt_tuning; u and v start
at one, so a task starts at the shared prompt. Every row has the prompt of its own task.

Wang et al. 2023, "Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning", arXiv:2303.02861, section 3.

Count: P d, and P + d for each task.
Claims: a new task with 0.035 % of T5-base's numbers.
Cost: prompt tuning's: every row grows by P tokens.
Use it when: several small tasks share something, and each must be a few numbers.
Not when: there is one task: it is prompt tuning in low rank.
Pitfalls: the paper distils the shared prompt from one teacher for each task, and that is not done here; without it, its
results are not to be expected. Its two learning rates are not known to us: P, u and v learn at one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Self

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy
from luthier.core import at_least
from luthier.methods.parts.adopted import agreed, own_sites
from luthier.methods.parts.peft_prompts import COUNTS, ONE, before_text, prompt_facts, rows_before
from luthier.methods.parts.prompt import Prompt, prompt_width
from luthier.surgery import (
    METHODS,
    Context,
    Edit,
    Method,
    PeftForm,
    PeftIn,
    PeftOut,
    PeftTaken,
    PeftWhole,
    PrependTokens,
    Source,
    TunedView,
)


def _out(going: PeftOut) -> tuple[dict[str, Tensor], dict[str, object]]:
    before_text(going)
    shared, u, v = (going.stored[f"prompt.{short}"] for short in ("vectors", "u", "v"))
    said = {**prompt_facts(going, *shared.shape), "prompt_tuning_init": "RANDOM", "num_tasks": len(u)}
    return {ONE: shared, "prefix_task_cols": u[:, :, None], "prefix_task_rows": v[:, None, :]}, said


def _back(coming: PeftIn) -> PeftTaken:
    shared = rows_before(coming)
    u, v = coming.tensor("prefix_task_cols")[:, : len(shared), 0], coming.tensor("prefix_task_rows")[:, 0]
    settings = {"tasks": len(u), "length": len(shared)}
    return PeftTaken(settings, {"prompt.vectors": shared, "prompt.u": u, "prompt.v": v})


@METHODS.register("mpt", family="additive", paper="arXiv:2303.02861")
@dataclass(frozen=True, kw_only=True)
class MPT(Method):
    """Settings of MPT."""

    tasks: Annotated[int | None, "how many tasks there are; left out, as many as the rows say", at_least(1)] = None
    length: Annotated[
        int | None, "vectors before the text; left out, 100, or as many as the sources have", at_least(1)
    ] = None

    mergeable: ClassVar[bool] = False
    starts_at_base: ClassVar[bool] = False
    default_lr: ClassVar[float] = 0.3
    reads_rows: ClassVar[tuple[str, ...]] = ("task",)
    sources: ClassVar[tuple[str, ...]] = ("prompt_tuning", "spot")
    least_sources: ClassVar[int] = 0
    tiny: ClassVar[dict[str, int | float]] = {"length": 3, "lr": 0.1}
    peft: ClassVar[PeftForm | None] = PeftWhole(
        "MULTITASK_PROMPT_TUNING",
        out=_out,
        back=_back,
        prefix="base_model.",
        fixed={"num_ranks": 1},
        also=(*COUNTS, "num_tasks"),
        ignored=(
            "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
            "prompt_tuning_init_state_dict_path", "prompt_tuning_init_task",
        ),
    )  # fmt: skip

    def fitted(self, sources: Sequence[Source]) -> Self:
        return replace(self, length=agreed(self, sources, "length")) if sources else self

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        yield PrependTokens(TaskPrompts(self.tasks or 1, self._length, prompt_width(anatomy, "mpt")), self._length)

    def n_params(self, anatomy: Anatomy) -> int:
        d = prompt_width(anatomy, "mpt")
        return self._length * d + (self.tasks or 1) * (self._length + d)

    @torch.no_grad()
    def adopt(self, tuned: TunedView, sources: Sequence[Source]) -> None:
        start = torch.stack([source.tensors["prompt.vectors"] for source in sources]).mean(0) if sources else None
        for _, prompt in own_sites(self, tuned, TaskPrompts):
            if start is not None:
                prompt.vectors.copy_(start)

    @property
    def _length(self) -> int:
        return self.length or 100


class TaskPrompts(Prompt):
    """The shared prompt and the tasks' factors."""

    def __init__(self, tasks: int, length: int, d: int) -> None:
        super().__init__(length, d)
        self.length = length
        self.u = nn.Parameter(torch.ones(tasks, length))
        self.v = nn.Parameter(torch.ones(tasks, d))

    def of_tasks(self, task: Tensor) -> Tensor:
        """The prompts of some tasks. task: (rows,) -> (rows, P, d)."""
        return self.vectors * (self.u[task][:, :, None] * self.v[task][:, None, :])

    def rows(self, context: Context, embeds: Tensor, mask: Tensor | None) -> Tensor:
        """Each row's prompt."""
        return self.of_tasks(context.row("task").to(embeds.device))
