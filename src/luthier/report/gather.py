"""From the folders that a user names to what a page can tell of them: runs, what may be said of them, the command."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from luthier.comparison import Comparison, Costs, clusters
from luthier.comparison.verdict import judge
from luthier.core import ConfigError, LuthierError, build, fields_of, plain, several
from luthier.report.read import Run, read_json, read_run
from luthier.report.words import of_folds, of_one, of_several
from luthier.runs.spec import RunSpec

__all__ = ["Story", "command_of", "gather", "names_of", "runs_in"]

DEPTH = 4
"""Folders below a named one in which runs are looked for."""


@dataclass(frozen=True, kw_only=True)
class Story:
    """What a page tells.

    Attributes:
        comparison: what was judged, by `luthier compare` or here of runs on the same held-out rows; its `runs` holds
            names of `runs`.
        commands: what makes all this again, one line each.
    """

    title: str
    findings: tuple[str, ...]
    runs: tuple[Run, ...]
    comparison: Comparison | None
    commands: tuple[str, ...]

    def of(self, method: str) -> list[Run]:
        """The runs of one method, by seed."""
        return [run for run in self.runs if run.method == method]

    @property
    def methods(self) -> list[str]:
        """The methods: best first where they were judged, then the others as they come."""
        judged = [s.name for s in self.comparison.standings] if self.comparison is not None else []
        return list(dict.fromkeys([*judged, *(run.method for run in self.runs)]))


def gather(paths: Sequence[Path | str]) -> Story:
    """Read runs, or the comparison, in the named folders.

    Raises:
        ConfigError: a folder is not there, or holds no run.
        IntegrityError: comparison.json cannot be read.
    """
    folders = [Path(path) for path in paths]
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder}: is no folder. Name the folder of a run or of a comparison.")
    if len(folders) == 1 and (folders[0] / "comparison.json").is_file():
        return _of_comparison(folders[0])
    found = list(dict.fromkeys(run for folder in folders for run in runs_in(folder)))
    if not found:
        where = str(folders[0]) if len(folders) == 1 else "these folders"
        raise ConfigError(f"{where}: no run is in it. Name what `luthier train` or `luthier compare` made.")
    names = names_of(found)
    runs = [read_run(path, names[path]) for path in found]
    if len(runs) == 1:
        run = runs[0]
        title = f"{_end(str(run.spec.get('model', '?')))} on {_end(run.data)}: {run.method}"
        return Story(
            title=title, findings=of_one(run), runs=(run,), comparison=None, commands=tuple(_commands(runs))
        )  # fmt: skip
    runs = _renamed(runs)
    if len(folders) == 1 and (folders[0] / "cells").is_dir():
        return _titled(runs, None, ("This comparison has no result yet: the same `luthier compare` goes on with it.",))
    if len(folders) == 1 and (folders[0] / "cv.json").is_file():
        told, wrong = read_json(folders[0] / "cv.json")
        return _titled(runs, None, of_folds(told if isinstance(told, dict) else {}, wrong))
    judged = _judged(runs)
    return _titled(runs, judged, judged.findings if judged is not None else of_several(runs))


def command_of(spec: Mapping[str, Any]) -> list[str]:
    """The words after `luthier train` that ask for a run as this one; what luthier chose itself is left out.

    >>> " ".join(command_of({"model": "m", "data": {"source": "rows.csv"}, "steps": 9, "optim": {"lr": 0.01}}))
    'm --data rows.csv --method lora --steps 9 --set optim.lr=0.01'
    """
    words = [str(spec["model"]), "--data", str(spec["data"]["source"])]
    words += ["--method", str(spec.get("method", RunSpec(model="", data={"source": ""}).method))]  # type: ignore[arg-type]
    usual = _flat(plain(RunSpec.from_plain({"model": "m", "data": {"source": "d"}})))
    switches = {fact.name for fact in fields_of(RunSpec) if fact.type is bool}
    left_out = {"model", "data.source", "method", "out", "chosen", *spec.get("chosen", ())}
    more = []
    given = _flat(spec)
    for name in usual:
        value = given.get(name)
        if name in left_out or value is None or value == usual[name]:
            continue
        if "." in name:
            more += ["--set", f"{name}={_word(value)}"]
        elif name in switches:
            words.append(f"--{'' if value else 'no-'}{name.replace('_', '-')}")
        else:
            words += [f"--{name.replace('_', '-')}", _word(value)]
    for name, value in spec.get("settings", {}).items():
        more += ["--set", f"{name}={_word(value)}"]
    return [*words, *more]


# --- comparisons


def _of_comparison(folder: Path) -> Story:
    path = folder / "comparison.json"
    try:
        found = build(Comparison, json.loads(path.read_bytes()), str(path))
    except (OSError, ValueError, TypeError, LuthierError) as error:
        raise ConfigError(
            f"{path}: is no comparison that this version reads ({error}). Call `luthier compare` again with --out "
            f"{folder}: nothing that is finished is computed again."
        ) from error
    cells = {name: [folder / cell for cell in cells] for name, cells in found.runs.items()}
    if not cells:  # written before comparisons named their runs
        for cell in sorted((folder / "cells").iterdir()) if (folder / "cells").is_dir() else ():
            if (cell / "run.json").is_file():
                cells.setdefault(read_run(cell, "").method, []).append(cell)
    runs = [
        read_run(cell, cell.name, method, found.failed.get(method, "") if not _finished(cell) else "")
        for method, own in cells.items()
        for cell in own
    ]
    found = build(Comparison, {**plain(found), "runs": {m: [c.name for c in own] for m, own in cells.items()}})
    told = next((run.spec for run in runs if run.spec), None)
    commands = [] if told is None else [_compare_command(found, told, folder)]
    gone = [run.name for run in runs if run.state in ("deleted", "unreadable")]
    more = [
        f"{several(len(gone), 'run')} of {len(runs)} cannot be read any more; what the comparison said of them stands "
        "here, their curves and answers do not."
    ] if gone else []  # fmt: skip
    return Story(
        title=_title(runs, found), findings=(*found.findings, *more), runs=tuple(runs), comparison=found,
        commands=tuple(commands),
    )  # fmt: skip


def _finished(cell: Path) -> bool:
    return (cell / "record.json").is_file()


def _compare_command(found: Comparison, spec: dict[str, Any], folder: Path) -> str:
    searched = next((one for rates in (found.rates, *found.fold_rates) for one in rates.values()), None)
    given = found.race.given if found.race is not None else searched.given if searched is not None else None
    if given is not None:
        lr, head = given
        spec = {**spec, "optim": {**spec["optim"], "lr": lr, "head_lr": head}}
    if found.folds:
        spec = {**spec, "data": {**spec["data"], "fold": None}}
    methods = dict.fromkeys([*found.runs, *found.failed])  # one whose every rate failed has no run, and was asked for
    if found.race is not None:  # of which only the winner has runs
        methods = dict.fromkeys(found.race.methods)
    words = command_of({**spec, "method": ",".join(methods) or "?", "settings": {}, "seed": 0})
    words += ["--seeds", str(len(found.seeds)), "--metric", found.metric]
    words += ["--cv", str(found.folds)] if found.folds else []
    words += ["--race"] if found.race is not None else []
    budget = _budget_words(found)
    words += ["--budget", ",".join(budget)] if budget else []
    if found.race is not None and found.race.rates is not None:
        words += ["--tune-lr", str(found.race.rates)]
    if searched is not None:
        words += ["--tune-lr", str(len(searched.rates))]
        words += ["--search", searched.search] if searched.search != "grid" else []
    if found.margin_given:
        words += ["--margin", f"{found.margin:g}"]
    return shlex.join(["luthier", "compare", *words, "--out", str(folder)])


def _budget_words(found: Comparison) -> list[str]:
    """As `budget_of` reads them: the very numbers, since a race goes on only with those."""
    race, words = found.race, []
    if race is not None and race.minutes is not None:
        words.append(f"minutes={repr(race.minutes).removesuffix('.0')}")
    if race is not None and race.memory is not None:
        words.append(f"memory={Decimal(race.memory).scaleb(-9).normalize():f}GB")
    return words + ([f"params={found.params}"] if found.params is not None else [])


def _judged(runs: Sequence[Run]) -> Comparison | None:
    """Runs that answered the same held-out rows, judged as a comparison; None where they did not."""
    whole = [run for run in runs if run.record is not None and run.answers is not None]
    if len(whole) < 2 or not all((run.quality or {}).get("confusion") for run in whole):
        return None
    answers = [run.answers for run in whole if run.answers is not None]
    first = answers[0]
    if any(a.places != first.places or a.wanted != first.wanted for a in answers):
        return None
    grouped: dict[str, list[Run]] = {}
    for run in whole:
        grouped.setdefault(run.method, []).append(run)
    seeds = {tuple(run.seed for run in own) for own in grouped.values()}
    near = clusters(first.texts)
    if len(seeds) != 1 or not near.any():  # rows that are all near copies of one say nothing
        return None
    numbers: dict[str, int] = {}
    wanted = np.array([numbers.setdefault(label, len(numbers)) for label in first.wanted])
    said = {id(r): [numbers.setdefault(s, len(numbers)) for s in r.answers.said] for r in whole if r.answers}
    found = judge(
        list(grouped), np.array([[said[id(r)] for r in own] for own in grouped.values()]), wanted,
        near, seeds=seeds.pop(), metric="accuracy", margin=None,
        costs=[_costs(own) for own in grouped.values()], baselines=_beside(whole, wanted, numbers),
        failed={run.name: run.why or run.state for run in runs if run.record is None},
    )  # fmt: skip
    return build(Comparison, {**plain(found), "runs": {m: [r.name for r in own] for m, own in grouped.items()}})


def _beside(runs: Sequence[Run], wanted: Any, numbers: dict[str, int]) -> dict[str, Any]:
    answer = str((runs[0].quality or {}).get("baseline_answer", ""))
    return {f"always answering {answer!r}": np.full(len(wanted), numbers[answer])} if answer in numbers else {}


def _costs(runs: Sequence[Run]) -> Costs:
    records = [run.record for run in runs if run.record is not None]
    return Costs(
        trained=records[0].trained, seconds=float(np.mean([r.seconds for r in records])),
        peak_bytes=max((r.peak_bytes for r in records if r.peak_bytes is not None), default=None),
        stored_bytes=records[0].stored,
    )  # fmt: skip


# --- runs


def runs_in(folder: Path, depth: int = DEPTH) -> Iterable[Path]:
    if (folder / "run.json").is_file():
        yield folder
    elif depth:
        for below in sorted(p for p in folder.iterdir() if p.is_dir() and not p.is_symlink()):
            if not below.name.startswith("."):
                yield from runs_in(below, depth - 1)


def names_of(paths: Sequence[Path]) -> dict[Path, str]:
    """The last part of each path, and as many before it as tell them apart."""
    for parts in range(1, 40):
        names = {path: "/".join(path.parts[-parts:]) for path in paths}
        if len(set(names.values())) == len(paths):
            return names
    return {path: str(path) for path in paths}


def _renamed(runs: Sequence[Run]) -> list[Run]:
    """Runs whose charts tell apart what differs: those that are alike but for their seed keep one name of a method."""
    kinds: dict[str, list[Run]] = {}
    for run in runs:
        spec = {k: v for k, v in run.spec.items() if k not in ("seed", "out", "chosen", "force")}
        kinds.setdefault(json.dumps(spec, sort_keys=True, default=str) if spec else run.name, []).append(run)
    shown = []
    for own in kinds.values():
        settings = own[0].spec.get("settings", {})
        shown.append(":".join([own[0].method, *(f"{k}={_word(v)}" for k, v in sorted(settings.items()))]))
    plainly = [own[0].method for own in kinds.values()]
    renamed: dict[str, str] = {}
    for own, said in zip(kinds.values(), shown, strict=True):
        method = own[0].method
        if plainly.count(method) > 1:
            method = said if shown.count(said) == 1 else own[0].name
        renamed |= {run.name: method for run in own}
    return [Run(**{**vars(run), "method": renamed[run.name]}) for run in runs]


def _titled(runs: Sequence[Run], judged: Comparison | None, findings: Sequence[str]) -> Story:
    return Story(
        title=_title(runs, judged), findings=tuple(findings), runs=tuple(runs), comparison=judged,
        commands=tuple(_commands(runs)),
    )  # fmt: skip


def _title(runs: Sequence[Run], judged: Comparison | None) -> str:
    """Model and data where all have the same, and how many there are."""
    models = {_end(str(run.spec["model"])) for run in runs if run.spec}
    data = {_end(run.data) for run in runs if run.spec}
    what = f"{models.pop()} on {data.pop()}" if len(models) == len(data) == 1 else "Runs"
    methods = len({run.method for run in runs})
    seeds = len(judged.seeds) if judged is not None else 0
    return f"{what}: {several(methods, 'method')}, {several(seeds, 'seed') if seeds else several(len(runs), 'run')}"


def _commands(runs: Sequence[Run]) -> Iterable[str]:
    for run in runs:
        if run.spec:
            yield shlex.join(["luthier", "train", *command_of(run.spec)])


def _end(name: str) -> str:
    """The last part of a path or a sample's name."""
    return name.rstrip("/").rpartition("/")[2].removeprefix("sample:") or name


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
