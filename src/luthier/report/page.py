"""One page that holds all of itself: words, tables, charts, rows, numbers. It fetches nothing; one script may run."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from importlib import resources
from typing import Any

from luthier.__version__ import __version__
from luthier.core import plain, several
from luthier.report import charts
from luthier.report.gather import Story
from luthier.report.html import Html, coded, el, joined
from luthier.report.numbers import Disagreement, binned, confusion_of, disagreements, reliability_of
from luthier.report.tables import Cell, Table, tables_of

__all__ = ["MARK", "MOST_BYTES", "page_of"]

MARK = "<!doctype html><!-- luthier report -->"
"""How a page begins: a file that begins so may be written over."""
MOST_BYTES = 300_000
"""Of a page of up to 20 runs; rows are left out, with their number, until it is no larger."""
MOST_ROWS = 200
LEAST_ROWS = 20
MOST_LETTERS = 320
"""Of the text of a row; the run's predictions.csv has all of it."""


def page_of(story: Story) -> str:
    """The page as text. The same folders give the same bytes."""
    rows = disagreements(story)
    shown = min(len(rows), MOST_ROWS)
    fixed = _sections(story)
    most = MOST_BYTES * max(1.0, len(story.runs) / 20)
    while True:
        text = _page(story, fixed, rows, shown)
        size = len(text.encode())
        if size <= most or shown <= LEAST_ROWS:
            return text
        shown = max(LEAST_ROWS, min(shown - 5, int(shown * 0.9 * most / size)))


def _page(story: Story, fixed: Sequence[tuple[str, str, Html]], rows: Sequence[Disagreement], shown: int) -> str:
    style, script = _asset("page.css"), _asset("page.js")
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; base-uri 'none'; "
        "form-action 'none'"
    )
    head = el(
        "head", el("meta", charset="utf-8"), el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"), el("meta", name="referrer", content="no-referrer"),
        el("title", f"{story.title} - luthier report"), el("style", Html(style)),
    )  # fmt: skip
    sections = [*fixed]
    if rows:
        place = next((i for i, (key, *_) in enumerate(sections) if key == "environment"), len(sections))
        sections.insert(place, ("rows", _rows_title(story), _rows(story, rows, shown)))
    links = el("ul", *(el("li", el("a", title, href=f"#{key}")) for key, title, _ in sections))
    main = [el("section", el("h2", title), inner, id=key, aria_label=title) for key, title, inner in sections]
    body = el(
        "body", el("a", "To the findings", href="#findings", class_="skip"),
        el("header", el("p", f"luthier {__version__} report", class_="soft"), el("h1", story.title)),
        el("main", _findings(story), el("nav", links, aria_label="Sections"), *main, id="main"),
        el("script", Html(_json(_numbers(story))), type="application/json", id="numbers"), el("script", Html(script)),
    )  # fmt: skip
    return f"{MARK}\n{el('html', head, body, lang='en')}\n"


def _findings(story: Story) -> Html:
    return el("ul", *(el("li", coded(line)) for line in story.findings), class_="findings", id="findings")


