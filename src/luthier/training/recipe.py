"""What a recipe is: runs one after another, each made from what came out of those before.

A recipe stands on the shelf of strategies and is named as one, `strategy = "ulmfit"`. It is a frozen dataclass of
settings with one moment: `phases` is a generator that yields a phase, which is a whole run in a folder of its own, and
is sent what came out of it. It must be a pure function of the spec, the rows and those replies: asked again after a
stop it yields the same phases, so what is finished is found by its name and not run again.

What one phase hands to the next goes through files that stand beside the phases: a merged model, written rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from luthier.core import Card, CompositionError, ConfigError, build, plain
from luthier.data.columns import Columns
from luthier.data.rows import Table
from luthier.data.sets import named_sources
from luthier.runs.spec import DataSpec, RunSpec
from luthier.training.sampling import Sampling
from luthier.training.strategy import STRATEGIES, spelt, split_settings

__all__ = [
    "RECIPE",
    "Asked",
    "Desk",
    "Done",
    "Guesses",
    "Phase",
    "Plan",
    "Recipe",
    "Writer",
    "plan_of",
    "recipe_names",
    "refuse_recipe",
]


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One run of a recipe.

    Attributes:
        name: of its folder, a word such as "texts"; each phase of a recipe has one of its own.
        spec: what it runs; `out` is the driver's.
        made_of: names of earlier phases whose results it starts from, for the record.
    """

    name: str
    spec: RunSpec
    made_of: tuple[str, ...] = ()


class Done(Protocol):
    """What came out of a phase."""

    @property
    def path(self) -> Path:
        """The folder of the finished run."""
        ...

    @property
    def scores(self) -> Mapping[str, float]:
        """Its scores on its own held-out rows; empty where it held none out."""
        ...

    def merged(self) -> str:
        """The folder of its model with the tuning in the weights; written once."""
        ...

    def answers(self, table: Table) -> list[dict[str, Any]]:
        """Its answers to rows, as `Predictor.rows` gives them."""
        ...

    def written(self, table: Table, *, max_new_tokens: int, beams: int) -> list[tuple[str, bool]]:
        """The texts that it writes for rows, and whether each came to an end of its own; see `Predictor.written`."""
        ...

    @property
    def digest(self) -> str:
        """Of its tuning."""
        ...


class Asked(Protocol):
    """A model that is asked: a finished run, or a model as it is; see `luthier.workflow.speaker.Speaker`."""

    @property
    def digest(self) -> str:
        """Of the run's tuning, or of the model."""
        ...

    def says(
        self, asked: Sequence[Sequence[dict[str, Any]]], *, max_new_tokens: int, sampling: Sampling | None = None
    ) -> list[tuple[str, bool]]:
        """The text that is written after each conversation, and whether it came to an end of its own.

        Args:
            sampling: draw it, by a seed for each; left out, the likeliest token each time.
        """
        ...

    def loss_of(self, answered: Sequence[tuple[Sequence[dict[str, Any]], str]]) -> float:
        """The mean loss of the tokens of given answers, in nats."""
        ...

    def before_tuning(self) -> AbstractContextManager[Any]:
        """Within, a run answers as its base."""
        ...

    def chances(self, asked: Sequence[Sequence[dict[str, Any]]], words: Sequence[str]) -> NDArray[np.float64]:
        """How likely each of a few words is as the answer, among them: (conversations, words)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Guesses:
    """What a model that has learnt nothing yet would put into the gap of each row.

    Attributes:
        chances: log-probability of each id, (rows, vocabulary).
        words: the ids that are a whole word, and the word.
        states: what the output matrix is multiplied with in each gap, (rows, d).
        vectors: the output matrix, (vocabulary, d).
    """

    chances: NDArray[np.float32]
    words: Mapping[int, str]
    states: NDArray[np.float32]
    vectors: NDArray[np.float32]


class Writer(Protocol):
    """A decoder, as it is, that goes on with texts; see `luthier.workflow.text_writer`."""

    @property
    def digest(self) -> str:
        """Of the model."""
        ...

    def write(
        self, text: str, *, seed: int, max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0,
        stop: Sequence[str] = (),
    ) -> str:  # fmt: skip
        """What it writes behind a text, up to the first of `stop`; with a temperature, drawn by the seed."""
        ...

    def log_chance(self, text: str, answer: str) -> tuple[float, int]:
        """Sum of the log-probabilities of an answer's tokens behind a text, and how many there are."""
        ...


class Desk(Protocol):
    """What a recipe may ask before a phase and between two."""

    @property
    def kind(self) -> Literal["encoder", "decoder", "both"]:
        """What the model of the spec is: it reads both ways, writes, or has a part for each."""
        ...

    def check(self, spec: RunSpec) -> None:
        """Refuse a phase that cannot work, before the first one begins. Raises: any LuthierError."""
        ...

    def rows(self) -> tuple[Table, Table | None, Columns]:
        """The rows of the whole recipe as its last phase reads them: to learn from, held out, and their columns."""
        ...

    def further(self, name: str) -> Table:
        """The rows of a further set (`--also NAME=FILE`); labels need not be there, and are not read."""
        ...

    def finished(self, path: str) -> Done:
        """A run that was finished before the recipe. Raises: ConfigError, WrongBase: it cannot be used."""
        ...

    def guesses(self, spec: RunSpec, table: Table) -> Guesses:
        """What the model of a spec with a template, as it is, would put into the gap of each row; words need not be."""
        ...

    def fillings(self, model: str, texts: Sequence[str], *, beams: int, most: int) -> list[tuple[str, str]]:
        """What a T5 would put into the gaps {0} and {1} of all texts alike, likeliest first."""
        ...

    def asked(self, name: str) -> Asked:
        """A model that answers questions: a finished run, or a model as it is. Raises: any LuthierError."""
        ...

    def kept(
        self, name: str, key: Mapping[str, Any], table: Table, make: Callable[[Table], Iterable[Mapping[str, Any]]]
    ) -> Table:
        """Rows that are dear to make, made once, some at a time, and kept; see `luthier.workflow.kept_rows`."""
        ...

    def writer(self, model: str) -> Writer:
        """A decoder that goes on with texts; what it gives is kept, so that a resumed recipe asks nothing twice."""
        ...

    def write(self, name: str, rows: Iterable[Mapping[str, Any]]) -> str:
        """Write rows to a file beside the phases, once, and give its path."""
        ...

    def say(self, line: str) -> None:
        """A sentence for the log of the whole, such as a score that no phase has; nothing before the folder is made."""
        ...


