"""What chat rows say beside role and content is heeded, or named as what nobody reads."""

import json
from typing import Any

import pytest
from data.test_prediction_reads_as_training import CHATML, chat_tokenizer
from word_tables import table

from luthier.core import DataError
from luthier.data.columns import Columns, find_columns
from luthier.data.encode import encode
from luthier.data.examples import IGNORED, Examples
from luthier.data.tasks import Task
from luthier.runs.spec import DataSpec

LM = Task(name="causal_lm")
CALLS = (
    "{% if tools %}{{ 'tools: ' + tools | tojson + '\n' }}{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' }}{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ 'call ' + c.function.name + ' ' }}ARGUMENTS{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OBJECTS = CALLS.replace("ARGUMENTS", "{{ c.function.arguments | tojson }}")
TEXTS = CALLS.replace("ARGUMENTS", "{{ c.function.arguments }}")
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"city": "string"}, "strict": None}}
USER, SAID = {"role": "user", "content": "why"}, {"role": "assistant", "content": "because"}


def read(row: dict[str, Any], template: str = CHATML) -> tuple[Any, Examples]:
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = template
    data = table([row])
    columns = find_columns(data, DataSpec(source="rows"), "causal_lm")
    return tokenizer, encode(data, columns, LM, tokenizer, n_vocab=len(tokenizer), max_length=400)


def whole(tokenizer: Any, examples: Examples) -> str:
    return tokenizer.decode(examples.ids.tolist())


def learnt(tokenizer: Any, examples: Examples) -> str:
    return tokenizer.decode([t for t in examples.labels.tolist() if t != IGNORED])


def call_turn(arguments: Any) -> dict[str, Any]:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def test_a_turn_of_weight_0_is_read_and_carries_no_loss() -> None:
    wrong = {"role": "assistant", "content": "red red", "weight": 0}
    tokenizer, examples = read({"messages": [USER, wrong, USER, {**SAID, "weight": 1}]})
    assert "red red" in whole(tokenizer, examples)
    assert learnt(tokenizer, examples) == "because<|im_end|>"
    assert any("1 turns have the weight 0" in note for note in examples.ledger.notes)
    with pytest.raises(DataError, match=r"weight 0\.5; it must be 0"):
        read({"messages": [USER, {**SAID, "weight": 0.5}]})
    with pytest.raises(DataError, match="every turn of the assistant has the weight 0"):
        read({"messages": [USER, {**SAID, "weight": 0}]})


def test_system_and_history_beside_a_prompt_become_turns() -> None:
    row = {"system": "good dog", "history": [["how far", "two"]], "instruction": "why", "input": "", "output": "sun"}
    tokenizer, examples = read(row)
    text = whole(tokenizer, examples)
    assert text.startswith("<|im_start|>system\ngood dog<|im_end|>\n<|im_start|>user\nhow far<|im_end|>")
    assert learnt(tokenizer, examples) == "two<|im_end|>sun<|im_end|>"


def test_a_prompt_and_a_completion_of_messages_are_one_conversation_and_the_completion_is_learnt() -> None:
    prompt = [{"role": "system", "content": "good"}, USER, {"role": "assistant", "content": "red"}, USER]
    tokenizer, examples = read({"prompt": prompt, "completion": [SAID]})
    assert learnt(tokenizer, examples) == "because<|im_end|>" and "red" in whole(tokenizer, examples)


@pytest.mark.parametrize("template", [OBJECTS, TEXTS])
@pytest.mark.parametrize("arguments", [{"city": "paris", "day": None}, '{"city": "paris"}'])
def test_arguments_of_calls_reach_the_template_in_the_form_that_it_writes_unescaped(
    template: str, arguments: Any
) -> None:
    tokenizer, examples = read({"messages": [USER, call_turn(arguments), SAID]}, template)
    assert 'call weather {"city": "paris"}' in learnt(tokenizer, examples)


def test_tools_of_a_row_reach_the_template_or_are_said_to_be_read_by_nobody() -> None:
    row = {"messages": [USER, call_turn({"city": "rome"}), SAID], "tools": json.dumps([TOOL])}
    tokenizer, examples = read(row, OBJECTS)
    assert '"name": "weather"' in whole(tokenizer, examples) and "strict" not in whole(tokenizer, examples)
    tokenizer, unread = read(row)
    assert learnt(tokenizer, unread) == "because<|im_end|>", "a call that is not shown is no empty answer to learn"
    assert any("rows offer tools that this template does not read" in note for note in unread.ledger.notes)
    assert any("the calls are not learnt" in note for note in unread.ledger.notes)
    with pytest.raises(DataError, match="must be a list of functions"):
        read({**row, "tools": "weather"}, OBJECTS)


def test_sharegpt_function_calls_are_calls_of_the_assistant() -> None:
    turns = [
        {"from": "human", "value": "why"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "rome"}}'},
        {"from": "observation", "value": "sun"},
        {"from": "gpt", "value": "because"},
    ]
    tokenizer, examples = read({"conversations": turns}, OBJECTS)
    assert 'call weather {"city": "rome"}' in learnt(tokenizer, examples)
    assert "<|im_start|>tool\nsun" in whole(tokenizer, examples)


def test_empty_lists_of_calls_are_as_none() -> None:
    tokenizer, examples = read({"messages": [{**USER, "tool_calls": []}, {**SAID, "tool_calls": []}]}, OBJECTS)
    assert learnt(tokenizer, examples) == "because<|im_end|>"


def test_thoughts_that_a_template_cuts_and_fields_that_it_does_not_read_are_counted() -> None:
    cuts = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
    _, examples = read({"messages": [USER, {"role": "assistant", "content": "<think>red</think>because"}]}, cuts)
    assert any("1 thoughts are left out" in note for note in examples.ledger.notes)
    _, examples = read({"messages": [USER, {**SAID, "reasoning_content": "it is so"}]})
    assert any("1 messages have the field 'reasoning_content'" in note for note in examples.ledger.notes)
    kept = CHATML.replace("m.content", "(m.reasoning_content or '') + m.content")
    _, examples = read({"messages": [USER, {**SAID, "reasoning_content": "it is so"}]}, kept)
    assert not any("reasoning_content" in note or "thoughts" in note for note in examples.ledger.notes)


def test_columns_around_a_conversation_are_found_and_said() -> None:
    data = table([{"messages": [USER, SAID], "tools": "[]", "system": "good", "other": 1}])
    found = find_columns(data, DataSpec(source="rows"), "causal_lm")
    assert found == Columns(shape="dialogue", messages="messages", tools="tools", system="system", unused=("other",))
    assert "tools = 'tools'" in found.sentence()
