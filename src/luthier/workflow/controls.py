"""How an answer is written: by the likeliest token each time, or drawn; and how often it may repeat itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from luthier.core import ConfigError, key
from luthier.data.tasks import Task
from luthier.training.sampling import Sampling

__all__ = ["Controls", "Repeats", "controls_for", "own_changes", "own_processors", "own_words", "without_penalty"]


@dataclass(frozen=True, kw_only=True)
class Controls:
    """How answers are written: the same in `luthier chat` and in `luthier predict`.

    >>> Controls(temperature=0.7).sampling(["row 1"]).temperature
    0.7
    >>> Controls().sampling(["row 1"]) is None  # the likeliest token each time
    True

    Attributes:
        temperature: 0 takes the likeliest token each time; higher is more varied.
        top_p: tokens are drawn from the likeliest that make up this probability.
        top_k: tokens are drawn from so many of the likeliest; 0, from all.
        repetition: a token that the answer has already counts as less likely by this factor of its logit; 1, it does
            not. Keskar et al. 2019, arXiv:1909.05858, section 4.1. Whatever is given stands in the place of a penalty
            in the model's own files; None leaves that as it is (`own_changes`).
        seed: names the draws; the same words give the same answers.
        max_new_tokens: tokens of an answer, at most.

    Raises:
        ConfigError: a value that cannot work.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition: float | None = None
    seed: int = 0
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 10:
            raise ConfigError(f"temperature: got {self.temperature:g}; it must be from 0 to 10.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: got {self.top_p:g}; it must be above 0 and at most 1.")
        if self.top_k < 0:
            raise ConfigError(f"top_k: got {self.top_k}; it must be 0, for all tokens, or more.")
        if self.repetition is not None and not 1 <= self.repetition <= 10:
            raise ConfigError(f"repetition: got {self.repetition:g}; it must be from 1, for no penalty, to 10.")
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens: got {self.max_new_tokens}; it must be 1 or more.")
        if self.temperature == 0 and (idle := [n for n in ("top_p", "top_k") if getattr(self, n) != _OFF[n]]):
            raise ConfigError(
                f"{idle[0]} is {getattr(self, idle[0]):g}, and at temperature 0 nothing is drawn. Give a temperature, "
                "such as 0.7, or leave it out."
            )

    def sampling(self, names: Sequence[str]) -> Sampling | None:
        """What draws the tokens of answers that are called so; None where the likeliest is taken."""
        if self.temperature == 0:
            return None
        seeds = [key(self.seed, "write", name) for name in names]
        return Sampling(seeds=seeds, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k)


_OFF = {"top_p": 1.0, "top_k": 0}


def controls_for(task: Task, given: Controls | None, most: int) -> Controls:
    """How a run of this task writes: as is given, or the likeliest token each time, at most so many.

    Raises:
        ConfigError: it writes no text, and is told how.
    """
    if given is None:
        return Controls(max_new_tokens=most)
    if not task.writes and replace(given, max_new_tokens=most) != Controls(max_new_tokens=most):
        raise ConfigError(
            f"this run learnt {task.name} and writes no text, so there is nothing to draw. Leave temperature, top_p, "
            "top_k, repetition and seed out."
        )
    return given


def own_changes(model: Any, repetition: float | None = None) -> dict[str, Any]:
    """What the generation_config of a model's files changes in what it writes, by name; where answers end is no change.

    A penalty that `repetition` stands in the place of changes nothing.

    >>> from types import SimpleNamespace
    >>> own_changes(SimpleNamespace(generation_config=SimpleNamespace(repetition_penalty=1.1)))
    {'repetition_penalty': 1.1}
    """
    config = getattr(model, "generation_config", None)
    found = {name: getattr(config, name, None) for name in _CHANGES}
    if repetition is not None:
        del found[PENALTY]
    return {name: value for name, value in found.items() if value not in (None, _CHANGES[name])}


def own_words(changes: Mapping[str, Any], *, can_repeat: bool = True) -> str:
    """These changes in a sentence; empty where there is none.

    Args:
        can_repeat: the command has --repetition.
    """
    if not changes:
        return ""
    listed = ", ".join(f"{name} = {value if len(str(value)) <= 40 else '...'}" for name, value in changes.items())
    advice = "; --repetition 1 takes the penalty out" if PENALTY in changes and can_repeat else ""
    return f"the model's own generation_config changes what is written: {listed}{advice}"


def own_processors(
    model: Any, ids: Sequence[int], new: int, *, stop: Sequence[int], pad_id: int, encoded: Sequence[int] = ()
) -> list[Any]:
    """What `generate` would do to the logits of one text, where the likeliest token is taken: for a loop of one's own.

    The same functions of transformers make it, so that both obey the generation_config alike.

    Args:
        ids: that the text goes on from.
        new: tokens that are written after them, at most.
        stop: ids that end it.
        encoded: of an encoder-decoder: ids that its encoder reads.

    Returns:
        functions of ids (1, tokens) so far and scores (1, vocabulary), which give new scores; for this one text.
    """
    if getattr(model, "generation_config", None) is None:
        return []
    config, _ = model._prepare_generation_config(
        None, do_sample=False, num_beams=1, pad_token_id=pad_id, eos_token_id=list(stop) or None
    )
    model._prepare_special_tokens(config, True, device=model.device)
    config.max_length = len(ids) + new
    read = torch.tensor([list(encoded or ids)], device=model.device)
    made = model._get_logits_processor(
        config, input_ids_seq_length=len(ids), encoder_input_ids=read, device=model.device
    )
    return list(made)


def without_penalty(repetition: float | None) -> dict[str, Any]:
    """What `generate` is told beside `repetition`: its own penalty counts the prompt too, and would come on top."""
    return {} if repetition is None else {PENALTY: 1.0}


PENALTY = "repetition_penalty"
_CHANGES: dict[str, Any] = {
    PENALTY: 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None, "suppress_tokens": None, "begin_suppress_tokens": None, "sequence_bias": None,
    "min_length": 0, "min_new_tokens": None, "exponential_decay_length_penalty": None, "guidance_scale": None,
    "forced_bos_token_id": None,
}  # fmt: skip
"""Settings of transformers that change logits where the likeliest token is taken, and what leaves them alone."""


class Repeats:
    """Makes tokens that an answer has already less likely: z / f where z is above 0, and z f below.

    What stands in the prompt does not count, so that an answer may end as the turns before it did, and padding says
    nothing. Given to `generate` among its processors of logits; one for each call.
    """

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._begins: int | None = None  # where answers begin

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (rows, vocabulary), given the ids so far (rows, tokens)."""
        if self._begins is None:
            self._begins = ids.shape[1]
        said = ids[:, self._begins :]
        if not said.shape[1]:
            return scores
        found = scores.gather(1, said)
        return scores.scatter(1, said, torch.where(found < 0, found * self._factor, found / self._factor))
