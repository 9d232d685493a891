"""Kept encoded rows: they are what encoding gives, they are verified, and they stay below their limit."""

import numpy as np
import pytest
from word_tables import table, word_tokenizer

from luthier.core import ConfigError
from luthier.data import encode as encoding
from luthier.data import token_cache as encoded
from luthier.data import tokenizer as tokenizer_file
from luthier.data.columns import Columns
from luthier.data.encode import encode
from luthier.data.tasks import Task
from luthier.kernels import plain

TEXT = Columns(shape="labelled", text="text", label="label")
PAIR = Columns(shape="labelled", text="text", pair="pair", label="label")
CLASSES = Task(name="classification", labels=("a", "b"))
MANY = Task(name="classification", labels=("a", "b", "c"), multi_label=True)
WORDS = ["how", "far", "is", "it", "the", "moon", "sun", "what", "who", "cat", "dog", "good", "bad", "red"]
N = encoded.CACHED_FROM + 44

KINDS = {
    "labelled": (TEXT, CLASSES),
    "pairs": (PAIR, CLASSES),
    "several labels": (TEXT, MANY),
    "measures": (TEXT, Task(name="regression")),
    "tags": (
        Columns(shape="tagged", tokens="tokens", tags="tags"),
        Task(name="token_classification", labels=("N", "O")),
    ),
    "plain": (Columns(shape="plain", text="text"), Task(name="causal_lm")),
    "answered": (Columns(shape="answered", prompt="text", response="pair"), Task(name="causal_lm")),
    "seq2seq": (Columns(shape="answered", prompt="text", response="pair"), Task(name="seq2seq")),
}


def _rows(kind: str, n: int = N) -> list[dict]:
    made = np.random.default_rng(3)
    rows = []
    for i in range(n):
        words = [WORDS[k] for k in made.integers(0, len(WORDS), size=int(made.integers(1, 12)))]
        label: object = "ab"[i % 2]
        if kind == "several labels":
            label = ["a", "c"][: i % 3]
        if kind == "measures":
            label = i / 7
        row = {"text": " ".join(words), "pair": " ".join(words[::-1]), "label": label}
        if i == 5:
            row["text"] = " "  # refused
        if kind == "tags":
            row = {"tokens": words, "tags": ["NO"[k % 2] for k in range(len(words))]}
        rows.append(row)
    return rows


def _encode(kind: str, rows: list[dict] | None = None, **options):
    columns, task = KINDS[kind]
    tokenizer = word_tokenizer("bert" if kind in ("labelled", "pairs", "several labels", "measures", "tags") else "gpt")
    options = {"n_vocab": len(tokenizer), "max_length": 25 if kind == "answered" else 9, **options}
    data = table(_rows(kind) if rows is None else rows)
    return encode(data, columns, task, tokenizer, accept_refused=1.0, **options)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LUTHIER_ENCODED_GIB", raising=False)


def _entries(tmp_path) -> list:
    root = tmp_path / "cache" / "encoded"
    return sorted(root.iterdir()) if root.is_dir() else []


def _said(examples) -> str:
    return examples.ledger.notes[-1] if examples.ledger.notes else ""


def _same(one, other) -> None:
    for name in encoded.ARRAYS:
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b), name
    assert list(one.ledger) == list(other.ledger)
    assert one.ledger.counts() == other.ledger.counts()
    assert one.ledger.sentence() == other.ledger.sentence()


@pytest.mark.parametrize("kind", KINDS)
def test_kept_rows_are_to_the_bit_what_encoding_gives(kind, tmp_path, monkeypatch):
    with plain():
        anew = _encode(kind)
    assert _entries(tmp_path) == []
    first = _encode(kind)
    assert "encoded rows are kept in" in _said(first)
    monkeypatch.setattr(encoding, "_encode_anew", None)  # the second time nothing is encoded
    second = _encode(kind)
    assert "are those kept in" in _said(second)
    (entry,) = _entries(tmp_path)
    assert entry.name[:8] in _said(second) and entry.name not in _said(first) + _said(second)
    _same(anew, first)
    _same(anew, second)
    assert second.ledger.notes[:-1] == anew.ledger.notes


def test_a_damaged_entry_is_named_and_made_anew(tmp_path):
    first = _encode("labelled")
    (entry,) = _entries(tmp_path)
    file = entry / "kept.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))
    second = _encode("labelled")
    assert "damaged" in _said(second) and "kept in" in _said(second)
    _same(first, second)
    third = _encode("labelled")
    assert "are those kept in" in _said(third)


@pytest.mark.parametrize("lost", ["kept.safetensors", "kept.json", "MANIFEST.json"])
def test_an_entry_without_one_of_its_files_is_made_anew(lost, tmp_path):
    _encode("labelled")
    (entry,) = _entries(tmp_path)
    (entry / lost).unlink()
    assert "damaged" in _said(_encode("labelled"))


