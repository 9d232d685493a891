"""What luthier asks of a model and of a tokenizer. transformers' own are of these forms, and so is whatever acts alike.

What only some of them have (`generate`, an encoder, an output matrix) is looked for where it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Model", "Tokenizer"]


class Model(Protocol):
    """A module with a configuration.

    Attributes:
        config: settings of the architecture; `get_text_config()` gives those of its text part.
        training: whether dropout acts.
    """

    config: Any
    training: bool

    # How a module answers to what it holds: its parts, its tensors, and what others put on it.
    def __getattr__(self, name: str) -> Any:
        """Whatever else a module of its class has."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One pass: an object with `logits` (and `loss`, where labels were given), or a tuple."""

    def named_modules(self, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
        """Every module in it and its path; the model itself is called ""."""

    def named_parameters(self, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """Every trainable tensor and its path."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every trainable tensor once."""

    def modules(self) -> Iterator[nn.Module]:
        """Every module once."""

    def buffers(self) -> Iterator[Tensor]:
        """Every tensor that is no parameter once."""

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor that is saved, by path."""

    def add_module(self, name: str, module: nn.Module) -> None:
        """Register a module under a name."""

    def train(self, mode: bool = True) -> Any:
        """Let dropout act, in it and in all that it holds."""

    def eval(self) -> Any:
        """Let dropout rest."""


class Tokenizer(Protocol):
    """Text to ids and back.

    Attributes:
        pad_token, pad_token_id, eos_token_id: None where there is none.
        all_special_ids: ids of tokens that stand for no text.
        chat_template: how messages become text, if the checkpoint says so.
    """

    pad_token: str | None
    pad_token_id: int | None
    eos_token_id: int | None
    all_special_ids: list[int]
    chat_template: Any

    def __getattr__(self, name: str) -> Any:
        """Whatever else a tokenizer of its class has."""

    def __call__(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        """Encode one text or many: a mapping with `input_ids`."""

    def __len__(self) -> int:
        """How many tokens it knows, added ones counted."""

    def decode(self, ids: Any, **kwargs: Any) -> str:
        """The text of some ids."""
