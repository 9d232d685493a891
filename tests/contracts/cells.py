"""What the contract runs over: every method on the shelf, on an encoder, two decoders and an encoder-decoder.

A method that refuses an architecture says so before anything is touched; that is a cell too. Checks that only look at
a tuned model share it: building one costs more than most checks. Who changes it takes it away (`take`).
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from tiny import inputs, tiny
from tiny_methods import learning_rate, small
from torch import Tensor

from luthier.core import AnatomyError, CompositionError
from luthier.runs.spec import OptimSpec
from luthier.surgery import METHODS, Method, Phases, Tuned, attach
from luthier.training.objective import Result
from luthier.training.optimiser import Optimiser

__all__ = [
    "ARCHITECTURES", "CELLS", "GENERATORS", "Refused", "Trainer", "attached", "base_logits", "few_steps",
    "fresh", "has_phases", "learning_rate",
    "logits", "model_and_inputs", "objective", "shake", "shaken", "small", "steps_of", "take", "task_of", "trained",
    "untrained",
]  # fmt: skip

ARCHITECTURES = {"bert": "classification", "llama": "lm", "gpt2": "lm", "t5": "seq2seq"}
QUICK = ("bert", "llama")  # one of each kind in `make test`; conftest.py marks the others as slow


CELLS = [(name, arch) for name in METHODS.names() for arch in ARCHITECTURES]
GENERATORS = [(name, arch) for name, arch in CELLS if arch != "bert"]


class Refused(Exception):
    """The method does not go with this architecture and says so."""


@cache
def task_of(name: str, arch: str) -> str:
    """The architecture's own task; classification for a method that has nothing to train in a language model."""
    task = ARCHITECTURES[arch]
    for tried in (task, "classification"):
        try:
            attach(fresh(arch, tried), small(name))
        except (AnatomyError, CompositionError):
            continue
        return tried
    return task


@cache
def _pristine(arch: str, task: str) -> Any:
    return tiny(arch, task)


def fresh(arch: str, task: str) -> Any:
    """A tiny model that nobody has touched."""
    return copy.deepcopy(_pristine(arch, task))


def model_and_inputs(name: str, arch: str, **more: Any) -> tuple[Any, dict[str, Tensor]]:
    model = fresh(arch, task_of(name, arch))
    return model, inputs(model, **more)


@cache
def _base_logits(arch: str, task: str) -> Tensor:
    model = _pristine(arch, task)
    return logits(model, inputs(model))


def base_logits(name: str, arch: str) -> Tensor:
    """What the model computes before anything is attached."""
    return _base_logits(arch, task_of(name, arch))


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    # An encoder-decoder makes its decoder's input of the labels.
    given = batch if model.config.is_encoder_decoder else {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        return model(**given).logits


def attached(
    name: str, arch: str, *, seed: int = 0, method: Method | None = None, **more: Any
) -> tuple[Tuned, Any, dict[str, Tensor]]:
    """The method on a fresh model, which the caller may change; Refused where it says that it cannot."""
    model, batch = model_and_inputs(name, arch, **more)
    before = list(model.state_dict())
    try:
        tuned = attach(model, method or small(name), seed=seed)
    except (AnatomyError, CompositionError) as error:
        assert list(model.state_dict()) == before, "a refused method left something on the model"
        assert len(str(error)) > 40, f"the refusal says too little: {error}"
        raise Refused(str(error)) from error
    return tuned, model, batch


class Shared(NamedTuple):
    """A tuned model that several checks look at."""

    tuned: Tuned
    model: Any
    batch: dict[str, Tensor]


_SHARED: OrderedDict[tuple[str, str, str], tuple[Shared, int]] = OrderedDict()


def _shared(stage: str, name: str, arch: str, make: Callable[[], Shared]) -> Shared:
    """The one of this stage, made anew where a check has changed it."""
    key = (stage, name, arch)
    held = _SHARED.get(key)
    if held is None or held[1] != _fingerprint(held[0]):
        made = make()
        _SHARED[key] = held = (made, _fingerprint(made))
        while len(_SHARED) > 4:  # checks of one cell stand together, so few are ever asked for again
            _SHARED.popitem(last=False)
    return held[0]


def _fingerprint(shared: Shared) -> int:
    """Every number, gradient, switch and hook of the model, so that no check meets what another left behind."""
    model = shared.model
    numbers = [t.detach().contiguous() for t in (*model.parameters(), *model.buffers()) if t.dim() and t.numel()]
    return hash(
        (
            b"".join(
                t.detach().contiguous().view(torch.uint8).numpy().tobytes() for t in numbers if t.numel() and t.dim()
            ),
            tuple((p.requires_grad, p.grad is None) for p in model.parameters()),
            tuple(
                (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), getattr(m, "gradient_checkpointing", 0))
                for m in model.modules()
            ),
            repr(shared.tuned.status()),
        )
    )


