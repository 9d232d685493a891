"""What of a tuned model learns, what an optimiser may move, and what a checkpoint has to hold."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from luthier.surgery.edited_model import EditedModel
from luthier.surgery.tuning import Tuning

__all__ = ["TrainingState", "is_head"]


def is_head(name: str) -> bool:
    """Whether a trained tensor, as `trained()` names it, is of a new task head; beside others a tuning's name leads."""
    return name.startswith("head/") or ":head/" in name


class TrainingState:
    """Trained tensors, update masks and checkpoints of all tunings on a model."""

    def __init__(self, edited: EditedModel) -> None:
        self.edited = edited
        edited.followers.append(self.refresh)

    def trained(self, name: str | None = None) -> dict[str, nn.Parameter]:
        """Canonical name -> trained tensor. See `Tuned.trained`."""
        found: dict[str, nn.Parameter] = {}
        many = len(self.edited.tunings) > 1 and name is None
        for tuning in self.edited.tunings.values():
            learns = tuning.active and tuning.trainable
            if (name is None and not learns) or (name is not None and tuning.tuning_name != name):
                continue
            prefix = f"{tuning.tuning_name}:" if many else ""
            for key_, module in tuning.modules_by_key().items():
                for short, parameter in module.named_parameters():
                    if f"{key_}.{short}" not in tuning.fixed:
                        found[f"{prefix}{key_}.{short}"] = parameter
            for key_, unfrozen in tuning.unfrozen.items():
                found[f"{prefix}{key_}"] = unfrozen.parameter
        return found

    def n_trained(self, *, head: bool = False) -> int:
        """Trained numbers; with `head`, those of a new task head too. A mask counts only what it lets move."""
        total = 0
        for tuning in self.edited.active():
            if tuning.trainable:
                total += sum(p.numel() for m in tuning.parts.values() for p in m.parameters() if p.requires_grad)
                there = {f"{key_}.{n}" for key_, m in tuning.modules_by_key().items() for n, _ in m.named_parameters()}
                # After `finish` a mask may be of a network that is gone.
                total -= sum(int((~mask).sum()) for name, mask in tuning.masks.items() if name in there)
                for key_, unfrozen in tuning.unfrozen.items():
                    if head or not key_.startswith("head/"):
                        mask = unfrozen.moving
                        total += unfrozen.parameter.numel() if mask is None else int(mask.sum())
        return total

    def train_only(self, *names: str) -> None:
        """Let exactly these tunings learn; the others keep acting, frozen."""
        wanted = {self.edited.tuning(n).tuning_name for n in names}
        for tuning in self.edited.tunings.values():
            tuning.trainable = tuning.tuning_name in wanted
            for key_, module in tuning.modules_by_key().items():
                for short, parameter in module.named_parameters():
                    parameter.requires_grad_(tuning.trainable and f"{key_}.{short}" not in tuning.fixed)
        self.refresh()

    def refresh(self) -> None:
        """A tensor of the model learns if an active tuning that trains has it."""
        learns: dict[int, tuple[nn.Parameter, bool]] = {}
        for tuning in self.edited.tunings.values():
            for unfrozen in tuning.unfrozen.values():
                parameter = unfrozen.parameter
                before = learns.get(id(parameter), (parameter, False))[1]
                learns[id(parameter)] = (parameter, before or (tuning.active and tuning.trainable))
        for parameter, now in learns.values():
            parameter.requires_grad_(now)

    # ------------------------------------------------------------------ masked updates

    def mask_gradients(self) -> None:
        """Zero the gradient outside every update mask: before clipping, so that the norm is of what moves."""
        for tuning in self.edited.tunings.values():
            for unfrozen in tuning.unfrozen.values():
                moving = unfrozen.moving
                if moving is not None and unfrozen.parameter.grad is not None:
                    unfrozen.parameter.grad.mul_(moving)
            for parameter, mask in _masked(tuning):
                if parameter.grad is not None:
                    parameter.grad.mul_(mask)

    @torch.no_grad()
    def constrain(self) -> None:
        """Undo whatever moved outside an update mask: decay and momentum included."""
        for tuning in self.edited.active():
            for unfrozen in tuning.unfrozen.values():
                if unfrozen.mask is not None and unfrozen.holds:
                    value = unfrozen.parameter.data
                    torch.where(unfrozen.mask, value, unfrozen.original.to(value.dtype), out=value)
                    if "still" in unfrozen.notes:
                        value[unfrozen.notes["still"]] = unfrozen.notes["learnt"].to(value.dtype)
            for parameter, mask in _masked(tuning):
                parameter.mul_(mask)

    # ------------------------------------------------------------------ checkpoints

    def tensors(self) -> dict[str, Tensor]:
        """Everything a tuning carries in its training form: trained tensors, buffers, masks; no frozen weight."""
        state: dict[str, Tensor] = {}
        for tuning in self.edited.tunings.values():
            for key_, module in tuning.modules_by_key().items():
                for short, tensor in module.state_dict().items():
                    state[f"{tuning.tuning_name}|{key_}|{short}"] = tensor.detach()
            for kind, named in (("masks", tuning.masks), ("notes", tuning.notes)):
                state |= {f"{tuning.tuning_name}|{kind}|{full}": tensor for full, tensor in named.items()}
            for key_, unfrozen in tuning.unfrozen.items():
                state[f"{tuning.tuning_name}|{key_}|value"] = unfrozen.value
                if unfrozen.mask is not None:
                    state[f"{tuning.tuning_name}|{key_}|mask"] = unfrozen.mask
                for note, tensor in unfrozen.notes.items():
                    state[f"{tuning.tuning_name}|{key_}|note.{note}"] = tensor
        return state

    @torch.no_grad()
    def load_tensors(self, state: dict[str, Tensor]) -> None:
        """The inverse of `tensors`, into tunings attached from the same methods."""
        for tuning in self.edited.tunings.values():
            tuning.masks, tuning.notes = {}, {}
        by_module: dict[tuple[str, str], dict[str, Tensor]] = {}
        for full, tensor in state.items():
            tuning_name, key_, short = full.split("|")
            by_module.setdefault((tuning_name, key_), {})[short] = tensor
        for (tuning_name, key_), tensors in by_module.items():
            tuning = self.edited.tuning(tuning_name)
            if key_ in ("masks", "notes"):
                where = next(tuning.parameters()).device
                setattr(tuning, key_, {full: tensor.to(where) for full, tensor in tensors.items()})
            elif key_ in tuning.unfrozen:
                unfrozen = tuning.unfrozen[key_]
                unfrozen.parameter.data.copy_(tensors["value"])
                here = {n: t.to(unfrozen.parameter.device) for n, t in tensors.items() if n != "value"}
                unfrozen.mask = here.get("mask")
                unfrozen.notes = {n.removeprefix("note."): t for n, t in here.items() if n != "mask"}
            else:
                tuning.modules_by_key()[key_].load_state_dict(tensors, strict=True)


def _masked(tuning: Tuning) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """The attached tensors of which a part is held at zero, and where they are not."""
    if tuning.masks:
        for key_, module in tuning.modules_by_key().items():
            for short, parameter in module.named_parameters():
                mask = tuning.masks.get(f"{key_}.{short}")
                if mask is not None:
                    yield parameter, mask.to(parameter.device)
