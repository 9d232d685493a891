"""Answering with numbers that stand still: copies made once, and a tuning of its own for every row of a batch.

While a `Serving` stands, every socket takes its `Route`. A route knows four ways and gives the same with each:

    siblings   one tuning, few tokens: queries, keys and values of one attention as one product (fused_qkv.py)
    still      one tuning for the whole batch, layer and attachment as one function
    together   attachments of one class, stacked: the layer once for the batch, then each row's own numbers
    in groups  anything else at a projection: the rows of each tuning by themselves, through the socket's usual way
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from luthier import kernels
from luthier.core import CompositionError, ConfigError
from luthier.surgery import compose
from luthier.surgery.attachment import Together
from luthier.surgery.base import join_rows, take_rows
from luthier.surgery.context import Context
from luthier.surgery.fused_qkv import BUDGET_BYTES, FEW, Siblings, sibling_paths
from luthier.surgery.socket import Plan, Plug, Socket, Substitute

if TYPE_CHECKING:
    from luthier.anatomy.site import Rows as SiteRows
    from luthier.surgery.tuned import Tuned
    from luthier.surgery.tuning import Tuning

__all__ = ["RowNames", "Serving", "row_problem"]


def row_problem(tuned: Tuned, tuning: Tuning) -> str | None:
    """Why this tuning cannot act in some rows of a batch only, or None."""
    name = tuning.tuning_name
    if any(key.rpartition(":")[2] == "prompt" for key in tuning.keys):
        return "puts vectors before the text, so its rows are longer than the others"
    if any(held == name for held, _, _ in tuned._prefixes):
        return "puts keys before those of the text in every row's attention"
    if name in tuned._branches:
        return "adds a network beside the whole model"
    if any(not key.startswith("head/") for key in tuning.unfrozen):
        return "changes tensors of the model itself, which all rows share"
    for socket in tuned.sockets():
        if any(s.tuning == name and not hasattr(s.module, "master") for s in socket.substitutes):
            return "computes tensors of the model anew, which all rows share"
        if any(p.tuning == name and (p.site.expert is not None or ".experts." in p.site.path) for p in socket.plugs):
            return "sits in experts, which see tokens without their rows"
    return None


class RowNames:
    """Which tuning acts in which row of the batch; None for the base."""

    def __init__(self, names: Sequence[str | None]) -> None:
        self.names = tuple(names)
        self.times = 1  # beams or samples of each row, which follow one another
        self.only = self.names[0] if len(set(self.names)) == 1 else None
        self.alike = len(set(self.names)) == 1
        self._kept: dict[Any, Any] = {}

    def __len__(self) -> int:
        return len(self.names) * self.times

    def hear(self, batch: int, generating: bool) -> None:
        """Compare the rows that are named with those that are given.

        Raises:
            ConfigError: they differ. While generating, whole multiples are beams or samples of each row.
        """
        times, rest = divmod(batch, len(self.names))
        if rest or times == 0 or (times > 1 and not generating):
            raise ConfigError(
                f"rows: {len(self.names)} tunings are named, and the batch has {batch} rows. "
                "Name one tuning, or None for the base, for every row."
            )
        self.times = times

    def index(self, numbers: dict[str, int], none: int, device: torch.device) -> Tensor:
        """(rows,) the number of each row's tuning; `none` where it has none."""
        key = (id(numbers), self.times, device)
        if key not in self._kept:
            listed = [none if n is None else numbers.get(n, none) for n in self.names for _ in range(self.times)]
            # `numbers` is kept too, so that its id stays its own.
            self._kept[key] = (torch.tensor(listed, device=device), numbers)
        found: Tensor = self._kept[key][0]
        return found

    def groups(self, device: torch.device) -> list[tuple[str | None, Tensor]]:
        """Each tuning that acts and the numbers of its rows."""
        key = ("groups", self.times, device)
        if key not in self._kept:
            by_name: dict[str | None, list[int]] = {}
            for i, name in enumerate(n for n in self.names for _ in range(self.times)):
                by_name.setdefault(name, []).append(i)
            self._kept[key] = [(n, torch.tensor(picked, device=device)) for n, picked in by_name.items()]
        found: list[tuple[str | None, Tensor]] = self._kept[key]
        return found


