"""UniPELT: LoRA, prefix and adapter together, each behind a gate that looks at the example.

    μ(z) = mean of z over the real tokens                                one number per example, G = μ(sigmoid(x w + c))

    q = x W_q^T + G_q x A_q^T B_q^T       v likewise                    x: what the projection reads
    K = [G_P P_k ; K]    V = [G_P P_v ; V]                              x: what the attention reads
    f = y + G_A (σ(y W_d + b_d) W_u + b_u)                              y: what the feed-forward layer gives

The gate takes the place of LoRA's alpha / rank. Gates start near a half, so the model starts elsewhere than the base.

Mao et al. 2022, "UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning", arXiv:2110.07577.

Count: stored 2 l d L + (2 d k + k + d) L + 4 d r L + 4 (d + 1) L; the prefix's network trains in place of its rows.
Claims: 1 to 4 % above the best single one of its parts on GLUE, most with little data; 1.3 % of BERT-base stored.
Cost: three methods in every block, each with a gate that reads its input: half as much again as LoRA on short rows.
Use it when: rows are few and it is not known which of LoRA, prefix and adapter suits.
Not when: simplicity or size counts: it is three methods at once.
Measured: `python -m experiments.rates unipelt --seed 2`, 300 questions of trec6 that the table does not score: 0.88. A
new head learns at 5e-3, which is ours: at 5e-4 seeds differed, 0.88 and 0.66 on the table's rows.
Pitfalls: padding must stay out of the mean, or a result depends on its neighbours (the released code lets it in);
merging LoRA would ignore its gate. In generation the gates are those of the prompt, at every step. A gate of a decoder
averages over the whole text it is trained on, answers included: one number per module and layer that looks ahead. The
paper used encoders and encoder-decoders of understanding tasks; measure before you trust it elsewhere.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Attention, Site
from luthier.core import ConfigError, at_least
from luthier.methods.parts.bottleneck import Activation, Bottleneck, bottleneck_params
from luthier.methods.parts.prefixes import Prefixes, drop_networks, prefix_params, prefix_stored
from luthier.methods.parts.text_mean import mean_over_text
from luthier.surgery import METHODS, Attachment, Context, Edit, Method, PrependKeys, TunedView, attach_each

_PARTS = ("lora", "prefix", "adapter")


@METHODS.register("unipelt", family="hybrid", paper="arXiv:2110.07577")
@dataclass(frozen=True, kw_only=True)
class UniPELT(Method):
    """Settings of UniPELT."""

    use: Annotated[tuple[str, ...], "which of lora, prefix, adapter"] = _PARTS
    rank: Annotated[int, "of the update of queries and values", at_least(1)] = 8
    length: Annotated[int, "keys and values before the text", at_least(1)] = 10
    mlp_width: Annotated[int, "inner width of the prefix's network in training; 0 for none", at_least(0)] = 512
    width: Annotated[int, "of the adapter's bottleneck", at_least(1)] = 48
    activation: Annotated[Activation, "inside the adapter"] = "relu"

    starts_at_base: ClassVar[bool] = False
    default_lr: ClassVar[float] = 5e-4
    default_head_lr: ClassVar[float | None] = 5e-3
    looks_ahead: ClassVar[bool] = True
    tiny: ClassVar[dict[str, int]] = {"length": 3, "width": 6, "mlp_width": 7, "rank": 3}

    def __post_init__(self) -> None:
        if not self.use or set(self.use) - set(_PARTS) or len(set(self.use)) < len(self.use):
            raise ConfigError(
                f"unipelt.use: {', '.join(self.use) or 'nothing'}; name some of {', '.join(_PARTS)}, once."
            )

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        yield from attach_each(self._updated(anatomy), lambda site, base: GatedUpdate(site, self.rank))
        if "prefix" in self.use:
            gates = {site.key: PrefixGate(site) for site in self._watched(anatomy)}
            prefixes = Prefixes(anatomy, self.length, self.mlp_width, asked_by="unipelt")
            order = [gates[self._watch(anatomy, attention).key] for attention in anatomy.acting_attentions]
            yield PrependKeys(GatedPrefixes(prefixes, order), anatomy.acting_attentions, self.length)
            yield from attach_each(self._watched(anatomy), lambda site, base: gates[site.key])
        yield from attach_each(
            self._closed(anatomy), lambda site, base: GatedAdapter(site, self.width, self.activation)
        )

    def n_params(self, anatomy: Anatomy) -> int:
        prefix = prefix_params(anatomy, self.length, self.mlp_width, "unipelt") if "prefix" in self.use else 0
        return prefix + self._rest(anatomy)

    def n_stored(self, anatomy: Anatomy) -> int:
        prefix = prefix_stored(anatomy, self.length, "unipelt") if "prefix" in self.use else 0
        return prefix + self._rest(anatomy)

    def finish(self, tuned: TunedView) -> None:
        drop_networks(tuned)

    def _rest(self, anatomy: Anatomy) -> int:
        updates = sum(self.rank * (s.d_in + s.d_out) + s.d_in + 1 for s in self._updated(anatomy))
        adapters = self._closed(anatomy)
        gates = sum(s.d_in + 1 for s in self._watched(anatomy)) + sum(s.d_out + 1 for s in adapters)
        return updates + bottleneck_params(adapters, self.width) + gates

    def _updated(self, anatomy: Anatomy) -> tuple[Site, ...]:
        return anatomy.sites("attn.q", "attn.v", asked_by="unipelt") if "lora" in self.use else ()

    def _closed(self, anatomy: Anatomy) -> tuple[Site, ...]:
        return anatomy.sites("ffn_out", asked_by="unipelt") if "adapter" in self.use else ()

    def _watched(self, anatomy: Anatomy) -> tuple[Site, ...]:
        watched = {s.key: s for s in (self._watch(anatomy, a) for a in anatomy.acting_attentions)}
        return tuple(watched.values()) if "prefix" in self.use else ()

    def _watch(self, anatomy: Anatomy, attention: Attention) -> Site:
        """Where an attention's input is seen: its keys' projection; for cross-attention, where the decoder asks."""
        kind = "cross.q" if attention.cross else "attn.k"
        sites = anatomy.sites(kind, layers=[attention.layer], stack=attention.stack or None, asked_by="unipelt")
        return sites[0]


class _Gate(nn.Module):
    """One number per example: the mean over its real tokens of sigmoid(x w + c). x: (B, T, d) -> (B, 1, 1)."""

    def __init__(self, d: int, stack: str) -> None:
        super().__init__()
        self.linear = nn.Linear(d, 1)
        self.stack = stack

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return context.once(
            id(self), lambda: mean_over_text(torch.sigmoid(self.linear(x)), context.mask_for(self.stack))
        )


class GatedUpdate(Attachment):
    """Adds a thin product, times the gate of what the projection reads."""

    kind = "delta"
    per_token = False
    reads_whole_text = True

    def __init__(self, site: Site, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, site.d_in))
        self.b = nn.Parameter(torch.zeros(site.d_out, rank))
        self.gate = _Gate(site.d_in, site.stack)
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        update: Tensor = self.gate(x, self.context) * (x @ self.a.T @ self.b.T)
        return y + update


class GatedAdapter(Bottleneck):
    """Adds a bottleneck of the sublayer's output, times the gate of that output."""

    kind = "sequential"
    needs_input = False
    per_token = False
    reads_whole_text = True

    def __init__(self, site: Site, width: int, activation: Activation) -> None:
        super().__init__(site.d_out, width, activation)
        self.gate = _Gate(site.d_out, site.stack)
        for layer in (self.down, self.up):
            nn.init.normal_(layer.weight, std=0.02)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        rows = y if y.dim() == 3 else y.view(self.context.batch, -1, y.shape[-1])  # OPT flattens batch and tokens
        return self.add(rows, rows, self.gate(rows, self.context)).view(y.shape)


