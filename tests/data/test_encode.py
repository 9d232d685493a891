import gc

import numpy as np
import pytest
from transformers import BertConfig, GPT2Config, MPNetConfig, RobertaConfig, T5Config
from word_tables import WORDS, table, word_tokenizer

from luthier.core import ConfigError, DataError, ModelError
from luthier.data.batches import Collator
from luthier.data.columns import Columns
from luthier.data.encode import _without_collection, encode
from luthier.data.examples import IGNORED
from luthier.data.tasks import Task
from luthier.data.tokenizer import check_tokenizer, choose_length, choose_pad, position_limit

TEXT = Columns(shape="labelled", text="text", label="label")
PAIR = Columns(shape="labelled", text="text", pair="pair", label="label")
TAGGED = Columns(shape="tagged", tokens="tokens", tags="tags")
PLAIN = Columns(shape="plain", text="text")
ANSWERED = Columns(shape="answered", prompt="prompt", context="input", response="response")
CLASSES = Task(name="classification", labels=("a", "b"))
LM, S2S = Task(name="causal_lm"), Task(name="seq2seq")
TAGS = Task(name="token_classification", labels=("N", "O"))


def encoded(rows, columns, task, tokenizer, max_length=50, n_vocab=None, **options):
    data = table(rows, "train.csv")
    return encode(data, columns, task, tokenizer, n_vocab=n_vocab or len(tokenizer), max_length=max_length, **options)


def example(examples, i):
    return examples.ids[examples.offsets[i] : examples.offsets[i + 1]].tolist()


def words(tokenizer, ids):
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


def test_texts_become_the_ids_that_the_tokenizer_gives():
    tokenizer = word_tokenizer()
    rows = [{"text": "how far is it", "label": "b"}, {"text": "why", "label": "a"}]
    examples = encoded(rows, TEXT, CLASSES, tokenizer)
    assert [example(examples, i) for i in range(2)] == tokenizer([r["text"] for r in rows])["input_ids"]
    assert examples.targets.tolist() == [1, 0]
    assert examples.n_targets.tolist() == [1, 1]
    assert examples.lengths.tolist() == [6, 3]
    assert examples.ids.dtype == np.int32


