"""Answering with numbers that do not change: copies made once, and a tuning of its own for every row of a batch.

Inside a serving block every socket takes its `Route`, which knows faster ways than the usual one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from luthier.core import CompositionError, ConfigError
from luthier.surgery import compose
from luthier.surgery.edited_model import EditedModel
from luthier.surgery.fused_qkv import BUDGET_BYTES, FusedQKV, qkv_paths
from luthier.surgery.method import Mixing
from luthier.surgery.route import Route, RowState
from luthier.surgery.row_names import RowNames, row_problem

__all__ = ["Serving"]


class Serving:
    """Opens and closes the blocks in which a model only answers."""

    def __init__(self, edited: EditedModel) -> None:
        self.edited = edited
        self._routes: Routes | None = None  # not None inside a block
        edited.followers.append(self.refresh)

    @property
    def rows(self) -> RowNames | None:
        """Which tuning acts in which row, where the rows of a batch differ."""
        return None if self._routes is None else self._routes.state.rows

    def refuse(self, doing: str) -> None:
        """Raises: ConfigError, inside a block."""
        if self._routes is not None:
            raise ConfigError(f"{doing}: not inside serving() or rows(), which read all numbers once. Leave the block.")

    @contextmanager
    def block(self) -> Iterator[Any]:
        """Inside, numbers are read once. See `Tuned.serving`."""
        self._refuse_training("serving()")
        if self._routes is not None:
            yield self.edited.model
            return
        with torch.no_grad():
            self._routes = Routes(self.edited)
            self._routes.install()
            try:
                yield self.edited.model
            finally:
                self._routes.remove()
                self._routes = None

    @contextmanager
    def by_row(self, names: Sequence[str | None]) -> Iterator[Any]:
        """Inside, every row of a batch has its own tuning. See `Tuned.rows`."""
        self._refuse_training("rows()")
        self.edited.refuse_folded("rows()")
        with self.block():
            routes = self._routes
            assert routes is not None
            if routes.state.rows is not None:
                raise ConfigError("rows: already inside such a block. Leave it before naming other rows.")
            rows = routes.name_rows(names)
            active = [t.tuning_name for t in self.edited.active()]
            # What acts outside of the sockets acts on every row: only one that has all rows may be active.
            wanted = [rows.only] if rows.only is not None and routes.problems[rows.only] else []
            unwanted = [n for n in active if routes.problems[n] and n not in wanted]
            if unwanted or wanted:
                self.edited.set_active(wanted)
            routes.state.rows = None if wanted else rows
            try:
                yield self.edited.model
            finally:
                routes.state.rows = None
                if unwanted or wanted:
                    self.edited.set_active(active)

    def before_pass(self, inputs: dict[str, Any]) -> None:
        """Compare a batch with the rows that are named, before the model computes anything.

        Raises:
            ConfigError: the model is in training mode, a gradient is wanted, or the batch has another number of rows.
        """
        if self._routes is None:
            return
        self._refuse_training("a pass inside serving() or rows()")
        if self.rows is not None:
            if torch.is_grad_enabled():
                raise ConfigError("rows: different tunings in one batch give no gradient. Leave enable_grad() out.")
            context = self.edited.context
            first = next((v for v in inputs.values() if isinstance(v, Tensor) and v.dim() > 0), None)
            self.rows.match(context.batch or (0 if first is None else len(first)), context.generating)

    def before_generation(self, n_rows: int) -> None:
        """Compare the rows of a prompt with those that are named."""
        if self.rows is not None:
            self.rows.match(n_rows, False)

    def refresh(self) -> None:
        """Other tunings act now."""
        if self._routes is not None:
            self._routes.refresh()

    def _refuse_training(self, doing: str) -> None:
        if self.edited.model.training:
            raise ConfigError(f"{doing}: the model is in training mode, and this is for answering. Call model.eval().")


class Routes:
    """All sockets' routes, for as long as no number changes."""

    def __init__(self, edited: EditedModel) -> None:
        self.edited = edited
        self.problems = {name: row_problem(edited, tuning) for name, tuning in edited.tunings.items()}
        self.state = RowState(edited.context, [name for name, problem in self.problems.items() if problem is None])
        self.values = self._head_values()
        self.qkv = self._find_qkv()
        places = {id(s): (group, i) for group in self.qkv for i, s in enumerate(group.sockets)}
        self.routes = [
            Route(self.state, s, self.values.get(id(s), {}), places.get(id(s)))
            for s in edited.sockets()
            if s.plugs or id(s) in self.values or id(s) in places
        ]

    def _find_qkv(self) -> list[FusedQKV]:
        """Projections that read the same tensor, as far as copies of them are cheap."""
        edited, budget, found = self.edited, BUDGET_BYTES, []
        for paths in qkv_paths(edited.anatomy):
            # Sockets also where nothing sits: an answer must not depend on what else is on the model.
            group = FusedQKV([edited.socket(path) for path in paths])
            if group.n_bytes > budget:
                break
            budget -= group.n_bytes
            found.append(group)
        return found

    def _head_values(self) -> dict[int, dict[str, dict[str | None, Tensor]]]:
        """Socket -> tensor of its layer -> its value with each tuning; under None the base's."""
        edited = self.edited
        found: dict[int, dict[str, dict[str | None, Tensor]]] = {}
        for name in self.state.free:
            for unfrozen in edited.tunings[name].unfrozen.values():
                for path, short in edited.owners(unfrozen.name):
                    values = found.setdefault(id(edited.socket(path)), {}).setdefault(short, {None: unfrozen.original})
                    values[name] = unfrozen.value.to(unfrozen.original.dtype)
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
            tuning = self.edited.tuning(name)
            problem = self.problems[name]
            if problem is not None and any(n != name for n in names):
                raise CompositionError(
                    f"rows: {name!r} is {compose.spell(tuning.method)}, which {problem}. Run its rows in a batch of "
                    f"their own, after tuned.activate({name!r})."
                )
        mixing = {n: any(isinstance(p, Mixing) for p in self.edited.tunings[n].method.parts()) for n in names if n}
        if any(mixing.values()) and not (all(mixing.values()) and None not in names):
            name = next(n for n, mixes in mixing.items() if mixes)
            raise CompositionError(
                f"rows: {name!r} is {compose.spell(self.edited.tuning(name).method)}, which mixes the answers of "
                "several passes, and not every row's tuning does. Run its rows in a batch of their own."
            )
        return RowNames(names)

    def install(self) -> None:
        """Every socket takes its route."""
        for route in self.routes:
            route.refresh()
            route.socket.route = route

    def refresh(self) -> None:
        """Other tunings act now."""
        for route in self.routes:
            route.refresh()
        for group in self.qkv:
            group.refresh()

    def remove(self) -> None:
        """Every socket does again what it did."""
        for route in self.routes:
            route.socket.route = None
