"""Models of real size on the meta device, for counts: no weights are needed."""

from functools import cache

import torch
import transformers as hf

from luthier.anatomy import Anatomy
from luthier.surgery import METHODS

MODELS = {
    "bert": (hf.BertModel, hf.BertConfig()),
    "bert-large": (
        hf.BertModel,
        hf.BertConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16),
    ),
    "bert-for-two": (hf.BertForSequenceClassification, hf.BertConfig(num_labels=2)),
    "roberta": (
        hf.RobertaForSequenceClassification,
        hf.RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, num_labels=2),
    ),
    "t5": (
        hf.T5ForConditionalGeneration,
        hf.T5Config(d_model=768, d_ff=3072, d_kv=64, num_layers=12, num_heads=12),
    ),
}


@cache
def anatomy_of(name: str) -> Anatomy:
    """The anatomy of a model of real size."""
    cls, config = MODELS[name]
    with torch.device("meta"):
        return Anatomy.read(cls(config))


def trained(name: str, method: str, **settings: object) -> int:
    """Trained numbers by the formula."""
    return METHODS.get(method)(**settings).n_params(anatomy_of(name))


def stored(name: str, method: str, **settings: object) -> int:
    """Stored numbers by the formula."""
    return METHODS.get(method)(**settings).n_stored(anatomy_of(name))
