"""`luthier plan`: what each method would hold and take on a model, before anything is loaded."""

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Annotated, Any

import typer

from luthier.cli import _kept_plans
from luthier.cli._method_names import method_names
from luthier.cli._output import screen
from luthier.cli._plan_check import check_runs
from luthier.cli._plan_screen import show
from luthier.cli._shared_options import AsJson
from luthier.cli._shelf import SHELF
from luthier.cli._spec_options import (
    check_names,
    complete_model,
    overlay,
    settings_of,
    spec_options,
    values_of,
)
from luthier.cli._verb import as_verb
from luthier.core import ConfigError, UsageError, plain
from luthier.core.config import read_word
from luthier.runs.devices import Device, device_of
from luthier.runs.spec import DataSpec, RunSpec

__all__ = ["NEEDS_WORDS", "command", "command_for"]

NEEDS_WORDS = True
OWN = ("method", "seed", "out", "device", "sources", "also")
NO_ROWS = "-"
MOST = 12  # methods whose activations are forecast unasked: each takes a second

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
        changes = values_of(options, given) | settings_of(settings or [])
        if check:
            _refuse_beside_check(changes, method, labels, device)
            check_runs(model, probe)
            return
        _plan(model, method or ["all"], changes, device, labels, probe)

    return as_verb(command, HELP, options)


command = command_for()


def _refuse_beside_check(
    changes: dict[str, Any], method: list[str] | None, labels: int | None, device: str
) -> None:  # fmt: skip
    """Raises: UsageError. What finished runs were is in their records."""
    others = {"method": method, "labels": labels, "device": None if device == "this" else device, **changes}
    named = [name for name, value in others.items() if value is not None]
    if named:
        raise UsageError(
            f"--check compares the runs below a folder as they were, so {named[0].rpartition(chr(0))[2]} would change "
            "nothing. Leave it out."
        )


def _plan(
    model: str, methods: list[str], changes: dict[str, Any], device: str, labels: int | None, probe: bool
) -> None:  # fmt: skip
    names = method_names(methods)
    for name in names:
        if name not in SHELF:
            check_names(name.partition(":")[0])
    check_names(None, model, changes.get("data.source"), changes.get("data.test"), strategy=changes.get("strategy"))
    if probe and len(names) > MOST:
        raise ConfigError(
            f"--probe makes real steps of every method, and {len(names)} are named. Name at most {MOST}, such as "
            "--method lora,ia3."
        )
    where = device_of(device)
    spec = RunSpec.from_plain(overlay({"model": model, "data": {"source": NO_ROWS}}, changes))
    counts_alone = len(names) > MOST and spec.data.source == NO_ROWS and spec.data == DataSpec(source=NO_ROWS)
    kept = _kept_plans.address(model, names, spec, where, labels) if counts_alone else None
    found = _kept_plans.read(kept, names, where) if kept is not None else None
    if found is not None:
        for line in found.said:
            screen().say(line)
        show(found, found.outputs, can_train=found.has_weights)
        screen().result(found.plain)
        return
    said: list[str] = []
    made, has_weights = _made(names, spec, where, labels, probe, said)
    if kept is not None:
        _kept_plans.keep(kept, made, has_weights, said)
    show(made, made.task.n_outputs, can_train=has_weights)
    screen().result(plain(made))


def _made(
    names: list[str], spec: RunSpec, where: Device, labels: int | None, probe: bool, said: list[str]
) -> tuple[Any, bool]:  # fmt: skip
    """The plan, and whether there are weights; what is said of it on the way is added to `said`."""
    few = len(names) <= MOST
    with _nothing_collected():
        from luthier.comparison.cells import entrant_of
        from luthier.data.load_data import load_data
        from luthier.workflow.lengths import refuse_pack, steps_of_rows
        from luthier.workflow.outline import outline_of
        from luthier.workflow.plan import USUAL, Asked, plan

        outline = outline_of(spec.model)
        steps: Any = None
        if spec.data.source != NO_ROWS:
            if labels is not None:
                raise ConfigError(f"--labels {labels}: the rows say how many there are. Leave it out.")
            data = load_data(spec.data, spec.task, outline.config)
            task = data.task
            steps = steps_of_rows(spec, outline, data) if few else None
        elif spec.data.template is not None or spec.data.words is not None:
            raise ConfigError(
                "--template and --words: what a template asks for follows from rows. Name them with --data."
            )
        else:
            task = outline.task(spec.task, labels)
        refuse_pack(spec, task)
        entrants = [entrant_of(name, read_word) for name in names]
        asked = [Asked(e.name, e.method, e.settings) for e in entrants]
    tokens = spec.max_length or USUAL
    longest = getattr(outline.config, "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < tokens:
        if spec.max_length is not None:
            said.append(f"--max-length {tokens}: the model reads {longest} tokens, and so many are taken")
        tokens = longest
    if isinstance(steps, str):
        said.append(f"row lengths are not known: {steps}")
        steps = None
    for line in said:
        screen().say(line)
    with screen().busy("forecasting"), nullcontext() if few else _nothing_collected():
        found = plan(outline, spec, asked, where, task, tokens=tokens, grow=few, steps=steps, real_steps=probe)
    return found, outline.weights


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Imports make a million objects that stay: looking through them for litter takes a sixth of the time.

    Nor are they looked through when a process ends that began for this alone.
    """
    was, begins = gc.isenabled(), "torch" not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if begins:
            gc.freeze()
        if was:
            gc.enable()
