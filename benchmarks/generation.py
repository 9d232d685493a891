"""Tokens a second of a tuned model, its tuning beside the weights, against the merged one in plain transformers.

    python benchmarks/generation.py --batch 1,16 --pairs 5
    python benchmarks/generation.py --batch 16 --pairs 60 --by-step --processor

A tuning of random numbers on sample:smollm2-135m (another: --model FOLDER); both write the same number of tokens after
the same prompts, in turn. Prints the ratio unmerged / merged of the seconds of each pair, their median, and the range,
and the ratio of the least seconds of both. With --processor the seconds are the processor's, for a busy machine; with
--by-step a pair is one token of each row, behind the same cache, so that what else runs meets both alike.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from luthier import attach
from luthier.samples import model_path


def seconds(model: Any, ids: torch.Tensor, new: int, clock: Callable[[], float]) -> float:
    start = clock()
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
    assert out.shape[1] == ids.shape[1] + new
    return clock() - start


def seconds_of_a_step(model: Any, ids: torch.Tensor, cache: Any, clock: Callable[[], float]) -> float:
    """One more token for each row of ids (rows, n), whose keys and values are in the cache; it is as before then."""
    with torch.inference_mode():
        if not cache.get_seq_length():
            model(input_ids=ids, past_key_values=cache, use_cache=True)
        start = clock()
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        took = clock() - start
    cache.crop(-1)
    return took


def main() -> None:
    told = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    told.add_argument("--model", default=None)
    told.add_argument("--method", default="lora")
    told.add_argument("--batch", default="1,16")
    told.add_argument("--new", type=int, default=24)
    told.add_argument("--pairs", type=int, default=5)
    told.add_argument("--processor", action="store_true")
    told.add_argument("--by-step", action="store_true")
    given = told.parse_args()
    clock = time.process_time if given.processor else time.perf_counter
    path = given.model or model_path("smollm2-135m")
    merged, base = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for _ in range(2))
    tuned, folded = attach(base, given.method), attach(merged, given.method)
    for side in (tuned, folded):
        for number, parameter in enumerate(side.trained().values()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.data.add_(0.01 * noise)
    tuned.forward.route_attention()
    tuned.fast.accelerate(training=False)
    plain = folded.merge()
    print("| rows | seconds unmerged / merged, median | range | of the least seconds | tokens a second unmerged |")
    print("|---|---|---|---|---|")
    for rows in map(int, given.batch.split(",")):
        ids = torch.randint(10, 1000, (rows, 24), generator=torch.Generator().manual_seed(0))
        ratios, ones, others = [], [], []
        caches = {id(model): DynamicCache(config=model.config) for model in (tuned.model, plain)}
        with tuned.serving():
            for pair in range(given.pairs + 1):
                both = (tuned.model, plain) if pair % 2 else (plain, tuned.model)
                if given.by_step:
                    took = {id(m): seconds_of_a_step(m, ids, caches[id(m)], clock) for m in both}
                else:
                    took = {id(m): seconds(m, ids, given.new, clock) for m in both}
                one, other = took[id(tuned.model)], took[id(plain)]
                if pair:  # the first warms up
                    ratios.append(one / other)
                    ones.append(one)
                    others.append(other)
        span = f"{min(ratios):.2f} to {max(ratios):.2f}"
        least, speed = min(ones) / min(others), rows * (1 if given.by_step else given.new) / min(ones)
        print(f"| {rows} | {statistics.median(ratios):.2f} | {span} | {least:.2f} | {speed:.0f} |", flush=True)


if __name__ == "__main__":
    main()
