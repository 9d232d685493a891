"""Words with tags reach the model as the text that they are, and every word is answered where none is known."""

import itertools
from typing import Any

import numpy as np
import pytest
from word_tables import byte_tokenizer, table, word_tokenizer

from luthier import samples
from luthier.core import DataError
from luthier.data.columns import Columns
from luthier.data.encode import encode
from luthier.data.examples import IGNORED, Examples
from luthier.data.tasks import Task

TAGGED = Columns(shape="tagged", tokens="tokens", tags="tags")
TAGS = Task(name="token_classification", labels=("N", "O"))
ROW = ["Hello", "world", "in", "Paris", "the", "good", "moon"]


def _encoded(tokenizer: Any, *rows: list[str], with_targets: bool = True, max_length: int = 64) -> Examples:
    made = [{"tokens": words, "tags": ["N", "O"] * (len(words) // 2) + ["N"] * (len(words) % 2)} for words in rows]
    return encode(
        table(made), TAGGED, TAGS, tokenizer, n_vocab=len(tokenizer), max_length=max_length, with_targets=with_targets
    )


def _read_back(tokenizer: Any, examples: Examples) -> list[str]:
    """The text from each tag to the next, blanks and all."""
    ids = examples.ids.tolist()
    marks = [*np.flatnonzero(examples.labels != IGNORED).tolist(), len(ids)]
    return [tokenizer.decode(ids[a:b], skip_special_tokens=True) for a, b in itertools.pairwise(marks)]


@pytest.mark.parametrize("kind", ["gpt2", "gpt2-prefix", "roberta", "llama3"])
def test_ids_of_byte_level_tokenizers_decode_to_the_words_with_their_blanks(kind: str) -> None:
    tokenizer = byte_tokenizer(kind)
    examples = _encoded(tokenizer, ROW)
    first = " Hello" if kind == "gpt2-prefix" else "Hello"
    assert _read_back(tokenizer, examples) == [first, *(f" {word}" for word in ROW[1:])]
    assert examples.ids.tolist() == tokenizer(" ".join(ROW))["input_ids"]
    assert examples.n_targets.tolist() == [len(ROW)]


def test_the_sample_decoder_reads_words_with_their_blanks() -> None:
    if not samples.is_cached("smollm2-135m"):
        pytest.skip("the sample is not in the cache")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(samples.model_path("smollm2-135m"))
    examples = _encoded(tokenizer, ["Hello", "world", "in", "Paris", ",", "l'été", "\u6771\u4eac", "🙂"])
    assert _read_back(tokenizer, examples)[:5] == ["Hello", " world", " in", " Paris", " ,"]
    assert tokenizer.decode(examples.ids.tolist()) == "Hello world in Paris , l'été \u6771\u4eac 🙂"


def test_a_word_of_blanks_gets_no_tag_and_moves_no_other() -> None:
    tokenizer = byte_tokenizer("llama3")
    examples = _encoded(tokenizer, ["good", "", "moon", " ", "sun"], with_targets=False)
    assert [int(w) for w in examples.words if w != IGNORED] == [0, 2, 4]
    assert tokenizer.decode(examples.ids.tolist()) == "good moon sun"
    assert next(iter(examples.ledger))["reason"] == "5 words, tags of 3 remain"


@pytest.mark.parametrize("size", [3, 5, 8, 64])
def test_a_row_to_predict_is_read_in_windows_that_hold_each_word_once(size: int) -> None:
    tokenizer = word_tokenizer()
    words = ["how", "far", "is", "the", "moon", "!", "why", "it", "is", "good", "who"]
    examples = _encoded(tokenizer, words, ["red"], with_targets=False, max_length=size)
    of_first = examples.rows == 0
    found = [
        int(w)
        for i in np.flatnonzero(of_first)
        for w in examples.words[examples.offsets[i] : examples.offsets[i + 1]]
        if w != IGNORED
    ]
    assert found == list(range(len(words)))
    assert max(examples.lengths) <= size
    trained = _encoded(tokenizer, words, max_length=size)
    assert examples.ids[: examples.offsets[1]].tolist() == trained.ids.tolist(), "the first window is training's input"


def test_a_row_that_is_no_list_is_refused_by_itself_in_prediction() -> None:
    rows = table([{"tokens": 3}, {"tokens": ["moon"]}])
    with pytest.raises(DataError, match=r"rows\.csv:2: field 'tokens' is 3"):
        encode(rows, TAGGED, TAGS, word_tokenizer(), n_vocab=90, max_length=9, with_targets=False)
