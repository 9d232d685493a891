"""What each method would hold on a model, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from luthier.core import ConfigError, LuthierError, UnknownName, human_bytes, near
from luthier.data.load_data import load_data
from luthier.data.tasks import Task
from luthier.forecast import (
    Device,
    Growth,
    Held,
    Interval,
    Pair,
    Rates,
    Span,
    Steps,
    TimePair,
    committed,
    committed_times,
    growth,
    held,
    interval,
    span,
)  # fmt: skip
from luthier.kernels.packed import can_pack
from luthier.runs import resident_bytes
from luthier.runs.spec import RunSpec
from luthier.surgery import METHODS, Method, compose
from luthier.training.precision import Precision, choose_device, choose_precision
from luthier.training.recipe import refuse_recipe
from luthier.training.strategy import STRATEGIES, Strategy, spelt, split_settings, strategies
from luthier.workflow.durations import floor_of, loading_of, probed, rates_here, way_of, work_of_step
from luthier.workflow.held import held_in, refuse_floats, store_of
from luthier.workflow.lengths import assumed_steps
from luthier.workflow.outline import Outline

USUAL = 128  # tokens of a row, where nothing says how long rows are
LATER = 150_000_000  # bytes of a process after its first step: scores, late libraries (docs/howto/plan.md)

TRIED = 4  # methods that do not fit, for which more than a smaller micro-batch is tried: each way takes a second
# Moments that may hold tensors.
_HOLDING = ("optimiser", "numbers", "batches", "gradient", "passes", "loss", "kept")
INSTEAD = ("lora", "qlora")  # methods that are tried where none of those asked about fits

__all__ = [
    "USUAL", "Asked", "Plan", "PlanRow", "Remedy", "activations_of", "packed_here", "plan", "remedies_here",
    "task_of_rows", "weights_in",
]  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """One method that is asked about: how it is called in the answer, its name, and settings of its own."""

    name: str
    method: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Remedy:
    """What would fit where a run does not: options of `luthier train`, and the forecast with them."""

    words: str
    peak: Interval

    def __str__(self) -> str:
        return f"{self.words} ({human_bytes(self.peak.low)} to {human_bytes(self.peak.high)})"


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One method's forecast, or why it cannot be put on this model.

    Attributes:
        weights_in: the type that the base is held in, or its codes.
        activations: of the widest micro-batch; None where they were not forecast.
        unknown: why activations were not forecast, where they were asked for.
        peak: the highest memory, the program's own included on a processor.
        fits: "?" where activations were not forecast and the rest fits.
        would: of smaller micro-batches, the largest that fits where this does not, or may not.
        remedies: that, and what else would fit, each by a forecast of its own.
        step, training: seconds of an optimiser step, and of all of them where rows say how many there are.
        at_least: seconds of a step below which a device that was never measured cannot come.
        probed: the seconds are of real steps.
        unprobed: why no real steps were made, where they were asked for.
    """

    name: str
    method: str
    held: Held | None = None
    weights_in: str = ""
    activations: int | None = None
    unknown: str = ""
    peak: Interval | None = None
    fits: Literal["yes", "maybe", "no", "?"] = "?"
    would: str = ""
    remedies: tuple[Remedy, ...] = ()
    refused: str = ""
    step: Span | None = None
    training: Span | None = None
    at_least: float | None = None
    probed: bool = False
    unprobed: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The forecasts of all methods that were asked about.

    Attributes:
        numbers: of the model, its head included.
        task: that the counts are for.
        rows_at_once, tokens: of the widest micro-batch.
        steps: as rows make them; of rows of one length where there are none.
        loading: seconds before the first step; None where the device is another one.
        strategy, passes, forwards: of a step: passes forward and back, and passes forward beside them.
        aside: what of the strategy is in no forecast.
    """

    model: str
    kind: str
    numbers: int
    task: Task
    precision: str
    optimiser: str
    device: Device
    rows_at_once: int
    tokens: int
    rows: tuple[PlanRow, ...]
    steps: Steps
    loading: Span | None = None
    strategy: str | None = None
    passes: float = 1.0
    forwards: float = 0.0
    aside: str = ""


def plan(
    outline: Outline, spec: RunSpec, asked: Iterable[Asked], device: Device, task: Task, *, tokens: int = USUAL,
    pairs: Sequence[Pair] | None = None, times: Sequence[TimePair] | None = None, grow: bool = True,
    steps: Steps | None = None, real_steps: bool = False, seconds: float = 2.0,
) -> Plan:  # fmt: skip
    """Count what each method holds on the model that `outline` tells of; forecast its highest memory and its time.

    Args:
        spec: of the runs: precision, optimiser, batch; its settings hold for every method that has them.
        tokens: of the longest row, where `steps` are left out.
        pairs, times: finished runs behind the intervals; those of our own grid where left out.
        grow: forecast activations and time, which takes seconds for each method.
        steps: as rows make them.
        real_steps: make three real steps of each method for its time, where they fit.
        seconds: of the probe of this device.

    Raises:
        ModelError, AnatomyError: the configuration makes no model that can be read.
        UnknownName: no method that is asked about has a setting that `spec` gives, or one lacks what is given it alone.
        ConfigError: real steps are wanted on another device, or a method's own setting has a value that it cannot have.
    """
    wanted = list(asked)
    refuse_recipe(spec, "a row of a plan")
    fields = {name for one in wanted if _known(one) for name in compose.setting_names(one.method)}
    learning, settings = split_settings(spec.strategy, spec.settings, fields)
    spec = replace(spec, settings=settings)
    _refuse_unknown(spec, wanted)
    for entrant in wanted:
        if entrant.settings and _known(entrant):  # what is wrong with a setting is no matter of this model
            compose.method(entrant.method, {**_own(entrant, settings), **entrant.settings})
    if real_steps and not device.here:
        raise ConfigError(f"--probe makes steps on this machine, and --device {device.name} is another. Leave one out.")
    precision = _precision(spec, device)
    whole = outline.skeleton(task, torch.float32).anatomy
    known = tuple(pairs) if pairs is not None else committed()
    timed = tuple(times) if times is not None else committed_times()
    steps = steps if steps is not None else assumed_steps(spec, tokens)
    grows = real_steps or grow
    rates = rates_here(spec, outline, precision, steps, seconds) if grows and device.here else None
    one = _Row(outline, spec, device, task, precision, known, grows, steps, rates, timed, real_steps, learning)
    rows = one.with_remedies([(word, one.of(word)) for word in wanted])
    if _holds_more(spec.strategy):
        rows = tuple(replace(row, fits="maybe") if row.fits == "yes" else row for row in rows)
    return Plan(
        model=outline.name, kind=whole.model_type, numbers=whole.n_params, task=task, precision=precision.name,
        optimiser=spec.optim.name, device=device, rows_at_once=steps.widest[0], tokens=steps.widest[1], rows=rows,
        steps=steps, loading=one.loading(whole.n_params), **_told_of(spec.strategy),
    )  # fmt: skip


def _holds_more(strategy: str | None) -> bool:
    """Whether a strategy may hold what no plain step does: then nothing is said to fit for certain."""
    for one in map(STRATEGIES.get, spelt(strategy)):
        own = any(getattr(one, moment) is not getattr(Strategy, moment) for moment in _HOLDING)
        if own or one.extra_passes or one.extra_forwards or one.roles or one.learns:
            return True
    return False


def _told_of(strategy: str | None) -> dict[str, Any]:
    """What the strategies of a run say that a step costs, at their default settings."""
    classes = [STRATEGIES.get(name) for name in spelt(strategy)]
    aside = ["what it holds beside a plain step"] if classes else []
    if any(one.writes for one in classes):
        aside.append("the texts that it writes")
    return {
        "strategy": strategy, "passes": 1.0 + sum(one.extra_passes for one in classes),
        "forwards": sum(one.extra_forwards for one in classes), "aside": " and ".join(aside),
    }  # fmt: skip


def _precision(spec: RunSpec, device: Device) -> Precision:
    if device.here:
        return choose_precision(spec.precision, choose_device(spec.device if spec.device != "auto" else device.kind))
    if spec.precision != "auto":
        return Precision(spec.precision, "as asked")
    return Precision("bf16" if device.bf16 else "fp32", "as such a device multiplies fast")


@dataclass(frozen=True)
class _Row:
    """Makes the rows of a plan."""

    outline: Outline
    spec: RunSpec
    device: Device
    task: Task
    precision: Precision
    pairs: tuple[Pair, ...]
    grows: bool
    steps: Steps
    rates: Rates | None
    times: tuple[TimePair, ...]
    real_steps: bool
    learning: Mapping[str, Mapping[str, Any]]

    @property
    def rows(self) -> int:
        """Of the widest micro-batch."""
        return self.steps.widest[0]

    @property
    def tokens(self) -> int:
        """Of a row of it."""
        return self.steps.widest[1]

    def loading(self, numbers: int) -> Span | None:
        """Seconds before the first step."""
        if self.rates is None:
            return None
        return span(loading_of(numbers, self.rates), "loading", self.device.kind, "", self.times)

    def of(self, one: Asked) -> PlanRow:
        """One method's."""
        try:
            method, spec, dtype, found = self._counted(one, self.spec)
        except LuthierError as error:
            return PlanRow(name=one.name, method=one.method, refused=str(error))
        row = PlanRow(
            name=one.name, method=one.method, held=found, weights_in=spec.codes or str(dtype).removeprefix("torch."),
            fits="no" if found.standing > self.device.memory else "?",
        )  # fmt: skip
        if not self.grows:
            return row
        grown = self._grown(method, spec, dtype, self.rows, self.tokens)
        if isinstance(grown, str):
            return replace(row, unknown=grown)
        family = _family(one)
        peak = self._peak(found, grown.at(self.rows), family)
        row = replace(row, activations=grown.at(self.rows), peak=peak, fits=self._fits(peak))
        if row.fits != "yes":
            narrower = self._narrowed(one, method, spec, dtype, found, grown)
            if narrower is not None:
                tokens = narrower[0] * self.tokens
                told = Remedy(f"--batch-tokens {tokens}", narrower[1])
                row = replace(row, would=f"batch.tokens={tokens}", remedies=(told,))
        return self._timed(row, method, spec, dtype, found, grown, family)

    def with_remedies(self, made: Sequence[tuple[Asked, PlanRow]]) -> tuple[PlanRow, ...]:
        """The rows; to those that do not fit, what else would."""
        rows, tried = [row for _, row in made], 0
        fitting = sorted((row for row in rows if row.fits == "yes" and row.held), key=lambda row: -_trained(row))
        instead = [Remedy(f"--method {row.name}", row.peak) for row in fitting[:2] if row.peak is not None]
        found: list[PlanRow] = []
        for one, row in made:
            if row.peak is None or row.fits == "yes":
                found.append(row)
                continue
            tried += 1
            more = self._other_ways(one) if tried <= TRIED else []
            if not instead and tried == 1:
                instead = self._other_methods({row.method for row in rows})
            found.append(replace(row, remedies=(*row.remedies, *more, *instead)))
        return tuple(found)

    def _other_ways(self, one: Asked) -> list[Remedy]:
        """Of the same method: activations computed twice, and a base in codes."""
        ways: list[tuple[str, RunSpec]] = []
        if self.spec.gradient_checkpointing is not True:
            ways.append(("--gradient-checkpointing true", replace(self.spec, gradient_checkpointing=True)))
        if self.spec.store is None:
            ways += [(f"--store {store}", replace(self.spec, store=store)) for store in ("int8", "nf4")]
        return [told for words, spec in ways if (told := self._remedy(words, one, spec)) is not None]

    def _other_methods(self, asked: set[str]) -> list[Remedy]:
        made = (
            self._remedy(f"--method {name}", Asked(name, name, {}), replace(self.spec, settings={}))
            for name in INSTEAD if name not in asked
        )  # fmt: skip
        return [told for told in made if told is not None]

    def _remedy(self, words: str, one: Asked, spec: RunSpec) -> Remedy | None:
        """What would fit with this spec, with fewer rows at once if need be; None where nothing would."""
        try:
            method, spec, dtype, found = self._counted(one, spec)
        except LuthierError:
            return None
        if found.standing > self._room():
            return None
        grown = self._grown(method, spec, dtype, self.rows, self.tokens)
        fits = None if isinstance(grown, str) else self._narrowed(one, method, spec, dtype, found, grown)
        if fits is None:
            return None
        rows, peak = fits
        return Remedy(words if rows == self.rows else f"{words} --batch-tokens {rows * self.tokens}", peak)

    def _counted(self, one: Asked, spec: RunSpec) -> tuple[Method, RunSpec, torch.dtype, Held]:
        """Raises: LuthierError, where the method cannot be put on the model."""
        method = compose.method(one.method, {**_own(one, spec.settings), **one.settings})
        spec = replace(spec, store=store_of(spec.store, method))  # type: ignore[arg-type]  # of a method, str
        strategies(spec.strategy, self.learning, method)
        refuse_floats(spec, method)
        dtype = weights_in(method, self.outline, spec, self.task, self.precision)
        found = held(method, self.outline.skeleton(self.task, dtype, spec.codes), spec.optim.name)
        return method, spec, dtype, found

    def _narrowed(
        self, one: Asked, method: Method, spec: RunSpec, dtype: torch.dtype, found: Held, grown: Growth
    ) -> tuple[int, Interval] | None:  # fmt: skip
        """The most rows at once that fit, this many or fewer, and their peak; None where one row does not."""
        rows, family = self.rows, _family(one)

        def peak_of(line: Growth | str) -> Interval | None:
            peak = None if isinstance(line, str) else self._peak(found, line.at(rows), family)
            return peak if peak is not None and self._fits(peak) == "yes" else None

        peak = peak_of(grown)
        while peak is None and rows > 1:
            rows //= 2
            # Of fewer rows attention may keep more of each, never less: those that look as if they fit are measured.
            if peak_of(grown) is not None:
                peak = peak_of(self._grown(method, spec, dtype, rows, self.tokens))
        return None if peak is None else (rows, peak)

    def _timed(
        self, row: PlanRow, method: Method, spec: RunSpec, dtype: torch.dtype, found: Held, grown: Growth, family: str
    ) -> PlanRow:  # fmt: skip
        """The row with its seconds."""
        width, rows = max(1, round(self.steps.width)), max(1, round(self.steps.rows / self.steps.pieces))
        if (rows, width) != self.steps.widest:  # attention of short rows is computed otherwise: counted as they are
            again = self._grown(method, spec, dtype, rows, width)
            if isinstance(again, str):
                return row
            grown = again
        often = self._often(method)
        work = work_of_step(grown, found, self.steps, self.task, self.outline, often)
        if self.rates is None:
            return replace(row, at_least=floor_of(work, self.device))
        step = span(self.rates.seconds(work), "counted", self.device.kind, family, self.times)
        if self.real_steps and row.peak is not None:
            made = probed(
                method, self.outline, spec, self.task, self.precision, dtype, self.steps, self._room(), row.peak.high
            )  # fmt: skip
            if isinstance(made, str):
                row = replace(row, unprobed=made)
            else:
                row, step = (
                    replace(row, probed=True),
                    span(made * often, "probed", self.device.kind, family, self.times),
                )
        return replace(row, step=step, training=step.times(self.steps.total) if self.steps.total else None)

    def _often(self, method: Method) -> float:
        """Passes of a step in passes forward and back: a third of one goes forward, half where the base is frozen."""
        told = _told_of(self.spec.strategy)
        share = 1 / 3 if any(part.trains_base for part in method.parts()) else 1 / 2
        return float(told["passes"] + share * told["forwards"])

    def _grown(self, method: Method, spec: RunSpec, dtype: torch.dtype, rows: int, tokens: int) -> Growth | str:
        return activations_of(method, self.outline, spec, self.task, self.precision, dtype, rows, tokens)

    def _room(self) -> int:
        return self.device.memory + (resident_bytes() if self.device.here and self.device.kind == "cpu" else 0)

    def _peak(self, found: Held, activations: int, family: str) -> Interval:
        program = resident_bytes() if self.device.kind == "cpu" else 0
        later = LATER if self.device.kind == "cpu" else 0
        program += packed_here(found, self.spec) if self.device.kind == "cpu" else 0
        total = program + found.bytes + activations
        return interval(total, self.device.kind, family, self.pairs, program + found.standing, activations + later)

    def _fits(self, peak: Interval) -> Literal["yes", "maybe", "no"]:
        room = self._room()
        return "yes" if peak.high <= room else "maybe" if peak.low <= room else "no"


