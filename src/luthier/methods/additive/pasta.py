"""PASTA: a trained vector is added to each special token at the entrance of every layer.

    H[p_j] <- H[p_j] + e_j        p_j: where the j-th special token of a row stands        e: (n, d) for each layer

All other tokens are left as they are, and the text as long as it is. A vector belongs to the order of its token in the
row: the first special token, the second. In an encoder-decoder the encoder alone has them.

Yang et al. 2023, "Parameter-Efficient Tuning with Special Token Adaptation", arXiv:2210.04382, section 3.

Count: n d for each layer; BERT has n = 2 special tokens around one text, 3 around a pair.
Claims: near full fine-tuning on GLUE with up to 0.029 % of the model's numbers, since heads attend to special tokens.
Measured: `luthier train sample:minilm-l6 --data sample:trec6 --method pasta`: accuracy 0.893 on 1,076 held-out rows,
one seed, where head_only reaches 0.572.
Cost: next to nothing: one sum a layer.
Use it when: an encoder classifies or tags, and a tuning must be a few vectors.
Not when: the model is a decoder: what order a special token has is not known there once a text comes in pieces.
Pitfalls: ids of special tokens differ from model to model: a run takes them from its tokenizer, a tuning that is
attached by hand must be told. A row with more of them than there are vectors is refused. The authors' code drops out
what is added, at the model's own rate; here `dropout` is 0 unless set.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.core import ConfigError, ModelError, at_least, between
from luthier.methods.parts.encoder_ends import encoder_ends
from luthier.surgery import METHODS, Attachment, Edit, Method, attach_each


@METHODS.register("pasta", family="additive", paper="arXiv:2210.04382")
@dataclass(frozen=True, kw_only=True)
class PASTA(Method):
    """Settings of PASTA. The first two follow from the tokenizer of a run."""

    special: Annotated[
        tuple[int, ...], "ids of the special tokens; left out, those that the tokenizer sets", at_least(0)
    ] = ()
    vectors: Annotated[int | None, "special tokens in a row; left out, as many as the tokenizer adds", at_least(1)] = (
        None
    )
    init: Annotated[Literal["paper", "zero"], "small normal vectors, or zeros"] = "paper"
    dropout: Annotated[float, "of what is added", between(0, 0.99)] = 0.0

    starts_at_base: ClassVar[bool] = False
    default_lr: ClassVar[float] = 3e-3
    tiny: ClassVar[dict[str, Any]] = {"special": tuple(range(2, 60)), "vectors": 24, "lr": 0.05}

    def completed(self, tokenizer: Any, *, pair: bool) -> Self:
        known = (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
        found = tuple(dict.fromkeys(i for i in known if i is not None))
        return replace(
            self,
            special=self.special or found,
            vectors=self.vectors or tokenizer.num_special_tokens_to_add(pair=pair) or None,
        )

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        if not self.special:
            raise ConfigError(
                "pasta.special: which ids are special tokens is not known here. Name them, such as special=[101,102]; "
                "a run takes them from its tokenizer, and this one's adds none."
            )
        yield from attach_each(self._blocks(anatomy), lambda site, base: AtSpecialTokens(self, site.d_out))

    def n_params(self, anatomy: Anatomy) -> int:
        return sum((self.vectors or 2) * site.d_out for site in self._blocks(anatomy))

    def _blocks(self, anatomy: Anatomy) -> tuple[Site, ...]:
        anatomy.sites("embed", asked_by="pasta")
        why = (
            "writes token by token, and does not know which special token is a row's first. Use prompt_tuning, or lora."
        )
        return encoder_ends(anatomy, "pasta", why)


class AtSpecialTokens(Attachment):
    """Adds a vector to each special token of what a block reads."""

    kind = "sequential"
    needs_input = False
    special: Tensor

    def __init__(self, settings: PASTA, d: int) -> None:
        super().__init__()
        self.ids = settings.special
        self.register_buffer("special", torch.tensor(settings.special), persistent=False)
        self.vectors = nn.Parameter(torch.randn(settings.vectors or 2, d) * (settings.init == "paper") * 0.02)
        self.dropout = nn.Dropout(settings.dropout)

    def before(self, x: Tensor) -> Tensor:
        number = self._numbers()  # (rows, tokens), 0 for no special token
        rows = torch.cat([self.vectors.new_zeros(1, x.shape[-1]), self.dropout(self.vectors)])
        return x + rows[number].view(x.shape)

    def _numbers(self) -> Tensor:
        """Those of this pass, which are the same in every layer: the first of them looks."""
        ids, memory = self.context.ids, self.context.memory
        if ids is None:
            raise ModelError("pasta: special tokens are found by their ids. Give the text as input_ids.")
        key = ("pasta", self.ids, len(self.vectors))
        if key not in memory or memory[key][0] is not ids:
            memory[key] = ids, self._found(ids)
        found: Tensor = memory[key][1]
        return found

    def _found(self, ids: Tensor) -> Tensor:
        mask, around = self.context.mask_for("encoder"), self.context.around
        special = torch.isin(ids, self.special)
        special = special if mask is None else special & (mask != 0)
        order = special.long().cumsum(-1)
        most = int(order[:, -1].max())
        if most > len(self.vectors):
            raise ModelError(
                f"pasta: a row has {most} special tokens, and there are vectors for {len(self.vectors)}. "
                f"Set vectors={most}, or leave special tokens out of the texts themselves."
            )
        number = torch.where(special, order, 0)
        return number if around is None else around.filled(number, 0)
