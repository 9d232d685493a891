"""Long rows in windows: all of a row is read, every row counts once, and a row's answer is the mean of its windows'."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from word_tables import WORDS, byte_tokenizer, table, word_tokenizer

from luthier.core import ConfigError
from luthier.data.columns import Columns
from luthier.data.encode import encode
from luthier.data.examples import Examples
from luthier.data.order import Order
from luthier.data.tasks import Task
from luthier.data.windows import OneWindowOfEach, mean_by_row, refuse_windows, windows

TASK = Task(name="classification", labels=("a", "b"))
SINGLE = Columns(shape="labelled", text="text", label="label")
PAIR = Columns(shape="labelled", text="text", pair="other", label="label")


def encoded(rows: list[dict[str, Any]], columns: Columns = SINGLE, tokenizer: Any = None, **options: Any) -> Examples:
    tokenizer = tokenizer or word_tokenizer("bert")
    options = {"max_length": 10, "long": "windows", **options}
    return encode(table(rows), columns, TASK, tokenizer, n_vocab=len(tokenizer), **options)


def ids_of(examples: Examples, i: int) -> list[int]:
    return [int(t) for t in examples.ids[examples.offsets[i] : examples.offsets[i + 1]]]


def text_of(n: int, start: int = 0) -> str:
    return " ".join(WORDS[(start + i) % len(WORDS)] for i in range(n))


@pytest.mark.parametrize("n", [1, 7, 9, 10, 14, 15, 31, 100])
@pytest.mark.parametrize("size", [9, 10, 16])
def test_windows_cover_every_token_overlap_and_are_full(n: int, size: int) -> None:
    of = [None, *[0] * n, None]
    if n + 2 <= size:
        return
    found = windows(of, size)
    assert {int(i) for w in found for i in w} == set(range(n + 2)), "nothing of the row is unread"
    assert {len(w) for w in found} == {size}
    assert all(w[0] == 0 and w[-1] == n + 1 for w in found), "each has what the tokenizer adds"
    room = size - 2
    shared = [len(set(a[1:-1]) & set(b[1:-1])) for a, b in pairwise(found)]
    assert min(shared) >= room // 4
    assert len(found) == 1 + -(-(n - room) // (room - room // 4)), "no more than it takes"


def test_of_a_pair_the_longer_text_moves_and_the_other_stands_in_each() -> None:
    row = {"text": text_of(3), "other": text_of(20, 5), "label": "a"}
    for one, moving in ((row, 1), ({"text": row["other"], "other": row["text"], "label": "a"}, 0)):
        found = encoded([one], PAIR, max_length=14)
        whole = encoded([one], PAIR, max_length=60)
        assert len(whole) == 1 and len(found) > 1 and found.ledger.counts()["truncated"] == 0
        short = word_tokenizer("bert")(row["text"], add_special_tokens=False)["input_ids"]
        for i in range(len(found)):
            ids = ids_of(found, i)
            assert any(ids[k : k + 3] == short for k in range(len(ids)))
            kinds = found.types[found.offsets[i] : found.offsets[i + 1]] if found.types is not None else None
            assert kinds is not None and (kinds == moving).sum() > (kinds != moving).sum()
    both_long = {"text": text_of(20), "other": text_of(20), "label": "a"}
    found = encoded([both_long], PAIR, max_length=14)
    assert len(found) == 1 and found.ledger.counts()["truncated"] == 1, "cut, and the ledger says so"


@pytest.mark.parametrize("kind", ["bert", "bos", "gpt2", "roberta"])
def test_prediction_reads_the_windows_that_training_read(kind: str) -> None:
    tokenizer = byte_tokenizer(kind) if kind in ("gpt2", "roberta") else word_tokenizer(kind)
    rows = [{"text": text_of(n, n), "label": "ab"[n % 2]} for n in (3, 40, 5, 17)]
    trained = encoded(rows, tokenizer=tokenizer)
    asked = encoded([{"text": row["text"]} for row in rows], tokenizer=tokenizer, with_targets=False)
    assert len(trained) > len(rows) and trained.rows.tolist() == asked.rows.tolist()
    assert [ids_of(trained, i) for i in range(len(trained))] == [ids_of(asked, i) for i in range(len(asked))]
    assert trained.read_rows.tolist() == [0, 1, 2, 3]
    assert trained.targets is not None
    assert trained.row_targets.tolist() == [1, 0, 1, 1]
    assert trained.targets.tolist() == [[1, 0, 1, 1][row] for row in trained.rows]
    counts = trained.ledger.counts()
    assert counts["used"] == 4 and counts["truncated"] == 0 and counts["targets"] == 4, "a row is one target"
    assert "rows of more than 10 tokens are read in" in " ".join(trained.ledger.notes)


def test_each_row_gives_one_window_an_epoch_and_all_of_them_in_turn() -> None:
    rows = [{"text": text_of(n, n), "label": "ab"[n % 2]} for n in (3, 40, 5, 17, 8, 90)]
    examples = encoded(rows)
    counts = np.bincount(examples.rows)
    order = OneWindowOfEach(Order(examples.lengths[examples.firsts], 4, seed=3), examples)
    assert order.steps_per_epoch == 2
    seen: list[list[int]] = [[] for _ in rows]
    for epoch in range(int(counts.max())):
        met = np.concatenate([order.rows(epoch, step) for step in range(2)])
        assert sorted(examples.rows[met].tolist()) == [0, 1, 2, 3, 4, 5], "every row once, however long it is"
        for example in met:
            seen[examples.rows[example]].append(int(example))
    for row, count in enumerate(counts):
        assert len(set(seen[row][:count])) == count, "none again before all were read"
    other = OneWindowOfEach(Order(examples.lengths[examples.firsts], 4, seed=4), examples)
    begun = [sorted(np.concatenate([o.rows(0, 0), o.rows(0, 1)]).tolist()) for o in (order, other)]
    assert begun[0] != begun[1], "which window comes first is drawn"


def test_values_of_windows_become_those_of_rows() -> None:
    rows = [{"text": text_of(n, n), "label": "ab"[n % 2]} for n in (3, 16, 5)]
    examples = encoded(rows)
    assert examples.rows.tolist() == [0, 1, 1, 1, 2]
    values = np.array([[1, 0], [2, 0], [4, 3], [6, 0], [9, 9]], dtype=np.float32)
    found = mean_by_row(values, examples)
    assert found.tolist() == [[1, 0], [4, 1], [9, 9]] and found.dtype == np.float32


@pytest.mark.parametrize("name", ["causal_lm", "seq2seq", "token_classification"])
def test_tasks_without_one_answer_a_row_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"long: windows need .* this is {name}.*Leave --long out"):
        refuse_windows(Task(name=name, labels=("a",)), word_tokenizer())  # type: ignore[arg-type]