def remedies_here(
    outline: Outline, spec: RunSpec, task: Task, precision: Precision, device: Device, steps: Steps
) -> tuple[Remedy, ...]:  # fmt: skip
    """What would fit of a run that does not: the ways that `plan` tries, each by its own forecast."""
    learning, settings = split_settings(spec.strategy, spec.settings, compose.setting_names(spec.method))
    spec = replace(spec, settings=settings)
    one = _Row(outline, spec, device, task, precision, committed(), True, steps, None, (), False, learning)
    asked = Asked(spec.method, spec.method, {})
    (row,) = one.with_remedies([(asked, one.of(asked))])
    return row.remedies


def _known(one: Asked) -> bool:
    return all(part.strip() in METHODS for part in one.method.split("+"))


def _family(one: Asked) -> str:
    return str(METHODS.card(one.method.partition("+")[0]).family)


def _trained(row: PlanRow) -> int:
    return row.held.trained if row.held is not None else 0


def task_of_rows(spec: RunSpec, outline: Outline) -> Task:
    """The task that a run's rows say."""
    return load_data(spec.data, spec.task, outline.config).task


def activations_of(
    method: Method, outline: Outline, spec: RunSpec, task: Task, precision: Precision, dtype: torch.dtype, rows: int,
    tokens: int,
) -> Growth | str:  # fmt: skip
    """How the activations of about `rows` rows of `tokens` tokens grow; or why a smaller copy cannot tell."""
    try:
        return growth(
            method, outline.config, task, outline.small(task, spec.codes), tokens, rows=rows, dtype=dtype,
            precision=precision, way=way_of(method, spec),
        )  # fmt: skip
    except LuthierError as error:  # a smaller copy is another model: what a method says of it need not hold here
        return f"a smaller copy of the model cannot take it: {error}"
    except Exception as error:  # the counts still hold, so the row stays; but this one nobody foresaw
        return f"unexpected, please report it: {type(error).__name__}: {(str(error).splitlines() or ['no text'])[0]}"


