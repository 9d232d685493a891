"""What a tuning costs when the model answers: the base, the tuning beside it or folded in, a tuning for every row."""

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmarks._peers import adapter
from benchmarks._work import MODELS
from luthier import samples
from luthier.surgery import attach

__all__ = ["forward", "many"]


def _load(model: str, dtype: torch.dtype) -> Any:
    auto = AutoModelForCausalLM if model == "decoder" else AutoModelForSequenceClassification
    return auto.from_pretrained(samples.model_path(MODELS[model]), dtype=dtype).eval()


def _ours(model: str, dtype: torch.dtype, *, tunings: int = 1) -> Any:
    """LoRA as trained ones are, prepared as `Predictor` prepares a run: our attention, frozen layers packed."""
    tuned = attach(_load(model, dtype), "lora", name="t0", seed=0)
    for i in range(1, tunings):
        tuned.add("lora", name=f"t{i}", seed=i)
    with torch.no_grad():
        for tuning in tuned.tunings:
            for name, tensor in tuned.trained(tuning).items():
                if name.endswith(".b"):  # zero at the start: a trained one is not
                    torch.nn.init.normal_(tensor, std=0.02)
    tuned.activate("t0")
    tuned.model.eval()
    tuned.forward.route_attention()
    tuned.fast.accelerate(training=False)
    return tuned


def _take_turns(calls: dict[str, Callable[[], Any]], repeats: int, base: str) -> dict[str, Any]:
    """Medians in ms, and ratios to `base` of each turn by itself, so that a slow moment of the machine hits both."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    with torch.inference_mode():
        for turn in range(repeats + 3):
            for name in order.sample(list(calls), len(calls)):
                start = time.perf_counter()
                calls[name]()
                if turn >= 3:
                    times[name].append(time.perf_counter() - start)
    found: dict[str, Any] = {f"{name}_ms": 1e3 * statistics.median(values) for name, values in times.items()}
    for name in calls:
        pairs = zip(times[name], times[base], strict=True)
        found[f"{name}_over_{base}"] = statistics.median(a / b for a, b in pairs)
    return found


def _words(batch: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1000, 20_000, (batch, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def forward(
    model: str = "encoder", batch: int = 32, length: int = 32, bf16: bool = True, repeats: int = 30
) -> dict[str, Any]:
    """Milliseconds of one forward pass, medians of calls that take turns.

    base: the model as transformers loads it, with its own attention. asleep: the base as we compute it, every tuning
    asleep. unmerged: LoRA beside the weights, inside `serving()`, as `Predictor` answers. unserved: the same outside of
    that block, where numbers may change. folded: LoRA in the weights. peft_unmerged and peft_merged: the same by peft.
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    plain = _load(model, dtype)
    asleep, beside, outside, folded = (_ours(model, dtype) for _ in range(4))
    asleep.activate()
    folded.merging.fold()
    theirs = _load(model, dtype)
    task = "CAUSAL_LM" if model == "decoder" else "SEQ_CLS"
    theirs = peft.get_peft_model(theirs, adapter("lora", theirs, task, 1), autocast_adapter_dtype=False).eval()
    merged = _load(model, dtype)
    merged = peft.get_peft_model(merged, adapter("lora", merged, task, 1)).merge_and_unload().eval()
    words = _words(batch, length)
    with beside.serving():
        return _take_turns(
            {
                "base": lambda: plain(**words),
                "asleep": lambda: asleep.model(**words),
                "unmerged": lambda: beside.model(**words),
                "unserved": lambda: outside.model(**words),
                "folded": lambda: folded.model(**words),
                "peft_unmerged": lambda: theirs(**words),
                "peft_merged": lambda: merged(**words),
            },
            repeats,
            "base",
        )


def many(
    model: str = "encoder", batch: int = 32, length: int = 32, bf16: bool = True, repeats: int = 30
) -> dict[str, Any]:
    """Milliseconds of one forward pass with as many tunings on the model as rows, heads included.

    one: a single tuning for all rows. different: each row its own. base: the model as transformers loads it.
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    plain, tuned = _load(model, dtype), _ours(model, dtype, tunings=batch)
    words = _words(batch, length)

    def named(names: list[str]) -> Any:
        with tuned.rows(names):
            return tuned.model(**words)

    with tuned.serving():
        found = _take_turns(
            {
                "one": lambda: named(["t0"] * batch),
                "different": lambda: named([f"t{i}" for i in range(batch)]),
                "base": lambda: plain(**words),
            },
            repeats,
            "one",
        )
    return found
