"""Vectors before the embedded text, or behind it, and everything of length T that has to follow.

The hooks sit on the stack that reads the text (the backbone, or the encoder of an encoder-decoder), so the caller's
labels, losses and pooling indices keep their length: the vectors go in before positions are added, and come off the
stack's output again. A pooler inside the backbone is fed without them. Only an encoder-decoder keeps them: its decoder
attends to all of the encoder's output, so the cross-attention mask is extended instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy
from luthier.core import AnatomyError, ModelError
from luthier.core.protocols import Model
from luthier.surgery.context import Context, packed

__all__ = ["Around", "PromptHooks", "leading_pads", "refuse_prompts", "text_stack", "with_vectors"]


def text_stack(modules: dict[str, nn.Module], anatomy: Anatomy) -> nn.Module:
    """The innermost module that is given the text (or image) and holds every block.

    Not always the backbone: the language-model class of OPT goes past it, straight to its decoder.
    """
    found = modules[anatomy.backbone]
    for path, module in modules.items():
        holds = not path or all(block.path.startswith(f"{path}.") for block in anatomy.blocks)
        if holds and path.startswith(anatomy.backbone) and hasattr(module, "forward"):
            names = inspect.signature(module.forward).parameters
            if {"input_ids", "inputs_embeds", "pixel_values"} & set(names):
                found = module  # parents come before their children
    return found


def refuse_prompts(model: Model, anatomy: Anatomy, asked_by: str) -> None:
    """Refuse vectors before the text where they could not be what those words in front would be.

    Raises:
        AnatomyError: the stack is given no words, or something beside the embedded text has to follow its length.
    """
    anatomy.sites("embed", asked_by=asked_by)
    advice = "Use prefix_tuning, which leaves the text as long as it is, or lora."
    if anatomy.is_encoder_decoder and hasattr(model, "get_encoder"):
        names = inspect.signature(model.get_encoder().forward).parameters
        if "inputs_embeds" not in names:
            raise AnatomyError(
                f"{asked_by}: the encoder of this {anatomy.model_type} model is given {next(iter(names))} and no "
                f"words, so vectors cannot be put before them. {advice}"
            )
    if any(hasattr(module, "get_rope_index") for module in model.modules()):
        raise AnatomyError(
            f"{asked_by}: this {anatomy.model_type} model gives words and images positions on three axes, counted from "
            f"the ids of the text, so vectors cannot be put before it. {advice}"
        )
    if any(getattr(m.config, "hidden_size_per_layer_input", 0) for m in model.modules() if hasattr(m, "config")):
        raise AnatomyError(
            f"{asked_by}: every layer of this {anatomy.model_type} model looks the text's ids up by itself, and "
            f"vectors have no ids. {advice}"
        )


@dataclass(frozen=True)
class Around:
    """Where vectors stand in a pass: `front` of them before the text of each row, `back` behind it.

    Attributes:
        pads: (rows,), how many pads each row begins with; None where none does.
        ends: (rows,), up to which of its tokens a row is text; None where it is to the last one, or nothing follows it.
    """

    front: int
    back: int = 0
    pads: Tensor | None = None
    ends: Tensor | None = None

    @classmethod
    def of(cls, mask: Tensor | None, front: int, back: int = 0) -> Around:
        """Around texts with this mask (rows, T)."""
        return cls(front, back, leading_pads(mask), _text_ends(mask) if back else None)

    def put(self, front: Tensor, text: Tensor, back: Tensor | None = None) -> Tensor:
        """`front` (rows, front, ...), `text` (rows, T, ...), `back` (rows, back, ...) -> all, each row in its order."""
        pieces = [front, text] if back is None or not self.back else [front, text, back]
        both = torch.cat(pieces, dim=1)
        if self.pads is None and self.ends is None:
            return both
        return _picked(both, self._order(text.shape[1], both.device))

    def filled(self, text: Tensor, value: float) -> Tensor:
        """A fact of each token of the text, (rows, T), with `value` for the vectors. (rows, front + T + back)."""
        rows = len(text)
        return self.put(text.new_full((rows, self.front), value), text, text.new_full((rows, self.back), value))

    def text(self, states: Tensor) -> Tensor:
        """Of states (rows, front + T + back, d) those of the text. (rows, T, d)."""
        n = states.shape[1] - self.front - self.back
        if self.pads is None and self.ends is None:
            return states[:, self.front : self.front + n]
        at = torch.arange(n, device=states.device)[None]
        pads, ends = self._bounds(n, states.device)
        return _picked(states, at + self.front * (at >= pads) + self.back * (at >= ends))

    def vectors(self, states: Tensor, at: int, n: int) -> Tensor:
        """Of states (rows, front + T + back, d) those of `n` vectors before the text, from number `at` on."""
        index = torch.arange(at, at + n, device=states.device)[None]
        return _picked(states, index if self.pads is None else index + self.pads[:, None])

    def _order(self, n: int, device: torch.device) -> Tensor:
        """Of each row pads, front, text, back, pads: places in (front, all given tokens, back)."""
        at = torch.arange(self.front + n + self.back, device=device)[None]
        pads, ends = self._bounds(n, device)
        rest = torch.where(at < ends + self.front, at, at - self.back)
        behind = (at >= ends + self.front) & (at < ends + self.front + self.back)
        rest = torch.where(behind, at + n - ends, rest)
        return torch.where(at < pads, at + self.front, torch.where(at < pads + self.front, at - pads, rest))

    def _bounds(self, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(rows, 1) each: where the text begins, and where it ends."""
        nothing = torch.zeros(1, 1, dtype=torch.long, device=device)
        pads = nothing if self.pads is None else self.pads[:, None]
        return pads, nothing + n if self.ends is None else self.ends[:, None]


