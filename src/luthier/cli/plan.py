"""`luthier plan`: what each method would hold and take on a model, before anything is loaded."""

import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from luthier.cli._method_names import method_names
from luthier.cli._output import screen
from luthier.cli._shared_options import AsJson
from luthier.cli._spec_options import check_names, complete_model, overlay, settings_of, spec_options, values_of
from luthier.core import human_bytes, human_count, plain, several
from luthier.core.config import read_word
from luthier.runs.spec import RunSpec

__all__ = ["NEEDS_WORDS", "command", "command_for"]

NEEDS_WORDS = True
OWN = ("method", "seed", "out", "device", "sources", "also", "strategy", "epochs", "steps")
NO_ROWS = "-"

NOTE = """trained: numbers beside a new head. weights: the base and what trains.
Activations and the program come on top, so yes is not said here.
no: what stands in every step, gradients apart, is more than there is."""

HELP = """Say what each method would train, store and hold on a model, before a weight is read.

A bare config.json is enough. Counts are exact to the byte, by the parts that `luthier train` records; methods that the
model cannot take stand below with the reason.

Examples:

  luthier plan sample:minilm-l6 --data sample:trec6

  luthier plan ./llama-7b/config.json --method lora,ia3,full --device 24GB

  luthier plan ./model --method lora:rank=64:sites=*
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
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="A setting, of every method that has it, or a field of the run."),
]


def command_for(words: Sequence[str] = ()) -> Callable[..., None]:
    """The verb with the fields of a run that a forecast depends on as its options."""
    options = [option for option in spec_options(RunSpec) if option.field not in OWN]

    def command(
        model: str, method: list[str] | None = None, device: str = "this", labels: int | None = None,
        settings: list[str] | None = None, as_json: bool = False, **given: Any,
    ) -> None:  # fmt: skip
        _plan(model, method or ["all"], values_of(options, given) | settings_of(settings or []), device, labels)

    named = inspect.Parameter.KEYWORD_ONLY
    own: list[tuple[str, Any, Any]] = [
        ("method", Methods, None), ("device", Where, "this"), ("labels", Labels, None), ("settings", Settings, None),
        ("as_json", AsJson, False),
    ]  # fmt: skip
    parameters = [
        inspect.Parameter("model", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Model),
        *(inspect.Parameter(name, named, default=default, annotation=hint) for name, hint, default in own),
        *(option.parameter for option in options),
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = HELP
    return command


command = command_for()


def _plan(model: str, methods: list[str], changes: dict[str, Any], device: str, labels: int | None) -> None:
    names = method_names(methods)
    for name in names:
        check_names(name.partition(":")[0], model, changes.get("data.source"), changes.get("data.test"))
    from luthier.comparison import entrant_of
    from luthier.core import ConfigError
    from luthier.forecast import device_of
    from luthier.workflow.outline import outline_of
    from luthier.workflow.plan import Asked, plan

    where = device_of(device)
    outline = outline_of(model)
    spec = RunSpec.from_plain(overlay({"model": model, "data": {"source": NO_ROWS}}, changes))
    if spec.data.source != NO_ROWS:
        if labels is not None:
            raise ConfigError(f"--labels {labels}: the rows say how many there are. Leave it out.")
        from luthier.data.load_data import load_data

        task = load_data(spec.data, spec.task, outline.config).task
    else:
        task = outline.task(spec.task, labels)
    entrants = [entrant_of(name, read_word) for name in names]
    found = plan(outline, spec, [Asked(e.name, e.method, e.settings) for e in entrants], where, task)
    _show(found)
    screen().result(plain(found))


def _show(found: Any) -> None:
    to = screen()
    stands = [row for row in found.rows if row.held is not None]
    refused = [row for row in found.rows if row.held is None]
    head = f" with {several(found.task.n_outputs, 'output')}" if found.task.n_outputs else ""
    to.headline(f"{found.model}: {found.kind}, {human_count(found.numbers)} numbers, for {found.task.name}{head}")
    to.show(f"{found.precision} passes, {found.optimiser}; to fit into {found.device.said}\n")
    rows = []
    for row in sorted(stands, key=lambda row: row.held.trained):
        h = row.held
        parts = (h.stored, h.weights + h.numbers, h.gradients, h.moments, h.bytes)
        rows.append((row.name, human_count(h.trained), *(human_bytes(n) for n in parts), row.fits))
    if rows:
        names = ("trained", "stored", "weights", "grads", "moments", "together")
        to.table(("method", *names, "fits"), rows, right=names, whole=("method", *names, "fits"))
    to.page(f"\n{NOTE}")
    if stands and all(row.fits == "no" for row in stands):
        to.page(f"\nNothing fits into {human_bytes(found.device.memory)}. Take a smaller model or a larger device.")
    if refused:
        to.show(f"\n{several(len(refused), 'method')} cannot be put on this model as they stand:")
        to.table(("method", "reason"), [(row.name, row.refused) for row in refused], whole=("method",))
    if stands:
        first = next((row for row in stands if row.method == "lora"), stands[0])
        to.show(f"\nNext: luthier train {found.model} --data FILE --method {first.method}")