def packed_here(found: Held, spec: RunSpec) -> int:
    """Bytes of the packed copies of frozen weights that a run on this machine's processor makes."""
    return found.packed if spec.fast and can_pack(torch.empty(1, 1, dtype=torch.bfloat16)) else 0


def weights_in(method: Method, outline: Outline, spec: RunSpec, task: Task, precision: Precision) -> torch.dtype:
    """The float type that a run holds the base in. Raises: ConfigError, as `held_in`."""
    anatomy = outline.skeleton(task, torch.float32).anatomy
    return held_in(spec.store, precision, method.n_params(anatomy), anatomy.n_params)


def _own(one: Asked, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of the settings for all, those that this method has."""
    if one.method.partition("+")[0] not in METHODS.names():
        return dict(settings)
    known = set(compose.setting_names(one.method))
    owners = {part.strip() for part in one.method.split("+")}
    found = {}
    for name, value in settings.items():
        owner, dot, field = name.rpartition(".")
        if (dot and owner in owners) or (not dot and field in known):
            found[name] = value
    return found


def _refuse_unknown(spec: RunSpec, wanted: list[Asked]) -> None:
    if not wanted:
        raise ConfigError("no method is named. Write --method all, or names with commas between: lora,ia3.")
    used = {name for one in wanted for name in _own(one, spec.settings)}
    unused = sorted(set(spec.settings) - used)
    if unused:
        known = sorted({n for one in wanted for n in compose.setting_names(one.method)})
        raise UnknownName(
            f"no method that is asked about has a setting {unused[0]!r}.{near(unused[0], known)} "
            "`luthier methods NAME` lists a method's settings."
        )
