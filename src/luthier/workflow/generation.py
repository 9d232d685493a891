"""Text that a tuned language model writes after prompts, in batches where that changes no row."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from luthier.core import ConfigError
from luthier.data.batches import Collator, cut
from luthier.data.examples import Examples
from luthier.surgery import Tuned
from luthier.training.precision import Precision
from luthier.training.sampling import Sampling
from luthier.workflow.controls import Repeats, without_penalty

__all__ = ["Generator", "Written"]

# What padding may change in the logits, as a share of their spread: rounding in fp32, and in halves.
_ROUNDING, _ROUNDING_IN_HALVES = 1e-4, 2e-2
_MOST_ROWS = 16


@dataclass(frozen=True)
class Written:
    """What was written for one prompt, and why it ended before a stop token, where it did."""

    text: str
    note: str = ""
    ended: bool = True  # by a stop token


class Generator:
    """Writes on from prompts, greedily, by a beam or by drawing, to a stop token or to the longest answer allowed.

    A row must come out as it would alone. Whether padding sees to that is tried on the first batch that needs any;
    where it does not, only prompts of one length share a batch.

    Args:
        stop: ids that end an answer; none of them is part of it.
        limit: tokens that the model has positions for, prompt and answer together; None where nothing limits them.
        tokens: padded tokens of a batch of prompts, at most.
    """

    def __init__(
        self, tuned: Tuned, tokenizer: Any, precision: Precision, device: torch.device, *, pad_id: int,
        stop: Sequence[int], limit: int | None, tokens: int,
    ) -> None:  # fmt: skip
        self.tuned, self.tokenizer, self.precision, self.device = tuned, tokenizer, precision, device
        self.pad_id, self.stop, self.limit, self.tokens = pad_id, tuple(stop), limit, tokens
        self.both = bool(tuned.anatomy.is_encoder_decoder)
        self.collator = Collator(pad_id=pad_id, left=not self.both)
        self.pads: bool | None = None  # None until it was tried

    def write(
        self, prompts: Examples, max_new_tokens: int, tunings: Sequence[str | None] | None = None, beams: int = 1,
        sampling: Sampling | None = None, repetition: float | None = None,
    ) -> list[Written]:  # fmt: skip
        """One answer for each example, in their order. For several answers to a prompt, give it several times.

        Args:
            beams: answers that are followed side by side, of which the likeliest is given.
            tunings: for each example the tuning that answers it; see `Tuned.rows`.
            sampling: draw each token, by a seed for each example; left out, take the likeliest.
            repetition: by which factor a token that an answer has already is less likely; see `Controls`.

        Raises:
            ConfigError: drawn and by a beam; not as many seeds as examples.
        """
        if sampling is not None and beams > 1:
            raise ConfigError(f"answers are drawn, and {beams} beams look for the likeliest. Ask for one of the two.")
        if sampling is not None and len(sampling.seeds) != len(prompts):
            raise ConfigError(f"{len(sampling.seeds)} seeds for {len(prompts)} prompts. Give one for each.")
        found: list[Written | None] = [None] * len(prompts)
        lengths = np.diff(prompts.offsets)
        waiting = self._pieces(np.arange(len(prompts), dtype=np.int64), lengths, max_new_tokens)
        while waiting:
            piece, *waiting = waiting
            if len(set(lengths[piece].tolist())) > 1 and not self._may_pad(prompts, piece, tunings):
                waiting = self._pieces(np.concatenate([piece, *waiting]), lengths, max_new_tokens)
                continue
            most = max_new_tokens
            if self.limit is not None:
                most = min(most, self.limit - 1 if self.both else self.limit - int(lengths[piece].max()))
            if most < 1:
                for i in piece:
                    found[i] = Written("", f"the prompt fills all {self.limit} positions of the model", ended=False)
                continue
            changes: list[Any] = [] if repetition in (None, 1) else [Repeats(float(repetition or 1))]
            changes += [] if sampling is None else [sampling.of(piece.tolist())]
            changed = without_penalty(repetition) | ({"logits_processor": changes} if changes else {})
            out = self._generate(prompts, piece, tunings, max_new_tokens=most, num_beams=beams, **changed)
            for i, new in zip(piece, out, strict=True):
                found[i] = self._read(new.tolist(), most < max_new_tokens)
        return [written for written in found if written is not None]

    def _pieces(self, rows: NDArray[np.int64], lengths: NDArray[np.int64], new: int) -> list[NDArray[np.int64]]:
        """Batches, longest first. A prompt that leaves too little room for its answer stands alone."""
        tight = np.zeros(len(rows), dtype=bool)
        if self.limit is not None and not self.both:
            tight = lengths[rows] + new > self.limit
        roomy = rows[~tight]
        alike = [roomy] if self.pads is not False else [roomy[lengths[roomy] == n] for n in np.unique(lengths[roomy])]
        pieces = [piece for part in alike for piece in cut(part, lengths, self.tokens, _MOST_ROWS)]
        return [*pieces, *(rows[tight][k : k + 1] for k in range(int(tight.sum())))]

    def _may_pad(self, prompts: Examples, piece: NDArray[np.int64], tunings: Sequence[str | None] | None) -> bool:
        """Whether the row with the most padding gets the logits that it gets alone."""
        if self.pads is None:
            most = int(np.argmin(np.diff(prompts.offsets)[piece]))
            beside = self._first_logits(prompts, piece, tunings)[most]
            alone = self._first_logits(prompts, piece[most : most + 1], tunings)[0]
            spread = float((alone - alone.mean()).square().mean().sqrt())
            apart = float((beside - alone).square().mean().sqrt())
            halves = any(p.dtype in (torch.bfloat16, torch.float16) for p in self.tuned.model.parameters())
            rounds = halves or self.precision.dtype != torch.float32
            self.pads = apart <= (_ROUNDING_IN_HALVES if rounds else _ROUNDING) * spread
        return self.pads

    def _first_logits(
        self, prompts: Examples, piece: NDArray[np.int64], tunings: Sequence[str | None] | None
    ) -> Tensor:
        out = self._call(prompts, piece, tunings, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
        logits: Tensor = out.logits[0].float()
        return logits

    def _generate(
        self, prompts: Examples, piece: NDArray[np.int64], tunings: Sequence[str | None] | None, **options: Any
    ) -> Tensor:
        out: Tensor = self._call(prompts, piece, tunings, **options)
        return out if self.both else out[:, int(np.diff(prompts.offsets)[piece].max()) :]

    def _call(
        self, prompts: Examples, piece: NDArray[np.int64], tunings: Sequence[str | None] | None, **options: Any
    ) -> Any:
        options = {"num_beams": 1, **options}
        inputs = self.collator(prompts, piece).to(self.device).inputs
        facts = {name: value for name, value in inputs.items() if name.startswith("row_")}
        named = nullcontext() if tunings is None else self.tuned.rows([tunings[i] for i in piece])
        with torch.inference_mode(), self.precision.autocast(self.device), named:
            return self.tuned.model.generate(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=False,
                pad_token_id=self.pad_id, eos_token_id=list(self.stop) or None, **facts, **options,
            )  # fmt: skip

    def _read(self, ids: list[int], tight: bool) -> Written:
        """The text up to the first stop token."""
        begin = 1 if self.both else 0  # the decoder's start may be a stop token itself, as BART's is
        end = next((k for k in range(begin, len(ids)) if ids[k] in self.stop), None)
        text = self.tokenizer.decode(ids[begin:end], skip_special_tokens=True).strip()
        note = "the model has no more positions: the answer is cut" if tight and end is None else ""
        return Written(text, note, ended=end is not None)
