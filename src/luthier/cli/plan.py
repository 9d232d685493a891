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
from luthier.core import human_bytes, human_count, plain, several
from luthier.core.config import read_word
from luthier.runs.spec import RunSpec

__all__ = ["NEEDS_WORDS", "command", "command_for"]

NEEDS_WORDS = True
OWN = ("method", "seed", "out", "device", "sources", "also", "strategy", "epochs", "steps")
NO_ROWS = "-"

COLUMNS = ("trained", "stored", "weights", "grads", "moments", "together")
COLUMNS_PEAK = ("trained", "weights", "learning", "activ.", "peak")
NOTE = """trained: numbers beside a new head. weights: the base and what trains.
Activations and the program come on top, so yes is not said here.
no: what stands in every step, gradients apart, is more than there is."""

NOTE_PEAK = """trained: numbers beside a new head. weights: the base and what trains. learning: gradients and moments.
peak: highest memory of the run. yes: its upper end fits. no: its lower end does not."""

MEASURED = "The ends of peak are those of nine in ten of {n} finished runs on such a device."
ASSUMED = "No finished runs of such a size on such a device stand behind the ends of peak: they are assumed, and wide."

HELP = """Say what each method would train, store and hold on a model, before a weight is read.

A bare config.json is enough. Counts are exact to the byte, by the parts that `luthier train` records; methods that the
model cannot take stand below with the reason.

Examples:

  luthier plan sample:minilm-l6 --data sample:trec6

  luthier plan ./llama-7b/config.json --method lora,ia3,full --device 24GB

  luthier plan ./model --method lora:rank=64:sites=*

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
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="A setting, of every method that has it, or a field of the run."),
]


def command_for(words: Sequence[str] = ()) -> Callable[..., None]:
    """The verb with the fields of a run that a forecast depends on as its options."""
    options = [option for option in spec_options(RunSpec) if option.field not in OWN]

    def command(
        model: Model, *, method: Methods = None, device: Where = "this", labels: Labels = None,
        settings: Settings = None, check: Check = False, as_json: AsJson = False, **given: Any,
    ) -> None:  # fmt: skip
        if check:
            _check(model)
            return
        _plan(model, method or ["all"], values_of(options, given) | settings_of(settings or []), device, labels)

    return as_verb(command, HELP, options)


command = command_for()


def _plan(model: str, methods: list[str], changes: dict[str, Any], device: str, labels: int | None) -> None:
    names = method_names(methods)
    for name in names:
        check_names(name.partition(":")[0], model, changes.get("data.source"), changes.get("data.test"))
    from luthier.comparison import entrant_of
    from luthier.core import ConfigError
    from luthier.forecast import device_of
    from luthier.workflow.outline import outline_of
    from luthier.workflow.plan import USUAL, Asked, plan, task_of_rows

    where = device_of(device)
    outline = outline_of(model)
    spec = RunSpec.from_plain(overlay({"model": model, "data": {"source": NO_ROWS}}, changes))
    if spec.data.source != NO_ROWS:
        if labels is not None:
            raise ConfigError(f"--labels {labels}: the rows say how many there are. Leave it out.")
        task = task_of_rows(spec, outline)
    elif spec.data.template is not None or spec.data.words is not None:
        raise ConfigError("--template and --words: what a template asks for follows from rows. Name them with --data.")
    else:
        task = outline.task(spec.task, labels)
    entrants = [entrant_of(name, read_word) for name in names]
    asked = [Asked(e.name, e.method, e.settings) for e in entrants]
    tokens = spec.max_length or USUAL
    longest = getattr(outline.config, "max_position_embeddings", None)
    tokens = min(tokens, int(longest)) if isinstance(longest, int) and longest > 0 else tokens
    with screen().busy("forecasting"):
        found = plan(outline, spec, asked, where, task, tokens=tokens)
    _show(found, can_train=outline.weights)
    screen().result(plain(found))


def _check(folder: str) -> None:
    """What forecasts of finished runs were worth."""
    from luthier.core import ConfigError
    from luthier.forecast import committed, leave_out, residuals
    from luthier.workflow.forecasts import pairs_of

    home = Path(folder)
    if not home.is_dir():
        raise ConfigError(f"{folder}: there is no such folder. Name one with finished runs: luthier plan runs --check.")
    with screen().busy("forecasting again"):
        pairs, silent = pairs_of([home])
    if not pairs and not silent:
        raise ConfigError(f"{folder}: no finished runs lie in it or below it. Name a folder that holds some.")
    known = committed()
    made, found = leave_out(pairs, known), residuals(pairs, known)
    screen().result({
        "pairs": [plain(pair) for pair in pairs], "intervals": [one and plain(one) for one in made],
        "silent": {str(path): why for path, why in silent.items()},
        "residuals": plain(found) if found is not None else None,
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
        return
    screen().show(
        f"\n{several(found.n, 'run')} with an interval. Median error {found.median_error:.1%}; {found.covered:.0%} "
        f"inside; {found.above:.0%} above it, which are the forecasts that were too low.\n"
        "Each interval is made from the runs of other methods, those of luthier's own grid among them."
    )


def _show(found: Any, *, can_train: bool) -> None:
    to = screen()
    stands = [row for row in found.rows if row.held is not None]
    refused = [row for row in found.rows if row.held is None]
    head = f" with {several(found.task.n_outputs, 'output')}" if found.task.n_outputs else ""
    to.headline(f"{found.model}: {found.kind}, {human_count(found.numbers)} numbers, for {found.task.name}{head}")
    to.show(f"{found.precision} passes, {found.optimiser}; to fit into {found.device.said}")
    to.show(f"activations of {several(found.rows_at_once, 'row')} of {found.tokens} tokens\n")
    grown = any(row.peak is not None for row in stands)
    rows = []
    for row in sorted(stands, key=lambda row: row.held.trained):
        h = row.held
        base = h.weights + h.numbers
        if grown:
            cells = [*(_bytes(n) for n in (base, h.gradients + h.moments, row.activations)), _spread(row.peak)]
        else:
            cells = [_bytes(n) for n in (h.stored, base, h.gradients, h.moments, h.bytes)]
        rows.append((row.name, human_count(h.trained), *cells, row.fits))
    if rows:
        names = COLUMNS_PEAK if grown else COLUMNS
        to.table(("method", *names, "fits"), rows, right=names, whole=("method", *names, "fits"))
    behind = {row.peak.n for row in stands if row.peak is not None}
    if behind:
        n = min(behind)
        to.page(f"\n{MEASURED.format(n=n) if n else ASSUMED}")
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


def _bytes(n: int | None) -> str:
    return "?" if n is None else human_bytes(n)


def _spread(peak: Any) -> str:
    """Both ends in one unit: 1.2-1.9 GB."""
    if peak is None:
        return "?"
    size, unit = (1e9, "GB") if peak.high >= 1e9 else (1e6, "MB")
    digits = 1 if unit == "GB" else 0
    return f"{peak.low / size:.{digits}f}-{peak.high / size:.{digits}f} {unit}"
