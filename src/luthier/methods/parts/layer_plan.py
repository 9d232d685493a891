"""A plan that says for each layer what stands in it, and how large.

adapter   ffn_out <- y + f(y W_d + b_d) W_u + b_u          LoRA   B A x at queries and values
parallel  ffn_out <- y + 2 (f(x W_d + b_d) W_u + b_u)      biases of the block train
prefix    keys and values before those of the text
"""

import math
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Attention, Site
from luthier.core import AnatomyError, ConfigError
from luthier.methods.parts.bottleneck import Bottleneck, biases_rest, bottleneck_params, width_of
from luthier.methods.parts.closing import Closing
from luthier.methods.parts.low_rank import ThinUpdate
from luthier.methods.parts.parallel_branch import Beside
from luthier.surgery import Attachment, Base, Edit, Group, Method, PrependKeys, TunedView, Unfreeze, attach_each

__all__ = [
    "InLayer",
    "Layer",
    "LayerPrefixes",
    "Plan",
    "Planned",
    "cost_of",
    "layers_named",
    "layers_of",
    "plan_edits",
    "plan_params",
]

Layer = tuple[str, int]
"""Its stack, "" for the only one, and its number there."""


@dataclass(frozen=True, kw_only=True)
class InLayer:
    """What stands in one layer. A size of 0 is nothing, not something of no width."""

    adapter: int = 0
    """width of the adapter behind the feed-forward layer"""
    lora: int = 0
    """rank at queries and values"""
    prefix: int = 0
    """keys and values before the text's"""
    parallel: int = 0
    """width of the adapter beside the feed-forward layer, which reads what that reads"""
    biases: int = 0
    """1: all biases of the block train"""


Plan = Mapping[Layer, InLayer]


def layers_of(anatomy: Anatomy) -> list[Layer]:
    """The layers of the stack that reads and writes words, or of all of them, in order."""
    return [(b.stack, b.layer) for b in anatomy.blocks if not anatomy.text_stack or b.stack == anatomy.text_stack]


def plan_edits(anatomy: Anatomy, plan: Plan, asked_by: str) -> Iterator[Edit]:
    """The edits of a plan.

    Raises:
        AnatomyError: the model has no place for a part of it.
    """
    for layer, here in plan.items():
        if here.adapter:
            made = _sites(anatomy, layer, "ffn_out", asked_by)
            yield from attach_each(made, partial(_behind, here.adapter))
        if here.parallel:
            made = _sites(anatomy, layer, "ffn_out", asked_by)
            yield from attach_each(made, partial(_beside, here.parallel))
        if here.lora:
            made = _sites(anatomy, layer, ("attn.q", "attn.v"), asked_by)
            yield from attach_each(made, partial(_thin, here.lora))
        if here.biases:
            yield from (Unfreeze(name) for name in _biases(anatomy, layer))
    lengths = {a: plan[layer].prefix for layer in plan for a in _attentions(anatomy, layer) if plan[layer].prefix}
    if lengths:
        if not all(a.interface for a in anatomy.attentions):
            raise AnatomyError(
                f"{asked_by}: the attention of this {anatomy.model_type} model does not go through transformers' "
                "attention interface, so keys cannot be put before those of the text. Use lora, or another method."
            )
        yield PrependKeys(LayerPrefixes(lengths), tuple(lengths), max(lengths.values()))


def plan_params(anatomy: Anatomy, plan: Plan) -> int:
    """Numbers that a plan trains."""
    kinds = [f.name for f in fields(InLayer)]
    return sum(cost_of(anatomy, layer, kind, getattr(here, kind)) for layer, here in plan.items() for kind in kinds)


