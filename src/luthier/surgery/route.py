"""What one socket does inside a serving block: four ways that give the same.

fused q/k/v   one tuning, few tokens: queries, keys and values of one attention as one product (fused_qkv.py)
still         one tuning for the whole batch, layer and attachment as one function
together      attachments of one class, stacked: the layer once for the batch, then each row's own numbers
in groups     anything else at a projection: the rows of each tuning by themselves, through the socket's usual way
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from luthier import kernels
from luthier.core import CompositionError
from luthier.surgery.attachment import Together
from luthier.surgery.base import join_rows, take_rows
from luthier.surgery.context import Context
from luthier.surgery.fused_qkv import FEW, FusedQKV
from luthier.surgery.row_names import RowNames
from luthier.surgery.socket import Plan, Plug, Socket, Substitute
from luthier.surgery.stacked_heads import StackedHeads, Value, stack_heads
from luthier.surgery.stream import stream_of, with_stream

if TYPE_CHECKING:
    from luthier.anatomy.site import Rows as SiteRows

__all__ = ["Route", "RowState"]

Stack = list[tuple["SiteRows | None", Together, dict[str, int]]]
"""Functions of several tunings, by part of a layer (None: all of it), and each tuning's number in them."""


@dataclass
class RowState:
    """What every route has to know.

    Attributes:
        context: facts of the current forward pass.
        free: the tunings that may act in some rows of a batch only.
        rows: which tuning acts in which row; None, the active ones in all.
    """

    context: Context
    free: list[str]
    rows: RowNames | None = None


