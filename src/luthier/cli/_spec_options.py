"""The words of `luthier train` as the plain values of a run's spec. No logic of training, and no torch."""

from collections.abc import Mapping, Sequence
from typing import Any

from luthier.cli._shelf import SHELF
from luthier.core import UnknownName
from luthier.core.config import replace_word

__all__ = ["check_names", "overlay", "settings_of"]

# A --set name that begins with one of these is a field of the run, not a setting of the method.
PARTS = ("optim", "batch", "eval", "checkpoint", "data")
WHOLE = "run"


def check_names(method: str | None, *sources: str | None) -> None:
    """Refuse names that nothing has, in a tenth of a second: before torch is imported.

    Raises:
        UnknownName: no such method or sample; offers near ones.
    """
    for name in method.split("+") if method is not None else ():
        if not name.strip():
            raise UnknownName(
                f"--method {method!r}: a name is missing. Write one, such as lora, or lora+prefix_tuning."
            )
        SHELF.card(name.strip())
    for source in sources:
        if source is not None and source.startswith("sample:"):
            from luthier import samples

            samples.find(source)


def settings_of(assignments: Sequence[str]) -> dict[str, Any]:
    """`--set` words as dotted fields of a run: rank=16 is settings.rank, optim.warmup=0.1 and run.threads=1 are theirs.

    Raises:
        ConfigError: a word without `=`.
    """
    found: dict[str, Any] = {}
    for assignment in assignments:
        name, value = replace_word(assignment)
        head, dot, rest = name.partition(".")
        if dot and head in PARTS:
            found[name] = value
        elif dot and head == WHOLE:
            found[rest] = value
        else:
            found[f"settings\0{name}"] = value
    return found


def overlay(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with dotted fields put in; `None` leaves a field as it is."""
    for name, value in changes.items():
        if value is None:
            continue
        if name.startswith("settings\0"):
            values.setdefault("settings", {})[name.removeprefix("settings\0")] = value
            continue
        *parents, last = name.split(".")
        at = values
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = value
        if name == "steps":
            values.pop("epochs", None)
        if name == "epochs":
            values.pop("steps", None)
    return values