def take(shared: Shared) -> Shared:
    """Hand it over to a check that will change it."""
    for key in [k for k, (held, _) in _SHARED.items() if held is shared]:
        del _SHARED[key]
    return shared


def untrained(name: str, arch: str) -> Shared:
    """As it starts."""
    return _shared("untrained", name, arch, lambda: Shared(*attached(name, arch)))


def shaken(name: str, arch: str) -> Shared:
    """Every trained number off its start, in evaluation mode."""

    def make() -> Shared:
        made = Shared(*attached(name, arch))
        shake(made.tuned)
        return made

    return _shared("shaken", name, arch, make)


def trained(name: str, arch: str) -> Shared:
    """After a run of four steps, or of eight where it has phases, in the form that is stored."""

    def make() -> Shared:
        made = Shared(*attached(name, arch))
        Trainer(*made, total=8 if has_phases(made.tuned) else 4).run()
        made.tuned.finish()
        made.model.eval()
        return made

    return _shared("trained", name, arch, make)


def steps_of(tuned: Tuned) -> int:
    """The length of a run of which the first steps are looked at: long, so that nothing is pruned yet, but where a run
    has phases so short that all of them come.
    """
    return 8 if has_phases(tuned) else 200


def few_steps(tuned: Tuned) -> int:
    """The length of the shortest run that leaves traces of all that the method does."""
    return 8 if has_phases(tuned) else 2


def has_phases(tuned: Tuned) -> bool:
    """Whether a method of it trains in parts, which a run must be long enough for."""
    return any(p.phases(tuned) for t in tuned.tunings.values() for p in t.method.parts())


def objective(model: Any, batch: dict[str, Tensor]) -> Callable[[], Result]:
    """One pass with the summed loss, as the loop hands it to a method."""

    def forward() -> Result:
        out = model(**batch)
        if batch["labels"].dim() == 1:
            n = len(batch["labels"])
        else:
            shifted = batch["labels"][:, 1:] if not model.config.is_encoder_decoder else batch["labels"]
            n = int((shifted != -100).sum())
        return Result(out.loss * n, n, out.logits, batch["labels"])

    return forward


class Trainer:
    """The loop's order of events around one batch, without data, files or schedule."""

    def __init__(
        self, tuned: Tuned, model: Any, batch: dict[str, Tensor], *, total: int, lr: float = 0.01, decay: float = 0.01
    ) -> None:
        self.tuned, self.model, self.batch, self.total = tuned, model, batch, total
        self.parts = [p for t in tuned.tunings.values() if t.trainable for p in t.method.parts()]
        forward = objective(model, batch)
        for part in self.parts:
            if part.looks_at_data:
                part.prepare(tuned, [lambda: forward().loss / forward().n_targets] * 2)
        self.optimiser = Optimiser(tuned.trained(), tuned.groups(), OptimSpec(weight_decay=decay), lr)
        self.phases = Phases(tuned, self.parts)
        self.losses: list[float] = []

    def step(self) -> None:
        step = len(self.losses) + 1
        torch.default_generator.manual_seed(step)
        entered = self.phases.enter(step, self.total)
        if entered is not None and entered.fresh:
            self.optimiser.begin_anew()
        if self.phases:
            learning = self.phases.learning(self.optimiser.named)
            for name, parameter in self.optimiser.named.items():
                parameter.requires_grad_(name in learning)
        for part in self.parts:
            part.before_step(self.tuned, step, self.total)
        forward: Callable[[], Any] = objective(self.model, self.batch)
        for part in self.parts:
            forward = _with(part, self.tuned, forward)
        out = forward()
        loss = out.loss / out.n_targets
        loss.backward()
        for part in self.parts:
            extra = part.extra_loss(self.tuned)
            if extra is not None:
                extra.backward()
        for part in self.parts:
            part.after_backward(self.tuned, step, self.total)
        self.tuned.state.mask_gradients()
        self.optimiser.clip(self.optimiser.norm())
        self.gradients = {n: p.grad.clone() for n, p in self.optimiser.named.items() if p.grad is not None}
        self.optimiser.step(1.0)
        self.tuned.state.constrain()
        for part in self.parts:
            part.on_step(self.tuned, step, self.total)
        self.optimiser.zero_grad()
        self.losses.append(float(loss.detach()))

    def run(self) -> Trainer:
        self.tuned.model.luthier.train()
        while len(self.losses) < self.total:
            self.step()
        self.tuned.model.eval()
        return self


def _with(part: Method, tuned: Tuned, forward: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: part.loss(tuned, forward)


def shake(tuned: Tuned, scale: float = 0.05) -> None:
    """Move every trained number off its start, so that nothing passes by being zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in tuned.trained().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    tuned.state.constrain()