class Route:
    """What one socket does inside a serving block."""

    def __init__(
        self,
        state: RowState,
        socket: Socket,
        values: dict[str, dict[str | None, Tensor]],
        qkv: tuple[FusedQKV, int] | None = None,
    ) -> None:
        self.state, self.socket, self.values, self.qkv = state, socket, values, qkv
        self.context = state.context
        self.still: Callable[[Tensor], Tensor] | None = None
        self._plans: dict[str | None, Plan] = {}
        self._stills: dict[str | None, Callable[[Tensor], Tensor] | None] = {}
        self._stacks: dict[type | None, Stack | None] = {}
        self._chosen: tuple[RowNames | None, Callable[..., Any]] = (None, self._alone)
        weight = socket.base._parameters.get("weight")
        # A trained head's parameter may be an fp32 master; the layer itself keeps the type of the original.
        original = next((v[None] for short, v in values.items() if short == "weight"), weight)
        self.dtype = None if original is None else original.dtype

    def refresh(self) -> None:
        """The socket's plan for the active tunings has changed."""
        self.still = _still(self.socket.live)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rows = self.state.rows
        if rows is None:
            # Who was asked first has looked whether it may; hooks on this layer are this layer's own.
            if self.qkv is not None and not kwargs and not any(self.socket.listeners):
                out = self.qkv[0].take(self.qkv[1], args[0])
                if out is not None:
                    return out
            if (self.still is not None or self.qkv is not None) and not kwargs and self._may(args[0]):
                x = args[0]
                if self.qkv is not None and x.numel() <= FEW * x.shape[-1]:
                    group, number = self.qkv
                    out = group.give(number, x)
                    if out is not None:
                        return out
                if self.still is not None:
                    return self.still(x)
            return self.socket.run(self.socket.live, args, kwargs)
        if self._chosen[0] is not rows:
            self._chosen = (rows, self._choose(rows))
        return self._chosen[1](rows, args, kwargs)

    def _choose(self, rows: RowNames) -> Callable[..., Any]:
        """The way to go for these rows."""
        if rows.alike:
            return self._alone
        used = [p for p in self.socket.awake if p.tuning in rows.names]
        inner = [p for p in used if not p.at_end]
        way: Callable[..., Any] = self._frozen
        if inner or self.values:
            stack = self._stack(inner)
            way = self._in_groups if stack is None else partial(self._together, stack)
        return way if len(inner) == len(used) else partial(self._sublayer, way)

    def _may(self, x: Any) -> bool:
        """Whether the functions that choose no type and give no gradient may stand for the layer on this input."""
        return (
            x.dtype == self.dtype
            and not torch.is_grad_enabled()
            and kernels.fast()
            and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled(x.device.type)
            and not any(self.socket.listeners)
        )

    # ------------------------------------------------------------------ one tuning

    def _plan(self, name: str | None) -> Plan:
        """What the socket does where only the tuning `name` acts."""
        if name not in self._plans:
            own = [(short, v.get(name, v[None])) for short, v in self.values.items()]
            instead = [Substitute(name or "", short, Value(value), value.dtype) for short, value in own]
            self._plans[name] = self.socket.plan(set() if name is None else {name}, instead=instead)
        return self._plans[name]

    def _alone(self, rows: RowNames, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = rows.only
        if name not in self._stills:
            self._stills[name] = _still(self._plan(name))
        still = self._stills[name]
        if still is not None and self._may(args[0]):
            return still(args[0])
        return self.socket.run(self._plan(name), args, kwargs)

    def _frozen(self, rows: RowNames, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.socket.run(self._plan(None), args, kwargs)

    # ------------------------------------------------------------------ many

    def _by_row(self, rows: RowNames, x: Tensor) -> Tensor:
        """x as (rows, n, d)."""
        n, tokens = len(rows), self.context.n_tokens
        if (x.dim() > 2 and len(x) == n) or (x.dim() == 2 and len(x) in (n, n * tokens)):
            return x.reshape(n, -1, x.shape[-1])  # (rows, n, d); some models flatten batch and tokens
        places = ", ".join(dict.fromkeys(p.site.key for p in self.socket.plugs)) or type(self.socket.base).__name__
        raise CompositionError(
            f"rows: {places} reads a tensor of shape {tuple(x.shape)}, which has no {n} rows of its own: different "
            "tunings in one batch cannot act there. Run each tuning's rows in a batch of their own."
        )

    def _stack(self, used: list[Plug]) -> Stack | None:
        """Functions of all tunings at once; None where there are none for what sits here."""
        if self.dtype is None or not self.dtype.is_floating_point:
            return None
        if self.values:
            if used or type(self.socket.base) is not nn.Linear:
                return None
            if None not in self._stacks:
                self._stacks[None] = [(None, *stack_heads(self.socket.base, self.values, self.dtype))]
            return self._stacks[None]
        classes = {type(p.attachment) for p in used}
        if len(classes) > 1:
            return None
        (cls,) = classes
        if cls not in self._stacks:
            self._stacks[cls] = self._stack_of(cls, self.dtype)
        stack = self._stacks[cls]
        stacked = set() if stack is None else {name for _, _, numbers in stack for name in numbers}
        return stack if all(p.tuning in stacked for p in used) else None

    def _stack_of(self, cls: Any, dtype: torch.dtype) -> Stack | None:
        """All free tunings that hold only attachments of `cls` here, one for each part of the layer."""
        by_tuning: dict[str, list[Plug]] = {}
        for plug in self.socket.awake:
            if plug.tuning in self.state.free and not plug.at_end:
                by_tuning.setdefault(plug.tuning, []).append(plug)
        by_part: dict[SiteRows | None, list[Plug]] = {}
        for plugs in by_tuning.values():
            parts = [p.site.rows for p in plugs]
            if all(type(p.attachment) is cls for p in plugs) and len(set(parts)) == len(parts):
                for plug in plugs:
                    by_part.setdefault(plug.site.rows, []).append(plug)
        if None in by_part and len(by_part) > 1:
            return None
        found: Stack = []
        for part, plugs in by_part.items():
            if part is not None and any(p.changes_input for p in plugs):
                return None
            together = cls.together([p.attachment for p in plugs], dtype)
            if together is None:
                return None
            found.append((part, together, {p.tuning: i for i, p in enumerate(plugs)}))
        return found

    def _together(self, stack: Stack, rows: RowNames, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x: Tensor = args[0]
        by_row = self._by_row(rows, x)
        return self._all_rows(rows, stack, x, by_row) if self._may(x) else self._in_groups(rows, args, kwargs)

    def _all_rows(self, rows: RowNames, stacked: Stack, x: Tensor, by_row: Tensor) -> Tensor:
        indices = [rows.index(numbers, len(numbers), x.device) for _, _, numbers in stacked]
        if stacked[0][0] is None:
            ((_, together, _),) = stacked
            if isinstance(together, StackedHeads):
                y = together.linear(by_row, indices[0])
            else:
                seen = together.before(by_row, indices[0])
                read = x if seen is by_row else seen.reshape(x.shape)
                y = self.socket.frozen(read)
                # y: (..., d_out) as (rows, n, d_out)
                y = together.after(by_row, y.view(*by_row.shape[:2], y.shape[-1]), indices[0])
            return y.reshape(*x.shape[:-1], y.shape[-1])  # (..., d_out), as x came
        y = self.socket.frozen(x)
        changed = []
        for (part, together, _), index in zip(stacked, indices, strict=True):
            assert part is not None
            own = take_rows(y, part)
            # (rows, n, width of the part), and back
            new = together.after(by_row, own.reshape(*by_row.shape[:2], -1).clone(), index)
            changed.append((part, new.reshape(own.shape)))
        return join_rows(y, changed)

    def _in_groups(self, rows: RowNames, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        x: Tensor = args[0]
        if not x.is_floating_point():
            return self._words_in_groups(rows, x)
        by_row, flat = self._by_row(rows, x), x.dim() == 2
        out: Tensor | None = None
        for name, picked in rows.groups(x.device):
            part = by_row.index_select(0, picked)
            # (picked * n, d) or (picked, n, d), as x came
            given = part.reshape(-1, part.shape[-1]) if flat else part.view(len(picked), *x.shape[1:])
            with _only(self.context, picked, len(rows)):
                y = self.socket.project(self._plan(name), (given,), {})
            y = y.reshape(len(picked), -1, y.shape[-1])  # (picked, n, d_out)
            if out is None:
                out = y.new_empty(len(rows), *y.shape[1:])
            out.index_copy_(0, picked, y)
        assert out is not None
        return out.reshape(*x.shape[:-1], out.shape[-1])  # (..., d_out), as x came

    def _words_in_groups(self, rows: RowNames, ids: Tensor) -> Tensor:
        """An embedding: ids (rows, n) -> (rows, n, d)."""
        if ids.dim() != 2 or len(ids) != len(rows):
            places = ", ".join(dict.fromkeys(p.site.key for p in self.socket.plugs))
            raise CompositionError(
                f"rows: {places} reads ids of shape {tuple(ids.shape)}, which have no {len(rows)} rows of their own. "
                "Run each tuning's rows in a batch of their own."
            )
        out: Tensor | None = None
        for name, picked in rows.groups(ids.device):
            with _only(self.context, picked, len(rows)):
                y = self.socket.project(self._plan(name), (ids.index_select(0, picked),), {})
            out = y.new_empty(len(rows), *y.shape[1:]) if out is None else out
            out.index_copy_(0, picked, y)
        assert out is not None
        return out

    def _sublayer(self, way: Callable[..., Any], rows: RowNames, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer for the whole batch in its own `way`, then what each tuning adds to its rows at the end."""
        out = way(rows, args, kwargs)  # first: the start of the sublayer may lie inside
        taps = {id(p.tap): p.tap for p in self.socket.plugs if p.tap is not None}
        seen = {number: tap.take() for number, tap in taps.items()}
        y = stream_of(out)
        own = args[0] if args else kwargs.get("hidden_states")
        by_row = self._by_row(rows, y)
        result = torch.empty_like(by_row)
        for name, picked in rows.groups(y.device):
            part = by_row.index_select(0, picked)
            shape = (-1, y.shape[-1]) if y.dim() == 2 else (len(picked), *y.shape[1:])
            part = part.reshape(shape)  # (picked * n, d) or (picked, n, d), as y came
            with _only(self.context, picked, len(rows)):
                for plug in self._plan(name).ends:
                    x = seen[id(plug.tap)] if plug.tap is not None else own
                    if x is not None:
                        mine = self._by_row(rows, x).index_select(0, picked)
                        # As x came: (picked * n, d_in) or (picked, n, d_in)
                        x = mine.reshape(-1, x.shape[-1]) if x.dim() == 2 else mine.view(len(picked), *x.shape[1:])
                    part = plug.after(x, part)
            result.index_copy_(0, picked, part.reshape(len(picked), -1, y.shape[-1]))
        y = result.view(y.shape)  # (rows, n, d), or flat
        return with_stream(out, y)


def _still(plan: Plan) -> Callable[[Tensor], Tensor] | None:
    """Layer and attachment as one function, where exactly one attachment sits and it offers that."""
    only = plan.single
    if only is None or only.site.rows is not None or only.site.expert is not None:
        return None
    return only.attachment.still(only.base)


@contextmanager
def _only(context: Context, picked: Tensor, batch: int) -> Iterator[None]:
    """The facts of the batch cut down to some of its rows."""
    masks, n, facts = context.masks, context.batch, context.rows
    try:
        cut = {name: context.row(name) for name in facts}
        context.rows = {name: fact.index_select(0, picked.to(fact.device)) for name, fact in cut.items()}
        context.batch = len(picked)
        context.masks = {
            stack: mask.index_select(0, picked) if mask is not None and len(mask) == batch else mask
            for stack, mask in masks.items()
        }
        yield
    finally:
        context.masks, context.batch, context.rows = masks, n, facts
