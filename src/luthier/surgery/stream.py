"""The stream in what a sublayer or a block gives: itself, or the first of a tuple, or of a list (OpenAI's GPT)."""

from typing import Any

from torch import Tensor

__all__ = ["stream_of", "with_stream"]


def stream_of(out: Any) -> Any:
    """The hidden states in what a module gave."""
    return out[0] if isinstance(out, tuple | list) else out


def with_stream(out: Any, states: Tensor) -> Any:
    """What it gave, with other hidden states."""
    if isinstance(out, list):
        return [states, *out[1:]]
    return (states, *out[1:]) if isinstance(out, tuple) else states
