"""Strategies that one option names together with their main setting: `--class-weights balanced`."""

from collections.abc import Mapping
from typing import Any

from luthier.cli._shelf import STRATEGIES, few_words
from luthier.cli._spec_options import SETTINGS, Option
from luthier.core import UsageError

__all__ = ["shortcut_options", "spelt_out"]

SHORTCUT = "strategy\0"


def shortcut_options() -> list[Option]:
    """An option for each strategy whose file names a `shortcut`."""
    options = []
    for card in STRATEGIES.cards():
        setting = next((s for s in card.settings if s.name == card.facts.get("shortcut")), None)
        if setting is not None:
            shape = {"int": "INT", "float": "NUMBER"}.get(setting.type, "TEXT")
            options.append(
                Option(
                    field=SHORTCUT + card.name, name=card.name.replace("_", "-"), panel="Strategies", kind=str,
                    shape=shape, as_text=True,
                    help=f"the strategy {card.name}: {few_words(card)}; {setting.meaning}",
                )
            )  # fmt: skip
    return options


def spelt_out(values: Mapping[str, Any], named: str = "") -> dict[str, Any]:
    """The same with the strategies named, and their settings.

    Args:
        named: strategies of a spec file, which stay where no --strategy is given.

    Raises:
        UsageError: a setting that is given twice.
    """
    found = {field: value for field, value in values.items() if not field.startswith(SHORTCUT)}
    short = {field.removeprefix(SHORTCUT): v for field, v in values.items() if field.startswith(SHORTCUT)}
    if not short:
        return found
    words = [word.strip() for word in str(found.get("strategy") or named).split("+") if word.strip()]
    for name, value in short.items():
        setting = str(STRATEGIES.card(name).facts["shortcut"])
        if {f"{SETTINGS}{name}.{setting}", SETTINGS + setting} & found.keys() and name in words:
            raise UsageError(f"--{name.replace('_', '-')} and the setting {setting} are one: give one of them.")
        found[f"{SETTINGS}{name}.{setting}"] = value
    found["strategy"] = "+".join([*words, *(name for name in short if name not in words)])
    return found
