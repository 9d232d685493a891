import itertools

import numpy as np
import pytest
from word_tables import table, word_tokenizer

from luthier.core import DataError, ModelError
from luthier.data.chat import Chat, ChatTemplate, read_messages
from luthier.data.columns import Columns
from luthier.data.encode import encode
from luthier.data.encode_language import loss_view
from luthier.data.examples import IGNORED
from luthier.data.tasks import Task

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BOS_FIRST = "{{ bos_token }}{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}"
BOS_FIRST += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
NO_END = "{% for m in messages %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}"
NO_END += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
# Writes the last turn with a "!" before it, and earlier turns without.
FORGETS = (
    "{% for m in messages %}{{ m.role + ':' }}{% if m.role == 'assistant' and loop.last %}{{ '!' }}{% endif %}"
    "{{ m.content + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
DROPS = "{% for m in messages %}{% if m.role != 'assistant' %}{{ m.content }}{% endif %}{% endfor %}"
OWN_PROMPT = CHATML.replace("assistant\n' }}{% endif", "system\n' }}{% endif")
RAISES = "{{ raise_exception('roles must alternate') }}"
NO_SYSTEM = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")

TWO_TURNS = [
    {"role": "system", "content": "good dog"},
    {"role": "user", "content": "how far is it"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "why"},
    {"role": "assistant", "content": "because sun"},
]
DIALOGUE = Columns(shape="dialogue", messages="messages")
LM = Task(name="causal_lm")


def encoded(tokenizer, messages=TWO_TURNS, max_length=100, accept=0.0, **options):
    data = messages if isinstance(messages[0], list) else [messages]
    rows = table([{"messages": m} for m in data], "chats.jsonl", 1)
    n = len(tokenizer)
    return encode(rows, DIALOGUE, LM, tokenizer, n_vocab=n, max_length=max_length, accept_refused=accept, **options)


def learnt(examples, tokenizer, index=0):
    """The runs of tokens that carry loss, as text."""
    runs, current = [], []
    for piece, has_loss in [*loss_view(examples, index, tokenizer), ("", False)]:
        if has_loss:
            current.append(piece)
        elif current:
            runs.append(" ".join(current))
            current = []
    return runs


@pytest.mark.acid("chat_format", 2)
@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_the_mask_covers_each_assistant_turn_with_its_end_and_nothing_else(template):
    tokenizer = word_tokenizer("gpt", chat_template=template, eos_token="<|im_end|>")
    examples = encoded(tokenizer)
    assert learnt(examples, tokenizer) == ["two <|im_end|>", "because sun <|im_end|>"]
    assert examples.n_targets.tolist() == [5]
    assert "".join(t for t, _ in loss_view(examples, 0, tokenizer)).startswith("<|im_start|>system\ngooddog<|im_end|>")


def test_loss_on_all_tokens_is_a_choice():
    tokenizer = word_tokenizer("gpt", chat_template=CHATML)
    examples = encoded(tokenizer, loss_on="all")
    assert examples.n_targets.tolist() == [len(examples.ids) - 1]


@pytest.mark.acid("chat_format", 1)
def test_prompt_tokens_in_training_are_those_of_generation():
    tokenizer = word_tokenizer("gpt", chat_template=CHATML)
    ids = encoded(tokenizer).ids.tolist()
    with Chat(tokenizer) as chat:
        for k in (2, 4):
            prompt = chat.prompt(TWO_TURNS[:k])
            assert ids[: len(prompt)] == prompt
    asked = encoded(tokenizer, with_targets=False)
    assert asked.ids.tolist() == prompt
    assert asked.labels is None


def test_one_bos_whether_the_template_or_the_tokenizer_writes_it():
    for template in (BOS_FIRST, None):
        tokenizer = word_tokenizer("bos", chat_template=template)
        ids = encoded(tokenizer).ids.tolist()
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1
        with Chat(tokenizer) as chat:
            assert chat.prompt(TWO_TURNS[:2]).count(tokenizer.bos_token_id) == 1


def test_a_double_bos_is_refused():
    tokenizer = word_tokenizer("bos", chat_template="{{ bos_token }}" + BOS_FIRST)
    with pytest.raises(DataError, match=r"begins with '<s>' twice"):
        encoded(tokenizer)


def test_a_tokenizer_without_template_gets_the_default_one_and_says_so():
    tokenizer = word_tokenizer("gpt")
    examples = encoded(tokenizer)
    assert learnt(examples, tokenizer) == ["two </s>", "because sun </s>"]
    assert any("luthier's default" in note for note in examples.ledger.notes)
    before = ChatTemplate.of(tokenizer).digest
    tokenizer.pad_token = "<s>"
    assert ChatTemplate.of(tokenizer).digest == before
    tokenizer.eos_token = "<|im_end|>"
    assert ChatTemplate.of(tokenizer).digest != before
    assert ChatTemplate.of(tokenizer).digest != ChatTemplate.of(word_tokenizer("gpt", chat_template=CHATML)).digest


def test_a_template_without_end_token_gets_one_that_carries_loss():
    tokenizer = word_tokenizer("gpt", chat_template=NO_END)
    examples = encoded(tokenizer)
    assert learnt(examples, tokenizer)[-1] == "because sun </s>"
    assert examples.ids[-1] == tokenizer.eos_token_id
    assert any("end token; it was added" in note for note in examples.ledger.notes)


def test_a_template_that_writes_earlier_turns_differently_is_rendered_turn_by_turn():
    tokenizer = word_tokenizer("gpt", chat_template=FORGETS)
    examples = encoded(tokenizer)
    assert examples.rows.tolist() == [0, 0]
    assert learnt(examples, tokenizer, 0) == ["! two </s>"]
    assert learnt(examples, tokenizer, 1) == ["! because sun </s>"]
    assert [r["status"] for r in examples.ledger] == ["used"]
    assert any("turn by turn" in note for note in examples.ledger.notes)


@pytest.mark.fault("F32", "rendered row")
@pytest.mark.acid("chat_format", 3)
@pytest.mark.parametrize(
    ("template", "words"),
    [
        (DROPS, ["drops or changes", "'two'", "how far is it"]),
        (OWN_PROMPT, ["does not continue its own generation prompt", "how far is it"]),
        (RAISES, ["roles must alternate", "good dog"]),
    ],
)
def test_a_template_that_cannot_teach_is_refused_with_the_rendered_row(template, words):
    tokenizer = word_tokenizer("gpt", chat_template=template)
    with pytest.raises(DataError) as caught:
        encoded(tokenizer)
    for word in [*words, "chats.jsonl:1"]:
        assert word in str(caught.value)


def test_a_broken_template_is_refused_with_its_line():
    tokenizer = word_tokenizer("gpt", chat_template="{% for m in messages %}")
    with pytest.raises(ModelError, match=r"chat template:1"):
        encoded(tokenizer)


@pytest.mark.acid("chat_format", 4)
def test_a_system_message_that_the_template_drops_is_reported():
    examples = encoded(word_tokenizer("gpt", chat_template=NO_SYSTEM))
    assert any("1 rows have a system message that the template leaves out" in note for note in examples.ledger.notes)


def test_a_tokenizer_without_end_token_cannot_teach_to_stop():
    with pytest.raises(ModelError, match="no end token"):
        encoded(word_tokenizer("gpt", eos_token=None))


def test_openai_and_sharegpt_layouts_mean_the_same():
    openai = [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "text", "text": "b"}]}]
    sharegpt = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    wanted = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert read_messages(openai, "messages") == read_messages(sharegpt, "messages") == wanted
    assert read_messages('[{"from": "human", "value": "a"}]', "messages") == wanted[:1]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([{"role": "asistant", "content": "a"}], ["message 1", "'asistant'", "assistant, "]),
        ([{"role": "user", "content": "a"}, {"content": "b"}], ["message 2", "no role", "content"]),
        ([{"role": "user", "content": 4}], ["message 1", "4", "must be text"]),
        ([{"role": "user", "content": [{"type": "image_url"}]}], ["no text"]),
        (["hello"], ["message 1", "'hello'"]),
        ("hello", ["no JSON list", "'hello'"]),
        ([], ["must be a list of messages"]),
        (None, ["must be a list of messages"]),
    ],
)
def test_a_malformed_message_is_named(value, words):
    with pytest.raises(DataError) as caught:
        read_messages(value, "messages")
    for word in words:
        assert word in str(caught.value)


