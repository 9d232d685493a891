"""An update in the shape of a singular value decomposition, whose triplets join and leave."""

import torch
from torch import Tensor, nn

from luthier.surgery import Attachment

__all__ = ["TripletUpdate"]


class TripletUpdate(Attachment):
    """Adds `scale * P diag(l) Q x` to the output.

    p: (d_out, most)    l: (most,)    q: (most, d_in)
    """

    kind = "delta"

    def __init__(self, d_in: int, d_out: int, most: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.p = nn.Parameter(torch.randn(d_out, most) * 0.02)
        self.l = nn.Parameter(torch.zeros(most))
        self.q = nn.Parameter(torch.randn(most, d_in) * 0.02)

    def forget(self) -> None:
        """All triplets that are here count, and nothing else is known of them."""
        raise NotImplementedError

    def acts(self) -> Tensor:
        """Which triplets are stored. (most,) bool"""
        raise NotImplementedError

    def learns(self) -> Tensor:
        """Which triplets are held to be orthonormal. (most,) bool"""
        return torch.ones_like(self.l, dtype=torch.bool)

    def middle(self) -> Tensor:
        """What stands between P and Q. (most,)"""
        return self.l * self.scale

    def branch(self, x: Tensor) -> Tensor:
        """What is added for x: (..., d_in) -> (..., d_out)."""
        return ((x @ self.q.T) * self.middle()) @ self.p.T

    def update(self) -> Tensor:
        """What is added to the weight: (d_out, d_in)."""
        return (self.p * self.middle()) @ self.q

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.branch(x)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.update(), bias

    def gaps(self) -> tuple[Tensor, Tensor]:
        """How far the columns of P and the rows of Q are from orthonormal: two (most, most)."""
        part = self.learns().to(self.p.dtype)
        both, one = part[:, None] * part, torch.diag(part)
        return (self.p.T @ self.p) * both - one, (self.q @ self.q.T) * both - one

    def stored(self) -> dict[str, Tensor]:
        """The triplets that act."""
        keep = self.acts()
        return {"p": self.p.detach()[:, keep], "l": self.l.detach()[keep], "q": self.q.detach()[keep]}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take these triplets in place of all that are here."""
        device, trains = self.l.device, self.l.requires_grad
        if set(tensors) != {"p", "l", "q"}:
            raise KeyError(f"a triplet site stores p, l and q, the file has {', '.join(sorted(tensors)) or 'none'}")
        for name in ("p", "l", "q"):
            value = tensors[name].to(device, self.l.dtype).contiguous().clone()
            setattr(self, name, nn.Parameter(value, requires_grad=trains))
        self.forget()
