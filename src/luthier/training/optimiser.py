"""What moves the trained numbers: AdamW, plain gradient descent, and descent inside the backward pass (LOMO).

All three: groups from the methods, one clip of the whole gradient's norm, state by canonical name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from luthier import kernels
from luthier.core import ConfigError, IntegrityError
from luthier.runs.spec import OptimSpec
from luthier.surgery import Group, is_head
from luthier.training.decay import undecayed

__all__ = ["Descent", "Lomo", "NotFinite", "Optimiser", "optimiser_of"]


class NotFinite(ArithmeticError):
    """A gradient that is not finite, met inside a backward pass that has moved other tensors already."""


class Optimiser:
    """AdamW with decoupled decay; each tensor may have its own rate, decay and resting value.

    A tensor whose gradient is None stays where it is: no momentum, no decay (an expert that was not drawn).
    """

    keeps_moments: ClassVar[bool] = True
    must_move: ClassVar[bool] = True  # in the first steps, or nothing trains
    whole_gradient: ClassVar[bool] = True  # after the passes of a step all tensors hold theirs

    def __init__(self, named: dict[str, nn.Parameter], groups: Iterable[Group], spec: OptimSpec, lr: float) -> None:
        self.named, self.spec, self.lr = named, spec, lr
        self.updates = 0
        self.joined: set[str] = set()
        self._groups = _by_name(groups)
        unknown = [name for name in self._groups if name not in named]
        if unknown:  # else the group would be without effect, and nobody told
            raise ConfigError(
                f"a group of the optimiser names {unknown[0]!r}, which does not train. Methods name tensors as "
                "`tuned.trained()` does: use group_names of luthier.methods.parts.own_tensors."
            )
        # Made up front: memory runs out here, before step 1, or not at all.
        kept = named if self.keeps_moments else {}
        self.first = {n: torch.zeros_like(p, dtype=_wide(p)) for n, p in kept.items()}
        self.second = {n: torch.zeros_like(p, dtype=_wide(p)) for n, p in kept.items()}
        self.counts = dict.fromkeys(named, 0)

    def join(self, name: str, parameter: nn.Parameter) -> None:
        """Move one number more, which is no part of the tuning: a strategy's own. It does not decay."""
        self.named[name] = parameter
        self.joined.add(name)
        self._groups[name] = Group((name,), weight_decay=0.0)
        if self.keeps_moments:
            self.first[name] = torch.zeros_like(parameter, dtype=_wide(parameter))
            self.second[name] = torch.zeros_like(parameter, dtype=_wide(parameter))
        self.counts[name] = 0

    def norm(self) -> float:
        """The norm of the whole gradient; NaN or infinity where it holds one."""
        grads = [p.grad for p in self.named.values() if p.grad is not None]
        return _norm_of(torch._foreach_norm(grads)) if grads else 0.0

    def decayed(self) -> tuple[int, int]:
        """Trained numbers that decay, and those that do not."""
        sizes = [(self._pace(name, 1.0)[1] > 0, parameter.numel()) for name, parameter in self.named.items()]
        return sum(n for decays, n in sizes if decays), sum(n for decays, n in sizes if not decays)

    def rate_of(self, name: str, factor: float) -> float:
        """The rate of one tensor at `factor` of the peak rate."""
        return self._pace(name, factor)[0]

    def forget(self, names: Iterable[str]) -> None:
        """Drop the moments of some tensors, and their memory; they begin anew with their next gradient."""
        for name in names:
            self.first.pop(name, None)
            self.second.pop(name, None)
            self.counts[name] = 0

    def has_gradient(self, parameter: Tensor) -> bool:
        """Whether the last backward pass gave this tensor a gradient that is not all zeros."""
        return parameter.grad is not None and bool(parameter.grad.any())

    def gradient_bytes(self) -> int:
        """The most that gradients have held at once: after a backward pass, all of them."""
        return sum(p.grad.nbytes for p in self.named.values() if p.grad is not None)

    def state_bytes(self) -> int:
        """What the moments hold."""
        return sum(t.nbytes for table in (self.first, self.second) for t in table.values())

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
            if parameter.grad is not None:
                by_count.setdefault((self.counts[name], *self._pace(name, factor)), []).append(name)
        for (count, rate, decay, rest), names in by_count.items():
            self._update(names, count + 1, rate, decay, rest, beta1, beta2)
        self.updates += 1

    def _pace(self, name: str, factor: float) -> tuple[float, float, float]:
        """Rate, decay and resting value of one tensor."""
        group = self._groups.get(name)
        rate = self.lr * factor * (group.lr_factor if group else 1.0)
        decay = self.spec.weight_decay if group is None or group.weight_decay is None else group.weight_decay
        return rate, decay, group.decay_to if group else 0.0

    def _update(
        self, names: list[str], count: int, rate: float, decay: float, rest: float, beta1: float, beta2: float
    ) -> None:
        # Not `.data`: whoever keeps something computed from a parameter looks at its version, which must rise.
        values, grads = self._values(names)
        for name in names:
            if name not in self.first:  # forgotten since
                self.first[name] = torch.zeros_like(self.named[name], dtype=_wide(self.named[name]))
                self.second[name] = torch.zeros_like(self.named[name], dtype=_wide(self.named[name]))
        first, second = [self.first[n] for n in names], [self.second[n] for n in names]
        kernels.adamw(
            values, grads, first, second,
            count=count, lr=rate, betas=(beta1, beta2), eps=self.spec.eps, decay=decay, rest=rest,
        )  # fmt: skip
        self.counts.update(dict.fromkeys(names, count))

    def _values(self, names: list[str]) -> tuple[list[Tensor], list[Tensor]]:
        values: list[Tensor] = [self.named[n] for n in names]
        grads = [g.to(_wide(v)) for n, v in zip(names, values, strict=True) if (g := self.named[n].grad) is not None]
        return values, grads

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.named.values():
            parameter.grad = None

    @torch.no_grad()
    def begin_anew(self) -> None:
        """Forget the moments and start counting again: what follows is trained from here."""
        for moment in (*self.first.values(), *self.second.values()):
            moment.zero_()
        self.counts = dict.fromkeys(self.named, 0)

    def let_go(self) -> None:
        """Forget gradients and moments: no step will follow, and the memory is wanted."""
        self.zero_grad()
        self.first, self.second = {}, {}

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
        counts = state.get("counts")
        if counts is not None and len(counts) == len(self.named):
            # What was forgotten has no moments, and no steps.
            self.forget(n for n, c in zip(self.named, counts, strict=True) if not c and f"{n}|first" not in state)
        expected = set(self.tensors())
        if set(state) != expected:
            odd = sorted(set(state) ^ expected)[:3]
            raise IntegrityError(f"the optimiser's state does not fit the tensors that train: {', '.join(odd)}.")
        for name in self.first:
            self.first[name].copy_(state[f"{name}|first"])
            self.second[name].copy_(state[f"{name}|second"])
        self.counts = dict(zip(self.named, (int(c) for c in state["counts"]), strict=True))


