"""Computing tunings into the weights of their model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from luthier.core import CannotMerge
from luthier.surgery.tuning import Master

if TYPE_CHECKING:
    from luthier.surgery.tuned import Tuned

__all__ = ["check", "merged_tensors", "probe"]


def merged_tensors(tuned: Tuned) -> list[tuple[Tensor, Tensor]]:
    """(tensor of the model, its merged value in fp32) for all that the active tunings change."""
    sockets = tuned.sockets()
    new: dict[int, tuple[Tensor, Tensor]] = {}

    def working_copy(held: Tensor) -> Tensor:
        if id(held) not in new:
            new[id(held)] = (held, held.detach().float().clone())
        return new[id(held)][1]

    for socket in sockets:
        for substitute in socket.live.substitutes:
            held = getattr(socket.base, substitute.tensor)
            if not isinstance(substitute.module, Master) and id(held) not in new:
                new[id(held)] = (held, substitute.module(held.detach().float()).float())
    for socket in sockets:
        live = socket.live
        onions = [live.whole, *(plugs for _, plugs in live.parts), *([p] for p in live.experts)]
        for plugs in filter(None, onions):
            base, key_ = plugs[0].base, plugs[0].site.key
            whole = working_copy(base.held())
            held_bias = base.held_bias()
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


@torch.no_grad()
def probe(tuned: Tuned, batch: Any) -> Tensor:
    """The logits of one batch, in fp32 and in evaluation mode."""
    modes = {m: m.training for m in tuned.model.modules()}
    tuned.model.eval()
    try:
        out = tuned.model(**batch)
        logits: Tensor = out.logits if hasattr(out, "logits") else out[0]
        return logits.float()
    finally:
        for module, mode in modes.items():
            module.training = mode


def check(tuned: Tuned) -> None:
    stuck = []
    for tuning in tuned.tunings.values():
        if tuning.active:
            stuck += [part.name for part in tuning.method.parts() if not part.mergeable]
    if stuck:
        raise CannotMerge(
            f"{', '.join(dict.fromkeys(stuck))} cannot be merged: no weight of the model does the same. "
            "Serve it attached, or detach it first and merge the rest."
        )
    for socket in tuned.sockets():
        live = socket.live
        for plug in (*live.whole, *(p for _, plugs in live.parts for p in plugs), *live.experts):
            if not plug.base.plain:
                raise CannotMerge(
                    f"{plug.site.key}: its weight is quantised ({type(plug.base.module).__name__} holds "
                    f"{plug.base.dtype}), and an update cannot be added to it without its scale. Serve the tuning "
                    "attached, or load the base in bfloat16, load the tuning there and merge that."
                )
        for plug in live.whole:
            site = plug.site
            name = tuned.anatomy.tied.get(f"{site.path}.{site.param}", f"{site.path}.{site.param}")
            if name in tuned._parameters and len(tuned._owners(name)) > 1:
                raise CannotMerge(
                    f"{site.key}: its weight is another layer's too (the output head's and the input embedding's, "
                    "say): merging there would change both. Serve it attached."
                )
