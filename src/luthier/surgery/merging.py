"""Computing tunings into the weights of their model, and out of them again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from luthier.core import CannotMerge
from luthier.core.protocols import Model
from luthier.kernels import Grouped
from luthier.surgery.base import Base
from luthier.surgery.edited_model import EditedModel
from luthier.surgery.serving import Serving
from luthier.surgery.socket import Plug
from luthier.surgery.tuning import Master

__all__ = ["Merging", "check", "merged_tensors", "probe"]


class Merging:
    """Folds the active tunings into the weights."""

    def __init__(self, edited: EditedModel, serving: Serving) -> None:
        self.edited, self.serving = edited, serving

    @torch.no_grad()
    def fold(self) -> None:
        """Compute every active tuning into the base weights: fp32, cast once. `unfold` restores a kept copy.

        Raises:
            CannotMerge: a part has no closed form; nothing has been changed then.
        """
        edited = self.edited
        if edited.folded:
            return
        self.serving.refuse("fold")
        check(edited)
        # Compute everything before writing anything: a failure must leave the model as it was.
        new = merged_tensors(edited)
        edited.base_copies = [(tensor, tensor.detach().clone()) for tensor, _ in new]
        for tensor, value in new:
            tensor.copy_(value)
        edited.refresh()

    @torch.no_grad()
    def unfold(self) -> None:
        """Put the kept base weights back, bit for bit; the tunings act as attachments again."""
        edited = self.edited
        if edited.base_copies is not None:
            for tensor, copy in edited.base_copies:
                tensor.copy_(copy)
            edited.base_copies = None
            edited.refresh()

    def commit(self, check: Mapping[str, Any] | None, wanted: Tensor | None, base: Tensor | None, far: float) -> None:
        """Fold for good: what the weights hold then is the base.

        Args:
            check: a batch, with the logits that are `wanted` of it and those of the `base`; None to compare nothing.
            far: how far the merged logits may lie from the wanted ones, as a share of what the tuning changes.

        Raises:
            CannotMerge: see `Tuned.merge`. Nothing has been changed then.
        """
        edited = self.edited
        active = [u for tuning in edited.active() for u in tuning.unfrozen.values()]
        changed = any(not torch.equal(u.parameter.detach(), u.original.to(u.parameter.dtype)) for u in active)
        self.fold()
        assert edited.base_copies is not None
        try:
            if not changed and all(torch.equal(tensor, copy) for tensor, copy in edited.base_copies):
                raise CannotMerge(
                    "the merged weights equal the base's: the tunings are untrained, or all that they change is lost "
                    "in the rounding of the base's type. Serve them attached, or load the base in float32."
                )
            if wanted is not None and base is not None:
                effect, error = _rms(wanted - base), _rms(probe(edited.model, check) - wanted)
                if not error <= far * effect:
                    raise CannotMerge(
                        f"merged, the logits are off by {error:.3g} where the tuning changes them by {effect:.3g}: "
                        f"above the tolerance of {far:g}. Serve it attached, or merge into a base in float32."
                    )
        except BaseException:
            self.unfold()
            raise
        edited.base_copies = None
        for unfrozen in active:
            unfrozen.original = unfrozen.parameter.data.to(unfrozen.original.dtype)


def merged_tensors(edited: EditedModel) -> list[tuple[Tensor, Tensor]]:
    """(tensor of the model, its merged value in fp32) for all that the active tunings change."""
    sockets = edited.sockets()
    new: dict[int, tuple[Tensor, Tensor]] = {}

    def working_copy(frozen: Tensor) -> Tensor:
        if id(frozen) not in new:
            new[id(frozen)] = (frozen, frozen.detach().float().clone())
        return new[id(frozen)][1]

    for socket in sockets:
        for substitute in socket.live.substitutes:
            frozen = getattr(socket.base, substitute.tensor)
            if not isinstance(substitute.module, Master) and id(frozen) not in new:
                new[id(frozen)] = (frozen, substitute.module(frozen.detach().float()).float())
    for socket in sockets:
        live = socket.live
        onions = [live.whole, *(plugs for _, plugs in live.parts), *([p] for p in live.experts)]
        for plugs in filter(None, onions):
            base, key_ = plugs[0].base, plugs[0].site.key
            if base.stored is not None:
                _shift(base, plugs, working_copy(base.stored.get_buffer("beta")))
                continue
            whole = working_copy(base.whole_weight())
            held_bias = base.whole_bias()
            bias = None if held_bias is None else base.part(working_copy(held_bias), bias=True).clone()
            weight = base.part(whole).clone()
            for plug in plugs:
                weight, bias = plug.attachment.merged(weight, bias)
            if bias is not None and held_bias is None:
                raise CannotMerge(f"{key_}: merged, it needs a bias that the model's layer lacks. Serve it attached.")
            for tensor in (weight, bias):
                if tensor is not None and not torch.isfinite(tensor).all():
                    raise CannotMerge(f"{key_}: the merged weight is not finite: broken tuning. Nothing was changed.")
            base.put(whole, weight)
            if bias is not None and held_bias is not None:
                base.put(working_copy(held_bias), bias, bias=True)
    return list(new.values())


def _shift(base: Base, plugs: list[Plug], beta: Tensor) -> None:
    """Move the offsets of a layer held in integers of groups, beta (all d_out, groups); no code of it changes."""
    rows = slice(None) if base.site.rows is None else torch.tensor(base.site.rows.indices(), device=beta.device)
    for plug in plugs:
        moved = plug.attachment.by_groups()
        assert moved is not None, "check() has asked"
        if not torch.isfinite(moved).all():
            raise CannotMerge(f"{plug.site.key}: the merged offsets are not finite: broken tuning. Nothing changed.")
        beta[rows] += moved.to(beta.dtype)


def _refuse_codes(plug: Plug) -> None:
    codes = plug.base.stored
    assert codes is not None
    if isinstance(codes.form, Grouped) and plug.attachment.by_groups() is not None:
        return
    raise CannotMerge(
        f"{plug.site.key}: its weight is quantised ({codes.form.name} codes), and an update would be lost among them. "
        "`luthier merge RUN` merges into the decoded weights; or serve it attached. qa_lora merges into int4 exactly."
    )


@torch.no_grad()
def probe(model: Model, batch: Any) -> Tensor:
    """The logits of one batch, in fp32 and in evaluation mode."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        out = model(**batch)
        logits: Tensor = out.logits if hasattr(out, "logits") else out[0]
        return logits.float()
    finally:
        for module, mode in modes.items():
            module.training = mode


