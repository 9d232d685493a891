"""The tables of a report, as rows of plain cells: the page, Markdown and sheets show the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from luthier.core import human_bytes, human_count, human_seconds
from luthier.report.gather import Story
from luthier.report.numbers import confusion_of, forecast_rows
from luthier.report.read import Run

__all__ = ["Cell", "Table", "tables_of"]

MOST_CLASSES = 40


@dataclass(frozen=True)
class Cell:
    """What is shown, the number it is sorted by where it is one, and the run it leads to."""

    shown: str
    value: float | int | None = None
    run: str = ""


@dataclass(frozen=True)
class Table:
    """One table. `key` names it in the page; `note` stands below it; the first column heads the rows."""

    key: str
    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


def tables_of(story: Story) -> list[Table]:
    """Every table that has rows."""
    made = [_methods(story), _folds(story), _runs(story), _flips(story), _classes(story), _mistakes(story),
            _forecast(story), _environment(story)]  # fmt: skip
    return [table for table in made if table is not None and table.rows]


def _methods(story: Story) -> Table | None:
    found = story.comparison
    if found is None:
        return None
    rows: list[tuple[Cell, ...]] = []
    for s in found.standings:
        gap = s.difference
        rows.append((
            Cell(s.name), _number(s.score, 4), Cell(f"{s.low:.3f} to {s.high:.3f}", s.low), Cell(s.word),
            _number(gap.value, 4, "+") if gap else Cell("", 0.0),
            Cell(f"{gap.low:+.3f} to {gap.high:+.3f}", gap.low) if gap else Cell(""),
            _chance(s.p) if gap else Cell(""), Cell(human_count(s.costs.trained), s.costs.trained),
            Cell(human_seconds(s.costs.seconds), s.costs.seconds), _bytes(s.costs.peak_bytes),
            _bytes(s.costs.stored_bytes), _number(s.calibration_error, 3), _number(s.calibrated_calibration_error, 3),
        ))  # fmt: skip
    rows += [(Cell(name), Cell("failed"), Cell(""), Cell(why), *[Cell("")] * 9) for name, why in found.failed.items()]
    rows += [
        (Cell(name), _number(v, 4), Cell(""), Cell("baseline"), *[Cell("")] * 9) for name, v in found.baselines.items()
    ]
    metric = found.metric.replace("_", " ")
    head = (
        "method", metric, "95 % interval", "against the best", "difference", "its 95 % interval", "p, corrected",
        "trained", "time", "peak memory", "stored", "calibration error", "at a fitted temperature",
    )  # fmt: skip
    note = (
        f"Means over the runs of each method, which stand one by one under Runs; {found.rows} held-out rows. A tie is "
        f"a difference shown to be smaller than {found.margin:.3f}. Trained numbers are those beside the head."
    )
    return Table("methods", "Methods, best first", head, tuple(rows), note)


def _folds(story: Story) -> Table | None:
    found = story.comparison
    if found is None or not found.folds:
        return None
    head = ("method", *(f"fold {number}" for number in range(1, found.folds + 1)))
    rows = tuple((Cell(s.name), *(_number(score, 4) for score in s.fold_scores)) for s in found.standings)
    metric = found.metric.replace("_", " ")
    note = f"{metric}, means over seeds. Each row is in one fold, and was answered by runs that had not learnt it."
    return Table("folds", "Fold by fold", head, rows, note)


def _runs(story: Story) -> Table:
    scores = list(dict.fromkeys(name for run in story.runs if run.record for name in run.record.scores))
    head = ("run", "method", "seed", "state", *(s.replace("_", " ") for s in scores), "trained", "time", "peak memory",
            "stored", "learnt from")  # fmt: skip
    rows = []
    for run in story.runs:
        record = run.record
        state = run.state if not run.why else f"{run.state}: {run.why}"
        told = [_number(record.scores.get(s) if record else None, 4) for s in scores]
        rows.append((
            Cell(run.name, run=run.name), Cell(run.method), Cell(str(run.seed), run.seed), Cell(state), *told,
            Cell(human_count(record.trained), record.trained) if record else Cell(""),
            Cell(human_seconds(record.seconds), record.seconds) if record else Cell(""),
            _bytes(record.peak_bytes if record else None), _bytes(record.stored if record else None), Cell(run.data),
        ))  # fmt: skip
    return Table("runs", "Runs", head, tuple(rows), "Each is a folder of its own; its record.json holds these numbers.")


def _flips(story: Story) -> Table | None:
    found = story.comparison
    if found is None or not found.standings:
        return None
    best = found.standings[0].name
    rows = tuple(
        (
            Cell(s.name), Cell(str(seed), seed), Cell(str(lost), lost), Cell(str(won), won), _chance(p),
            _run_cell(story, s.name, i),
        )
        for s in found.standings
        for i, (seed, (lost, won), p) in enumerate(zip(found.seeds, s.flips, s.mcnemar, strict=False))
    )  # fmt: skip
    head = ("method", "seed", f"only {best} is right", "only it is right", "p (McNemar, exact)", "run")
    return Table("flips", f"Row by row against {best}", head, rows)


def _classes(story: Story) -> Table | None:
    own = {m: [r for r in story.of(m) if (r.quality or {}).get("classes")] for m in story.methods}
    methods = [m for m in story.methods if own[m]]
    if not methods:
        return None
    by_run = {
        run.name: {c["name"]: c for c in run.quality["classes"]} for m in methods for run in own[m] if run.quality
    }
    first = next(iter(by_run.values()))
    names = sorted(first, key=lambda n: -first[n]["rows"])
    rows = []
    for name in names[:MOST_CLASSES]:
        cells = [Cell(name), Cell(str(first[name]["rows"]), first[name]["rows"])]
        cells.append(Cell(str(first[name]["learnt"]), first[name]["learnt"]))
        for m in methods:
            values = [by_run[run.name][name]["f1"] for run in own[m] if name in by_run[run.name]]
            cells.append(_number(sum(values) / len(values) if values else None, 2))
        rows.append(tuple(cells))
    left = len(names) - len(rows)
    note = "F1, the mean over the runs of a method." + (
        f" The {left} classes with the fewest rows are left out; quality.json of each run has all." if left else ""
    )
    head = ("class", "held-out rows", "rows learnt from", *methods)
    return Table("classes", "Class by class", head, tuple(rows), note)


def _mistakes(story: Story) -> Table | None:
    rows = []
    for method in story.methods:
        made = confusion_of(story.of(method))
        for wanted, said, n, of in made.worst() if made is not None else ():
            rows.append((Cell(method), Cell(wanted), Cell(said), Cell(str(n), n), Cell(str(of), of)))
    head = ("method", "wanted", "answered", "rows", "of")
    note = "The five largest of each method, its runs taken together."
    return Table("mistakes", "What is mixed up most", head, tuple(rows), note)


def _forecast(story: Story) -> Table | None:
    parts = forecast_rows(story)
    names = list(dict.fromkeys(p.part for p in parts))
    by_run = {(p.run, p.part): p for p in parts}
    rows = []
    for run in story.runs:
        if run.record is None:
            continue
        cells = [Cell(run.name, run=run.name)]
        for name in names:
            one = by_run.get((run.name, name))
            cells += [_bytes(one.forecast if one else None), _bytes(one.measured if one else None)]
        rest = [run.record.memory.get(p) for p in ("activations", "program", "other")]
        rows.append((*cells, *map(_bytes, rest), _bytes(run.record.peak_bytes)))
    head = ["run"]
    for name in names:
        head += [f"{name}, forecast", f"{name}, counted"]
    note = (
        "Forecast before the first step, from the model's structure; counted while the run trained. Activations and "
        "what the program takes are forecast by `luthier plan`, and checked by `luthier plan --check`."
    )
    return Table("forecast", "Memory: forecast and counted", (*head, "activations", "program", "other", "peak"),
                 tuple(rows), note)  # fmt: skip


def _environment(story: Story) -> Table | None:
    whole = [run for run in story.runs if run.record is not None]
    names = list(dict.fromkeys(name for run in whole if run.record for name in run.record.environment))
    rows = []
    for name in names:
        values: dict[str, list[Run]] = {}
        for run in whole:
            values.setdefault(str(run.record.environment.get(name, "")) if run.record else "", []).append(run)
        for value, own in values.items():
            which = "all runs" if len(values) == 1 else ", ".join(run.name for run in own)
            rows.append((Cell(name), Cell(value), Cell(which)))
    return Table("environment", "Environment", ("what", "value", "of"), tuple(rows))


def _run_cell(story: Story, method: str, number: int) -> Cell:
    own: Sequence[str] = story.comparison.runs.get(method, ()) if story.comparison is not None else ()
    if story.comparison is not None and story.comparison.folds:
        return Cell("one of each fold")
    return Cell(own[number], run=own[number]) if number < len(own) else Cell("")


def _number(value: Any, digits: int, sign: str = "") -> Cell:
    """A number as it is read; nothing where it is none."""
    return Cell(f"{value:{sign}.{digits}f}", value) if isinstance(value, int | float) else Cell("")


def _chance(p: float) -> Cell:
    return Cell(f"{p:.4f}" if p >= 0.0001 else "<0.0001", p)


def _bytes(value: int | None) -> Cell:
    return Cell("") if value is None else Cell(human_bytes(value), value)