class Serving:
    """All sockets' routes, for as long as no number changes."""

    def __init__(self, tuned: Tuned) -> None:
        self.tuned = tuned
        self.rows: RowNames | None = None
        self.problems = {name: row_problem(tuned, tuning) for name, tuning in tuned.tunings.items()}
        self.free = [name for name, problem in self.problems.items() if problem is None]
        self.values = self._head_values()
        self.siblings = self._siblings()
        places = {id(s): (group, i) for group in self.siblings for i, s in enumerate(group.sockets)}
        self.routes = [
            Route(self, s, self.values.get(id(s), {}), places.get(id(s)))
            for s in tuned.sockets()
            if s.plugs or id(s) in self.values or id(s) in places
        ]

    def _siblings(self) -> list[Siblings]:
        """Projections that read the same tensor, as far as copies of them are cheap."""
        tuned, budget, found = self.tuned, BUDGET_BYTES, []
        for paths in sibling_paths(tuned.anatomy):
            # Sockets also where nothing sits: an answer must not depend on what else sleeps on the model.
            group = Siblings([tuned._socket(path) for path in paths])
            if group.n_bytes > budget:
                break
            budget -= group.n_bytes
            found.append(group)
        return found

    def _head_values(self) -> dict[int, dict[str, dict[str | None, Tensor]]]:
        """Socket -> tensor of its layer -> its value with each tuning; under None the base's."""
        tuned = self.tuned
        found: dict[int, dict[str, dict[str | None, Tensor]]] = {}
        for name in self.free:
            for unfrozen in tuned.tunings[name].unfrozen.values():
                own = unfrozen.parked if unfrozen.parked is not None else unfrozen.parameter.detach()
                for path, short in tuned._owners(unfrozen.name):
                    values = found.setdefault(id(tuned._socket(path)), {}).setdefault(short, {None: unfrozen.original})
                    values[name] = own.to(unfrozen.original.dtype)
        return found

    def name_rows(self, names: Sequence[str | None]) -> RowNames:
        """Check that every row can have the tuning that is named for it.

        Raises:
            UnknownName: no tuning is called so.
            ConfigError: no row is named.
            CompositionError: the method acts on all rows at once.
        """
        if isinstance(names, str) or not names:
            raise ConfigError(f"rows: got {names!r}; give a list that names one tuning, or None, for every row.")
        for name in dict.fromkeys(n for n in names if n is not None):
            tuning = self.tuned.tuning(name)
            problem = self.problems[name]
            if problem is not None and any(n != name for n in names):
                raise CompositionError(
                    f"rows: {name!r} is {compose.spell(tuning.method)}, which {problem}. Run its rows in a batch of "
                    f"their own, after tuned.activate({name!r})."
                )
        return RowNames(names)

    def install(self) -> None:
        """Every socket takes its route."""
        for route in self.routes:
            route.refresh()
            route.socket.__dict__["route"] = route

    def refresh(self) -> None:
        """Other tunings act now."""
        for route in self.routes:
            route.refresh()
        for group in self.siblings:
            group.refresh()

    def remove(self) -> None:
        """Every socket does again what it did."""
        for route in self.routes:
            route.socket.__dict__["route"] = None


Stack = list[tuple["SiteRows | None", Together, dict[str, int]]]
"""Functions of several tunings, by part of a layer (None: all of it), and each tuning's number in them."""


