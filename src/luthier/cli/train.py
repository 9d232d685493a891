"""`luthier train`: fine-tune a model on rows, from options or from a spec file."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.cli._shared_options import AsJson
from luthier.cli._shelf import is_of_recipe
from luthier.cli._shortcuts import shortcut_options, spelt_out
from luthier.cli._spec_options import (
    check_names,
    chosen_cards,
    complete_model,
    complete_setting,
    overlay,
    refuse_twice,
    setting_options,
    settings_of,
    spec_options,
    values_of,
)
from luthier.cli._track import Track, tracked, tracker_names
from luthier.cli._verb import as_verb
from luthier.core import ConfigError, UsageError, plain
from luthier.runs.spec import MOST_FOLDS, RunSpec

__all__ = ["NEEDS_WORDS", "command", "command_for", "spec_of_words"]

NEEDS_WORDS = True

HELP = """Fine-tune a model on your rows. The run's folder holds its spec: `luthier train FOLDER/spec.toml` repeats it.

Each option is a field of the spec, but for the settings of the method: with --method NAME, --help shows those of NAME.

Examples:

  luthier train sample:minilm-l6 --data sample:trec6 --method lora --rank 16

  luthier train ./model --data rows.csv --text question --label kind --method ia3

  luthier train sample:smollm2-135m --data sample:chitchat --steps 20

  luthier train spec.toml --seed 1 --out runs/again

  luthier train sample:minilm-l6 --data few.csv --cv 5
"""

Model = Annotated[
    str,
    typer.Argument(help="A model folder, sample:NAME, a hub name; or a spec.toml.", autocompletion=complete_model),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="A setting of the method (rank=16, lora.rank=16), or a field of the run (optim.warmup=0.1).",
        autocompletion=complete_setting,
    ),
]

Folds = Annotated[
    int | None,
    typer.Option(
        "--cv",
        metavar=f"INT 2..{MOST_FOLDS}",
        min=2,
        max=MOST_FOLDS,
        help="Where rows are few: score each of so many folds with a run on the others, then train on all rows.",
    ),
]


OWN = (
    inspect.Parameter("cv", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Folds),
    inspect.Parameter("track", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Track),
)


def command_for(
    words: Sequence[str],
    spec: type[RunSpec] = RunSpec,
    act: Callable[..., None] | None = None,
    said: str = HELP,
    more: Sequence[inspect.Parameter] = OWN,
) -> Callable[..., None]:
    """The verb with the fields of `spec`, and the settings of the method that the words name, as its options.

    Args:
        act, said, more: of another verb with these options: what it does, its help, and options of its own.
    """
    fields = spec_options(spec)
    data, run, rest = ([o for o in fields if where(o.field)] for where in (_of_data, _of_run, _of_parts))
    short = shortcut_options()
    # As --help shows them.
    options = [*data, *run, *setting_options(chosen_cards(words), [*fields, *short]), *short, *rest]

    def command(model: Model, *, settings: Settings = None, as_json: AsJson = False, **given: Any) -> None:
        own = {parameter.name: given.pop(parameter.name) for parameter in more}
        (act or _train)(spec, model, values_of(options, given), settings_of(settings or []), **own)

    return as_verb(command, said, options, more)


def _of_data(field: str) -> bool:
    return field.startswith("data.")


def _of_run(field: str) -> bool:
    return "." not in field


def _of_parts(field: str) -> bool:
    return not _of_data(field) and not _of_run(field)


command = command_for(())


def _train(
    spec_class: type[RunSpec], model: str, given: dict[str, Any], assigned: dict[str, Any], cv: int | None = None,
    track: list[str] | None = None,
) -> None:  # fmt: skip
    spec = spec_of_words(spec_class, model, given, assigned)

    from luthier.cli._progress import Watcher, show_result
    from luthier.workflow import train

    names = tracker_names(track, one=cv is None and not is_of_recipe(spec.strategy))
    if cv is not None:
        from luthier.cli._cross_validation import train_folds

        train_folds(spec, cv)
        return
    if is_of_recipe(spec.strategy):
        from luthier.cli._recipe import follow_recipe

        follow_recipe(spec)
        return
    with tracked(names, Watcher(title=spec.method), spec) as listener:
        show_result(train(spec, listener=listener))


def spec_of_words(spec_class: type[RunSpec], model: str, given: dict[str, Any], assigned: dict[str, Any]) -> RunSpec:
    """The run that options and --set ask for, or a spec file with their changes.

    Raises:
        UsageError, ConfigError, UnknownName: words that make no run.
    """
    if "epochs" in given and "steps" in given:
        raise UsageError(f"--epochs {given['epochs']:g} and --steps {given['steps']}: give one of the two.")
    refuse_twice(given, assigned)
    from_file = model.endswith(".toml")
    data, method = given.get("data.source"), given.get("method")
    changes = given | assigned
    if not from_file and "data.source" not in changes:
        raise UsageError("train: no rows to learn from. Name them: --data FILE, or --data sample:trec6 to begin with.")
    check_names(method, None if from_file else model, data, given.get("data.test"), strategy=given.get("strategy"))

    from luthier.workflow.choices import reopened

    values = plain(spec_class.from_toml(Path(model))) if from_file else {"model": model, "data": {}}
    if from_file:
        # The file may come from a finished run; its folder is occupied, and another is wanted.
        values["out"] = None
        if method is not None and method != values["method"]:
            values["settings"] = {}
    changes = spelt_out(changes, str(values.get("strategy") or ""))
    if from_file:
        values = reopened(values, changes)
    try:
        return spec_class.from_plain(overlay(values, changes))
    except ConfigError as error:
        raise ConfigError(_with_options(str(error), spec_class, given)) from None


def _with_options(said: str, spec_class: type[RunSpec], given: dict[str, Any]) -> str:
    """A complaint that names the options as they were typed: `--batch`, not run.batch.size."""
    for option in spec_options(spec_class):
        if option.field in given:
            said = said.replace(f"run.{option.field}:", f"--{option.name}:")
    return said
