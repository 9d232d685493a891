"""What a tuning costs when the model answers: the base, the tuning beside it, the tuning folded in."""

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

__all__ = ["forward"]


def _load(model: str, dtype: torch.dtype) -> Any:
    auto = AutoModelForCausalLM if model == "decoder" else AutoModelForSequenceClassification
    return auto.from_pretrained(samples.model_path(MODELS[model]), dtype=dtype).eval()


def _ours(model: str, dtype: torch.dtype, *, route: bool = True) -> Any:
    tuned = attach(_load(model, dtype), "lora", seed=0)
    with torch.no_grad():
        for name, tensor in tuned.trained().items():
            if name.endswith(".b"):  # zero at the start: a trained one is not
                torch.nn.init.normal_(tensor, std=0.02)
    tuned.model.eval()
    if route:
        tuned.route_attention()
    return tuned


def forward(
    model: str = "encoder", batch: int = 32, length: int = 32, bf16: bool = True, repeats: int = 30
) -> dict[str, Any]:
    """Milliseconds of one forward pass, medians of calls that take turns.

    base: the model as transformers loads it. routed: the base with luthier's attention, every tuning asleep.
    unmerged: LoRA beside the weights. folded: LoRA in them. second: two tunings on the model, one active.
    peft_unmerged and peft_merged: the same by peft.
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    plain = _load(model, dtype)
    asleep, beside, folded, two = (_ours(model, dtype) for _ in range(4))
    asleep.activate()
    folded.fold()
    two.add("lora", name="second", seed=1)
    two.activate("second")
    theirs = _load(model, dtype)
    task = "CAUSAL_LM" if model == "decoder" else "SEQ_CLS"
    theirs = peft.get_peft_model(theirs, adapter("lora", theirs, task, 1), autocast_adapter_dtype=False).eval()
    merged = _load(model, dtype)
    merged = peft.get_peft_model(merged, adapter("lora", merged, task, 1)).merge_and_unload().eval()
    ids = torch.randint(1000, 20_000, (batch, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    calls: dict[str, Callable[[], Any]] = {
        "base": lambda: plain(input_ids=ids, attention_mask=mask),
        "routed": lambda: asleep.model(input_ids=ids, attention_mask=mask),
        "unmerged": lambda: beside.model(input_ids=ids, attention_mask=mask),
        "folded": lambda: folded.model(input_ids=ids, attention_mask=mask),
        "second": lambda: two.model(input_ids=ids, attention_mask=mask),
        "peft_unmerged": lambda: theirs(input_ids=ids, attention_mask=mask),
        "peft_merged": lambda: merged(input_ids=ids, attention_mask=mask),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for turn in range(repeats + 3):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                if turn >= 3:
                    times[name].append(time.perf_counter() - start)
    found: dict[str, Any] = {f"{name}_ms": 1e3 * statistics.median(values) for name, values in times.items()}
    for name in calls:
        # Of each turn by itself, so that a slow moment of the machine hits both.
        pairs = zip(times[name], times["base"], strict=True)
        found[f"{name}_over_base"] = statistics.median(a / b for a, b in pairs)
    return found
