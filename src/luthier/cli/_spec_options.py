"""The options of `luthier train`, made from the spec's own fields and from a method's settings; and back to values.

Nothing is listed here: a field of the spec is an option because it is there, with its sentence, bounds, choices and
default. No torch, and no logic of training.
"""

import dataclasses
import inspect
import os
import re
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from luthier.cli._shelf import SHELF, STRATEGIES
from luthier.core import Card, Catalogue, FieldFacts, Setting, UnknownName, UsageError, fields_of
from luthier.core.config import Limit, read_word, replace_word
from luthier.runs.spec import MAX_SPEC_BYTES, RunSpec

__all__ = [
    "Option",
    "check_names",
    "chosen_cards",
    "overlay",
    "refuse_twice",
    "setting_options",
    "settings_of",
    "spec_options",
    "values_of",
]

# A --set name that begins with one of these is a field of the run, not a setting of the method.
PARTS = tuple(fact.name for fact in fields_of(RunSpec) if dataclasses.is_dataclass(fact.type))
WHOLE = "run"
SETTINGS = "settings\0"

RUN_PANEL = "Run"


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option that stands for a field.

    Attributes:
        field: dotted name in the spec, such as `optim.lr`; a setting of the method begins with SETTINGS.
        name: without dashes, such as `lr`.
        shape: what stands for a value in the help; None for a switch.
        gives: what a switch gives the field; None, true or false.
        as_text: the word is read as `--set` reads it, because no type of the command line says what it may be.
    """

    field: str
    name: str
    panel: str
    kind: Any
    shape: str | None
    help: str
    as_text: bool = False
    choices: tuple[str, ...] = ()
    gives: Any = None

    @property
    def parameter(self) -> inspect.Parameter:
        """How typer wants to be told of it."""
        both = self.kind is bool and self.gives is None
        names = (f"--{self.name}/--no-{self.name}",) if both else (f"--{self.name}",)
        told: dict[str, Any] = {"rich_help_panel": self.panel, "help": self.help, "show_default": False}
        if self.shape is not None:
            told["metavar"] = self.shape
        if complete := self._completion():
            told["autocompletion"] = complete
        kind: Any = self.kind
        annotation = Annotated[kind | None, typer.Option(*names, **told)]
        return inspect.Parameter(self.key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)

    @property
    def key(self) -> str:
        """The option as a name of Python."""
        return "option_" + re.sub(r"\W", "_", self.field if self.gives is None else self.name)

    def _completion(self) -> Any:
        if self.choices:
            return lambda incomplete: [c for c in self.choices if c.startswith(incomplete)]
        if self.field == "method":
            return complete_method
        if self.field == "strategy":
            return complete_strategy
        if self.field in ("data.source", "data.test"):
            return complete_data
        return None


# --- options of the spec


def spec_options(spec: type) -> list[Option]:
    """Every field of the spec but the model, an argument, the settings, which the method has, and what a run notes.

    An option is called by the last part of its field (`optim.lr` is `--lr`) where only one field ends so; a field of
    the run itself keeps its name before others; the field may name another (`Flag`), and else stands with its part
    (`--batch-tokens`).
    """
    found = [
        (field, fact, panel) for field, fact, panel in _leaves(spec) if field not in ("model", "settings", "chosen")
    ]
    names = {field: fact.flag for field, fact, _ in found if fact.flag}
    names |= {field: _dashed(field) for field, fact, _ in found if "." not in field and not fact.flag}
    lasts = [field.rpartition(".")[2] for field, _, _ in found]
    for field, _, _ in found:
        last = field.rpartition(".")[2]
        unique = lasts.count(last) == 1 and _dashed(last) not in names.values()
        names.setdefault(field, _dashed(last if unique else field))
    options = []
    for field, fact, panel in found:
        options.append(_option(field, names[field] or "", fact, panel))
        if (switch := fact.switch) is not None:
            options.append(
                Option(
                    field=field, name=switch.name, panel=panel, kind=bool, shape=None, help=switch.meaning,
                    gives=switch.value,
                )
            )  # fmt: skip
    return options


def _leaves(spec: type, prefix: str = "", panel: str = RUN_PANEL) -> list[tuple[str, FieldFacts, str]]:
    found = []
    for fact in fields_of(spec):
        if dataclasses.is_dataclass(fact.type) and isinstance(fact.type, type):
            found += _leaves(fact.type, f"{fact.name}.", fact.meaning[:1].upper() + fact.meaning[1:])
        else:
            found.append((prefix + fact.name, fact, panel))
    return found


def _option(field: str, name: str, fact: FieldFacts, panel: str) -> Option:
    kinds = [k for k in _kinds(fact.type) if k is not type(None)]
    choices = tuple(str(c) for kind in kinds if get_origin(kind) is Literal for c in get_args(kind))
    first: Any = kinds[0] if len(kinds) == 1 and kinds[0] in (bool, int, float, str) else str
    if bool in kinds and first is not bool:
        choices = (*choices, "true", "false")
    if choices:
        shape = "|".join(choices)
    elif get_origin(kinds[0]) is tuple:
        shape = ",".join(_word_for(kind) for kind in get_args(kinds[0]) if kind is not Ellipsis)
    else:
        shape = _word_for(first)
    if get_origin(kinds[0]) is tuple and get_args(kinds[0]) == (str, ...):  # named once for each: --source a --source b
        return Option(
            field=field, name=name, panel=panel, kind=list[str], shape="NAME=FILE" if field == "also" else "FOLDER",
            help=f"{fact.meaning}; once for each",
        )  # fmt: skip
    return Option(
        field=field, name=name, panel=panel, kind=first, shape=None if first is bool else shape + _bounds(fact.limit),
        help=fact.meaning + _default(fact.default, name), as_text=first is str and kinds != [str] and not
        all(get_origin(kind) is Literal for kind in kinds), choices=choices,
    )  # fmt: skip


def _kinds(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _word_for(kind: Any) -> str:
    return {int: "INT", float: "NUMBER", str: "TEXT"}.get(kind, "TEXT")


def _bounds(limit: Limit | None) -> str:
    if limit is None:
        return ""
    if limit.low is not None and limit.high is not None:
        return f" {limit.low:g}..{limit.high:g}"
    return f">{'' if limit.open_low else '='}{limit.low:g}" if limit.low is not None else f"<={limit.high:g}"


def _default(value: Any, name: str) -> str:
    if value is None or value is dataclasses.MISSING or value is False:
        return ""
    if value is True:
        return f" [default: --{name}]"
    return f" [default: {','.join(map(str, value)) if isinstance(value, tuple) else value}]"


def _dashed(name: str) -> str:
    return name.replace(".", "-").replace("_", "-")


# --- options of a method and of a strategy


def chosen_cards(words: Sequence[str]) -> list[Card]:
    """What the words of a command name with --method and --strategy, before typer reads them.

    Names that nothing has are left out, and one that stands twice is taken once: `check_names` says what is wrong.
    """
    words = [*words, *_words_to_complete()]
    spec = _spec_file(words)
    cards = []
    for field, shelf in (("method", SHELF), ("strategy", STRATEGIES)):
        default = next(fact.default for fact in fields_of(RunSpec) if fact.name == field)
        names = _after(f"--{field}", words) or str(spec.get(field) or default or "")
        known = dict.fromkeys(name.strip() for name in names.split("+") if name.strip() in shelf.names())
        cards += [shelf.card(name) for name in known]
    return cards


def _after(option: str, words: Sequence[str]) -> str | None:
    for number, word in enumerate(words):
        if word == option and number + 1 < len(words):
            return words[number + 1]
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None


def _spec_file(words: Sequence[str]) -> dict[str, Any]:
    """The spec file among the words, as far as it can be read; whoever reads it in earnest says what is wrong."""
    for word in words:
        path = Path(word)
        if word.endswith(".toml") and path.is_file() and path.stat().st_size <= MAX_SPEC_BYTES:
            try:
                return tomllib.loads(path.read_text(encoding="utf-8-sig"))
            except (OSError, ValueError, RecursionError):
                return {}
    return {}


def _words_to_complete() -> list[str]:
    """What stands on the line that a shell wants to have completed."""
    return (os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or "").split()


def setting_options(cards: Sequence[Card], taken: Sequence[Option]) -> list[Option]:
    """The settings of methods and strategies as options.

    One whose name is a field of the spec, or a setting of two of the cards, stands with its owner's name:
    `--adalora-warmup`.
    """
    used = {option.name for option in taken} | {_dashed(option.field.rpartition(".")[2]) for option in taken}
    options = []
    for card in cards:
        others = {s.name for other in cards if other is not card for s in other.settings}
        for setting in card.settings:
            plain = _dashed(setting.name)
            alone = plain not in used and setting.name not in others
            options.append(_setting(card, setting, plain if alone else f"{_dashed(card.name)}-{plain}", len(cards) > 1))
    return options


def _setting(card: Card, setting: Setting, name: str, several: bool) -> Option:
    choices = tuple(re.findall(r"'([^']*)'", setting.type)) if setting.type.startswith("Literal[") else ()
    flag = setting.type == "bool"
    shape = "|".join(choices) or {"int": "INT", "float": "NUMBER"}.get(setting.type.partition(" | ")[0], "TEXT")
    if setting.type.startswith("tuple["):
        shape = "LIST"
    field = f"{SETTINGS}{card.name}.{setting.name}" if several else SETTINGS + setting.name
    default = setting.default.strip("()").replace("'", "").replace(", ", ",").rstrip(",")
    if flag:
        default = f"--{name}" if setting.default == "True" else ""
    return Option(
        field=field, name=name, panel=f"Settings of {card.name}", kind=bool if flag else str,
        shape=None if flag else shape, help=setting.meaning + (f" [default: {default}]" if default else ""),
        as_text=not flag, choices=choices,
    )  # fmt: skip


# --- from words to values


def values_of(options: Sequence[Option], words: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted field -> value, of the options that were given; `words` by the options' keys.

    Raises:
        UsageError: two options of one field.
    """
    values: dict[str, Any] = {}
    names: dict[str, str] = {}
    for option in options:
        value = words.get(option.key)
        if value is None or value == []:
            continue
        if option.field in names:
            raise UsageError(
                f"--{names[option.field]} and --{option.name} are two words for one field: give one of them."
            )
        names[option.field] = option.name
        if option.gives is not None:
            value = option.gives
        values[option.field] = read_word(value) if option.as_text and isinstance(value, str) else value
    return values


