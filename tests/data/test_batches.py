import itertools

import numpy as np
import pytest
import torch
from word_tables import table, word_tokenizer

from luthier.core import DataError
from luthier.data.batches import Batches, Collator, EvalBatches, in_order
from luthier.data.columns import Columns
from luthier.data.encode import encode
from luthier.data.examples import IGNORED, Examples, Ledger
from luthier.data.order import MEGA_STEPS, Order, shuffled
from luthier.data.tasks import Task


def examples_of(lengths, **more):
    lengths = np.asarray(lengths, dtype=np.int64)
    n = len(lengths)
    rows = table([{"text": "x"}] * n)
    return Examples(
        ids=np.arange(lengths.sum(), dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        rows=np.arange(n),
        n_targets=np.ones(n, dtype=np.int64),
        ledger=Ledger(rows),
        **more,
    )


LENGTHS = np.random.default_rng(0).integers(1, 60, 103)


def epoch_of(order, epoch):
    return [tuple(order.rows(epoch, s).tolist()) for s in range(order.steps_per_epoch)]


@pytest.mark.parametrize("group", [True, False])
def test_an_epoch_holds_each_example_once_and_epochs_differ(group):
    order = Order(LENGTHS, 8, 3, group)
    assert order.steps_per_epoch == 13
    first, second = epoch_of(order, 0), epoch_of(order, 1)
    assert sorted(itertools.chain(*first)) == list(range(103))
    assert sorted(len(rows) for rows in first) == [7] + [8] * 12
    assert first != second


@pytest.mark.parametrize("group", [True, False])
def test_a_step_follows_from_seed_epoch_and_step_alone(group):
    order = Order(LENGTHS, 8, 3, group)
    everything = [epoch_of(order, e) for e in range(4)]
    for epoch, step in [(3, 12), (0, 0), (2, 5), (0, 12), (1, 1)]:
        assert tuple(Order(LENGTHS, 8, 3, group).rows(epoch, step)) == everything[epoch][step]
        assert tuple(order.rows(epoch, step)) == everything[epoch][step]
    assert everything != [epoch_of(Order(LENGTHS, 8, 4, group), e) for e in range(4)]


def test_a_shuffle_is_the_same_on_every_machine():
    # Recorded once: a change of these numbers would break the resume of every unfinished run.
    assert shuffled(10, 0, "order", 0).tolist() == [7, 5, 3, 2, 4, 8, 9, 0, 1, 6]
    assert sorted(shuffled(1000, 1, "x").tolist()) == list(range(1000))


def test_grouping_by_length_saves_padding_and_no_step_number_means_length():
    lengths = np.random.default_rng(1).integers(1, 400, 5000)

    def padded(order):
        return sum(int(lengths[rows].max()) * len(rows) for rows in map(np.array, epoch_of(order, 0)))

    grouped, plain = Order(lengths, 16, 0, True), Order(lengths, 16, 0, False)
    assert padded(grouped) < 1.1 * lengths.sum() < 1.6 * lengths.sum() < padded(plain)
    means = [lengths[list(rows)].mean() for rows in epoch_of(grouped, 0)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2
    assert MEGA_STEPS * 16 < 5000


def batches_of(examples, size=8, tokens=100, workers=0, **more):
    return Batches(examples, Order(examples.lengths, size, 0), Collator(pad_id=9999, **more), tokens, workers=workers)


@pytest.mark.parametrize("tokens", [1, 70, 150, 10_000])
def test_the_rows_of_a_step_do_not_depend_on_the_token_budget(tokens):
    examples = examples_of(LENGTHS)
    batches = batches_of(examples, tokens=tokens)
    for step in range(batches.order.steps_per_epoch):
        pieces = batches.pieces(0, step)
        assert sorted(np.concatenate(pieces)) == sorted(batches.order.rows(0, step))
        for piece in pieces:
            assert len(piece) == 1 or LENGTHS[piece].max() * len(piece) <= tokens
        assert sum(b.n_targets for b in batches.step(0, step)) == batches.n_targets(0, step)
        halved = batches.pieces(0, step, tokens=max(1, tokens // 2))
        assert sorted(np.concatenate(halved)) == sorted(np.concatenate(pieces))
        assert len(halved) >= len(pieces)


def test_the_budget_counts_the_padding_that_rounding_adds():
    examples = examples_of([9, 9, 9, 9])
    for batch in batches_of(examples, size=4, tokens=32, pad_to=8).step(0, 0):
        assert batch.inputs["input_ids"].shape == (2, 16)


def test_accumulation_cuts_a_step_in_at_least_so_many_pieces():
    examples = examples_of([3] * 8)
    batches = Batches(examples, Order(examples.lengths, 8, 0), Collator(pad_id=9999), tokens=1000, accumulate=3)
    assert [len(p) for p in batches.pieces(0, 0)] == [3, 3, 2]


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_workers_change_nothing(workers):
    examples = examples_of(LENGTHS)
    serial, threaded = batches_of(examples), batches_of(examples, workers=workers)
    for (s, one), (t, other) in zip(serial.from_step(5, 40), threaded.from_step(5, 40), strict=True):
        assert s == t
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a.inputs["input_ids"], b.inputs["input_ids"])
            assert np.array_equal(a.rows, b.rows)


def test_workers_stop_when_the_reader_stops():
    import threading

    reader = batches_of(examples_of(LENGTHS), workers=2).from_step(0, 1000)
    next(reader)
    reader.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("luthier-batch")]


def test_collating_pads_with_the_mask_off_and_labels_ignored():
    examples = examples_of([3, 1, 2], labels=np.array([IGNORED, 5, 6, 7, IGNORED, 8], dtype=np.int32))
    batch = Collator(pad_id=99)(examples, np.array([2, 0, 1]))
    assert batch.inputs["input_ids"].tolist() == [[4, 5, 99], [0, 1, 2], [3, 99, 99]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[-100, 8, -100], [-100, 5, 6], [7, -100, -100]]
    assert batch.n_tokens == 6
    left = Collator(pad_id=99, left=True)(examples, np.array([2, 0]))
    assert left.inputs["input_ids"].tolist() == [[99, 4, 5], [0, 1, 2]]
    assert left.inputs["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]


def test_the_decoder_reads_its_labels_one_token_late():
    examples = examples_of(
        [2, 1], answers=np.array([7, 8, 9, 4], dtype=np.int32), answer_offsets=np.array([0, 3, 4], dtype=np.int64)
    )
    batch = Collator(pad_id=99, decoder_start=50)(examples, np.array([0, 1]))
    assert batch.labels.tolist() == [[7, 8, 9], [4, -100, -100]]
    assert batch.inputs["decoder_input_ids"].tolist() == [[50, 7, 8], [50, 4, 99]]
    assert examples.lengths.tolist() == [5, 2]


def test_evaluation_results_come_back_in_the_order_of_the_data():
    examples = examples_of(LENGTHS, targets=LENGTHS.copy())
    batches = EvalBatches(examples, Collator(pad_id=-5), tokens=200)
    seen = [(b.rows, b.inputs["attention_mask"].sum(1).tolist()) for b in batches]
    widths = [b.inputs["input_ids"].shape[1] for b in batches]
    assert widths == sorted(widths, reverse=True)
    assert len(seen) == len(batches) > 5
    assert in_order(seen) == LENGTHS.tolist()


def test_a_missing_or_doubled_result_is_a_bug_that_is_caught():
    with pytest.raises(AssertionError):
        in_order([(np.array([0, 1]), ["a", "b"]), (np.array([1]), ["b"])])


def test_the_longest_batch_is_the_widest_of_all():
    examples = examples_of(LENGTHS)
    batches = batches_of(examples)
    longest = batches.longest().inputs["input_ids"].shape
    for epoch in range(3):
        for step in range(batches.order.steps_per_epoch):
            for batch in batches.step(epoch, step):
                assert batch.inputs["input_ids"].shape[1] <= longest[1]


def test_a_million_examples_are_ordered_without_an_object_each():
    import tracemalloc

    lengths = np.random.default_rng(2).integers(1, 100, 1_000_000)
    tracemalloc.start()
    order = Order(lengths, 32, 0)
    rows = order.rows(7, 20_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows) == 32
    assert peak < 100e6  # a Python number for each would take more


def test_a_step_beyond_the_epoch_is_an_error():
    with pytest.raises(IndexError, match="steps 0 to 12"):
        Order(LENGTHS, 8, 0).rows(0, 13)


def test_no_rows_at_all_are_refused():
    with pytest.raises(DataError, match="no rows to train on"):
        Order(np.zeros(0, dtype=np.int64), 8, 0)


@pytest.mark.fault("F28", "fewer rows than a batch")
def test_fewer_rows_than_a_batch_make_one_step():
    assert sorted(Order(np.array([4, 2, 9]), 16, 0).rows(5, 0).tolist()) == [0, 1, 2]


def test_a_labelled_text_may_not_end_in_the_padding_token():
    tokenizer = word_tokenizer("gpt")
    data = table([{"text": "good !", "label": "a"}, {"text": "bad", "label": "b"}])
    examples = encode(
        data,
        Columns(shape="labelled", text="text", label="label"),
        Task(name="classification", labels=("a", "b")),
        tokenizer,
        n_vocab=len(tokenizer),
        max_length=16,
    )
    end = tokenizer.convert_tokens_to_ids("!")
    with pytest.raises(DataError, match=r"rows\.csv:2: the text ends in token"):
        EvalBatches(examples, Collator(pad_id=end), tokens=100)
    assert len(EvalBatches(examples, Collator(pad_id=tokenizer.pad_token_id), tokens=100)) == 1
