"""LongLoRA: train on long texts with attention in groups that half of the heads shift, answer with all of it.

    in training: heads of the first half attend inside groups of G tokens, those of the second half inside groups that
    begin G / 2 later; causally in both.      in evaluation: the model's own attention

    y = x W^T + b + (alpha / rank) x A^T B^T at the attention's projections; the word embedding and the norms train

G is a share of the batch's length, or fixed by `group`, and the work of attention then grows linearly with the length.
In evaluation the model starts as the base model.

Chen et al. 2023, "LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models", arXiv:2309.12307. The paper
rolls the shifted heads around, and its last group then holds the end and the beginning of the text, so that early
tokens see late ones; here that group is cut in two, as in the authors' code for supervised training, and nothing leaks.
Positions beyond those of the base need a model whose rotary scaling says so: that is the model's setting, not this one.

Count: sum over sites of rank (d_in + d_out), the embedding and the norms.
Claims: contexts many times as long at a fraction of the cost, with full attention afterwards.
Use it when: a decoder is to read longer texts than it was trained on.
Not when: the texts fit anyway.
Measured, `python -m experiments.long_texts --lengths 1024,2048,4096,8192 --blocks 2`: two blocks of SmolLM2-135M in
bf16, groups of 512, one text and its loss in chunks, once each on busy cores. A pass keeps 92, 189, 378 and 710 MiB for
the backward pass; at their highest two steps add 134, 239, 432 and 766 MiB to the process. lora with the model's own
attention keeps 69, 130 and 275 up to 4,096 tokens, and adds 113, 184 and 348. Both are linear: no kernel holds all
scores, and groups need no mask unless a pad stands before a text. So groups save work, not memory. In evaluation, at
4,096 tokens in fp32, the model is the base to the bit.
The whole of SmolLM2-135M, trained at 2,048 tokens, in bf16, one thread, two steps of one text each:
`python -m experiments.long_texts --whole --lengths 1024,2048,4096,8192 --group 512 --checkpointing --only longlora`.
A step takes 8.2, 15.3, 31.3 and 65.3 processor seconds at 1,024, 2,048, 4,096 and 8,192 tokens, its blocks computed
twice; it adds 301, 545, 999 and 1,435 MiB, and the process comes to 1,888, 2,653, 4,180 and 6,915 MiB at its highest.
Evaluation with the quadratic attention of the model takes 3.3, 7.5, 19.1 and 47.2. On a held-out text of that
length it gives 2.468, 2.232, 1.976 and 1.752 nats a token before the two steps and 2.419, 2.192, 1.940 and 1.747 after
them: finite and lower, but two steps of one seed show that it trains, not how well.
Pitfalls: saves nothing after training; the attention's own dropout is not drawn in groups; models with sliding
windows see less afterwards than a group that is wider than the window; several texts in one row are refused; with
`pieces` groups grow with the length, and so does the work for each token.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.core import AnatomyError, ConfigError, ModelError, above, at_least
from luthier.methods.parts.low_rank import ThinUpdate
from luthier.methods.parts.projections import AtProjections
from luthier.methods.parts.update_masks import sizes_of
from luthier.surgery import METHODS, Attachment, Attend, Base, Context, Edit, Unfreeze
from luthier.surgery.prompts import with_vectors


@METHODS.register("longlora", family="reparameterised", paper="arXiv:2309.12307")
@dataclass(frozen=True, kw_only=True)
class LongLoRA(AtProjections):
    """Settings of LongLoRA."""

    sites: Annotated[tuple[str, ...], "where LoRA stands"] = ("attn.q", "attn.k", "attn.v", "attn.o")
    rank: Annotated[int, "width of the two thin matrices", at_least(1)] = 8
    alpha: Annotated[float, "the update is scaled by alpha / rank", above(0)] = 16.0
    pieces: Annotated[int, "groups that a batch's length is cut into", at_least(1)] = 4
    group: Annotated[int, "tokens of a group, even, in place of `pieces`; 0 for none", at_least(0)] = 0
    embedding: Annotated[bool, "the word embedding trains too"] = True
    norms: Annotated[bool, "the norms train too"] = True

    trains_base: ClassVar[bool] = True
    draws: ClassVar[bool] = True
    default_lr: ClassVar[float] = 5e-4
    tiny: ClassVar[dict[str, float]] = {"rank": 3, "pieces": 2, "lr": 1e-2}

    def __post_init__(self) -> None:
        if self.group % 2:
            raise ConfigError(f"longlora.group: {self.group} is odd, and half of it is shifted. Use {self.group + 1}.")

    def places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        sites = super().places(anatomy)
        if not anatomy.is_decoder or anatomy.is_encoder_decoder:
            raise AnatomyError(
                f"longlora: groups are cut for a decoder, which sees what came before; {anatomy.model_type} also reads "
                "what comes after. Use lora, and a model made for long texts."
            )
        return sites

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        yield from super().edits(anatomy)
        for attention in anatomy.acting_attentions:
            yield Attend(attention, lambda base: Grouped(self.pieces, self.group))
        yield from (Unfreeze(name) for name in self._whole(anatomy))

    def n_params(self, anatomy: Anatomy) -> int:
        return super().n_params(anatomy) + sum(sizes_of(anatomy, self._whole(anatomy)))

    def params_at(self, site: Site) -> int:
        return self.rank * (site.d_in + site.d_out)

    def build(self, site: Site, base: Base) -> Attachment:
        return ThinUpdate(site.d_in, site.d_out, self.rank, self.alpha / self.rank)

    def _whole(self, anatomy: Anatomy) -> list[str]:
        """Names of the tensors that train whole."""
        tables = [f"{s.path}.{s.param}" for s in anatomy.sites("embed", asked_by="longlora")] if self.embedding else []
        names = [*tables, *(anatomy.norm_tensors() if self.norms else ())]
        return [n for n in dict.fromkeys(anatomy.tied.get(n, n) for n in names) if n not in anatomy.head_tensors]


class Grouped(nn.Module):
    """Attention of one layer, in groups while it trains."""

    context: Context

    def __init__(self, groups: int, group: int) -> None:
        super().__init__()
        self.groups, self.group = groups, group

    def attend(self, inner: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query (B,H,T,D), key and value (B,H_kv,T,D) -> (B,T,H,D)."""
        tokens = query.shape[2]
        whole = not self.training or self.context.generating or key.shape[2] != tokens
        width = self.group or 2 * math.ceil(tokens / (2 * self.groups))
        if whole or width >= tokens:
            of_text: Tensor = inner(query, key, value)
            return of_text
        if self.context.packed:
            raise ModelError("longlora: texts stand one behind the other in a row. Give each a row of its own.")
        if key.shape[1] == 1:  # one head of keys for all: each half of the queries needs it
            key, value = (n.expand(-1, 2, -1, -1) for n in (key, value))
        cut = (key.shape[1] + 1) // 2
        heads = cut * query.shape[1] // key.shape[1]
        mask = self.context.mask_for("")
        real = query.new_ones(len(query), tokens, dtype=torch.bool) if mask is None else mask.bool()
        if real.shape[1] < tokens:  # vectors before the text
            real = with_vectors(real, tokens - real.shape[1])
        # Without a pad before a text, causality says it all, and no mask of G x T is made.
        there = real if bool((real[:, 1:] & ~real[:, :-1]).any()) else None
        first = self._in_groups(inner, query[:, :heads], key[:, :cut], value[:, :cut], there, width, 0)
        second = self._in_groups(inner, query[:, heads:], key[:, cut:], value[:, cut:], there, width, width // 2)
        return torch.cat([first, second], dim=2)

    def _in_groups(
        self, inner: Any, query: Tensor, key: Tensor, value: Tensor, there: Tensor | None, width: int, shift: int
    ) -> Tensor:
        """Attention inside groups, the first of which lacks its first `shift` tokens, the last what is left over.

        there: (B,T), which tokens are text; None where no pad stands before one. (B,T,h,D).
        """
        tokens = query.shape[2]
        whole = (tokens - shift) // width * width
        parts = []
        for start, stop, size in ((0, shift, shift), (shift, shift + whole, width), (shift + whole, tokens, width)):
            if start == stop:
                continue
            size = min(size, stop - start)

            def cut(heads: Tensor, start: int = start, stop: int = stop, size: int = size) -> Tensor:
                """(B,h,T,D) -> (B n,h,G,D)."""
                filled = heads[:, :, start:stop].unflatten(2, (-1, size))  # type: ignore[no-untyped-call]
                folded: Tensor = filled.transpose(1, 2).flatten(0, 1)
                return folded

            seen = None if there is None else _seen(there[:, start:stop], size)
            found: Tensor = inner(cut(query), cut(key), cut(value), of_text=False, seen=seen, causal=True)
            parts.append(found.reshape(len(query), -1, *found.shape[2:]))  # (B n,G,h,D) -> (B,T',h,D)
        return torch.cat(parts, dim=1)


def _seen(there: Tensor, width: int) -> Tensor:
    """What each place of a group may look at: text before it, and itself. (B,T) -> (B n,1,G,G)."""
    one = torch.eye(width, dtype=torch.bool, device=there.device)
    seen: Tensor = (one.new_ones(width, width).tril() & there.reshape(-1, 1, 1, width)) | one
    return seen
