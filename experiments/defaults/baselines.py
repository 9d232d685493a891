"""What costs next to nothing: always the same answer, words counted, and features of the model as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

__all__ = ["BASELINES", "score"]

MODEL = "sample:minilm-l6"
BASELINES = ("majority", "tfidf", "probe")


def score(name: str, train: Path, test: Path) -> list[bool]:
    """For each test row, whether the baseline's answer is right."""
    learnt, held = _rows(train), _rows(test)
    wanted = np.array([row["label"] for row in held])
    labels = np.array([row["label"] for row in learnt])
    if name == "majority":
        names, counts = np.unique(labels, return_counts=True)
        said = np.full(len(held), names[counts.argmax()])
    elif name == "tfidf":
        model = make_pipeline(
            TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(max_iter=1000, C=10.0)
        )
        said = model.fit([_text(row) for row in learnt], labels).predict([_text(row) for row in held])
    else:
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, C=0.1))
        said = probe.fit(_features(train, learnt), labels).predict(_features(test, held))
    return [bool(right) for right in said == wanted]


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _text(row: dict[str, Any]) -> str:
    return " ".join(str(row[name]) for name in ("text", "text_pair") if name in row)


def _features(path: Path, rows: list[dict[str, Any]]) -> NDArray[np.float32]:
    """The mean of the last states over each row's tokens, (rows, d); kept beside the rows."""
    from transformers import AutoModel

    from luthier.workflow.load_model import find_model, load_tokenizer

    kept = path.with_suffix(".npy")
    if kept.exists():
        return np.asarray(np.load(kept))
    source = find_model(MODEL)
    tokenizer = load_tokenizer(source)
    model = AutoModel.from_pretrained(source.path, local_files_only=True).eval()
    found = []
    for start in range(0, len(rows), 16):
        some = rows[start : start + 16]
        pairs = {"text_pair": [row["text_pair"] for row in some]} if "text_pair" in some[0] else {}
        batch = tokenizer(
            [row["text"] for row in some], **pairs, truncation=True, max_length=256, padding=True, return_tensors="pt"
        )
        with torch.inference_mode():
            states = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        found.append(((states * mask).sum(1) / mask.sum(1)).numpy())
    np.save(kept, np.concatenate(found))
    return np.asarray(np.load(kept))
