"""How far each trained tensor stands from the top of the model: the groups of layer-wise strategies."""

from __future__ import annotations

import re

from luthier.surgery import Tuned

__all__ = ["layer_groups"]

_PLACE = re.compile(r"@(?:(encoder|decoder)\.)?(\d+)(?![\d])")


def layer_groups(tuned: Tuned, names: list[str]) -> list[list[str]]:
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
    groups: list[list[str]] = [[] for _ in range(len(bottom_up) + 2)]
    for name in names:
        groups[_group(tuned, name, group_of, len(groups) - 1)].append(name)
    return groups


def _group(tuned: Tuned, name: str, group_of: dict[tuple[str, int], int], lowest: int) -> int:
    place = _PLACE.search(name)
    if place:
        return group_of[(place.group(1) or "", int(place.group(2)))]
    path = name.partition("model/")[2]
    for block in tuned.anatomy.blocks:
        if path.startswith(f"{block.path}."):
            return group_of[(block.stack, block.layer)]
    if "head/" in name or "@final" in name or any(path == t for t in tuned.anatomy.head_tensors):
        return 0
    first = tuned.anatomy.blocks[0].path.rpartition(".")[0]
    # Above the blocks stand a final norm, a pooler, an output matrix; below them, embeddings and what is put before.
    return lowest if "embed" in name or "prompt" in name or not path or not first else 0
