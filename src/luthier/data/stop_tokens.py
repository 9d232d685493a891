"""The tokens that end an answer: those that training taught to end a turn with, and the model's own."""

from typing import Any

import numpy as np

from luthier.core import DataError
from luthier.data.examples import IGNORED, Examples

__all__ = ["refuse_endless", "stop_ids", "taught_ends"]


def taught_ends(examples: Examples, tokenizer: Any) -> set[int]:
    """The special tokens that a stretch of targets ends in: a template's own end of a turn, or the end token.

    Only special ones: a row that was cut ends in any word.
    """
    if examples.answers is not None and examples.answer_offsets is not None:
        last = examples.answer_offsets[1:][np.diff(examples.answer_offsets) > 0] - 1
        ends = set(np.unique(examples.answers[last]).tolist())
    elif examples.labels is not None:
        told = examples.labels != IGNORED
        goes_on = np.zeros(len(told), dtype=bool)
        goes_on[:-1] = told[1:]
        goes_on[examples.offsets[1:] - 1] = False  # what follows is another example
        ends = set(np.unique(examples.labels[told & ~goes_on]).tolist())
    else:
        return set()
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if getattr(token, "special", False)}
    return ends & (added | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}


def refuse_endless(examples: Examples, ends: set[int], max_length: int) -> None:
    """Refuse chats of which none shows the model where to stop.

    Args:
        ends: of `taught_ends`.

    Raises:
        DataError: says how long rows may be.
    """
    if not ends:
        raise DataError(
            f"{examples.ledger.table.source}: no row teaches the model to stop: of {len(examples)} rows none keeps the "
            f"token that ends its answer within {max_length} tokens. Raise --max-length, or shorten the rows."
        )


def stop_ids(examples: Examples | None, tokenizer: Any, model: Any) -> list[int]:
    """What ends an answer: taught ends, the tokenizer's end token, and those of the model's own generation settings."""
    found = set() if examples is None else taught_ends(examples, tokenizer)
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    for one in (tokenizer.eos_token_id, *(own if isinstance(own, list | tuple) else [own])):
        if one is not None:
            found.add(int(one))
    return sorted(found)
