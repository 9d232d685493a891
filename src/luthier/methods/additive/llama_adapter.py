"""LLaMA-Adapter: learned tokens in upper layers' attention, with a softmax of their own and a gate that starts shut.

    context = softmax(Q K^T / sqrt(D)) V + tanh(g) softmax(Q K_p^T / sqrt(D)) V_p

    K_p = E W_k^T      V_p = E W_v^T

E: (P, d) per layer, W_k and W_v the frozen projections; K_p has no rotary, and g is one number a head. The gate starts
at zero, so the tuned model starts as the base model.

Zhang et al. 2023, "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention", arXiv:2303.16199,
section 3; in the form of the authors' code, where the gate is under a tanh.

Count: per layer P d + h; the bottom `skip` layers have none. 1.2 M for LLaMA-7B with P = 10 in 30 of 32 layers.
Claims: instruction tuning with 1.2 M numbers that does not disturb what the model knows in the first steps.
Cost: about LoRA's: two small products and a short attention in each upper layer.
Use it when: a large decoder follows instructions from few numbers, and the start must be the base.
Not when: rows of several tunings answer in one batch, or it must merge: neither can be.
Pitfalls: one softmax over tokens and text is prefix tuning, and no identity at the start; the bottom layers are left
out, not the top ones. While the gate is shut, E has no gradient: it moves from the second step on.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Attention
from luthier.core import ConfigError, at_least
from luthier.surgery import METHODS, Attend, Base, Edit, Method


@METHODS.register("llama_adapter", family="additive", paper="arXiv:2303.16199")
@dataclass(frozen=True, kw_only=True)
class LLaMAAdapter(Method):
    """Settings of LLaMA-Adapter."""

    length: Annotated[int, "learned tokens in each layer", at_least(1)] = 10
    skip: Annotated[int, "layers at the bottom of each stack that get none", at_least(0)] = 2

    mergeable: ClassVar[bool] = False
    starts_at_base: ClassVar[bool] = True
    default_lr: ClassVar[float] = 9e-3
    tiny: ClassVar[dict[str, int | float]] = {"length": 3, "skip": 1, "lr": 0.05}

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        for attention in self._attentions(anatomy):
            yield Attend(attention, lambda base, a=attention: Tokens(self.length, a, base))  # type: ignore[misc]

    def n_params(self, anatomy: Anatomy) -> int:
        return sum(self.length * anatomy.d + a.n_heads for a in self._attentions(anatomy))

    def _attentions(self, anatomy: Anatomy) -> list[Attention]:
        found = [a for a in anatomy.acting_attentions if not a.cross and a.layer >= self.skip]
        if not found:
            raise ConfigError(
                f"llama_adapter.skip: {self.skip} layers are left out, and this {anatomy.model_type} model has "
                f"{max(anatomy.depths.values())} in a stack. Leave fewer out."
            )
        return found


class Tokens(nn.Module):
    """The learned tokens of one attention, and a gate for each of its heads."""

    def __init__(self, length: int, attention: Attention, base: Base) -> None:
        super().__init__()
        self.heads, self.width = attention.n_kv_heads, attention.d_head
        kind = "cross" if attention.cross else "attn"
        self.of_keys, self.of_values = base.beside(f"{kind}.k"), base.beside(f"{kind}.v")
        self.tokens = nn.Parameter(torch.randn(length, base.site.d_in))
        self.gate = nn.Parameter(torch.zeros(attention.n_heads))

    def attend(self, inner: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query (B,H,T,D), key and value (B,H_kv,S,D) -> (B,T,H,D)."""
        of_text: Tensor = inner(query, key, value)
        keys, values = (self._heads(layer, len(query)) for layer in (self.of_keys, self.of_values))
        of_tokens: Tensor = inner(query, keys, values, of_text=False)
        # (H,) -> (H, 1), beside (B, T, H, D)
        return of_text + (torch.tanh(self.gate)[:, None] * of_tokens).to(of_text.dtype)

    def _heads(self, layer: Base, rows: int) -> Tensor:
        """(P, d) -> (rows, H_kv, P, D)."""
        made = layer.linear(layer.taken(self.tokens)).view(-1, self.heads, self.width)  # (P, H_kv, D)
        return made.transpose(0, 1).expand(rows, -1, -1, -1)
