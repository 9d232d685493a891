"""Vectors before the embedded text."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy
from luthier.core import ConfigError

__all__ = ["Prompt", "prompt_width"]

_FREQUENT = 5_000


def prompt_width(anatomy: Anatomy, asked_by: str) -> int:
    """Width of the word embedding; of the stream, where a model reads no words."""
    if anatomy.vocab_size is None and not any(s.kind == "embed" for s in anatomy.all_sites):
        return anatomy.d
    return anatomy.sites("embed", asked_by=asked_by)[0].d_out


class Prompt(nn.Module):
    """The vectors. Called, it gives them: (P, d)."""

    def __init__(
        self,
        length: int,
        d: int,
        *,
        init: Literal["uniform", "vocabulary", "words"] = "vocabulary",
        span: float = 0.5,
        words: Sequence[Sequence[int]] = (),
    ) -> None:
        super().__init__()
        self.init, self.words = init, words
        self.vectors = nn.Parameter(torch.empty(length, d).uniform_(-span, span))

    def forward(self) -> Tensor:
        return self.vectors

    @torch.no_grad()
    def start(self, embed: nn.Module) -> None:
        """Copy word embeddings where `init` says so. Surgery calls it once, with the model's own embedding.

        Raises:
            ConfigError: a token id that the vocabulary does not have.
        """
        if self.init == "uniform":
            return
        weight = embed.weight
        assert isinstance(weight, Tensor)
        outside = [i for group in self.words for i in group if not 0 <= i < weight.shape[0]]
        if outside:
            raise ConfigError(
                f"prompt_tuning.words: no token has the id {outside[0]}; the vocabulary has {weight.shape[0]}."
            )
        sampled = torch.randperm(min(_FREQUENT, weight.shape[0]))
        rows = [torch.tensor(group) for group in self.words]
        while len(rows) < len(self.vectors):  # a vocabulary smaller than the prompt is gone through again
            rows.append(sampled[len(rows) % len(sampled)][None])
        # Through the layer, not from its table: some models scale what they look up.
        looked_up = [embed(ids.to(weight.device)).float().mean(0) for ids in rows]
        self.vectors.copy_(torch.stack(looked_up))
