"""Settings that all strategies of rollouts have, and what is refused before anything is read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from luthier.core import ConfigError, above, at_least
from luthier.data.columns import Columns
from luthier.data.order import ChosenOrder, Order, shuffled
from luthier.data.sets import Sets
from luthier.runs.spec import RunSpec
from luthier.strategies.rollouts._rewards import Asked, Rewards, digests, needs_response, parts_of, rewards_of
from luthier.surgery import Method
from luthier.training.preference import Weighing
from luthier.training.strategy import Strategy, fills

__all__ = ["RolloutSettings"]


@dataclass(frozen=True, kw_only=True)
class RolloutSettings(Weighing):
    """How answers are written and rewarded, and in how many steps they are learnt from."""

    example: ClassVar[str] = "sample:smollm2-135m --data PROMPTS.jsonl --set reward=length"
    learns: ClassVar[str] = "prompts"
    tiny_kind: ClassVar[str] = "llama-prompts"
    writes: ClassVar[bool] = True
    still: ClassVar[bool] = True
    grouped: ClassVar[bool] = True  # an answer is compared with the others to its prompt

    reward: Annotated[str, "names, a run that learnt rewards, or my_file.py; added: exact_match+0.2*format"] = ""
    pattern: Annotated[str, "of the rewards regex (somewhere in it) and format (all of it)"] = ""
    words: Annotated[int, "of the reward length: so many words get 1", at_least(1)] = 20
    samples: Annotated[int, "answers to each prompt", at_least(1)] = 8
    new_tokens: Annotated[int, "tokens of an answer, at most", at_least(1)] = 64
    temperature: Annotated[
        float, "divides the logits, where answers are written and where they are learnt", above(0)
    ] = 1.0
    updates: Annotated[int, "steps that learn from one batch of answers", at_least(1)] = 1
    cut: Annotated[
        Literal["keep", "mask", "penalty"], "answers that reach new_tokens: as others, unlearnt, or less"
    ] = "keep"
    cut_penalty: Annotated[float, "taken from the reward of a cut answer, with cut=penalty", at_least(0)] = 1.0
    reward_seconds: Annotated[float, "for the reward of one answer, at most", above(0)] = 10.0

    @property
    def asks_base(self) -> bool:
        """Whether the base is asked about the answers."""
        return True

    @property
    def _judge(self) -> str:
        """A file that says which of two answers is better, where there may be one."""
        return str(getattr(self, "judge", ""))

    @property
    def parts(self) -> int:
        """Steps in which each answer is learnt from once."""
        return 1

    def check(self, spec: RunSpec) -> None:
        if self._judge and self.reward:
            raise ConfigError(f"{self.name}: both a judge and rewards are named. Name one of them.")
        if self._judge and ".py" not in self._judge:
            raise ConfigError(f"{self.name}.judge is {self._judge!r}. Name a file with a function: my_judge.py.")
        digests(self.reward or self._judge, "reward" if self.reward else "prefers")  # refuses what is none
        names = {part.name for part in parts_of(self.reward or self._judge)}
        if (self.pattern == "") == bool({"regex", "format"} & names):
            which = "regex or format wants a pattern" if self.pattern == "" else "only regex and format read it"
            raise ConfigError(f"{self.name}.pattern is {self.pattern!r}: {which}. Set both, or leave both out.")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(
                f"{self.name}.pattern {self.pattern!r} is no pattern: {error}. Use the syntax of Python's re."
            ) from None
        if self.grouped and self.samples < 2:
            raise ConfigError(
                f"{self.name}.samples is {self.samples}: an answer is compared with the others to its prompt, so two "
                "are needed at least; 8 are usual."
            )
        if spec.batch.size < self.parts:
            raise ConfigError(
                f"{self.name}: {spec.batch.size} prompts of a batch cannot be parted into {self.parts} minibatches. "
                "Raise batch.size or lower minibatches."
            )

    def holds(self, columns: Columns) -> dict[str, str]:
        wanting = needs_response(self.reward or self._judge)
        if wanting and columns.response is None:
            raise ConfigError(
                f"{self.name}.reward: {wanting[0]} compares with what is right, and the rows have no column for it. "
                "Name one, such as --response answer, or take another reward."
            )
        rewards_of.cache_clear()  # what was loaded for another run may have changed since
        return digests(self.reward or self._judge, "reward" if self.reward else "prefers")

    def conflicts(self, other: Strategy | Method) -> str | None:
        if isinstance(other, Method) and other.looks_at_data:
            return (
                "it looks at the rows before training, which say nothing before there are answers. Use another method."
            )
        if isinstance(other, Strategy) and any(fills(other, moment) for moment in ("loss", "weigh", "passes")):
            return f"{other.name} changes how rows are learnt, and here answers are. Use one."
        return None

    @property
    def rewards(self) -> Rewards:
        """What gives answers their rewards."""
        return rewards_of(self.reward, self.words, self.pattern, self.reward_seconds, self._judge)

    def valued(self, own: Sequence[Asked], base: Sequence[Asked], columns: Columns) -> tuple[list[float], list[float]]:
        """What answers are worth in the scores, and what those of the base are."""
        first, second = ([self.rewards.total(v) for v in self.rewards(asked, columns)] for asked in (own, base))
        return first, second

    def order(self, usual: Order, sets: Sets, spec: RunSpec) -> Order:
        k, parts = self.updates * self.parts, self.parts
        if k == 1:
            return usual

        def rows(epoch: int, step: int) -> NDArray[np.int64]:
            whole = usual.rows(epoch, step // k)
            if parts == 1:
                return whole
            turn = shuffled(len(whole), spec.seed, "minibatches", epoch, step // parts)
            return whole[np.array_split(turn, parts)[step % parts]]

        return ChosenOrder(usual, rows, usual.steps_per_epoch * k)
