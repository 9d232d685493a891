"""Carrying out a method's edits on a model: refused together before anything is touched, then installed one by one."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from luthier.anatomy import Anatomy, Attention, Site
from luthier.core import AnatomyError, CompositionError, ConfigError, near
from luthier.core.protocols import Model
from luthier.surgery import compose
from luthier.surgery.base import Base, is_plain
from luthier.surgery.edited_model import EditedModel
from luthier.surgery.edits import (
    AddBranch,
    Attach,
    Attend,
    Edit,
    Linearise,
    LookFirst,
    PrependKeys,
    PrependTokens,
    Reparametrise,
    Unfreeze,
)
from luthier.surgery.forward import Forward
from luthier.surgery.method import Method
from luthier.surgery.picture_prompts import reads_pictures
from luthier.surgery.prompts import refuse_prompts
from luthier.surgery.socket import Plug, Substitute, Tap
from luthier.surgery.tuning import ATTENTION, BRANCH, CALL, FIRST, ORDER, PREFIX, Master, Tuning, keyed
from luthier.surgery.unfrozen import Unfrozen
from luthier.surgery.view import TunedView

__all__ = ["Installer", "begin", "check", "edits_of"]


def edits_of(method: Method, edited: EditedModel, seed: int, *, train_head: bool) -> list[tuple[str, Edit]]:
    """(name of the part that asks for it, edit) of all that a method wants; those of a new task head last.

    Raises:
        AnatomyError: the model lacks a site, or its head cannot be told from its pretrained part.
        ConfigError: its weights are offloaded.
    """
    _refuse_offloaded(edited)
    anatomy = edited.anatomy
    parts = method.parts()
    edits: list[tuple[str, Edit]] = []
    for part in parts:
        prefix = f"{part.name}:" if len(parts) > 1 else ""
        with keyed(seed, "edits", part.name):
            edits += [(prefix, e) for e in part.edits(anatomy) if not compose.left_out(e, parts, anatomy)]
    if train_head:
        _require_known_head(edited.model, anatomy)
        owned = {e.name for _, e in edits if isinstance(e, Unfreeze | Reparametrise)}
        edits += [("head", Unfreeze(t)) for t in anatomy.head_tensors if t not in owned]
    return edits


def _require_known_head(model: Model, anatomy: Anatomy) -> None:
    """A head that nobody found would stay random, be frozen, and be stored nowhere."""
    if not anatomy.head_known and not anatomy.head_tensors:
        last = list(anatomy.tensors)[-1]
        raise AnatomyError(
            f"nothing tells which tensors of {type(model).__name__} are a new head and which are pretrained. Name "
            f"those that no checkpoint filled, as attach(..., new_tensors=[{last!r}, ...]), or pass train_head=False."
        )


def check(edited: EditedModel, edits: list[tuple[str, Edit]], method: Method) -> dict[str, str]:
    """Refuse what cannot be carried out, before anything is touched; returns what the method claims for itself.

    Raises:
        AnatomyError: the model has no such place.
        CompositionError: two parts of the method want the same.
    """
    anatomy, label = edited.anatomy, compose.spell(method)
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
                    f"{label}: the attention of {anatomy.model_type} does not go through transformers' "
                    "attention interface, so keys cannot be put before those of the text. Use prompt_tuning, or "
                    "another method."
                )
            claim(PREFIX, prefix, "One prefix is learned as a whole: make it longer instead.")
        elif isinstance(edit, Attend):
            if not all(a.interface for a in anatomy.attentions):
                raise AnatomyError(
                    f"{label}: the attention of {anatomy.model_type} does not go through transformers' attention "
                    "interface, so it cannot be changed from outside. Use prompt_tuning, or another method."
                )
            claim(f"{ATTENTION}{edit.attention.path}", prefix, "Give them different layers, or use one of them.")
        elif isinstance(edit, Attach) and edit.takes_over:
            claim(f"{CALL}{edit.site.path}", prefix, "Use one of them.")
        elif isinstance(edit, PrependTokens):
            if not reads_pictures(edited.modules, anatomy):
                refuse_prompts(edited.model, anatomy, label)
        elif isinstance(edit, AddBranch):
            for block in anatomy.blocks:
                _refuse_quantised(edited, label, [n for n in anatomy.tensors if n.startswith(f"{block.path}.")])
            claim(BRANCH, prefix, "Use one of them.")
        elif isinstance(edit, LookFirst):
            if anatomy.is_encoder_decoder:
                raise AnatomyError(
                    f"{label}: a first pass reads one text, and this {anatomy.model_type} model has two, of which the "
                    "second is read with the first one's states. Use another method, such as lora."
                )
            claim(FIRST, prefix, "Use one of them.")
        elif isinstance(edit, Linearise):
            if anatomy.is_encoder_decoder:
                raise AnatomyError(
                    f"{label}: a pass to first order reads one text, and this {anatomy.model_type} model has two, of "
                    "which the second is read with the first one's states. Use scope=layer."
                )
            claim(ORDER, prefix, "Use one of them.")
        elif isinstance(edit, Unfreeze | Reparametrise):
            if edit.name not in anatomy.tensors and edit.name not in anatomy.tied:
                raise AnatomyError(
                    f"{label}: the model has no tensor {edit.name!r}.{near(edit.name, list(anatomy.tensors))}"
                )
            name = anatomy.tied.get(edit.name, edit.name)
            _refuse_quantised(edited, label, [name])
            advice = "One tensor has one owner: use one of the methods, or settings that leave the tensor out."
            claim(f"the tensor {name!r}", prefix, advice)
    return claims


def begin(tuned: TunedView, tuning: Tuning, seed: int) -> None:
    """Let the parts of a method choose what follows from the weights; on the meta device there are none."""
    if any(p.device.type == "meta" for p in tuned.model.parameters()):
        return
    for part in tuning.method.parts():
        if type(part).begin is not Method.begin:
            with keyed(seed, "begin", part.name):
                part.begin(tuned)


def _refuse_offloaded(edited: EditedModel) -> None:
    """Refuse a model whose weights accelerate brings in for each pass: they are not here to be edited.

    Raises:
        ConfigError: what trains would lie where nothing computes, or act on nothing.
    """
    for path, module in edited.modules.items():
        hook = vars(module).get("_hf_hook")  # asked of each module for each method: a missing attribute is slow to miss
        hooks = getattr(hook, "hooks", (hook,))
        if any(getattr(h, "offload", False) for h in hooks):
            raise ConfigError(
                f"{path or type(module).__name__}: its weights are not here: accelerate keeps them elsewhere "
                "(offloaded to the processor's memory or to disk) and brings them in for each pass. Load the model "
                "without offloading: without device_map, or with room for all of it on the devices named there."
            )


def _refuse_quantised(edited: EditedModel, label: str, names: list[str]) -> None:
    for name in names:
        codes = edited.stored.get(name)
        if codes is not None or not is_plain(edited.parameters[name]):
            holds = f"{codes.form.name} codes" if codes is not None else str(edited.parameters[name].dtype)
            raise AnatomyError(
                f"{label}: the tensor {name!r} is quantised (it holds {holds}), and this method trains or replaces "
                "its numbers. Use a method that only adds to what a layer gives, such as lora or parallel_adapter, or "
                "load the base in bfloat16."
            )


class Installer:
    """Puts edits on a model, and takes off what a tuning has there."""

    def __init__(self, edited: EditedModel, forward: Forward) -> None:
        self.edited, self.forward = edited, forward
        self._taps: list[tuple[str, Any]] = []  # tuning, handle of the hook

    def install(self, tuning: Tuning, prefix: str, edit: Edit, seed: int) -> None:
        """Carry out one edit for `tuning`; `prefix` names the part of the method that asked for it."""
        edited = self.edited
        for short, module in getattr(edit, "shared", {}).items():
            if prefix + short not in tuning.keys:
                tuning.add(prefix + short, self._at_home(module))
        if isinstance(edit, Attach):
            self._attach(tuning, prefix, edit, seed)
        elif isinstance(edit, Reparametrise):
            tuning.add(f"{prefix}tensor/{edit.name}", self._at_home(edit.module))
            for path, short in edited.owners(edit.name):
                edited.socket(path).substitutes.append(Substitute(tuning.tuning_name, short, edit.module))
        elif isinstance(edit, Unfreeze):
            self._unfreeze(tuning, prefix, edit)
        elif isinstance(edit, PrependTokens):
            self._prepend_tokens(tuning, prefix, edit, seed)
        elif isinstance(edit, PrependKeys):
            source: Any = self._at_home(edit.source)
            tuning.add(f"{prefix}prefix", source)
            self.forward.add_prefixes(tuning.tuning_name, source, [fact.path for fact in edit.attentions])
        elif isinstance(edit, Attend):
            self._attend(tuning, prefix, edit, seed)
        elif isinstance(edit, LookFirst):
            tuning.add(f"{prefix}first", self._at_home(edit.module))
            self.forward.add_first_pass(tuning.tuning_name, edit.module)
        elif isinstance(edit, Linearise):
            self.forward.add_first_order(tuning.tuning_name)
        elif isinstance(edit, AddBranch):
            with keyed(seed, "branch"):
                module = self._at_home(edit.build(edited.model, edited.anatomy))
            tuning.add(f"{prefix}branch", module)
            self.forward.add_branch(tuning.tuning_name, module)

    def remove(self, tuning: Tuning) -> None:
        """Take off what stands for `tuning`, which does not act any more, and let go of its tensors."""
        name = tuning.tuning_name
        others = {id(u.parameter) for t in self.edited.tunings.values() if t is not tuning for u in t.unfrozen.values()}
        for unfrozen in tuning.unfrozen.values():
            if id(unfrozen.parameter) not in others:
                unfrozen.parameter.grad = None
                unfrozen.parameter.requires_grad_(False)
        for socket in self.edited.sockets():
            socket.unplug(name)
        for owner, handle in self._taps:
            if owner == name:
                handle.remove()
        self._taps = [tap for tap in self._taps if tap[0] != name]
        self.forward.remove(name)

    def _attach(self, tuning: Tuning, prefix: str, edit: Attach, seed: int) -> None:
        site = edit.site
        module = self.edited.modules[site.path]
        base = Base(module, site, partial(self.beside, site))
        weight = getattr(module, site.param, None)
        base.moves = any(u.parameter is weight for t in self.edited.tunings.values() for u in t.unfrozen.values())
        with keyed(seed, "init", prefix, site.key):
            attachment = self._at_home(edit.build(base))
        attachment.context = self.edited.context
        if attachment.keeps_keys:
            self.forward.watch_cache()
        attachment.train(self.edited.model.training)
        standing = self.edited.plugged(site.path)
        for plug in standing.plugs if standing is not None else []:
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
        socket = self.edited.socket(site.path)
        tap = None
        if site.kind in ("attn_out", "cross_out", "ffn_out") and attachment.needs_input:
            path = site.residual_path if attachment.reads == "residual" else site.input_path
            if path is not None and path != site.path:
                tap = Tap()
                # On a socket, not on the layer in it: a fused function computes that layer without calling it.
                hook = self.edited.socket(path).register_forward_pre_hook(tap.put, with_kwargs=True)
                self._taps.append((tuning.tuning_name, hook))
        socket.plugs.append(Plug(tuning.tuning_name, site, attachment, base, tap, prefix.removesuffix(":")))

    def _attend(self, tuning: Tuning, prefix: str, edit: Attend, seed: int) -> None:
        fact = edit.attention
        site = self.query_of(fact, compose.spell(tuning.method))
        kind = "cross.q" if fact.cross else "attn.q"
        place = site.key.removeprefix(kind)
        with keyed(seed, "init", prefix, "attend", site.key):
            module: Any = self._at_home(
                edit.build(Base(self.edited.modules[site.path], site, partial(self.beside, site)))
            )
        module.context = self.edited.context
        tuning.add(f"{prefix}{'cross' if fact.cross else 'attn'}.attend{place}", module)
        self.forward.add_own_attention(tuning.tuning_name, module, fact.path)

    def query_of(self, fact: Attention, label: str) -> Site:
        """The query projection of an attention; `label` begins the message.

        Raises:
            AnatomyError: its projections are not told apart.
        """
        kind = "cross.q" if fact.cross else "attn.q"
        for site in self.edited.anatomy.all_sites:
            if (site.kind, site.stack, site.layer) == (kind, fact.stack, fact.layer):
                return site
        raise AnatomyError(
            f"{label}: the projections of the attention {fact.path} are not told apart, so nothing can attend beside "
            "it. Use prefix_tuning, or another method."
        )

    def beside(self, site: Site, kind: str, part: str) -> Base:
        """The layer of `kind` in the block of `site`."""
        block = [s for s in self.edited.anatomy.all_sites if (s.stack, s.layer) == (site.stack, site.layer)]
        found = [s for s in block if s.kind == kind and part in ("", s.part)]
        if not found:
            wanted = f"{kind!r} with the part {part!r}" if part else repr(kind)
            there = ", ".join(dict.fromkeys(s.key for s in block))
            raise AnatomyError(f"{site.key}: its block has no {wanted}. It has {there}.")
        return Base(self.edited.modules[found[0].path], found[0], partial(self.beside, found[0]))

    def _unfreeze(self, tuning: Tuning, prefix: str, edit: Unfreeze) -> None:
        name = self.edited.anatomy.tied.get(edit.name, edit.name)
        parameter = self.edited.parameters[name]
        mask = edit.mask.to(parameter.device) if edit.mask is not None else None
        original = parameter.detach().clone()
        unfrozen = Unfrozen(name, parameter, original, mask, holds=edit.holds)
        # A copy, since what it was may be the value of a tuning that is not active.
        parameter.data = original if unfrozen.kept is not original else original.clone()
        if parameter.dtype in (torch.bfloat16, torch.float16):
            # Trained numbers are fp32: at 8 bits of mantissa most updates would round away.
            parameter.data = parameter.data.float()
            for path, short in self.edited.owners(name):
                substitute = Substitute(tuning.tuning_name, short, Master(parameter), original.dtype)
                self.edited.socket(path).substitutes.append(substitute)
        parameter.requires_grad_(True)
        for socket in self.edited.sockets():
            for plug in socket.plugs:
                # For good: what was measured while it moved may not stand for it once it is back.
                plug.base.moves = plug.base.moves or getattr(socket.base, plug.site.param, None) is parameter
        key_ = f"head/{name}" if prefix == "head" else f"{prefix}model/{name}"
        tuning.unfrozen[key_] = unfrozen

    def _at_home(self, module: Any) -> Any:
        """Trained numbers are fp32 and live where the model lives; dropout acts as the model's does."""
        module.train(self.edited.model.training)
        device = next(iter(self.edited.parameters.values())).device
        if device.type == "meta":
            return module.to("meta")
        for parameter in module.parameters():
            if parameter.is_floating_point() and parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()
        here = all(t.device == device for t in (*module.parameters(), *module.buffers()))
        return module if here else module.to(device)

    def _prepend_tokens(self, tuning: Tuning, prefix: str, edit: PrependTokens, seed: int) -> None:
        source: Any = self._at_home(edit.source)
        pictures = reads_pictures(self.edited.modules, self.edited.anatomy)
        if hasattr(source, "start") and not pictures and next(source.parameters()).device.type != "meta":
            embed = self.edited.anatomy.sites("embed", asked_by="prompt vectors")[0]
            with keyed(seed, "init", prefix, "prompt"):
                source.start(self.edited.modules[embed.path])
        tuning.add(f"{prefix}prompt", source)
