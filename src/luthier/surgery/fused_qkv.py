"""Queries, keys and values of one self-attention together, where few tokens make a product cost its call.

They read the same tensor, one after the other. Whoever is asked first computes for all, and the others find theirs:

    q(x)   computes q, k and v of x, keeps k and v
    k(x)   the same x: takes k
    v(x)   the same x: takes v, and nothing is kept any more

The first answer of each is compared with the usual way. A model whose projections turn out not to read the same tensor
is computed the usual way from then on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from luthier import kernels
from luthier.anatomy import Anatomy
from luthier.surgery.socket import Socket

__all__ = ["BUDGET_BYTES", "FEW", "FusedQKV", "qkv_paths"]

FEW = 64
"""Rows up to which one product for all is faster; beyond, copying the parts out costs as much as it gains."""

BUDGET_BYTES = 64 << 20
"""What the copies of all attentions may take."""

_KINDS = ("attn.q", "attn.k", "attn.v")


def qkv_paths(anatomy: Anatomy) -> Iterator[tuple[str, ...]]:
    """Paths of the query, key and value projections of each self-attention that has all three as layers."""
    found: dict[tuple[str, int | None], dict[str, str]] = {}
    for site in anatomy.all_sites:
        if site.kind in _KINDS and site.rows is None and site.expert is None and not site.transposed:
            found.setdefault((site.stack, site.layer), {})[site.kind] = site.path
    for paths in found.values():
        if len(set(paths.values())) == len(_KINDS):
            yield tuple(paths[kind] for kind in _KINDS)


class FusedQKV:
    """Projections of one attention, while no number changes."""

    def __init__(self, sockets: Sequence[Socket]) -> None:
        self.sockets = sockets
        self.refresh()

    @property
    def n_bytes(self) -> int:
        """What a copy of the layers takes."""
        return sum(p.nbytes for socket in self.sockets for p in socket.base.parameters())

    def refresh(self) -> None:
        """Other tunings act now."""
        self._joined: kernels.StillSiblings | None = None
        self._waiting: tuple[Tensor, list[Tensor | None]] | None = None
        self._tried: set[int] = set()
        self._apart = False

    def give(self, number: int, x: Tensor) -> Tensor | None:
        """What the projection `number` computes from x (..., d_in); None where it has to be computed by itself."""
        if self._apart:
            return None
        if self._waiting is None:
            self._joined = self._joined or self._join()
            if self._joined is None:
                self._apart = True
                return None
            self._waiting = (x, [*self._joined(x)])
        seen, parts = self._waiting
        mine = parts[number]
        # Another tensor, or one asked for twice before all is taken; or the same one, written to in between.
        if seen is not x or mine is None or not self._try(number, x, mine):
            self._apart, self._waiting = True, None
            return None
        parts[number] = None
        if all(part is None for part in parts):
            self._waiting = None
        return mine

    def take(self, number: int, x: Tensor) -> Tensor | None:
        """What waits for the projection `number`, computed from this very x; None where nothing does."""
        if self._waiting is None or self._waiting[0] is not x or number not in self._tried:
            return None
        parts = self._waiting[1]
        mine, parts[number] = parts[number], None
        if all(part is None for part in parts):
            self._waiting = None
        return mine

    def _try(self, number: int, x: Tensor, found: Tensor) -> bool:
        """Compare with the usual way, once for each projection."""
        if number not in self._tried:
            socket = self.sockets[number]
            expected = socket.run(socket.live, (x,), {}).double()
            near = 3e-2 if x.dtype in (torch.bfloat16, torch.float16) else 1e-4
            if not (found.double() - expected).norm() <= near * expected.norm():
                return False
            self._tried.add(number)
        return True

    def _join(self) -> kernels.StillSiblings | None:
        layers = []
        for socket in self.sockets:
            update, layer = _update(socket), socket.base
            if update is None or type(layer) is not nn.Linear:
                return None
            layers.append((layer.weight, layer.bias, update[0]))
        tensors = [tensor for weight, bias, _ in layers for tensor in (weight, bias) if tensor is not None]
        kinds = {(tensor.dtype, tensor.device) for tensor in tensors}
        widths = {weight.shape[1] for weight, _, _ in layers}
        return kernels.StillSiblings(layers) if len(kinds) == len(widths) == 1 else None


def _update(socket: Socket) -> tuple[kernels.Update | None] | None:
    """The low-rank update that acts at a layer, or that none does; None where anything else acts."""
    if socket.live.empty:
        return (None,)
    still = socket.route.still if socket.route is not None else None
    return (still.update,) if isinstance(still, kernels.StillUpdate) else None
