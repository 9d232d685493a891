"""Bases in codes on a real language model: bytes, loss before and after training, how near each start is to the floats.

    python benchmarks/stored_bases.py [--steps 12] [--more] [--model sample:smollm2-135m] [--data sample:chitchat]

Writes the tables of docs/stored-bases.md between their marks. Each run is of the same rows, seed and steps.
"""

import argparse
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from luthier import train
from luthier.data.batches import Batch
from luthier.data.tasks import Task
from luthier.surgery import Tuned, attach
from luthier.training.objective import Objective
from luthier.workflow.load_model import find_model, load_model, load_tokenizer

PAGE = Path(__file__).parent.parent / "docs" / "stored-bases.md"
RUNS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("lora", "bf16", {"sites": ["*"], "rank": 64}),
    ("qlora", "nf4", {}),
    ("qa_lora", "int4", {}),
    ("loftq", "nf4", {"rank": 64}),
)
TEXT = "The first bridge over the river was built of oak, and the second one, three centuries later, of stone and iron."


def loaded(name: str, store: str | None) -> Any:
    return load_model(
        find_model(name), Task(name="causal_lm"), dtype=torch.float32, device=torch.device("cpu"), seed=0, store=store
    )[0]  # fmt: skip


def n_bytes(model: Any) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


@torch.no_grad()
def gap(model: Any, ids: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float]:
    """How far the logits are from the float model's, as a share of those; and the mean KL divergence a token."""
    logits = model(input_ids=ids).logits
    ours, theirs = logits.log_softmax(-1), wanted.log_softmax(-1)
    kl = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    return float((logits - wanted).norm() / wanted.norm()), float(kl)


def starts(name: str, more: bool) -> list[str]:
    """One line for each store and start: bytes, and how near the untrained model is to the float one."""
    plain = loaded(name, None)
    ids = torch.tensor([load_tokenizer(find_model(name))(TEXT)["input_ids"]])
    with torch.no_grad():
        wanted = plain(input_ids=ids).logits
    whole = n_bytes(plain)
    lines = [
        "| base | start | bytes (MB) | share of fp32 | logits off | KL |", "| --- | --- | --- | --- | --- | --- |",
        f"| fp32 | - | {whole / 1e6:.0f} | 1 | 0 | 0 |",
    ]  # fmt: skip
    for store in ("int8", "nf4", "int4", "int2"):
        model = loaded(name, store)
        size = n_bytes(model)
        wishes: list[tuple[str, dict[str, Any]]] = [("-", {})]
        if store in ("nf4", "int2"):
            wishes += [("loftq, rank 16", {"rank": 16})]
        if store in ("nf4", "int2") and more:
            wishes += [("loftq, rank 64", {"rank": 64}), ("loftq, rank 64, 5 rounds", {"rank": 64, "rounds": 5})]
        for words, settings in wishes:
            tuned: Tuned | None = attach(model, "loftq", **settings) if settings else None
            off, kl = gap(model, ids, wanted)
            lines += [f"| {store} | {words} | {size / 1e6:.0f} | {size / whole:.3f} | {off:.4f} | {kl:.4f} |"]
            print(lines[-1], flush=True)
            if tuned is not None:
                tuned.detach()
        if store == "nf4":
            size -= sum(p.nbytes for p in model.parameters()) // 2
            lines += [f"| {store}, the rest in bf16 | - | {size / 1e6:.0f} | {size / whole:.3f} | - | - |"]
    return lines


def runs(name: str, data: str, steps: int) -> list[str]:
    """One line for each run: its loss on held-out rows."""
    lines = ["| method | base | held-out loss | minus lora on bf16 | seconds |", "| --- | --- | --- | --- | --- |"]
    first: float | None = None
    with tempfile.TemporaryDirectory() as folder:
        for method, store, settings in RUNS:
            start = time.perf_counter()
            done = train(
                name, data, method=method, store=store, steps=steps, batch=4, threads=1, lr=2e-4, eval_rows=24,
                max_length=192, out=f"{folder}/{method}", progress=False, **settings,
            )  # fmt: skip
            took, loss = time.perf_counter() - start, float(done.record.scores["loss"])
            first = loss if first is None else first
            lines += [f"| {method} | {store} | {loss:.4f} | {loss - first:+.4f} | {took:.0f} |"]
            print(lines[-1], flush=True)
            write("runs", lines)  # a later one may be stopped
    return lines


