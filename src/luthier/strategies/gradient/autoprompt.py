"""Search for words to stand before the text: one is exchanged at a time, by what the gradient promises (AutoPrompt).

    g = grad of L at the vector of slot j                        L: mean loss of the step's rows, j drawn by the step
    candidates: the `candidates` words w of the vocabulary with the largest -E(w) . g
    each is put into slot j; the one with the lowest loss on as many other rows stays, if that is lower than before

The slots are the vectors of the method prompt_tuning, before the embedded text; each is always the embedding of a word.
They begin as the mask, or as drawn words where the model has none. The log holds the loss before and after, and at the
end the words are said and stand in the last checkpoint. No dropout, and no number of the model trains.

Paper: arXiv:2010.15980. Ten candidates, batches of 32 and 100 to 180 iterations are quoted for its code, and 3 to 10
slots. Its slots stand anywhere in a template; here before all of it. Its search for the labels' words is the recipe
label_words: --strategy label_words+autoprompt searches for both.

Neutral: none; it exchanges words in place of training numbers.
Cost: a step and, without gradient, one pass over as many rows for each candidate and one for what stands there.
Claims: words that ask a model for what it knows; they can be read, and moved to another model of the same vocabulary.
Pitfalls: what is found seldom reads as language, and is worse than vectors that train freely. It needs a template
(--template and --words), and batches that are not too small: a lucky exchange stays. `readable` keeps to words that
come back when they are written down and read again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from luthier.core import ConfigError, at_least
from luthier.data.batches import Batch
from luthier.data.order import shuffled
from luthier.data.tasks import Task
from luthier.runs.spec import OptimSpec, RunSpec
from luthier.surgery import Group, Method
from luthier.training.course import Course
from luthier.training.optimiser import Optimiser
from luthier.training.strategy import STRATEGIES, Strategy
from luthier.training.word_exchange import WordExchange


@STRATEGIES.register("autoprompt", family="gradient", paper="arXiv:2010.15980")
@dataclass(frozen=True, kw_only=True)
class AutoPrompt(Strategy):
    """Gradient-guided search for words."""

    example: ClassVar[str] = (
        "sample:smollm2-135m --data sample:trec6 --template '{text} Kind: {mask}' "
        "--words 'ABBR=short,DESC=why,ENTY=thing,HUM=person,LOC=place,NUM=number' --method prompt_tuning"
    )
    neutral: ClassVar[dict[str, Any] | None] = None
    rated: ClassVar[bool] = False
    extra_forwards: ClassVar[float] = 11.0
    tiny: ClassVar[dict[str, Any]] = {"candidates": 4}
    tiny_kind: ClassVar[str] = "bert-gap"
    tiny_method: ClassVar[str] = "prompt_tuning"

    candidates: Annotated[int, "words that are tried in a step", at_least(1)] = 10
    readable: Annotated[bool, "only words that are read again as what they were written for"] = False

    def conflicts(self, other: Strategy | Method) -> str | None:
        if isinstance(other, Method) and other.name != "prompt_tuning":
            return "it exchanges words in the vectors of prompt_tuning. Use --method prompt_tuning --set length=3."
        return None

    def check(self, spec: RunSpec) -> None:
        if spec.data.template is None:
            raise ConfigError(
                "autoprompt cannot ask for a label without a gap: give --template '{text} It was {mask}.' and --words."
            )

    def suits(self, task: Task) -> str | None:
        return None if task.name == "classification" and not task.multi_label else "it wants rows with one label each."

    def optimiser(self, named: dict[str, nn.Parameter], groups: list[Group], spec: OptimSpec, lr: float) -> Optimiser:
        return WordExchange(named, groups, spec, lr)

    def start(self, course: Course) -> None:
        (slots,) = course.weights().values()
        begin = torch.full((len(slots),), course.task.gap)
        if course.task.asks != "encoder":
            begin = torch.tensor(self._allowed(course))[shuffled(len(self._allowed(course)), course.seed, "begin")]
        course.memory.tensors["ids"] = begin[: len(slots)]
        with torch.no_grad():
            slots.copy_(_table(course)[course.memory.tensors["ids"].to(slots.device)])

    def gradient(self, course: Course, batches: list[Batch], loss: Callable[[int, Batch], Tensor]) -> list[Tensor]:
        optimiser = course.optimiser
        assert isinstance(optimiser, WordExchange)
        (slots,) = course.weights().values()
        n_targets = max(1, sum(batch.n_targets for batch in batches))
        losses = []
        with course.still():
            for k, batch in enumerate(batches):
                part = loss(k, batch) / n_targets
                torch.autograd.backward(part)
                losses.append(part.detach())
            slot = int(torch.randint(len(slots), (1,), generator=course.generator("slot")))
            held = slots.detach()[slot].clone()
            fresh = self._other_rows(course, sum(len(batch.rows) for batch in batches))
            try:
                with torch.no_grad():
                    before = self._mean(course, fresh)
                    found = (before, -1)
                    for i in self.promising(course, slots.grad, slot):
                        slots[slot] = _table(course)[i]
                        found = min(found, (self._mean(course, fresh), i))
            finally:
                with torch.no_grad():
                    slots[slot] = held
        course.note("before", before)
        course.note("after", found[0])
        if found[1] >= 0:
            optimiser.exchange = (slot, found[1], _table(course)[found[1]].detach().float())
        return losses

    def promising(self, course: Course, slope: Tensor | None, slot: int) -> list[int]:
        """The words that the gradient (slots, d) promises most of in a slot, best first."""
        assert slope is not None
        ids = course.memory.tensors["ids"].tolist()
        promise = -(_table(course).detach().float() @ slope[slot].float())  # (vocabulary,)
        allowed = set(self._allowed(course)) - {ids[slot]}
        order = (i for i in promise.argsort(descending=True, stable=True).tolist() if i in allowed)
        kept: list[int] = []
        for i in order:
            if len(kept) == self.candidates:
                break
            if not self.readable or self._comes_back(course, [*ids[:slot], i, *ids[slot + 1 :]]):
                kept.append(i)
        return kept

    def after_step(self, course: Course) -> None:
        optimiser = course.optimiser
        assert isinstance(optimiser, WordExchange)
        if optimiser.exchange is not None:
            slot, found, _ = optimiser.exchange
            ids = course.memory.tensors["ids"].clone()
            ids[slot] = found
            course.memory.tensors["ids"] = ids

    def finish(self, course: Course) -> None:
        ids = course.memory.tensors["ids"].tolist()
        course.say(f"autoprompt found: {' '.join(course.tokenizer.convert_ids_to_tokens(ids))} (ids {ids})")

    def _allowed(self, course: Course) -> list[int]:
        tokenizer = course.tokenizer
        special = set(tokenizer.all_special_ids)
        return [i for i in range(min(len(tokenizer), len(_table(course)))) if i not in special]

    def _comes_back(self, course: Course, ids: list[int]) -> bool:
        special = set(course.tokenizer.all_special_ids)
        words = [i for i in ids if i not in special]  # slots that nothing was found for yet stand apart
        read = course.tokenizer(course.tokenizer.decode(words), add_special_tokens=False)["input_ids"]
        return list(read) == words

    def _other_rows(self, course: Course, count: int) -> list[Batch]:
        rows = course.rows.rows("train")
        return course.cut(rows[shuffled(len(rows), course.seed, "autoprompt", course.step)[:count]])

    def _mean(self, course: Course, batches: list[Batch]) -> float:
        return sum(float(course.forward(batch).loss) for batch in batches) / max(1, sum(b.n_targets for b in batches))


def _table(course: Course) -> Tensor:
    table: Any = course.tuned.model.get_input_embeddings()
    return table.weight  # type: ignore[no-any-return]