RECIPE = "recipe.json"
"""The file that makes a folder that of a recipe."""

Phases = Generator[Phase, Done, None]


class Recipe(ABC):
    """A chain of runs. The file holds the paper and the phases, and nothing else.

    Class facts, read from the syntax tree for the listing:
        uses: strategies that it names itself; settings may be given for them too, as `llrd.decay`.
        sets: names of further rows that it needs (`--also NAME=FILE`).

    Class facts for the contract tests alone:
        tiny: settings with which it runs in seconds.

    Class fact for its page alone: example, see `luthier.training.strategy.Strategy`.
    """

    name: ClassVar[str]
    facts: ClassVar[dict[str, Any]]
    card: ClassVar[Card]
    uses: ClassVar[tuple[str, ...]] = ()
    sets: ClassVar[tuple[str, ...]] = ()
    tiny: ClassVar[dict[str, Any]] = {}
    example: ClassVar[str] = ""

    @abstractmethod
    def phases(self, plan: Plan, desk: Desk) -> Phases:
        """Yields each phase, and is sent what came out of it."""

    def settings(self) -> dict[str, Any]:
        """The settings as plain values."""
        return dict(plain(self))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A spec without the recipe's name and settings, from which phases are made.

    Attributes:
        spec: what the last phase would be without the recipe: its strategy holds the others that were named.
        of_strategies, of_method: settings by owner.
    """

    recipe: Recipe
    spec: RunSpec
    of_strategies: Mapping[str, Mapping[str, Any]]
    of_method: Mapping[str, Any]

    def phase(self, words: Sequence[str], **changes: Any) -> RunSpec:
        """The spec of a phase with these strategies, each with the settings that were given for it.

        Args:
            changes: fields of the spec; another `method` gets none of the settings of the one that was named.
        """
        names = list(dict.fromkeys(words))
        own = {f"{name}.{k}": v for name in names for k, v in self.of_strategies.get(name, {}).items()}
        settings = {} if changes.get("method", self.spec.method) != self.spec.method else dict(self.of_method)
        return replace(self.spec, **{"strategy": "+".join(names) or None, "settings": settings | own, **changes})

    def data(self, source: str, test: str | None, **changes: Any) -> DataSpec:
        """Data of a phase whose rows, and held-out rows, were written beside the phases.

        How the rows of the spec are stored and parted is no word on these.
        """
        given = {"source": source, "test": test, "test_share": 0.0, "fold": None, "delimiter": None, "encoding": None}
        return replace(self.spec.data, **{**given, **changes})

    def task(self, words: Sequence[str] = (), **changes: Any) -> RunSpec:
        """The last phase: the task itself, with these strategies and those that were named beside the recipe."""
        return self.phase([*words, *spelt(self.spec.strategy)], **changes)


def recipe_names(strategy: str | None) -> list[str]:
    """The recipes among the names of a strategy; nothing is imported to know."""
    shelf = STRATEGIES.places()
    return [word for word in spelt(strategy) if word in shelf and STRATEGIES.card(word).family == "recipes"]


def refuse_recipe(spec: RunSpec, what: str) -> None:
    """Refuse a recipe where one run is needed.

    Raises:
        CompositionError: names it.
    """
    for name in recipe_names(spec.strategy):
        raise CompositionError(
            f"{name} is a recipe, a chain of runs, and {what} is one run. Run it with luthier train, or name the "
            "strategies of its last phase."
        )


def plan_of(spec: RunSpec, method_fields: Sequence[str]) -> Plan:
    """Tell the recipe of a spec from what it is made for.

    Args:
        method_fields: names of the method's own settings.

    Raises:
        CompositionError: two recipes.
        ConfigError, UnknownName: settings that nothing has, or values that cannot work.
    """
    names = recipe_names(spec.strategy)
    if len(names) != 1:
        raise CompositionError(f"{' and '.join(names)} cannot stand together: each is a chain of runs. Choose one.")
    others = [word for word in spelt(spec.strategy) if word != names[0]]
    if len({*others, names[0]}) < len(spelt(spec.strategy)):
        raise CompositionError(f"strategy {spec.strategy!r}: a strategy stands in it twice. Name each once.")
    cls: Any = STRATEGIES.get(names[0])
    if not issubclass(cls, Recipe):
        raise ConfigError(f"{names[0]} stands in a folder of recipes and is none. Let it derive from Recipe.")
    words = dict.fromkeys([names[0], *others, *cls.uses])
    own, of_method = split_settings("+".join(words), spec.settings, method_fields)
    recipe = build(cls, own.pop(names[0]), names[0])
    for name in cls.sets:
        if name not in named_sources(spec.also):
            raise ConfigError(f"{recipe.name} needs further rows: --also {name}=FILE.")
    return Plan(
        recipe=recipe,
        spec=replace(spec, strategy="+".join(others) or None, settings={}, out=None),
        of_strategies=own,
        of_method=of_method,
    )
