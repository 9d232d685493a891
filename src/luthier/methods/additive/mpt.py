"""MPT: one prompt for all tasks, and for each task a matrix of rank one that it is multiplied by, entry by entry.

    P_k = P * (u_k v_k^T)          P: (P, d), shared    u_k: (P,)    v_k: (d,)

P starts at word embeddings or, with --source, at the mean of prompts that were trained by prompt_tuning; u and v start
at one, so a task starts at the shared prompt. Every row has the prompt of its own task.

    loss + distil (KL(teacher's || own answers) + mean squares between their last states)

With `distil` the sources are teachers, one for each task in the order of the tasks, and every row is also read with its
teacher's prompt, frozen; they are let go of when the run ends.

Wang et al. 2023, "Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning", arXiv:2303.02861, section 3.

Count: P d, and P + d for each task.
Claims: a new task with 0.035 % of T5-base's numbers.
Cost: prompt tuning's: every row grows by P tokens.
Use it when: several small tasks share something, and each must be a few numbers.
Not when: there is one task: it is prompt tuning in low rank.
Pitfalls: the paper distils the shared prompt from one teacher for each task; without `distil` its results are not to be
expected. A draw of tasks for each step is not made: rows come as the run orders them. Its two learning rates are not
known to us: P, u and v learn at one.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy
from luthier.core import ConfigError, above, at_least
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

    distil: Annotated[
        float, "weight of what the teachers say, 0.9 in the paper; 0: none, sources are a start", at_least(0)
    ] = 0.0
    temperature: Annotated[float, "of both answers in it", above(0)] = 1.0

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
        if self.distil and not sources:
            raise ConfigError(
                "mpt.distil: there is no teacher. Name a tuning of each task with --source, in their order."
            )
        return replace(self, length=agreed(self, sources, "length")) if sources else self

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        yield PrependTokens(TaskPrompts(self, self._length, prompt_width(anatomy, "mpt")), self._length)

    def n_params(self, anatomy: Anatomy) -> int:
        d = prompt_width(anatomy, "mpt")
        return self._length * d + (self.tasks or 1) * (self._length + d)

    @torch.no_grad()
    def adopt(self, tuned: TunedView, sources: Sequence[Source]) -> None:
        start = torch.stack([source.tensors["prompt.vectors"] for source in sources]).mean(0) if sources else None
        tasks = self.tasks or 1
        if self.distil and len(sources) != tasks:
            raise ConfigError(
                f"mpt.distil: {len(sources)} teachers for {tasks} tasks. Name one for each, in their order."
            )
        for _, prompt in own_sites(self, tuned, TaskPrompts):
            if start is not None:
                prompt.vectors.copy_(start)
            if self.distil:
                prompt.teachers.copy_(torch.stack([source.tensors["prompt.vectors"] for source in sources]))

    def loss(self, tuned: TunedView, forward: Callable[[], Any]) -> Any:
        prompts = [p for _, p in own_sites(self, tuned, TaskPrompts)]
        if not self.distil or not prompts or not prompts[0].training or not prompts[0].has_teachers:
            return forward()
        (prompt,) = prompts
        own, states = _with_states(tuned, forward)
        prompt.teaching = True
        try:
            with torch.no_grad():
                told, told_states = _with_states(tuned, forward)
        finally:
            prompt.teaching = False
        apart = _squares(states, told_states, _real(states, prompt.mask, own.labels)) * own.n_targets
        own.loss = own.loss + self.distil * (self._apart(own, told, tuned.anatomy) + apart)
        return own

    def _apart(self, own: Any, told: Any, anatomy: Anatomy) -> Tensor:
        """KL divergence of the answers, summed over targets."""
        t = self.temperature
        student, teacher = (torch.log_softmax(r.logits.float() / t, -1) for r in (own, told))
        each = (teacher.exp() * (teacher - student)).sum(-1)
        if own.labels is None or own.labels.dim() != 2 or each.shape != own.labels.shape:
            return each.sum()
        carries: Tensor = own.labels != -100
        if anatomy.is_decoder and student.shape[-1] == anatomy.vocab_size:  # each token predicts the one behind it
            each, carries = each[:, :-1], carries[:, 1:]
        return (each * carries).sum()

    @property
    def needs_logits(self) -> bool:
        """Answers are compared."""
        return self.distil > 0

    def finish(self, tuned: TunedView) -> None:
        for _, prompt in own_sites(self, tuned, TaskPrompts):
            prompt.let_go()

    @property
    def _length(self) -> int:
        return self.length or 100


class TaskPrompts(Prompt):
    """The shared prompt and the tasks' factors; teachers: (tasks, P, d), frozen, none of them without distilling."""

    teachers: Tensor

    def __init__(self, method: MPT, length: int, d: int) -> None:
        super().__init__(length, d)
        tasks = method.tasks or 1
        self.length, self.teaching = length, False
        self.mask: Tensor | None = None
        self.register_buffer("teachers", torch.zeros(tasks if method.distil else 0, length, d))
        self.u = nn.Parameter(torch.ones(tasks, length))
        self.v = nn.Parameter(torch.ones(tasks, d))

    def of_tasks(self, task: Tensor) -> Tensor:
        """The prompts of some tasks. task: (rows,) -> (rows, P, d)."""
        return self.vectors * (self.u[task][:, :, None] * self.v[task][:, None, :])

    def rows(self, context: Context, embeds: Tensor, mask: Tensor | None) -> Tensor:
        """Each row's prompt."""
        self.mask = mask
        task = context.row("task").to(embeds.device)
        return self.teachers[task] if self.teaching else self.of_tasks(task)

    @property
    def has_teachers(self) -> bool:
        """Whether there is somebody to learn from."""
        return len(self.teachers) > 0

    def let_go(self) -> None:
        """Keep no teachers any longer."""
        self.teachers = self.teachers[:0]

    def stored(self) -> dict[str, Tensor]:
        return {n: t.detach() for n, t in self.state_dict().items() if n != "teachers"}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take what was stored; teachers are needed no more."""
        self.let_go()
        self.load_state_dict({**tensors, "teachers": self.teachers}, strict=True)


def _with_states(tuned: TunedView, forward: Callable[[], Any]) -> tuple[Any, Tensor | None]:
    """A pass, and the last states of the model below its head, (rows, tokens, d); None where it has no head."""
    model: Any = tuned.model
    trunk = model.base_model
    if trunk is model:  # T5 holds its two stacks itself
        trunk = getattr(model, "decoder", None)
    if not isinstance(trunk, nn.Module):
        return forward(), None
    seen: list[Tensor] = []
    handle = trunk.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    try:
        result = forward()
    finally:
        handle.remove()
    return result, seen[-1] if seen else None


def _real(states: Tensor | None, mask: Tensor | None, labels: Tensor | None) -> Tensor | None:
    """(rows, tokens), False at padding: of the text, or of what a decoder writes. None: all are real."""
    shape = None if states is None else states.shape[:2]
    if mask is not None and mask.shape == shape:
        return mask != 0
    return labels != -100 if labels is not None and labels.shape == shape else None


def _squares(one: Tensor | None, other: Tensor | None, real: Tensor | None) -> Tensor:
    """The mean square between states of real tokens, of a row and then of all rows."""
    if one is None or other is None or one.shape != other.shape:
        return torch.zeros(())
    each = (one.float() - other.float()).square().mean(-1)  # (rows, tokens)
    weights = torch.ones_like(each) if real is None else real.to(each)
    return ((each * weights).sum(-1) / weights.sum(-1).clamp(min=1)).mean()
