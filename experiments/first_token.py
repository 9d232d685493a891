"""What the frozen states of minilm-l6 know of trec6's 600 questions, read in several ways by a converged fit.

    python -m experiments.first_token

`head_only` and `attention_fusion` leave the head's way of reading as it is: the first token, through the pooler. This
says how much of their score is the features' and how much the reading's.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from transformers import AutoModel, AutoTokenizer

from experiments.defaults.panel import PANEL, halves
from luthier.samples import model_path

Features = NDArray[np.float32]


def main() -> None:
    where = model_path("minilm-l6")
    model, tokenizer = AutoModel.from_pretrained(where).eval(), AutoTokenizer.from_pretrained(where)
    train, test = ([json.loads(line) for line in path.open()] for path in halves(_trec6()))
    learnt, asked = (_states(model, tokenizer, [row["text"] for row in rows]) for rows in (train, test))
    labels, right = [row["label"] for row in train], [row["label"] for row in test]
    for name in learnt:
        by = {c: LogisticRegression(max_iter=3000, C=c).fit(learnt[name], labels) for c in (1, 100)}
        scores = ", ".join(f"{fit.score(asked[name], right):.3f} at C = {c}" for c, fit in by.items())
        print(f"{name}: {scores}")


def _trec6() -> Any:
    return next(member for member in PANEL if member.name == "trec6")


@torch.no_grad()
def _states(model: Any, tokenizer: Any, texts: list[str]) -> dict[str, Features]:
    """Readings of the states by name, each (rows, d)."""
    found: dict[str, list[Features]] = {}
    for at in range(0, len(texts), 50):
        batch = tokenizer(texts[at : at + 50], padding=True, truncation=True, return_tensors="pt")
        states = torch.stack(model(**batch, output_hidden_states=True).hidden_states[1:])  # (layers, rows, n, d)
        shown = batch["attention_mask"][..., None]  # (rows, n, 1)
        first = states.mean(0)[:, :1]  # (rows, 1, d)
        for name, value in {
            "the last layer's first token": states[-1, :, 0],
            "the last layer's first token, through the pooler": model.pooler(states[-1]),
            "the layers' mean of the first token": first[:, 0],
            "the layers' mean of the first token, through the pooler": model.pooler(first),
            "the last layer's mean over tokens": (states[-1] * shown).sum(1) / shown.sum(1),
        }.items():
            found.setdefault(name, []).append(value.numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


if __name__ == "__main__":
    main()
