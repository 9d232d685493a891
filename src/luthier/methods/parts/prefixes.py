"""Trained keys and values before those of the text: shared by prefix tuning and by the hybrids that hold one.

    [P_k, P_v] of all layers = E W_1 ... : (P, Σ 2 n_kv d_head), either trained as they are, or during training

    rows = W_2 tanh(W_1 E + b_1) + b_2          E: (P, d)    W_1: (q, d)    W_2: (Σ 2 n_kv d_head, q)

Encoder, decoder and cross-attention have prefixes, and networks, of their own. The network is dropped at the end.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Attention
from luthier.core import AnatomyError
from luthier.surgery import Context, TunedView

__all__ = ["Prefixes", "drop_networks", "groups_of", "prefix_params", "prefix_stored"]


def groups_of(anatomy: Anatomy, asked_by: str) -> dict[str, tuple[Attention, ...]]:
    """The attentions that share one network, by the network's name.

    Raises:
        AnatomyError: an attention that keys cannot be put into from outside.
    """
    if not anatomy.acting_attentions or not all(a.interface for a in anatomy.attentions):
        raise AnatomyError(
            f"{asked_by}: the attention of this {anatomy.model_type} model does not go through transformers' attention "
            "interface, so keys cannot be put before those of the text. Use prompt_tuning, or another method."
        )
    groups: dict[str, list[Attention]] = {}
    for attention in anatomy.acting_attentions:
        name = "cross" if attention.cross else attention.stack or "self"
        groups.setdefault(name, []).append(attention)
    return {name: tuple(members) for name, members in groups.items()}


def _columns(members: tuple[Attention, ...]) -> int:
    return sum(2 * a.n_kv_heads * a.d_head for a in members)


def prefix_stored(anatomy: Anatomy, length: int, asked_by: str) -> int:
    """Numbers of the keys and values alone: 2 P n_kv d_head per attention."""
    return sum(length * _columns(members) for members in groups_of(anatomy, asked_by).values())


def prefix_params(anatomy: Anatomy, length: int, mlp_width: int, asked_by: str) -> int:
    """Numbers that train: those of the networks, where there are any."""
    if mlp_width == 0:
        return prefix_stored(anatomy, length, asked_by)
    total = 0
    for members in groups_of(anatomy, asked_by).values():
        columns = _columns(members)
        total += length * anatomy.d + (anatomy.d + 1) * mlp_width + (mlp_width + 1) * columns
    return total


class _Rows(nn.Module):
    """The keys and values of some attentions, (P, columns): a parameter, or a network that computes them."""

    def __init__(self, length: int, d: int, columns: int, mlp_width: int) -> None:
        super().__init__()
        self.network: nn.Sequential | None = None
        self.embedding: nn.Parameter | None = None
        self.rows: nn.Parameter | None = None
        if mlp_width:
            self.embedding = nn.Parameter(torch.randn(length, d))
            self.network = nn.Sequential(nn.Linear(d, mlp_width), nn.Tanh(), nn.Linear(mlp_width, columns))
        else:
            self.rows = nn.Parameter(torch.randn(length, columns) * 0.02)

    def forward(self) -> Tensor:
        if self.network is None:
            assert self.rows is not None
            return self.rows
        rows = self.network(self.embedding)
        assert isinstance(rows, Tensor)
        return rows

    def settle(self, rows: Tensor) -> None:
        """Hold these rows from now on, without a network."""
        like = next(self.parameters())
        self.network = self.embedding = None
        self.rows = nn.Parameter(rows.detach().to(like.device, like.dtype).clone(), like.requires_grad)


@dataclass(frozen=True)
class _Slot:
    """Which columns of which group one attention has."""

    group: str
    start: int
    n_kv_heads: int
    d_head: int


class Prefixes(nn.Module):
    """Keys and values for every attention of a model, in the order of `anatomy.acting_attentions`."""

    def __init__(
        self, anatomy: Anatomy, length: int, mlp_width: int = 0, dropout: float = 0.0, asked_by: str = "prefix_tuning"
    ) -> None:
        super().__init__()
        self.groups = nn.ModuleDict()
        slots: dict[int, _Slot] = {}
        for name, members in groups_of(anatomy, asked_by).items():
            at = 0
            for attention in members:
                slots[id(attention)] = _Slot(name, at, attention.n_kv_heads, attention.d_head)
                at += 2 * attention.n_kv_heads * attention.d_head
            self.groups[name] = _Rows(length, anatomy.d, at, mlp_width)
        self.slots = [slots[id(attention)] for attention in anatomy.acting_attentions]
        self.dropout = nn.Dropout(dropout)

    def keys_values(self, context: Context) -> list[tuple[Any, Any]]:
        """One pair (n_kv_heads, P, d_head) per attention."""
        rows = {name: self.dropout(group()) for name, group in self.groups.items()}
        pairs = []
        for slot in self.slots:
            width = slot.n_kv_heads * slot.d_head
            both = rows[slot.group][:, slot.start : slot.start + 2 * width]
            keys, values = (
                t.unflatten(-1, (slot.n_kv_heads, slot.d_head)).transpose(0, 1) for t in both.split(width, 1)
            )
            pairs.append((keys, values))
        return pairs

    @torch.no_grad()
    def settle(self) -> None:
        """Evaluate the networks once and keep what they give."""
        for group in self.groups.values():
            assert isinstance(group, _Rows)
            if group.network is not None:
                group.settle(group())

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        """The rows alone, whatever computes them."""
        return {name: group().detach() for name, group in self.groups.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take rows; networks are dropped."""
        if set(tensors) != set(self.groups):
            raise KeyError(f"prefixes {', '.join(sorted(tensors))} stored, {', '.join(sorted(self.groups))} expected")
        for name, group in self.groups.items():
            assert isinstance(group, _Rows)
            expected = (group().shape[0], group().shape[1])
            if tuple(tensors[name].shape) != expected:
                raise KeyError(f"prefix {name} has shape {tuple(tensors[name].shape)}, expected {expected}")
            group.settle(tensors[name])


def drop_networks(tuned: TunedView) -> None:
    """Bring every prefix on the model into its stored form."""
    for tuning in tuned.tunings.values():
        for module in tuning.modules():
            if isinstance(module, Prefixes):
                module.settle()
