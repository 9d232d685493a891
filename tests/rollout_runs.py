"""Little runs of strategies that learn from their own answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from in_memory import Runs
from little import little_data, little_spec

from luthier.runs.spec import BatchSpec, DataSpec, RunSpec

__all__ = ["TINY", "WIDE", "spec_of", "view_of"]

WIDE = BatchSpec(size=6, tokens=4096)
TINY: dict[str, Any] = {"reward": "length", "samples": 3, "new_tokens": 4, "words": 3}


def view_of(runs: Runs, name: str = "grpo", method: str = "lora", **values: Any) -> tuple[Any, Any, Any]:
    """A loop before its first step, its strategy and its course; answers are written."""
    given = {f"{name}.{k}": v for k, v in {**TINY, **values}.items()}
    loop = runs.loop(name, method, "llama-prompts", values=given, batch=WIDE, steps=4)
    loop.moments.start()
    loop.moments.before_step(0, 4, 0)
    ((one, course),) = loop.moments._asked
    return loop, one, course


def spec_of(home: Path, name: str = "grpo", **changes: Any) -> RunSpec:
    """A whole run of four steps."""
    source = little_data(home / "turns.csv", kind="turns")
    own = {f"{name}.{k}": v for k, v in {**TINY, **changes.pop("own", {})}.items()}
    given: dict[str, Any] = {
        "strategy": name,
        "steps": 4,
        "batch": BatchSpec(size=4, tokens=96),
        "trunk_dropout": "off",
    }
    spec = little_spec(home, kind="llama", **{**given, "data": DataSpec(source=str(source)), **changes})
    return dataclasses.replace(spec, settings=spec.settings | own)
