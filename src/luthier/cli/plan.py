"""`luthier plan`: what each method would hold and take on a model, before anything is loaded."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.cli._method_names import method_names
from luthier.cli._output import screen
from luthier.cli._shared_options import AsJson
from luthier.cli._spec_options import (
    check_names,
    complete_model,
    overlay,
    settings_of,
    spec_options,
    values_of,
)
from luthier.cli._verb import as_verb
from luthier.core import human_bytes, human_count, human_seconds, plain, several
from luthier.core.config import read_word
from luthier.runs.spec import RunSpec

__all__ = ["NEEDS_WORDS", "command", "command_for"]

NEEDS_WORDS = True
OWN = ("method", "seed", "out", "device", "sources", "also", "strategy")
NO_ROWS = "-"

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

HELP = """Say what each method would train, store and hold on a model, before a weight is read.

A bare config.json is enough. Counts are exact to the byte, by the parts that `luthier train` records; methods that the
model cannot take stand below with the reason.

Examples:

  luthier plan sample:minilm-l6 --data sample:trec6

  luthier plan ./llama-7b/config.json --method lora,ia3,full --device 24GB

  luthier plan ./model --method lora:rank=64:sites=*

  luthier plan sample:minilm-l6 --data sample:trec6 --method lora,full --probe

  luthier plan runs --check
