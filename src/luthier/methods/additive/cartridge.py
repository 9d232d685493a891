"""Cartridge: the keys and values of a real text, which then train, stand before the text in every attention.

    Attn(q, [P_k ; K], [P_v ; V])          P_k, P_v: (P, n_kv d_head) per attention, at first what `words` gave

The model reads `words` once, and what its cache then holds of their first P is the start: the tuned model answers as if
it had been given them (models of llama, mistral, qwen2 and qwen3 without a window). The first `still` of them never
move. Without `words` the start is random.

Cartridges, arXiv:2506.06266, in the form of peft 0.21. Its training by answers about the text that the model writes for
itself (self-study) is a recipe of data, and not here.

Count: (P - still) times 2 n_kv d_head for each attention; all P are stored.
Claims: a long text's answers from a cache a fraction of its size.
Use it when: many questions are asked about one text.
Not when: the model is no decoder: refused; prefix_tuning is for them.
Pitfalls: where positions are no plain rotation, as in GPT-2, words and text stand at the same ones, so the start is
only near to the words read before it; the first word draws attention whatever it says, and a moved one harms: leave
still=1; no position of the text moves here, so the keys are turned back by P.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy
from luthier.core import AnatomyError, ConfigError, at_least
from luthier.methods.parts.masks import no_trace
from luthier.methods.parts.own_tensors import own_modules
from luthier.methods.parts.peft_prefixes import prefix_form, rotation_of, turned
from luthier.methods.parts.prefixes import groups_of, prefix_stored
from luthier.surgery import METHODS, Context, Edit, Method, PeftForm, PrependKeys, TunedView


def _split(rows: Tensor, still: int) -> dict[str, Tensor]:
    return {"prefix.rows": rows[still:], "prefix.first": rows[:still]}


@METHODS.register("cartridge", family="additive", paper="arXiv:2506.06266")
@dataclass(frozen=True, kw_only=True)
class Cartridge(Method):
    """Settings of a cartridge."""

    words: Annotated[tuple[int, ...], "token ids of the text whose cache is the start; none: a random one"] = ()
    length: Annotated[int, "keys and values before the text: the first so many of the words", at_least(1)] = 20
    still: Annotated[int, "of them, the first so many never move", at_least(0)] = 1

    starts_at_base: ClassVar[bool] = False
    default_lr: ClassVar[float] = 1e-3
    tiny: ClassVar[dict[str, object]] = {"length": 4, "words": (5, 9, 30, 7, 12), "lr": 5e-2}
    start_is_drawn: ClassVar[bool] = False
    peft: ClassVar[PeftForm | None] = prefix_form(
        "CARTRIDGE",
        lambda going: {"num_frozen_tokens": going.method.still},
        lambda facts: {"still": int(facts.get("num_frozen_tokens", 1))},
        lambda rows, facts: _split(rows, int(facts.get("num_frozen_tokens", 1))),
        also=("num_frozen_tokens",),
    )

    def __post_init__(self) -> None:
        if self.words and len(self.words) < self.length:
            raise ConfigError(f"cartridge.words: {len(self.words)} for a length of {self.length}. Give more, or less.")
        if self.still >= self.length:
            raise ConfigError(f"cartridge.still: {self.still} of {self.length} leave none to train. Set it lower.")

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        if set(groups_of(anatomy, "cartridge")) != {"self"} or not anatomy.is_decoder:
            raise AnatomyError(f"cartridge: this {anatomy.model_type} model is no decoder. Use prefix_tuning.")
        strange = [word for word in self.words if not 0 <= word < (anatomy.vocab_size or 0)]
        if strange:
            raise ConfigError(f"cartridge.words: {strange[0]} is no token of the {anatomy.vocab_size} of this model.")
        yield PrependKeys(Cache(anatomy, self.length, self.still), anatomy.acting_attentions, self.length)

    def n_params(self, anatomy: Anatomy) -> int:
        return prefix_stored(anatomy, self.length - self.still, "cartridge")

    def n_stored(self, anatomy: Anatomy) -> int:
        return prefix_stored(anatomy, self.length, "cartridge")

    @torch.no_grad()
    def begin(self, tuned: TunedView) -> None:
        if not self.words or any(p.is_meta for p in tuned.model.parameters()):
            return
        model: Any = tuned.model
        ids = torch.tensor([self.words], device=next(model.parameters()).device)
        with no_trace(tuned, training=False), tuned.base_only():
            kept = model(input_ids=ids, use_cache=True).past_key_values
        pairs = [t[0, :, : self.length].transpose(0, 1) for layer in kept.layers for t in (layer.keys, layer.values)]
        columns = sum(t[0].numel() for t in pairs)
        if any(len(t) < self.length for t in pairs) or columns != prefix_stored(tuned.anatomy, 1, "cartridge"):
            raise AnatomyError(
                f"cartridge: the cache of this {tuned.anatomy.model_type} model does not hold every word in every "
                "layer, as where attention has a window. Use fewer words, or prefix_tuning."
            )
        rows = torch.cat([t.flatten(1) for t in pairs], dim=1)
        rotation = rotation_of(model, tuned.anatomy)
        rows = rows if rotation is None else turned(rows, rotation, tuned.anatomy, -self.length)
        for cache in own_modules(self, tuned, Cache):
            cache.take(rows)


class Cache(nn.Module):
    """The keys and values. first: (still, columns) never moves; rows: (P - still, columns) trains."""

    first: Tensor

    def __init__(self, anatomy: Anatomy, length: int, still: int) -> None:
        super().__init__()
        self.heads, self.width = anatomy.n_kv_heads, anatomy.d_head
        columns = prefix_stored(anatomy, 1, "cartridge")
        start = torch.randn(length, columns) * 0.02
        self.register_buffer("first", start[:still].clone())
        self.rows = nn.Parameter(start[still:].clone())

    def take(self, rows: Tensor) -> None:
        """Start at these. rows: (P, columns)"""
        self.first.copy_(rows[: len(self.first)])
        self.rows.copy_(rows[len(self.first) :])

    def keys_values(self, context: Context) -> list[tuple[Any, Any]]:
        """One pair (n_kv_heads, P, d_head) per attention."""
        both = torch.cat([self.first.to(self.rows.dtype), self.rows])
        parts = both.view(len(both), -1, 2, self.heads, self.width).permute(1, 2, 3, 0, 4)
        return [(keys, values) for keys, values in parts]
