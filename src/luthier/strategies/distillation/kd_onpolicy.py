"""The student writes answers itself, and learns at each of their tokens what the teacher would have said there.

    L = sum over tokens of D(p_T, p_S)        p_T, p_S: the next token of teacher and student, logits over `temperature`
    D = KL(p_T || p_S) at beta = 0, KL(p_S || p_T) at 1, else beta KL(p_T || m) + (1 - beta) KL(p_S || m)
    m = beta p_T + (1 - beta) p_S

With the chance `share` a step's prompts get answers that the student draws then; else the rows' own are taken. No
gradient goes through the drawing. Draws are named by step and row. Prompts carry no loss.

Paper: arXiv:2306.13649 (generalised knowledge distillation). share .5, beta .5, a temperature of .9 and 128 tokens are
quoted for a library's form of it.

Neutral: none: it stands in place of the task's loss.
Cost: one forward pass of the teacher in every step; where the student writes, one of its own for each token as well.
Claims: the student is corrected on what it really writes, not on answers that it would never have come to.
Pitfalls: writing takes most of the time. At first what the student writes is poor, and the teacher says little there:
begin from a student that has learnt the answers. Of a conversation of several turns only the first answer is written
anew, and what follows it is not seen in that step. For models that write on from a prompt (causal_lm) alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.core import ConfigError, above, at_least, between
from luthier.data.batches import Batch
from luthier.data.tasks import Task
from luthier.runs.spec import RunSpec
from luthier.surgery import Method
from luthier.training.course import Course, Piece
from luthier.training.objective import Result
from luthier.training.strategy import STRATEGIES, Strategy, fills
from luthier.training.told import told_of
from luthier.training.written import answered_anew


@STRATEGIES.register("kd_onpolicy", family="distillation", paper="arXiv:2306.13649")
@dataclass(frozen=True, kw_only=True)
class KDOnPolicy(Strategy):
    """A teacher's word on what the student writes."""

    example: ClassVar[str] = "sample:smollm2-135m --data ANSWERED.jsonl"
    neutral: ClassVar[dict[str, Any] | None] = None
    reads: ClassVar[tuple[str, ...]] = ("logits",)
    roles: ClassVar[tuple[str, ...]] = ("teacher",)
    live: ClassVar[bool] = True
    writes: ClassVar[bool] = True
    tiny: ClassVar[dict[str, Any]] = {"new_tokens": 4, "share": 0.7}

    teacher: Annotated[str, "the model to learn from: a finished run, or a model folder, of the same vocabulary"] = ""
    share: Annotated[float, "lambda, the chance that a step's answers are the student's own", between(0, 1)] = 0.5
    beta: Annotated[float, "0, all that the teacher would say; 1, what the student says alone", between(0, 1)] = 0.5
    temperature: Annotated[float, "divides the logits, where it writes and where both are compared", above(0)] = 0.9
    new_tokens: Annotated[int, "tokens of an answer, at most", at_least(1)] = 128

    def check(self, spec: RunSpec) -> None:
        if not self.teacher:
            raise ConfigError("kd_onpolicy.teacher: no teacher is named. Give a finished run: --set teacher=RUN.")

    def conflicts(self, other: Strategy | Method) -> str | None:
        if isinstance(other, Strategy) and any(fills(other, moment) for moment in ("loss", "weigh")):
            return f"{other.name} changes the task's loss, and the teacher's word stands in its place. Use one."
        return None

    def suits(self, task: Task) -> str | None:
        return None if task.name == "causal_lm" else "it wants a decoder that writes on from prompts (causal_lm)."

    def batches(self, course: Course, batches: list[Batch]) -> list[Batch]:
        writes = float(torch.rand(1, generator=course.generator("writes"))) < self.share
        course.note("writes", float(writes))
        if not writes:
            return batches
        return [answered_anew(course, batch, most=self.new_tokens, temperature=self.temperature) for batch in batches]

    def loss(self, course: Course, piece: Piece, forward: Callable[[], Any]) -> Any:
        result = forward()
        said = course.models["teacher"].logits(piece.batch)
        theirs = told_of(course.task, Result(result.loss, result.n_targets, said, result.labels)).logits
        result.loss = self.apart(theirs, told_of(course.task, result).logits)
        return result

    def apart(self, teacher: Tensor, student: Tensor) -> Tensor:
        """D of logits (targets, vocabulary): a sum over targets."""
        p, q = (F.log_softmax(z.float() / self.temperature, -1) for z in (teacher, student))
        if self.beta == 0:
            return F.kl_div(q, p, reduction="sum", log_target=True)
        if self.beta == 1:
            return F.kl_div(p, q, reduction="sum", log_target=True)
        m = torch.logsumexp(torch.stack([p + torch.tensor(self.beta).log(), q + torch.tensor(1 - self.beta).log()]), 0)
        one, other = (F.kl_div(m, x, reduction="sum", log_target=True) for x in (p, q))
        return self.beta * one + (1 - self.beta) * other
