"""Whole runs that take a second: a tiny model in a folder with a word tokenizer, and rows in a file.

The rows have lengths from 4 to 20 tokens, so steps are cut into several micro-batches, and dropout is on.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from tiny import config_of, tiny
from tiny_methods import settings, small
from word_tables import WORDS, word_tokenizer

from luthier.runs.spec import BatchSpec, DataSpec, OptimSpec, RunSpec
from luthier.training import Listener
from luthier.workflow import train

if TYPE_CHECKING:
    import pytest  # `make gpu` uses these runs where there may be none

__all__ = ["Heard", "at_call", "little_data", "little_model", "little_spec", "made_of", "settings"]


class Heard(Listener):
    """Keeps the lines that a run says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def little_model(folder: Path, kind: str = "bert", **changes: Any) -> Path:
    """A tiny model and its tokenizer as a folder on the disk."""
    if not folder.exists():
        encoder = kind in ("bert", "roberta", "distilbert", "albert")
        model = tiny(kind, "base" if encoder else "seq2seq" if kind in ("t5", "bart") else "lm", **changes)
        folder.mkdir(parents=True)
        config = config_of(kind, **changes)
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)
        tensors = {n: t.contiguous().clone() for n, t in model.state_dict().items()}
        tied = (getattr(model, "_tied_weights_keys", None) or {}) if config.tie_word_embeddings else {}
        save_file({n: t for n, t in tensors.items() if n not in tied}, folder / "model.safetensors", {"format": "pt"})
        word_tokenizer("bert" if encoder else "gpt").save_pretrained(folder)
    return folder


def little_data(path: Path, rows: int = 46, kind: str = "labelled", seed: int = 0) -> Path:
    """Rows in a .csv file: a text with a label that can be learnt, a prompt with its answer, or one with two."""
    if not path.exists():
        draw = random.Random(seed)
        columns = {
            "labelled": ("text", "label"),
            "pairs": ("prompt", "chosen", "rejected"),
            "judged": ("prompt", "response", "liked"),
        }.get(kind, ("prompt", "response"))
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            for i in range(rows):
                label = ("good", "bad", "red")[i % 3]
                words = draw.choices(WORDS, k=draw.randint(2, 14))
                text = " ".join([*words, *[label] * 3])
                if kind == "judged":
                    liked = i % 4 != 1
                    writer.writerow((text, f"{label} {words[0]}" if liked else words[0], liked))
                    continue
                if kind == "pairs":
                    writer.writerow((text, f"{label} {words[0]}", " ".join(words[: 1 + i % 3])))
                    continue
                writer.writerow((text, label) if kind == "labelled" else (text, f"{label} {words[0]}"))
    return path


def little_spec(home: Path, method: str = "lora", kind: str = "bert", **changes: Any) -> RunSpec:
    """A run of 12 steps, 5 to an epoch, in `home`; each step has at least two micro-batches."""
    labelled = kind not in ("llama", "gpt2")
    source = little_data(home / f"{'rows' if labelled else 'turns'}.csv", kind="labelled" if labelled else "turns")
    fields: dict[str, Any] = {
        "model": str(little_model(home / kind, kind)),
        "data": DataSpec(source=str(source)),
        "method": method,
        "settings": settings(method),
        "steps": 12,
        "batch": BatchSpec(size=8, tokens=48, accumulate=2),
        "optim": OptimSpec(lr=3e-3),
        "trunk_dropout": "on",
        "precision": "fp32",
        "threads": 1,
        "out": str(home / "run"),
    }
    return RunSpec(**{**fields, **changes})


def made_of(method: str, home: Path, kind: str = "bert") -> dict[str, Any]:
    """What a run of `method` needs where that is made of saved tunings: as many as it needs, trained once."""
    found = []
    for part in small(method).parts():
        for number in range(part.least_sources if part.sources else 0):
            path = home / f"{part.sources[0]}-{kind}-{number}"
            if not path.exists():
                train(little_spec(home, part.sources[0], kind, steps=2, seed=number, out=str(path)))
            found.append(str(path))
    return {"sources": tuple(found), "settings": {}} if found else {}  # sizes are those of the sources


def at_call(patch: pytest.MonkeyPatch, owner: Any, name: str, k: int, act: Callable[[], Any]) -> list[int]:
    """Before the `k`-th call (from 1) of `owner.name`, do `act`; what it returns replaces the call's result.

    Returns:
        a list that holds one number: how many calls there have been.
    """
    inner, calls = getattr(owner, name), [0]

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        instead = act() if calls[0] == k else None
        return inner(*args, **kwargs) if instead is None else instead

    patch.setattr(owner, name, wrapper)
    return calls