def test_pairs_keep_their_token_types():
    tokenizer = word_tokenizer()
    examples = encoded([{"text": "how far", "pair": "it is", "label": "a"}], PAIR, CLASSES, tokenizer)
    assert words(tokenizer, example(examples, 0)) == "[CLS] how far [SEP] it is [SEP]"
    assert examples.types.tolist() == [0, 0, 0, 0, 1, 1, 1]
    batch = Collator(pad_id=0)(examples, np.array([0]))
    assert batch.inputs["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1]]


def test_a_pair_that_is_cut_has_the_token_types_of_what_is_left():
    tokenizer = word_tokenizer()
    rows = [{"text": "why", "pair": "it is", "label": "a"}, {"text": "how far is it", "pair": "it is", "label": "a"}]
    examples = encoded(rows, PAIR, CLASSES, tokenizer, max_length=7)
    both = tokenizer([r["text"] for r in rows], [r["pair"] for r in rows], truncation=True, max_length=7)
    assert [len(x) for x in both["input_ids"]] == [6, 7]
    assert examples.types.tolist() == [t for types in both["token_type_ids"] for t in types]


def test_long_texts_are_cut_inside_their_special_tokens_and_counted():
    tokenizer = word_tokenizer()
    rows = [{"text": "how far is it why", "label": "a"}, {"text": "why", "label": "a"}]
    examples = encoded(rows, TEXT, CLASSES, tokenizer, max_length=5)
    assert words(tokenizer, example(examples, 0)) == "[CLS] how far is [SEP]"
    assert next(iter(examples.ledger)) == {
        "row": 0,
        "place": "train.csv:2",
        "status": "truncated",
        "reason": "7 tokens, cut to 5",
        "tokens": 5,
        "targets": 1,
    }
    assert examples.ledger.counts() == {
        "rows": 2,
        "used": 1,
        "truncated": 1,
        "refused": 0,
        "tokens": 8,
        "targets": 2,
    }


@pytest.mark.fault("F29", "a million tokens")
def test_a_text_of_a_million_tokens_is_cut_like_any_other():
    examples = encoded([{"text": "why " * 1_000_000, "label": "a"}], TEXT, CLASSES, word_tokenizer(), max_length=9)
    assert len(examples.ids) == 9
    assert "1000002 tokens, cut to 9" in next(iter(examples.ledger))["reason"]


def test_unusable_rows_stand_in_the_ledger_with_field_and_reason():
    rows = [{"text": t, "label": "a"} for t in ("why", " ", None, 4.5, "", "how")]
    examples = encoded(rows, TEXT, CLASSES, word_tokenizer(), accept_refused=0.7)
    records = list(examples.ledger)
    assert [r["status"] for r in records] == ["used", "refused", "refused", "refused", "refused", "used"]
    assert [r["reason"] for r in records[1:5]] == [
        "field 'text' is empty",
        "field 'text' is missing",
        "field 'text' is 4.5 (float), not text",
        "field 'text' is empty",
    ]
    assert examples.rows.tolist() == [0, 5]
    with pytest.raises(
        DataError, match=r"4 of 6 rows cannot be used \(66\.7%, accepted are 5\.0%\): train\.csv:3: field"
    ):
        encoded(rows, TEXT, CLASSES, word_tokenizer())


def test_targets_stay_with_their_rows_when_others_are_refused():
    rows = [{"text": t, "label": label} for t, label in [("", "a"), ("why", "b"), ("", "a"), ("how", "a")]]
    examples = encoded(rows, TEXT, CLASSES, word_tokenizer(), accept_refused=0.5)
    assert examples.targets.tolist() == [1, 0]


def test_no_usable_row_at_all_stops_whatever_is_accepted():
    with pytest.raises(DataError, match="none of 1 rows can be used"):
        encoded([{"text": "", "label": "a"}], TEXT, CLASSES, word_tokenizer(), accept_refused=1.0)


def test_prediction_needs_no_labels_and_accepts_no_bad_row():
    columns = Columns(shape="labelled", text="text")
    rows = [{"text": "why"}, {"text": "how"}]
    examples = encoded(rows, columns, CLASSES, word_tokenizer(), with_targets=False)
    assert (examples.targets, examples.n_targets.tolist()) == (None, [0, 0])
    with pytest.raises(DataError, match=r"train\.csv:3: field 'text' is empty"):
        encoded([*rows[:1], {"text": ""}], columns, CLASSES, word_tokenizer(), with_targets=False)


def test_the_first_token_of_each_word_carries_its_tag():
    tokenizer = word_tokenizer()
    rows = [{"tokens": ["how!", "far"], "tags": ["N", "O"]}, {"tokens": "why it", "tags": "O N"}]
    examples = encoded(rows, TAGGED, TAGS, tokenizer)
    assert words(tokenizer, example(examples, 0)) == "[CLS] how ! far [SEP]"
    assert examples.labels.tolist() == [IGNORED, 0, IGNORED, 1, IGNORED, IGNORED, 1, 0, IGNORED]
    assert examples.n_targets.tolist() == [2, 2]
    cut = encoded(rows[:1], TAGGED, TAGS, tokenizer, max_length=4)
    assert next(iter(cut.ledger))["reason"] == "2 words, tags of 1 remain"


def test_words_without_tags_can_be_asked_about_and_tags_that_are_there_change_nothing():
    task = Task(name="token_classification", labels=("O", "B-X"))
    columns = Columns(shape="tagged", tokens="words", tags="tags")
    bare = encoded([{"words": ["how", "far"]}], columns, task, word_tokenizer(), with_targets=False)
    tagged = encoded(
        [{"words": ["how", "far"], "tags": ["O", "B-X"]}], columns, task, word_tokenizer(), with_targets=False
    )
    assert bare.n_targets.tolist() == tagged.n_targets.tolist() == [0]
    assert bare.ids.tolist() == tagged.ids.tolist() and bare.labels.tolist() == tagged.labels.tolist()


def test_plain_text_ends_in_the_end_token_which_carries_loss():
    tokenizer = word_tokenizer("bos")
    examples = encoded([{"text": "how far"}], PLAIN, LM, tokenizer)
    assert words(tokenizer, example(examples, 0)) == "<s> how far </s>"
    assert examples.labels.tolist() == [IGNORED, *example(examples, 0)[1:]]
    assert examples.n_targets.tolist() == [3]


@pytest.mark.parametrize("size", [2, 3, 4, 7, 11, 12, 13, 50])
def test_a_long_plain_text_loses_no_token_and_learns_each_once(size):
    tokenizer = word_tokenizer("gpt")
    text = " ".join(WORDS[:11])
    examples = encoded([{"text": text}, {"text": "why it"}], PLAIN, LM, tokenizer, max_length=size)
    whole = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    mine = [i for i in range(len(examples)) if examples.rows[i] == 0]
    learnt = [t for i in mine for t in examples.labels[examples.offsets[i] : examples.offsets[i + 1]] if t != IGNORED]
    assert learnt == whole[1:]
    assert max(examples.lengths) <= size
    records = list(examples.ledger)
    assert [r["status"] for r in records] == ["used", "used"]
    assert [(r["tokens"], r["targets"]) for r in records] == [(12, 11), (3, 2)]


def test_prompt_and_response_are_a_chat_of_two_turns():
    tokenizer = word_tokenizer("gpt")
    rows = [
        {"prompt": "how far", "input": "moon", "response": "two"},
        {"prompt": "why", "input": "", "response": "sun"},
    ]
    examples = encoded(rows, ANSWERED, LM, tokenizer)
    labels = [t for t in examples.labels.tolist() if t != IGNORED]
    assert words(tokenizer, labels) == "two </s> sun </s>"
    assert "how far \n \n moon" in words(tokenizer, example(examples, 0))
    asked = encoded([{"prompt": "why"}], Columns(shape="answered", prompt="prompt"), LM, tokenizer, with_targets=False)
    assert example(examples, 1)[: len(asked.ids)] == asked.ids.tolist()


def test_a_prompt_that_is_too_long_for_generation_is_refused():
    columns = Columns(shape="answered", prompt="prompt")
    with pytest.raises(DataError, match=r"train\.csv:2: the prompt has \d+ tokens, only 4 fit"):
        encoded([{"prompt": "why it is so far"}], columns, LM, word_tokenizer("gpt"), max_length=4, with_targets=False)


def test_sequence_to_sequence_keeps_source_and_response_apart():
    tokenizer = word_tokenizer("gpt")
    rows = [{"prompt": "how far", "input": None, "response": "two three"}, {"prompt": "why", "response": "sun"}]
    examples = encoded(rows, ANSWERED, S2S, tokenizer)
    assert words(tokenizer, example(examples, 0)) == "how far"
    assert words(tokenizer, examples.answers[:3].tolist()) == "two three </s>"
    assert examples.n_targets.tolist() == [3, 2]
    cut = encoded(rows, ANSWERED, S2S, tokenizer, max_length=2)
    assert next(iter(cut.ledger))["reason"] == "response of 3 tokens, cut to 2"
    with pytest.raises(DataError, match=r"train\.csv:2: field 'response' is empty"):
        encoded([{"prompt": "why", "response": " "}], ANSWERED, S2S, tokenizer)


@pytest.mark.fault("F31", "id")
@pytest.mark.parametrize(
    ("rows", "columns", "task"),
    [
        ([{"text": "why", "label": "a"}, {"text": "rome", "label": "a"}], TEXT, CLASSES),
        ([{"text": "why"}, {"text": "rome"}], PLAIN, LM),
        ([{"tokens": ["why"], "tags": ["N"]}, {"tokens": ["rome"], "tags": ["O"]}], TAGGED, TAGS),
        ([{"prompt": "why", "response": "sun"}, {"prompt": "why", "response": "rome"}], ANSWERED, S2S),
        ([{"prompt": "why", "response": "sun"}, {"prompt": "why", "response": "rome"}], ANSWERED, LM),
    ],
)
def test_an_id_outside_the_vocabulary_is_named_with_row_and_sizes(rows, columns, task, monkeypatch):
    tokenizer = word_tokenizer("gpt")
    last = len(tokenizer) - 1
    assert tokenizer.convert_ids_to_tokens(last) == "rome"
    monkeypatch.setattr("luthier.data.encode.check_tokenizer", lambda tokenizer, n_vocab: None)
    with pytest.raises(DataError) as caught:
        encoded(rows, columns, task, tokenizer, n_vocab=last)
    for word in ("train.csv:3", "'rome'", f"id {last}", f"has {last} rows", f"has {last + 1} tokens"):
        assert word in str(caught.value)


@pytest.mark.fault("F31", "tokenizer")
def test_a_tokenizer_that_does_not_fit_the_model_is_refused_with_both_sizes():
    tokenizer = word_tokenizer()
    n = len(tokenizer)
    check_tokenizer(tokenizer, n)
    with pytest.raises(ModelError, match=f"the tokenizer has {n} tokens .*embedding has {n - 1} rows"):
        check_tokenizer(tokenizer, n - 1)


def test_padding_is_never_the_end_token():
    own = word_tokenizer("gpt")
    assert choose_pad(own, len(own)).token == "<pad>"
    cases = {
        "none, special tokens": word_tokenizer("gpt", pad_token=None),
        "eos": word_tokenizer("gpt", pad_token="</s>"),
    }
    for name, tokenizer in cases.items():
        pad = choose_pad(tokenizer, len(tokenizer))
        assert pad.id not in (tokenizer.eos_token_id, tokenizer.bos_token_id), name
        assert tokenizer.pad_token_id == pad.id < len(tokenizer), name
        assert "end token" in pad.how if name == "eos" else "has none" in pad.how


def plain_tokenizer(**special):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "b": 2}, unk_token="</s>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", **special)


