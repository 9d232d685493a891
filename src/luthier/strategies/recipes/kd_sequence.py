"""A teacher writes an answer to every prompt, and the student learns those answers in place of the rows' own.

    1 teacher    a run on the rows, of `teacher_model`; left out where `teacher` names a finished run
    2 student    the task, on y' = argmax_y p_teacher(y | x), sought by a beam of `beams`, for every prompt x

An answer that comes to no end within `new_tokens` is dropped, and counted. What the teacher was and how it wrote stands
in rows-made.jsonl, the rows in rows-written.jsonl. Held-out rows keep their own answers, and score the student.

Paper: arXiv:1606.07947, its sequence-level distillation, with a beam of 5. The form that takes, of the beam, what is
nearest to the row's own answer is not built.

Cost: the teacher's run, a search for each prompt, then the student's run, which is a plain one.
Claims: a small model learns the teacher's one way of answering more easily than the many of the rows.
Pitfalls: the teacher's mistakes are learnt. Prompts that the teacher has learnt by heart are answered as in the rows:
better is a teacher that learnt others. A resumed recipe searches again and holds the rows to what it then finds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from luthier.core import ConfigError, DataError, at_least
from luthier.data.rows import Table
from luthier.training.recipe import Desk, Done, Phase, Phases, Plan, Recipe
from luthier.training.strategy import STRATEGIES


@STRATEGIES.register("kd_sequence", family="recipes", paper="arXiv:1606.07947")
@dataclass(frozen=True, kw_only=True)
class KDSequence(Recipe):
    """Answers that a teacher writes."""

    example: ClassVar[str] = "sample:smollm2-135m --data ANSWERED.jsonl --set teacher=RUN"
    tiny: ClassVar[dict[str, Any]] = {"beams": 2, "new_tokens": 6}

    teacher: Annotated[str, "a finished run that writes the answers"] = ""
    teacher_model: Annotated[str, "a model that learns the rows first, and then writes the answers"] = ""
    teacher_method: Annotated[str | None, "how it learns; left out, as the student"] = None
    beams: Annotated[int, "answers that are followed side by side", at_least(1)] = 5
    new_tokens: Annotated[int, "tokens of an answer, at most", at_least(1)] = 64
    references: Annotated[bool, "the student also learns the rows' own answers"] = False

    def phases(self, plan: Plan, desk: Desk) -> Phases:
        if bool(self.teacher) == bool(self.teacher_model):
            raise ConfigError("kd_sequence needs one teacher: teacher=RUN, a finished run, or teacher_model=MODEL.")
        spec, (learnt, held, columns) = plan.spec, desk.rows()
        if columns.shape != "answered":
            raise ConfigError(
                "kd_sequence needs prompts with answers, which a teacher can write anew, and these rows are "
                f"{columns.shape}. For labels use kd_logits; for chats and plain texts there is no teacher of answers."
            )
        desk.check(plan.task())
        if self.teacher:
            teacher = desk.finished(self.teacher)
            teacher.written(learnt.take(range(1)), max_new_tokens=1, beams=self.beams)  # before anything is written
        else:
            method = self.teacher_method or spec.method
            first = plan.phase((), model=self.teacher_model, method=method)
            desk.check(first)
            teacher = yield Phase(name="teacher", spec=first)
        used = columns.used()
        own: dict[str, Any] = {role: used[role] for role in ("prompt", "context", "response") if role in used}
        kept = list(used.values())
        answers = desk.write("written", self._written(desk, teacher, learnt, own["response"], kept))
        test = None if held is None else desk.write("held", [{n: r.get(n) for n in kept} for r in held.rows])
        student = plan.task(data=plan.data(answers, test, **own))
        yield Phase(name="student", spec=student, made_of=() if self.teacher else ("teacher",))

    def _written(
        self, desk: Desk, teacher: Done, table: Table, response: str, kept: list[str]
    ) -> Iterator[dict[str, Any]]:
        """The rows with the teacher's answers; nothing is asked before the first of them is wanted."""
        found = teacher.written(table, max_new_tokens=self.new_tokens, beams=self.beams)
        good = [bool(ended and text) for text, ended in found]
        told = {"teacher": teacher.digest, "beams": self.beams, "new_tokens": self.new_tokens}
        desk.write("made", [{**told, "rows": len(table), "kept": sum(good), "dropped": len(good) - sum(good)}])
        if not any(good):
            raise DataError(f"kd_sequence: no answer ended within {self.new_tokens} tokens. Set new_tokens higher.")
        for row, (text, _), ends in zip(table.rows, found, good, strict=True):
            row = {name: row.get(name) for name in kept}
            if ends:
                yield {**row, response: text}
            if self.references:
                yield row
