"""Attention fusion: for each token, a learned query weighs what the frozen model's layers say of it.

    h_i = sum_j a_ij v_ij      a_i = softmax_j(Q . v_ij)      v_ij: (d,), token i behind layer j    Q: (d,)

Q starts at zero, which is the mean of the layers: not what the base model computes. The head reads h. No gradient
enters the model.

Cao, Satya Prakash, Hamza 2022, "Attention Fusion: a light yet efficient late fusion mechanism for task adaptation in
NLU", doi:10.18653/v1/2022.findings-naacl.64. Whether the embedding is one of the layers, whether scores are scaled and
what the head looks like could not be checked; the first two are settings, the head is the model's own, a pooler before
it included and frozen. Where the model ends with a norm, every layer's states pass through that norm.

Count: d, and the head.
Claims: 0.0009 % of RoBERTa-large trained for two classes, its head among it.
Use it when: many tasks read one pass through a frozen model.
Not when: the result matters more than the cost: features do not change.
Pitfalls: attending over tokens instead of layers; one weight for all tokens is another method; the head has to learn
states that it never saw, so it wants a large rate. Where the model's head reads the first token alone, that is the
bound: on 600 questions of trec6 minilm-l6, trained by the mean over tokens, gives 0.41, as `head_only` does; a
converged fit of these readings gives 0.22 to 0.48, of the mean over tokens 0.82 (`python -m experiments.first_token`).
So it does not beat `head_only` there, whatever the rate: on 600 other questions 0.36, at head_only's 3e-2 0.38, and
`head_only` 0.40.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy
from luthier.methods.parts.frozen_below import FrozenBelow, no_new_head
from luthier.surgery import METHODS, AddBranch, BlockCall, Context, Edit


@METHODS.register("attention_fusion", family="additive", paper="doi:10.18653/v1/2022.findings-naacl.64")
@dataclass(frozen=True, kw_only=True)
class AttentionFusion(FrozenBelow):
    """Settings of attention fusion."""

    embeddings: Annotated[bool, "what the first block reads counts as a layer"] = False
    scaled: Annotated[bool, "scores are divided by the root of d"] = False

    starts_at_base: ClassVar[bool] = False
    default_lr: ClassVar[float] = 1e-2

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        if not anatomy.head_tensors:
            raise no_new_head(anatomy, "attention_fusion", "one that was trained reads the last layer alone")
        yield AddBranch(lambda model, anatomy: Fusion(self, model, anatomy))

    def n_params(self, anatomy: Anatomy) -> int:
        return anatomy.d


class Fusion(nn.Module):
    """The query, and what it does with the states of the last stack."""

    def __init__(self, method: AttentionFusion, model: Any, anatomy: Anatomy) -> None:
        super().__init__()
        self.embeddings = method.embeddings
        self.scale = 1 / math.sqrt(anatomy.d) if method.scaled else 1.0
        self.query = nn.Parameter(torch.zeros(anatomy.d))
        norms = [s for s in anatomy.all_sites if s.kind == "norm" and s.part == "final" and s.stack != "encoder"]
        modules = dict(model.named_modules())
        self.__dict__["norm"] = modules[norms[0].path] if anatomy.pre_norm and norms else None  # the model's own

    def forward(self, stack: str, calls: list[BlockCall], context: Context, last: Tensor) -> Tensor:
        if stack == "encoder":
            return last
        layers = [call.after for call in calls]
        if self.embeddings:
            layers = [calls[0].before, *layers]
        norm = self.__dict__["norm"]
        with torch.no_grad():
            states = torch.stack([v if norm is None else norm(v) for v in layers], dim=-2)
        return self.fuse(states.to(self.query.dtype))

    def weights(self, states: Tensor) -> Tensor:
        """(..., layers, d) -> (..., layers), which sum to 1."""
        return torch.softmax(states @ self.query * self.scale, dim=-1)

    def fuse(self, states: Tensor) -> Tensor:
        """(..., layers, d) -> (..., d)."""
        return (self.weights(states).unsqueeze(-1) * states).sum(-2)
