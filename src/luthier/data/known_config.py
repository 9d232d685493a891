"""What rows are read by of a model's configuration, without transformers' object."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

__all__ = ["READ", "KnownConfig"]

READ = ("model_type", "is_encoder_decoder", "is_decoder", "max_position_embeddings", "pad_token_id", "vocab_size")
"""The names that are asked for; some configurations lack some of them."""


class KnownConfig:
    """Answers as the configuration did whose values these are.

    >>> known = KnownConfig("decoder", {"model_type": "llama", "vocab_size": 50}, {"vocab_size": 50}, dict)
    >>> known.get_text_config().vocab_size, getattr(known, "pad_token_id", "none")
    (50, 'none')

    Args:
        kind: what `kind_of_model` said of it.
        values: by name; what the configuration lacks is left out.
        text: the same of the part that is about words.
        whole: gives the configuration itself, which is asked for what was not kept.
    """

    def __init__(
        self, kind: Literal["encoder", "decoder", "both"], values: Mapping[str, Any], text: Mapping[str, Any],
        whole: Callable[[], Any],
    ) -> None:  # fmt: skip
        self.kind, self._values, self._text, self._whole = kind, dict(values), dict(text), whole

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and name in self._values:
            return self._values[name]
        if name in READ or name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._whole(), name)  # slower, and right: a default in its place would be a wrong answer

    def get_text_config(self) -> KnownConfig:
        """Of the part that is about words."""
        return KnownConfig(self.kind, self._text, self._text, lambda: self._whole().get_text_config())
