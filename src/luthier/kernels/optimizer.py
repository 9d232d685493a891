"""AdamW over flat buffers: all trained numbers, their gradients and their moments are updated in a few fused calls.

    p <- p - lr · decay · (p - target)         target: 0, or a tensor such as IA3's ones
    m <- β1 m + (1 - β1) g          v <- β2 v + (1 - β2) g²
    p <- p - lr · (m / (1 - β1ᵗ)) / (√(v / (1 - β2ᵗ)) + eps)

Parameters become views of one fp32 (or fp64) buffer. Parameters in half precision keep their own storage and get a fp32
master copy. A parameter without a gradient stays still: no momentum, no decay, and its own t does not advance.

Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization", arXiv:1711.05101, algorithm 2.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from luthier.core import ConfigError, IntegrityError
from luthier.kernels._switch import fast

__all__ = ["FlatAdamW"]

# Up to this many numbers gradients are gathered into one flat tensor, so that few calls do all. Above it the calls are
# long anyway, and a second copy of a whole model's gradients would cost memory and, fresh each step, three times the
# update itself in page faults.
_GATHER = 1 << 22


@dataclass
class _Slot:
    """One parameter's place in its buffer."""

    name: str
    parameter: nn.Parameter
    start: int
    end: int
    decays: bool
    lr_scale: float
    target: Tensor | None
    steps: int = 0


@dataclass
class _Buffer:
    """The parameters of one device and type, in runs of equal treatment."""

    values: Tensor
    first: Tensor
    second: Tensor
    slots: list[_Slot]
    gradient: Tensor | None = None


