"""Carrying out a method's edits on a model: refused together before anything is touched, then installed one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from luthier.anatomy import Anatomy
from luthier.core import AnatomyError, CompositionError, near
from luthier.surgery import compose, prefix_attention
from luthier.surgery.base import Base, is_plain
from luthier.surgery.branch import Branch
from luthier.surgery.edits import AddBranch, Attach, PrependKeys, PrependTokens, Reparametrise, Unfreeze
from luthier.surgery.method import Method
from luthier.surgery.socket import Plug, Substitute, Tap
from luthier.surgery.tuning import Master, Tuning, Unfrozen, keyed

if TYPE_CHECKING:
    from luthier.surgery.tuned import Tuned

__all__ = ["check", "install"]

PREFIX, BRANCH = "the keys before those of the text", "the network beside the model"


def check(tuned: Tuned, edits: list[tuple[str, Any]], method: Method) -> dict[str, str]:
    """Refuse what cannot be carried out, before anything is touched; returns what the method claims for itself."""
    label = compose.spell(method)
    claims: dict[str, str] = {}

    def claim(what: str, prefix: str, advice: str) -> None:
        owner = prefix.removesuffix(":") or label
        if what in claims:
            both = f"{claims[what]} and {owner}" if claims[what] != owner else owner
            raise CompositionError(f"{label}: {both} cannot stand together: both want {what}. {advice}")
        claims[what] = owner

    for prefix, edit in edits:
        if isinstance(edit, PrependKeys):
            if not all(a.interface for a in edit.attentions):
                raise AnatomyError(
                    f"{label}: the attention of {tuned.anatomy.model_type} does not go through transformers' "
                    "attention interface, so keys cannot be put before those of the text. Use prompt_tuning, or "
                    "another method."
                )
            claim(PREFIX, prefix, "One prefix is learned as a whole: make it longer instead.")
        elif isinstance(edit, AddBranch):
            for block in tuned.anatomy.blocks:
                _refuse_quantised(tuned, label, [n for n in tuned.anatomy.tensors if n.startswith(f"{block.path}.")])
            claim(BRANCH, prefix, "Use one of them.")
        elif isinstance(edit, Attach) and edit.site.kind in ("embed", "norm"):
            raise AnatomyError(
                f"{label}: attaching at {edit.site.kind!r} is not offered; use a linear or sublayer site of "
                f"{', '.join(k for k in tuned.anatomy.kinds() if k not in ('embed', 'norm'))}."
            )
        elif isinstance(edit, Unfreeze | Reparametrise):
            if edit.name not in tuned.anatomy.tensors and edit.name not in tuned.anatomy.tied:
                raise AnatomyError(
                    f"{label}: the model has no tensor {edit.name!r}.{near(edit.name, list(tuned.anatomy.tensors))}"
                )
            name = tuned.anatomy.tied.get(edit.name, edit.name)
            _refuse_quantised(tuned, label, [name])
            advice = "One tensor has one owner: use one of the methods, or settings that leave the tensor out."
            claim(f"the tensor {name!r}", prefix, advice)
    return claims


def require_known_head(model: Any, anatomy: Anatomy) -> None:
    """Refuse to train the head of a classifier whose head cannot be told from its pretrained part.

    Raises:
        AnatomyError: it would stay random, be frozen, and be stored nowhere.
    """
    if not anatomy.head_known and not anatomy.head_tensors:
        last = list(anatomy.tensors)[-1]
        raise AnatomyError(
            f"nothing tells which tensors of {type(model).__name__} are a new head and which are pretrained. Name "
            f"those that no checkpoint filled, as attach(..., new_tensors=[{last!r}, ...]), or pass train_head=False."
        )


def _refuse_quantised(tuned: Tuned, label: str, names: list[str]) -> None:
    for name in names:
        held = tuned._parameters[name]
        if not is_plain(held):
            raise AnatomyError(
                f"{label}: the tensor {name!r} is quantised (it holds {held.dtype}), and this method computes with its "
                "numbers. Use a method that only adds to what a layer gives, such as lora or parallel_adapter, or load "
                "the base in bfloat16."
            )


def install(tuned: Tuned, tuning: Tuning, prefix: str, edit: Any, seed: int) -> None:
    """Carry out one edit for `tuning`; `prefix` names the part of the method that asked for it."""
    shared = getattr(edit, "shared", {})
    for short, module in shared.items():
        if prefix + short not in tuning.keys:
            tuning.add(prefix + short, _home(tuned, module))
    if isinstance(edit, Attach):
        _attach(tuned, tuning, prefix, edit, seed)
    elif isinstance(edit, Reparametrise):
        tuning.add(f"{prefix}tensor/{edit.name}", _home(tuned, edit.module))
        for path, short in tuned._owners(edit.name):
            tuned._socket(path).substitutes.append(Substitute(tuning.tuning_name, short, edit.module))
    elif isinstance(edit, Unfreeze):
        _unfreeze(tuned, tuning, prefix, edit)
    elif isinstance(edit, PrependTokens):
        source = _home(tuned, edit.source)
        if hasattr(source, "start") and next(source.parameters()).device.type != "meta":
            embed = tuned.anatomy.sites("embed", asked_by="prompt vectors")[0]
            with keyed(seed, "init", prefix, "prompt"):
                source.start(tuned._modules[embed.path])
        tuning.add(f"{prefix}prompt", source)
    elif isinstance(edit, PrependKeys):
        tuning.add(f"{prefix}prefix", _home(tuned, edit.source))
        prefixes = []
        for fact in edit.attentions:
            held = prefix_attention.Prefix(tuning.tuning_name)
            tuned._modules[fact.path].__dict__.setdefault("_luthier_prefixes", []).append(held)
            prefixes.append(held)
        tuned._prefixes.append((tuning.tuning_name, edit.source, prefixes))
        tuned.route_attention()
    elif isinstance(edit, AddBranch):
        with keyed(seed, "branch"):
            module = _home(tuned, edit.build(tuned.model, tuned.anatomy))
        tuning.add(f"{prefix}branch", module)
        tuned._branches[tuning.tuning_name] = Branch(tuned.model, tuned.anatomy, tuned._modules, module, tuned.context)


def _attach(tuned: Tuned, tuning: Tuning, prefix: str, edit: Attach, seed: int) -> None:
    site = edit.site
    module = tuned._modules[site.path]
    base = Base(module, site)
    held = getattr(module, site.param, None)
    base.moves = any(u.parameter is held for t in tuned.tunings.values() for u in t.unfrozen.values())
    with keyed(seed, "init", prefix, site.key):
        attachment = _home(tuned, edit.build(base))
    attachment.context = tuned.context
    attachment.train(tuned.model.training)
    for plug in tuned._sockets[site.path].plugs if site.path in tuned._sockets else []:
        same = plug.tuning == tuning.tuning_name and plug.site.key == site.key
        if same and plug.attachment.kind == attachment.kind:
            owner, label = prefix.removesuffix(":"), compose.spell(tuning.method)
            one = plug.part if plug.part != owner else f"{owner or label}, twice,"
            raise CompositionError(
                f"{label}: {one} and {owner or label} both attach a {attachment.kind!r} at {site.key}, and a site "
                "holds one of each kind. Give them different sites, or use one of them."
            )
    key_ = f"{prefix}{site.key}"
    tuning.add(key_ if key_ not in tuning.keys else f"{key_}~{attachment.kind}", attachment)
    socket = tuned._socket(site.path)
    tap = None
    if site.kind in ("attn_out", "cross_out", "ffn_out") and attachment.needs_input:
        path = site.residual_path if attachment.reads == "residual" else site.input_path
        if path is not None and path != site.path:
            tap = Tap()
            # On a socket, not on the layer in it: a fused function computes that layer without calling it.
            hook = tuned._socket(path).register_forward_pre_hook(tap.put, with_kwargs=True)
            tuned._taps.append((tuning.tuning_name, hook))
    socket.plugs.append(Plug(tuning.tuning_name, site, attachment, base, tap, prefix.removesuffix(":")))


def _unfreeze(tuned: Tuned, tuning: Tuning, prefix: str, edit: Unfreeze) -> None:
    name = tuned.anatomy.tied.get(edit.name, edit.name)
    parameter = tuned._parameters[name]
    mask = edit.mask.to(parameter.device) if edit.mask is not None else None
    original = parameter.detach().clone()
    unfrozen = Unfrozen(name, parameter, original, mask, holds=edit.holds)
    # A copy, since what it held may be a sleeping tuning's value.
    parameter.data = original if unfrozen.kept is not original else original.clone()
    if parameter.dtype in (torch.bfloat16, torch.float16):
        # Trained numbers are fp32: at 8 bits of mantissa most updates would round away.
        parameter.data = parameter.data.float()
        for path, short in tuned._owners(name):
            held = Substitute(tuning.tuning_name, short, Master(parameter), original.dtype)
            tuned._socket(path).substitutes.append(held)
    parameter.requires_grad_(True)
    for socket in tuned.sockets():
        for plug in socket.plugs:
            # For good: what was measured while it moved may not stand for it once it is back.
            plug.base.moves = plug.base.moves or getattr(socket.base, plug.site.param, None) is parameter
    key_ = f"head/{name}" if prefix == "head" else f"{prefix}model/{name}"
    tuning.unfrozen[key_] = unfrozen


def _home(tuned: Tuned, module: Any) -> Any:
    """Trained numbers are fp32 and live where the model lives; dropout acts as the model's does."""
    module.train(tuned.model.training)
    device = next(iter(tuned._parameters.values())).device
    if device.type == "meta":
        return module.to("meta")
    for parameter in module.parameters():
        if parameter.is_floating_point() and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    return module.to(device)