def _sections(story: Story) -> list[tuple[str, str, Html]]:
    """(key, title, content) of all but the rows."""
    tables = {table.key: _table(table) for table in tables_of(story)}
    metric = story.comparison.metric.replace("_", " ") if story.comparison is not None else ""
    many = len(story.runs) > 1
    front = "Bars are 95 % intervals. The dashed line is the front: what lies under it is beaten by something cheaper."
    thinned = (
        f"Means over neighbouring steps, at most {charts.POINTS} points a run. "
        + ("Grey: all runs." if many else "") + " Point at a line for its run."
    )  # fmt: skip
    whole = "The runs of a method together. Dashed: as sure as right. Bars at the foot: how many answers."
    mixed = "The stronger the colour, the larger the share of the class."
    made: list[tuple[str, str, list[Html | None]]] = [
        ("methods", "Methods", [tables.get("methods"), tables.get("flips")]),
        ("costs", f"What {metric} costs", [_block("charts", charts.costs(story), front)]),
        ("learning", "Learning curves", [
            _block("smalls", charts.curves(story), thinned), _block("charts", charts.scores_over_steps(story), ""),
        ]),
        ("memory", "Forecast and measurement", [
            _block("charts", charts.forecasts(story), "On the dashed line, what was forecast is what was counted."),
            tables.get("forecast"),
        ]),
        ("certainty", "Certainty", [_block("smalls", charts.reliabilities(story), whole)]),
        ("classes", "Classes", [
            tables.get("classes"), _block("smalls", charts.confusions(story), mixed),
            tables.get("mistakes"),
        ]),
        ("all-runs", "Runs" if many else "The run", [tables.get("runs")]),
        ("environment", "Environment", [tables.get("environment")]),
        ("command", "The command", [_commands(story)]),
    ]  # fmt: skip
    return [(key, title, joined(*inner)) for key, title, inner in made if any(inner)]


def _block(style: str, drawn: Sequence[Html], note: str) -> Html | None:
    if not drawn:
        return None
    return joined(el("p", note, class_="soft") if note else None, el("div", *drawn, class_=style))


def _commands(story: Story) -> Html:
    return joined(
        *(el("pre", el("code", line)) for line in story.commands),
        el("p", "The run's folder holds all of its specification: luthier train FOLDER/spec.toml repeats it.",
           class_="soft"),
    )  # fmt: skip


def _table(table: Table) -> Html:
    numbers = {i for row in table.rows for i, cell in enumerate(row) if cell.value is not None}
    head = [el("th", name, scope="col", class_="n" if i in numbers else None) for i, name in enumerate(table.head)]
    rows = [el("tr", *_cells(table, row, numbers), id=_anchor(table, row)) for row in table.rows]
    drawn = el(
        "table", el("caption", table.caption), el("thead", el("tr", *head)), el("tbody", *rows), class_="sorts",
    )  # fmt: skip
    return joined(_scrolled(drawn, table.caption), el("p", coded(table.note), class_="soft") if table.note else None)


def _scrolled(table: Html, name: str) -> Html:
    return el("div", table, class_="scroll", tabindex="0", role="region", aria_label=name)


def _anchor(table: Table, row: Sequence[Cell]) -> str | None:
    return f"run-{_id(row[0].run)}" if table.key == "runs" else None


def _id(run: str) -> str:
    return hashlib.sha256(run.encode("utf-8", "surrogatepass")).hexdigest()[:10]


def _cells(table: Table, row: Sequence[Cell], numbers: set[int]) -> list[Html]:
    found = []
    for i, cell in enumerate(row):
        inner: Any = cell.shown
        if cell.run and table.key != "runs":
            inner = el("a", cell.shown, href=f"#run-{_id(cell.run)}")
        sort = None if cell.value is None or not math.isfinite(cell.value) else f"{cell.value:.10g}"
        if i == 0:
            found.append(el("th", inner, scope="row", data_v=sort))
        else:
            found.append(el("td", inner, data_v=sort, class_="n" if i in numbers else None))
    return found


# --- rows


def _rows_title(story: Story) -> str:
    return "Rows on which runs disagree" if len(story.runs) > 1 else "Rows answered wrongly"


