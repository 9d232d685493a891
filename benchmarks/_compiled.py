"""`torch.compile` over the plain computation, beside our own functions: a step's time, and what comes before it."""

import statistics
import time
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmarks._work import MODELS
from luthier import samples
from luthier.data.batches import Batch
from luthier.data.tasks import Task
from luthier.runs.spec import OptimSpec
from luthier.surgery import attach
from luthier.training.objective import Objective
from luthier.training.optimiser import Optimiser

__all__ = ["steps"]

CLASSES = 6


def steps(
    model: str, batch: int, lengths: list[int], turns: int, how: str, attention: str | None = None
) -> dict[str, Any]:
    """Steps of LoRA (q, v) over batches of each of `lengths` in turn.

    Args:
        how: "ours" (our functions), "plain" (transformers' own) or "compiled" (the same, compiled for changing shapes).
        attention: transformers' "eager" or "sdpa", where it is not ours.

    Returns:
        warm_seconds: until each length has been seen once, compilation included.
        step_seconds: of the steps after that.
    """
    decodes = model == "decoder"
    auto = AutoModelForCausalLM if decodes else AutoModelForSequenceClassification
    heads: dict[str, Any] = {} if decodes else {"num_labels": CLASSES}
    torch.manual_seed(0)
    base = auto.from_pretrained(
        samples.model_path(MODELS[model]), dtype=torch.bfloat16, attn_implementation=attention, **heads
    ).eval()
    tuned = attach(base, "lora", seed=0)
    if how == "ours":
        tuned.forward.route_attention()
        tuned.fast.accelerate()
    objective = Objective(tuned, Task(name="causal_lm" if decodes else "classification"))
    optimiser = Optimiser(tuned.trained(), tuned.groups(), OptimSpec(), 1e-3)
    some = [_batch(decodes, batch, length, base.config.vocab_size) for length in lengths]
    if how == "compiled":
        # The loss of a language model stays ours: it is computed from the states of the base model.
        inner = base.base_model if decodes else base
        inner.forward = torch.compile(inner.forward, dynamic=len(lengths) > 1)

    def step(one: Batch) -> float:
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = objective(one).loss / one.n_targets
        torch.autograd.backward(loss)
        optimiser.clip(optimiser.norm())
        optimiser.step(1.0)
        optimiser.zero_grad()
        return time.perf_counter() - start

    # Twice: the second pass over a shape may compile once more.
    warm = sum(step(one) for one in some for _ in range(2))
    seconds = [step(one) for _ in range(turns) for one in some]
    return {"warm_seconds": warm, "step_seconds": statistics.mean(seconds), "least_seconds": min(seconds)}


def _batch(decodes: bool, batch: int, length: int, n_vocab: int) -> Batch:
    ids = torch.randint(1000, min(n_vocab, 20_000), (batch, length), generator=torch.Generator().manual_seed(length))
    labels = ids if decodes else torch.arange(batch) % CLASSES
    return Batch(
        inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        labels=labels,
        rows=np.arange(batch),
        n_targets=batch * (length - 1) if decodes else batch,
        n_tokens=batch * length,
    )
