"""What a step on one long text costs, by its length, under longlora and under lora with the model's own attention.

    python -m experiments.long_texts --lengths 1024,2048,4096,8192 --group 512 --blocks 4

The first blocks of sample:smollm2-135m, one text a step, its loss in chunks, as a run has it. Each cell is a process of
its own. Kept: what the pass keeps for the backward pass, counted tensor by tensor, as `luthier memory` counts it. Peak:
what two steps add to the process at its highest. Time: of the second step. `--padded`: a second row of half the length
stands beside it. The last lines are the largest difference between evaluations with the tuning's attention and with the
model's own, at the longest length, in fp32.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

__all__ = ["main"]


def trunk_of(blocks: int) -> Any:
    """A decoder of few blocks, with its trained weights."""
    import transformers

    from luthier.samples import model_path

    path = model_path("smollm2-135m")
    config = transformers.AutoConfig.from_pretrained(path)
    config.num_hidden_layers = blocks
    return transformers.AutoModelForCausalLM.from_pretrained(path, config=config)


def cell(method: str, length: int, given: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step, MiB that it keeps, and MiB at its highest."""
    import torch

    from luthier import attach
    from luthier.data.batches import Batch
    from luthier.data.tasks import Task
    from luthier.runs.spec import OptimSpec
    from luthier.training.memory_parts import Parts
    from luthier.training.objective import Objective
    from luthier.training.optimiser import Optimiser

    torch.manual_seed(0)
    own = {"group": given.group, "embedding": given.embedding} if method == "longlora" else {}
    tuned = attach(trunk_of(given.blocks), method, sites=("attn.q", "attn.k", "attn.v", "attn.o"), **own)
    if given.checkpointing:
        tuned.model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(1, 40000, (1 + given.padded, length))
    there = torch.ones_like(ids)
    there[1:, length // 2 :] = 0
    labels = ids.masked_fill(there == 0, -100)
    batch = Batch(
        inputs={"input_ids": ids, "attention_mask": there}, labels=labels, rows=torch.arange(len(ids)).numpy(),
        n_targets=int(there.sum()) - len(ids), n_tokens=int(there.sum()),
    )  # fmt: skip
    objective = Objective(tuned, Task(name="causal_lm"))
    assert objective.chunked
    parts = Parts(tuned, Optimiser(tuned.trained(), [], OptimSpec(), 1e-3), torch.device("cpu"))
    tuned.model.train()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        started = time.perf_counter()
        with parts.watching():
            loss = objective(batch).loss
        loss.backward()
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counted = parts.counted()
    kept = counted["activations"] + counted.get("logits", 0)
    return {"seconds": seconds, "kept": kept / 2**20, "peak": (peak - before) / 1024}


def apart(length: int, group: int, blocks: int) -> float:
    """In evaluation: the largest difference to the model's own attention, at a length."""
    import torch

    from luthier import attach

    model = trunk_of(blocks).float().eval()
    ids = torch.randint(0, 40000, (1, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = model.model(input_ids=ids, use_cache=False).last_hidden_state
        attach(model, "longlora", group=group, embedding=False)
        model.eval()
        return float((model.model(input_ids=ids, use_cache=False).last_hidden_state - plain).abs().max())


def main() -> None:
    """Measure and print."""
    parse = argparse.ArgumentParser()
    parse.add_argument("--lengths", default="1024,2048,4096")
    parse.add_argument("--group", type=int, default=512)
    parse.add_argument("--blocks", type=int, default=4)
    parse.add_argument("--embedding", action="store_true", help="longlora's word embedding trains, as it does unasked")
    parse.add_argument("--checkpointing", action="store_true", help="blocks are computed again in the backward pass")
    parse.add_argument("--padded", action="store_true", help="beside a text of half the length")
    parse.add_argument("--only", choices=("longlora", "lora"), help="one of the two")
    parse.add_argument("--cell", default="")
    given = parse.parse_args()
    if given.cell:
        method, length = given.cell.split(":")
        one = apart(int(length), given.group, given.blocks) if method == "apart" else cell(method, int(length), given)
        print(json.dumps(one))
        return

    def asked(name: str) -> Any:
        words = [sys.executable, "-m", "experiments.long_texts", *sys.argv[1:], "--cell", name]
        return json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[-1])

    lengths = [int(n) for n in given.lengths.split(",")]
    print("| tokens | method | s | kept MiB | peak MiB |\n|---|---|---|---|---|")
    for length in lengths:
        for method in (given.only,) if given.only else ("longlora", "lora"):
            found = asked(f"{method}:{length}")
            print(
                f"| {length} | {method} | {found['seconds']:.2f} | {found['kept']:.0f} | {found['peak']:.0f} |",
                flush=True,
            )
    print(f"\nin evaluation, {lengths[-1]} tokens: apart by {asked(f'apart:{lengths[-1]}')}")


if __name__ == "__main__":
    main()
