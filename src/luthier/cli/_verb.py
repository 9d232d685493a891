"""A function as a verb of the command line, where some of its options are made from fields."""

import inspect
from collections.abc import Callable, Sequence

from luthier.cli._spec_options import Option

__all__ = ["as_verb"]


def as_verb(
    command: Callable[..., None], said: str, options: Sequence[Option], more: Sequence[inspect.Parameter] = ()
) -> Callable[..., None]:
    """A verb as typer reads it: the function's own words, `more`, and the options in the place of its `**given`."""
    own = [p for p in inspect.signature(command).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    parameters = [*own, *more, *(option.parameter for option in options)]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = said
    return command