def check_names(method: str | None, *sources: str | None, strategy: str | None = None) -> None:
    """Refuse names that nothing has, in a tenth of a second: before torch is imported.

    Raises:
        UnknownName: no such method, strategy or sample; offers near ones.
        UsageError: one stands twice.
    """
    for option, words, shelf, like in (
        ("--method", method, SHELF, "lora, or lora+prefix_tuning"),
        ("--strategy", strategy, STRATEGIES, "llrd, or freelb+llrd"),
    ):
        names = [name.strip() for name in words.split("+")] if words is not None else []
        twice = next((name for name in names if name and names.count(name) > 1), None)
        if twice is not None:
            raise UsageError(f"{option} {words!r}: {twice!r} stands in it twice. Name each once.")
        for name in names:
            if not name:
                raise UnknownName(f"{option} {words!r}: a name is missing. Write one, such as {like}.")
            if "," in name and option == "--method":
                together = str(words).replace(",", "+")
                raise UnknownName(
                    f"{option} {words!r}: names several, and a run has one. `luthier compare` runs them one by one; "
                    f"{together} would be all of them together on one model."
                )
            shelf.card(name)
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
            found[SETTINGS + name] = value
    return found


def overlay(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with dotted fields put in; `None` leaves a field as it is."""
    for name, value in changes.items():
        if value is None:
            continue
        if name.startswith(SETTINGS):
            values.setdefault("settings", {})[name.removeprefix(SETTINGS)] = value
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


def refuse_twice(options: Mapping[str, Any], assignments: Mapping[str, Any]) -> None:
    """Refuse a field that an option and --set both give.

    Raises:
        UsageError: names both.
    """
    for field in sorted(set(options) & set(assignments)):
        name = field.removeprefix(SETTINGS)
        raise UsageError(
            f"{name} is given twice: by an option ({options[field]!r}) and by --set ({assignments[field]!r})."
        )


# --- completion


def complete_method(incomplete: str) -> list[str]:
    """Names of methods; after a `+`, of those that may follow."""
    return _names(SHELF, incomplete)


def complete_strategy(incomplete: str) -> list[str]:
    """The same of strategies."""
    return _names(STRATEGIES, incomplete)


def _names(shelf: Catalogue[Any], incomplete: str) -> list[str]:
    before, plus, begun = incomplete.rpartition("+")
    return [f"{before}{plus}{name}" for name in shelf.names() if name.startswith(begun)]


def complete_data(incomplete: str) -> list[str]:
    """Samples that hold rows; files are left to the shell."""
    return [name for name in _samples("data") if name.startswith(incomplete)]


def complete_model(incomplete: str) -> list[str]:
    """Samples that are models; folders are left to the shell."""
    return [name for name in _samples("model") if name.startswith(incomplete)]


def _samples(kind: str) -> list[str]:
    from luthier import samples

    return [f"{samples.PREFIX}{row['name']}" for row in samples.rows() if kind in str(row["kind"])]


def complete_setting(incomplete: str) -> list[str]:
    """`rank=` of the method that the line names, and `optim.lr=` of the run."""
    settings = [option.field.removeprefix(SETTINGS) for option in setting_options(chosen_cards(()), [])]
    fields = [option.field if "." in option.field else f"{WHOLE}.{option.field}" for option in spec_options(RunSpec)]
    return [f"{name}=" for name in [*settings, *fields] if name.startswith(incomplete)]
