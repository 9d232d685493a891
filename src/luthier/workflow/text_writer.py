"""What a model, as it is, writes on from a text, and how likely it finds one text behind another; kept in a ledger.

A request is named by all that it depends on: the model's digest, the text, the seed, the settings. Asked again after a
stop it is found in the ledger, asked.jsonl beside the phases of a recipe, and no model is loaded for it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.core import DataError, IntegrityError, ModelError, plain
from luthier.data.infer_task import kind_of_model
from luthier.data.stop_tokens import stop_ids
from luthier.data.tasks import Task
from luthier.data.tokenizer import position_limit
from luthier.runs import durable
from luthier.training.precision import choose_device
from luthier.training.sampling import Drawn
from luthier.workflow.load_model import Source, find_model, load_config, load_model, load_tokenizer

__all__ = ["TextWriter"]


class TextWriter:
    """A decoder, as it is, that goes on with texts. It is loaded when the first request is not in the ledger.

    Args:
        name: a model folder, sample:NAME, or a hub name; a decoder.
        ledger: the file that keeps the answers.

    Raises:
        ModelError: it is no decoder.
        IntegrityError: the ledger cannot be read.
    """

    def __init__(self, name: str, ledger: Path, device: str = "auto") -> None:
        self.source: Source = find_model(name)
        if kind_of_model(load_config(self.source)) != "decoder":
            raise ModelError(f"{name}: writes no text on from another, and a decoder does. Name one, such as a Llama.")
        self._device, self._ledger = choose_device(device), ledger
        self._kept = _read(ledger)

    @property
    def digest(self) -> str:
        """Of the model."""
        return self.source.digest

    def write(
        self, text: str, *, seed: int, max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0,
        stop: Sequence[str] = (),
    ) -> str:  # fmt: skip
        """What the model writes behind a text, up to the first of `stop`.

        Args:
            temperature: 0 takes the likeliest token each time, and reads no seed.

        Raises:
            DataError: the text leaves no room.
        """
        asked = {
            "write": text, "seed": seed if temperature else 0, "new": max_new_tokens, "temperature": temperature,
            "top_p": top_p, "stop": list(stop),
        }  # fmt: skip
        return str(self._once(asked, lambda: self._written(text, seed, max_new_tokens, temperature, top_p, stop)))

    def log_chance(self, text: str, answer: str) -> tuple[float, int]:
        """Sum of the log-probabilities of an answer's tokens behind a text, and how many there are.

        The two are read as one text; the answer's tokens are those behind the ones that the text has alone.

        Raises:
            DataError: the answer has no token, or both are longer than the model reads.
        """
        total, count = self._once({"score": text, "answer": answer}, lambda: self._scored(text, answer))
        return float(total), int(count)

    def _once(self, asked: dict[str, Any], make: Any) -> Any:
        named = json.dumps({"model": self.digest, **asked}, sort_keys=True, ensure_ascii=False)
        name = hashlib.sha256(named.encode()).hexdigest()
        if name not in self._kept:
            found = make()
            line = json.dumps({"asked": name, "gave": found}, ensure_ascii=False) + "\n"
            fd = os.open(self._ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                durable.append(fd, self._ledger, line.encode(), lasting=True)
            finally:
                os.close(fd)
            self._kept[name] = found
        return self._kept[name]

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.source)

    @cached_property
    def _model(self) -> Any:
        task = Task(name="causal_lm")
        return load_model(self.source, task, dtype=torch.float32, device=self._device, seed=0)[0]

    @cached_property
    def _limit(self) -> int:
        return position_limit(self._model.config) or 10**9

    def _written(self, text: str, seed: int, new: int, temperature: float, top_p: float, stop: Sequence[str]) -> str:
        ids = self._tokenizer(text, verbose=False)["input_ids"]
        ends = stop_ids(None, self._tokenizer, self._model)
        while ids and ids[-1] in ends:  # some tokenizers end every text
            ids = ids[:-1]
        room = min(new, self._limit - len(ids))
        if not ids or room < 1:
            raise DataError(f"a text of {len(ids)} tokens leaves no room: the model reads {self._limit}. {text[:60]!r}")
        given = torch.tensor([ids], device=self._device)
        drawn = {"logits_processor": [Drawn([seed], temperature, top_p)]} if temperature else {}

        def over(so_far: Tensor, scores: Any, **_: Any) -> Tensor:
            said = self._tokenizer.decode(so_far[0, len(ids) :], skip_special_tokens=True)
            return torch.tensor([any(word in said for word in stop)], device=so_far.device)

        with torch.inference_mode():
            out = self._model.generate(
                input_ids=given, attention_mask=torch.ones_like(given), do_sample=False, num_beams=1,
                max_new_tokens=room, pad_token_id=ends[0] if ends else 0, eos_token_id=ends or None,
                stopping_criteria=[over] if stop else None, **drawn,
            )  # fmt: skip
        said = str(self._tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))
        return min((said.split(word, 1)[0] for word in stop), key=len, default=said)

    def _scored(self, text: str, answer: str) -> list[float]:
        alone, both = (self._tokenizer(t, verbose=False)["input_ids"] for t in (text, text + answer))
        ends = stop_ids(None, self._tokenizer, self._model)
        while alone and alone[-1] in ends:  # what some tokenizers put behind every text is no part of an answer
            alone, both = alone[:-1], both[:-1]
        if len(both) <= len(alone) or len(both) > self._limit or not alone:
            raise DataError(
                f"an answer of {len(both) - len(alone)} tokens behind {len(alone)}: it must have one at least, and the "
                f"model reads {self._limit}. {answer[:60]!r}"
            )
        given = torch.tensor([both], device=self._device)
        with torch.inference_mode():
            logits = self._model(input_ids=given).logits[0, len(alone) - 1 : -1].double()
        told = torch.tensor(both[len(alone) :], device=self._device)
        return [float(logits.log_softmax(-1).gather(-1, told[:, None]).sum()), float(len(told))]


def _read(ledger: Path) -> dict[str, Any]:
    """What was asked and given before; a last line that a stop tore off is cut away, and asked again."""
    if not ledger.exists():
        return {}
    data = ledger.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        durable.write_bytes(ledger, whole)
    try:
        lines = [json.loads(line) for line in whole.decode().split("\n")[:-1]]  # no other sign ends a line
        return {str(line["asked"]): plain(line["gave"]) for line in lines}
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{ledger}: cannot be read ({error}). Restore it, or remove it to ask anew.") from error
