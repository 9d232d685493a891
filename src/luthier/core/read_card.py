"""Reading a card from a file's syntax tree: no import, so a listing needs no torch and runs nothing.

A file registers a class of its own, or a preset: another entry with other defaults.

    @METHODS.register("lora", family=..., paper=...)        METHODS.preset("rslora", of="lora", family=..., paper=...,
    class LoRA(PerSite): ...                                               scaling="root")
"""

import ast
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from luthier.core.card import SUM_FACTS, Card, Setting
from luthier.core.errors import ConfigError, UnknownName

__all__ = ["Preset", "as_card", "read_card", "registers"]

_PRESET_FACTS = ("of", "family", "paper")
_OURS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Preset:
    """What a preset's file says; `as_card` makes its card from those of the entries it names."""

    name: str
    of: str
    facts: dict[str, Any]
    values: dict[str, tuple[Any, str]]  # setting or class fact -> its value, and how the file writes it
    page: str
    path: Path


def _tree(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"), str(path))
    except SyntaxError as error:
        raise ConfigError(f"{path}:{error.lineno}: {error.msg}. Mend the file, or take it off the shelf.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: no UTF-8 at byte {error.start}. Save the file as UTF-8.") from error


def _calls(tree: ast.Module) -> list[tuple[ast.Call, ast.ClassDef | None]]:
    """Every `X.register(...)` above a class and every `X.preset(...)` of a file, in order."""
    found: list[tuple[ast.Call, ast.ClassDef | None]] = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found += [(d, node) for d in node.decorator_list if isinstance(d, ast.Call) and _called(d) == "register"]
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and _called(node.value) == "preset":
            found.append((node.value, None))
    return found


def _called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else ""


def registers(path: Path, registry: str) -> bool:
    """Whether a file puts something into the catalogue that is called `registry`, such as METHODS."""
    owners = (call.func.value for call, _ in _calls(_tree(path)) if isinstance(call.func, ast.Attribute))
    return any(isinstance(owner, ast.Name) and owner.id == registry for owner in owners)


def read_card(path: Path) -> Card | Preset:
    """What a file registers: the card of its class, or the preset.

    Raises:
        UnknownName: the file registers nothing.
        ConfigError: its text is no Python, or a value that must be written out is computed.
    """
    tree = _tree(path)
    page = ast.get_docstring(tree) or ""
    for call, node in _calls(tree):
        name = ast.literal_eval(call.args[0])
        if node is None:
            return _preset(name, call, page, path)
        constants, settings = _with_bases(node, tree)
        facts = {**constants, **{k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}}
        return Card(
            name=name,
            family=str(facts.get("family", path.parent.name)),
            paper=str(facts.get("paper", "")),
            title=_title(page),
            path=str(path),
            mergeable=bool(facts.get("mergeable", False)),
            starts_at_base=bool(facts.get("starts_at_base", True)),
            page=page,
            facts=facts,
            settings=tuple(settings),
        )
    raise UnknownName(
        f"{path}: no class in this file is registered; decorate one with @METHODS.register({path.stem!r})."
    )


def as_card(preset: Preset, bases: dict[str, Card]) -> Card:
    """The card of a preset of one entry, or of a sum of several, whose settings are named `lora.rank`.

    Raises:
        UnknownName: it names a setting that its base does not have.
    """
    one = next(iter(bases.values())) if len(bases) == 1 else None
    known = {
        (s.name if one else f"{name}.{s.name}"): replace(s, name=s.name if one else f"{name}.{s.name}")
        for name, card in bases.items()
        for s in card.settings
    }
    slowest = min(bases.values(), key=_rate)
    rates = {"default_lr": _rate(slowest), "default_head_lr": slowest.facts.get("default_head_lr")}
    facts = dict(one.facts) if one else rates
    for name, (value, text) in preset.values.items():
        if name in known:
            known[name] = replace(known[name], default=text)
        elif name in SUM_FACTS or (one and "." not in name):
            facts[name] = value
        else:
            raise UnknownName(f"{preset.path}: {preset.of} has no setting {name!r}. It has {', '.join(known)}.")
    merges, starts = (all(getattr(c, fact) for c in bases.values()) for fact in ("mergeable", "starts_at_base"))
    return Card(
        name=preset.name,
        family=str(preset.facts.get("family", preset.path.parent.name)),
        paper=str(preset.facts.get("paper", "")),
        title=_title(preset.page),
        path=str(preset.path),
        mergeable=bool(facts.get("mergeable", merges)),
        starts_at_base=bool(facts.get("starts_at_base", starts)),
        page=preset.page,
        facts={**facts, **preset.facts},
        settings=tuple(known.values()),
        of=preset.of,
    )


def _rate(card: Card) -> float:
    rate = card.facts.get("default_lr", 1e-3)
    return rate if isinstance(rate, float) else 1e-3


def _preset(name: str, call: ast.Call, page: str, path: Path) -> Preset:
    given: dict[str, ast.expr] = {}
    for keyword in call.keywords:
        if keyword.arg is not None:
            given[keyword.arg] = keyword.value
        elif isinstance(keyword.value, ast.Dict):  # **{"lora.rank": 4}: a name with a dot is no keyword
            given |= {
                ast.literal_eval(k): v for k, v in zip(keyword.value.keys, keyword.value.values, strict=True) if k
            }
    values = {}
    for setting, node in given.items():
        try:
            values[setting] = (ast.literal_eval(node), ast.unparse(node))
        except ValueError:
            raise ConfigError(
                f"{path}:{node.lineno}: {setting}={ast.unparse(node)} is computed. Write the value out: the listing "
                "reads it without running the file."
            ) from None
    facts = {n: values.pop(n)[0] for n in _PRESET_FACTS if n in values}
    return Preset(name, str(facts.get("of", "")), facts, values, page, path)


def _title(page: str) -> str:
    return page.split("\n", 1)[0].rstrip(".")


def _assigned(tree: ast.Module) -> dict[str, ast.expr]:
    """The constants of a file, by name: a setting's default may be one of them, and its page shows the value."""
    return {
        target.id: item.value
        for item in tree.body
        if isinstance(item, ast.Assign)
        for target in item.targets
        if isinstance(target, ast.Name)
    }


def _with_bases(node: ast.ClassDef, tree: ast.Module) -> tuple[dict[str, Any], list[Setting]]:
    """Class facts and settings, with those of bases that are dataclasses of ours: entries may share some settings."""
    constants: dict[str, Any] = {}
    settings: dict[str, Setting] = {}
    for base in node.bases:
        found = _base_of(base.id, tree) if isinstance(base, ast.Name) else None
        if found is not None:
            facts, shared = _with_bases(*found)
            constants |= facts
            settings |= {one.name: one for one in shared}
    facts, own = _fields(node, _assigned(tree))
    return constants | facts, list((settings | {one.name: one for one in own}).values())


def _base_of(name: str, tree: ast.Module) -> tuple[ast.ClassDef, ast.Module] | None:
    """The dataclass of that name that a file holds or imports from our package, and the tree that it stands in."""
    found = _dataclass_of(name, tree)
    if found is not None:
        return found, tree
    modules = [
        item.module
        for item in tree.body
        if isinstance(item, ast.ImportFrom) and any((one.asname or one.name) == name for one in item.names)
    ]
    if not modules or not (modules[0] or "").startswith(f"{_OURS.name}."):
        return None
    path = _OURS.joinpath(*str(modules[0]).split(".")[1:]).with_suffix(".py")
    if not path.is_file():
        return None
    theirs = _tree(path)
    found = _dataclass_of(name, theirs)
    return None if found is None else (found, theirs)


def _dataclass_of(name: str, tree: ast.Module) -> ast.ClassDef | None:
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node if any("dataclass" in ast.unparse(d) for d in node.decorator_list) else None
    return None


def _fields(node: ast.ClassDef, assigned: dict[str, ast.expr]) -> tuple[dict[str, Any], list[Setting]]:
    constants: dict[str, Any] = {}
    settings: list[Setting] = []
    for item in node.body:
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        text = ast.unparse(item.annotation)
        value = assigned.get(item.value.id, item.value) if isinstance(item.value, ast.Name) else item.value
        default = ast.unparse(value) if value is not None else ""
        if text.startswith("ClassVar"):
            try:
                constants[item.target.id] = ast.literal_eval(item.value) if item.value is not None else None
            except ValueError:
                constants[item.target.id] = default
        elif isinstance(item.annotation, ast.Subscript) and text.startswith("Annotated"):
            parts = item.annotation.slice
            assert isinstance(parts, ast.Tuple)
            meaning = next((p.value for p in parts.elts[1:] if isinstance(p, ast.Constant)), "")
            settings.append(
                Setting(name=item.target.id, type=ast.unparse(parts.elts[0]), default=default, meaning=str(meaning))
            )
    return constants, settings
