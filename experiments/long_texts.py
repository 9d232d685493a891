"""What a step on one long text costs, by its length, under longlora and under lora with the model's own attention.

    python -m experiments.long_texts --lengths 1024,2048,4096 --group 512 --blocks 4

The first blocks of sample:smollm2-135m, one text a step, without the output matrix. Each cell is a process of its own;
memory is what a step adds to the process at its highest, time that of the second step. The last lines are the largest
difference between evaluations with the tuning's attention and with the model's own, at the longest length, in fp32.
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


def cell(method: str, length: int, group: int, blocks: int) -> dict[str, float]:
    """Seconds and MiB of a step."""
    import torch

    from luthier import attach

    torch.manual_seed(0)
    model = trunk_of(blocks)
    places = {"sites": ("attn.q", "attn.k", "attn.v", "attn.o")}
    own = {"group": group, "embedding": False} if method == "longlora" else {}
    attach(model, method, **places, **own)
    ids = torch.randint(0, 40000, (1, length))
    trunk = model.model
    trunk.eval()
    with torch.no_grad():
        asleep = trunk(input_ids=ids[:, :64]).last_hidden_state
    assert torch.isfinite(asleep).all()
    trunk.train()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        started = time.perf_counter()
        trunk(input_ids=ids, use_cache=False).last_hidden_state.square().mean().backward()
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "mib": (peak - before) / 1024}


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
    parse.add_argument("--cell", default="")
    given = parse.parse_args()
    if given.cell:
        method, length = given.cell.split(":")
        if method == "apart":
            print(json.dumps(apart(int(length), given.group, given.blocks)))
        else:
            print(json.dumps(cell(method, int(length), given.group, given.blocks)))
        return
    more = ["--group", str(given.group), "--blocks", str(given.blocks)]

    def asked(name: str) -> Any:
        words = [sys.executable, "-m", "experiments.long_texts", *more, "--cell", name]
        return json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[-1])

    lengths = [int(n) for n in given.lengths.split(",")]
    print("| tokens | longlora s | lora s | longlora MiB | lora MiB |\n|---|---|---|---|---|")
    for length in lengths:
        one, other = asked(f"longlora:{length}"), asked(f"lora:{length}")
        row = (f"{one['seconds']:.2f}", f"{other['seconds']:.2f}", f"{one['mib']:.0f}", f"{other['mib']:.0f}")
        print(f"| {length} | {' | '.join(row)} |", flush=True)
    print(f"\nin evaluation, {lengths[-1]} tokens: apart by {asked(f'apart:{lengths[-1]}')}")


if __name__ == "__main__":
    main()
