"""What is taken out of texts: how much, what stands there instead, and that a draw is named by step and row."""

import numpy as np
import pytest
from fillers import speller
from word_tables import WORDS, table, word_tokenizer

from luthier.core import ConfigError, DataError, ModelError
from luthier.data.batches import Batches, Collator
from luthier.data.columns import Columns
from luthier.data.corrupted import HIDDEN, SWAPPED, Draw, LostSpans, MaskedWords, corruption_of, lost_of
from luthier.data.encode import encode
from luthier.data.examples import IGNORED
from luthier.data.order import Order
from luthier.data.tasks import Task

MASKED, SPANS = Task(name="masked_lm"), Task(name="span_corruption")
PLAIN = Columns(shape="plain", text="text")


def masker():
    return word_tokenizer("bert", mask_token="[MASK]")


def texts(n=30, words=20):
    some = WORDS[:20]
    return [{"text": " ".join(some[(i + k) % 20] for k in range(2 + (i * 7) % words))} for i in range(n)]


def encoded(task, tokenizer, rows=None, **more):
    given = {"n_vocab": 131, "max_length": 40} | more
    return encode(table(rows or texts()), PLAIN, task, tokenizer, **given)


@pytest.fixture
def words():
    tokenizer = masker()
    return tokenizer, encoded(MASKED, tokenizer), corruption_of(MASKED, tokenizer, 131, seed=3)


def test_dapt_fifteen_of_a_hundred_words_are_selected_and_split_80_10_10(words):
    tokenizer, _, corruption = words
    ids = np.asarray([2, *np.tile(np.arange(10, 30), 2), 3], dtype=np.int32)
    vocabulary = np.flatnonzero(~corruption.special)
    seen_as = np.zeros(3)
    for draw in range(1500):
        seen, wanted = corruption.of_row(ids, vocabulary, Draw(draw))
        taken = wanted != IGNORED
        assert taken.sum() == lost_of(40) == 6 and not taken[[0, -1]].any()
        assert (wanted[taken] == ids[taken]).all() and (seen[~taken] == ids[~taken]).all()
        assert not set(seen[taken].tolist()) & (set(tokenizer.all_special_ids) - {corruption.mask})
        mask, same = seen[taken] == corruption.mask, seen[taken] == ids[taken]
        seen_as += [mask.sum(), (~mask & ~same).sum(), same.sum()]
    # A random word is now and then the very one that stood there.
    right = SWAPPED / len(vocabulary)
    shares = np.asarray([HIDDEN, SWAPPED - right, 1 - HIDDEN - SWAPPED + right])
    expected = seen_as.sum() * shares
    assert ((seen_as - expected) ** 2 / expected).sum() < 13.8, "chi-square of two degrees, p = .001"


def test_a_draw_is_named_by_step_and_row_alone(words):
    _, examples, corruption = words
    collator = Collator(pad_id=0, corruption=corruption)
    both = collator(examples, np.asarray([4, 9]), (1, 2))
    alone = collator(examples, np.asarray([9]), (1, 2))
    width = alone.labels.shape[1]
    assert (both.labels[1, :width] == alone.labels[0]).all() and (both.labels[1, width:] == IGNORED).all()
    assert (both.inputs["input_ids"][1, :width] == alone.inputs["input_ids"][0]).all()
    later = collator(examples, np.asarray([4, 9]), (2, 2))
    assert (later.labels != both.labels).any(), "the mask is redrawn each epoch"
    fixed = [Collator(pad_id=0, corruption=corruption_of(MASKED, masker(), 131, seed=s)) for s in (0, 1)]
    one, other = (c(examples, np.arange(len(examples))) for c in fixed)
    assert (one.labels == other.labels).all(), "rows that are scored are corrupted alike, whatever the seed"


@pytest.mark.parametrize("task", [MASKED, SPANS])
def test_the_targets_of_a_step_are_known_before_it_is_drawn(task):
    tokenizer = masker() if task is MASKED else speller()
    examples = encoded(task, tokenizer)
    corruption = corruption_of(task, tokenizer, 131, seed=0)
    batches = Batches(examples, Order(examples.lengths, 7, 0), Collator(pad_id=0, corruption=corruption), 40)
    assert len(batches.step(0, 3)) > 1
    for epoch, step in ((0, 0), (0, 3), (2, 1)):
        pieces = batches.step(epoch, step)
        found = sum(int((b.labels != IGNORED).sum()) for b in pieces)
        assert found == sum(b.n_targets for b in pieces) == batches.n_targets(epoch, step)


def test_spans_and_text_together_are_the_text(tmp_path):
    tokenizer = speller()
    corruption = corruption_of(SPANS, tokenizer, 131, seed=0)
    assert isinstance(corruption, LostSpans) and len(corruption.sentinels) == 9
    for n in (2, 3, 5, 17, 39):
        ids = np.asarray([*(10 + i % 30 for i in range(n)), tokenizer.eos_token_id], dtype=np.int32)
        seen, wanted = corruption.of_row(ids, Draw(n))
        assert seen[-1] == wanted[-1] == tokenizer.eos_token_id
        spans: dict[int, list[int]] = {}
        for token in wanted[:-1]:
            if token in corruption.sentinels:
                spans[last := token] = []
            else:
                spans[last].append(token)
        filled = [t for token in seen[:-1] for t in spans.get(token, [token])]
        assert filled == ids[:-1].tolist()
        used = list(spans)
        assert used == list(corruption.sentinels[: len(used)]) and spans[used[-1]] == []
        assert [t for t in seen if t in corruption.sentinels] == used[:-1], "in the order of the text"
        assert sum(map(len, spans.values())) == lost_of(n)


def test_long_texts_become_pieces_with_their_own_special_tokens():
    examples = encoded(MASKED, masker(), [{"text": " ".join(["moon", "sun", "cat"] * 20)}], max_length=12)
    assert len(examples) == 6 and (examples.ids[examples.offsets[:-1]] == 2).all()
    assert (examples.ids[examples.offsets[1:] - 1] == 3).all() and examples.lengths.max() == 12
    assert examples.ledger.counts()["tokens"] == 60 + 12


def test_what_cannot_be_filled_in_is_refused():
    with pytest.raises(ConfigError, match=r"max_length = 2: .* Set --max-length higher"):
        encoded(MASKED, masker(), max_length=2)
    with pytest.raises(ModelError, match="mask token"):
        encoded(MASKED, word_tokenizer("bert"))
    with pytest.raises(ModelError, match="sentinels"):
        encoded(SPANS, word_tokenizer("gpt"))
    with pytest.raises(DataError, match="nothing is left to tell"):
        encoded(MASKED, masker(), [{"text": "moon"}])
    assert MaskedWords(mask=1, special=np.zeros(5, dtype=bool)).targets([2]) == 0
