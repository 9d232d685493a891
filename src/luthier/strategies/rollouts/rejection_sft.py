"""Write many answers to a prompt, keep the best, and learn it as text (best of n, RAFT).

    y* = argmax r(x, y_i), i = 1..samples              or all y_i with r >= `least`, with keep = "passing"
    L  = -Σ_t log p(y*_t), by the tokens that are kept in the step

The answers of each step are the model's own of that step, so it goes on from what it has learnt. Answers of the same
text count once. A prompt of which none passes, or whose answers all got one reward, is dropped and counted; where a
step has nothing else, it makes no update.

Paper: arXiv:2304.06767. Best of n in rounds: arXiv:2307.09288.

Neutral: none: without rewards there is nothing to learn from prompts.
Cost: `samples` answers to each prompt, a forward pass for each token; one pass over the answers that are kept.
Claims: as stable as plain training on text, and hard to break.
Pitfalls: it learns from what is good and never from what is bad, so it moves less than `grpo` does for the same
answers. More samples find better ones, less and less so. It leaves the base as far as plain training would: nothing
holds it near. `least` has no meaning where rewards have no zero, as those of a reward model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from luthier.data.batches import Batch
from luthier.strategies.rollouts._answers import Lines
from luthier.strategies.rollouts._engine import Rollouts
from luthier.training.course import Course
from luthier.training.strategy import STRATEGIES


@STRATEGIES.register("rejection_sft", family="rollouts", paper="arXiv:2304.06767")
@dataclass(frozen=True, kw_only=True)
class RejectionSFT(Rollouts):
    """Plain training on the best of many answers."""

    tiny: ClassVar[dict[str, Any]] = {"reward": "length", "samples": 4, "new_tokens": 4, "words": 3}

    keep: Annotated[Literal["best", "passing"], "of each prompt's answers the best, or all with `least`"] = "best"
    least: Annotated[float, "reward that an answer must have, with keep=passing"] = 1.0

    @property
    def asks_base(self) -> bool:
        return False

    def counts(self, mask: Tensor) -> Tensor:
        return mask.sum(1)

    def worth(self, course: Course, held: dict[str, Tensor]) -> dict[str, Tensor]:
        reward = held["reward"]
        if self.cut == "mask":  # the best of those that may be learnt
            reward = reward.masked_fill(held["cut"] == 1, -torch.inf)
        return {"kept": self.kept_of(reward, held["answer"], held["size"])}

    def kept_of(self, reward: Tensor, answer: Tensor, size: Tensor) -> Tensor:
        """1 for the answers that are learnt, (answers,): none of a prompt that has no better one."""
        kept = torch.zeros(len(reward))
        for first in range(0, len(reward), self.samples):
            group = reward[first : first + self.samples]
            if self.keep == "best":
                kept[first + int(group.argmax())] = float(group.max() > group.min())
                continue
            seen: set[tuple[int, ...]] = set()
            for k in range(first, first + self.samples):
                words = tuple(answer[k, : int(size[k])].tolist())
                kept[k] = float(reward[k] >= self.least and words not in seen)
                seen.add(words)
        return kept

    def _nothing(self, held: Mapping[str, Tensor], constant: Tensor) -> str:
        if bool(held["kept"].any()):
            return ""
        if self.keep == "best":
            return super()._nothing(held, constant)
        return (
            f"no answer to any prompt got a reward of {self.least:g}; the best got {float(held['reward'].max()):.4g}. "
            "Try more samples, easier prompts, or a lower least."
        )

    def _numbers(self, held: Mapping[str, Tensor], constant: Tensor) -> dict[str, float]:
        kept = held["kept"] == 1
        dropped = (~kept.view(-1, self.samples).any(1)).float().mean()
        more = {"dropped": float(dropped), **({"kept": float(held["reward"][kept].mean())} if bool(kept.any()) else {})}
        return {**super()._numbers(held, constant), **{name: round(value, 6) for name, value in more.items()}}

    def _also_kept(self, held: Mapping[str, Tensor], k: int) -> dict[str, Any]:
        return {"kept": bool(held["kept"][k])}

    def batches(self, course: Course, batches: list[Batch]) -> list[Batch]:
        rows = np.concatenate([batch.rows for batch in batches])
        held = course.memory.tensors
        chosen = np.isin(held["line"].numpy(), rows) & (held["kept"].numpy() == 1)
        return self._laid(course, held, np.flatnonzero(chosen))

    def losses(self, course: Course, lines: Lines) -> Tensor:
        return -lines.sums(lines.chance)