def cost_of(anatomy: Anatomy, layer: Layer, kind: str, size: int, asked_by: str = "") -> int:
    """Numbers of one part of one layer; what is absent costs nothing.

    Raises:
        AnatomyError: the layer has no place for it.
    """
    if size == 0:
        return 0
    if kind in ("adapter", "parallel"):
        return bottleneck_params(_sites(anatomy, layer, "ffn_out", asked_by), size)
    if kind == "lora":
        return size * sum(s.d_in + s.d_out for s in _sites(anatomy, layer, ("attn.q", "attn.v"), asked_by))
    if kind == "prefix":
        here = _attentions(anatomy, layer)
        if not here:
            raise AnatomyError(
                f"{asked_by}: layer {layer[1]} of this {anatomy.model_type} model has no attention, so no keys can be "
                "put before those of the text there. Use lora, or another method."
            )
        return size * sum(2 * a.n_kv_heads * a.d_head for a in here)
    return sum(math.prod(anatomy.tensors[name]) for name in _biases(anatomy, layer))


@dataclass(frozen=True, kw_only=True)
class Planned(Method):
    """A method that says for each layer what stands in it; edits, count and decay follow."""

    starts_at_base: ClassVar[bool] = False

    @abstractmethod
    def plan(self, anatomy: Anatomy) -> Plan:
        """What stands in each layer.

        Raises:
            ConfigError, AnatomyError: not on this model, or not so.
        """

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        return plan_edits(anatomy, self.plan(anatomy), self.name)

    def n_params(self, anatomy: Anatomy) -> int:
        return plan_params(anatomy, self.plan(anatomy))

    def groups(self, tuned: TunedView) -> list[Group]:
        return biases_rest(self, tuned, Bottleneck)


def _behind(width: int, site: Site, base: Base) -> Attachment:
    return Closing(width_of(site), width, "gelu", "plain")


def _beside(width: int, site: Site, base: Base) -> Attachment:
    return Beside(width_of(site), width, "relu", scale=2.0)


def _thin(rank: int, site: Site, base: Base) -> Attachment:
    return ThinUpdate(site.d_in, site.d_out, rank, 16.0 / rank)


def _sites(anatomy: Anatomy, layer: Layer, kinds: str | tuple[str, ...], asked_by: str) -> tuple[Site, ...]:
    wanted = (kinds,) if isinstance(kinds, str) else kinds
    return anatomy.sites(*wanted, layers=[layer[1]], stack=layer[0] or None, asked_by=asked_by)


def _attentions(anatomy: Anatomy, layer: Layer) -> list[Attention]:
    return [a for a in anatomy.attentions if (a.stack, a.layer) == layer and not a.cross]


def _biases(anatomy: Anatomy, layer: Layer) -> list[str]:
    path = next(b.path for b in anatomy.blocks if (b.stack, b.layer) == layer)
    return [n for n in anatomy.bias_tensors() if n.startswith(f"{path}.")]


class LayerPrefixes(nn.Module):
    """Keys and values of some attentions, each with a length of its own."""

    def __init__(self, lengths: Mapping[Attention, int]) -> None:
        super().__init__()
        self.shapes = [(a.n_kv_heads, a.d_head) for a in lengths]
        drawn = [0.02 * torch.randn(n, 2 * a.n_kv_heads * a.d_head) for a, n in lengths.items()]
        self.rows = nn.ParameterList([nn.Parameter(rows) for rows in drawn])

    def keys_values(self, context: object) -> list[tuple[Tensor, Tensor]]:
        """One pair (n_kv_heads, P, d_head) per attention."""
        pairs = []
        for (heads, width), rows in zip(self.shapes, self.rows, strict=True):
            keys, values = (t.unflatten(-1, (heads, width)).transpose(0, 1) for t in rows.split(heads * width, 1))
            pairs.append((keys, values))
        return pairs


def layers_named(words: str, setting: str) -> list[int]:
    """The layers that the words name, in order.

    >>> layers_named("0-2+5-5", "layers")
    [0, 1, 2, 5]

    Raises:
        ConfigError: they name none.
    """
    found: set[int] = set()
    for part in words.split("+"):
        ends = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part.strip())
        own = range(int(ends[1]), int(ends[2] or ends[1]) + 1) if ends else range(0)
        if not own:
            raise ConfigError(f"{setting}: {part!r} of {words!r} names no layers. Write all, or such as 0-2+5-5.")
        found.update(own)
    return sorted(found)
