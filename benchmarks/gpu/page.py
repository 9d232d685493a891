"""The section of docs/benchmarks.md that is made from the results of `make gpu`."""

import json
from pathlib import Path
from typing import Any

__all__ = ["section"]

TITLE = "## On one GPU, by `make gpu`"
ABSENT = (
    "Not measured yet. On a machine with a GPU, `make gpu` measures it in at most eight minutes, without the network: "
    "every method of the catalogue against the CPU, runs that are stopped and go on, and steps of LoRA on Llama shapes "
    "of 1 and 8 billion numbers beside `peft`."
)
GIB, MILLI = 1 << 30, 1e-3


def section(path: Path) -> str:
    """The section, from the file of results; what to do, where there is none."""
    if not path.is_file():
        return f"{TITLE}\n\n{ABSENT}"
    found = json.loads(path.read_text(encoding="utf-8"))
    return "\n\n".join([TITLE, _where(found), *_contract(found), *_resume(found), *_speed(found)])


def _table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *lines])


def _where(found: dict[str, Any]) -> str:
    e = found["environment"]
    tiny = " **At tiny sizes: every line ran, no figure means anything.**" if found["tiny"] else ""
    versions = ", ".join(f"{name} {e[name]}" for name in ("luthier", "torch", "transformers", "peft"))
    missing = "".join(f" No {who}: {why}." for who, why in found["missing"].items())
    device = ", ".join(e.get("gpus", [])) or e["cpu"]
    return f"{found['started'][:10]}, {device}; {versions}.{missing}{tiny}"


def _alive(found: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [part for part in found["parts"] if part["kind"] == kind]


def _troubles(part: dict[str, Any]) -> list[str]:
    return [f"- {part['name']}: {part['error']}"] if part.get("error") else []


def _contract(found: dict[str, Any]) -> list[str]:
    lines, wrong = [], []
    for part in _alive(found, "contract"):
        wrong += _troubles(part)
        for method, facts in part["facts"].items():
            checks = facts.get("checks", {})
            counts = [list(checks.values()).count(word) for word in ("passed", "refused")]
            lines.append([method, str(counts[0]), str(counts[1]), str(len(checks) - sum(counts))])
            wrong += [f"- {method}, {n}: {w}" for n, w in checks.items() if w not in ("passed", "refused")]
    head = ["a tiny Llama", "checks passed", "refused", "wrong"]
    return ["### Every method", _table(head, lines), *(["\n".join(wrong)] if wrong else [])]


def _resume(found: dict[str, Any]) -> list[str]:
    lines, wrong = [], []
    for part in _alive(found, "resume"):
        wrong += _troubles(part)
        for name, facts in part["facts"].items():
            differ = facts.get("error") or ", ".join(facts.get("differ", [])) or "nothing"
            lines.append([name, str(facts.get("steps", "")), differ])
    return [
        "### A run that is stopped and goes on",
        _table(["method, precision", "steps", "what differs"], lines),
        *(["\n".join(wrong)] if wrong else []),
    ]


def _speed(found: dict[str, Any]) -> list[str]:
    lines, wrong = [], []
    for part in _alive(found, "speed"):
        wrong += _troubles(part)
        for rows, facts in part["facts"].items():
            if "step_seconds" in facts:
                lines.append([part["name"], rows, *_figures(facts)])
            else:
                wrong.append(f"- {part['name']}, {rows}: {facts.get('error')}")
    head = [
        "model, contestant, turn", "rows", "forward, ms", "backward, ms", "update, ms", "tokens/s",
        "supervised tokens/s", "padded places", "kept by forward, GiB", "allocated peak, GiB", "reserved peak, GiB",
        "first loss", "last loss", "norm of the gradient",
    ]  # fmt: skip
    said = (
        "LoRA of rank 8 on queries and values, random weights, a third of each row a prompt without loss. Contestants "
        "take turns, each in a process of its own; medians of the steps after the first two. Padded places are in no "
        "rate. Every trained tensor had a gradient that is not zero, or the line would be below the table."
    )
    wrong += [f"- {line}" for line in found["unequal"]]
    return ["### Steps of LoRA", said, _table(head, lines), *(["\n".join(wrong)] if wrong else [])]


def _figures(facts: dict[str, Any]) -> list[str]:
    times = [f"{facts[f'{n}_seconds'] / MILLI:.1f}" for n in ("forward", "backward", "update")]
    rates = [f"{facts[n]:,.0f}" for n in ("tokens_per_second", "supervised_per_second")]
    sizes = [facts[n] for n in ("kept_by_forward_bytes", "allocated_peak_bytes", "reserved_peak_bytes")]
    held = ["" if size is None else f"{size / GIB:.2f}" for size in sizes]
    ends = [f"{facts['losses'][i]:.3f}" for i in (0, -1)]
    return [*times, *rates, f"{facts['padded_places']:,}", *held, *ends, f"{facts['gradient']['norm']:.3g}"]
