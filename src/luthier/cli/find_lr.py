"""`luthier find-lr`: which learning rates bring the loss down, tried before a run."""

import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from luthier.cli._output import screen
from luthier.cli.train import command_for as train_for
from luthier.cli.train import spec_of_words
from luthier.core import plain
from luthier.runs.spec import RunSpec

__all__ = ["NEEDS_WORDS", "command", "command_for"]

NEEDS_WORDS = True

HELP = """Try rising learning rates on the first rows of a run, and say where the loss falls. Nothing is written.

The words are those of `luthier train`: what is tested is the run that they would make. The rates of the cyclical
schedule (strategy clr) are found so, and a first guess for any other.

Examples:

  luthier find-lr sample:minilm-l6 --data sample:trec6 --method lora

  luthier find-lr ./model --data rows.csv --method full --from 1e-7 --to 0.01 --tries 100
"""

SHOWN = 12


def command_for(words: Sequence[str]) -> Callable[..., None]:
    """The verb with the options of `luthier train`."""
    number = inspect.Parameter.KEYWORD_ONLY
    more = [
        _own("low", number, float, 1e-6, "--from", "Lowest rate."),
        _own("high", number, float, 1.0, "--to", "Highest rate."),
        _own("tries", number, int, 60, "--tries", "Steps from the lowest to the highest."),
    ]
    return train_for(words, act=_find, said=HELP, more=more)


def _own(name: str, kind: Any, of: type, default: Any, option: str, told: str) -> inspect.Parameter:
    return inspect.Parameter(name, kind, default=default, annotation=Annotated[of, typer.Option(option, help=told)])


def _find(
    spec_class: type[RunSpec], model: str, given: dict[str, Any], assigned: dict[str, Any], *,
    low: float, high: float, tries: int,
) -> None:  # fmt: skip
    spec = spec_of_words(spec_class, model, given, assigned)

    from luthier.cli._progress import Watcher
    from luthier.workflow.find_lr import find_lr

    found = find_lr(spec, low=low, high=high, steps=tries, listener=Watcher(title="find-lr"))
    screen().result(plain(found))
    every = max(1, len(found.rates) // SHOWN)
    rows = [
        (f"{rate:.2g}", f"{loss:.3f}", f"{mean:.3f}")
        for rate, loss, mean in list(zip(found.rates, found.losses, found.smoothed, strict=True))[::every]
    ]
    screen().table(("rate", "loss", "running mean"), rows)
    if found.steepest is None:
        screen().show(
            f"\nNo rate from {low:g} to {high:g} brought the loss clearly down. Widen --from and --to, or --tries more."
        )
        return
    screen().show(
        f"\nThe loss falls from {found.begins:.2g} on, most quickly at {found.steepest:.2g}, and is lowest at "
        f"{found.lowest:.2g}.\nA first guess is a tenth of that: --lr {(found.lowest or 0) / 10:.2g}. "
        "So few steps prove little: compare some rates around it."
    )


command = command_for(())
