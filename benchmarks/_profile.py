"""Where the time and the memory of a training run go.

table   operations by their own time, and what is left for Python
saved   what one forward pass keeps for its backward pass, by type and shape
"""

import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import _machine, _ours

__all__ = ["saved", "table"]


class _Window(_ours.Marks):
    """Switches a profiler on for some steps of a run."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.first, self.last = first, last
        self.profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
        self.wall = self.cpu = 0.0

    def step(self, step: int, row: dict[str, Any], tokens: int, rows: int) -> None:
        super().step(step, row, tokens, rows)
        if step == self.first:
            self.profiler.start()
            self.wall, self.cpu = time.perf_counter(), time.process_time()
        if step == self.last:
            self.wall, self.cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
            self.profiler.stop()


def table(kind: str, threads: int | None, steps: int | None = None) -> str:
    """Profile luthier's training of the encoder or decoder case, and print operations by their own time."""
    if threads is not None:
        torch.set_num_threads(threads)
    first, last = (5, 35) if kind == "encoder" else (1, 4)
    if steps is not None:
        last = first + steps
    window = _Window(first, last)
    kept = _ours.Marks
    _ours.Marks = lambda: window  # type: ignore[assignment,misc]
    try:
        if kind == "encoder":
            _ours.encoder(steps=last + 1)
        else:
            _ours.decoder(steps=last + 1)
    finally:
        _ours.Marks = kept  # type: ignore[misc]
    events = window.profiler.key_averages()
    inside = sum(e.self_cpu_time_total for e in events) / 1e6
    text = events.table(sort_by="self_cpu_time_total", row_limit=35, max_name_column_width=48)
    shaped = window.profiler.key_averages(group_by_input_shape=True).table(
        sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=40, max_shapes_column_width=70
    )
    n = last - first
    return (
        f"{kind}, {n} steps, threads {torch.get_num_threads()}: wall {window.wall:.2f} s, processor {window.cpu:.2f} s;"
        f" inside operations {inside:.2f} s, between them {window.wall - inside:.2f} s"
        f" ({1 - inside / window.wall:.0%} of the wall, profiler's own cost included);"
        f" peak {_machine.peak_bytes() / (1 << 20):.0f} MiB\n{text}\n{shaped}"
    )


class _Kept(_ours.Marks):
    """Notes each tensor that a forward pass saves; a step ends a note and begins the next."""

    def __init__(self) -> None:
        super().__init__()
        self.now: dict[int, tuple[str, int]] = {}
        self.last: dict[int, tuple[str, int]] = {}

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        weight = " weight" if tensor.is_leaf and not tensor.requires_grad and tensor.dim() <= 2 else ""
        words = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}{weight}"
        # Views of one piece of memory count once, as what was seen first.
        self.now.setdefault(storage.data_ptr(), (words, storage.nbytes()))
        return tensor

    def step(self, step: int, row: dict[str, Any], tokens: int, rows: int) -> None:
        super().step(step, row, tokens, rows)
        self.last, self.now = self.now, {}


def saved(kind: str) -> str:
    """What the forward pass of a step keeps for the backward pass. A leaf that does not train is marked as a weight.

    Tensors that a function holds beside `save_for_backward` are not seen.
    """
    kept = _Kept()
    marks = _ours.Marks
    _ours.Marks = lambda: kept  # type: ignore[assignment,misc]
    try:
        with torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda tensor: tensor):
            _ = _ours.encoder(steps=2) if kind == "encoder" else _ours.decoder(steps=2)
    finally:
        _ours.Marks = marks  # type: ignore[misc]
    by_shape: dict[str, list[int]] = {}
    for words, size in kept.last.values():
        by_shape.setdefault(words, []).append(size)
    lines = sorted(((sum(sizes), len(sizes), words) for words, sizes in by_shape.items()), reverse=True)
    total = sum(size for size, _, words in lines if not words.endswith("weight"))
    text = [f"{kind}: {total / (1 << 20):.0f} MiB saved for the backward pass of the last step, weights left out"]
    text += [f"{size / (1 << 20):9.1f} MiB  {count:5} x {words}" for size, count, words in lines[:25]]
    return "\n".join(text)
