"""Other people's trainers on a tuned model: their optimisers step, their checkpoints are saved.

Our own loop asks the tuning before and after each step. Another trainer does not know how, so two hooks of torch,
called around every `torch.optim.Optimizer.step`, do it; they pass over optimisers that own nothing of a tuned model.
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from luthier.core import ConfigError
from luthier.runs import durable
from luthier.surgery.edited_model import EditedModel
from luthier.surgery.method import Method
from luthier.surgery.training_state import TrainingState
from luthier.surgery.view import TunedView

__all__ = ["Watched", "save_checkpoint", "unwatch", "watch"]


class Watched(TunedView, Protocol):
    """What is asked of a tuned model here."""

    edited: EditedModel
    state: TrainingState
    calls_hooks: bool

    def save(self, folder: Any, *, name: str | None = None) -> str:
        """Write one tuning."""


_watched: weakref.WeakSet[Watched] = weakref.WeakSet()
_handles: list[Any] = []


def watch(tuned: Watched) -> None:
    """Look after `tuned` whenever an optimiser that owns some of its trained numbers steps."""
    _watched.add(tuned)
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(_before))
        _handles.append(register_optimizer_step_post_hook(_after))


def unwatch(tuned: Watched) -> None:
    """Let go of it."""
    _watched.discard(tuned)
    if not _watched:
        while _handles:
            _handles.pop().remove()


def _owned(optimizer: Any) -> list[Watched]:
    if not _watched:
        return []
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [t for t in _watched if any(id(p) in stepped for p in t.trained().values())]


def _before(optimizer: Any, args: Any, kwargs: Any) -> None:
    for tuned in _owned(optimizer):
        _refuse_half(tuned)
        tuned.state.mask_gradients()


def _after(optimizer: Any, args: Any, kwargs: Any) -> None:
    for tuned in _owned(optimizer):
        tuned.state.constrain()


def _refuse_half(tuned: Watched) -> None:
    """A method of which only half would happen is stopped at the first step, not found out at the last.

    Raises:
        ConfigError: the method has to be asked for its loss or after each step, or was not prepared.
    """
    if tuned.calls_hooks:
        return
    for tuning in tuned.edited.tunings.values():
        for part in tuning.method.parts() if tuning.trainable else ():
            cls = type(part)
            asks = [
                n
                for n in ("before_step", "loss", "extra_loss", "on_step", "phases")
                if getattr(cls, n) is not getattr(Method, n) and n not in part.idle
            ]
            every = getattr(part, part.looks_again, 0)
            asks += [f"prepare every {every} steps"] if every else []
            if asks:
                raise ConfigError(
                    f"{part.name} has to be asked during training ({', '.join(asks)}), which this trainer does not do: "
                    "it would train something else than it says. Give a Trainer of transformers or TRL "
                    "callbacks=[luthier.HooksCallback(tuned)], use luthier's own loop (`luthier train`), or call these "
                    "methods in your loop and set calls_hooks = True on what attach() returned."
                )
            if part.looks_at_data:
                part.after_backward(tuned, 1, 1)  # says so where it was not prepared


def save_checkpoint(tuned: Watched, folder: Path | str, state: dict[str, Tensor] | None = None) -> None:
    """What `save_pretrained` of a tuned model writes: the tunings, and no base weight.

        FOLDER/model.safetensors    trained tensors by their names in the tuned model: a trainer resumes from it
        FOLDER/tunings/NAME/        each tuning as `load` reads it

    There is no config.json: as a model of its own the folder would be a base with random layers.

    Raises:
        IntegrityError: a tensor is not finite.
        ResourceError: the folder cannot be written.
    """
    target = Path(folder)
    shelf = target / "tunings"
    for needed in (target, shelf):
        if not needed.exists():
            durable.make_folder(needed)
    for name in tuned.tunings:
        place = shelf / name
        if place.exists():  # a trainer saves to one place again and again
            old = shelf / f".del-{name}"
            durable.rename(place, old)
            durable.remove_folder(old)
        tuned.save(place, name=name)
    given = tuned.model.state_dict() if state is None else state
    own = {id(u.parameter) for t in tuned.edited.tunings.values() for u in t.unfrozen.values()}
    names = {n for n, p in tuned.model.named_parameters(remove_duplicate=False) if id(p) in own}
    kept = {n: t for n, t in given.items() if n.startswith("luthier.") or n in names}
    durable.write_tensors(target / "model.safetensors", kept)
