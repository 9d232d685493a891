"""What a step on one long text costs, by its length, under longlora and under lora with the model's own attention.

    python -m experiments.long_texts --lengths 1024,2048,4096,8192 --group 512 --blocks 4

The first blocks of sample:smollm2-135m, one text a step, its loss in chunks, as a run has it. Each cell is a process of
its own. Kept: what the pass keeps for the backward pass, counted tensor by tensor, as `luthier memory` counts it. Peak:
what two steps add to the process at its highest. Time: of the second step. `--padded`: a second row of half the length
stands beside it. The last lines are the largest difference between evaluations with the tuning's attention and with the
model's own, at the longest length, in fp32.

    python -m experiments.long_texts --whole --lengths 1024,2048,4096,8192 --group 512 --checkpointing --only longlora

The whole model instead, and a text of words: two steps of one text each, and the loss of a held-out text of the same
length before and after them, with the model's own attention. The texts are Python's help topics (`pydoc_data.topics`),
the held-out one from their end. Times are processor seconds, of the second step and of one evaluation; peak is of the
whole process, and what two steps add to it.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

__all__ = ["main"]


def trunk_of(blocks: int | None) -> Any:
    """A decoder of few blocks, or of all, with its trained weights."""
    import transformers

    from luthier.samples import model_path

    path = model_path("smollm2-135m")
    config = transformers.AutoConfig.from_pretrained(path)
    config.num_hidden_layers = blocks or config.num_hidden_layers
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


def topics(length: int, texts: int) -> list[Any]:
    """Texts of so many tokens, (1, length) each: the first ones of Python's help topics, then the last one."""
    import pydoc_data.topics

    import torch
    import transformers

    from luthier.samples import model_path

    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path("smollm2-135m"))
    words = "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    front = tokenizer(words[: 8 * length * texts], return_tensors="pt")["input_ids"]
    end = tokenizer(words[-8 * length :], return_tensors="pt")["input_ids"][:, -length:]
    assert front.shape[1] >= length * (texts - 1) and end.shape[1] == length
    return [*front[:, : length * (texts - 1)].split(length, 1), torch.as_tensor(end)]


def whole(method: str, length: int, given: argparse.Namespace) -> dict[str, float]:
    """Two steps of the whole model: processor seconds, MiB, and nats a word of a held-out text before and after."""
    import torch

    from luthier import attach
    from luthier.data.batches import Batch
    from luthier.data.tasks import Task
    from luthier.runs.spec import OptimSpec
    from luthier.training.objective import Objective
    from luthier.training.optimiser import Optimiser

    torch.manual_seed(0)
    own = {"group": given.group} if method == "longlora" else {}
    tuned = attach(trunk_of(None), method, sites=("attn.q", "attn.k", "attn.v", "attn.o"), **own)
    if given.checkpointing:
        tuned.checkpoint_activations()

    def of(ids: Any) -> Batch:
        inputs, row = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.arange(1).numpy()
        return Batch(inputs=inputs, labels=ids, rows=row, n_targets=length - 1, n_tokens=length)

    *learnt, held_out = [of(ids) for ids in topics(length, 3)]
    objective = Objective(tuned, Task(name="causal_lm"))
    optimiser = Optimiser(tuned.trained(), tuned.groups(), OptimSpec(), tuned.tuning().method.default_lr)

    def scored() -> float:
        tuned.model.eval()
        with torch.no_grad():
            return float(objective(held_out).loss) / held_out.n_targets

    started = time.process_time()
    before, evaluated = scored(), time.process_time() - started
    low, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0
    tuned.model.train()
    for batch in learnt:
        started = time.process_time()
        (objective(batch).loss / batch.n_targets).backward()
        optimiser.clip(optimiser.norm())
        optimiser.step(1.0)
        tuned.model.zero_grad()
        seconds = time.process_time() - started
    high = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": seconds, "evaluated": evaluated, "peak": high / 1024, "added": (high - low) / 1024,
        "before": before, "after": scored(),
    }  # fmt: skip


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
    parse.add_argument("--whole", action="store_true", help="the whole model, and a text of words")
    parse.add_argument("--cell", default="")
    given = parse.parse_args()
    if given.cell:
        method, length = given.cell.split(":")
        if given.whole:
            print(json.dumps(whole(method, int(length), given)))
            return
        one = apart(int(length), given.group, given.blocks) if method == "apart" else cell(method, int(length), given)
        print(json.dumps(one))
        return

    def asked(name: str) -> Any:
        words = [sys.executable, "-m", "experiments.long_texts", *sys.argv[1:], "--cell", name]
        return json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[-1])

    lengths = [int(n) for n in given.lengths.split(",")]
    methods = (given.only,) if given.only else ("longlora", "lora")
    if given.whole:
        print("| tokens | method | a step | an evaluation | peak MiB | added MiB | before | after |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
        for length in lengths:
            for method in methods:
                f = asked(f"{method}:{length}")
                print(
                    f"| {length} | {method} | {f['seconds']:.1f} | {f['evaluated']:.1f} | {f['peak']:.0f} | "
                    f"{f['added']:.0f} | {f['before']:.4f} | {f['after']:.4f} |",
                    flush=True,
                )
        return
    print("| tokens | method | s | kept MiB | peak MiB |\n|---|---|---|---|---|")
    for length in lengths:
        for method in methods:
            found = asked(f"{method}:{length}")
            print(
                f"| {length} | {method} | {found['seconds']:.2f} | {found['kept']:.0f} | {found['peak']:.0f} |",
                flush=True,
            )
    print(f"\nin evaluation, {lengths[-1]} tokens: apart by {asked(f'apart:{lengths[-1]}')}")


if __name__ == "__main__":
    main()
