"""`train(model, data, method="lora", epochs=2, rank=16)`: a call's words and rows as the spec of a run."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.core import ConfigError, UnknownName, UsageError, fields_of, near
from luthier.core.other_names import answer
from luthier.data.rows import rows_of
from luthier.runs import durable
from luthier.runs.spec import RunSpec
from luthier.surgery.compose import setting_names
from luthier.training import STRATEGIES

__all__ = ["spec_of"]

PARTS = ("data", "optim", "batch", "eval", "checkpoint")


def spec_of(model: Any, data: Any, given: Mapping[str, Any]) -> RunSpec:
    """The spec that a call asks for.

    Args:
        model: a folder, sample:NAME or a hub name.
        data: a file, sample:NAME or a hub name; or rows: a DataFrame, a data set of `datasets`, a list of dictionaries.
        given: fields of the run under the names of the command line with `_` for `-` (epochs, lr, batch, text), and
            settings of the method and the strategy (rank).

    Raises:
        UsageError, ConfigError, UnknownName: a value that cannot work, or no rows.
    """
    if not isinstance(model, str | Path):
        raise UsageError(
            f"train: model is {type(model).__name__}; it takes a name: a folder, sample:NAME, or a hub name. A model "
            "that is loaded can be tuned in a loop of one's own: luthier.attach."
        )
    if data is None:
        raise UsageError(
            "train: no rows to learn from. Give data: a file, sample:NAME, a DataFrame, or a list of rows."
        )
    homes = _homes()
    given = _spelt_out(given)
    if given.get("strategy") is None:
        _refuse_unknown(given, homes, setting_names(given.get("method", "lora")))
    values: dict[str, Any] = {"model": str(model), "data": {}, "settings": {}}
    for name, value in given.items():
        part, _, field = homes.get(name, f"settings.{name}").rpartition(".")
        if name in PARTS and not isinstance(value, int | float | str):
            values[name] = value
        elif part:
            inner = values.setdefault(part, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"{name}: {part} is given as a whole; set {field} in it.")
            inner[field] = value
        elif name == "settings":
            values["settings"] |= value
        else:
            values[field] = value
    source, test = _sources(data, values.get("out"))
    values["data"]["source"] = source
    if test is not None:
        values["data"].setdefault("test", test)
    return RunSpec.from_plain(values)


def _refuse_unknown(given: Mapping[str, Any], homes: Mapping[str, str], settings: Sequence[str]) -> None:
    known = [*homes, *settings]
    for name, value in given.items():
        if name.rpartition(".")[2] not in known and name not in PARTS:
            hint = answer(name, known, value) or near(name, known)
            raise UnknownName(
                f"train: {name!r} is no field of a run and no setting of the method.{hint} Settings of the method: "
                f"{', '.join(settings) or 'none'}; fields: luthier train --help, with _ for -."
            )


def _spelt_out(given: Mapping[str, Any]) -> dict[str, Any]:
    """Strategies that a call names with their main setting (class_weights="balanced"), as strategy and settings."""
    short = {c.name: str(c.facts["shortcut"]) for c in STRATEGIES.cards() if c.facts.get("shortcut")}
    found = {name: value for name, value in given.items() if name not in short}
    for name in given.keys() & short.keys():
        words = [w for w in str(found.get("strategy") or "").split("+") if w]
        found["strategy"] = "+".join([*words, *([name] if name not in words else [])])
        found["settings"] = {**found.get("settings", {}), f"{name}.{short[name]}": given[name]}
    return found


def _homes() -> dict[str, str]:
    """Name in a call -> field of the spec. A run's own fields come first, and what two parts have is of neither."""
    found: dict[str, str] = {}
    twice: set[str] = set()
    for field in fields_of(RunSpec):
        if field.name not in PARTS:
            continue
        for inner in fields_of(field.type):
            name = (inner.flag or inner.name).replace("-", "_")
            twice |= {name} & found.keys()
            found[name] = f"{field.name}.{inner.name}"
    for name in twice:
        del found[name]
    return found | {f.name: f.name for f in fields_of(RunSpec) if f.name not in PARTS}


def _sources(data: Any, out: Any) -> tuple[str, str | None]:
    """Where the rows of the two halves stand; those of memory are written, since a run may have to be resumed."""
    if isinstance(data, str | Path):
        return str(data), None
    folder = Path(out).parent if out is not None else Path("runs")
    if hasattr(data, "keys") and "train" in data.keys():  # noqa: SIM118  # a DatasetDict, or a dictionary of halves
        test = next((name for name in ("test", "validation") if name in data.keys()), None)  # noqa: SIM118
        return _written(data["train"], folder), None if test is None else _written(data[test], folder)
    return _written(data, folder), None


def _written(data: Any, folder: Path) -> str:
    rows: Sequence[Mapping[str, Any]] = rows_of(data)
    lines = [json.dumps({str(k): _value(v) for k, v in row.items()}, ensure_ascii=False) for row in rows]
    content = ("\n".join(lines) + "\n").encode()
    path = folder / f"rows-{hashlib.sha256(content).hexdigest()[:12]}.jsonl"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        durable.write_bytes(path, content)
    return str(path)


def _value(value: Any) -> Any:
    """One cell as JSON has it; pandas writes a missing one as NaN."""
    if hasattr(value, "tolist"):  # of numpy
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): _value(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_value(v) for v in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