def _rows(story: Story, rows: Sequence[Disagreement], shown: int) -> Html:
    several_runs = len(story.runs) > 1
    order = "most evenly divided" if several_runs else "surest"
    said = f"{several(len(rows), 'row')}, the {order} first."
    if shown < len(rows):
        said += f" The first {shown} stand here; predictions.csv of each run has all."
    cut = any(len(row.text) > MOST_LETTERS for row in rows[:shown])
    if cut:
        said += f" Texts are cut at {MOST_LETTERS} letters."
    numbers = {run.name: i for i, run in enumerate(story.runs)}
    short = _short_names(story)
    body = []
    for row in rows[:shown]:
        wrong = [str(numbers[name]) for answer, names in row.said if answer != row.wanted for name in names]
        text = row.text if len(row.text) <= MOST_LETTERS else f"{row.text[: MOST_LETTERS - 1]}…"
        answers: list[Any] = []
        for answer, names in row.said:
            answers += [el("br") if answers else None, el("b", answer, class_="ok" if answer == row.wanted else None)]
            if several_runs:
                answers.append(f": {short(names)}")
            elif row.sure is not None:
                answers.append(f" (sure to {row.sure:.2f})")
        body.append(
            el("tr", el("th", row.place, scope="row"), el("td", el("bdi", text), class_="t"), el("td", row.wanted),
               el("td", *answers), data_w=" ".join(wrong))
        )  # fmt: skip
    head = el("tr", *(el("th", name, scope="col") for name in ("row", "text", "wanted", "answers")))
    drawn = el("table", el("caption", "✓ marks the answer that is right"), el("thead", head), el("tbody", *body),
               class_="sorts")  # fmt: skip
    return joined(el("p", said, class_="soft"), _scrolled(drawn, _rows_title(story)))


def _short_names(story: Story) -> Any:
    """Says runs by their method, and by their seed where not all seeds of it are meant."""
    by_name = {run.name: run for run in story.runs}
    seeds = {m: [run.seed for run in story.of(m)] for m in story.methods}

    def said(names: Sequence[str]) -> str:
        own: dict[str, list[int]] = {}
        for name in names:
            own.setdefault(by_name[name].method, []).append(by_name[name].seed)
        return ", ".join(
            m if len(some) == len(seeds[m]) else f"{m} (seed{'s' * (len(some) > 1)} {', '.join(map(str, some))})"
            for m, some in own.items()
        )

    return said


# --- numbers


def _numbers(story: Story) -> dict[str, Any]:
    """All numbers of the page, each under the name of its run or of its method, which names its runs."""
    found = story.comparison
    return {
        "format": "luthier-report", "version": 1, "luthier": __version__, "title": story.title,
        "findings": list(story.findings), "commands": list(story.commands),
        "comparison": None if found is None else {k: v for k, v in plain(found).items() if k != "findings"},
        "runs": [_run(run) for run in story.runs],
        "methods": [_method(story, method) for method in story.methods],
    }  # fmt: skip


def _run(run: Any) -> dict[str, Any]:
    record = run.record
    told = {"name": run.name, "method": run.method, "seed": run.seed, "state": run.state, "why": run.why}
    curve = [[round(step, 1), round(loss, 5)] for step, loss in binned(run.steps, charts.POINTS)]
    if record is not None:
        told |= {
            name: plain(getattr(record, name))
            for name in ("scores", "seconds", "peak_bytes", "memory", "forecast", "trained", "stored", "bit_exact")
        }
    classes = [[c["name"], c["rows"], c["learnt"], *(round(c[k], 4) for k in ("precision", "recall", "f1"))]
               for c in (run.quality or {}).get("classes", ())][:40]  # fmt: skip
    return {**told, "data": run.data, "loss_by_step": curve, "scored": [list(s) for s in run.scored],
            "classes": classes}  # fmt: skip


def _method(story: Story, method: str) -> dict[str, Any]:
    runs = story.of(method)
    mixed = confusion_of(runs)
    return {
        "name": method, "runs": [run.name for run in runs], "confusion": plain(mixed) if mixed is not None else None,
        "certainty": [{k: round(v, 5) for k, v in plain(b).items()} for b in reliability_of(runs)],
    }  # fmt: skip


def _json(values: Any) -> str:
    """JSON that ends no element and begins none."""
    text = json.dumps(_finite(values), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _asset(name: str) -> str:
    return resources.files("luthier.report").joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