def check(edited: EditedModel) -> None:
    """Refuse what no weight of the model can do, before anything is computed.

    Raises:
        CannotMerge: with the reason.
    """
    parts = [part for tuning in edited.active() for part in tuning.method.parts()]
    stuck = [part.name for part in parts if not part.mergeable and not part.modifies]
    if stuck:
        raise CannotMerge(
            f"{', '.join(dict.fromkeys(stuck))} cannot be merged: no weight of the model does the same. "
            "Serve it attached, or detach it first and merge the rest."
        )
    for socket in edited.sockets():
        live = socket.live
        for plug in (*live.whole, *(p for _, plugs in live.parts for p in plugs), *live.experts):
            if plug.site.kind in ("embed", "norm"):  # first: the weight of a norm has another shape than a product's
                raise CannotMerge(
                    f"{plug.site.key}: no product of a weight, so nothing can be merged into it. Serve the tuning "
                    "attached."
                )
            if plug.base.stored is not None:
                _refuse_codes(plug)
            elif not plug.base.plain:
                raise CannotMerge(
                    f"{plug.site.key}: its weight is quantised ({type(plug.base.module).__name__} holds "
                    f"{plug.base.dtype}), and an update cannot be added to it without its scale. Serve the tuning "
                    "attached, or load the base in bfloat16, load the tuning there and merge that."
                )
        if live.ends:
            site, kind = live.ends[0].site, type(live.ends[0].attachment).__name__
            raise CannotMerge(
                f"{site.key}: a place at the end of a sublayer, with no weight of its own to merge {kind} into. Attach "
                "to the projection there (attn.o, ffn.down) instead, or serve it attached."
            )
        for plug in live.whole:
            site = plug.site
            name = edited.anatomy.tied.get(f"{site.path}.{site.param}", f"{site.path}.{site.param}")
            if name in edited.parameters and len(edited.owners(name)) > 1:
                raise CannotMerge(
                    f"{site.key}: its weight is another layer's too (the output head's and the input embedding's, "
                    "say): merging there would change both. Serve it attached."
                )


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