class Route:
    """What one socket does while a `Serving` stands."""

    def __init__(
        self,
        serving: Serving,
        socket: Socket,
        values: dict[str, dict[str | None, Tensor]],
        siblings: tuple[Siblings, int] | None = None,
    ) -> None:
        self.serving, self.socket, self.values, self.siblings = serving, socket, values, siblings
        self.context: Context = serving.tuned.context
        self.still: Callable[[Tensor], Tensor] | None = None
        self._plans: dict[str | None, Plan] = {}
        self._stills: dict[str | None, Callable[[Tensor], Tensor] | None] = {}
        self._stacks: dict[type | None, Stack | None] = {}
        self._chosen: tuple[RowNames | None, Callable[..., Any]] = (None, self._alone)
        held = socket.base._parameters.get("weight")
        # A trained head's parameter may be an fp32 master; the layer itself keeps the type of the original.
        original = next((v[None] for short, v in values.items() if short == "weight"), held)
        self.dtype = None if original is None else original.dtype

    def refresh(self) -> None:
        """The socket's plan for the active tunings has changed."""
        self.still = _still(self.socket.live)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rows = self.serving.rows
        if rows is None:
            if (self.still is not None or self.siblings is not None) and not kwargs and self._may(args[0]):
                x = args[0]
                if self.siblings is not None and x.numel() <= FEW * x.shape[-1]:
                    group, number = self.siblings
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
        used = [p for p in self.socket.plugs if p.tuning in rows.names]
        if not used and not self.values:
            return self._frozen
        if used and used[0].site.kind.endswith("_out"):
            return self._sublayer
        stack = self._stack(used)
        return self._in_groups if stack is None else partial(self._together, stack)

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
            instead = [Substitute(name or "", short, _Value(value), value.dtype) for short, value in own]
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
            return x.reshape(n, -1, x.shape[-1])  # some models flatten batch and tokens
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
                self._stacks[None] = [(None, *_heads(self.socket.base, self.values, self.dtype))]
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
        for plug in self.socket.plugs:
            if plug.tuning in self.serving.free:
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
        for part, held in by_part.items():
            if part is not None and any(p.changes_input for p in held):
                return None
            together = cls.together([p.attachment for p in held], dtype)
            if together is None:
                return None
            found.append((part, together, {p.tuning: i for i, p in enumerate(held)}))
        return found

    def _together(self, stack: Stack, rows: RowNames, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x: Tensor = args[0]
        by_row = self._by_row(rows, x)
        return self._all_rows(rows, stack, x, by_row) if self._may(x) else self._in_groups(rows, args, kwargs)

    def _all_rows(self, rows: RowNames, stacked: Stack, x: Tensor, by_row: Tensor) -> Tensor:
        indices = [rows.index(numbers, len(numbers), x.device) for _, _, numbers in stacked]
        if stacked[0][0] is None:
            ((_, together, _),) = stacked
            if isinstance(together, _Heads):
                y = together.linear(by_row, indices[0])
            else:
                seen = together.before(by_row, indices[0])
                read = x if seen is by_row else seen.reshape(x.shape)
                y = self.socket.frozen(read)
                y = together.after(by_row, y.view(*by_row.shape[:2], y.shape[-1]), indices[0])
            return y.reshape(*x.shape[:-1], y.shape[-1])
        y = self.socket.frozen(x)
        changed = []
        for (part, together, _), index in zip(stacked, indices, strict=True):
            assert part is not None
            own = take_rows(y, part)
            new = together.after(by_row, own.reshape(*by_row.shape[:2], -1).clone(), index)
            changed.append((part, new.reshape(own.shape)))
        return join_rows(y, changed)

    def _in_groups(self, rows: RowNames, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        x: Tensor = args[0]
        by_row, flat = self._by_row(rows, x), x.dim() == 2
        out: Tensor | None = None
        for name, picked in rows.groups(x.device):
            part = by_row.index_select(0, picked)
            given = part.reshape(-1, part.shape[-1]) if flat else part.view(len(picked), *x.shape[1:])
            with _only(self.context, picked, len(rows)):
                y = self.socket.run(self._plan(name), (given,), {})
            y = y.reshape(len(picked), -1, y.shape[-1])
            if out is None:
                out = y.new_empty(len(rows), *y.shape[1:])
            out.index_copy_(0, picked, y)
        assert out is not None
        return out.reshape(*x.shape[:-1], out.shape[-1])

    def _sublayer(self, rows: RowNames, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The sublayer once for the batch, then what each tuning adds to its rows."""
        out = self.socket.run(self._plan(None), args, kwargs)  # first: the start of the sublayer may lie inside
        taps = {id(p.tap): p.tap for p in self.socket.plugs if p.tap is not None}
        seen = {number: tap.take() for number, tap in taps.items()}
        y = out[0] if isinstance(out, tuple) else out
        own = args[0] if args else kwargs.get("hidden_states")
        by_row = self._by_row(rows, y)
        result = torch.empty_like(by_row)
        for name, picked in rows.groups(y.device):
            part = by_row.index_select(0, picked)
            shape = (-1, y.shape[-1]) if y.dim() == 2 else (len(picked), *y.shape[1:])
            part = part.reshape(shape)
            with _only(self.context, picked, len(rows)):
                for plug in self._plan(name).whole:
                    x = seen[id(plug.tap)] if plug.tap is not None else own
                    if x is not None:
                        mine = self._by_row(rows, x).index_select(0, picked)
                        x = mine.reshape(-1, x.shape[-1]) if x.dim() == 2 else mine.view(len(picked), *x.shape[1:])
                    part = plug.after(x, part)
            result.index_copy_(0, picked, part.reshape(len(picked), -1, y.shape[-1]))
        y = result.view(y.shape)
        return (y, *out[1:]) if isinstance(out, tuple) else y


def _still(plan: Plan) -> Callable[[Tensor], Tensor] | None:
    """Layer and attachment as one function, where exactly one attachment sits and it offers that."""
    only = plan.single
    if only is None or only.site.rows is not None or only.site.expert is not None:
        return None
    return only.attachment.still(only.base)


@contextmanager
def _only(context: Context, picked: Tensor, batch: int) -> Iterator[None]:
    """The facts of the batch cut down to some of its rows."""
    mask, decoder_mask, n = context.mask, context.decoder_mask, context.batch
    try:
        context.batch = len(picked)
        if mask is not None and len(mask) == batch:
            context.mask = mask.index_select(0, picked)
        if decoder_mask is not None and len(decoder_mask) == batch:
            context.decoder_mask = decoder_mask.index_select(0, picked)
        yield
    finally:
        context.mask, context.decoder_mask, context.batch = mask, decoder_mask, n


class _Value(nn.Module):
    """Stands for a tensor of the model with one tuning's value."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.__dict__["value"] = value

    def forward(self, frozen: Tensor) -> Tensor:
        value: Tensor = self.__dict__["value"]
        return value


class _Heads:
    """A linear layer that the tunings have trained whole, each its own: picked by row."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias  # (tunings + 1, d_out, d_in), (tunings + 1, 1, d_out)

    def before(self, x: Tensor, index: Tensor) -> Tensor:
        return x

    def after(self, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        return self.linear(x, index)

    def linear(self, x: Tensor, index: Tensor) -> Tensor:
        """x: (rows, n, d_in) -> (rows, n, d_out)."""
        weight = self.weight.index_select(0, index).transpose(1, 2)
        if self.bias is None:
            return torch.bmm(x, weight)
        return torch.baddbmm(self.bias.index_select(0, index), x, weight)


def _heads(
    base: nn.Module, values: dict[str, dict[str | None, Tensor]], dtype: torch.dtype
) -> tuple[_Heads, dict[str, int]]:
    names = [n for n in dict.fromkeys(n for v in values.values() for n in v) if n is not None]  # the base comes last

    def stacked(short: str) -> Tensor | None:
        held = getattr(base, short)
        if held is None:
            return None
        own: dict[str | None, Tensor] = values.get(short, {None: held.detach()})
        return torch.stack([own.get(n, own[None]) for n in (*names, None)]).detach().to(dtype)

    weight, bias = stacked("weight"), stacked("bias")
    assert weight is not None
    return _Heads(weight, None if bias is None else bias[:, None]), {n: i for i, n in enumerate(names)}