class PrefixGate(Attachment):
    """Sees what an attention reads and holds the gate of its prefix; changes nothing itself."""

    kind = "delta"
    per_token = False
    reads_whole_text = True

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.gate = _Gate(site.d_in, site.stack)
        self.opened: Tensor | None = None

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        self.opened = self.gate(x, self.context)
        return y


class GatedPrefixes(nn.Module):
    """Prefixes whose keys and values are multiplied by the gate of the attention that asks for them."""

    def __init__(self, prefixes: Prefixes, gates: list[PrefixGate]) -> None:
        super().__init__()
        self.prefixes = prefixes
        self.__dict__["gates"] = gates  # they belong to their sites, where they are trained and saved

    def keys_values(self, context: Context) -> list[tuple[Any, Any]]:
        """One pair of functions per attention; each gives (B, n_kv_heads, P, d_head)."""
        pairs = self.prefixes.keys_values(context)
        gates: list[PrefixGate] = self.__dict__["gates"]
        return [(_behind(gate, k), _behind(gate, v)) for gate, (k, v) in zip(gates, pairs, strict=True)]

    def stored(self) -> dict[str, Tensor]:
        """The rows of the prefixes."""
        return self.prefixes.stored()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take rows; networks are dropped."""
        self.prefixes.restore(tensors)


def _behind(gate: PrefixGate, rows: Tensor) -> Callable[[], Tensor]:
    def give() -> Tensor:
        assert gate.opened is not None, "the attention asked for its prefix before its projections ran"
        return gate.opened[..., None] * rows

    return give