def test_a_wrong_role_refuses_its_row_with_the_role_and_no_other_row():
    tokenizer = word_tokenizer("gpt", chat_template=CHATML)
    wrong = [{"role": "user", "content": "why"}, {"role": "asistant", "content": "two"}]
    examples = encoded(tokenizer, [TWO_TURNS, wrong, TWO_TURNS], accept=0.5)
    records = list(examples.ledger)
    assert [r["status"] for r in records] == ["used", "refused", "used"]
    assert "'asistant'" in records[1]["reason"]
    assert examples.rows.tolist() == [0, 2]
    with pytest.raises(DataError, match=r"1 of 3 rows cannot be used .*chats\.jsonl:2.*'asistant'"):
        encoded(tokenizer, [TWO_TURNS, wrong, TWO_TURNS], accept=0.05)


def test_a_chat_without_answer_or_with_an_empty_one_is_refused():
    tokenizer = word_tokenizer("gpt", chat_template=CHATML)
    with pytest.raises(DataError, match="no message is the assistant's"):
        encoded(tokenizer, TWO_TURNS[:2])
    with pytest.raises(DataError, match="message 2, of the assistant, is empty"):
        encoded(tokenizer, [{"role": "user", "content": "why"}, {"role": "assistant", "content": " "}])


@pytest.mark.fault("F29", "no target")
def test_truncation_is_counted_and_never_leaves_a_row_without_target():
    tokenizer = word_tokenizer("gpt", chat_template=CHATML)
    n = len(encoded(tokenizer).ids)
    first = list(encoded(tokenizer).labels).index(tokenizer.convert_tokens_to_ids("two"))
    for size in range(2, n + 3):
        if size <= first:
            with pytest.raises(DataError, match=f"begins at token {first + 1}, but only {size} tokens fit"):
                encoded(tokenizer, max_length=size)
            continue
        examples = encoded(tokenizer, max_length=size)
        record = next(iter(examples.ledger))
        assert record["tokens"] == len(examples.ids) == min(n, size)
        assert record["targets"] == examples.n_targets[0] == (examples.labels != IGNORED).sum() > 0
        assert record["status"] == ("truncated" if size < n else "used")


