"""docs/benchmarks.md and its plots, drawn from the results; nothing on the page comes from anywhere else."""

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._strategies import ASKED
from benchmarks.gpu.page import section

__all__ = ["RESULTS", "draw", "read"]

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
PLOTS = ROOT / "docs" / "benchmarks"

MIB = 1 << 20

INTRODUCTION = """# Benchmarks

Drawn by `python -m benchmarks --draw` from [benchmarks/results](../benchmarks/results); do not edit this page.

    make bench-quick      a few minutes: all of it works here
    make bench            everything, some hours on two cores: the figures of this page
    make gpu              at most eight minutes, on a machine with a GPU: the last section

How it is measured:

- Every run is a process of its own, so its peak memory (`VmHWM`) is its own; interpreter and libraries are in it, and
  what they hold before any work is given beside it. Contestants take turns, A B C A B C, and never run side by side.
- Figures are medians, with least and most in brackets. Steady speed leaves the first steps out; end to end goes from
  rows on the disk to the saved adapter, model loading and tokenising included, imports and downloads not.
- luthier runs as `luthier.training.train` does for a user, with its checkpoints, checks and log; no rows are held out,
  so neither side evaluates. `peft` runs in the framework's `Trainer`. "Defaults" is fp32 weights, random order of rows,
  padding to the longest row of a batch, and the model's own dropout. Tuned adds bf16 and rows of like length together;
  both attention implementations run, and one with glibc told by its environment to keep what is freed, as luthier does
  by itself; ratios are taken to the fastest.
- luthier's defaults: bf16 where the processor is fast at it, no dropout inside a frozen model, rows of like length
  together. Whether both learn the same is measured first (equal losses), and accuracy over seeds last.
"""


def read() -> dict[str, dict[str, Any]]:
    """The results of each group: the full ones, or the quick ones where there are no others."""
    found: dict[str, dict[str, Any]] = {}
    for folder in (RESULTS / "quick", RESULTS):
        for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
            record = json.loads(path.read_text())
            if isinstance(record, dict) and "cases" in record:
                found[record["group"]] = record
    return found


def draw() -> str:
    """Write the page and the plots; give a line that says what they were drawn from."""
    found = read()
    PLOTS.mkdir(parents=True, exist_ok=True)
    for old in PLOTS.glob("*.svg"):
        old.unlink()
    parts = [INTRODUCTION]
    if not found:
        parts.append("There are no results yet.")
    else:
        parts += [_environment(found), _goals(found)]
    for group, write in SECTIONS.items():
        if group in found:
            parts.append(write(found[group], found))
    parts.append(section(RESULTS / "gpu" / "results.json"))
    PAGE.write_text("\n\n".join(part.strip() for part in parts if part) + "\n")
    busy = [g for g, r in found.items() if r["busy"]]
    note = f"; measured on a busy machine: {', '.join(busy)}" if busy else ""
    return f"{PAGE.relative_to(ROOT)} from {len(found)} groups{note}"


# --- pieces -----------------------------------------------------------------------------------------------------------


def value(one: dict[str, Any], name: str) -> float | None:
    """The median of a number of a contestant."""
    held = one["summary"].get(name)
    return None if held is None else float(held["median"])


def _spread(one: dict[str, Any], name: str, scale: float = 1.0) -> str:
    held = one["summary"].get(name)
    if held is None:
        return ""
    middle, low, high = (_short(held[k] * scale) for k in ("median", "min", "max"))
    return middle if one["summary"]["n"] == 1 else f"{middle} ({low}..{high})"