def test_padding_takes_a_free_embedding_row_or_else_the_last_word():
    tokenizer = plain_tokenizer()
    pad = choose_pad(tokenizer, 8)
    assert (pad.id, tokenizer.pad_token_id) == (3, 3)
    assert "free row" in pad.how
    tokenizer = plain_tokenizer()
    pad = choose_pad(tokenizer, 3)
    assert (pad.id, pad.token) == (2, "b")
    assert "last word" in pad.how


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (BertConfig(max_position_embeddings=64), 64),
        (RobertaConfig(max_position_embeddings=514, pad_token_id=1), 512),
        (MPNetConfig(max_position_embeddings=514, pad_token_id=1), 512),
        (GPT2Config(n_positions=77), 77),
        (T5Config(), None),
    ],
)
def test_the_position_limit_is_what_the_model_can_really_use(config, limit):
    assert position_limit(config) == limit


def test_the_position_limit_of_roberta_is_the_longest_text_that_runs():
    import torch
    from transformers import RobertaModel

    config = RobertaConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=9,
        max_position_embeddings=14, pad_token_id=1,
    )  # fmt: skip
    model = RobertaModel(config).eval()
    limit = position_limit(config)
    model(torch.full((1, limit), 5))
    with pytest.raises((IndexError, RuntimeError), match="index"):
        model(torch.full((1, limit + 1), 5))


