"""Without rows, the steps that are forecast are cut as a run cuts its own."""

import numpy as np
import pytest

from luthier.data.batches import cut
from luthier.runs.spec import BatchSpec, DataSpec, RunSpec
from luthier.workflow.lengths import assumed_steps


@pytest.mark.parametrize(
    "batch",
    [
        BatchSpec(size=8),
        BatchSpec(size=8, accumulate=4),
        BatchSpec(size=32, tokens=4096),
        BatchSpec(size=32, tokens=4096, pad_to=64),
        BatchSpec(size=9, accumulate=2, pad_to=16),
    ],
)
def test_rows_of_one_length_are_cut_as_in_a_run(batch: BatchSpec) -> None:
    spec = RunSpec(model="m", data=DataSpec(source="d"), batch=batch, steps=3)
    lengths = np.full(batch.size, 300)
    pieces = cut(np.arange(batch.size), lengths, batch.tokens, -(-batch.size // batch.accumulate), batch.pad_to)
    wide = -(-300 // batch.pad_to) * batch.pad_to
    found = assumed_steps(spec, 300)
    assert found.widest == (len(pieces[0]), wide)
    assert (found.pieces, found.tokens, found.rows) == (len(pieces), batch.size * wide, batch.size)
