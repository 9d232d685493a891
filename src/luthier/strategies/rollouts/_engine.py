"""What strategies that learn from their own answers share: writing, rewarding, keeping, and the passes over answers.

A batch of rollouts is made before the first of the steps that learn from it, and stands in the memory, so a run that
is stopped between two of them goes on to the bit. Each answer is drawn by a name of its own: (seed, step, prompt,
sample). One base is in memory: the policy is the base with its tuning awake, the reference the same with it asleep.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from luthier.data.batches import Batch
from luthier.strategies.rollouts._answers import (
    Lines,
    asked_of,
    autocast_of,
    constant_groups,
    ends_of,
    examples_of,
    grown_to,
    in_lines,
    ledger_lines,
    one_reward,
    prompts_of,
    scored_answers,
    texts_of,
)  # fmt: skip
from luthier.strategies.rollouts._settings import RolloutSettings
from luthier.training.answers import positions_for_rows, token_log_chances
from luthier.training.course import Course, Piece
from luthier.training.objective import Objective, Result
from luthier.training.out_of_memory import is_out_of_memory, make_room
from luthier.training.written import write_ids

__all__ = ["Rollouts"]

_SAYS = 10  # times that a run tells how it goes, with one of its texts


@dataclass(frozen=True, kw_only=True)
class Rollouts(RolloutSettings):
    """Everything but the loss."""

    # ------------------------------------------------------------------ what a file says

    @abstractmethod
    def losses(self, course: Course, lines: Lines) -> Tensor:
        """The loss of each line, (lines,); the loop divides their sum by `counts` of the whole step."""

    def counts(self, mask: Tensor) -> Tensor:
        """What each line adds to the number that the step's loss is divided by, (lines,)."""
        return torch.ones(len(mask))

    def worth(self, course: Course, held: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is made of the rewards once, after writing: tensors by name, (answers, ...), to be remembered."""
        return {}

    # ------------------------------------------------------------------ a batch of rollouts

    def before_step(self, course: Course) -> None:
        k = self.updates * self.parts
        epoch, inside = course.place
        block = [epoch, inside // k]
        if course.memory.facts.get("block") != block:
            self._roll(course, inside % k)
            course.memory.facts["block"] = block
        for name, value in sorted(course.memory.facts.get("notes", {}).items()):  # as a checkpoint gives them back
            course.note(name, value)

    def _roll(self, course: Course, inside: int) -> None:
        """Write answers to the prompts of the steps to come, and remember what they are worth."""
        assert course.feed is not None
        first = course.step - 1 - inside
        rows = np.concatenate([course.feed.rows(first + i) for i in range(self.parts)])
        if not len(rows):
            return
        self.rewards.settle(course.tuned, course.say)
        lines = np.repeat(np.sort(rows), self.samples)
        prompts = prompts_of(course.examples(), lines)
        answers = self._write(course, lines, prompts)
        ends = set(ends_of(course))
        ended = [bool(answer) and answer[-1] in ends for answer in answers]
        width = max(len(answer) for answer in answers)
        held = {"line": torch.from_numpy(lines)}
        held["answer"] = torch.tensor([[*a, *[0] * (width - len(a))] for a in answers])
        held["size"] = torch.tensor([len(answer) for answer in answers])
        held["cut"] = torch.tensor([not e for e in ended]).float()
        texts = texts_of(course.tokenizer, answers)
        each = self._rewarded(course, lines, prompts, texts)
        held["reward"] = torch.tensor([self.rewards.total(values) for values in each])
        if self.cut == "penalty":
            held["reward"] = held["reward"] - self.cut_penalty * held["cut"]
        held["old"] = self._chances(course, held)
        if self.asks_base:
            with course.tuned.base_only():
                held["base"] = self._chances(course, held)
        held |= self.worth(course, held)
        facts = course.memory.facts
        constant = constant_groups(held, self.samples)
        facts["groups"] = facts.get("groups", 0) + len(constant)
        facts["constant"] = facts.get("constant", 0) + int(constant.sum())
        facts["cuts"] = facts.get("cuts", 0) + int(held["cut"].sum())
        facts["answers"] = facts.get("answers", 0) + len(lines)
        most, least = float(held["reward"].max()), float(held["reward"].min())
        facts["most"], facts["least"] = max(facts.get("most", most), most), min(facts.get("least", least), least)
        facts["idle"] = self._nothing(held, constant)
        facts["notes"] = self._numbers(held, constant)
        course.memory.tensors.clear()
        course.memory.tensors.update({n: t.detach().cpu() for n, t in held.items()})
        kept = ledger_lines(course, held, prompts, texts, [dict(zip(self.rewards.names, v, strict=True)) for v in each])
        course.keep({**line, **self._also_kept(held, k)} for k, line in enumerate(kept))
        self._say(course, texts, held)

    def _write(self, course: Course, lines: NDArray[np.int64], prompts: list[list[int]]) -> list[list[int]]:
        """An answer to each prompt."""
        seeds = [course.seed_of("write", int(row), k % self.samples) for k, row in enumerate(lines)]
        return self._written(course, lines, prompts, seeds)

    def _written(
        self, course: Course, lines: NDArray[np.int64], prompts: list[list[int]], seeds: Sequence[int],
        processors: Callable[[list[int]], list[Any]] | None = None,
    ) -> list[list[int]]:  # fmt: skip
        with autocast_of(course):
            return write_ids(
                course.tuned, prompts, seeds=seeds, most=self.new_tokens, temperature=self.temperature,
                stop=ends_of(course), limit=positions_for_rows(course.tuned), processors=processors,
                facts={f"row_{n}": torch.from_numpy(v[lines]) for n, v in course.examples().facts.items()},
            )  # fmt: skip

    def _rewarded(
        self, course: Course, lines: NDArray[np.int64], prompts: list[list[int]], texts: list[str]
    ) -> list[list[float]]:
        assert course.columns is not None
        said = asked_of(course.examples(), lines.tolist(), texts_of(course.tokenizer, prompts), texts, course.columns)
        return self.rewards(said, course.columns)

    def _nothing(self, held: Mapping[str, Tensor], constant: Tensor) -> str:
        """Why these answers teach nothing; empty where they do."""
        if self.cut == "mask" and bool(held["cut"].all()):
            return (
                f"all answers reached {self.new_tokens} tokens, and with cut = mask none is learnt. Raise new_tokens."
            )
        if not self.grouped or not bool(constant.all()):
            return ""
        return one_reward(float(held["reward"][0]), float(held["cut"].mean()), self.samples)

    def _numbers(self, held: Mapping[str, Tensor], constant: Tensor) -> dict[str, float]:
        """For the log."""
        found = {"reward": float(held["reward"].mean()), "length": float(held["size"].float().mean())}
        found["cut"] = float(held["cut"].mean())
        if "base" in held:
            found["kl"] = float((held["old"] - held["base"]).sum(1).mean())  # Σ_t over an answer, of samples of π
        if self.grouped:
            found["constant"] = float(constant.float().mean())
        return {name: round(value, 6) for name, value in found.items()}

    def _also_kept(self, held: Mapping[str, Tensor], k: int) -> dict[str, Any]:
        return {}

    def _say(self, course: Course, texts: list[str], held: Mapping[str, Tensor]) -> None:
        """Now and then, how it goes, with the text that got most."""
        step, k, every = course.step, self.updates * self.parts, max(1, course.total // _SAYS)
        if step > 1 and (step - 1) // every == (step - 1 - k) // every:
            return
        notes = course.memory.facts["notes"]
        shown = " · ".join(f"{name} {value:.3g}" for name, value in notes.items())
        best = int(held["reward"].argmax())
        course.say(
            f"step {step}: {shown}; of its answers, rewarded {float(held['reward'][best]):.3g}: {texts[best][:160]!r}"
        )

    # ------------------------------------------------------------------ a step

    def idle(self, course: Course) -> str:
        return str(course.memory.facts.get("idle", ""))

    def batches(self, course: Course, batches: list[Batch]) -> list[Batch]:
        rows = np.concatenate([batch.rows for batch in batches])
        held = course.memory.tensors
        chosen = np.flatnonzero(np.isin(held["line"].numpy(), rows))
        return self._laid(course, held, chosen)

    def _laid(self, course: Course, held: Mapping[str, Tensor], chosen: NDArray[np.int64]) -> list[Batch]:
        """Micro-batches of prompts with answers; marks are the numbers of the answers."""
        made = examples_of(course.examples(), held, chosen, self.counts(self._mask(held, torch.from_numpy(chosen))))
        lines = held["line"].numpy()
        return [replace(batch, rows=lines[chosen[batch.rows]]) for batch in course.lay(made)]

    def _mask(self, held: Mapping[str, Tensor], chosen: Tensor) -> Tensor:
        """1 for the tokens of answers that count, (lines, T)."""
        real = torch.arange(held["answer"].shape[1]) < held["size"][chosen][:, None]
        if self.cut == "mask":
            real = real & (held["cut"][chosen] == 0)[:, None]
        return real.float()

    def loss(self, course: Course, piece: Piece, forward: Callable[[], Any]) -> Any:
        held = dict(course.memory.tensors)
        batch = piece.batch
        if batch.marks is None:  # the trial before step 1, of rows as wide as there are
            batch, held = self._widest(course, batch, held)
        assert batch.marks is not None
        chosen = batch.marks[:, 0].long().cpu()
        chance, values = self._pass(course, batch, held["answer"].shape[1])
        here = {n: t[chosen].to(course.device) for n, t in held.items()}
        lines = Lines(
            chance=chance, values=values, held=here, mask=self._mask(held, chosen).to(course.device),
            first=course.place[1] % (self.updates * self.parts) == 0,
        )  # fmt: skip
        return Result(self.losses(course, lines).sum(), batch.n_targets)

    def _pass(self, course: Course, batch: Batch, width: int) -> tuple[Tensor, Tensor | None]:
        """The log-probability of each token of the answers, (lines, T), and values where there are any."""
        chance, told = self._tokens(course, batch)
        return in_lines(chance, told, width), None

    def _tokens(self, course: Course, batch: Batch) -> tuple[Tensor, Tensor]:
        assert course.objective is not None
        return token_log_chances(course.tuned, batch, chunked=course.objective.chunked, temperature=self.temperature)

    def _chances(self, course: Course, held: Mapping[str, Tensor]) -> Tensor:
        """The same of all answers, without gradient, as the weights are now: (answers, T)."""
        return self._seen(course, held, lambda batch, width: self._pass(course, batch, width)[0])

    def _seen(self, course: Course, held: Mapping[str, Tensor], look: Callable[[Batch, int], Tensor]) -> Tensor:
        assert course.feed is not None
        width, usual = held["answer"].shape[1], course.feed.budget
        found = torch.zeros(held["answer"].shape)
        try:
            while True:
                try:
                    with torch.no_grad(), course.still(), autocast_of(course):
                        for batch in self._laid(course, held, np.arange(len(found), dtype=np.int64)):
                            assert batch.marks is not None
                            found[batch.marks[:, 0].long().cpu()] = look(batch, width).float().cpu()
                    return found
                except Exception as error:
                    if not is_out_of_memory(error) or course.feed.budget <= 1:
                        raise
                    make_room()
                    course.feed.budget //= 2  # for this once; what trains is cut by its own trial
        finally:
            course.feed.budget = usual

    def _widest(self, course: Course, batch: Batch, held: Mapping[str, Tensor]) -> tuple[Batch, dict[str, Tensor]]:
        """Prompts with answers as long as there may be, made up, for the trial of memory."""
        assert course.feed is not None
        room = positions_for_rows(course.tuned)
        widths = batch.inputs["attention_mask"].sum(1).tolist()
        new = self.new_tokens if room is None else max(1, min(self.new_tokens, room - max(widths)))
        lines = np.repeat(batch.rows, self.samples)[: max(1, course.feed.budget // (max(widths) + new))]
        grown = {
            n: grown_to(t[:1].expand(len(lines), *t.shape[1:]), held["answer"].shape[1], new) for n, t in held.items()
        }
        grown |= {
            "line": torch.from_numpy(lines),
            "answer": torch.ones(len(lines), new, dtype=torch.long),
            "size": torch.full((len(lines),), new),
        }
        return self._laid(course, grown, np.arange(len(lines), dtype=np.int64))[0], grown

    # ------------------------------------------------------------------ what came of it

    def scored(self, objective: Objective, batch: Batch) -> Tensor:
        """Of each prompt (prompts, 3): see `scored_answers`."""
        return scored_answers(objective, batch, self.valued, self.new_tokens)

    def finish(self, course: Course) -> None:
        facts = course.memory.facts
        groups, constant = facts.get("groups", 0), facts.get("constant", 0)
        if self.grouped and constant:
            course.say(
                f"{constant} of {groups} prompts had answers of one reward alone, which says nothing of them; more "
                "samples, a higher temperature or a reward of more steps would tell them apart"
            )
        if facts.get("most") == facts.get("least"):
            course.say(
                f"No result: every answer got the reward {facts.get('most', 0.0):g}, so none is better than another"
            )
        if facts.get("cuts"):
            how = {"keep": "learnt as others are", "mask": "not learnt from", "penalty": f"less {self.cut_penalty:g}"}
            course.say(
                f"{facts['cuts']} of {facts['answers']} answers reached {self.new_tokens} tokens and were cut: "
                f"{how[self.cut]} (cut = {self.cut})"
            )
