"""Vectors of texts by an encoder: the mean of its last states over a text's tokens, as sentence encoders are trained.

Paper: arXiv:1908.10084 (mean pooling).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from luthier.core import ModelError
from luthier.data.infer_task import kind_of_model
from luthier.data.tokenizer import position_limit, tokenize
from luthier.training.precision import choose_device
from luthier.workflow.load_model import find_model, load_config, load_tokenizer, quiet

__all__ = ["SentenceVectors"]

_MOST = 32  # texts of a batch


class SentenceVectors:
    """An encoder that is called with texts and returns their vectors.

    A text is cut where the encoder has no more positions: its beginning says what it is about.

    Args:
        name: a model folder, sample:NAME, or a hub name.

    Raises:
        ModelError: it is no encoder.
    """

    def __init__(self, name: str, device: str = "auto") -> None:
        from transformers import AutoModel

        source = find_model(name)
        config = load_config(source)
        if kind_of_model(config) != "encoder":
            raise ModelError(
                f"{name}: {config.model_type} is no encoder, and vectors of texts are made by one. Name one, such as "
                "sample:minilm-l6."
            )
        self.device = choose_device(device)
        self.tokenizer = load_tokenizer(source)
        with quiet():
            model: Any = AutoModel.from_pretrained(source.path, local_files_only=True, use_safetensors=True)
        self.model = model.to(self.device).float().eval()
        known = [n for n in (position_limit(config), self.tokenizer.model_max_length) if n is not None and n < 10**9]
        self.longest = min([*known, 512])

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(texts, width)"""
        ids = [one[: self.longest] for one in tokenize(self.tokenizer, texts)["input_ids"]]
        found = np.zeros((len(ids), int(self.model.config.hidden_size)), dtype=np.float32)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for start in range(0, len(order), _MOST):
            piece = order[start : start + _MOST]
            width = max(1, *(len(ids[i]) for i in piece))
            batch = torch.zeros((len(piece), width), dtype=torch.long)
            mask = torch.zeros_like(batch)
            for row, i in enumerate(piece):
                batch[row, : len(ids[i])] = torch.tensor(ids[i], dtype=torch.long)
                mask[row, : len(ids[i])] = 1
            with torch.inference_mode():
                states = self.model(input_ids=batch.to(self.device), attention_mask=mask.to(self.device))[0].cpu()
            share = mask.unsqueeze(-1) / mask.sum(1).clamp(min=1).view(-1, 1, 1)  # (texts, tokens, 1)
            found[piece] = (states * share).sum(1).numpy()
        return found
