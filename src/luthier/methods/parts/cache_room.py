"""Room in a model's own key/value cache for what stands beside it: beams, crops and offloads then carry it along."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from luthier.core import ModelError

__all__ = ["filled_elsewhere", "kept_keys", "make_room"]


def make_room(cache: Any, layer: int, place: int, asked_by: str) -> None:
    """A layer number `place` in the model's own cache, of the same kind as the layer it stands beside.

    Raises:
        ModelError: the cache has a fixed size.
    """
    halves = [cache.self_attention_cache, cache.cross_attention_cache] if hasattr(cache, "is_updated") else [cache]
    for half in halves:
        while len(half.layers) <= place:
            beside = half.layers[layer]
            if isinstance(beside, DynamicSlidingWindowLayer):
                half.layers.append(DynamicSlidingWindowLayer(beside.sliding_window))
            elif isinstance(beside, DynamicLayer):
                half.layers.append(DynamicLayer())
            else:
                raise ModelError(
                    f"{asked_by}: a cache of {type(beside).__name__} layers has a fixed size and no room for the side. "
                    "Generate with the default cache, or with use_cache=False."
                )


def kept_keys(cache: Any, layer: int, depth: int, name: Any, x: Tensor, asked_by: str) -> Tensor:
    """x of the tokens of this pass behind x of those before it, kept under `name` in a cache of a model of `depth`.

    x: (rows, tokens, a) -> (rows, all tokens, a).

    Raises:
        ModelError: the cache has a fixed size, or was filled without it.
    """
    places: dict[Any, int] = cache.__dict__.setdefault("_luthier_places", {})
    half = cache.self_attention_cache if hasattr(cache, "self_attention_cache") else cache
    beside = half.layers[layer]
    place = places.setdefault(name, depth + len(places))
    if type(beside) is DynamicSlidingWindowLayer:
        if beside.get_seq_length() == x.shape[1]:
            return x  # the first pass: nothing came before, and a plain pass with labels makes a cache that none reads
        raise ModelError(
            f"{asked_by}: the cache of this model forgets tokens that its window has left, and what acts here wants "
            "them all. Generate with use_cache=False."
        )
    make_room(cache, layer, place, asked_by)
    kept: Tensor = half.layers[place].update(x[:, None], x[:, None, :, :0])[0][:, 0]  # keys (rows, 1, tokens, a)
    if kept.shape[1] != beside.keys.shape[2]:
        raise filled_elsewhere(asked_by, beside.keys.shape[2], kept.shape[1])
    return torch.as_tensor(kept)


def filled_elsewhere(asked_by: str, held: int, known: int) -> ModelError:
    """The error for a cache of `held` tokens, of which what acts here has seen `known`."""
    return ModelError(
        f"{asked_by}: the cache holds {held} tokens and what acts here knows {known} of them: it was filled without "
        "this tuning. Give the prompt through this model with this tuning."
    )
