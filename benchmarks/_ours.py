"""luthier as a contestant: `luthier.training.train` as a user calls it."""

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.models.bert import modeling_bert
from transformers.models.llama import modeling_llama

from benchmarks._work import MODELS, blocks, measured, model_folder, now, rows, write_rows
from luthier.runs.spec import BatchSpec, CheckpointSpec, DataSpec, RunSpec
from luthier.training import Listener
from luthier.workflow import prepare, train

__all__ = ["Marks", "decoder", "encoder"]

# luthier imports these when it needs them; the peers import them at the top. Imports are no part of either's time.
_IMPORTED = (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, modeling_bert, modeling_llama)


class Marks(Listener):
    """Times, losses and sizes of the steps."""

    def __init__(self) -> None:
        self.marks: list[float] = []
        self.losses: list[float] = []
        self.sizes: list[tuple[int, int]] = []
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def start(self, total: int, done: int) -> None:
        self.marks.append(now())

    def step(self, step: int, row: dict[str, Any], tokens: int, rows: int) -> None:
        self.marks.append(now())
        self.losses.append(row["loss"])
        self.sizes.append((rows, tokens))


def _result(marks: Marks, result: Any, seconds: float, skip: int) -> dict[str, Any]:
    n_rows = sum(n for n, _ in marks.sizes)
    n_tokens = sum(n for _, n in marks.sizes)
    return {
        **measured(marks.marks, marks.sizes, skip),
        "rows_per_second": n_rows / seconds,
        "tokens_per_second": n_tokens / seconds,
        "total_seconds": seconds,
        "steps": len(marks.losses),
        "last_loss": float(np.mean(marks.losses[-10:])),
        "losses": marks.losses,
        **{n: float(v) for n, v in result.scores.items() if n == "accuracy"},
        "stored_bytes": result.stored_bytes,
        "trained_numbers": result.n_params,
        "peak_bytes": result.peak_bytes or 0,
    }


def encoder(
    sample: str = "trec6",
    model: str = "encoder",
    method: str = "lora",
    steps: int | None = None,
    seed: int = 0,
    batch: int = 32,
    test: bool = False,
    lr: float | None = None,
    precision: str = "auto",
    settings: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
    most: int | None = None,
) -> dict[str, Any]:
    """From rows to a trained and saved tuning; with `steps`, only so many of the first epoch.

    Args:
        most: rows that are read, at most; left out, all.
        test: score the test rows at the end; else no row is held out, and nothing is scored.
    """
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        if test:
            data = DataSpec(source=f"sample:{sample}")
        else:
            path = write_rows(Path(folder) / "rows.jsonl", rows(sample)[:most])
            data = DataSpec(source=str(path), text="text", label="label", test_share=0.0)
        spec = RunSpec.from_plain(
            {
                "model": f"sample:{MODELS[model]}",
                "data": {},
                "method": method,
                "settings": settings or {},
                "epochs": None if steps else 1.0,
                "steps": steps,
                "seed": seed,
                "precision": precision,
                "out": str(Path(folder) / "run"),
                "batch": {"size": batch},
                "optim": {"lr": lr} if lr else {},
                **(extra or {}),
            }
            | {"data": {k: v for k, v in vars(data).items() if v is not None}}
        )
        if test:
            spec = replace(spec, eval=replace(spec.eval, every=0))
        marks = Marks()
        result = train(spec, listener=marks)
        seconds = time.perf_counter() - start
        return _result(marks, result, seconds, skip=min(3, len(marks.losses) - 1))


def decoder(
    model: str = "decoder",
    method: str = "lora",
    batch: int = 8,
    length: int = 256,
    supervised: float = 1.0,
    steps: int = 6,
    precision: str = "auto",
    settings: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """`steps` steps of `batch` rows of `length` random tokens, the last share of them supervised."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_rows(
            Path(folder) / "rows.jsonl", [{"text": f"row number {i} of the data"} for i in range(steps * batch)]
        )
        spec = RunSpec(
            model=str(model_folder(model, Path(folder) / "model")),
            data=DataSpec(source=str(path), text="text", test_share=0.0),
            method=method,
            settings=settings or {},
            steps=steps,
            precision=precision,  # type: ignore[arg-type]
            out=str(Path(folder) / "run"),
            batch=BatchSpec(size=batch),
            checkpoint=CheckpointSpec(),
            max_length=length,
            **(extra or {}),
        )
        prepared = prepare(spec)
        n_vocab = len(prepared.tokenizer)
        ids, labels = blocks(steps * batch, length, n_vocab, supervised)
        # The first token of an example never carries loss: nothing stands before it.
        labels[:, 0] = -100
        examples = replace(
            prepared.train,
            ids=ids.astype(np.int32).reshape(-1),
            offsets=np.arange(len(ids) + 1, dtype=np.int64) * length,
            rows=np.arange(len(ids), dtype=np.int64),
            n_targets=(labels != -100).sum(1).astype(np.int64),
            labels=labels.astype(np.int32).reshape(-1),
        )
        marks = Marks()
        start = time.perf_counter()
        result = train(spec, listener=marks, prepared=replace(prepared, train=examples))
        return _result(marks, result, time.perf_counter() - start, skip=1)
