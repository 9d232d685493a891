"""Whether every step of a run is one micro-batch, where it has to be."""

from __future__ import annotations

from luthier.core import ConfigError
from luthier.data.batches import Batches, cut
from luthier.runs.spec import RunSpec

__all__ = ["refuse_cut_steps", "why_cut"]


def why_cut(spec: RunSpec, batches: Batches) -> str:
    """Why a step would be cut into several micro-batches, and what to set; empty where none is."""
    if spec.batch.accumulate > 1:
        return f"batch.accumulate is {spec.batch.accumulate}. Use 1."
    lengths, order = batches.examples.lengths, batches.order
    widest = (-lengths).argsort(kind="stable")[: order.size]
    if len(cut(widest, lengths, spec.batch.tokens, order.size, spec.batch.pad_to)) == 1:
        return ""
    wide = -(-int(lengths.max()) // spec.batch.pad_to) * spec.batch.pad_to
    return (
        f"{order.size} rows of up to {wide} tokens are cut into micro-batches at batch.tokens = {spec.batch.tokens}, "
        f"and a step must be one piece. Use batch.tokens = {wide * order.size}, or batch.size = "
        f"{max(1, spec.batch.tokens // wide)}."
    )


def refuse_cut_steps(names: list[str], spec: RunSpec, batches: Batches) -> None:
    """Raises: ConfigError: strategies whose rows must see one another, and a step that is cut."""
    reason = why_cut(spec, batches) if names else ""
    if reason:
        raise ConfigError(f"strategy {' and '.join(names)} needs the rows of a step together: {reason}")