def _short(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _caveat(record: dict[str, Any]) -> str:
    words = []
    if record["quick"]:
        words.append("quick: short cases and few repeats")
    if record["busy"]:
        words.append("**the machine was busy: ratios at most, no figure of this section is a result**")
    if record.get("processor"):
        words.append(
            "one thread, and seconds of the processor: other work ran beside it, which those seconds leave out"
        )
    return f"*({'; '.join(words)})*" if words else ""


def _environment(found: dict[str, dict[str, Any]]) -> str:
    lines = []
    for group, record in found.items():
        e = record["environment"]
        busy = f"{record['busy_share_at_start']:.0%}"
        load = ", ".join(str(x) for x in e["load_at_start"])
        versions = f"luthier {e['luthier']}, torch {e['torch']}, transformers {e['transformers']}, peft {e['peft']}"
        machine = f"{e['cpu']}, {e['cpus']} CPUs, {e['memory_bytes'] / (1 << 30):.0f} GiB, threads {e['threads']}"
        lines.append([group, record["started"][:10], machine, versions, f"{busy} busy, load {load}"])
    return "## Where\n\n" + _table(("group", "day", "machine", "versions", "others, at the start"), lines)


def _best(case: dict[str, Any], unit: str, *, without: Sequence[str] = ()) -> dict[str, Any] | None:
    peers = [
        c
        for c in case["contestants"]
        if c["name"].startswith("peft") and c["name"] not in without and value(c, unit) is not None
    ]
    return max(peers, key=lambda c: value(c, unit) or 0.0, default=None)


def _named(case: dict[str, Any], name: str) -> dict[str, Any] | None:
    return next((c for c in case["contestants"] if c["name"] == name and "error" not in c["summary"]), None)


def _case(found: dict[str, dict[str, Any]], name: str) -> dict[str, Any] | None:
    return next((c for r in found.values() for c in r["cases"] if c["case"] == name), None)


def _goals(found: dict[str, dict[str, Any]]) -> str:
    """What the project asks of itself, and what these results say about it."""
    lines: list[list[str]] = []
    doubtful = [name for name, record in found.items() if record["quick"] or record["busy"]]

    def goal(words: str, wanted: float, got: float | None, *groups: str, at_least: bool = True) -> None:
        if got is not None:
            met = "yes" if (got >= wanted if at_least else got <= wanted) else "**no**"
            sign = "≥" if at_least else "≤"
            known = not any(group in doubtful for group in groups)
            lines.append([words, f"{sign} {wanted:g}", f"{got:.3g}", met if known else "not known"])

    def ratio(ours: dict[str, Any] | None, theirs: dict[str, Any] | None, unit: str) -> float | None:
        a, b = (None if one is None else value(one, unit) for one in (ours, theirs))
        return None if a is None or not b else a / b

    sides = (
        ("encoder-trec6", "rows_per_second", "minilm-l6 LoRA", "peft, defaults", 2.5, 7.0),
        ("decoder-all", "steady_tokens_per_second", "smollm2-135m LoRA", "peft, fp32", 3.0, 5.0),
    )
    for name, unit, words, default, tuned_goal, default_goal in sides:
        case = _case(found, name)
        if case is None:
            continue
        ours, best, plain = _named(case, "luthier"), _best(case, unit, without=(default,)), _named(case, default)
        kind, group = "end to end" if unit == "rows_per_second" else "steady", name.partition("-")[0]
        goal(f"{words}: speed over peft tuned, {kind}", tuned_goal, ratio(ours, best, unit), group)
        goal(f"{words}: speed over peft's defaults, {kind}", default_goal, ratio(ours, plain, unit), group)
        if kind == "end to end":
            goal(f"{words}: the same, steady", tuned_goal, ratio(ours, best, "steady_rows_per_second"), group)
        goal(f"{words}: peak memory over peft tuned", 0.6, ratio(ours, best, "peak_bytes"), group, at_least=False)
        below = _case(found, f"floor-{name}")
        if below is not None:
            products = _named(below, "products")
            unit = "steady_rows_per_second" if "encoder" in name else "steady_tokens_per_second"
            share = ratio(ours, products, unit)
            goal(f"{words}: share of the floor of its matrix products", 0.6, share, group, "floor")
            most = ratio(products, best, unit)
            if most is not None:
                lines.append([f"{words}: those products alone over peft tuned, steady", "", f"{most:.3g}", "the limit"])
    for model in ("encoder", "decoder"):
        for batch in (1, 32):
            case = _case(found, f"inference-{model}-{batch}")
            if case is not None:
                goal(
                    f"{model}, unmerged LoRA over the base, batch {batch}",
                    1.05,
                    value(case["contestants"][0], "unmerged_over_base"),
                    "inference",
                    at_least=False,
                )
        case = _case(found, f"inference-rows-{model}")
        if case is not None:
            got = value(case["contestants"][0], "different_over_one")
            goal(f"{model}, 32 LoRA tunings in a batch over one", 1.15, got, "inference", at_least=False)
    if not lines:
        return ""
    reason = ", ".join(doubtful)
    caveat = f"Measured on a busy machine or only in short, and so not judged: {reason}." if reason else ""
    return "\n\n".join(["## What is asked, what is reached", caveat, _table(("", "asked", "got", "reached"), lines)])


def _bars(name: str, title: str, unit: str, bars: Sequence[tuple[str, float, float, float]]) -> str:
    """A bar chart as SVG: (label, middle, low, high) each. Gives the line that shows it."""
    width, left, row, top = 720, 230, 26, 34
    most = max(high for *_, high in bars) or 1.0
    scale = (width - left - 90) / most
    lines = [f'<text x="8" y="20" font-size="14" font-weight="bold">{html.escape(title)}</text>']
    for i, (label, middle, low, high) in enumerate(bars):
        y = top + i * row
        colour = "#1f6f8b" if "peft" not in label else "#c0a080"
        lines += [
            f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{html.escape(label)}</text>',
            f'<rect x="{left}" y="{y + 3}" width="{middle * scale:.1f}" height="16" fill="{colour}"/>',
            f'<path d="M{left + low * scale:.1f} {y + 11}H{left + high * scale:.1f}" stroke="#222"/>',
            f'<text x="{left + high * scale + 6:.1f}" y="{y + 15}">{_short(middle)}</text>',
        ]
    lines.append(f'<text x="{left}" y="{top + len(bars) * row + 16}" fill="#666">{html.escape(unit)}</text>')
    return _svg(name, title, width, top + len(bars) * row + 26, lines)


def _curve(name: str, title: str, x_unit: str, points: Sequence[tuple[float, float]], line: dict[str, float]) -> str:
    """Points and the fitted line through them, as SVG."""
    width, height, left, bottom = 720, 300, 70, 44
    x_most, y_most = max(x for x, _ in points), max(y for _, y in points) * 1.1

    def at(x: float, y: float) -> tuple[float, float]:
        return left + x / x_most * (width - left - 40), height - bottom - y / y_most * (height - bottom - 34)

    (x0, y0), (x1, y1) = at(0, 1e3 * line["fixed"]), at(x_most, 1e3 * (line["fixed"] + line["slope"] * x_most))
    lines = [
        f'<text x="8" y="20" font-size="14" font-weight="bold">{html.escape(title)}</text>',
        f'<path d="M{left} 30V{height - bottom}H{width - 40}" stroke="#888" fill="none"/>',
        f'<path d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}" stroke="#c0a080" stroke-dasharray="5 4"/>',
        f'<text x="{width / 2}" y="{height - 6}" text-anchor="middle" fill="#666">{html.escape(x_unit)}</text>',
        f'<text x="12" y="{height / 2}" fill="#666">ms</text>',
    ]
    for x, y in points:
        px, py = at(x, y)
        lines += [
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" fill="#1f6f8b"/>',
            f'<text x="{px:.1f}" y="{py - 8:.1f}" text-anchor="middle">{_short(y)}</text>',
            f'<text x="{px:.1f}" y="{height - bottom + 16}" text-anchor="middle">{_short(x)}</text>',
        ]
    return _svg(name, title, width, height, lines)


def _svg(name: str, title: str, width: int, height: int, lines: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        ' font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
    )
    (PLOTS / f"{name}.svg").write_text(head + "\n".join(lines) + "</svg>\n")
    return f"![{title}](benchmarks/{name}.svg)"


# --- sections ---------------------------------------------------------------------------------------------------------


def _failures(record: dict[str, Any]) -> str:
    lines = [
        f"- {case['case']}, {one['name']}: {one['summary']['error']}"
        for case in record["cases"]
        for one in case["contestants"]
        if "error" in one["summary"]
    ]
    return "Failed:\n\n" + "\n".join(lines) if lines else ""


def _contest(case: dict[str, Any], unit: str, word: str, others: Sequence[tuple[str, str]]) -> list[str]:
    """A table of all contestants and a plot of one number."""
    alive = [c for c in case["contestants"] if "error" not in c["summary"]]
    if not alive:
        return [f"### {case['title']}"]
    first = value(alive[0], unit) or 1.0
    lines = [
        [
            c["name"],
            _spread(c, unit),
            f"{(value(c, unit) or 0.0) / first:.2f}",
            *(_spread(c, name) for name, _ in others),
            _spread(c, "peak_bytes", 1 / MIB),
            _spread(c, "baseline_bytes", 1 / MIB),
        ]
        for c in alive
    ]
    head = ("", word, f"over {alive[0]['name']}", *(w for _, w in others), "peak MiB", "of it before work, MiB")
    bars = [
        (c["name"], held["median"], held["min"], held["max"])
        for c in alive
        if (held := c["summary"].get(unit)) is not None
    ]
    return [
        f"### {case['title']}",
        _table(head, lines),
        _bars(case["case"], case["title"], word, bars),
    ]


def _equal(record: dict[str, Any], found: dict[str, dict[str, Any]]) -> str:
    lines = []
    for case in record["cases"]:
        for one in case["contestants"]:
            if "error" not in one["summary"]:
                lines.append(
                    [
                        case["title"],
                        f"{value(one, 'largest_difference'):.2g}",
                        f"{value(one, 'largest_share'):.2g}",
                        f"{value(one, 'last_loss'):.5g} and {value(one, 'last_loss_peft'):.5g}",
                    ]
                )
    head = ("", "largest difference of a step's loss", "as a share", "mean loss of the last 5 steps, luthier and peft")
    return "\n\n".join(["## Equal losses", _caveat(record), _table(head, lines), _failures(record)])


def _encoder(record: dict[str, Any], found: dict[str, dict[str, Any]]) -> str:
    parts = ["## An encoder", _caveat(record)]
    others = (
        ("rows_per_second", "rows/s end to end"),
        ("total_seconds", "seconds end to end"),
        ("import_seconds", "imports, s"),
        ("last_loss", "loss, last 10 steps"),
    )
    for case in record["cases"]:
        parts += _contest(case, "steady_rows_per_second", "rows/s, steady", others)
    return "\n\n".join([*parts, _failures(record)])


def _decoder(record: dict[str, Any], found: dict[str, dict[str, Any]]) -> str:
    parts = ["## A decoder", _caveat(record)]
    for case in record["cases"]:
        others = (("step_seconds", "seconds a step"), ("last_loss", "mean loss"))
        parts += _contest(case, "steady_tokens_per_second", "tokens/s, steady", others)
    return "\n\n".join([*parts, _failures(record)])


def _methods(record: dict[str, Any], found: dict[str, dict[str, Any]]) -> str:
    words = "Numbers in a method's table may differ between the sides by where it attaches at its defaults."
    return _side_by_side("Every method that peft has too", words, record)


def _shared(record: dict[str, Any], found: dict[str, dict[str, Any]]) -> str:
    words = "At our defaults on both sides: peft's adapter is made from the file that luthier writes for it."
    return _side_by_side("Every method whose files peft reads", words, record)


def _sizes(record: dict[str, Any], found: dict[str, dict[str, Any]]) -> str:
    return _side_by_side("Other models, batches and lengths", "", record)


def _gpu(record: dict[str, Any], found: dict[str, dict[str, Any]]) -> str:
    return _side_by_side("On a GPU", f"{', '.join(record['environment']['gpus'])}. Peaks are of its memory.", record)


def _side_by_side(title: str, words: str, record: dict[str, Any]) -> str:
    """One line for each case: ours and the fastest of peft's."""
    lines = []
    for case in record["cases"]:
        ours, best = _named(case, "luthier"), _best(case, case["unit"])
        if ours is None or best is None:
            continue
        times = (value(ours, case["unit"]) or 0.0) / (value(best, case["unit"]) or 1.0)
        memory = (value(ours, "peak_bytes") or 0.0) / (value(best, "peak_bytes") or 1.0)
        lines.append(
            [
                case["title"],
                _spread(ours, "step_seconds"),
                _spread(best, "step_seconds"),
                f"{times:.2f}",
                f"{memory:.2f}",
                best["name"],
                "yes" if times >= 1.0 and memory <= 1.0 else "**no**",
            ]
        )
    head = ("", "seconds a step", "peft's", "speed over peft", "peak over peft", "the fastest peft", "both no worse")
    parts = [f"## {title}", _caveat(record), words, _table(head, lines), _failures(record)]
    return "\n\n".join(part for part in parts if part)


def _own(record: dict[str, Any], found: dict[str, dict[str, Any]]) -> str:
    parts = ["## Every method, against our LoRA", _caveat(record)]
    for case in record["cases"]:
        alive = [c for c in case["contestants"] if "error" not in c["summary"]]
        lora = next((value(c, "step_seconds") for c in alive if c["name"] == "lora"), None)
        lines = [
            [
                c["name"],
                _spread(c, "step_seconds"),
                f"{(value(c, 'step_seconds') or 0.0) / lora:.2f}" if lora else "",
                _spread(c, "peak_bytes", 1 / MIB),
                _spread(c, "trained_numbers"),
            ]
            for c in alive
        ]
        head = ("method", "seconds a step", "over LoRA's", "peak MiB", "trained numbers")
        parts += [f"### {case['title']}", _table(head, lines)]
    return "\n\n".join([*parts, _failures(record)])


def _strategies(record: dict[str, Any], found: dict[str, dict[str, Any]]) -> str:
    measured = (("step_seconds", "seconds a step"), ("total_seconds", "seconds end to end"), ("peak_bytes", "peak"))
    words = (
        "Ratios to the plain run of the same method. Asked: what a strategy may cost at most; of mezo, below training."
    )
    parts = ["## What a strategy costs", _caveat(record), words]
    for case in record["cases"]:
        plain, lines = _named(case, "plain"), []
        for one in case["contestants"]:
            if plain is None or "error" in one["summary"]:
                continue
            over = {n: (value(one, n) or 0.0) / (value(plain, n) or 1.0) for n, _ in measured}
            asked, met = ASKED.get(one["name"]), ""
            if asked is not None:
                met = f"{dict(measured)[asked[0]]} ≤ {asked[1]:g}: {'yes' if over[asked[0]] <= asked[1] else '**no**'}"
            lines.append([one["name"], _spread(one, "step_seconds"), *(f"{over[n]:.2f}" for n, _ in measured), met])
        head = ("", "seconds a step", *(f"{word} over plain" for _, word in measured), "asked")
        parts += [f"### {case['title']}", _table(head, lines)]
    return "\n\n".join(part for part in [*parts, _failures(record)] if part)


def _inference(record: dict[str, Any], found: dict[str, dict[str, Any]]) -> str:
    names = ("base", "asleep", "unmerged", "unserved", "folded", "peft_unmerged", "peft_merged")
    lines = [
        [
            case["title"],
            *(_spread(one, f"{n}_ms") for n in names[:1]),
            *(_spread(one, f"{n}_over_base") for n in names[1:]),
        ]
        for case in record["cases"]
        for one in case["contestants"]
        if "error" not in one["summary"] and "unmerged_ms" in one["summary"]
    ]
    words = (
        "Ratios to the model as transformers loads it, with its own attention, of calls in one turn. Asleep: no tuning,"
        " our attention and packed weights. Unmerged: LoRA inside `serving()`, as `Predictor` answers; unserved:"
        " outside of it."
    )
    rows = [
        [
            case["title"],
            *(_spread(one, f"{n}_ms") for n in ("base", "one", "different")),
            _spread(one, "different_over_one"),
        ]
        for case in record["cases"]
        for one in case["contestants"]
        if "error" not in one["summary"] and "different_ms" in one["summary"]
    ]
    row_head = ("", "base, ms", "one tuning, ms", "each row its own, ms", "its own over one")
    head = ("", "base, ms", *(n.replace("_", " ") for n in names[1:]))
    notes = sorted({n for case in record["cases"] for n in case["notes"]})
    tables = [_table(head, lines), *([_table(row_head, rows)] if rows else [])]
    return "\n\n".join(["## Inference", _caveat(record), words, *tables, *notes, _failures(record)])


def _growth(record: dict[str, Any], found: dict[str, dict[str, Any]]) -> str:
    parts = ["## Growth", _caveat(record)]
    lines, starts = [], []
    plots = []
    for case in record["cases"]:
        for one in case["contestants"]:
            if "error" in one["summary"]:
                continue
            if case["case"] == "growth-rows":
                numbers = [
                    f"{run}_{part}_seconds" for run in ("anew", "again") for part in ("encode", "rest", "first_step")
                ]
                starts.append([one["name"], *(_spread(one, n) for n in ["read_seconds", *numbers])])
                continue
            # The fastest of the runs: growth is a property of the code, and noise only adds.
            run = min(one["runs"], key=lambda r: sum(r["step_ms"]))
            line = run["fit"]
            per = ", ".join(f"{s:g}: {ms:.3g}" for s, ms in zip(run["sizes"], run["step_ms"], strict=True))
            lines.append(
                [run["size"], per, f"{1e3 * line['fixed']:.3g}", f"{1e6 * line['slope']:.3g}", f"{line['worst']:.1%}"]
            )
            points = list(zip(run["sizes"], run["step_ms"], strict=True))
            plots.append(_curve(case["case"], f"Step time by {run['size']}", run["size"], points, line))
    if lines:
        head = ("by", "ms a step", "fixed, ms", "µs for each more", "largest distance from the line")
        parts += [_table(head, lines), *plots]
    if starts:
        first = (
            "",
            "reading the rows, s",
            "encoding anew, s",
            "the rest, s",
            "together, s",
            "encoding from the cache, s",
            "the rest, s",
            "together, s",
        )
        parts += ["### Time to the first step", _table(first, starts)]
    return "\n\n".join([*parts, _failures(record)])


def _floor(record: dict[str, Any], found: dict[str, dict[str, Any]]) -> str:
    lines = []
    for case in record["cases"]:
        for one in case["contestants"]:
            if "error" in one["summary"]:
                continue
            contest = _case(found, case["case"].removeprefix("floor-"))
            ours = None if contest is None else _named(contest, "luthier")
            floor_value = value(one, case["unit"]) or 1.0
            share = "" if ours is None else f"{(value(ours, case['unit']) or 0.0) / floor_value:.0%}"
            unit = case["unit"].removeprefix("steady_").replace("_per_second", "/s")
            lines.append([case["title"], f"{_spread(one, case['unit'])} {unit}", _spread(one, "gflops"), share])
    head = ("", "at most", "GFLOP/s", "luthier's share of it, steady")
    return "\n\n".join(["## The floor", _caveat(record), _table(head, lines), _failures(record)])


def _compiled(record: dict[str, Any], found: dict[str, dict[str, Any]]) -> str:
    words = (
        "A step's mean time, what passes until every shape has been seen twice, and how many steps a way that gains on"
        " ours needs to make up for that."
    )
    parts = ["## torch.compile", _caveat(record), words]
    for case in record["cases"]:
        ours = case["contestants"][0]
        lines = []
        for one in case["contestants"]:
            if "error" in one["summary"]:
                continue
            gain = (value(ours, "step_seconds") or 0.0) - (value(one, "step_seconds") or 0.0)
            late = (value(one, "warm_seconds") or 0.0) - (value(ours, "warm_seconds") or 0.0)
            even = f"{late / gain:,.0f} steps" if gain > 0 and late > 0 else ""
            numbers = [_spread(one, "step_seconds"), _spread(one, "warm_seconds")]
            lines.append([one["name"], *numbers, _spread(one, "peak_bytes", 1 / MIB), even])
        head = ("", "seconds a step", "seconds before", "peak MiB", "pays after")
        parts += [f"### {case['title']}", _table(head, lines)]
    return "\n\n".join(part for part in [*parts, _failures(record)] if part)


def _accuracy(record: dict[str, Any], found: dict[str, dict[str, Any]]) -> str:
    parts = ["## Accuracy", _caveat(record)]
    for case in record["cases"]:
        lines = [
            [c["name"], _spread(c, "accuracy"), ", ".join(f"{r['accuracy']:.4f}" for r in c["runs"])]
            for c in case["contestants"]
            if "error" not in c["summary"]
        ]
        parts += [case["title"], _table(("", "median (least..most)", "each seed"), lines)]
    return "\n\n".join([*parts, _failures(record)])


SECTIONS = {
    "equal": _equal,
    "encoder": _encoder,
    "decoder": _decoder,
    "floor": _floor,
    "sizes": _sizes,
    "methods": _methods,
    "shared": _shared,
    "own": _own,
    "strategies": _strategies,
    "inference": _inference,
    "growth": _growth,
    "compiled": _compiled,
    "gpu": _gpu,
    "accuracy": _accuracy,
}