"""

Model = Annotated[
    str,
    typer.Argument(help="A model folder, sample:NAME, a hub name; or a config.json.", autocompletion=complete_model),
]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        metavar="NAMES",
        help="Methods, with commas between: lora,ia3; lora:rank=4 with settings of its own; family:NAME; or all. "
        "[default: all]",
    ),
]
Where = Annotated[str, typer.Option("--device", help="this, a size such as 24GB, or a name such as h100-80gb.")]
Labels = Annotated[int | None, typer.Option("--labels", help="Classes, where no rows say how many.", min=2)]
Check = Annotated[
    bool, typer.Option("--check", help="Compare forecast and measurement of the finished runs below the folder named.")
]
Probe = Annotated[
    bool,
    typer.Option(
        "--probe", help="Make three real steps of each method named, for its time; with --check, of each run."
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="A setting, of every method that has it, or a field of the run."),
]


def command_for(words: Sequence[str] = ()) -> Callable[..., None]:
    """The verb with the fields of a run that a forecast depends on as its options."""
    options = [option for option in spec_options(RunSpec) if option.field not in OWN]

    def command(
        model: Model, *, method: Methods = None, device: Where = "this", labels: Labels = None,
        settings: Settings = None, check: Check = False, probe: Probe = False, as_json: AsJson = False, **given: Any,
    ) -> None:  # fmt: skip
        if check:
            _check(model, probe)
            return
        changes = values_of(options, given) | settings_of(settings or [])
        _plan(model, method or ["all"], changes, device, labels, probe)

    return as_verb(command, HELP, options)


command = command_for()


def _plan(
    model: str, methods: list[str], changes: dict[str, Any], device: str, labels: int | None, probe: bool
) -> None:  # fmt: skip
    names = method_names(methods)
    for name in names:
        check_names(name.partition(":")[0], model, changes.get("data.source"), changes.get("data.test"))
    from luthier.comparison import entrant_of
    from luthier.core import ConfigError
    from luthier.data.load_data import load_data
    from luthier.forecast import device_of
    from luthier.workflow.lengths import steps_of_rows
    from luthier.workflow.outline import outline_of
    from luthier.workflow.plan import MOST, USUAL, Asked, plan

    where = device_of(device)
    outline = outline_of(model)
    if probe and len(names) > MOST:
        raise ConfigError(
            f"--probe makes real steps of every method, and {len(names)} are named. Name at most {MOST}, such as "
            "--method lora,ia3."
        )
    steps: Any = None
    spec = RunSpec.from_plain(overlay({"model": model, "data": {"source": NO_ROWS}}, changes))
    if spec.data.source != NO_ROWS:
        if labels is not None:
            raise ConfigError(f"--labels {labels}: the rows say how many there are. Leave it out.")
        data = load_data(spec.data, spec.task, outline.config)
        task = data.task
        steps = steps_of_rows(spec, outline, data) if len(names) <= MOST else None
    elif spec.data.template is not None or spec.data.words is not None:
        raise ConfigError("--template and --words: what a template asks for follows from rows. Name them with --data.")
    else:
        task = outline.task(spec.task, labels)
    entrants = [entrant_of(name, read_word) for name in names]
    asked = [Asked(e.name, e.method, e.settings) for e in entrants]
    tokens = spec.max_length or USUAL
    longest = getattr(outline.config, "max_position_embeddings", None)
    tokens = min(tokens, int(longest)) if isinstance(longest, int) and longest > 0 else tokens
    if isinstance(steps, str):
        screen().say(f"row lengths are not known: {steps}")
        steps = None
    with screen().busy("forecasting"):
        found = plan(outline, spec, asked, where, task, tokens=tokens, steps=steps, real_steps=probe)
    _show(found, can_train=outline.weights)
    screen().result(plain(found))


def _check(folder: str, real_steps: bool) -> None:
    """What forecasts of finished runs were worth."""
    from luthier.core import ConfigError
    from luthier.forecast import committed, leave_out, residuals
    from luthier.workflow.forecasts import pairs_of

    home = Path(folder)
    if not home.is_dir():
        raise ConfigError(f"{folder}: there is no such folder. Name one with finished runs: luthier plan runs --check.")
    with screen().busy("forecasting again"):
        pairs, times, silent = pairs_of([home], real_steps=real_steps)
    if not pairs and not silent:
        raise ConfigError(f"{folder}: no finished runs lie in it or below it. Name a folder that holds some.")
    known = committed()
    made, found = leave_out(pairs, known), residuals(pairs, known)
    screen().result({
        "pairs": [plain(pair) for pair in pairs], "intervals": [one and plain(one) for one in made],
        "silent": {str(path): why for path, why in silent.items()},
        "residuals": plain(found) if found is not None else None,
        "times": {how: _of_times(how, times) for how in ("counted", "probed", "loading")},
    })  # fmt: skip
    rows = [
        (Path(p.model).name, p.method, f"{p.rows} x {p.tokens}", _spread(one), human_bytes(p.measured),
         f"{p.measured / (one.likely if one else p.forecast) - 1:+.0%}")
        for p, one in zip(pairs, made, strict=True)
    ]  # fmt: skip
    head = ("model", "method", "batch", "forecast", "measured", "off")
    screen().table(head, rows, right=head[2:], whole=head)
    if silent:
        screen().show(f"\n{several(len(silent), 'run')} cannot be compared:")
        screen().table(("run", "reason"), [(str(path), why) for path, why in silent.items()])
    if found is None:
        screen().show(f"\n{several(len(pairs), 'run')}; of other methods too few are known, or far smaller ones.")
        _show_times(times)
        return
    screen().show(
        f"\n{several(found.n, 'run')} with an interval. Median error {found.median_error:.1%}; {found.covered:.0%} "
        f"inside; {found.above:.0%} above it, which are the forecasts that were too low.\n"
        "Each interval is made from the runs of other methods, those of luthier's own grid among them."
    )
    _show_times(times)


def _of_times(how: str, times: Sequence[Any]) -> dict[str, Any]:
    """The pairs of one way of forecasting seconds, each with its interval from others, and what those were worth."""
    from luthier.forecast import committed_times, residuals_of_times, spans_left_out

    own, known = [p for p in times if p.how == how], committed_times()
    return {
        "pairs": [plain(pair) for pair in own],
        "intervals": [one and plain(one) for one in spans_left_out(own, known)],
        "residuals": plain(residuals_of_times(own, known)),
    }  # fmt: skip


def _show_times(times: Sequence[Any]) -> None:
    """What forecasts of seconds were worth, a line for each way."""
    from luthier.forecast import committed_times, residuals_of_times

    said = {"counted": "a step, over measured rates", "probed": "a step, from real steps", "loading": "loading"}
    rows = []
    for how, words in said.items():
        own = [p for p in times if p.how == how]
        if not own:
            continue
        off = sorted(p.measured / p.forecast for p in own)
        made = residuals_of_times(own, committed_times())
        judged = (f"{made.median_error:.0%}", f"{made.covered:.0%}", f"{made.above:.0%}") if made else ("?", "?", "?")
        rows.append((words, len(own), f"{off[len(off) // 2]:.2f}", *judged))
    if rows:
        head = ("seconds of", "runs", "measured / forecast", "median error", "inside", "above")
        screen().show()
        screen().table(head, rows, right=head[1:])
        screen().show("A question mark: fewer than 19 runs of other methods are known.")


def _show(found: Any, *, can_train: bool) -> None:
    to = screen()
    stands = [row for row in found.rows if row.held is not None]
    refused = [row for row in found.rows if row.held is None]
    head = f" with {several(found.task.n_outputs, 'output')}" if found.task.n_outputs else ""
    to.headline(f"{found.model}: {found.kind}, {human_count(found.numbers)} numbers, for {found.task.name}{head}")
    to.show(f"{found.precision} passes, {found.optimiser}; to fit into {found.device.said}")
    to.show(f"activations of {several(found.rows_at_once, 'row')} of {found.tokens} tokens{_cut(found)}\n")
    grown = any(row.peak is not None for row in stands)
    rows = []
    for row in sorted(stands, key=lambda row: row.held.trained):
        h = row.held
        base = h.weights + h.numbers
        if grown:
            cells = [*(_bytes(n) for n in (base, h.gradients + h.moments, row.activations)), _spread(row.peak)]
        else:
            cells = [_bytes(n) for n in (h.stored, base, h.gradients + h.moments, h.bytes)]
        rows.append((row.name, human_count(h.trained), *cells, row.fits))
    if rows:
        names = COLUMNS_PEAK if grown else COLUMNS
        to.table(("method", *names, "fits"), rows, right=names, whole=("method", *names, "fits"))
    behind = {row.peak.n for row in stands if row.peak is not None}
    if behind:
        n = min(behind)
        to.page(f"\n{MEASURED.format(n=n) if n else ASSUMED}")
    _show_step(found, stands)
    for row in stands:
        if row.would:
            to.show(f"{row.name} would fit with --set {row.would}")
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


def _spread(peak: Any) -> str:
    """Both ends in one unit: 1.2-1.9 GB."""
    if peak is None:
        return "?"
    size, unit = (1e9, "GB") if peak.high >= 1e9 else (1e6, "MB")
    digits = 1 if unit == "GB" else 0
    return f"{peak.low / size:.{digits}f}-{peak.high / size:.{digits}f} {unit}"
