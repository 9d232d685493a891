"""Frozen dataclasses that come from plain values and go back to them.

A field is written once, with its type, its meaning, its limits and its default:

    rank: Annotated[int, "width of the two thin matrices", at_least(1)] = 8

`build` makes the object from plain values (of a TOML file, of JSON, of `--set rank=16`) and complains about everything
that is wrong at once; `plain` is its inverse. The constructor of a class that is `checked` does the same.
"""

import dataclasses
import functools
import json
import math
import numbers
import os
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from luthier.core import other_names
from luthier.core.errors import ConfigError, UnknownName, near

__all__ = [
    "FieldFacts",
    "Flag",
    "Limit",
    "above",
    "at_least",
    "between",
    "build",
    "checked",
    "fields_of",
    "plain",
    "read_word",
    "replace_word",
]

T = TypeVar("T")
C = TypeVar("C", bound=type)


@dataclass(frozen=True)
class Limit:
    """A range that a number must lie in; `None` leaves that side open."""

    low: float | None = None
    high: float | None = None
    open_low: bool = False

    def complaint(self, value: float) -> str | None:
        """Say what is wrong with `value`, or nothing."""
        if self.low is not None and (value <= self.low if self.open_low else value < self.low):
            return f"must be {'above' if self.open_low else 'at least'} {self.low:g}"
        if self.high is not None and value > self.high:
            return f"must be at most {self.high:g}"
        return None


def at_least(low: float) -> Limit:
    """`value >= low`."""
    return Limit(low=low)


def above(low: float) -> Limit:
    """`value > low`."""
    return Limit(low=low, open_low=True)


def between(low: float, high: float) -> Limit:
    """`low <= value <= high`."""
    return Limit(low=low, high=high)


@dataclass(frozen=True)
class Flag:
    """What the command line calls a field, where the last part of its name would say too little: `batch.size`."""

    name: str


@dataclass(frozen=True)
class Switch:
    """A second option of a field, which takes no value: it gives the field this one."""

    name: str
    value: Any
    meaning: str


@dataclass(frozen=True)
class FieldFacts:
    """What a dataclass field says of itself."""

    name: str
    type: Any
    meaning: str
    limit: Limit | None
    default: Any
    required: bool
    flag: str | None = None
    switch: Switch | None = None


def fields_of(cls: type) -> list[FieldFacts]:
    """The settings of a dataclass, in order, with meaning and limits."""
    return list(_fields_of(cls))


@functools.cache
def _fields_of(cls: type) -> tuple[FieldFacts, ...]:
    hints = get_type_hints(cls, include_extras=True)
    facts = []
    for field in dataclasses.fields(cls):
        hint, extras = hints[field.name], []
        if get_origin(hint) is Annotated:
            hint, *extras = get_args(hint)
        if field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        else:
            default = dataclasses.MISSING
        meaning = next((e for e in extras if isinstance(e, str)), "")
        limit = next((e for e in extras if isinstance(e, Limit)), None)
        flag = next((e.name for e in extras if isinstance(e, Flag)), None)
        switch = next((e for e in extras if isinstance(e, Switch)), None)
        required = default is dataclasses.MISSING
        facts.append(FieldFacts(field.name, hint, meaning, limit, default, required, flag, switch))
    return tuple(facts)


