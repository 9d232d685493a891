"""Talk with a finished run: turns that remember one another, written as they come, beside what its base would say."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from luthier.core import ConfigError, DataError, build
from luthier.data.chat import Chat, ChatTemplate
from luthier.workflow.controls import Controls, Repeats, own_changes, own_words, without_penalty
from luthier.workflow.prediction import Predictor

__all__ = ["Controls", "Conversation", "Said", "conversation_with"]


@dataclass(frozen=True)
class Said:
    """One answer: its text, its tokens, and whether a stop token ended it."""

    text: str
    tokens: int
    ended: bool


class Conversation:
    """Turns with a run that learnt from chats.

    Args:
        system: what the system says first.

    Raises:
        ConfigError: the run learnt no chats.
    """

    def __init__(self, predictor: Predictor, controls: Controls, system: str | None = None) -> None:
        stored = predictor.contract["template"]
        if stored is None:
            raise ConfigError(
                f"{predictor.path}: this run learnt {predictor.task.name.replace('_', ' ')} without turns, so there is "
                "no conversation with it. Ask it with luthier predict."
            )
        if predictor.columns.row_task is not None:
            raise ConfigError(
                f"{predictor.path}: each of this run's rows says which task it is of, and a turn does not. Ask it with "
                "luthier predict --data."
            )
        self.predictor, self.controls = predictor, controls
        self.template = build(ChatTemplate, stored, "template")
        self.system = system
        self.own = own_changes(predictor.tuned.model, controls.repetition)
        self.own_words = own_words(self.own)
        self.messages: list[dict[str, Any]] = []
        self.reset()

    def reset(self, system: str | None = None) -> None:
        """Forget all turns; with `system`, begin with that."""
        self.system = self.system if system is None else system
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def say(
        self, text: str, write: Callable[[str], None] = lambda piece: None,
        write_base: Callable[[str], None] | None = None,
    ) -> tuple[Said, Said | None]:  # fmt: skip
        """One turn: the run's answer, and its base's to the same conversation. The run's is remembered.

        Args:
            write: is given each piece of the answer as it comes.
            write_base: the same for the base, which is asked where it is given.

        Raises:
            DataError: the conversation leaves no room for an answer; this turn is not remembered then.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        with Chat(self.predictor.tokenizer, template=self.template) as chat:
            ids = chat.prompt(messages)
        limit = self.predictor.generator.limit
        room = self.controls.max_new_tokens if limit is None else min(self.controls.max_new_tokens, limit - len(ids))
        if room < 1:
            raise DataError(f"the conversation fills all {limit} positions of the model. Begin anew (/reset).")
        answer = self._answer(ids, room, write, of_base=False)
        of_base = None if write_base is None else self._answer(ids, room, write_base, of_base=True)
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        return answer, of_base

    def _answer(self, ids: list[int], room: int, write: Callable[[str], None], *, of_base: bool) -> Said:
        predictor = self.predictor
        given = torch.tensor([ids], device=predictor.device)
        stream = _Stream(predictor.tokenizer, write)
        stop, controls = predictor.generator.stop, self.controls
        repetition = controls.repetition
        changes: list[Any] = [] if repetition in (None, 1) else [Repeats(float(repetition or 1))]
        if (drawn := controls.sampling([f"turn {len(self.messages)}"])) is not None:
            changes.append(drawn.of([0]))
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(predictor.precision.autocast(predictor.device))
            stack.enter_context(predictor.tuned.serving())
            if of_base:
                stack.enter_context(predictor.tuned.base_only())
            out = predictor.tuned.model.generate(
                input_ids=given, attention_mask=torch.ones_like(given), num_beams=1, max_new_tokens=room,
                pad_token_id=predictor.generator.pad_id, eos_token_id=list(stop) or None, streamer=stream,
                do_sample=False, logits_processor=changes, **without_penalty(repetition),
            )  # fmt: skip
        new = out[0, len(ids) :].tolist()
        ended = bool(new) and new[-1] in stop
        return Said(stream.text.strip(), len(new), ended)


class _Stream:
    """Hands on each piece of text once its letters are whole."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._ids: list[int] = []
        self._prompt = True
        self.text = ""

    def put(self, value: torch.Tensor) -> None:
        """What transformers calls with the prompt first, and then with each new token."""
        if self._prompt:
            self._prompt = False
            return
        self._ids += value.flatten().tolist()
        self._show(self._whole())

    def end(self) -> None:
        """There is no further token."""
        self._show(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def _whole(self) -> str:
        text = str(self._tokenizer.decode(self._ids, skip_special_tokens=True))
        return self.text if text.endswith("\ufffd") else text

    def _show(self, text: str) -> None:
        if text.startswith(self.text) and len(text) > len(self.text):
            self._write(text[len(self.text) :])
            self.text = text


def conversation_with(path: Path | str, controls: Controls, system: str | None = None) -> Conversation:
    """A conversation with a finished run.

    Raises:
        ConfigError: no such run, one that is not finished, or one that learnt no chats.
        WrongBase, IntegrityError: model, tokenizer or tuning are not those of the run.
    """
    return Conversation(Predictor(path), controls, system)
