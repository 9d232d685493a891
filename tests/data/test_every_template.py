"""Templates of the kinds that people train today: what carries loss is what the assistant says and its stop token."""

from typing import Any

import numpy as np
import pytest
from data.test_prediction_reads_as_training import TEMPLATES, chat_tokenizer
from word_tables import byte_tokenizer, table

from luthier.core import DataError, LuthierError
from luthier.data.columns import Columns, find_columns
from luthier.data.encode import encode
from luthier.data.examples import IGNORED, Examples
from luthier.data.infer_task import infer_task
from luthier.data.load_data import load_data
from luthier.data.tasks import Task
from luthier.runs.spec import DataSpec
from luthier.samples import model_path
from luthier.workflow.load_model import find_model, load_tokenizer

LM, DIALOGUE = Task(name="causal_lm"), Columns(shape="dialogue", messages="messages")

# The system's words go into the first turn of the user; other orders of roles are refused by the template itself.
ALTERNATING = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set said = messages[0].content + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set said = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must take turns') }}{% endif %}"
    "{{ '<start_of_turn>' + m.role.replace('assistant', 'model') + '\n' }}{% if loop.first %}{{ said }}{% endif %}"
    "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Blanks around what is said, and the end token after each answer alone.
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)
# Tools before the talk, calls as objects between marks, what tools answer in a turn of the user.
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\nTools: ' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{{ '<|im_start|>user\n<answer>' + m.content + '</answer><|im_end|>\n' }}{% else %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '<call>' + {'name': c.function.name, 'arguments': c.function.arguments} | tojson + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Thoughts stay in the last turn alone, which is opened by them.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1].lstrip() }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKS = ("<|im_start|>", "<|im_end|>")
MORE = {
    "alternating": (ALTERNATING, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "inst": (INST, ("[INST]", "[/INST]"), "</s>"),
    "tools": (TOOLS, MARKS, "<|im_end|>"),
    "thinking": (THINKING, MARKS, "<|im_end|>"),
}


def tokenizer_of(kind: str) -> tuple[Any, str]:
    if kind in TEMPLATES:
        return chat_tokenizer(kind), TEMPLATES[kind][2]
    template, special, end = MORE[kind]
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template
    return tokenizer, end


def turns(*said: str, system: tuple[str, ...] = ()) -> list[dict[str, str]]:
    talk = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]
    return [*({"role": "system", "content": text} for text in system), *talk]


CHATS = {
    "one turn": turns("why", "because sun"),
    "three turns": turns("how far", "two", "why", "because", "who", "Ångström, 東京 🙂"),
    "a system": turns("how far", "two miles", "and then", "home", system=("Be short.",)),
    "an answer that its prompt holds": turns("say two", "two", "say two again", "say two"),
    "lines and code": turns("code", "def f(x):\n    return x\n\nprint(f(1))", "more", "- a\n- b"),
}


def encoded(tokenizer: Any, rows: list[dict[str, Any]], **options: Any) -> Examples:
    data = table(rows)
    columns = find_columns(data, DataSpec(source="rows"), "causal_lm")
    return encode(data, columns, LM, tokenizer, n_vocab=len(tokenizer), max_length=600, accept_refused=0.0, **options)


def told(tokenizer: Any, examples: Examples) -> list[str]:
    """Each stretch of tokens that carries loss, decoded."""
    found = []
    for i in range(len(examples)):
        piece = slice(examples.offsets[i], examples.offsets[i + 1])
        ids, has = examples.ids[piece], examples.labels[piece] != IGNORED
        assert np.array_equal(examples.labels[piece][has], ids[has]), "what is learnt is what stands there"
        edges = np.flatnonzero(np.diff(np.concatenate([[0], has.astype(int), [0]])))
        found += [tokenizer.decode(ids[a:b].tolist()) for a, b in edges.reshape(-1, 2)]
    return found


@pytest.mark.acid("chat_format", 2)
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("kind", [*TEMPLATES, *MORE])
def test_masks_decode_to_exactly_what_the_assistant_says_with_its_stop_token(kind: str, chat: str) -> None:
    tokenizer, end = tokenizer_of(kind)
    wanted = [m["content"] + end for m in CHATS[chat] if m["role"] == "assistant"]
    blank = " " if kind == "inst" else ""
    assert told(tokenizer, encoded(tokenizer, [{"messages": CHATS[chat]}])) == [blank + text for text in wanted]


