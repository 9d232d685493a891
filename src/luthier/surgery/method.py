"""What a tuning method is: settings, a list of edits, and a count that needs no model in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, ClassVar, Self

from torch import Tensor

from luthier.anatomy import Anatomy, BySite, Site, is_projection
from luthier.core import Catalogue, plain
from luthier.surgery.after_training import AfterTraining
from luthier.surgery.attachment import Attachment
from luthier.surgery.base import Base
from luthier.surgery.edits import Edit, attach_each
from luthier.surgery.peft_forms import PeftForm
from luthier.surgery.phase import Phase
from luthier.surgery.source import Source
from luthier.surgery.view import TunedView, TuningView

__all__ = ["METHODS", "Batches", "Group", "Method", "Mixing", "Objective", "PerSite"]

METHODS: Catalogue[Method] = Catalogue("luthier.methods", "method")

Objective = Callable[[], "Any"]
"""Runs one forward pass of the current micro-batch: returns an object with `.loss` (sum over targets), `.logits`."""


@dataclass(frozen=True)
class Group:
    """Trained tensors that learn at their own pace.

    Attributes:
        names: of trained tensors, as `Tuned.trained()` calls them.
        lr_factor: multiplies the run's learning rate.
        weight_decay: None for the run's own.
        decay_to: the value decay pulls towards; IA3's vectors rest at 1.
    """

    names: tuple[str, ...]
    lr_factor: float = 1.0
    weight_decay: float | None = None
    decay_to: float = 0.0


Batches = Sequence[Callable[[], Tensor]]
"""The optimiser steps of the first epoch: each gives its mean loss. See `look.gradients` for their gradients."""


class Method(AfterTraining, ABC):
    """A frozen dataclass of settings that says which edits to make. The file holds the paper and nothing else.

    Class facts, read from the syntax tree for the listing and checked by the contract tests:
        mergeable: every edit has a closed form in the weights.
        starts_at_base: attached and untrained, the model computes what it computed before (head excluded).
        default_lr: peak learning rate where the user names none.
        default_head_lr: that of a new task head then; None for the same.
        looks_at_data: `prepare` needs batches before the first step.
        looks_again: the setting that says after how many steps `prepare` is called again, on the weights as they are
            then; 0, never. Twice on the same weights it must do what once does: a stopped step is begun again.
        holds_out: rows are held out of training, by which `conclude` chooses something.
        classes_only: its answers are made of the probabilities of one label of several, so it is for that task alone.
        computes_tensors: replaces tensors of the model by computed ones, so what it finds there is not what acts.
        draws: in training it computes otherwise than in answers, even without dropout: it draws which of its numbers
            take part, or sees less of the text.
        stored_width: bytes of a number that a saved tuning holds; 1 where they are bits, packed.
        peft: how a tuning of it stands in the files of the peft library, where both compute the same.
        modifies: it makes no edit of its own and changes the numbers of the methods beside it.
        idle: its hooks that have nothing to do with these settings.
        looks_ahead: what it adds to a token depends on later tokens too; its page says what that means in generation.

        store: how the base is held where a run of it names nothing else, such as nf4: it is made for a base in codes.

        reads_rows: facts of rows that it reads, such as "task": `Context.row`. How many values each has, a setting of
            its plural says (`tasks`); left out, the data do, and 1 where they say nothing.
        counts_labels: the setting that holds how many labels each task has, in a run where each has labels of its own.
        sources: the methods whose saved tunings it is made of; `least_sources`, how many at least.
        soft_words: it trains the words that a run's template marks {soft}: see `for_template`.

    Class facts for the contract tests alone, so that a new file joins no list:
        tiny: settings that fit a model of three layers and width 48; `lr` for the rate at which it learns there.
        start_is_drawn: whether another seed is another start, where the start is no constant.
        needs: methods that stand beside it where it is named alone, because it changes their numbers.
    """

    name: ClassVar[str]
    facts: ClassVar[dict[str, Any]]
    mergeable: ClassVar[bool] = False
    starts_at_base: ClassVar[bool] = True
    default_lr: ClassVar[float] = 1e-3
    default_head_lr: ClassVar[float | None] = None
    looks_at_data: ClassVar[bool] = False
    looks_again: ClassVar[str] = ""
    holds_out: ClassVar[bool] = False
    classes_only: ClassVar[bool] = False
    computes_tensors: ClassVar[bool] = False
    through_trunk: ClassVar[bool] = True  # the loss has a gradient on the embedded text
    trains_base: ClassVar[bool] = False  # weights of the blocks themselves move: their dropout stays on
    draws: ClassVar[bool] = False
    modifies: ClassVar[bool] = False
    looks_ahead: ClassVar[bool] = False
    idle: ClassVar[tuple[str, ...]] = ()
    stored_width: ClassVar[int] = 4
    peft: ClassVar[PeftForm | None] = None
    store: ClassVar[str | None] = None
    reads_rows: ClassVar[tuple[str, ...]] = ()
    counts_labels: ClassVar[str] = ""
    sources: ClassVar[tuple[str, ...]] = ()
    least_sources: ClassVar[int] = 1
    soft_words: ClassVar[bool] = False
    tiny: ClassVar[Mapping[str, Any]] = {}
    start_is_drawn: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        """What to change. Called once per attach, under a keyed generator."""

    @abstractmethod
    def n_params(self, anatomy: Anatomy) -> int:
        """Trained numbers, head excluded; a formula on the anatomy, no model needed."""

    def n_stored(self, anatomy: Anatomy) -> int:
        """Numbers that a saved tuning holds, head excluded."""
        return self.n_params(anatomy)

    def n_removed(self, others: Sequence[Method], anatomy: Anatomy) -> int:
        """Numbers of the methods beside it that a modifier takes out of training."""
        return 0

    def leaves_out(self, edit: Edit, anatomy: Anatomy) -> bool:
        """Whether a modifier takes this edit of a method beside it away, so that nothing is made there."""
        return False

    # Most methods leave these alone.
    def phases(self, tuned: TunedView) -> Sequence[Phase]:
        """Parts of the run in which only some tensors learn, in order; none for a run in one piece."""
        return ()

    def enter(self, tuned: TunedView, phase: int) -> None:
        """Phase number `phase`, from 0, begins: choose a mask, rewind. Once; a resumed run does not enter again."""

    def begin(self, tuned: TunedView) -> None:
        """A new tuning of it is on the model: choose what follows from the weights alone, such as a mask. Draws are
        keyed. A saved tuning that is loaded begins too, and then takes up what was saved.
        """

    def fitted(self, sources: Sequence[Source]) -> Self:
        """This method with the settings that its sources decide, such as how many there are.

        Raises:
            ConfigError: they do not go together, or a setting says otherwise.
        """
        return self

    def completed(self, tokenizer: Any, *, pair: bool) -> Self:
        """This method with the settings that a run's tokenizer decides, such as ids of special tokens.

        Args:
            pair: rows are two texts.
        """
        return self

    def for_template(self, words: Sequence[int], n_soft: int, first: int) -> Self:
        """This method in a run that asks for labels by a gap in a template.

        Args:
            words: for each label the id of the word that fills the gap.
            n_soft: how many words of the template are {soft}; the first of them has the id `first`, then one by one.
        """
        return self

    def adopt(self, tuned: TunedView, sources: Sequence[Source]) -> None:
        """Take over what the sources hold: once, in a new tuning. What is taken is saved with it."""

    def prepare(self, tuned: TunedView, batches: Batches) -> None:
        """A start that looks at data: runs once before training. Must leave parameters, buffers and grads as found."""

    def loss(self, tuned: TunedView, forward: Objective) -> Any:
        """The task loss of one micro-batch; a method that needs two passes runs `forward` twice."""
        return forward()

    def extra_loss(self, tuned: TunedView) -> Tensor | None:
        """A penalty added once per optimiser step, independent of the batch."""
        return None

    def before_step(self, tuned: TunedView, step: int, total: int) -> None:
        """Before the first forward pass of a step: choose what takes part in it. Draws are keyed by the step."""

    def after_backward(self, tuned: TunedView, step: int, total: int) -> None:
        """Gradients of the whole step are present, unscaled and unclipped; the optimiser has not moved."""

    def on_step(self, tuned: TunedView, step: int, total: int) -> None:
        """Weights have moved, gradients are still present. `step` counts from 1 to `total`."""

    def finish(self, tuned: TunedView) -> None:
        """After training: bring the attachments into the form that is stored and served."""

    def groups(self, tuned: TunedView) -> list[Group]:
        """Learning rates or decay that differ inside the method; tensors not named follow the run."""
        return []

    def conflicts(self, other: Method) -> str | None:
        """Why this method cannot stand beside `other` on one model, or None."""
        return None

    @classmethod
    def is_a(cls, *names: str) -> bool:
        """Whether this is one of the methods called so, or a preset of one."""
        return any(vars(kind).get("name") in names for kind in cls.__mro__)

    def settings(self) -> dict[str, Any]:
        """The settings as plain values."""
        return dict(plain(self))

    def values_of(self, fact: str) -> int:
        """How many values a fact of rows has, for which it keeps numbers."""
        return getattr(self, f"{fact}s", None) or 1

    def parts(self) -> tuple[Method, ...]:
        """The methods this one is made of; itself for a single one."""
        return (self,)


class Mixing(Method):
    """Where a template asks for labels, its answer is a mixture of several passes. In a batch only its like may be."""

    @abstractmethod
    def passes(self, tuning: TuningView) -> int:
        """How many passes its answer is made of."""

    @abstractmethod
    def turn(self, tuning: TuningView, number: int) -> None:
        """Let the tuning compute pass `number`, from 0."""

    @abstractmethod
    def mixed(self, tuning: TuningView, scores: Tensor) -> Tensor:
        """The answer: scores of the labels, (passes, rows, labels) -> (rows, labels), in training and in answers."""


class PerSite(Method):
    """One attachment per site: give `params_at` and `build`; edits and count follow."""

    sites: Annotated[tuple[str, ...], "where to attach"] = ()

    @abstractmethod
    def params_at(self, site: Site) -> int:
        """Trained numbers of one attachment."""

    @abstractmethod
    def build(self, site: Site, base: Base) -> Attachment:
        """Make the attachment; called in fp32 under a generator keyed by the site."""

    def fits(self, site: Site) -> bool:
        """What `*` in `sites` stands for: the projections of the layers."""
        return is_projection(site)

    def places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        """The sites, in the order of the model."""
        return anatomy.sites(*self.sites, asked_by=f"{self._label}.sites", fits=self.fits)

    def on(self, anatomy: Anatomy) -> Self:
        """The method with the values that its by-site settings have on this model."""
        known: Any = self
        varying = {f.name: v for f in fields(known) if isinstance(v := getattr(self, f.name), BySite)}
        if not varying:
            return self
        places, label = self.places(anatomy), self._label
        resolved = {n: v.resolved(places, anatomy.depths, f"{label}.{n}", self.fits) for n, v in varying.items()}
        made: Self = replace(known, **resolved)
        return made

    @property
    def _label(self) -> str:
        return str(getattr(self, "name", type(self).__name__))

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        here = self.on(anatomy)
        yield from attach_each(self.places(anatomy), here.build)

    def n_params(self, anatomy: Anatomy) -> int:
        here = self.on(anatomy)
        return sum(here.params_at(site) for site in self.places(anatomy))