def _picked(x: Tensor, index: Tensor) -> Tensor:
    """x: (rows, any, ...), index: (rows or 1, some) -> (rows, some, ...)."""
    rows = max(len(x), len(index))
    x, index = x.expand(rows, *x.shape[1:]), index.expand(rows, -1)
    return x[torch.arange(rows, device=x.device)[:, None], index]


def leading_pads(mask: Tensor | None) -> Tensor | None:
    """How many zeros each row of a mask begins with; None where no row does."""
    if mask is None or not bool((mask[:, 0] == 0).any()):
        return None
    return (mask.long().cumsum(-1) == 0).sum(-1)


def _text_ends(mask: Tensor | None) -> Tensor | None:
    """Up to which token each row of a mask is real; None where every row is to its end."""
    if mask is None or bool((mask[:, -1] != 0).all()):
        return None
    at = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (at * (mask != 0)).amax(-1)


def with_vectors(mask: Tensor, n: int) -> Tensor:
    """The mask (rows, T) of a text with `n` vectors before it, all real. (rows, n + T)."""
    return Around.of(mask, n).filled(mask, 1) if n else mask


class PromptHooks:
    """Inserts the rows of `sources` (in order) in front of the text of `stack`, while this object is installed."""

    def __init__(
        self,
        model: Model,
        stack: nn.Module,
        embed: Callable[[Tensor], Tensor],
        decoder: nn.Module | None,
        limit: int | None,
        context: Context,
    ) -> None:
        self.sources: list[nn.Module] = []
        self.embed, self.stack, self.limit, self.context = embed, stack, limit, context
        self.keep = decoder is not None
        self._around: Around | None = None  # where the vectors of this pass stand; None where it has none
        self._states: Tensor | None = None
        self._names = list(inspect.signature(stack.forward).parameters)
        self._offset = _position_offset(stack, model.config)
        self._handles = [
            stack.register_forward_pre_hook(self._before, with_kwargs=True),
            stack.register_forward_hook(self._after),
        ]
        pooler = getattr(stack, "pooler", None)
        if isinstance(pooler, nn.Module) and not self.keep:
            self._handles.append(pooler.register_forward_pre_hook(self._pool))
            if isinstance(encoder := getattr(stack, "encoder", None), nn.Module):
                self._handles.append(encoder.register_forward_hook(self._hold))
        if decoder is not None:
            self._handles.append(decoder.register_forward_pre_hook(self._cross, with_kwargs=True))

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    @property
    def length(self) -> int:
        """Vectors inserted in all."""
        return sum(_length(source) for source in self.sources)

    def _before(
        self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._around = self.context.around = None
        if not self.sources:
            return None
        given = dict(zip(self._names, args, strict=False)) | kwargs
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        if embeds is None:
            assert ids is not None
            embeds = self.embed(ids)
        rows, tokens = embeds.shape[:2]
        cache = given.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None and not self.keep else 0
        n = self.length
        if self.limit is not None and past + tokens + (n if past == 0 else 0) > self.limit:
            raise ModelError(
                f"{tokens} tokens and {n} prompt vectors are {tokens + n} positions; the model has {self.limit}. "
                f"Use texts of at most {self.limit - n} tokens, or fewer vectors."
            )
        if getattr(cache, "is_compileable", False) and not self.keep:
            raise ModelError(
                "prompt vectors make the text longer than a cache of a fixed length was made for. Generate with the "
                "default cache, or with use_cache=False."
            )
        mask = given.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            raise ModelError("prompt vectors need a (batch, tokens) attention mask; a ready-made 4-D mask was given.")
        if packed(given):
            raise ModelError(
                "texts stand one behind the other in a row, and prompt vectors would come before the first alone. Give "
                "every text a row of its own."
            )
        positions = given.get("position_ids")
        back = sum(_behind(source) for source in self.sources)
        around = Around.of(mask if past == 0 else None, n - back, back)
        if mask is not None or past > 0:
            total = tokens if past == 0 else past - n + tokens
            seen = mask if mask is not None else torch.ones(rows, total, dtype=torch.long, device=embeds.device)
            given["attention_mask"] = Around.of(seen, n - back, back).filled(seen, 1)
        if "position_ids" in self._names:
            if positions is None and mask is not None:
                positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens:]
                if self._offset is not None:
                    # RoBERTa counts from padding_idx + 1 and leaves pads at padding_idx.
                    positions = torch.where(mask[:, -tokens:] > 0, positions + self._offset + 1, self._offset)
            elif positions is None:
                start = past - n if past else 0
                positions = torch.arange(start, start + tokens, device=embeds.device).expand(
                    rows, tokens
                )  # (rows, tokens)
                positions = positions if self._offset is None else positions + self._offset + 1
            shifted = positions + around.front
            if self._offset is not None and mask is not None:
                shifted = torch.where(mask[:, -tokens:] > 0, shifted, positions)
            if past == 0:
                start = 0 if self._offset is None else self._offset + 1
                front = torch.arange(start, start + around.front, device=embeds.device).expand(rows, around.front)
                shifted = shifted.expand(rows, -1)
                behind = shifted.amax(-1, keepdim=True) + torch.arange(1, back + 1, device=embeds.device)
                shifted = around.put(front, shifted, behind)
            given["position_ids"] = shifted
        if past == 0:
            vectors = [(_vectors(source, self.context, embeds, mask), _behind(source)) for source in self.sources]
            before = torch.cat([v[:, : v.shape[1] - b] for v, b in vectors], dim=1).to(embeds.dtype)  # (rows, front, d)
            after = torch.cat([v[:, v.shape[1] - b :] for v, b in vectors], dim=1).to(embeds.dtype)  # (rows, back, d)
            embeds = around.put(before, embeds, after)  # (rows, n + tokens, d)
            types = given.get("token_type_ids")
            if types is not None:
                given["token_type_ids"] = around.filled(types.expand(rows, -1), 0)
            self._around = self.context.around = around
        given["input_ids"], given["inputs_embeds"] = None, embeds
        given.pop("cache_position", None)
        return (), given

    def _after(self, stack: nn.Module, args: Any, out: Any) -> Any:
        around = self._around
        if around is None or self.keep:
            return out
        self._tell(around, out[0])
        if isinstance(out, tuple):
            return (around.text(out[0]), *out[1:])
        out.last_hidden_state = around.text(out.last_hidden_state)
        if getattr(out, "hidden_states", None) is not None:
            out.hidden_states = tuple(around.text(h) for h in out.hidden_states)
        return out

    def _tell(self, around: Around, states: Tensor) -> None:
        """Hand a source that listens what the stack made of its vectors, (rows, P, d)."""
        at = 0
        for source in self.sources:
            n = _length(source) - _behind(source)
            if getattr(source, "listens", False):
                source.heard = around.vectors(states, at, n)
            at += n

    def _text(self, states: Tensor) -> Tensor:
        """The states of what the caller gave. (rows, n + tokens, d) -> (rows, tokens, d)."""
        return states if self._around is None else self._around.text(states)

    def _hold(self, encoder: nn.Module, args: Any, out: Any) -> None:
        self._states = out[0]

    def _pool(self, pooler: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        states, self._states = self._states, None
        if args[0].dim() == 2 and states is not None:  # ALBERT hands over the first position alone
            return (self._text(states)[:, 0], *args[1:])
        return (self._text(args[0]), *args[1:])

    def _cross(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        mask, states = kwargs.get("encoder_attention_mask"), kwargs.get("encoder_hidden_states")
        if mask is not None and states is not None and mask.shape[-1] < states.shape[1]:
            extra, back = states.shape[1] - mask.shape[-1], sum(_behind(source) for source in self.sources)
            longer = Around.of(mask, extra - back, back).filled(mask, 1)
            kwargs = {**kwargs, "encoder_attention_mask": longer}
        return args, kwargs


def _length(source: Any) -> int:
    """Vectors of a source."""
    return int(source.length if hasattr(source, "length") else source().shape[0])


def _behind(source: Any) -> int:
    """How many of them stand behind the text."""
    return int(getattr(source, "behind", 0))


def _vectors(source: Any, context: Context, embeds: Tensor, mask: Tensor | None) -> Tensor:
    """The vectors of a source before each row. embeds: (rows, T, d) -> (rows, P, d)."""
    if hasattr(source, "rows"):
        of_rows: Tensor = source.rows(context, embeds, mask)
        return of_rows
    shared: Tensor = source()
    return shared.expand(len(embeds), -1, -1)


def _position_offset(stack: nn.Module, config: Any) -> int | None:
    """`padding_idx` where positions are counted from it (RoBERTa and its kin), else None."""
    embeddings = getattr(stack, "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    if isinstance(table, nn.Embedding) and table.padding_idx is not None and hasattr(embeddings, "padding_idx"):
        return int(embeddings.padding_idx)  # type: ignore[union-attr]
    return None