def steps_of(name: str, rounds: int = 3) -> list[str]:
    """Processor seconds of a forward and a backward pass, LoRA of rank 64 at every projection, turn by turn."""
    ids = torch.randint(1, 40000, (4, 192), generator=torch.Generator().manual_seed(0))
    batch = Batch(
        inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels=ids, rows=torch.arange(4).numpy(),
        n_targets=4 * 191, n_tokens=4 * 192,
    )  # fmt: skip
    torch.set_num_threads(1)
    objectives: dict[str, Objective] = {}
    for store in ("bf16", "nf4"):
        model = load_model(
            find_model(name), Task(name="causal_lm"), dtype=torch.bfloat16, device=torch.device("cpu"), seed=0,
            store=None if store == "bf16" else store,
        )[0]  # fmt: skip
        tuned = attach(model, "lora", sites=("*",), rank=64)
        tuned.fast.accelerate()
        objectives[store] = Objective(tuned, Task(name="causal_lm"))
        model.train()
    found: dict[str, list[tuple[float, float]]] = {store: [] for store in objectives}
    for _ in range(rounds):
        for store, objective in objectives.items():
            start = time.process_time()
            loss = objective(batch).loss
            middle = time.process_time()
            loss.backward()
            found[store].append((middle - start, time.process_time() - middle))
            objective.tuned.model.zero_grad()
            print(store, found[store][-1], flush=True)
    lines = ["| base | forward | backward | both |", "| --- | --- | --- | --- |"]
    for store, pairs in found.items():
        there, back = (sorted(values)[rounds // 2] for values in zip(*pairs, strict=True))
        lines += [f"| {store} | {there:.2f} | {back:.2f} | {there + back:.2f} |"]
    ratios = [sum(codes) / sum(plain) for plain, codes in zip(found["bf16"], found["nf4"], strict=True)]
    shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    return [*lines, "", f"nf4 over bf16, pair by pair: {shown}; at most 1.5 is wanted."]


def exact(name: str) -> list[str]:
    """What merging qa_lora into int4 changes in the logits of a tuning that is far from its start."""
    model = loaded(name, "int4")
    ids = torch.tensor([load_tokenizer(find_model(name))(TEXT)["input_ids"]])
    tuned = attach(model, "qa_lora")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        base = model(input_ids=ids).logits
        for parameter in tuned.trained().values():
            parameter += 0.002 * torch.randn(parameter.shape, generator=generator)
        wanted = model(input_ids=ids).logits
        codes = {n: b.clone() for n, b in model.named_buffers() if n.endswith((".codes", ".alpha"))}
        merged = tuned.merge()
        found = merged(input_ids=ids).logits
    same = all(torch.equal(b, codes[n]) for n, b in merged.named_buffers() if n in codes)
    return [
        f"qa_lora merged into int4: logits differ by {(found - wanted).norm() / wanted.norm():.1e} of their size; "
        f"the tuning changes them by {(wanted - base).norm() / base.norm():.1e}; codes and alphas "
        f"{'are the same bits' if same else 'have CHANGED'}."
    ]


def write(part: str, lines: list[str]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    pattern = rf"(<!-- {part} -->\n).*?(<!-- end -->)"
    PAGE.write_text(
        re.sub(pattern, lambda m: m[1] + "\n".join(lines) + "\n" + m[2], page, flags=re.S), encoding="utf-8"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sample:smollm2-135m")
    parser.add_argument("--data", default="sample:chitchat")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--more", action="store_true", help="also loftq at rank 64, and with five rounds: slow")
    parser.add_argument("--part", choices=("all", "starts", "steps", "runs", "exact"), default="all")
    args = parser.parse_args()
    if args.part in ("all", "exact"):
        write("exact", exact(args.model))
    if args.part in ("all", "starts"):
        write("starts", starts(args.model, args.more))
    if args.part in ("all", "steps"):
        write("steps", steps_of(args.model))
    if args.part in ("all", "runs"):
        write("runs", runs(args.model, args.data, args.steps))


if __name__ == "__main__":
    main()