def test_a_token_that_joins_prompt_and_response_never_reaches_the_mask():
    # "assistant:" + "two" is one word for this tokenizer when they stand together.
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "</s>", "why", "A:", "two", "A:two"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    inner.add_special_tokens(["</s>"])
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content if m.role == 'user' else 'A:' + m.content + eos_token }} {% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    messages = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "two"}]
    with pytest.raises(DataError, match="cannot be told apart as tokens"):
        encoded(tokenizer, messages)


def test_byte_pairs_that_would_join_are_encoded_piece_by_piece():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary = {**alphabet, "</s>": 256, "ab": 257}
    inner = Tokenizer(models.BPE(vocabulary, merges=[("a", "b")]))
    inner.add_special_tokens(["</s>"])
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", clean_up_tokenization_spaces=False)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content if m.role == 'user' else 'a' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}a{% endif %}"
    )
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "bc"}]
    examples = encoded(tokenizer, messages)
    assert [tokenizer.decode([t]) for t in examples.ids] == ["q", "a", "b", "c", "</s>"]
    assert (examples.labels != IGNORED).tolist() == [False, False, True, True, True]
    assert any("piece by piece" in note for note in examples.ledger.notes)
    with Chat(tokenizer) as chat:
        assert chat.prompt(messages[:1]) == examples.ids[:2].tolist()


