"""What the low-rank methods share: the update itself, where it may sit, when it may be fused, how dropout is keyed."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from luthier import kernels
from luthier.anatomy import Anatomy, Site
from luthier.core import AnatomyError, ConfigError
from luthier.kernels import GroupedUpdates, StillUpdate, Update, low_rank_linear
from luthier.surgery import Attachment, Base

__all__ = [
    "MovedUpdate",
    "SmallDropout",
    "Thin",
    "ThinUpdate",
    "check_projections",
    "check_rows",
    "fusable",
    "live_bias",
]


def check_projections(anatomy: Anatomy, sites: tuple[Site, ...], asked_by: str, dropout: float) -> tuple[Site, ...]:
    """Hand `sites` back if a change of their weight is possible at all of them.

    Raises:
        AnatomyError: a site has no weight of its own.
        ConfigError: dropout at an expert, whose weight is changed before it meets its input.
    """
    for site in sites:
        if site.kind in ("embed", "norm") or site.kind.endswith("_out"):
            there = [k for k in anatomy.kinds() if k not in ("embed", "norm") and not k.endswith("_out")]
            raise AnatomyError(
                f"{asked_by}: {site.key} is no projection, so it has no weight to change. Use {', '.join(there)}."
            )
        if dropout > 0 and site.expert is not None:
            raise ConfigError(f"{asked_by}.dropout: {dropout:g} has no meaning at {site.key}; set it to 0 for experts.")
    return sites


def check_rows(anatomy: Anatomy, sites: tuple[Site, ...], asked_by: str, dropout: float) -> tuple[Site, ...]:
    """`check_projections`, of an update that differs from row to row.

    Raises:
        AnatomyError: a layer that does not know whose tokens it is given: an expert, or one that also reads distances.
    """
    for site in check_projections(anatomy, sites, asked_by, dropout):
        if site.expert is not None:
            raise AnatomyError(
                f"{asked_by}: {site.key} is an expert, which is given tokens without their rows. Leave it out."
            )
        if anatomy.model_type == "deberta-v2" and site.kind in ("attn.q", "attn.k"):
            raise AnatomyError(
                f"{asked_by}: {site.key} of a deberta-v2 model also projects the distances between tokens, which "
                "belong to no row and so to no task. Leave attn.q and attn.k out: sites=attn.v."
            )
    return sites


def fusable(base: Base) -> bool:
    """Whether the fused functions may stand for this layer: a plain float projection of which nothing trains."""
    if base.site.rows is not None or base.site.expert is not None or base.site.kind.endswith("_out"):
        return False
    # A bias that another method trains would lose its gradient: the fused functions hold the layer constant.
    if not base.readable:
        return False
    # Without a graph there is none to lose: a loaded tuning computes the very bits that the trained one did.
    return not (torch.is_grad_enabled() and any(p.requires_grad for p in base.module.parameters()))


def live_bias(base: Base) -> Tensor | None:
    """The bias as the layer uses it, with its gradient where another method trains it. (d_out,) or None."""
    held = base.whole_bias()
    return None if held is None else base.part(held, bias=True)


class SmallDropout:
    """Inverted dropout of a branch's input. One number of the ambient generator names the mask of a call, so that
    activation checkpointing, which restores that generator, replays it.
    """

    def __init__(self, p: float) -> None:
        self.p = p

    def seed(self, training: bool) -> int | None:
        """The seed of this call's mask; None where nothing is dropped."""
        return int(torch.randint(1 << 62, ())) if training and self.p > 0 else None

    def __call__(self, x: Tensor, training: bool) -> Tensor:
        seed = self.seed(training)
        return x if seed is None else kernels.dropout(x, self.p, seed)


class Thin(Attachment):
    """Adds `scale * B A x` to the output, whatever A and B are made of: `thin()` says it, and all else follows."""

    kind = "delta"

    def __init__(self, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.scale = scale
        self.dropout = SmallDropout(dropout)

    def thin(self) -> tuple[Tensor, Tensor]:
        """A: (rank, d_in) and B: (d_out, rank), with the graph of what they are made of."""
        raise NotImplementedError

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = self.thin()
        return y + (self.dropout(x, self.training) @ a.T @ b.T) * self.scale

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        a, b = self.thin()
        return weight + b @ a * self.scale, bias

    def fused(self, base: Base, x: Tensor) -> Tensor | None:
        if not fusable(base):
            return None
        seed = self.dropout.seed(self.training)
        p = 0.0 if seed is None else self.dropout.p
        a, b = self.thin()
        return low_rank_linear(x, base.frozen(), base.bias(), a, b, self.scale, p, seed)

    def still(self, base: Base) -> Callable[[Tensor], Tensor] | None:
        return StillUpdate(base.frozen(), base.bias(), self._update()) if fusable(base) else None

    @classmethod
    def together(cls, members: Sequence[Attachment], dtype: torch.dtype) -> GroupedUpdates | None:
        return GroupedUpdates([m._update() for m in members if isinstance(m, Thin)], dtype)

    def _update(self) -> Update:
        a, b = self.thin()
        return Update(a.detach(), b.detach(), self.scale)


class ThinUpdate(Thin):
    """Adds `scale * B A x` to the output; A and B are what trains."""

    def __init__(
        self, d_in: int, d_out: int, rank: int, scale: float, dropout: float = 0.0, *, train_a: bool = True,
        train_b: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(scale, dropout)
        self.a = nn.Parameter(torch.empty(rank, d_in), requires_grad=train_a)
        self.b = nn.Parameter(torch.zeros(d_out, rank), requires_grad=train_b)
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def thin(self) -> tuple[Tensor, Tensor]:
        return self.a, self.b


class MovedUpdate(ThinUpdate):
    """Adds `scale * (B A - B0 A0) x`: A and B start at A0 and B0, and what they have moved is the update.

    The frozen weight stays what it is, where the papers of such starts take B0 A0 out of it.
    """

    a0: Tensor
    b0: Tensor

    def __init__(
        self, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0, *, train_a: bool = True, train_b: bool = True
    ) -> None:
        super().__init__(a.shape[1], len(b), len(a), scale, dropout, train_a=train_a, train_b=train_b)
        for name, value in (("a", a), ("b", b)):
            self.get_parameter(name).data = value.clone()
            self.register_buffer(f"{name}0", value.clone())

    def thin(self) -> tuple[Tensor, Tensor]:
        # B A - B0 A0 as sums of differences: exactly zero at the start, and nothing large cancels in half precision.
        return torch.cat([self.a, self.a - self.a0]), torch.cat([self.b - self.b0, self.b0], 1)
