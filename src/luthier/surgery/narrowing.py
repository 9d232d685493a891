"""Cutting out of a merged model what nothing reads: rows of the layers that give it, columns of the one that reads it.

    ffn.down reads no channel c     rows c of ffn.up and ffn.gate, column c of ffn.down
    attn.o reads no key-value group rows of it in attn.q, attn.k, attn.v, its columns of attn.o

A configuration names one width for all layers. So a part is cut where every layer of the model keeps as many, the
model's class makes layers of that width, and what is cut computes the same; else its zeros stay, and the note says why.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from luthier.anatomy import Anatomy, Site
from luthier.core.protocols import Model
from luthier.surgery.edited_model import EditedModel
from luthier.surgery.merging import probe

__all__ = ["narrow", "unread"]

_CHANNELS = (
    "intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner", "hidden_dim",
    "ffn_hidden_size",
)  # fmt: skip
_HEADS = (
    "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
)  # fmt: skip
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_MADE_BY = {"ffn.down": ("ffn.up", "ffn.gate"), "attn.o": ("attn.q", "attn.k", "attn.v")}


class _Stays(Exception):
    """Why a part cannot be cut out."""


@dataclass(frozen=True)
class _Width:
    """Groups of each layer of a stack, before and after, and the query heads of a group: 1 for channels."""

    was: int
    left: int
    per_head: int = 1
    d_head: int = 0


@dataclass(frozen=True)
class _Cut:
    """What goes of the layers of one kind.

    Attributes:
        widths: by stack.
        kept: name of a tensor -> (dimension, what is left of it), for each dimension that is cut.
    """

    widths: dict[str, _Width]
    kept: dict[str, list[tuple[int, Tensor]]] = field(default_factory=dict)

    def told(self, groups: str) -> str:
        """What was cut out, in words."""
        found = {(w.was * w.per_head, (w.was - w.left) * w.per_head) for w in self.widths.values()}
        return f"cut out: {' and '.join(f'{gone} of {was}' for was, gone in sorted(found))} {groups}"


def unread(edited: EditedModel) -> dict[str, Tensor]:
    """Key of a site -> (d_in,) bool, the inputs that what acts there says it never reads."""
    found: dict[str, Tensor] = {}
    for socket in edited.sockets():
        for plug in (*socket.live.whole, *(p for _, plugs in socket.live.parts for p in plugs)):
            mask = plug.attachment.unread()
            if mask is not None and bool(mask.any()):
                found[plug.site.key] = mask.detach().clone()
    return found


def narrow(
    model: Model, anatomy: Anatomy, unread: Mapping[str, Tensor], check: Mapping[str, Any]
) -> tuple[Any, tuple[str, ...]]:
    """The merged model without what it does not read, and a line on each part: cut out, or why not.

    Args:
        anatomy: of the model as it is.
        unread: see `unread`; of these, what is zero in the merged weights.
        check: a batch on which both must compute the same.
    """
    notes = []
    for kind, groups in (("ffn.down", "channels of each feed-forward block"), ("attn.o", "heads of each attention")):
        masks = {key: mask for key, mask in unread.items() if key.partition("@")[0] == kind}
        if not masks:
            continue
        try:
            cut = _cut(model, anatomy, kind, masks)
            model = _without(model, cut, kind, check)
            notes.append(cut.told(groups))
        except _Stays as why:
            notes.append(f"written as zeros, and not cut out: what is pruned of the {groups}: {why}")
    return model, tuple(notes)


def _cut(model: Model, anatomy: Anatomy, kind: str, masks: Mapping[str, Tensor]) -> _Cut:
    readers = [site for site in anatomy.all_sites if site.kind == kind]
    gone = {site.key: _groups_gone(model, anatomy, site, masks.get(site.key)) for site in readers}
    cut = _Cut({})
    for stack in dict.fromkeys(site.stack for site in readers):
        here = [site for site in readers if site.stack == stack]
        left = {(len(gone[s.key]), int((~gone[s.key]).sum())): s.key for s in reversed(here)}  # the first of each width
        if len(left) > 1:
            told = ", ".join(f"{pair[1]} at {left[pair]}" for pair in (min(left), max(left)))
            raise _Stays(f"a configuration names one width for all layers, and they keep {told}")
        ((was, kept),) = left
        cut.widths[stack] = _Width(was, kept, *(_heads(anatomy, here[0]) if kind == "attn.o" else ()))
    if any(site.shared > 1 and kind == "attn.o" for site in readers):
        raise _Stays("several layers use one attention")
    drop: dict[tuple[str, int], set[int]] = {}
    sizes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for reader in readers:
        mask = gone[reader.key]
        for site in _family(anatomy, reader, kind):
            each = (site.d_in if site is reader else site.d_out) // len(mask)
            lost = mask.repeat_interleave(each).nonzero().flatten().tolist()
            weight = f"{site.path}.{site.param}"
            if site is reader:
                drop.setdefault((weight, 0 if site.transposed else 1), set()).update(lost)
                continue
            rows = lost if site.rows is None else [site.rows.indices()[i] for i in lost]
            drop.setdefault((weight, 1 if site.transposed else 0), set()).update(rows)
            if site.bias is not None and f"{site.path}.{site.bias}" in sizes:
                drop.setdefault((f"{site.path}.{site.bias}", 0), set()).update(rows)
    for (name, dim), lost_of in drop.items():
        stays = torch.tensor([i for i in range(sizes[name][dim]) if i not in lost_of])
        cut.kept.setdefault(name, []).append((dim, stays))
    return cut


def _groups_gone(model: Model, anatomy: Anatomy, site: Site, mask: Tensor | None) -> Tensor:
    """(groups,) bool: what a reader does not read and its merged weight has as zeros."""
    n = site.d_in
    if site.kind == "attn.o":
        n = site.d_in // (_heads(anatomy, site)[0] * _heads(anatomy, site)[1])
    if mask is None:
        return torch.zeros(n, dtype=torch.bool)
    weight = model.get_submodule(site.path).get_parameter(site.param)
    zero = (weight == 0).all(1 if site.transposed else 0)  # (d_in,)
    gone: Tensor = (mask.to(zero.device) & zero).view(n, -1).all(1).cpu()
    return gone


def _heads(anatomy: Anatomy, site: Site) -> tuple[int, int]:
    """How many query heads share a key-value head, and how wide a head is."""
    for attention in anatomy.attentions:
        if not attention.cross and (attention.layer, attention.stack) == (site.layer, site.stack):
            return attention.n_heads // attention.n_kv_heads, site.d_in // attention.n_heads
    raise _Stays(f"nothing is known of the heads before {site.key}")


def _family(anatomy: Anatomy, reader: Site, kind: str) -> Iterator[Site]:
    for site in anatomy.all_sites:
        if site is reader or (site.kind in _MADE_BY[kind] and (site.layer, site.stack) == (reader.layer, reader.stack)):
            yield site


def _config(model: Model, cut: _Cut, kind: str) -> Any:
    """The configuration with the new widths; names that it does not have are left alone."""
    config = copy.deepcopy(model.config)
    values = vars(config)

    def put(names: tuple[str, ...], stack: str, old: int, new: int) -> None:
        for name in names:
            of_other = name.partition("_")[0] in cut.widths and name.partition("_")[0] != stack
            if not of_other and (values.get(name) == old or (name == "n_inner" and values.get(name, 0) is None)):
                setattr(config, name, new)

    for stack, width in cut.widths.items():
        if kind == "ffn.down":
            put(_CHANNELS, stack, width.was, width.left)
        else:
            put(_HEADS, stack, width.was * width.per_head, width.left * width.per_head)
            put(_KV_HEADS, stack, width.was, width.left)
            config.head_dim = width.d_head  # else it is the hidden size over the heads
    return config


@torch.no_grad()
def _without(model: Model, cut: _Cut, kind: str, check: Mapping[str, Any]) -> Any:
    from transformers.initialization import no_init_weights

    config, state = _config(model, cut, kind), dict(model.state_dict())
    kind_of_model: Any = type(model)
    for name, cuts in cut.kept.items():
        for dim, stays in cuts:
            state[name] = state[name].index_select(dim, stays.to(state[name].device))
    name = type(config).__name__
    try:
        with torch.device("meta"), no_init_weights():
            shapes = {n: tuple(t.shape) for n, t in kind_of_model(config).state_dict().items()}
    except (ValueError, RuntimeError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise _Stays(f"no {name} says so ({str(error).splitlines()[0] if str(error) else 'refused'})") from None
    wrong = [n for n, t in state.items() if shapes.get(n) != tuple(t.shape)]
    if wrong or len(shapes) != len(state):
        raise _Stays(f"no {name} says so ({wrong[0] if wrong else 'tensors'} would have another shape)")
    first = next(model.parameters())
    with torch.random.fork_rng(devices=[]), no_init_weights():
        made = kind_of_model(config).to(first.device)  # tables of its own, as of angles, keep their type
    made.load_state_dict(state, strict=True, assign=True)
    made.tie_weights()
    made.eval()
    if hasattr(model, "generation_config"):
        made.generation_config = copy.deepcopy(model.generation_config)
    wanted, found = probe(model, check), probe(made, check)
    far = 1e-4 if first.dtype == torch.float32 else 2e-2
    if not float((wanted - found).abs().max()) <= far * float(wanted.abs().max()):
        raise _Stays("without it the model computes something else: more than these layers reads it")
    return made
