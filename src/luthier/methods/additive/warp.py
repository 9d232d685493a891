"""WARP: trained words in a template, and for each label a trained vector that scores the gap; nothing else moves.

    h = the state at the gap, as the layer that scores words reads it        logits_c = v_c h + b_c        V: (C, d)

The words stand where the template says {soft}: `--template '{soft:10} {text} {soft:10} {mask}.'`. They start as the
embedding of the mask (of any word, in a model without one), the label vectors random, or, with labels=words, as the
rows and biases of the words that `--words` names: the model's own answer. Their scores take these words' places.

Hambardzumyan, Khachatrian, May 2021, "WARP: Word-level Adversarial ReProgramming", arXiv:2101.00121, section 3.

Count: K d + C d + C, for K words and C labels.
Claims: the authors report results near full fine-tuning of RoBERTa-large on few examples, with at most 25 thousand
numbers a task.
Cost: every row grows by K tokens.
Use it when: the model was trained to fill gaps, rows are few, and a tuning must be small.
Not when: the checkpoint has no layer that scores words, as sentence encoders have none (sample:minilm-l6): a run is
refused.
Pitfalls: the model's dropout rests while words train, as in the authors' code. No {soft} in the template is warp_0: the
label vectors alone. A decoder reads its gap at the template's end, so no trained word can follow it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.anatomy import Anatomy
from luthier.core import ConfigError, at_least
from luthier.methods.parts.soft_words import SoftWords, soft_site, words_site
from luthier.surgery import METHODS, Attach, Attachment, Base, Edit, Method


@METHODS.register("warp", family="additive", paper="arXiv:2101.00121")
@dataclass(frozen=True, kw_only=True)
class WARP(Method):
    """Settings of WARP. A run's template and tokenizer decide all but `labels`."""

    labels: Annotated[Literal["random", "words"], "what label vectors start as"] = "random"
    words: Annotated[
        tuple[int, ...], "for each label, the id whose score its vector gives; left out, --words", at_least(0)
    ] = ()
    length: Annotated[int, "trained words; left out, as many as the template has {soft}", at_least(0)] = 0
    first: Annotated[int | None, "id of the first trained word; left out, just behind the vocabulary", at_least(0)] = (
        None
    )
    like: Annotated[int, "id of the word that trained ones start as; left out, the mask", at_least(0)] = 0

    starts_at_base: ClassVar[bool] = False
    default_lr: ClassVar[float] = 1e-3
    soft_words: ClassVar[bool] = True
    tiny: ClassVar[dict[str, Any]] = {"words": tuple(range(2, 60)), "length": 60, "first": 3, "lr": 0.02}

    def completed(self, tokenizer: Any, *, pair: bool) -> Self:
        found = self.like or tokenizer.mask_token_id or tokenizer.unk_token_id or 0
        return replace(self, like=int(found))

    def for_template(self, words: Sequence[int], n_soft: int, first: int) -> Self:
        return replace(self, words=tuple(words), length=n_soft, first=first)

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        if not self.words:
            raise ConfigError(
                "warp: it asks for labels by words, and which is not known here. Give a template and its words: "
                "--template '{soft:5} {text} {mask}.' --words 'LABEL=WORD, ...'."
            )
        head = words_site(anatomy, "warp")
        outside = [i for i in self.words if i >= head.d_out]
        if outside:
            raise ConfigError(f"warp.words: no word has the id {outside[0]}; the vocabulary has {head.d_out}.")
        yield Attach(head, lambda base: LabelVectors(base, self.words, start=self.labels))
        if self.length:
            site = soft_site(anatomy, "warp")
            first = site.d_in if self.first is None else self.first
            yield Attach(site, lambda base: SoftWords(base, self.length, first, self.like))

    def n_params(self, anatomy: Anatomy) -> int:
        labels = len(self.words) * (words_site(anatomy, "warp").d_in + 1)
        return labels + (self.length * soft_site(anatomy, "warp").d_out if self.length else 0)


class LabelVectors(Attachment):
    """V and b, whose scores take the places of the labels' words."""

    kind = "sequential"
    words: Tensor

    def __init__(self, base: Base, words: Sequence[int], *, start: str) -> None:
        super().__init__()
        self.register_buffer("words", torch.tensor(words), persistent=False)
        linear = nn.Linear(base.site.d_in, len(words))
        self.weight, self.bias = linear.weight, linear.bias
        if start == "words" and self.weight.device.type != "meta":
            with torch.no_grad():
                self.weight.copy_(base.weight()[list(words)])
                bias = base.bias()
                self.bias.copy_(torch.zeros_like(self.bias) if bias is None else bias[list(words)])

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """x: (..., d)   y: (..., vocabulary)."""
        scores = F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(y.dtype)
        return y.index_copy(-1, self.words.to(y.device), scores)