class Descent(Optimiser):
    """Plain gradient descent: no momentum, no state but counts.

    p <- p - rate · (g + decay · (p - rest))
    """

    keeps_moments = False

    def _update(
        self, names: list[str], count: int, rate: float, decay: float, rest: float, beta1: float, beta2: float
    ) -> None:
        values, grads = self._values(names)
        if decay:
            torch._foreach_mul_(values, 1 - rate * decay)
            if rest:
                torch._foreach_add_(values, rate * decay * rest)
        torch._foreach_add_(values, grads, alpha=-rate)
        self.counts.update(dict.fromkeys(names, count))


class Lomo(Descent):
    """The same descent, made inside the backward pass: each gradient is used as soon as it is whole, and dropped.

    At no time does more than one trained tensor hold a gradient. A gradient is whole once per backward pass, so a step
    is one backward pass: one micro-batch, no penalty beside the loss, nothing that wants to see all gradients.

    A norm to clip to is known only when all gradients have been seen. So with clipping there are two passes over the
    same rows with the same dropout: `measuring` collects the norm and moves nothing, `applying` updates.

    Lv et al. 2023, "Full Parameter Fine-tuning for Large Language Models with Limited Resources", arXiv:2306.09782,
    section 3.
    """

    whole_gradient = False

    def __init__(self, named: dict[str, nn.Parameter], groups: Iterable[Group], spec: OptimSpec, lr: float) -> None:
        super().__init__(named, groups, spec, lr)
        self._norms: dict[str, Tensor] = {}
        self._names = {id(p): n for n, p in named.items()}
        self._largest = 0
        self._use: Callable[[str, nn.Parameter, Tensor], None] | None = None
        for name, parameter in named.items():
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, name))  # type: ignore[no-untyped-call]

    @property
    def in_one_pass(self) -> bool:
        """Whether a step is one forward and one backward pass, because nothing is clipped."""
        return self.spec.clip == 0

    def norm(self) -> float:
        norms = [self._norms[n] for n in self.named if n in self._norms]
        return _norm_of(norms) if norms else 0.0

    def has_gradient(self, parameter: Tensor) -> bool:
        name = self._names.get(id(parameter))
        return name in self._norms and bool(self._norms[name])

    def gradient_bytes(self) -> int:
        return self._largest

    def zero_grad(self) -> None:
        super().zero_grad()
        self._norms = {}

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Backward passes inside collect the norms of gradients and drop the gradients; nothing moves."""
        with self._using(lambda name, parameter, norm: None):
            yield

    @contextmanager
    def applying(self, factor: float, norm: float = 0.0) -> Iterator[None]:
        """The backward pass inside is the update, at `factor` of the peak rate.

        Args:
            norm: of the whole gradient, from `measuring`; unused where nothing is clipped.

        Raises:
            NotFinite: from the backward pass; tensors whose gradients came before have moved.
        """
        shrink = self.spec.clip / norm if 0 < self.spec.clip < norm else None

        def use(name: str, parameter: nn.Parameter, length: Tensor) -> None:
            if not math.isfinite(float(length)):
                raise NotFinite(name)
            assert parameter.grad is not None
            if shrink is not None:
                parameter.grad.mul_(shrink)
            self._update([name], self.counts[name] + 1, *self._pace(name, factor), 0.0, 0.0)

        with self._using(use):
            yield
        self.updates += 1

    @contextmanager
    def _using(self, use: Callable[[str, nn.Parameter, Tensor], None]) -> Iterator[None]:
        self._norms, self._use = {}, use
        try:
            yield
        finally:
            self._use = None

    @torch.no_grad()
    def _arrived(self, name: str, parameter: nn.Parameter) -> None:
        if self._use is None or parameter.grad is None:  # somebody else's backward pass
            return
        self._largest = max(self._largest, parameter.grad.nbytes)
        self._norms[name] = torch.linalg.vector_norm(parameter.grad)
        try:
            self._use(name, parameter, self._norms[name])
        finally:
            parameter.grad = None


Make = Callable[[dict[str, nn.Parameter], list[Group], OptimSpec, float], Optimiser]

_KINDS: dict[str, Make] = {"adamw": Optimiser, "sgd": Descent, "lomo": Lomo}


def optimiser_of(
    spec: OptimSpec,
    named: dict[str, nn.Parameter],
    groups: Iterable[Group],
    default_lr: float,
    paces: Iterable[Group] = (),
    make: Make | None = None,
) -> Optimiser:
    """The optimiser that the spec names. Norms and biases do not decay.

    Args:
        groups: the method's own.
        paces: the strategies'; their factors multiply with the method's.
        make: a strategy's own, in place of the spec's.
    """
    own = list(groups)
    own += undecayed(named, own)
    lr = spec.lr or default_lr
    if spec.head_lr is not None and spec.head_lr != lr:
        own.append(Group(tuple(n for n in named if is_head(n)), lr_factor=spec.head_lr / lr))
    return (make or _KINDS[spec.name])(dict(named), [*own, *paces], spec, lr)


def _by_name(groups: Iterable[Group]) -> dict[str, Group]:
    """Tensor -> its group. Where several name one tensor, factors multiply, and a decay that is stated last stays."""
    found: dict[str, Group] = {}
    for group in groups:
        for name in group.names:
            before = found.get(name)
            if before is None:
                found[name] = group
                continue
            states = group.weight_decay is not None
            found[name] = Group(
                (name,),
                before.lr_factor * group.lr_factor,
                group.weight_decay if states else before.weight_decay,
                group.decay_to if group.decay_to else before.decay_to,
            )
    return found


def _norm_of(norms: list[Tensor] | tuple[Tensor, ...]) -> float:
    return float(torch.linalg.vector_norm(torch.stack(list(norms))))


def _wide(parameter: Tensor) -> torch.dtype:
    """At least fp32."""
    return torch.promote_types(parameter.dtype, torch.float32)
