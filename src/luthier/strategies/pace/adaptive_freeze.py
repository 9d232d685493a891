"""Lower blocks stop learning once their gradients have settled.

    G_b: the norms of block b's gradient, added up over an interval of steps
    change_b = |G_b(before) - G_b| / G_b(before)
    after each interval the longest run of lowest blocks rests whose change lies below the q-th percentile of all

What rests never learns again. The head is no block. Whatever trains below the first block counts as the lowest one.
With keep = true what the resting blocks give for a row is computed once, without dropout, and kept until more of them
rest; a step then begins behind them.

Paper: arXiv:2102.01386 (AutoFreeze), whose interval and percentile were not checked: ours are choices.

Neutral: percent = 0.
Cost: less and less: backward passes end above what rests. With keep, forward passes begin there too; the states of all
tokens of all rows are held, at most 1 GiB, or nothing is kept, as the log says. It pays over several epochs alone: rows
are computed anew whenever more blocks rest. Within one it costs: 60 steps of luthier train sample:minilm-l6 --data
sample:trec6 --method full --strategy adaptive_freeze --set adaptive_freeze.every=8 --set percent=80 --trunk-dropout off
--batch 16 --steps 60 took 26 seconds of processor with --set keep=true, and 17 without.
Claims: faster fine-tuning at nearly the same score.
Pitfalls: gradients settle for another reason too, a rate that has fallen to nothing. What is kept was computed beside
other rows than those of the step, so the last bits of a run with keep are others than without; a resumed one has them.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar
from weakref import WeakKeyDictionary

import torch

from luthier.core import ConfigError, at_least, between
from luthier.runs.spec import RunSpec
from luthier.surgery import Method
from luthier.surgery.layer_groups import layer_groups
from luthier.training.course import Course, Piece
from luthier.training.feed import Feed
from luthier.training.kept_prefix import Prefix
from luthier.training.strategy import STRATEGIES, Strategy, fills

_KEPT: WeakKeyDictionary[Feed, Prefix] = WeakKeyDictionary()
"""No part of the memory: it is computed again after a stop, to the bit."""

_MOVES = ("before_step", "on_step", "loss", "phases")
"""Where a method may change what it computes beside its gradients."""


@STRATEGIES.register("adaptive_freeze", family="pace", paper="arXiv:2102.01386")
@dataclass(frozen=True, kw_only=True)
class AdaptiveFreeze(Strategy):
    """Freezing of settled lower blocks."""

    neutral: ClassVar[dict[str, Any] | None] = {"percent": 0.0}
    tiny: ClassVar[dict[str, Any]] = {"every": 1, "percent": 80.0}

    percent: Annotated[float, "q, percentile of the changes below which a block has settled", between(0, 100)] = 50.0
    every: Annotated[int, "steps of an interval", at_least(1)] = 50
    keep: Annotated[bool, "keep what the resting blocks give for each row"] = False

    def check(self, spec: RunSpec) -> None:
        if self.keep and spec.trunk_dropout != "off":
            raise ConfigError(
                "adaptive_freeze.keep: what is kept of a row knows no dropout. Set trunk_dropout = off with it."
            )
        if self.keep and spec.batch.pack:
            raise ConfigError("adaptive_freeze.keep is for rows in lines of their own. Leave it or batch.pack out.")

    def conflicts(self, other: Strategy | Method) -> str | None:
        if not self.keep:
            return None
        if isinstance(other, Method):
            own = [moment for moment in _MOVES if getattr(type(other), moment) is not getattr(Method, moment)]
            moves = own or other.draws or other.looks_again or other.modifies or other.computes_tensors
            return "it may change what resting blocks give. Leave adaptive_freeze.keep out." if moves else None
        looks = [*(m for m in ("passes", "gradient", "batches") if fills(other, m)), *other.reads]
        if {"passes", "gradient", "batches", "embeddings", "states", "attention"} & {*looks}:
            return "it looks at, or changes, what is passed over there. Leave adaptive_freeze.keep out."
        return None

    def start(self, course: Course) -> None:
        n = len(self._blocks(course))
        course.memory.facts.update({"resting": 0, "now": [0.0] * n, "sum": [0.0] * n, "before": None})

    def trains(self, course: Course) -> Collection[str] | None:
        asleep = {name for group in self._blocks(course)[: course.memory.facts["resting"]] for name in group}
        course.note("resting", course.memory.facts["resting"])
        return [name for name in course.weights() if name not in asleep]

    def loss(self, course: Course, piece: Piece, forward: Callable[[], Any]) -> Any:
        depth = self._depth(course) if self.keep else 0
        if not depth or course.feed is None:
            return forward()
        kept = _KEPT.get(course.feed)
        if kept is None or kept.depth != depth:
            kept = _KEPT[course.feed] = Prefix(course.tuned, course.feed.batches, depth)
            course.say(f"{depth} of the blocks rest: {kept.why_not or 'what they give for each row is kept'}")
        before = int(kept.unlike.sum())
        with kept.standing_in(piece.batch):
            if unlike := int(kept.unlike.sum()) - before:
                course.say(
                    f"{unlike} rows are read whole: behind the {depth} blocks a pass gives something else for them"
                )
            return forward()

    def after_backward(self, course: Course) -> None:
        # Of this step alone: made again, the same is written.
        course.memory.facts["now"] = [self._norm(course, group) for group in self._blocks(course)]

    def after_step(self, course: Course) -> None:
        facts = course.memory.facts
        facts["sum"] = [a + b for a, b in zip(facts["sum"], facts["now"], strict=True)]
        if course.step % self.every:
            return
        if facts["before"] is not None:
            facts["resting"] = self.settled(facts["before"], facts["sum"], facts["resting"])
        facts["before"], facts["sum"] = facts["sum"], [0.0] * len(facts["sum"])

    def settled(self, before: list[float], now: list[float], resting: int) -> int:
        """How many of the lowest blocks rest from now on; the last one always learns."""
        changes = [abs(b - n) / max(b, 1e-30) for b, n in zip(before[resting:], now[resting:], strict=True)]
        if not changes:
            return resting
        bound = float(torch.quantile(torch.tensor(changes, dtype=torch.float64), self.percent / 100))
        run = next((i for i, change in enumerate(changes) if not change < bound), len(changes))
        return min(resting + run, len(now) - 1)

    def _depth(self, course: Course) -> int:
        """Blocks of the model below which nothing learns any more; those without numbers of their own count too."""
        resting, depth = course.memory.facts["resting"], 0
        for number, group in enumerate(self._groups(course)):  # 0 is what stands below the first block
            if group and not resting:
                return depth
            resting -= bool(group)
            depth = number
        return depth

    def _blocks(self, course: Course) -> list[list[str]]:
        """Names by block, from the lowest up."""
        return [group for group in self._groups(course) if group]

    def _groups(self, course: Course) -> list[list[str]]:
        return [*reversed(layer_groups(course.tuned, list(course.weights()))[1:])]

    def _norm(self, course: Course, names: list[str]) -> float:
        grads = [g for name in names if (g := course.weights()[name].grad) is not None]
        return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))) if grads else 0.0
