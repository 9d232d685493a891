"""What a training strategy is: how a model learns, where a method is what of it trains.

A strategy is a frozen dataclass of settings that is asked at named moments of a run, in this order:

    conflicts, check      before anything is read
    suits                 when the task is known, before a weight is read
    models                beside the one that trains: found then, loaded before step 1, never trained
    order                 which rows make which step: a pure function of (seed, epoch, step)   one owner
    optimiser             what moves the numbers, in place of the spec's                        one owner
    groups                rates of some tensors, when the optimiser is made
    numbers               trained numbers of its own, when the models beside are there
    start                 once, before step 1, never on resume
    each step
      before_step         what lasts may change
      idle                why there is nothing to learn in this step
      trains              names that learn in this step
      batches             other micro-batches, such as chosen rows                             one owner
      gradient            made otherwise than by backward passes of the micro-batches          one owner
      each micro-batch
        passes            losses that add up to its own; the loop goes backward after each     one owner
          loss            around the task's loss, or in its place
          weigh           a factor for the loss of each target; factors of several multiply
      penalty             once a step, no row decides it
      after_backward      the gradient is whole, unscaled, unclipped
      rate                share of the peak rate                                               one owner
      after_step          weights have moved; what lasts may change
    kept                  weights that are scored and kept in place of those that train      one owner
    finish                once, after the last step

Two rules keep a run exact. What lasts from step to step stands in `course.memory`, which every checkpoint holds, and
nowhere else. Between `before_step` and the update a step may be begun again, in smaller pieces of the same rows:
nothing in there changes the memory, and draws are named by `course.generator` or `course.draw`, never taken from the
ambient generator.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from luthier.core import Card, Catalogue, CompositionError, ConfigError, UnknownName, build, fields_of, near, plain
from luthier.data.batches import Batch
from luthier.data.columns import Columns
from luthier.data.order import Order
from luthier.data.sets import Sets
from luthier.data.tasks import Task
from luthier.runs.spec import OptimSpec, RunSpec
from luthier.surgery import Group, Method, Tuned
from luthier.training.course import Course, Piece
from luthier.training.optimiser import Optimiser
from luthier.training.told import Told

__all__ = [
    "ONE_OWNER",
    "STRATEGIES",
    "Strategy",
    "fills",
    "neutral",
    "spelt",
    "split_settings",
    "strategies",
]

ONE_OWNER = ("order", "optimiser", "batches", "gradient", "passes", "rate", "kept")
"""Moments that one strategy of a run may fill."""


class Strategy:
    """One way of learning. The file holds the paper and nothing else; most moments may be left as they are.

    Class facts, read from the syntax tree for the listing:
        neutral: settings with which the run is the one without the strategy; None where there are none.
        reads: what it must see: "embeddings" or "states" (no frozen features then), "logits" (no chunked loss),
            "rows" (the states of all rows of a step, in each of its micro-batches: rows_of_a_step.py),
            "attention" (no frozen features, and the last block is computed for all tokens).
        roles: settings that name models beside the one that trains; `course.models` has them.
        learns: the one task that it learns, taken where the spec leaves the task open; "" where there are several.
        live: those models are asked in every step, in the run's own tokens, whatever the task.
        sets: names of further rows that it needs (`--also NAME=FILE`); "*" stands for any, one at least.
        drops: its passes must differ by dropout, so trunk_dropout = "auto" is on.
        whole_step: rows of a step must see one another, so a step is one micro-batch.
        rated: its own optimiser moves by a rate, which has to be given; off, there is none.
        by_task: each task of the rows (`--row-task COLUMN`) has labels of its own.
        writes: in some steps the model writes texts, a forward pass for each token.
        still: chances are compared over passes, so dropout is off in all of them.
        forgets: the optimiser drops the moments of what it lets rest.
        shortcut: a setting that an option of the strategy's own name gives: `--label-smoothing 0.1`.
        extra_passes: forward and backward passes of a step beyond the plain one's, at the default settings.
        extra_forwards: forward passes without a backward one, beyond those.

    Class facts for the contract tests alone:
        tiny: settings with which it does something within six steps, five of them an epoch.
        tiny_kind: the model on which it is tried, where labels of an encoder are not what it learns.
        tiny_method: the method with which it is tried, where it is made for one.

    Class fact for its page alone:
        example: model and rows behind `luthier train`, and what more it needs; left out, an encoder and labelled texts.
    """

    name: ClassVar[str]
    facts: ClassVar[dict[str, Any]]
    card: ClassVar[Card]
    neutral: ClassVar[dict[str, Any] | None] = None
    reads: ClassVar[tuple[str, ...]] = ()
    roles: ClassVar[tuple[str, ...]] = ()
    learns: ClassVar[str] = ""
    live: ClassVar[bool] = False
    sets: ClassVar[tuple[str, ...]] = ()
    drops: ClassVar[bool] = False
    whole_step: ClassVar[bool] = False
    rated: ClassVar[bool] = True
    writes: ClassVar[bool] = False
    still: ClassVar[bool] = False
    by_task: ClassVar[bool] = False
    forgets: ClassVar[bool] = False
    shortcut: ClassVar[str] = ""
    extra_passes: ClassVar[float] = 0.0
    extra_forwards: ClassVar[float] = 0.0
    tiny: ClassVar[dict[str, Any]] = {}
    tiny_kind: ClassVar[str] = ""
    tiny_method: ClassVar[str] = ""
    example: ClassVar[str] = ""

    def conflicts(self, other: Strategy | Method) -> str | None:
        """Why this strategy cannot stand beside another, or with a method, or None."""
        return None

    def check(self, spec: RunSpec) -> None:
        """Refuse a spec that cannot work with it. Raises: ConfigError."""

    def suits(self, task: Task) -> str | None:
        """Why it cannot learn a task, and what to do, or None."""
        return None

    def holds(self, columns: Columns) -> dict[str, str]:
        """Name -> digest of what it reads beside rows and models, such as a file: a resumed run is held to it.

        Asked before anything is written. Raises: any LuthierError, where that or the columns cannot be used.
        """
        return {}

    def models(self) -> dict[str, str]:
        """Role -> a finished run, a model folder, sample:NAME or a hub name; roles without a name are left out."""
        return {role: name for role in self.roles if (name := getattr(self, role))}

    def order(self, usual: Order, sets: Sets, spec: RunSpec) -> Order:
        """Which examples make which step, in place of the usual order, which is of the rows of "train" alone.

        A pure function of (seed, epoch, step): it remembers nothing. See `luthier.data.order.ChosenOrder`.
        """
        raise AssertionError("asked only where a strategy fills it")

    def optimiser(self, named: dict[str, nn.Parameter], groups: list[Group], spec: OptimSpec, lr: float) -> Optimiser:
        """What moves the trained numbers, in place of AdamW. Its state is by name, in every checkpoint."""
        raise AssertionError("asked only where a strategy fills it")

    def numbers(self, course: Course) -> Mapping[str, Tensor]:
        """Trained numbers of its own, such as a projection, at their start.

        They join the optimiser without decay, stand in `course.numbers` and in checkpoints, and never in the tuning.
        Asked once a process, under a generator named by the seed.
        """
        return {}

    def groups(self, tuned: Tuned) -> list[Group]:
        """Rates of some tensors; factors of a method and of several strategies multiply."""
        return []

    def start(self, course: Course) -> None:
        """Once, before step 1, and never on resume."""

    def before_step(self, course: Course) -> None:
        """The memory may change. Called again for the same step, it does the same."""

    def idle(self, course: Course) -> str:
        """Why there is nothing to learn in this step, which then makes no update; empty where there is something."""
        return ""

    def trains(self, course: Course) -> Collection[str] | None:
        """Names that learn in this step, of those in `course.optimiser.named`; None for all."""
        return None

    def batches(self, course: Course, batches: list[Batch]) -> list[Batch]:
        """The micro-batches of the step, in place of those that the order gave; `course.cut` makes some of any rows."""
        return batches

    def gradient(self, course: Course, batches: list[Batch], loss: Callable[[int, Batch], Tensor]) -> list[Tensor]:
        """Leaves the gradient of the step in the trained tensors, unscaled; gives the loss of each batch, as logged.

        Args:
            loss: of one batch, named by its place in the step: a sum over targets, with its graph.
        """
        raise AssertionError("asked only where a strategy fills it")

    def passes(self, course: Course, piece: Piece, loss: Callable[[], Tensor]) -> Iterator[Tensor]:
        """Losses of one micro-batch, which add up to its own. The loop goes backward after each.

        Args:
            loss: one forward pass; asked again, it draws the same dropout. A sum over targets.
        """
        yield loss()

    def loss(self, course: Course, piece: Piece, forward: Callable[[], Any]) -> Any:
        """Around the task's loss, or in its place: gives what `forward` gives, or a tensor, a sum over targets."""
        return forward()

    def weigh(self, course: Course, piece: Piece, told: Told) -> Tensor:
        """A factor for the loss of each target, of the shape of `told.losses`."""
        raise AssertionError("asked only where a strategy fills it")

    def penalty(self, course: Course) -> Tensor | None:
        """Added to the gradient once a step; no row decides it.

        The loop goes backward from what is given. Who adds its slope to the gradients itself, as `pull` does, gives
        None.
        """
        return None

    def after_backward(self, course: Course) -> None:
        """The gradient of the whole step is there, unscaled and unclipped; nothing has moved."""

    def rate(self, step: int, total: int) -> float:
        """Share of the peak rate at `step`, which counts from 1 to `total`."""
        raise AssertionError("asked only where a strategy fills it")

    def after_step(self, course: Course) -> None:
        """Weights have moved; the memory may change."""

    def kept(self, course: Course) -> Mapping[str, Tensor]:
        """Trained tensors as they are to be scored and kept, by name; the others stay as they are."""
        raise AssertionError("asked only where a strategy fills it")

    def finish(self, course: Course) -> None:
        """Once, after the last step: bring what trained into the form that is kept."""

    def settings(self) -> dict[str, Any]:
        """The settings as plain values."""
        return dict(plain(self))


