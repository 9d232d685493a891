"""Forward, backward and memory of one contestant: luthier or peft, on a Llama of random weights.

Both sides get the same weights, rows, adapter sites and rank, and bf16 arithmetic beside fp32 trained numbers.
"""

import math
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import _machine
from benchmarks.gpu.part import Record, first_line
from luthier.data.batches import Batch
from luthier.data.tasks import Task
from luthier.runs.spec import OptimSpec
from luthier.surgery import attach
from luthier.training.objective import Objective
from luthier.training.optimiser import optimiser_of

__all__ = ["SHAPES", "Rows", "rows_of", "steps"]

# width, inner width, layers, heads, key heads, words, and whether the words' matrix is also the output's
SHAPES: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "1b": (2048, 8192, 16, 32, 8, 128_256, True),
    "8b": (4096, 14336, 32, 32, 8, 128_256, False),
    "tiny": (48, 80, 3, 4, 2, 131, False),
}
RANK = 8
RATE = 1e-3
WARM = 2
"""steps before the first one that counts: memory is asked for, kernels are chosen"""


@dataclass(frozen=True)
class Rows:
    """A batch and what it holds: tokens, of them supervised ones; and places that are padding."""

    tensors: dict[str, Tensor]
    n_tokens: int
    n_supervised: int
    n_padded: int


@dataclass(frozen=True)
class Side:
    """One contestant, ready to step."""

    forward: Callable[[Rows], Tensor]
    update: Callable[[], None]
    trained: dict[str, Tensor]


def model_of(size: str, device: str) -> Any:
    """A Llama of random weights in bf16, made where it will stand; the same for every contestant."""
    width, inner, layers, heads, key_heads, words, tied = SHAPES[size]
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=words,
        tie_word_embeddings=tied,
        attn_implementation="sdpa",
        pad_token_id=0,
    )
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.train()


