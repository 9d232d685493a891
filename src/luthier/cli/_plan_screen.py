"""What `luthier plan` shows of a plan."""

from collections.abc import Sequence
from typing import Any

from luthier.cli._output import screen
from luthier.core import human_bytes, human_count, human_seconds, several

__all__ = ["show", "spread"]

COLUMNS = ("trained", "stored", "weights", "learning", "together")
COLUMNS_PEAK = ("trained", "weights", "learning", "activ.", "peak")
NOTE = """trained: numbers beside a new head. weights: the base and what trains. learning: gradients and moments.
Activations and the program come on top, so yes is not said here.
no: what stands in every step, gradients apart, is more than there is."""

NOTE_PEAK = """trained: numbers beside a new head. weights: the base and what trains. learning: gradients and moments.
peak: highest memory of the run. yes: its upper end fits. no: its lower end does not."""

MEASURED = "The ends of peak are those of nine in ten of {n} finished runs on such a device."
ASSUMED = "No finished runs of such a size on such a device stand behind the ends of peak: they are assumed, and wide."

TIMED = """a step: over rates of this machine just now; the ends are those of nine in ten of {n} finished runs on such a
device."""
GUESSED = """a step: over rates of this machine just now. Too few finished runs stand behind the ends: they are assumed,
and wide. --probe makes three real steps."""
REAL = (
    """a step: three real steps were made just now, by random numbers. Other work on this machine moves all of these."""
)


def show(found: Any, outputs: int | None, *, can_train: bool) -> None:
    """Draw a plan, or what was kept of one.

    Args:
        outputs: of the task's head.
        can_train: there are weights to begin from.
    """
    to = screen()
    stands = [row for row in found.rows if row.held is not None]
    refused = [row for row in found.rows if row.held is None]
    head = f" with {several(outputs, 'output')}" if outputs else ""
    to.headline(f"{found.model}: {found.kind}, {human_count(found.numbers)} numbers, for {found.task.name}{head}")
    to.show(f"{found.precision} passes, {found.optimiser}; to fit into {found.device.said}")
    to.show(f"activations of {several(found.rows_at_once, 'row')} of {found.tokens} tokens{_cut(found)}\n")
    if found.strategy:
        alone = f" and {_passes(found.forwards)} forward alone" if found.forwards else ""
        to.show(
            f"{found.strategy}: a step makes {_passes(found.passes)} forward and back{alone}, at the settings of its "
            f"page; {found.aside} is in no forecast\n"
        )
    grown = any(row.peak is not None for row in stands)
    rows = []
    for row in sorted(stands, key=lambda row: row.held.trained):
        h = row.held
        base = h.weights + h.numbers
        if grown:
            cells = [*(_bytes(n) for n in (base, h.gradients + h.moments, row.activations)), spread(row.peak)]
        else:
            cells = [_bytes(n) for n in (h.stored, base, h.gradients + h.moments, base + h.gradients + h.moments)]
        rows.append((row.name, human_count(h.trained), *cells, row.fits))
    if rows:
        names = COLUMNS_PEAK if grown else COLUMNS
        to.table(("method", *names, "fits"), rows, right=names, whole=("method", *names, "fits"))
    behind = {row.peak.n for row in stands if row.peak is not None}
    if behind:
        n = min(behind)
        to.page(f"\n{MEASURED.format(n=n) if n else ASSUMED}")
    _show_step(found, stands)
    remedies = [(row.name, told.words, spread(told.peak)) for row in stands for told in row.remedies]
    if remedies:
        to.show("\nWhat would fit, each by a forecast of its own:")
        to.table(("method", "with", "peak"), remedies, right=("peak",), whole=("method", "with", "peak"))
    if stands:
        to.page(f"\n{NOTE_PEAK if grown else NOTE}")
    if stands and all(row.fits == "no" for row in stands):
        to.page(f"\nNothing fits into {human_bytes(found.device.memory)}. Take a smaller model or a larger device.")
    unknown = [(row.name, row.unknown) for row in stands if row.unknown]
    if unknown:
        to.show(f"\nActivations of {several(len(unknown), 'method')} are not forecast:")
        to.table(("method", "reason"), unknown, whole=("method",))
    if refused:
        to.show(f"\n{several(len(refused), 'method')} cannot be put on this model as they stand:")
        to.table(("method", "reason"), [(row.name, row.refused) for row in refused], whole=("method",))
    fitting = [row for row in stands if row.fits != "no"]
    if fitting and can_train:
        first = next((row for row in fitting if row.method == "lora"), fitting[0])
        to.show(f"\nNext: luthier train {found.model} --data FILE --method {first.method}")


def _passes(pieces: float) -> str:
    return "1 pass" if pieces == 1 else f"{pieces:.3g} passes"


def _cut(found: Any) -> str:
    """Why a pass has fewer rows than a step."""
    if found.rows_at_once >= round(found.steps.rows):
        return ""
    step = f"a step of {found.steps.rows:.3g} rows is made in {_passes(found.steps.pieces)}"
    return f": {step} (batch.tokens, batch.accumulate)"


def _show_step(found: Any, stands: Sequence[Any]) -> None:
    """Seconds, where they were forecast: of a step, and of the run where rows say how long it is."""
    to, steps = screen(), found.steps
    floors = [row for row in stands if row.at_least is not None]
    timed = sorted((row for row in stands if row.step is not None), key=lambda row: row.held.trained)
    if not timed:
        if any(row.activations is not None for row in stands):
            to.show("\nTime on a device that was never measured is not known.")
        if floors:
            to.table(("method", "a step takes at least"), [(row.name, _brief(row.at_least)) for row in floors])
            to.page(
                "Its products at its maker's peak rate, which no run reaches; how much longer it takes is not known."
            )
        return
    head = ["method", "a step", *([f"{steps.total} steps"] if steps.total else [])]
    lines = [
        (row.name, _seconds(row.step), *([_seconds(row.training)] if steps.total else []))
        for row in timed
    ]  # fmt: skip
    to.show(f"\na step: {steps.rows:.3g} rows, {steps.tokens:.0f} tokens with padding, {_passes(steps.pieces)}")
    to.table(tuple(head), lines, right=tuple(head[1:]), whole=tuple(head))
    n = min(row.step.n for row in timed)
    real = all(row.probed for row in timed)
    to.page(f"\n{REAL if real else TIMED.format(n=n) if n else GUESSED}")
    if found.loading is not None:
        to.page(f"Before the first step loading takes {_seconds(found.loading)}; nothing is compiled.")
    for row in timed:
        if row.unprobed:
            to.show(f"{row.name}: {row.unprobed}")


def _brief(seconds: float) -> str:
    if seconds >= 60:
        return human_seconds(seconds)
    unit, size = ("s", 1.0) if seconds >= 0.1 else ("ms", 1e-3)
    return f"{seconds / size:.{0 if seconds >= 10 * size else 1 if seconds >= size else 2}f} {unit}"


def _seconds(span: Any) -> str:
    """Both ends: 0.2 s to 1.3 s."""
    return f"{_brief(span.low)} to {_brief(span.high)}"


def _bytes(n: int | None) -> str:
    return "?" if n is None else human_bytes(n)


def spread(peak: Any) -> str:
    """Both ends in one unit: 1.2-1.9 GB."""
    if peak is None:
        return "?"
    size, unit = (1e9, "GB") if peak.high >= 1e9 else (1e6, "MB")
    digits = 1 if unit == "GB" else 0
    return f"{peak.low / size:.{digits}f}-{peak.high / size:.{digits}f} {unit}"
