"""Words of a template that a method trains: {soft}, or {soft:5} for five of them.

    {soft:2} {text} is {mask} .     ids  V  V+1  2054 2003 2003 103 1012        V: rows of the word embedding

Word number i has the id V + i, so that it finds itself wherever a method looks for it. While a row is encoded, a token
that no text holds stands in its place.
"""

from __future__ import annotations

from typing import Any

from luthier.core import ConfigError, ModelError
from luthier.data.tasks import Task

__all__ = ["MOST_SOFT", "filler_of", "softened"]

MOST_SOFT = 512


def filler_of(tokenizer: Any, gap: int) -> int:
    """The token that stands for a trained word while a row is encoded: one that the tokenizer adds to no text.

    Raises:
        ModelError: there is none.
    """
    added = set(tokenizer("")["input_ids"])
    known = (tokenizer.mask_token_id, tokenizer.get_vocab().get("<extra_id_1>"), tokenizer.unk_token_id)
    for found in (*known, tokenizer.pad_token_id, tokenizer.eos_token_id):
        if found is not None and found not in added:
            return int(found)
    raise ModelError("{soft} in a template needs a tokenizer with a special token that it adds to no text; none is.")


def softened(task: Task, marks: list[str], tokens: list[int], n_vocab: int) -> list[int] | None:
    """The ids of a row with those of its trained words in place; None where its text holds the token of their places.

    Args:
        marks: what the template holds besides words, in order. A gap of the same token as a place stays.

    Raises:
        ConfigError: they are not as many as the template has.
    """
    if not task.n_soft:
        return tokens
    if marks.count("soft") != task.n_soft:
        raise ConfigError(f"template {task.template!r} has not the {task.n_soft} words {{soft}} that were trained.")
    kept = [m for m in marks if m == "soft" or (m == "mask" and task.gap == task.filler)]
    places = [i for i, token in enumerate(tokens) if token == task.filler]
    if len(places) != len(kept):
        return None
    made, number = list(tokens), 0
    for place, mark in zip(places, kept, strict=True):
        if mark == "soft":
            made[place], number = n_vocab + number, number + 1
    return made