def rows_of(words: int, batch: int, length: int, device: str, padded: bool) -> Rows:
    """Random words behind a prompt of a third, which carries no loss; padded, rows of half the length to all of it."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(4, words, (batch, length), generator=draw)
    lengths = torch.linspace(length / 2, length, batch).long() if padded else torch.full((batch,), length)
    place = torch.arange(length)[None, :]  # (1, length)
    real = place < lengths[:, None]  # (batch, length)
    labels = ids.masked_fill(~real | (place < lengths[:, None] // 3), -100)
    made = {"input_ids": ids.masked_fill(~real, 0), "attention_mask": real.long(), "labels": labels}
    return Rows(
        tensors={name: tensor.to(device) for name, tensor in made.items()},
        n_tokens=int(real.sum()),
        n_supervised=int((labels[:, 1:] != -100).sum()),
        n_padded=int((~real).sum()),
    )


def _autocast(device: str) -> torch.autocast:
    return torch.autocast(torch.device(device).type, torch.bfloat16)


def luthier(model: Any, device: str, method: str) -> Side:
    """As `luthier.workflow` puts a run together, without files."""
    tuned = attach(model, method, seed=0, rank=RANK)
    tuned.forward.route_attention()
    tuned.fast.accelerate()
    objective = Objective(tuned, Task(name="causal_lm"))
    optimiser = optimiser_of(OptimSpec(), tuned.trained(), tuned.groups(), RATE)

    def forward(rows: Rows) -> Tensor:
        labels = rows.tensors["labels"]
        batch = Batch(
            inputs={k: v for k, v in rows.tensors.items() if k != "labels"},
            labels=labels,
            rows=np.arange(len(labels)),
            n_targets=rows.n_supervised,
            n_tokens=rows.n_tokens,
        )
        with _autocast(device):
            return objective(batch).loss / rows.n_supervised

    def update() -> None:
        optimiser.clip(optimiser.norm())
        optimiser.step(1.0)
        optimiser.zero_grad()

    return Side(forward, update, dict(tuned.trained()))


def peft(model: Any, device: str) -> Side:
    """The model's own loss with labels, peft's LoRA with its fp32 numbers, and a fused AdamW."""
    from peft import LoraConfig, get_peft_model

    sites = ["q_proj", "v_proj"]
    tuned: Any = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules=sites, lora_dropout=0.0)
    )
    trained = {n: p for n, p in tuned.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(trained.values(), lr=RATE, weight_decay=0.0, fused=True)

    def forward(rows: Rows) -> Tensor:
        with _autocast(device):
            loss: Tensor = tuned(**rows.tensors).loss
        return loss

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return Side(forward, update, trained)


def steps(record: Record, who: str, size: str, device: str, batch: int, length: int, repeats: int = 8) -> None:
    """Some steps of one contestant, on full rows and then on padded ones."""
    if who == "peft + Liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    model = model_of(size, device)
    side = peft(model, device) if "peft" in who else luthier(model, device, "qlora" if "QLoRA" in who else "lora")
    for padded in (False, True):
        rows = rows_of(SHAPES[size][5], batch, length, device, padded)
        name = "padded rows" if padded else "full rows"
        try:
            record(name, _measured(side, rows, device, repeats))
        except (AssertionError, RuntimeError) as error:  # of memory too: the other rows may fit
            record(name, {"ok": False, "error": first_line(error), "note": f"WRONG {first_line(error)}"})


def _measured(side: Side, rows: Rows, device: str, repeats: int) -> dict[str, Any]:
    meter = _Meter(device)
    times: list[tuple[float, float, float]] = []
    losses: list[float] = []
    kept = 0
    gradient: dict[str, Any] = {}
    for turn in range(WARM + repeats):
        if turn == WARM:
            meter.reset()
        before, start = meter.held(), meter.now()
        loss = side.forward(rows)
        after = meter.now()
        kept = max(kept, meter.held() - before) if turn >= WARM else 0
        loss.backward()
        done = meter.now()
        if turn == WARM + repeats - 1:
            gradient = _gradients(side.trained)
            meter.now()
        moved = meter.now()
        side.update()
        times.append((after - start, done - after, meter.now() - moved))
        losses.append(float(loss.detach()))
        del loss
    assert all(math.isfinite(value) for value in losses), f"losses {losses}"
    assert losses[-1] < losses[0], f"the loss of the same rows goes from {losses[0]} to {losses[-1]}"
    assert gradient["tensors_not_zero"] == gradient["tensors"] > 0, f"gradients that are zero: {gradient}"
    forward, backward, update = (statistics.median(column) for column in zip(*times[WARM:], strict=True))
    step = statistics.median(sum(row) for row in times[WARM:])
    return {
        "forward_seconds": forward,
        "backward_seconds": backward,
        "update_seconds": update,
        "step_seconds": step,
        "step_seconds_least_and_most": [min(map(sum, times[WARM:])), max(map(sum, times[WARM:]))],
        "tokens": rows.n_tokens,
        "supervised_tokens": rows.n_supervised,
        "padded_places": rows.n_padded,
        "tokens_per_second": rows.n_tokens / step,
        "supervised_per_second": rows.n_supervised / step,
        "kept_by_forward_bytes": kept,
        **meter.peaks(),
        "trained_numbers": sum(p.numel() for p in side.trained.values()),
        "losses": losses,
        "gradient": gradient,
    }


def _gradients(trained: dict[str, Tensor]) -> dict[str, Any]:
    """How many tensors have a gradient that is not all zeros, and the norm of the whole."""
    found = [p.grad.float() for p in trained.values() if p.grad is not None]
    return {
        "tensors": len(trained),
        "tensors_not_zero": sum(bool(g.any()) for g in found),
        "norm": math.sqrt(sum(float(g.square().sum()) for g in found)),
    }


class _Meter:
    """Time and memory of the device: a GPU's allocator, or this process where the device is a CPU."""

    def __init__(self, device: str) -> None:
        self.gpu = torch.device(device).type == "cuda"

    def now(self) -> float:
        """Seconds, when all that was given to the device is done."""
        if self.gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def held(self) -> int:
        """Bytes in tensors."""
        return int(torch.cuda.memory_allocated()) if self.gpu else _machine.held_bytes()

    def reset(self) -> None:
        """Let the peaks start again from what is held now."""
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
            return
        with suppress(OSError):
            _machine.reset_peak()

    def peaks(self) -> dict[str, int | None]:
        """The most that tensors held, and the most that the allocator had taken for them."""
        if self.gpu:
            return {
                "allocated_peak_bytes": int(torch.cuda.max_memory_allocated()),
                "reserved_peak_bytes": int(torch.cuda.max_memory_reserved()),
            }
        return {"allocated_peak_bytes": _machine.peak_bytes(), "reserved_peak_bytes": None}
