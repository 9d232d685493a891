"""Texts that stand nearest to a query, by their words and by vectors."""

from pathlib import Path

import numpy as np
import pytest
from little import little_model
from numpy.typing import NDArray

from luthier.core import ConfigError, DataError, ModelError
from luthier.data.retrieval import Vectors, Words, nearest, words_in
from luthier.workflow.sentence_vectors import SentenceVectors

TEXTS = ["how far is the moon", "who is the cat", "how tall is the sun", "who is the cat", "red blue", "is is is is it"]


def by_hand(query: str, texts: list[str], k1: float = 1.5, b: float = 0.75) -> NDArray[np.float64]:
    """BM25 as Lucene writes it, without its constant factor."""
    split = [words_in(text) for text in texts]
    mean = sum(map(len, split)) / len(split)
    found = np.zeros(len(texts))
    for word in words_in(query):
        n = sum(word in words for words in split)
        if n == 0:
            continue
        rarity = np.log(1 + (len(texts) - n + 0.5) / (n + 0.5))
        for i, words in enumerate(split):
            often = words.count(word)
            found[i] += rarity * often / (often + k1 * (1 - b + b * len(words) / mean))
    return found


def test_words_are_weighed_as_the_formula_says() -> None:
    for query in ("how far is it", "the cat cat", "unknown", ""):
        given = Words(TEXTS).scores([query])[0]
        assert given == pytest.approx(by_hand(query, TEXTS), abs=1e-5)


@pytest.mark.acid("icl_retrieval", 1)
def test_the_nearest_are_those_that_a_search_through_all_finds() -> None:
    vectors = np.random.default_rng(0).normal(size=(40, 7))
    texts = [str(i) for i in range(40)]
    of = Vectors(texts, lambda wanted: vectors[[int(t) for t in wanted]].astype(np.float32))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for number in range(40):
        wanted = sorted(range(40), key=lambda i: -float(unit[i] @ unit[number]))[:6]
        assert nearest(of, texts[number], 6) == wanted
    words = Words(TEXTS)
    wanted = sorted(range(len(TEXTS)), key=lambda i: (-round(float(by_hand("the cat", TEXTS)[i]), 6), i))
    assert nearest(words, "the cat", 4) == wanted[:4]


@pytest.mark.acid("icl_retrieval", 3)
def test_of_equal_texts_the_earlier_is_nearer() -> None:
    assert nearest(Words(TEXTS), "who is the cat", 2) == [1, 3]
    assert nearest(Words(TEXTS), "nothing known", 6) == [0, 1, 2, 3, 4, 5]
    same = Vectors(TEXTS, lambda wanted: np.ones((len(wanted), 3), dtype=np.float32))
    assert nearest(same, "any", 3, without=[1]) == [0, 2, 3]


def test_what_may_not_be_found_is_not_and_too_many_are_refused() -> None:
    assert nearest(Words(TEXTS), "who is the cat", 1, without=[1]) == [3]
    with pytest.raises(ConfigError, match="6 texts are asked for, and there are 5"):
        nearest(Words(TEXTS), "cat", 6, without=[0])


def test_texts_that_cannot_be_searched_are_refused() -> None:
    with pytest.raises(DataError, match="no texts"):
        Words([])
    with pytest.raises(DataError, match="none of the 2 texts has a word"):
        Words(["?", "!"])
    with pytest.raises(DataError, match="not finite"):
        Vectors(["a"], lambda wanted: np.full((len(wanted), 2), np.nan, dtype=np.float32))


def test_vectors_of_an_encoder_do_not_depend_on_their_neighbours(tmp_path: Path) -> None:
    encoder = SentenceVectors(str(little_model(tmp_path / "bert", "bert")), "cpu")
    together = encoder(TEXTS)
    alone = np.concatenate([encoder([text]) for text in TEXTS])
    assert together == pytest.approx(alone, abs=1e-5)
    assert np.abs(together[0] - together[1]).max() > 0.01
    assert nearest(Vectors(TEXTS, encoder), TEXTS[3], 2) == [1, 3]


def test_a_model_that_writes_makes_no_vectors(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no encoder"):
        SentenceVectors(str(little_model(tmp_path / "llama", "llama")), "cpu")