def test_whatever_changes_the_ids_changes_the_entry(tmp_path):
    _encode("labelled")
    rows = _rows("labelled")
    rows[7]["text"] += " dog"
    for number, change in enumerate([{"rows": rows}, {"max_length": 8}, {"n_vocab": 60}], start=2):
        _encode("labelled", **change)
        assert len(_entries(tmp_path)) == number
    tokenizer = word_tokenizer(words=("how", "far"))
    encode(table(_rows("labelled")), TEXT, CLASSES, tokenizer, n_vocab=99, max_length=9, accept_refused=1.0)
    assert len(_entries(tmp_path)) == 5


def test_a_call_that_cut_texts_before_does_not_change_the_name():
    tokenizer = word_tokenizer()
    data = table(_rows("labelled"))
    told = {"n_vocab": 50, "max_length": 9}
    before = encoded.entry_of(data, TEXT, CLASSES, tokenizer, None, encoding.ENCODERS, **told)
    tokenizer(["how far is it"], truncation=True, max_length=3, padding="max_length")
    assert encoded.entry_of(data, TEXT, CLASSES, tokenizer, None, encoding.ENCODERS, **told) == before


def test_what_was_used_longest_ago_goes_first(tmp_path, monkeypatch):
    import os

    _encode("labelled")
    (first,) = _entries(tmp_path)
    _encode("labelled", max_length=8)
    (second,) = [e for e in _entries(tmp_path) if e != first]
    os.utime(first, (1, 1))
    os.utime(second, (2, 2))
    size = sum(f.stat().st_size for f in first.iterdir())
    monkeypatch.setenv("LUTHIER_ENCODED_GIB", repr(2.2 * size / 2**30))
    _encode("labelled")  # used: now the second is the oldest
    _encode("labelled", max_length=7)
    left = _entries(tmp_path)
    assert first in left and second not in left and len(left) == 2


def test_rows_beyond_the_limit_are_not_kept_and_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_ENCODED_GIB", "0.000001")
    assert "could not be kept: they take" in _said(_encode("labelled"))
    assert _entries(tmp_path) == []


@pytest.mark.parametrize("value", ["0", "0.0"])
def test_a_limit_of_nothing_turns_it_off(value, tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_ENCODED_GIB", value)
    assert _said(_encode("labelled")) == "" and _entries(tmp_path) == []


def test_a_limit_that_is_no_number_is_refused(monkeypatch):
    monkeypatch.setenv("LUTHIER_ENCODED_GIB", "much")
    with pytest.raises(ConfigError, match="LUTHIER_ENCODED_GIB is 'much'"):
        _encode("labelled")


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "file"))
    examples = _encode("labelled")
    assert "could not be kept" in _said(examples) and len(examples) == N - 1


def test_small_tables_and_values_without_json_are_not_kept(tmp_path):
    import datetime

    _encode("labelled", rows=_rows("labelled", encoded.CACHED_FROM - 1))
    rows = _rows("labelled")
    rows[3]["when"] = datetime.date(2020, 1, 1)
    _encode("labelled", rows=rows)
    assert _entries(tmp_path) == []


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("kind", ["bert", "gpt", "bos"])
def test_the_quick_call_of_a_tokenizer_gives_what_the_usual_call_gives(kind, pairs):
    tokenizer = word_tokenizer(kind)
    rows = _rows("labelled", 40)
    texts = [r["text"] for r in rows] + ["", "[SEP] how", "</s> far <s>"]
    second = [t[::-1] for t in texts] if pairs else None
    tokenizer(texts, truncation=True, max_length=4, padding=True)  # what it leaves behind must not act
    quick = tokenizer_file.tokenize(tokenizer, texts, second)
    with plain():
        usual = tokenizer_file.tokenize(tokenizer, texts, second)
    assert quick["input_ids"] == list(usual["input_ids"])
    assert ("token_type_ids" in usual) == ("token_type_ids" in quick) == (kind == "bert")
    if kind == "bert":
        assert quick["token_type_ids"] == list(usual["token_type_ids"])


def test_a_tokenizer_with_a_call_of_its_own_is_called():
    class Shouting(type(word_tokenizer())):
        def _encode_plus(self, text, **options):
            return super()._encode_plus([t.lower() for t in text], **options)

    tokenizer = word_tokenizer()
    tokenizer.__class__ = Shouting
    assert (
        tokenizer_file.tokenize(tokenizer, ["HOW"])["input_ids"]
        == tokenizer_file.tokenize(word_tokenizer(), ["how"])["input_ids"]
    )


def test_the_ledger_writes_the_lines_that_json_would():
    import json

    rows = [{"text": t, "label": "a"} for t in ["how far is it", 'why "\\ \u2028 é', None, "how " * 50]]
    data = table(rows, 'na"me\\é.csv')
    tokenizer = word_tokenizer()
    examples = encode(data, TEXT, CLASSES, tokenizer, n_vocab=50, max_length=9, accept_refused=1.0)
    wanted = [
        json.dumps({"half": "train", **row}, ensure_ascii=False, separators=(", ", ": ")).encode() + b"\n"
        for row in examples.ledger
    ]
    assert list(examples.ledger.lines("train")) == wanted
