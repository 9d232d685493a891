"""What weight decay leaves alone, whatever the method: the field decays matrices, not vectors.

    the model's own tensors     none of one dimension: biases, gains of norms
    what is attached            no bias, no gain of a norm

A method that wants it otherwise names the tensors in a group of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from luthier.surgery import Group

__all__ = ["undecayed"]


def undecayed(trained: Mapping[str, nn.Parameter], groups: Iterable[Group]) -> list[Group]:
    """The group of what does not decay and stands in none of `groups`; no group where nothing is left."""
    named = {name for group in groups for name in group.names}
    free = [name for name, parameter in trained.items() if name not in named and _rests(name, parameter)]
    return [Group(tuple(free), weight_decay=0.0)] if free else []


def _rests(name: str, parameter: nn.Parameter) -> bool:
    own = any(part.startswith(("model/", "head/")) for part in name.split(":"))
    return parameter.dim() < 2 and (own or name.endswith((".weight", ".bias")))
