"""Train what is missing of the table, seed by seed, then write the page. See the package for its options."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.chat_methods import perplexities
from benchmarks.plan_grid import of_part
from experiments.chat.page import BASE, GIVEN, LENGTH, MODEL, ROWS, SCORED, STEPS, write
from experiments.results import attempted, kept, once, words_of
from luthier.runs.spec import BatchSpec, DataSpec, EvalSpec, RunSpec
from luthier.samples.store import cache_dir
from luthier.surgery import METHODS
from luthier.surgery.compose import spelling
from luthier.workflow import train

RESULTS = Path(__file__).parent / "results.jsonl"


def main() -> None:
    words = words_of("chat", "method", RESULTS, __doc__, METHODS.get)
    words.set_defaults(seeds=1)
    asked = words.parse_args()
    names = [BASE, *sorted(asked.only or METHODS.ours(), key=lambda name: name != "lora")]
    for seed in range(0 if asked.page else asked.seeds):
        for name in of_part(names, asked.part):
            made = partial(_base, seed) if name == BASE else partial(_run, name, seed)
            once(asked.results, {"method": name, "seed": seed}, partial(attempted, made))
    if asked.page or asked.results == RESULTS:  # results kept elsewhere are a trial, and no page of the docs
        write(asked.results)


def _base(seed: int, out: str) -> dict[str, Any]:
    """The held-out turns by the model as it is; a run that has them is made for it."""
    train(_spec("ia3", seed, out, steps=1), progress=False)
    return {"perplexity": round(perplexities(Path(out))[0], 3)}


def _run(name: str, seed: int, out: str) -> dict[str, Any]:
    begun = time.process_time()
    result = train(_spec(spelling(name), seed, out, sources=_sources(name), settings=GIVEN.get(name)), progress=False)
    cpu = time.process_time() - begun
    record = json.loads((result.path / "record.json").read_text("utf-8"))
    return {
        "perplexity": round(result.scores["perplexity"], 3),
        "trained": result.n_params,
        "stored": record["stored"],
        "held": sum(size for part, size in record["memory"].items() if part not in ("program", "other")),
        "cpu_seconds": round(cpu, 1),
    }


def _spec(
    method: str, seed: int, out: str, *, steps: int = STEPS, sources: list[str] | None = None,
    settings: dict[str, Any] | None = None,
) -> RunSpec:  # fmt: skip
    return RunSpec(
        model=f"sample:{MODEL}", data=DataSpec(source="sample:chitchat", accept_refused=0.3), method=method, seed=seed,
        steps=steps, batch=BatchSpec(size=ROWS), max_length=LENGTH, eval=EvalSpec(rows=SCORED), threads=1, out=out,
        sources=tuple(sources) if sources else None, settings=settings or {},
    )  # fmt: skip


def _sources(name: str) -> list[str]:
    """Two runs of other seeds and half as many steps, for a method that is made of some; trained once and kept."""
    cls = METHODS.get(name)
    if not cls.sources or not cls().least_sources:
        return []
    found = []
    for seed in (11, 12)[: max(cls().least_sources, 1)]:
        folder = cache_dir() / "chat" / "sources" / f"{cls.sources[0]}-{seed}"
        found.append(kept(folder, partial(_source, cls.sources[0], seed)))
    return found


def _source(method: str, seed: int, out: str) -> None:
    train(_spec(method, seed, out, steps=STEPS // 2), progress=False)


if __name__ == "__main__":
    main()
