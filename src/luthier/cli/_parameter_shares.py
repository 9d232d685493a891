"""How many numbers each method trains on minilm-l6: by its formula on the model's shape, without weights."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers

import luthier.methods
from luthier.anatomy import Anatomy
from luthier.core import LuthierError
from luthier.surgery import METHODS, method

__all__ = ["MINILM_L6", "count_shares", "path", "write_shares"]

# The shape of the sample minilm-l6, with a head for trec6's six classes.
MINILM_L6 = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "vocab_size": 30522,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "num_labels": 6,
}


def path() -> Path:
    """The folder that the package ships, one file a method."""
    return Path(luthier.methods.__path__[0]) / "shares"


def count_shares() -> dict[str, dict[str, Any]]:
    """Method -> trained numbers (the head's 2,310 included) and their share of all numbers of the model.

    A method that cannot be put on this model (it needs a site that BERT lacks) has no entry.
    """
    with torch.device("meta"):
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**MINILM_L6))
    anatomy = Anatomy.read(model)
    head = sum(torch.Size(anatomy.tensors[name]).numel() for name in anatomy.head_tensors)
    counted = {}
    for name in METHODS.ours():
        try:
            trained = method(name).n_params(anatomy) + head
        except LuthierError:
            continue
        counted[name] = {"trained": trained, "share": round(trained / anatomy.n_params, 6)}
    return counted


def write_shares(counted: dict[str, dict[str, Any]]) -> None:
    """Store them where `luthier methods` reads them; files of methods that are gone go too."""
    path().mkdir(exist_ok=True)
    for old in path().glob("*.json"):
        if old.stem not in counted:
            old.unlink()
    for name, share in counted.items():
        (path() / f"{name}.json").write_text(json.dumps(share) + "\n", encoding="utf-8")
