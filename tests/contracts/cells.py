"""What the contract runs over: every registered method on an encoder, two decoders and an encoder-decoder.

A method that refuses an architecture says so with an AnatomyError before anything is touched; that is a cell too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from tiny import inputs, tiny
from torch import Tensor

from luthier.core import AnatomyError
from luthier.runs.spec import OptimSpec
from luthier.surgery import METHODS, Method, Tuned, attach
from luthier.training.objective import Result
from luthier.training.optimiser import Optimiser

ARCHITECTURES = {"bert": "classification", "gpt2": "lm", "llama": "lm", "t5": "seq2seq"}
CELLS = [(name, arch) for name in METHODS.names() for arch in ARCHITECTURES]
SMALL = {"target_rank": 2, "length": 3, "width": 6, "mlp_width": 7, "rank": 3, "dimension": 600, "d_int": 600}


def small(name: str) -> Method:
    """The method with sizes that fit a tiny model; everything else is its default."""
    cls = METHODS.get(name)
    fields = {f.name: f.default for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    shrunk = {n: v for n, v in SMALL.items() if n in fields and isinstance(fields[n], int) and fields[n] > v}
    return cls(**shrunk)


@cache
def task_of(name: str, arch: str) -> str:
    """The architecture's own task; classification for a method that has nothing to train in a language model."""
    task = ARCHITECTURES[arch]
    try:
        attach(tiny(arch, task), small(name))
    except AnatomyError:
        try:
            attach(tiny(arch, "classification"), small(name))
        except AnatomyError:
            return task
        return "classification"
    return task


def model_and_inputs(name: str, arch: str, **more: Any) -> tuple[Any, dict[str, Tensor]]:
    model = tiny(arch, task_of(name, arch))
    return model, inputs(model, **more)


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    # An encoder-decoder makes its decoder's input of the labels.
    given = batch if model.config.is_encoder_decoder else {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        return model(**given).logits


class Refused(Exception):
    """The method does not go with this architecture and says so."""


def attached(
    name: str, arch: str, *, seed: int = 0, method: Method | None = None, **more: Any
) -> tuple[Tuned, Any, dict[str, Tensor]]:
    """The method on a fresh model; Refused where it says that it cannot."""
    model, batch = model_and_inputs(name, arch, **more)
    before = list(model.state_dict())
    try:
        tuned = attach(model, method or small(name), seed=seed)
    except AnatomyError as error:
        assert list(model.state_dict()) == before, "a refused method left something on the model"
        assert len(str(error)) > 40, f"the refusal says too little: {error}"
        raise Refused(str(error)) from error
    return tuned, model, batch


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
        self.losses: list[float] = []

    def step(self) -> None:
        step = len(self.losses) + 1
        torch.manual_seed(step)
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