def test_sentence_pieces_keep_the_tokens_of_the_whole():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "</s>", "▁Q:", "▁A:", "▁why", "▁two", "▁"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.add_special_tokens(["</s>"])
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ ' Q: ' + m.content if m.role == 'user' else ' A: ' + m.content + eos_token }}"
        "{% endfor %}{% if add_generation_prompt %} A:{% endif %}"
    )
    messages = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "two"}]
    examples = encoded(tokenizer, messages)
    assert examples.ids.tolist() == tokenizer(" Q: why A: two</s>", add_special_tokens=False)["input_ids"]
    assert examples.ids[examples.labels != IGNORED].tolist() == [5, 1]


def conversation(rng, n):
    words = ["why", "how", "two", "sun", "moon", "how far is it", "is it", "assistant"]
    roles = itertools.cycle(["user", "assistant"])
    return [{"role": next(roles), "content": " ".join(rng.choice(words, rng.integers(1, 4)))} for _ in range(n)]


@pytest.mark.parametrize("template", [CHATML, BOS_FIRST, FORGETS, None])
def test_the_learnt_shape_of_a_template_gives_what_full_rendering_gives(template, monkeypatch):
    rng = np.random.default_rng(0)
    rows = [conversation(rng, int(rng.integers(2, 9))) for _ in range(40)]
    # A user who writes like the template: such a row must fall back to full rendering, not fool the search.
    rows[30][0]["content"] = "assistant:two</s> <|im_start|>assistant\ntwo<|im_end|>\n"
    tokenizer = word_tokenizer("gpt", chat_template=template)
    results = []
    for learnt in (1000, 3):
        monkeypatch.setattr("luthier.data.chat.LEARNT_ROWS", learnt)
        results.append(encoded(tokenizer, rows, accept=0.2))
    full, quick = results
    assert np.array_equal(full.ids, quick.ids)
    assert np.array_equal(full.labels, quick.labels)
    assert list(full.ledger) == list(quick.ledger)


def test_a_long_conversation_is_rendered_once_after_the_first_rows(monkeypatch):
    monkeypatch.setattr("luthier.data.chat.LEARNT_ROWS", 2)
    rng = np.random.default_rng(1)
    counts = []
    with Chat(word_tokenizer("gpt", chat_template=CHATML)) as chat:
        render = chat._renderer.render
        monkeypatch.setattr(chat._renderer, "render", lambda *a, **k: (counts.append(1), render(*a, **k))[1])
        for row in range(4):
            counts.clear()
            chat.plan(row, conversation(rng, 30), "x")
            assert len(counts) == 1 if row > 1 else len(counts) > 30


def test_a_message_that_holds_the_text_of_a_special_token_is_reported():
    tokenizer = word_tokenizer("gpt", chat_template=CHATML)
    examples = encoded(tokenizer, [{"role": "user", "content": "why <|im_end|> two"}, *TWO_TURNS[2:]])
    assert any("1 messages hold the text of a special token" in note for note in examples.ledger.notes)


@pytest.mark.samples
def test_a_real_template_learns_each_answer_with_its_end_token():
    from transformers import AutoTokenizer

    from luthier import samples
    from luthier.data.tokenizer import choose_pad

    tokenizer = AutoTokenizer.from_pretrained(samples.model_path("smollm2-135m"))
    assert choose_pad(tokenizer, len(tokenizer)).id != tokenizer.eos_token_id  # its own is the end token
    rows = samples.load_sample("chitchat").train[:20]
    examples = encoded(tokenizer, [r["messages"] for r in rows], max_length=10**6)
    for i, row in enumerate(rows):
        said = [m["content"].strip() for m in row["messages"] if m["role"] == "assistant"]
        labels = examples.labels[examples.offsets[i] : examples.offsets[i + 1]]
        text = tokenizer.decode([t for t in labels if t != IGNORED])
        assert text == "".join(answer + "<|im_end|>" for answer in said)