STRATEGIES: Catalogue[Strategy] = Catalogue("luthier.strategies", "strategy")


def neutral(strategy: Strategy) -> bool:
    """Whether its settings are those with which the run is the one without it: then it needs to see nothing."""
    off = strategy.neutral
    return off is not None and all(getattr(strategy, name) == value for name, value in off.items())


def fills(strategy: Strategy, moment: str) -> bool:
    """Whether a strategy has its own answer at a moment."""
    return getattr(type(strategy), moment) is not getattr(Strategy, moment)


@dataclass(frozen=True)
class _Named:
    """What a spec says of one strategy."""

    cls: type[Strategy]
    fields: tuple[str, ...]


def split_settings(
    words: str | None, settings: Mapping[str, Any], method_fields: Collection[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Settings of each strategy, and those that are the method's.

    "freelb.k" names its owner; a bare "k" goes to the one strategy that has it, if the method has none of that name.

    Args:
        method_fields: names of the method's own settings.

    Raises:
        UnknownName: no such strategy, or it has no such setting.
        ConfigError: a bare setting that several have.
    """
    named = _named(words)
    own: dict[str, dict[str, Any]] = {name: {} for name in named}
    rest: dict[str, Any] = {}
    for full, value in settings.items():
        owner, dot, field = full.rpartition(".")
        if dot and owner in named:
            if field not in named[owner].fields:
                known = named[owner].fields
                raise UnknownName(
                    f"strategy {owner} has no setting {field!r}.{near(field, known)} Its settings are "
                    f"{', '.join(known) or 'none'}."
                )
            own[owner][field] = value
            continue
        homes = [name for name, one in named.items() if full in one.fields]
        if len(homes) + (full in method_fields) > 1:
            raise ConfigError(
                f"{full!r} is a setting of {' and of '.join([*homes, *(['the method'] * (full in method_fields))])}: "
                f"write {homes[0]}.{full} for the strategy's."
            )
        if homes:
            own[homes[0]][full] = value
        else:
            rest[full] = value
    return own, rest


def strategies(words: str | None, settings: Mapping[str, Mapping[str, Any]], method: Method) -> tuple[Strategy, ...]:
    """Make the strategies of a spelt name such as "freelb+llrd", in that order.

    Raises:
        UnknownName: no such strategy.
        ConfigError: a value that cannot work.
        CompositionError: two that cannot stand together, with the reason.
    """
    made = tuple(build(one.cls, dict(settings.get(name, {})), name) for name, one in _named(words).items())
    for moment in ONE_OWNER:
        owners = [s.name for s in made if fills(s, moment)]
        if len(owners) > 1:
            raise CompositionError(
                f"{' and '.join(owners)} cannot stand together: each would own the moment {moment!r} of a step. "
                "Choose one of them."
            )
    makers, passers = ([s.name for s in made if fills(s, moment)] for moment in ("gradient", "passes"))
    if makers and passers:
        raise CompositionError(
            f"{makers[0]} and {passers[0]} cannot stand together: the first makes the whole gradient, the second the "
            "passes that it would be made of. Choose one of them."
        )
    for i, one in enumerate(made):
        others: list[Strategy | Method] = [*made[:i], *made[i + 1 :], *method.parts()]
        for other in others:
            reason = one.conflicts(other)
            if reason:
                raise CompositionError(f"{one.name} and {other.name} cannot stand together: {reason}")
    return made


def spelt(words: str | None) -> list[str]:
    """The names in a spelt name such as "freelb+llrd"."""
    return [word.strip() for word in (words or "").split("+") if word.strip()]


def _named(words: str | None) -> dict[str, _Named]:
    names = spelt(words)
    if len(set(names)) < len(names):
        raise CompositionError(f"strategy {words!r}: a strategy stands in it twice. Name each once.")
    classes = {name: STRATEGIES.get(name) for name in names}
    return {name: _Named(cls, tuple(f.name for f in fields_of(cls))) for name, cls in classes.items()}