class FlatAdamW:
    """AdamW with decoupled decay, equal to `torch.optim.AdamW` number for number up to rounding.

    Args:
        parameters: name -> parameter; all of them are trained. Move the model to its device before.
        lr: learning rate, until `step` is given another.
        no_decay: names whose weights do not decay.
        decay_to: name -> values (of the parameter's shape) that its decay pulls to, instead of 0.
        lr_scale: name -> factor on the learning rate (LoRA+), 1 for names not given.

    Raises:
        ConfigError: no parameters; a parameter that is not floating or given twice; a name or a shape that does not
            fit; a value outside its range.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        no_decay: Collection[str] = (),
        decay_to: Mapping[str, Tensor] | None = None,
        lr_scale: Mapping[str, float] | None = None,
    ) -> None:
        decay_to, lr_scale = decay_to or {}, lr_scale or {}
        _check(parameters, lr, betas, eps, weight_decay, no_decay, decay_to, lr_scale)
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        groups: dict[tuple[torch.device, torch.dtype], list[str]] = {}
        for name, p in parameters.items():
            groups.setdefault((p.device, torch.promote_types(p.dtype, torch.float32)), []).append(name)
        self._buffers = []
        for (device, dtype), names in groups.items():
            slots: list[_Slot] = []
            start = 0
            # Equal treatment side by side, so that one call updates a whole run; else in the order given.
            names = sorted(names, key=lambda n: (n in decay_to, n in no_decay, lr_scale.get(n, 1.0)))
            for name in names:
                p = parameters[name]
                target = decay_to.get(name)
                target = None if target is None else target.detach().to(device, dtype, copy=True).reshape(-1)
                decays = weight_decay > 0.0 and name not in no_decay
                slots.append(
                    _Slot(
                        name, p, start, start + p.numel(), decays, lr_scale.get(name, 1.0), target if decays else None
                    )
                )
                start += p.numel()
            values = torch.empty(start, dtype=dtype, device=device)
            for slot in slots:
                part = values[slot.start : slot.end].view(slot.parameter.shape)
                part.copy_(slot.parameter.detach())
                if slot.parameter.dtype == dtype:
                    slot.parameter.data = part
            self._buffers.append(_Buffer(values, torch.zeros_like(values), torch.zeros_like(values), slots))

    @torch.no_grad()
    def step(self, lr: float | None = None, max_norm: float | None = None) -> float:
        """Gather the gradients, clip them, update, and drop them (`grad` becomes None).

        Args:
            lr: of this step; the one of before if not given.
            max_norm: the gradient of all parameters together is scaled down to this length if it is longer.

        Returns:
            The length of the gradient before clipping. If it is not finite, nothing was updated, and the gradients are
            dropped all the same.

        Raises:
            ConfigError: a parameter no longer lives in its buffer (the model was moved after this was made).
        """
        self.lr = self.lr if lr is None else lr
        gathered = [(buffer, _gather(buffer)) for buffer in self._buffers]
        lengths = [float(torch.linalg.vector_norm(g)) for _, pieces in gathered for _, g in pieces]
        norm = math.hypot(*lengths)
        if math.isfinite(norm):
            shrink = 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))
            for buffer, pieces in gathered:
                for slots, gradient in pieces:
                    self._update(buffer, slots, gradient, shrink)
        self.zero_grad()
        return norm

    def zero_grad(self) -> None:
        """Drop all gradients; `step` does it too."""
        for slot in self._slots().values():
            slot.parameter.grad = None

    def _update(self, buffer: _Buffer, slots: list[_Slot], gradient: Tensor, shrink: float) -> None:
        if shrink < 1.0:
            gradient.mul_(shrink)
        for slot in slots:
            slot.steps += 1
        offset = slots[0].start
        for run in _contiguous(slots, alike=True):
            head = run[0]
            part = slice(head.start, run[-1].end)
            lr = self.lr * head.lr_scale
            decay = self.weight_decay if head.decays else 0.0
            if head.target is not None:
                for slot in run:
                    assert slot.target is not None
                    buffer.values[slot.start : slot.end].lerp_(slot.target, lr * decay)
                decay = 0.0
            _adamw(
                buffer.values[part],
                gradient[part.start - offset : part.stop - offset],
                buffer.first[part],
                buffer.second[part],
                head.steps,
                lr,
                self.betas,
                self.eps,
                decay,
            )
        for slot in slots:
            if slot.parameter.dtype != buffer.values.dtype:
                slot.parameter.copy_(buffer.values[slot.start : slot.end].view(slot.parameter.shape))

    def _slots(self) -> dict[str, _Slot]:
        return {slot.name: slot for buffer in self._buffers for slot in buffer.slots}

    def state_bytes(self) -> int:
        """Bytes of the moments and of master copies, without the parameters and gradients themselves."""
        total = 0
        for buffer in self._buffers:
            total += 2 * buffer.values.numel() * buffer.values.element_size()
            total += sum(s.parameter.numel() * 4 for s in buffer.slots if s.parameter.dtype != buffer.values.dtype)
        return total

    def state_dict_tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint must hold besides the parameters, by name: views, to be written before the next step.

        `first/NAME`, `second/NAME`: the moments, in the parameter's shape; `steps/NAME`: (1,) int64; `master/NAME`:
        the fp32 copy, of parameters in half precision only.
        """
        state: dict[str, Tensor] = {}
        for buffer in self._buffers:
            for slot in buffer.slots:
                part, shape = slice(slot.start, slot.end), slot.parameter.shape
                state[f"first/{slot.name}"] = buffer.first[part].view(shape)
                state[f"second/{slot.name}"] = buffer.second[part].view(shape)
                state[f"steps/{slot.name}"] = torch.tensor([slot.steps])
                if slot.parameter.dtype != buffer.values.dtype:
                    state[f"master/{slot.name}"] = buffer.values[part].view(shape)
        return state

    @torch.no_grad()
    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict_tensors` gave; the parameters themselves are loaded in place by the caller.

        Raises:
            IntegrityError: a tensor is missing, is not one of ours, or has another shape or type.
        """
        mine = self.state_dict_tensors()
        missing, extra = sorted(mine.keys() - state.keys()), sorted(state.keys() - mine.keys())
        if missing or extra:
            raise IntegrityError(
                f"The optimiser's state does not fit this method: missing {missing[:3]}, not known {extra[:3]}"
                f" ({len(missing)} and {len(extra)} in all). Resume with the settings that wrote it, or start anew."
            )
        for name, tensor in mine.items():
            given = state[name]
            if given.shape != tensor.shape or given.dtype != tensor.dtype:
                raise IntegrityError(
                    f"The optimiser's state {name!r} is {given.dtype} {tuple(given.shape)}, and should be"
                    f" {tensor.dtype} {tuple(tensor.shape)}. Resume with the settings that wrote it, or start anew."
                )
        slots = self._slots()
        for name, tensor in mine.items():
            kind, _, of = name.partition("/")
            if kind == "steps":
                slots[of].steps = int(state[name])
            else:
                tensor.copy_(state[name])


def _gather(buffer: _Buffer) -> list[tuple[list[_Slot], Tensor]]:
    """Runs of neighbouring parameters that have gradients, each with its flat gradient in the buffer's type."""
    present = [slot for slot in buffer.slots if slot.parameter.grad is not None]
    size = buffer.values.element_size()
    for slot in present:
        p = slot.parameter
        if p.dtype == buffer.values.dtype and p.data_ptr() != buffer.values.data_ptr() + slot.start * size:
            raise ConfigError(
                f"FlatAdamW: {slot.name!r} no longer lives in the optimiser's buffer; the model was moved, cast or"
                " given new tensors after the optimiser was made. Make the optimiser last, and load values in place."
            )
    dtype = buffer.values.dtype
    gradients = {slot.name: _flat_gradient(slot, dtype) for slot in present}
    if len(buffer.values) > _GATHER:
        return [([slot], gradients[slot.name]) for slot in present]
    if buffer.gradient is None:
        buffer.gradient = torch.empty_like(buffer.values)
    pieces = []
    for run in _contiguous(present):
        flat = buffer.gradient[run[0].start : run[-1].end]
        torch.cat([gradients[slot.name] for slot in run], out=flat)
        pieces.append((run, flat))
    return pieces


def _flat_gradient(slot: _Slot, dtype: torch.dtype) -> Tensor:
    grad = slot.parameter.grad
    assert grad is not None
    return grad.reshape(-1).to(dtype)


def _contiguous(slots: list[_Slot], alike: bool = False) -> list[list[_Slot]]:
    """Runs of neighbours; with `alike`, of neighbours that the same call may update."""
    runs: list[list[_Slot]] = []
    for slot in slots:
        if runs and runs[-1][-1].end == slot.start:
            last = runs[-1][-1]
            same = (last.decays, last.lr_scale, last.steps) == (slot.decays, slot.lr_scale, slot.steps)
            if not alike or (same and (last.target is None) == (slot.target is None)):
                runs[-1].append(slot)
                continue
        runs.append([slot])
    return runs


def _adamw(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    steps: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
) -> None:
    fused = getattr(torch, "_fused_adamw_", None)  # one pass over memory; private, so its absence is no error
    if fast() and fused is not None and p.device.type in ("cpu", "cuda"):
        count = torch.tensor(float(steps), dtype=torch.float32, device=p.device)
        fused(
            [p],
            [g],
            [m],
            [v],
            [],
            [count],
            lr=lr,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )
        return
    p.mul_(1 - lr * decay)
    m.lerp_(g, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    denominator = v.sqrt().div_(math.sqrt(1 - betas[1] ** steps)).add_(eps)
    p.addcdiv_(m, denominator, value=-lr / (1 - betas[0] ** steps))


def _check(
    parameters: Mapping[str, nn.Parameter],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    no_decay: Collection[str],
    decay_to: Mapping[str, Tensor],
    lr_scale: Mapping[str, float],
) -> None:
    wrong = []
    if not parameters:
        wrong.append("FlatAdamW: no parameters were given; give it what trains.")
    seen: dict[int, str] = {}
    for name, p in parameters.items():
        if not p.is_floating_point():
            wrong.append(f"FlatAdamW: {name!r} is {p.dtype}; only floating numbers can train.")
        if id(p) in seen:
            wrong.append(f"FlatAdamW: {name!r} is {seen[id(p)]!r} again; give a shared parameter once.")
        seen[id(p)] = name
    for word, names in (("no_decay", no_decay), ("decay_to", decay_to), ("lr_scale", lr_scale)):
        strangers = sorted(set(names) - set(parameters))
        if strangers:
            wrong.append(f"FlatAdamW: {word} names {strangers[:3]}, which are no parameters given.")
    for name, target in decay_to.items():
        if name in parameters and target.shape != parameters[name].shape:
            wrong.append(
                f"FlatAdamW: decay_to[{name!r}] is {tuple(target.shape)}; it must be {tuple(parameters[name].shape)}."
            )
    if not lr >= 0.0 or not eps >= 0.0 or not weight_decay >= 0.0:
        wrong.append(f"FlatAdamW: lr={lr}, eps={eps}, weight_decay={weight_decay}; none may be below 0.")
    if not all(0.0 <= beta < 1.0 for beta in betas):
        wrong.append(f"FlatAdamW: betas={betas}; each must be at least 0 and below 1.")
    if wrong:
        raise ConfigError("\n".join(wrong))
