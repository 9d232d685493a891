"""AdamW over everything that trains: groups from the methods, one clip, state by canonical name."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from luthier import kernels
from luthier.core import IntegrityError
from luthier.surgery import Group
from luthier.training.spec import OptimSpec

__all__ = ["Optimiser"]


class Optimiser:
    """AdamW with decoupled decay; each tensor may have its own rate, decay and resting value.

    A tensor whose gradient is None stays where it is: no momentum, no decay (an expert that was not drawn).
    """

    def __init__(self, named: dict[str, nn.Parameter], groups: Iterable[Group], spec: OptimSpec, lr: float) -> None:
        self.named, self.spec, self.lr = named, spec, lr
        self.updates = 0
        self._groups: dict[str, Group] = {name: group for group in groups for name in group.names}
        # Made up front: memory runs out here, before step 1, or not at all.
        self.first = {n: torch.zeros_like(p, dtype=_wide(p)) for n, p in named.items()}
        self.second = {n: torch.zeros_like(p, dtype=_wide(p)) for n, p in named.items()}
        self.counts = dict.fromkeys(named, 0)

    def norm(self) -> float:
        """The norm of the whole gradient; NaN or infinity where it holds one."""
        grads = [p.grad for p in self.named.values() if p.grad is not None]
        if not grads:
            return 0.0
        return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))))

    def clip(self, norm: float) -> None:
        """Scale the gradient down to the spec's largest norm."""
        if self.spec.clip > 0 and norm > self.spec.clip:
            grads = [p.grad for p in self.named.values() if p.grad is not None]
            torch._foreach_mul_(grads, self.spec.clip / norm)

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update at `factor` of the peak rate."""
        beta1, beta2 = self.spec.betas
        by_count: dict[tuple[int, float, float, float], list[str]] = {}
        for name, parameter in self.named.items():
            if parameter.grad is None:
                continue
            group = self._groups.get(name)
            rate = self.lr * factor * (group.lr_factor if group else 1.0)
            decay = self.spec.weight_decay if group is None or group.weight_decay is None else group.weight_decay
            rest = group.decay_to if group else 0.0
            by_count.setdefault((self.counts[name], rate, decay, rest), []).append(name)
        for (count, rate, decay, rest), names in by_count.items():
            self._update(names, count + 1, rate, decay, rest, beta1, beta2)
        self.updates += 1

    def _update(
        self, names: list[str], count: int, rate: float, decay: float, rest: float, beta1: float, beta2: float
    ) -> None:
        # Not `.data`: whoever keeps something computed from a parameter looks at its version, which must rise.
        values: list[Tensor] = [self.named[n] for n in names]
        grads = [g.to(_wide(v)) for n, v in zip(names, values, strict=True) if (g := self.named[n].grad) is not None]
        first, second = [self.first[n] for n in names], [self.second[n] for n in names]
        kernels.adamw(
            values, grads, first, second,
            count=count, lr=rate, betas=(beta1, beta2), eps=self.spec.eps, decay=decay, rest=rest,
        )  # fmt: skip
        for name in names:
            self.counts[name] = count

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.named.values():
            parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """Moments and counts, by canonical name."""
        state = {f"{n}|first": t for n, t in self.first.items()} | {f"{n}|second": t for n, t in self.second.items()}
        state["counts"] = torch.tensor(list(self.counts.values()), dtype=torch.int64)
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        """The inverse of `tensors`.

        Raises:
            IntegrityError: the state is of other tensors.
        """
        expected = set(self.tensors())
        if set(state) != expected:
            odd = sorted(set(state) ^ expected)[:3]
            raise IntegrityError(f"the optimiser's state does not fit the tensors that train: {', '.join(odd)}.")
        for name in self.named:
            self.first[name].copy_(state[f"{name}|first"])
            self.second[name].copy_(state[f"{name}|second"])
        self.counts = dict(zip(self.named, (int(c) for c in state["counts"]), strict=True))


def _wide(parameter: Tensor) -> torch.dtype:
    """At least fp32."""
    return torch.promote_types(parameter.dtype, torch.float32)
