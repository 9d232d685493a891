"""Diff pruning: learn a difference for every number of the model, then keep only the few largest.

    theta = theta_0 + z * delta      z in [0, 1]: hard-concrete gates, drawn anew at every pass while they learn
    s = sigmoid(ln u - ln(1 - u) + a)      z = clip(s (hi - lo) + lo, 0, 1)      lo, hi = -1.5, 1.5

delta starts at zero, so the tuned model starts as the base model. A run has two phases. First delta and the gates'
logits a (one per number, and one per tensor) train on the task's loss plus l0 * sum sigmoid(a - ln(-lo / hi)), the
expected number of open gates. Then exactly floor(share * numbers) of z * delta stay, the largest of the whole model;
the rest of the run tunes those alone.

Guo, Rush, Kim 2021, "Parameter-Efficient Transfer Learning with Diff Pruning", arXiv:2012.07463, sections 3.1 to 3.3.
The authors' three scripts are one run here, and the threshold is exact where they search for it. As theirs, the second
phase begins with empty moments and a schedule of its own; a result is selected by what it scores alone. The gradient is
clipped as one, where they clip differences and logits apart. In evaluation, and when the largest are chosen, a gate has
the value of its logit without noise. In a trainer of transformers one schedule and one set of moments go through both.

Count: 2 * numbers of the model + number of tensors in training; floor(share * numbers) of values are deployed.
Claims: full fine-tuning's quality with half a percent of the numbers stored per task.
Cost: every pass draws, bends and multiplies a gate for each number of the model, and gates and differences both have
gradients and moments: four steps of LoRA on short rows, one and a half on long ones (docs/benchmarks.md).
Use it when: a sparse difference to the base must be stored, and training may cost several times more.
Not when: steps must be cheap, or memory is short: it trains more numbers than the model has.
Pitfalls: training costs more memory than full fine-tuning; the penalty is a sum over numbers, not a mean, so its
weight is tiny; gates need a far larger rate than delta; a tensor that a pass uses twice draws its gates twice.
Measured: `python -m experiments.rates diff_pruning --seed 1`, 300 questions of trec6 that the table does not score:
0.92. With one schedule, one rate and a choice among the scores of both phases, as before, it was 0.51. `sparse_rate` is
ours (theirs is five times as large as the first phase's): it gives about the rate of other sparse masks.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy
from luthier.core import above, at_least, between
from luthier.methods.parts.masks import top_k
from luthier.methods.parts.own_tensors import group_names, own_modules
from luthier.surgery import METHODS, Edit, Group, Method, Phase, Reparametrise, TunedView

LOW, HIGH = -1.5, 1.5


@METHODS.register("diff_pruning", family="partial", paper="arXiv:2012.07463")
@dataclass(frozen=True, kw_only=True)
class DiffPruning(Method):
    """Settings of diff pruning."""

    share: Annotated[float, "share of the model's numbers that is kept in the end", between(0, 1)] = 0.005
    gating: Annotated[float, "share of the run in which the gates learn", between(0, 1)] = 0.5
    l0: Annotated[float, "weight of the expected number of open gates", at_least(0)] = 1.25e-7
    structured: Annotated[bool, "also one gate for each tensor as a whole"] = True
    open: Annotated[float, "where the gates' logits start; 5 is open"] = 5.0
    gate_rate: Annotated[float, "learning rate of the logits, as a multiple of delta's", at_least(0)] = 1000.0
    sparse_rate: Annotated[float, "learning rate of the second phase, as a multiple of the run's", above(0)] = 50.0

    mergeable: ClassVar[bool] = True
    computes_tensors: ClassVar[bool] = True
    default_lr: ClassVar[float] = 1e-4
    draws: ClassVar[bool] = True
    tiny: ClassVar[dict[str, float]] = {"gating": 0.9}
    trains_base: ClassVar[bool] = True

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        for name in self._names(anatomy):
            yield Reparametrise(name, Gated(anatomy.tensors[name], self.open, self.structured))

    def n_params(self, anatomy: Anatomy) -> int:
        names = self._names(anatomy)
        return 2 * self._numbers(anatomy) + (len(names) if self.structured else 0)

    def n_stored(self, anatomy: Anatomy) -> int:
        """A place and a value for each number that stays."""
        return 2 * math.floor(self.share * self._numbers(anatomy))

    def extra_loss(self, tuned: TunedView) -> Tensor | None:
        held = [m for m in own_modules(self, tuned, Gated) if not m.is_fixed]
        if not held or self.l0 == 0:
            return None
        return self.l0 * torch.stack([m.open_gates() for m in held]).sum()

    def phases(self, tuned: TunedView) -> Sequence[Phase]:
        """None where the gates learn in no step, or in all."""
        shares = self.gating, 1 - self.gating
        return [Phase(shares[0]), Phase(shares[1], rate=self.sparse_rate)] if min(shares) > 0 else []

    def enter(self, tuned: TunedView, phase: int) -> None:
        if phase:
            self._project(tuned)

    def on_step(self, tuned: TunedView, step: int, total: int) -> None:
        # In another trainer, which enters no phase, this begins the second one. At or after the share, not exactly at
        # it: a step that was refused does not call us.
        if step >= self.gating * total:
            self._project(tuned)

    def finish(self, tuned: TunedView) -> None:
        self._project(tuned)
        for module in own_modules(self, tuned, Gated):
            module.restore(module.stored())

    def groups(self, tuned: TunedView) -> list[Group]:
        held = own_modules(self, tuned, Gated)
        gates = [g for m in held for g in (m.gates, m.whole) if g is not None]
        names = group_names(tuned, gates)
        return [Group(names, lr_factor=self.gate_rate, weight_decay=0.0)] if names else []

    def _project(self, tuned: TunedView) -> None:
        """Keep exactly the budget: the largest of z * delta in the whole model."""
        held = [m for m in own_modules(self, tuned, Gated) if not m.is_fixed]
        if held:
            differences = [m.difference() for m in held]
            k = math.floor(self.share * sum(d.numel() for d in differences))
            masks = top_k([d.abs() for d in differences], k)
            for module, difference, mask in zip(held, differences, masks, strict=True):
                module.fix(difference, mask)

    def _names(self, anatomy: Anatomy) -> list[str]:
        heads = set(anatomy.head_tensors)
        return [n for n in anatomy.tensors if n not in heads]

    def _numbers(self, anatomy: Anatomy) -> int:
        return sum(math.prod(anatomy.tensors[n]) for n in self._names(anatomy))


def gate(logits: Tensor, noise: Tensor | None) -> Tensor:
    """Hard-concrete z. noise: uniform in (0, 1), shaped as `logits`; None for the value without noise."""
    at = logits if noise is None else logits + noise.log() - (-noise).log1p()
    return (torch.sigmoid(at) * (HIGH - LOW) + LOW).clamp(0, 1)


class Gated(nn.Module):
    """A tensor of the model plus a gated difference; later plus a few fixed entries of it.

    Three forms: gates that learn (delta, gates, whole), a fixed mask over delta, and the sparse form that is stored
    (index, values).
    """

    fixed: Tensor
    mask: Tensor

    def __init__(self, shape: tuple[int, ...], start: float, structured: bool) -> None:
        super().__init__()
        self.shape = torch.Size(shape)
        self.delta: nn.Parameter | None = nn.Parameter(torch.zeros(shape))
        self.gates: nn.Parameter | None = nn.Parameter(torch.full(shape, start))
        self.whole: nn.Parameter | None = nn.Parameter(torch.full((), start)) if structured else None
        self.values: nn.Parameter | None = None
        self.register_buffer("index", None)
        self.register_buffer("mask", torch.zeros(shape, dtype=torch.bool))
        self.register_buffer("fixed", torch.zeros((), dtype=torch.bool))
        self.is_fixed = False  # `fixed` again, where asking does not wait for the device

    def forward(self, frozen: Tensor) -> Tensor:
        if self.values is not None:
            assert self.index is not None
            flat = frozen.flatten().to(torch.promote_types(frozen.dtype, self.values.dtype))
            whole: Tensor = flat.index_put((self.index.long(),), self.values.to(flat.dtype), accumulate=True)
            return whole.view(frozen.shape)
        assert self.delta is not None
        if self.is_fixed:
            return frozen + self.delta * self.mask
        return frozen + self.delta * self.z(noisy=self.training)

    def z(self, *, noisy: bool) -> Tensor:
        """The gates of this pass, shaped as the tensor."""
        assert self.gates is not None
        found = gate(self.gates, _uniform(self.gates) if noisy else None)
        if self.whole is not None:
            found = found * gate(self.whole, _uniform(self.whole) if noisy else None)
        return found

    def open_gates(self) -> Tensor:
        """The expected number of gates that are not zero."""
        assert self.gates is not None
        edge = math.log(-LOW / HIGH)
        found = torch.sigmoid(self.gates - edge).sum()
        return found if self.whole is None else found + torch.sigmoid(self.whole - edge)

    @torch.no_grad()
    def difference(self) -> Tensor:
        """z * delta without noise, as a tensor of its own."""
        assert self.delta is not None
        return self.delta * (self.mask if self.is_fixed else self.z(noisy=False))

    @torch.no_grad()
    def fix(self, difference: Tensor, mask: Tensor) -> None:
        """Go on with the entries of `mask` alone, from `difference`."""
        assert self.delta is not None
        self.delta.copy_(difference * mask)
        self.mask.copy_(mask)
        self.fixed.fill_(True)
        self.is_fixed = True

    def stored(self) -> dict[str, Tensor]:
        """The entries that differ, by place in the flattened tensor, and their differences."""
        if self.values is not None:
            assert self.index is not None
            return {"index": self.index, "values": self.values.detach()}
        difference = self.difference().flatten()
        chosen = self.mask.flatten() if self.is_fixed else difference != 0
        index = chosen.nonzero().flatten()
        small = self.shape.numel() < 2**31
        return {"index": index.to(torch.int32 if small else torch.int64), "values": difference[index]}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        if set(tensors) != {"index", "values"}:
            raise KeyError(f"a sparse difference stores index and values, the file has {', '.join(sorted(tensors))}")
        held = self.values if self.delta is None else self.delta
        assert held is not None
        values = tensors["values"].to(held.device, held.dtype).clone()
        self.values = nn.Parameter(values, requires_grad=held.requires_grad)
        self.index = tensors["index"].to(held.device).clone()
        self.delta = self.gates = self.whole = None
        self._buffers["mask"] = None
        self.is_fixed = True

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}fixed" in state_dict:
            self.is_fixed = bool(state_dict[f"{prefix}fixed"])


def _uniform(like: Tensor) -> Tensor:
    """Draws from the ambient generator, never 0 or 1."""
    return torch.rand_like(like).clamp(1e-7, 1 - 1e-7)
