"""LLaMA-Adapter: learned tokens in upper layers' attention, with a softmax of their own and a gate that starts shut.

    context = softmax(Q K^T / sqrt(D)) V + tanh(g) softmax(Q K_p^T / sqrt(D)) V_p

    K_p = E W_k^T      V_p = E W_v^T

E: (P, d) per layer, W_k and W_v the frozen projections; K_p has no rotary, and g is one number a head; gate="layer" has
one for all heads, and no tanh, which is peft's form. The gate starts at zero, so the tuned model starts as the base
model.

Zhang et al. 2023, "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention", arXiv:2303.16199,
section 3; in the form of the authors' code, where the gate is under a tanh.

Count: per layer P d + h, or P d + 1 with gate="layer"; the bottom `skip` layers have none. 1.2 M for LLaMA-7B with
P = 10 in 30 of 32 layers.
Claims: instruction tuning with 1.2 M numbers that does not disturb what the model knows in the first steps.
Cost: about LoRA's: two small products and a short attention in each upper layer.
Use it when: a large decoder follows instructions from few numbers, and the start must be the base.
Not when: rows of several tunings answer in one batch, or it must merge: neither can be.
Pitfalls: one softmax over tokens and text is prefix tuning, and no identity at the start; the bottom layers are left
out, not the top ones. While the gate is shut, E has no gradient: it moves from the second step on.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Attention
from luthier.core import CannotMerge, ConfigError, at_least
from luthier.surgery import (
    METHODS,
    PEFT_LAYERS,
    Attend,
    Base,
    Edit,
    Method,
    PeftForm,
    PeftIn,
    PeftOut,
    PeftTaken,
    PeftWhole,
)

_THERE = {"tokens": "adaption_prompt", "gate": "adaption_gate"}


def _apart(anatomy: Anatomy) -> str | None:
    """Why peft computes something else on such a model."""
    if anatomy.model_type not in ("llama", "mistral"):
        return f"peft has the method for models of llama and mistral, and this is {anatomy.model_type}"
    if any(site.kind == "attn.o" and site.bias is not None for site in anatomy.all_sites):
        return "peft adds the bias of the output projection a second time, even while its gate is shut"
    return None


def _out(going: PeftOut) -> tuple[dict[str, Tensor], dict[str, object]]:
    anatomy, method = going.anatomy, going.method
    why = _apart(anatomy)
    if why is not None or method.gate != "layer":
        why = why or "peft has one number for all heads of a layer and no tanh. Train with gate=layer"
        raise CannotMerge(f"llama_adapter: {why}.")
    tensors = {}
    for layer, path in _paths(anatomy).items():
        for short, theirs in _THERE.items():
            value = going.stored.get(f"attn.attend@{layer}.{short}")
            if value is not None:
                tensors[f"{PEFT_LAYERS}{path}.{theirs}"] = value[None] if short == "tokens" else value
    layers = len(tensors) // 2
    return tensors, {"target_modules": "self_attn", "adapter_len": method.length, "adapter_layers": layers}


def _back(coming: PeftIn) -> PeftTaken:
    why = _apart(coming.anatomy)
    if why is not None:
        raise ConfigError(f"{coming.where}: {why}.")
    paths = _paths(coming.anatomy)
    skip = len(paths) - int(coming.facts["adapter_layers"])
    stored = {
        f"attn.attend@{layer}.{short}": coming.tensor(f"{PEFT_LAYERS}{path}.{theirs}").flatten(0, -2 if i == 0 else -1)
        for layer, path in paths.items()
        if layer >= skip
        for i, (short, theirs) in enumerate(_THERE.items())
    }
    return PeftTaken({"length": coming.facts["adapter_len"], "skip": skip, "gate": "layer"}, stored)


def _paths(anatomy: Anatomy) -> dict[int, str]:
    return {a.layer: a.path for a in anatomy.acting_attentions}


@METHODS.register("llama_adapter", family="additive", paper="arXiv:2303.16199")
@dataclass(frozen=True, kw_only=True)
class LLaMAAdapter(Method):
    """Settings of LLaMA-Adapter."""

    length: Annotated[int, "learned tokens in each layer", at_least(1)] = 10
    skip: Annotated[int, "layers at the bottom of each stack that get none", at_least(0)] = 2
    gate: Annotated[Literal["heads", "layer"], "one under a tanh for each head, or one number for all"] = "heads"

    default_lr: ClassVar[float] = 9e-3
    tiny: ClassVar[dict[str, int | float]] = {"length": 3, "skip": 1, "lr": 0.05}
    peft: ClassVar[PeftForm | None] = PeftWhole(
        "ADAPTION_PROMPT", out=_out, back=_back, also=("adapter_len", "adapter_layers"), heads=False
    )

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        for attention in self._attentions(anatomy):
            yield Attend(attention, lambda base, a=attention: Tokens(self.length, a, self.gate, base))  # type: ignore[misc]

    def n_params(self, anatomy: Anatomy) -> int:
        gates = [a.n_heads if self.gate == "heads" else 1 for a in self._attentions(anatomy)]
        return self.length * anatomy.d * len(gates) + sum(gates)

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

    def __init__(self, length: int, attention: Attention, gate: str, base: Base) -> None:
        super().__init__()
        self.heads, self.width = attention.n_kv_heads, attention.d_head
        kind = "cross" if attention.cross else "attn"
        self.of_keys, self.of_values = base.beside(f"{kind}.k"), base.beside(f"{kind}.v")
        self.tokens = nn.Parameter(torch.randn(length, base.site.d_in))
        self.squashed = gate == "heads"
        self.gate = nn.Parameter(torch.zeros(attention.n_heads if self.squashed else 1))

    def attend(self, inner: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query (B,H,T,D), key and value (B,H_kv,S,D) -> (B,T,H,D)."""
        of_text: Tensor = inner(query, key, value)
        keys, values = (self._heads(layer, len(query)) for layer in (self.of_keys, self.of_values))
        of_tokens: Tensor = inner(query, keys, values, of_text=False)
        gate = torch.tanh(self.gate) if self.squashed else self.gate
        # (H,) or (1,) -> (H, 1), beside (B, T, H, D)
        return of_text + (gate[:, None] * of_tokens).to(of_text.dtype)

    def _heads(self, layer: Base, rows: int) -> Tensor:
        """(P, d) -> (rows, H_kv, P, D)."""
        made = layer.linear(layer.taken(self.tokens)).view(-1, self.heads, self.width)  # (P, H_kv, D)
        return made.transpose(0, 1).expand(rows, -1, -1, -1)
