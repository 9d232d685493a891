"""Rows one behind the other in lines: none is lost, none is cut, and nothing is told twice."""

import numpy as np
import pytest
from word_tables import table

from luthier.data.batches import Batch, Batches, Collator
from luthier.data.examples import IGNORED, Examples, Ledger
from luthier.data.order import Order
from luthier.data.packing import best_fit, cut_packed, positions_in_lines

LENGTHS = np.random.default_rng(3).integers(1, 40, 90)


def labelled() -> Examples:
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
    ids = np.arange(LENGTHS.sum(), dtype=np.int32)
    labels = ids.copy()
    labels[::3] = IGNORED
    labels[offsets[:-1]] = IGNORED  # nothing stands before a first token
    told = np.asarray([int((part != IGNORED).sum()) for part in np.split(labels, offsets[1:-1])])
    ledger = Ledger(table([{"text": "x"}] * len(LENGTHS)))
    return Examples(
        ids=ids, offsets=offsets, rows=np.arange(len(LENGTHS)), ledger=ledger, labels=labels, n_targets=told
    )


def batches(pack: bool, **more: int) -> Batches:
    examples = labelled()
    options = {"tokens": 200, **more}
    return Batches(examples, Order(LENGTHS, 16, 0, False), Collator(pad_id=0), pack=pack, **options)


def test_each_row_stands_in_one_line_and_no_line_is_too_long() -> None:
    lines = best_fit(LENGTHS, 40)
    assert sorted(row for line in lines for row in line) == list(range(len(LENGTHS)))
    assert max(int(LENGTHS[line].sum()) for line in lines) <= 40
    assert len(lines) <= -(-LENGTHS.sum() // 40) + 2, "best fit leaves little room"


def test_a_row_goes_where_it_leaves_the_least_room() -> None:
    assert best_fit(np.array([6, 5, 4, 3, 1]), 10) == [[0, 2], [1, 3, 4]]


def test_the_first_lines_are_packed_alone_as_they_were_together() -> None:
    for count in (1, 3, 7):
        lines = best_fit(LENGTHS, 45)[:count]
        rows = np.asarray([row for line in lines for row in line])
        assert [rows[line].tolist() for line in best_fit(LENGTHS[rows], 45)] == lines


@pytest.mark.parametrize("most", [16, 5, 1])
def test_pieces_hold_each_row_once_and_keep_to_the_budget(most: int) -> None:
    rows = np.random.default_rng(1).permutation(len(LENGTHS))[:16]
    pieces = cut_packed(rows, LENGTHS, 100, most)
    assert sorted(np.concatenate(pieces).tolist()) == sorted(rows.tolist())
    assert all(len(piece) <= most for piece in pieces)
    for piece in pieces:
        width = int(LENGTHS[piece].max())
        assert width * len(best_fit(LENGTHS[piece], width)) <= max(100, width)


def pairs_of(batch: Batch, packed: bool) -> list[tuple[int, int]]:
    """Each target with the token before it, as a causal model is asked."""
    ids, labels = batch.inputs["input_ids"][:, :-1], batch.labels[:, 1:]
    told = labels != IGNORED
    assert packed == ("attention_mask" not in batch.inputs)
    return list(zip(ids[told].tolist(), labels[told].tolist(), strict=True))


@pytest.mark.acid("packing", 2)
def test_no_target_is_lost_and_each_follows_the_token_that_it_followed() -> None:
    padded, packed = batches(False), batches(True)
    for step in range(padded.order.steps_per_epoch):
        one, other = (
            sorted(pair for batch in some.step(0, step) for pair in pairs_of(batch, some.pack))
            for some in (padded, packed)
        )
        assert one == other and len(one) == padded.n_targets(0, step)
        assert sum(b.n_targets for b in packed.step(0, step)) == len(one)
        assert sorted(r for b in packed.step(0, step) for r in b.rows) == sorted(padded.order.rows(0, step))


def test_positions_begin_anew_with_each_row() -> None:
    assert positions_in_lines(np.array([3, 2]), [[0, 1]], 6).tolist() == [[0, 1, 2, 0, 1, 2]]


@pytest.mark.acid("packing", 3)
def test_the_share_of_padding_is_that_of_the_batches() -> None:
    for pack in (False, True):
        some = batches(pack, accumulate=2)
        made = [batch for step in range(some.order.steps_per_epoch) for batch in some.step(0, step)]
        held, real = sum(b.inputs["input_ids"].numel() for b in made), sum(b.n_tokens for b in made)
        assert some.padding(packed=pack) == pytest.approx(1 - real / held)
    assert batches(True).padding(packed=True) < batches(True).padding(packed=False) / 2
