"""How a step grows with tokens, layers, rank and tunings, on a Llama-shaped random model; the start, with rows."""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks._ours import Marks
from benchmarks._work import MODELS
from luthier.data.batches import Batch
from luthier.data.encode import encode
from luthier.data.rows import load_rows
from luthier.data.tasks import Task
from luthier.runs.spec import BatchSpec, DataSpec, OptimSpec, RunSpec
from luthier.surgery import attach
from luthier.training.objective import Objective
from luthier.training.optimiser import Optimiser
from luthier.workflow import prepare, train

__all__ = ["fit", "layers", "length", "rank", "rows", "tokens", "tunings"]

WIDTH, INNER, HEADS, KEY_HEADS, LAYERS, VOCABULARY = 256, 688, 8, 4, 4, 8192


def fit(sizes: Sequence[float], seconds: Sequence[float]) -> dict[str, float]:
    """Least squares of `seconds = fixed + slope · size`, each point weighted by its own time.

    Returns:
        fixed, slope; worst: the largest distance of a point from the line, as a share of the point.
    """
    x, y = np.asarray(sizes, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    design = np.stack([np.ones_like(x), x], axis=1) / y[:, None]
    (fixed, slope), *_ = np.linalg.lstsq(design, np.ones_like(y), rcond=None)
    return {"fixed": float(fixed), "slope": float(slope), "worst": float(np.abs((fixed + slope * x) / y - 1).max())}


def _step(
    n_layers: int = LAYERS, rank: int = 8, batch: int = 4, length: int = 128, n_tunings: int = 1
) -> Callable[[], Any]:
    """One optimiser step of LoRA (q, v) as a function without arguments."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=n_layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    tuned = attach(model, "lora", seed=0, rank=rank)
    for number in range(1, n_tunings):
        tuned.add("lora", name=f"more{number}", seed=number)
    tuned.activate("default")
    tuned.train_only("default")
    tuned.forward.route_attention()
    objective = Objective(tuned, Task(name="causal_lm"))
    optimiser = Optimiser(tuned.trained(), tuned.groups(), OptimSpec(), 1e-3)
    ids = torch.randint(0, VOCABULARY, (batch, length))
    some = Batch(
        inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        labels=ids,
        rows=np.arange(batch),
        n_targets=batch * (length - 1),
        n_tokens=batch * length,
    )

    def step() -> None:
        torch.autograd.backward(objective(some).loss / some.n_targets)
        optimiser.clip(optimiser.norm())
        optimiser.step(1.0)
        optimiser.zero_grad()

    return step


def _compare(sizes: Sequence[int], steps: Sequence[Callable[[], Any]], repeats: int) -> dict[str, Any]:
    times: list[list[float]] = [[] for _ in steps]
    for turn in range(repeats + 2):
        for place, step in zip(times, steps, strict=True):
            start = time.perf_counter()
            step()
            if turn >= 2:
                place.append(time.perf_counter() - start)
    medians = [statistics.median(t) for t in times]
    return {"sizes": list(sizes), "step_ms": [1e3 * m for m in medians], "fit": fit(sizes, medians)}


def tokens(counts: Sequence[int] = (2, 4, 8, 16, 32), repeats: int = 10) -> dict[str, Any]:
    """Step time against tokens: more rows of 128 tokens."""
    found = _compare([128 * n for n in counts], [_step(batch=n) for n in counts], repeats)
    return {**found, "size": "tokens, rows of 128"}


def length(lengths: Sequence[int] = (64, 128, 256, 512, 1024), repeats: int = 5) -> dict[str, Any]:
    """Step time against tokens: two rows, longer and longer. Attention adds a share that grows with the square."""
    found = _compare([2 * n for n in lengths], [_step(batch=2, length=n) for n in lengths], repeats)
    return {**found, "size": "tokens, 2 rows"}


def layers(counts: Sequence[int] = (2, 4, 8, 16), repeats: int = 10) -> dict[str, Any]:
    """Step time against layers, 4 rows of 128 tokens."""
    return {**_compare(counts, [_step(n_layers=n) for n in counts], repeats), "size": "layers"}


def rank(ranks: Sequence[int] = (1, 8, 32, 64, 128), repeats: int = 10) -> dict[str, Any]:
    """Step time against LoRA's rank."""
    return {**_compare(ranks, [_step(rank=n) for n in ranks], repeats), "size": "rank"}


def tunings(counts: Sequence[int] = (1, 2, 8, 32), repeats: int = 10) -> dict[str, Any]:
    """Step time against the tunings that lie on the model; one is active and trains."""
    return {**_compare(counts, [_step(n_tunings=n) for n in counts], repeats), "size": "tunings on the model"}


def rows(n: int = 10_000) -> dict[str, Any]:
    """Seconds from the start to the end of the first step, with `n` new rows: encoded anew, then read from the cache.

    Returns:
        read: the rows parsed and checked, by itself; encode: what `prepare` spends in encoding; rest: all else.
    """
    words = ("what", "who", "where", "how", "many", "is", "the", "of", "a", "city", "river", "year", "man", "book")
    made = np.random.default_rng()  # new rows each time: else they would be in the cache
    spent: list[float] = []

    def timed(*args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        examples = encode(*args, **options)
        spent.append(time.perf_counter() - start)
        return examples

    found: dict[str, Any] = {"rows": n}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        with path.open("w") as out:
            for number in range(n):
                text = " ".join(words[int(i)] for i in made.integers(0, len(words), size=8))
                out.write(f'{{"text": "{text} {number}", "label": "{"ABC"[number % 3]}"}}\n')
        start = time.perf_counter()
        load_rows(str(path))
        read = found["read_seconds"] = time.perf_counter() - start
        with mock.patch("luthier.workflow.preparation.encode", timed):
            for run in ("anew", "again"):
                spec = RunSpec(
                    model=f"sample:{MODELS['encoder']}",
                    data=DataSpec(source=str(path), text="text", label="label", test_share=0.0),
                    steps=100,
                    out=str(Path(folder) / run),
                    batch=BatchSpec(size=32),
                )
                start = time.perf_counter()
                prepared = prepare(spec)
                marks = Marks()
                train(spec, listener=marks, prepared=prepared, stop_at=1)
                first = marks.marks[1] - start
                encoding = spent.pop()
                found |= {
                    f"{run}_first_step_seconds": first,
                    f"{run}_encode_seconds": encoding,
                    f"{run}_rest_seconds": first - read - encoding,
                }
        kept = [note.rpartition(" ")[2] for note in prepared.train.ledger.notes if "kept in" in note]
        for entry in kept:  # of no use to anybody
            shutil.rmtree(entry)
    return found