def test_max_length_beyond_the_positions_is_refused_with_the_numbers():
    tokenizer, config = word_tokenizer(), BertConfig(max_position_embeddings=64)
    assert choose_length(None, tokenizer, config, CLASSES) == 64
    assert choose_length(64, tokenizer, config, CLASSES) == 64
    assert choose_length(None, tokenizer, config, CLASSES, reserved=10) == 54
    assert choose_length(None, tokenizer, T5Config(), S2S) == 1024
    with pytest.raises(ConfigError, match="max_length is 65, but the model has 64 positions: at most 64"):
        choose_length(65, tokenizer, config, CLASSES)
    with pytest.raises(ConfigError, match=r"has 64 positions \(10 of them taken by the method\): at most 54"):
        choose_length(60, tokenizer, config, CLASSES, reserved=10)
    with pytest.raises(ConfigError, match="max_length is 2, but 2 tokens of each row are special"):
        choose_length(2, tokenizer, config, CLASSES)


def test_encoding_many_rows_in_chunks_gives_what_one_by_one_gives(monkeypatch):
    tokenizer = word_tokenizer()
    rng = np.random.default_rng(0)
    rows = [{"text": " ".join(rng.choice(WORDS, rng.integers(1, 9))), "label": "a"} for _ in range(25)]
    whole = encoded(rows, TEXT, CLASSES, tokenizer, max_length=7)
    monkeypatch.setattr("luthier.data.encode_text.CHUNK", 4)
    parts = encoded(rows, TEXT, CLASSES, tokenizer, max_length=7)
    assert np.array_equal(whole.ids, parts.ids)
    assert np.array_equal(whole.offsets, parts.offsets)
    assert list(whole.ledger) == list(parts.ledger)


@pytest.mark.parametrize("on", [True, False])
def test_the_collector_of_cycles_rests_while_rows_are_encoded_and_is_as_before_afterwards(on):
    was = gc.isenabled()
    (gc.enable if on else gc.disable)()
    try:
        with pytest.raises(ZeroDivisionError), _without_collection():
            assert not gc.isenabled()
            raise ZeroDivisionError
        assert gc.isenabled() == on
    finally:
        (gc.enable if was else gc.disable)()