def test_the_masks_of_a_real_template_on_real_chats_decode_to_the_answers() -> None:
    tokenizer = load_tokenizer(find_model(str(model_path("smollm2-135m"))))
    data = load_data(DataSpec(source="sample:chitchat"), "causal_lm", None)
    some = data.train.take(range(0, len(data.train), len(data.train) // 30))
    examples = encode(some, data.columns, LM, tokenizer, n_vocab=len(tokenizer), max_length=20_000)
    cut = {record["row"] for record in examples.ledger if record["status"] == "truncated"}
    assert not cut, "whole talks fit"
    read = [some.rows[row]["messages"] for row in examples.rows.tolist()]
    wanted = [m["content"] + "<|im_end|>" for talk in read for m in talk if m["role"] == "assistant"]
    assert told(tokenizer, examples) == wanted and len(read) > 25


def test_thoughts_are_learnt_where_the_template_writes_them_and_counted_where_not() -> None:
    chat = turns("why", "<think>sun?</think>two", "who", "<think>moon</think>far")
    tokenizer, end = tokenizer_of("thinking")
    found = told(tokenizer, encoded(tokenizer, [{"messages": chat}]))
    assert found == [f"<think>sun?</think>two{end}", f"<think>moon</think>far{end}"], "each as it is generated"
    tokenizer, end = tokenizer_of("deepseek")
    examples = encoded(tokenizer, [{"messages": chat}])
    assert told(tokenizer, examples) == [f"two{end}", f"far{end}"]
    assert any("2 thoughts are left out" in note for note in examples.ledger.notes)


def test_calls_of_tools_are_learnt_and_what_tools_answer_is_not() -> None:
    tokenizer, end = tokenizer_of("tools")
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    asks = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    chat = [
        *turns("how is Rome"),
        {"role": "assistant", "content": "", "tool_calls": [asks]},
        {"role": "tool", "tool_call_id": "c1", "content": "sun"},
        {"role": "assistant", "content": "It is sun."},
    ]
    examples = encoded(tokenizer, [{"messages": chat, "tools": [tool]}])
    call = '<call>{"name": "weather", "arguments": {"city": "Rome"}}</call>'
    assert told(tokenizer, examples) == [call + end, "It is sun." + end]
    assert '"name": "weather", "parameters"' in tokenizer.decode(examples.ids.tolist())


@pytest.mark.parametrize("chat", [turns("a", "b", system=("one", "two")), [*turns("a"), *turns("b", "c")]])
def test_roles_out_of_order_are_learnt_or_refused_with_the_template_s_own_words(chat: list[dict[str, str]]) -> None:
    tokenizer, end = tokenizer_of("chatml")
    assert told(tokenizer, encoded(tokenizer, [{"messages": chat}])) == [chat[-1]["content"] + end]
    tokenizer, _ = tokenizer_of("alternating")
    with pytest.raises(DataError, match="roles must take turns"):
        encoded(tokenizer, [{"messages": chat}])


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "time"),
        ("{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}", "characters|long|output"),
        ("{{ messages[9].content }}", "messages|index|undefined|no element"),
    ],
)
def test_templates_that_loop_write_without_end_or_break_are_refused_in_a_second(template: str, why: str) -> None:
    tokenizer, _ = tokenizer_of("chatml")
    tokenizer.chat_template = template
    with pytest.raises(LuthierError, match=f"(?i){why}"):
        encoded(tokenizer, [{"messages": CHATS["one turn"]}])


def test_an_empty_answer_and_a_talk_that_leaves_no_answer_are_refused_with_their_place() -> None:
    tokenizer, _ = tokenizer_of("chatml")
    with pytest.raises(DataError, match=r"rows\.csv:2: message 2, of the assistant, is empty"):
        encoded(tokenizer, [{"messages": turns("why", " ")}])
    with pytest.raises(DataError, match="only 600 tokens fit"):
        encoded(tokenizer, [{"messages": turns("why " * 900, "two")}])


USER, SAID = {"role": "user", "content": "why"}, {"role": "assistant", "content": "because"}
FORMATS = {  # name -> a row, its task, its shape
    "prompt and completion": ({"prompt": "why", "completion": "because"}, "causal_lm", "answered"),
    "Alpaca": ({"instruction": "why", "input": "sun", "output": "because"}, "causal_lm", "answered"),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "why"}, {"from": "gpt", "value": "because"}]},
        "causal_lm",
        "dialogue",
    ),
    "messages": ({"messages": [USER, SAID]}, "causal_lm", "dialogue"),
    "messages and tools": ({"messages": [USER, SAID], "tools": []}, "causal_lm", "dialogue"),
    "pairs": ({"prompt": "why", "chosen": "because", "rejected": "no"}, "preference", "preferred"),
    "pairs of talks": (
        {"chosen": [USER, SAID], "rejected": [USER, {**SAID, "content": "no"}]},
        "preference",
        "preferred",
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_found_by_convention_and_said(name: str) -> None:
    row, task, shape = FORMATS[name]
    data = table([row, row])
    columns = find_columns(data, DataSpec(source="rows"), "auto")
    assert columns.shape == shape and infer_task(data, None, columns).name == task
    assert columns.sentence().startswith("columns: ") and all(repr(c) in columns.sentence() for c in row)
    if task == "causal_lm":
        tokenizer, end = tokenizer_of("chatml")
        assert told(tokenizer, encoded(tokenizer, [row])) == ["because" + end]
