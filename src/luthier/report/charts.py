"""The charts of a page: what a score costs, how runs learnt, what was forecast, how sure answers are, what they mix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from luthier.comparison import Standing
from luthier.core import human_bytes, human_count, human_seconds
from luthier.report.gather import Story
from luthier.report.html import Html, el
from luthier.report.numbers import (
    Bin,
    Confusion,
    binned,
    confusion_of,
    forecast_rows,
    front,
    reliability_of,
)
from luthier.report.read import Run
from luthier.report.svg import COLOURS, Chart, linear, logarithmic

__all__ = ["confusions", "costs", "curves", "forecasts", "reliabilities", "scores_over_steps"]

POINTS = 60
"""Of a curve; more steps are averaged."""


def costs(story: Story) -> list[Html]:
    """The score against trained numbers, time and memory, with 95 % intervals and the front."""
    found = story.comparison
    if found is None:
        return []
    kinds: list[tuple[str, str, Callable[[Standing], float | None], Callable[[float], str]]] = [
        ("trained", "trained numbers beside the head", lambda s: s.costs.trained, human_count),
        ("seconds", "seconds of a run", lambda s: s.costs.seconds, human_seconds),
        ("peak", "peak memory", lambda s: s.costs.peak_bytes, human_bytes),
        ("stored", "stored bytes", lambda s: s.costs.stored_bytes, human_bytes),
    ]
    return [
        _cost(story, found.standings, *kind)
        for kind in kinds
        if all(kind[2](s) is not None for s in found.standings) and found.standings
    ]


def _cost(
    story: Story, standings: Sequence[Standing], key: str, name: str, cost: Callable[[Standing], float | None],
    said: Callable[[float], str],
) -> Html:  # fmt: skip
    assert story.comparison is not None
    metric = story.comparison.metric.replace("_", " ")
    at = {s.name: float(cost(s) or 0) for s in standings}
    on_front = front([(at[s.name], s.score) for s in standings])
    best = [standings[i] for i in on_front]
    told = {s.name: f"{s.name}: {s.score:.3f} ({s.low:.3f} to {s.high:.3f}) at {said(at[s.name])}" for s in standings}
    chart = Chart(
        title=f"{metric} against {name}",
        says="; ".join(told[s.name] for s in standings)
        + f". On the front, where nothing cheaper is better: {', '.join(s.name for s in best)}.",
        x=logarithmic(list(at.values()), name, said),
        y=linear(min(s.low for s in standings), max(s.high for s in standings), metric),
    )
    chart.steps([(at[s.name], s.score) for s in best], "front")
    numbers = {name: i for i, name in enumerate(story.methods)}
    for s in standings:
        chart.interval(at[s.name], s.low, s.high, f"whisker l{numbers[s.name] % COLOURS}")
    for s in standings:
        runs = ", ".join(run.name for run in story.of(s.name))
        chart.mark(
            at[s.name], s.score, numbers[s.name],
            f"{s.name}: {s.score:.3f} ({s.low:.3f} to {s.high:.3f}) at {said(at[s.name])}; runs {runs}",
        )  # fmt: skip
    for s in standings:
        chart.label(at[s.name], s.score, s.name)
    return chart.written(f"cost-{key}")


def curves(story: Story) -> list[Html]:
    """The training loss of each run by step, one chart for a method; the other runs stand behind it in grey."""
    drawn = {run.name: binned(run.steps, POINTS) for run in story.runs if run.steps}
    if not drawn:
        return []
    every = [loss for curve in drawn.values() for _, loss in curve]
    last = max(step for curve in drawn.values() for step, _ in curve)
    x, y = linear(0, last, "step", human_count, 4), linear(min(every), max(every), "loss", n=4)
    found = []
    methods = [m for m in story.methods if any(run.name in drawn for run in story.of(m))]
    for place, method in enumerate(methods):
        number = story.methods.index(method)
        runs = [run for run in story.of(method) if run.name in drawn]
        chart = Chart(
            title=f"Loss of {method} by step",
            says="; ".join(
                f"run {run.name}: {drawn[run.name][0][1]:.3f} at first, {drawn[run.name][-1][1]:.3f} at step "
                f"{drawn[run.name][-1][0]:.0f}"
                for run in runs
            ),
            x=x, y=y, width=300, height=190,
        )  # fmt: skip
        if place == 0 and len(methods) > 1:
            # Drawn once; the other charts show the same lines by reference.
            for run in story.runs:
                if run.name in drawn:
                    chart.line(drawn[run.name], "ghost")
            chart.pieces = [el("g", *chart.pieces, id="ghosts")]
        elif len(methods) > 1:
            chart.pieces.append(el("use", href="#ghosts"))
        for run in runs:
            chart.line(drawn[run.name], f"curve l{number % COLOURS}", f"run {run.name}")
        found.append(el("figure", el("figcaption", method), chart.written(f"loss-{number}", "small")))
    return found


def scores_over_steps(story: Story) -> list[Html]:
    """A held-out score by step, of runs that were scored while they trained."""
    runs = [run for run in story.runs if len(run.scored) > 1]
    if not runs:
        return []
    metric = _metric(story, runs)
    lines = {run.name: [(float(step), s[metric]) for step, s in run.scored if metric in s] for run in runs}
    every = [p for line in lines.values() for p in line]
    if not every:
        return []
    chart = Chart(
        title=f"{metric.replace('_', ' ')} on held-out rows by step",
        says="; ".join(f"run {name}: {own[-1][1]:.3f} at step {own[-1][0]:.0f}" for name, own in lines.items() if own),
        x=linear(0, max(x for x, _ in every), "step", human_count), width=620,
        y=linear(min(y for _, y in every), max(y for _, y in every), metric.replace("_", " ")),
    )  # fmt: skip
    for run in runs:
        number = story.methods.index(run.method)
        chart.line(lines[run.name], f"curve l{number % COLOURS}", f"run {run.name}")
    for run in runs:
        if lines[run.name]:
            chart.mark(*lines[run.name][-1], story.methods.index(run.method), f"run {run.name}")
    for method in dict.fromkeys(run.method for run in runs):
        ends = [lines[run.name][-1] for run in runs if run.method == method and lines[run.name]]
        if ends:
            chart.label(*ends[0], method)
    return [chart.written("scored")]


def _metric(story: Story, runs: Sequence[Run]) -> str:
    if story.comparison is not None:
        return story.comparison.metric
    names = list(runs[0].scored[-1][1])
    return next((n for n in names if n != "loss"), names[0] if names else "loss")


def forecasts(story: Story) -> list[Html]:
    """Bytes of each part as they were forecast, and as they were counted; on the line, both are equal."""
    rows = [row for row in forecast_rows(story) if row.forecast > 0 and row.measured > 0]
    if not rows:
        return []
    every = [v for row in rows for v in (row.forecast, row.measured)]
    axis = logarithmic(every, "forecast", human_bytes)
    off = max(rows, key=lambda row: abs(row.measured / row.forecast - 1))
    chart = Chart(
        title="Memory by part: forecast and counted",
        says=f"{len(rows)} parts of runs. Furthest off: {off.part} of run {off.run}, {human_bytes(off.forecast)} "
        f"forecast and {human_bytes(off.measured)} counted.",
        x=axis, y=logarithmic(every, "counted", human_bytes), left=76,
    )  # fmt: skip
    chart.line([(axis.ticks[0][0], axis.ticks[0][0]), (axis.ticks[-1][0], axis.ticks[-1][0])], "front")
    for row in rows:
        number = story.methods.index(row.method)
        said = f"{row.part}: {human_bytes(row.forecast)} forecast, {human_bytes(row.measured)} counted; run {row.run}"
        chart.mark(row.forecast, row.measured, number, said)
    for part in dict.fromkeys(row.part for row in rows):
        first = max((row for row in rows if row.part == part), key=lambda row: row.forecast)
        chart.label(first.forecast, first.measured, part)
    return [chart.written("forecast")]


def reliabilities(story: Story) -> list[Html]:
    """How often answers are right by how sure they are, one chart for a method, its runs taken together."""
    found = []
    for number, method in enumerate(story.methods):
        bins = reliability_of(story.of(method))
        if bins:
            found.append(el("figure", el("figcaption", method), _reliability(method, number, bins, story.of(method))))
    return found


def _reliability(method: str, number: int, bins: Sequence[Bin], runs: Sequence[Run]) -> Html:
    names = ", ".join(run.name for run in runs if run.answers is not None)
    chart = Chart(
        title=f"Certainty and accuracy of {method}",
        says="; ".join(f"{b.rows} answers sure to {b.sure:.2f} are right in {b.right:.2f}" for b in bins)
        + f". Runs {names}.",
        x=linear(0, 1, "certainty", n=5), y=linear(0, 1, "share right", n=5), width=300, height=250,
    )  # fmt: skip
    most = max(b.rows for b in bins)
    for b in bins:  # how many answers there are, as low bars behind
        chart.bar(b.sure, 0, 0.25 * b.rows / most, 9, "many", f"{b.rows} answers")
    chart.line([(0, 0), (1, 1)], "front")
    for b in bins:
        chart.interval(b.sure, b.low, b.high, f"whisker l{number % COLOURS}")
    for b in bins:
        chart.mark(b.sure, b.right, number, f"{b.rows} answers, sure to {b.sure:.3f}, right in {b.right:.3f}")
    return chart.written(f"sure-{number}", "small")


def confusions(story: Story) -> list[Html]:
    """What each class is taken for, one chart for a method, its runs taken together."""
    found = []
    for number, method in enumerate(story.methods):
        made = confusion_of(story.of(method))
        if made is not None and len(made.classes) > 1:
            found.append(el("figure", el("figcaption", method), _confusion(method, f"mixed-{number}", made)))
    return found


def _confusion(method: str, key: str, made: Confusion) -> Html:
    """A square of cells, darker the larger their share of a class is; where no row is, there is no cell."""
    n, size, left, top = len(made.classes), 34, 96, 58
    pieces: list[Any] = [
        el("title", f"What each class is taken for by {method}", id=f"{key}-t"),
        el("desc", made.says(), id=f"{key}-d"),
        el("text", "wanted, down; answered, across", x=left, y=12, class_="name"),
        el("rect", x=left, y=top, width=n * size - 2, height=n * size - 2, class_="h0"),
    ]
    for i, name in enumerate(made.classes):
        shown = name if len(name) <= 13 else f"{name[:12]}…"
        pieces.append(el("text", shown, x=left - 6, y=top + i * size + 21, text_anchor="end"))
        at = f"translate({left + i * size + 12} {top - 5}) rotate(-35)"
        pieces.append(el("text", shown if len(shown) <= 8 else f"{shown[:7]}…", transform=at))
        whole = sum(made.counts[i]) + made.others[i]
        for j in range(n):
            count, x, y = made.counts[i][j], left + j * size, top + i * size
            if not count and i != j:
                continue
            level = f"h{min(9, int(10 * count / whole)) if whole else 0}"
            style = f"{level} hit" if i == j else level
            pieces.append(el("rect", x=x, y=y, width=size - 2, height=size - 2, class_=style))
            said = human_count(count) if count > 999 else count
            pieces.append(el("text", said, x=x + 16, y=y + 20, class_=f"n {level}") if count else None)
    drawn = f"0 0 {left + n * size + 30} {top + n * size + 4}"
    style = "grid wide" if n > 7 else "grid"
    return el("svg", *pieces, viewBox=drawn, role="img", aria_labelledby=f"{key}-t {key}-d", class_=style)
