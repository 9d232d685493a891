"""The one wrapper: it takes a layer's place and holds what is attached there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from luthier import kernels
from luthier.anatomy import Site
from luthier.surgery.attachment import Attachment
from luthier.surgery.base import Base, join_rows, take_rows
from luthier.surgery.block_run import BlockRun
from luthier.surgery.frozen_layers import FastLayer
from luthier.surgery.stream import stream_of, with_stream

__all__ = ["ORDER", "Plan", "Plug", "Socket", "Substitute", "Tap"]

ORDER = {"delta": 0, "scale": 1, "parallel": 2, "sequential": 3}


class Tap:
    """Hands one tensor from the place where a sublayer reads it to the socket at the sublayer's end."""

    def __init__(self) -> None:
        self._tensor: Tensor | None = None

    def put(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook: keep the module's first input."""
        self._tensor = args[0] if args else kwargs["hidden_states"]

    def take(self) -> Tensor:
        """Give the tensor and let go of it, so that no graph outlives its step."""
        assert self._tensor is not None, "the sublayer's end was reached before its start"
        tensor, self._tensor = self._tensor, None
        return tensor


@dataclass(eq=False)
class Plug:
    """One attachment at one site, with what surgery knows of it."""

    tuning: str
    site: Site
    attachment: Attachment
    base: Base
    tap: Tap | None = None
    part: str = ""  # of a method of several, which one put it here
    rests: bool = False  # a modifier lets it sit out

    def __post_init__(self) -> None:
        cls = type(self.attachment)
        self.changes_input = cls.before is not Attachment.before
        self.has_fused = cls.fused is not Attachment.fused
        self.has_around = cls.around is not Attachment.around
        self.at_end = self.site.kind in _SUBLAYERS  # of a sublayer, which may be the very module of a projection
        self.read_dtype()

    def read_dtype(self) -> None:
        """Note the precision of the attachment; again after the user has cast the whole model."""
        self.dtype = next((p.dtype for p in self.attachment.parameters() if p.is_floating_point()), None)

    @property
    def rank(self) -> tuple[int, int]:
        """Place in the onion: what reads the base weight innermost, then by kind."""
        return (0 if self.attachment.reads_base_weight else 1, ORDER[self.attachment.kind])

    def before(self, x: Tensor) -> Tensor:
        """Run the attachment's `before` in its own precision, and give back the stream's."""
        if self.dtype is None or self.dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
            out = self.attachment.before(x)
        else:
            out = self.attachment.before(_cast(x, self.dtype))
        return out if out.dtype == x.dtype else out.to(x.dtype)

    def around(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        """Run the attachment's `around`, which computes in the stream's precision; a block is no layer of ours."""
        out = self.attachment.around(call, x)
        return out if out.dtype == x.dtype else out.to(x.dtype)

    def after(self, x: Any, y: Tensor) -> Tensor:
        """Run the attachment's `after` in its own precision, and give back the stream's.

        x is None at sublayers where the attachment says that it does not read it.
        """
        if self.dtype is None or self.dtype == y.dtype or torch.is_autocast_enabled(y.device.type):
            out = self.attachment.after(x, y)
        else:
            out = self.attachment.after(_cast(x, self.dtype), _cast(y, self.dtype))
        return out if out.dtype == y.dtype else out.to(y.dtype)


def _cast(t: Any, dtype: torch.dtype | None) -> Any:
    return t.to(dtype) if t is not None and t.is_floating_point() else t


@dataclass(eq=False)
class Substitute:
    """A module that computes one tensor of a layer from its frozen value."""

    tuning: str
    tensor: str  # name inside the layer, such as "weight"
    module: nn.Module
    dtype: torch.dtype | None = None  # of the result; None for the stored type

    def follow(self, fn: Callable[[Tensor], Tensor]) -> None:
        """The layer has been cast by `fn`."""
        if self.dtype is not None:
            self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype


@dataclass(eq=False)
class Plan:
    """What a forward pass has to do at one socket: the layer and what changes it, then what ends the sublayer.

    One module may be both a projection and the end of a sublayer (`attn.o` and `attn_out` of Llama). What sits at the
    projection reads what the projection reads; what sits at the end, what its own tap heard.
    """

    whole: list[Plug] = field(default_factory=list)  # at the layer itself
    ends: list[Plug] = field(default_factory=list)  # at the end of a sublayer, around all else
    parts: list[tuple[Site, list[Plug]]] = field(default_factory=list)
    experts: list[Plug] = field(default_factory=list)
    substitutes: list[Substitute] = field(default_factory=list)
    entering: bool = False  # one of the ends stands at a block and changes what it reads, or takes its call over
    fused: Plug | None = None
    single: Plug | None = None  # the only thing here, and it reads what the layer reads
    empty: bool = True


class SocketRoute(Protocol):
    """Another way to do what a socket does."""

    still: Callable[[Tensor], Tensor] | None

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute what the socket's `forward` would, from its arguments."""


class Socket(nn.Module):
    """Takes the place of `base` and answers for it: attribute look-ups fall through to the layer.

    Attributes:
        plugs, substitutes: what stands here, of all tunings.
        live: what a forward pass has to do for those that act.
        route: another way to do it, while nothing learns; see route.py.
        fast: computes the frozen layer faster; see frozen_layers.py.
        listeners: other people's hooks on the layer.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.train(base.training)
        # Plain lists: the modules in them are registered once, on the model, under their tuning.
        self.plugs: list[Plug] = []
        self.substitutes: list[Substitute] = []
        self.live = Plan()
        self.route: SocketRoute | None = None
        self.fast: FastLayer | None = None
        # Of others, on the layer itself; they want it to be called. The dictionaries, so that later ones are seen.
        self.listeners: tuple[Mapping[int, Any], ...] = (
            base._forward_pre_hooks, base._forward_hooks, base._backward_pre_hooks, base._backward_hooks,
        )  # fmt: skip

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    @property
    def awake(self) -> list[Plug]:
        """The plugs that do not rest."""
        return [plug for plug in self.plugs if not plug.rests]

    def unplug(self, tuning: str) -> None:
        """Take off what the tuning has here."""
        self.plugs = [p for p in self.plugs if p.tuning != tuning]
        self.substitutes = [s for s in self.substitutes if s.tuning != tuning]

    def extra_repr(self) -> str:
        return ", ".join(f"{p.tuning}:{p.site.key}:{type(p.attachment).__name__}" for p in self.plugs)

    def refresh(self, active: set[str], *, folded: bool = False) -> None:
        """Work out once what each forward pass has to do, for the tunings in `active`."""
        self.live = self.plan(active, folded=folded)

    def plan(self, active: set[str], *, folded: bool = False, instead: list[Substitute] | None = None) -> Plan:
        """What a forward pass has to do for the tunings in `active`.

        Folded, the weights hold what the attachments did; only the cast of fp32 masters is left to do.

        Args:
            instead: take these computed tensors, not those of the tunings.
        """
        live = Plan()
        by_site: dict[str, tuple[Site, list[Plug]]] = {}
        for plug in sorted((p for p in self.awake if p.tuning in active and not folded), key=lambda p: p.rank):
            if plug.site.expert is not None:
                live.experts.append(plug)
            elif plug.site.rows is not None:
                by_site.setdefault(plug.site.key, (plug.site, []))[1].append(plug)
            elif plug.at_end:
                live.ends.append(plug)
            else:
                live.whole.append(plug)
        live.parts = list(by_site.values())
        live.entering = any(p.changes_input or p.has_around for p in live.ends)
        live.substitutes = [s for s in self.substitutes if s.tuning in active and (s.dtype is not None or not folded)]
        live.substitutes = live.substitutes if instead is None else instead
        live.empty = not (live.whole or live.ends or live.parts or live.experts or live.substitutes)
        if len(live.whole) == 1 and not (live.parts or live.experts or live.substitutes):
            only = live.whole[0]
            live.fused = only if only.has_fused else None
            live.single = only if not only.changes_input and not live.ends else None
        return live

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        route = self.route
        if route is not None:
            return route(args, kwargs)
        return self._base(args, kwargs) if self.live.empty else self.run(self.live, args, kwargs)

    def frozen(self, x: Tensor) -> Tensor:
        """The layer alone. x: (..., d_in) -> (..., d_out)."""
        y: Tensor = self._base((x,), {})
        return y

    def run(self, live: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Carry out `live`: the layer, and what sits there."""
        if live.entering:
            return self._block(live, args, kwargs)
        out = self.project(live, args, kwargs)  # first: the start of the sublayer may lie inside this module
        return self._end(live.ends, out, args, kwargs) if live.ends else out

    def project(self, live: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer and what changes it, without what ends a sublayer."""
        if live.empty:
            return self._base(args, kwargs)
        # A compiler fuses by itself, and better where it sees the plain computation.
        if live.fused is not None and kernels.fast() and not torch.compiler.is_compiling() and not any(self.listeners):
            fused = _fused(live.fused, args[0])
            if fused is not None:
                return fused
        if live.single is not None and args:
            y = self._base(args, kwargs)
            return (
                live.single.after(args[0], y) if isinstance(y, Tensor) else (live.single.after(args[0], y[0]), *y[1:])
            )
        if not (live.whole or live.parts):
            return self._run(live, args, kwargs)
        x = args[0] if args else kwargs["hidden_states"]
        if live.parts:
            y = self._parts(live, x, args, kwargs)
            for plug in live.whole:
                y = plug.after(x, y)
            return y
        inputs = [x]
        for plug in reversed(live.whole):
            inputs.append(plug.before(inputs[-1]) if plug.changes_input else inputs[-1])
        if args:
            out = self._run(live, (inputs[-1], *args[1:]), kwargs)
        else:
            out = self._run(live, (), {**kwargs, "hidden_states": inputs[-1]})
        y = stream_of(out)
        for plug, seen in zip(live.whole, reversed(inputs[:-1]), strict=True):
            y = plug.after(seen, y)
        return with_stream(out, y)

    def _base(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        fast = self.fast
        if fast is not None and not kwargs and kernels.fast() and not any(self.listeners):
            out = fast(args[0])
            if out is not None:
                return out
        return self.base(*args, **kwargs)

    def _run(self, live: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer itself, with its computed tensors in place where there are any."""
        if not live.substitutes and not live.experts:
            return self._base(args, kwargs)
        tensors: dict[str, Tensor] = {}
        rounded: torch.dtype | None = None
        for substitute in live.substitutes:
            frozen = getattr(self.base, substitute.tensor)
            dtype = substitute.dtype or frozen.dtype
            value = substitute.module(frozen.detach())
            if type(self.base) is nn.Embedding and self.base.max_norm is None:
                # The rows that are looked up are rounded, not the table: it is often the model's largest tensor.
                tensors[substitute.tensor], rounded = value, dtype
            else:
                tensors[substitute.tensor] = value.to(dtype)
        lower = next((s.dtype for s in live.substitutes if s.dtype is not None), None)
        if lower is not None:
            # Some models cast to the type of the weight they see, which is the fp32 master's.
            args = tuple(a.to(lower) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
        for name in {p.site.param for p in live.experts}:
            tensors[name] = self._experts(name, [p for p in live.experts if p.site.param == name])
        out = functional_call(self.base, tensors, args, kwargs)
        return out if rounded is None else out.to(rounded)

    def _experts(self, name: str, plugs: list[Plug]) -> Tensor:
        """3-D expert weights with every expert's attachment merged in. Dense: exact for any method that merges."""
        stacked: Tensor = getattr(self.base, name).detach()
        experts = list(stacked.unbind(0))  # each (d_out, d_in), or transposed
        for plug in plugs:
            site, e = plug.site, plug.site.expert
            assert e is not None
            weight = experts[e].T if site.transposed else experts[e]  # (d_out, d_in)
            # A site is rows of it: (d_in, d_out) -> (d_in, own d_out) -> (own d_out, d_in)
            part = take_rows(weight.T, site.rows).T if site.rows is not None else weight
            new, _ = plug.attachment.merged(part.float(), None)
            new = new.to(weight.dtype)
            if site.rows is not None:
                new = join_rows(weight.T, [(site.rows, new.T)]).T  # (d_out, d_in)
            experts[e] = new.T if site.transposed else new  # as it is stored
        return torch.stack(experts)

    def _parts(self, live: Plan, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """A fused projection: each part has an onion of its own."""
        y = self._run(live, args, kwargs)
        changed = []
        for site, plugs in live.parts:
            assert site.rows is not None
            inputs = [x]
            for plug in reversed(plugs):
                inputs.append(plug.before(inputs[-1]) if plug.changes_input else inputs[-1])
            # One more product for this part, and only where a method changes what the layer reads.
            part = take_rows(y, site.rows) if inputs[-1] is x else plugs[0].base.linear(inputs[-1])
            for plug, seen in zip(plugs, reversed(inputs[:-1]), strict=True):
                part = plug.after(seen, part)
            changed.append((site.rows, part))
        return join_rows(y, changed)

    def _block(self, live: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A block as a layer among others: what it reads is changed, its call taken over, what it gives changed."""
        inputs = [args[0] if args else kwargs["hidden_states"]]
        for plug in reversed(live.ends):
            inputs.append(plug.before(inputs[-1]) if plug.changes_input else inputs[-1])
        x, owner = inputs[-1], next((p for p in live.ends if p.has_around), None)
        if owner is not None:
            call = BlockRun(lambda a, k: self.project(live, a, k), self.base, args, kwargs)
            states = owner.around(call, x)
            out: Any = (states, *call.rest) if call.rest else states
        elif args:
            out = self.project(live, (x, *args[1:]), kwargs)
        else:
            out = self.project(live, (), {**kwargs, "hidden_states": x})
        y = stream_of(out)
        for plug, seen in zip(live.ends, reversed(inputs[:-1]), strict=True):
            y = plug.after(seen, y)
        return with_stream(out, y)

    def _end(self, ends: list[Plug], out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The end of a sublayer: x comes from its start."""
        taps = {id(p.tap): p.tap for p in ends if p.tap is not None}
        seen = {number: tap.take() for number, tap in taps.items()}
        y = stream_of(out)
        own = args[0] if args else kwargs.get("hidden_states")
        for plug in ends:
            x = seen[id(plug.tap)] if plug.tap is not None else own
            y = plug.after(x, y)
        return with_stream(out, y)


def _fused(plug: Plug, x: Tensor) -> Tensor | None:
    """Layer and attachment in one function, which chooses its own types: autocast stays out of it."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return plug.attachment.fused(plug.base, x)
    if plug.base.dtype != torch.get_autocast_dtype(device):
        return None  # a base in fp32 is cast by autocast, which the plain path follows
    with torch.autocast(device, enabled=False):
        return plug.attachment.fused(plug.base, x.to(plug.base.dtype))


_SUBLAYERS = ("attn_out", "cross_out", "ffn_out", "block_out")