def checked(cls: C) -> C:
    """Let the constructor of a dataclass, whose fields are all named in the call, check them as `build` does.

    >>> @checked
    ... @dataclass(frozen=True, kw_only=True)
    ... class Cup:
    ...     size: Annotated[int, "in millilitres", at_least(1)] = 250
    >>> Cup(size=0)
    Traceback (most recent call last):
    luthier.core.errors.ConfigError: Cup.size: must be at least 1, got 0 (in millilitres).
    """
    made: Any = cls.__dict__.get("__init__")
    if made is None or hasattr(made, "unchecked"):
        return cls  # it is the one of a class above, which sees what it makes

    @functools.wraps(made)
    def check(self: Any, **values: Any) -> None:
        kind = type(self)
        made(self, **_ready(kind, values, _label(kind)))

    check.unchecked = made  # type: ignore[attr-defined]
    cls.__init__ = check  # type: ignore[misc]
    return cls


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Make a `cls` from plain values. All complaints are raised together.

    Args:
        cls: a dataclass whose fields are annotated with plain types, tuples, unions, Literals or other dataclasses.
        values: field name -> plain value. Words (from a command line) are read as the field's type.
        where: named in messages, such as "lora" or "spec.toml".

    Raises:
        UnknownName: a key is no field; the message offers near ones.
        ConfigError: a value has the wrong type or lies outside its limits.
    """
    ready = _ready(cls, values, where or _label(cls))
    unchecked = getattr(cls.__init__, "unchecked", None)
    if unchecked is None:
        return cls(**ready)
    made = object.__new__(cls)
    unchecked(made, **ready)
    return made


def _label(cls: type) -> str:
    """What messages call a class: its name on a shelf, where it has one that is no setting."""
    on_shelf = getattr(cls, "name", None)
    is_setting = any(f.name == "name" for f in _fields_of(cls))
    return cls.__name__ if is_setting or not isinstance(on_shelf, str) else on_shelf


def _ready(cls: type, values: Mapping[str, Any], label: str) -> dict[str, Any]:
    """The values as the fields' types.

    Raises:
        UnknownName, ConfigError: see `build`.
    """
    facts = {f.name: f for f in _fields_of(cls)}
    complaints = []
    for key in values:
        if key not in facts:
            known = ", ".join(facts) or "none"
            hint = other_names.answer(key, facts, values[key]) or near(key, list(facts))
            raise UnknownName(f"{label} has no setting {key!r}.{hint} Its settings are {known}.")
    ready: dict[str, Any] = {}
    for name, value in values.items():
        try:
            ready[name] = _convert(value, facts[name].type, f"{label}.{name}")
            limit = facts[name].limit
            numbers = ready[name] if isinstance(ready[name], tuple) else getattr(ready[name], "numbers", (ready[name],))
            for number in numbers:
                if limit is not None and isinstance(number, int | float) and not isinstance(number, bool):
                    if isinstance(number, float) and not math.isfinite(number):
                        raise ConfigError(f"{label}.{name}: got {number}; it must be a number that is finite.")
                    if complaint := limit.complaint(number):
                        raise ConfigError(f"{label}.{name}: {complaint}, got {number!r} ({facts[name].meaning}).")
        except ConfigError as error:
            complaints.append(str(error))
    for fact in facts.values():
        if fact.required and fact.name not in values:
            complaints.append(f"{label}.{fact.name}: missing; it says {fact.meaning or 'what to use'}.")
    if complaints:
        raise ConfigError("\n".join(complaints))
    return ready


def plain(value: Any) -> Any:
    """Turn a dataclass (or anything inside one) into what JSON and TOML can hold."""
    if hasattr(value, "to_text") and not isinstance(value, type):
        return value.to_text()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    return value


def read_word(word: str) -> Any:
    """Read one word of a command line as JSON where it is JSON, else as text.

    >>> read_word("16"), read_word("true"), read_word("attn.q,attn.v")
    (16, True, 'attn.q,attn.v')
    """
    try:
        return json.loads(word)
    except ValueError:
        return word


def replace_word(assignment: str) -> tuple[str, Any]:
    """Split `name=value` of a `--set` option.

    Raises:
        ConfigError: there is no `=`.
    """
    name, sign, word = assignment.partition("=")
    if not sign or not name:
        raise ConfigError(f"--set {assignment!r}: write it as name=value, for example --set rank=16.")
    return name.strip(), read_word(word.strip())


def _name_of(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(a) for a in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_name_of(a) for a in get_args(hint))
    if get_origin(hint) is tuple:
        return f"a list of {_name_of(get_args(hint)[0])}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "nothing"}.get(
        hint, getattr(hint, "says", getattr(hint, "__name__", str(hint)))
    )


def _convert(value: Any, hint: Any, label: str) -> Any:
    """Check `value` against `hint`; only conversions that lose nothing are made."""
    origin = get_origin(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        return _convert(value, get_args(hint)[0], label)
    if origin in (Union, types.UnionType):
        for option in get_args(hint):
            try:
                return _convert(value, option, label)
            except ConfigError:
                continue
    elif origin is Literal:
        if value in get_args(hint):
            return value
    elif origin is tuple:
        args = get_args(hint)
        if isinstance(value, str):
            value = [read_word(v.strip()) if args[0] is not str else v.strip() for v in value.split(",") if v.strip()]
        if isinstance(value, list | tuple):
            if len(args) == 2 and args[1] is Ellipsis:
                return tuple(_convert(v, args[0], label) for v in value)
            if len(args) == len(value):
                return tuple(_convert(v, a, label) for v, a in zip(value, args, strict=True))
        elif len(args) == 2 and args[1] is Ellipsis:
            return (_convert(value, args[0], label),)
    elif hint is float:
        if isinstance(value, numbers.Real) and not isinstance(value, bool):
            return float(value)  # numpy's too
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                pass
    elif hint is int:
        if isinstance(value, numbers.Integral) and not isinstance(value, bool):
            return int(value)
        if isinstance(value, float) and value.is_integer():
            return int(value)
    elif hasattr(hint, "from_text"):  # a type that is written in words of its own
        return hint.from_text(value, label)
    elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            return build(hint, value, label)
    elif origin is dict:
        if isinstance(value, Mapping):
            key_type, value_type = get_args(hint)
            return {_convert(k, key_type, label): _convert(v, value_type, f"{label}.{k}") for k, v in value.items()}
    elif hint is type(None):
        if value is None:
            return None
    elif hint is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    elif isinstance(hint, type) and isinstance(value, hint):
        return value
    choice = ""
    if origin is Literal and isinstance(value, str):
        choice = near(value, [str(a) for a in get_args(hint)])
    raise ConfigError(f"{label}: must be {_name_of(hint)}, got {value!r}.{choice}")
