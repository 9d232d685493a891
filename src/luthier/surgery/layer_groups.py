"""How far each trained tensor stands from the top of the model: the groups of layer-wise strategies."""

from __future__ import annotations

import re

from luthier.surgery.training_state import is_head
from luthier.surgery.view import TunedView

__all__ = ["layer_groups"]

_PLACE = re.compile(r"@(?:(encoder|decoder)\.)?(\d+)(?![\d])")


def layer_groups(tuned: TunedView, names: list[str]) -> list[list[str]]:
    """Names of trained tensors, from the top of the model down.

    Group 0 is the head and whatever stands above the last block; then one group for each block, the decoder's before
    the encoder's; last what stands below the first block, such as embeddings and prompts. Groups may be empty: their
    number follows from the model alone.
    """
    blocks = [(b.stack, b.layer) for b in tuned.anatomy.blocks]
    stacks = list(dict.fromkeys(stack for stack, _ in blocks))
    if "encoder" in stacks and "decoder" in stacks:
        stacks = ["encoder", "decoder"]
    bottom_up = [one for stack in stacks for one in sorted(set(blocks)) if one[0] == stack]
    group_of = {block: len(bottom_up) - i for i, block in enumerate(bottom_up)}
    own = _own_tensors(tuned, group_of)
    groups: list[list[str]] = [[] for _ in range(len(bottom_up) + 2)]
    for name in names:
        place = _PLACE.search(name)
        if place:
            group = group_of[(place.group(1) or "", int(place.group(2)))]
        elif is_head(name):
            group = 0
        else:
            below = len(groups) - 1 if "prompt" in name or "embed" in name else 0
            group = own.get(name.partition("model/")[2], below)
        groups[group].append(name)
    return groups


def _own_tensors(tuned: TunedView, group_of: dict[tuple[str, int], int]) -> dict[str, int]:
    """The model's own tensors: group. Models list their tensors in the order in which they use them.

    So what comes before the first block is below it (embeddings), what comes after the last is above it (a final norm,
    a pooler), and what stands between two stacks goes with the stack below.
    """
    anatomy = tuned.anatomy
    found: dict[str, int] = {}
    group = lowest = len(group_of) + 1
    last = min(group_of.values())
    for name in anatomy.tensors:
        here = next((group_of[(b.stack, b.layer)] for b in anatomy.blocks if name.startswith(f"{b.path}.")), None)
        if here is not None:
            group = here
            found[name] = here
        else:
            found[name] = 0 if group == last else group
    return found | {name: 0 for name in anatomy.head_tensors if found.get(name) != lowest}
