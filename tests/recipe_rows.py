"""What the contract of recipes needs for those that read rows of their own kind: fields of a spec, by recipe."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from little import little_data, little_model

from luthier.runs.spec import DataSpec

__all__ = ["ROWS", "write_lines"]


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def traces(home: Path) -> dict[str, Any]:
    words = ("sun", "moon", "cat", "dog", "paris", "rome")
    rows = [
        {
            "question": f"what is the {words[i % 6]}",
            "steps": [
                {"thought": "good", "action": f"say[{words[i % 6]}]", "observation": f"red {words[i % 5]}"},
                {"answer": f"blue {words[i % 6]}"},
            ],
            "reward": 1 if i % 4 else 0,
        }
        for i in range(40)
    ]
    source = str(write_lines(home / "traces.jsonl", rows))
    model = str(little_model(home / "llama", "llama"))
    return {"model": model, "data": DataSpec(source=source), "settings": {"agent_sft.reward": "reward"}}


def answers(home: Path) -> dict[str, Any]:
    data = DataSpec(source=str(little_data(home / "turns.csv", kind="turns")))
    return {"model": str(little_model(home / "llama", "llama")), "data": data}


ROWS: dict[str, Callable[[Path], dict[str, Any]]] = {"agent_sft": traces, "instruct_sft": answers}
