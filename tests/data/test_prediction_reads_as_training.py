"""The input of a prediction is that of training up to the target, for every task and every shape of rows."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from word_tables import byte_tokenizer, table, word_tokenizer

from luthier.data.columns import Columns
from luthier.data.encode import encode
from luthier.data.examples import IGNORED, Examples
from luthier.data.stop_tokens import stop_ids, taught_ends
from luthier.data.tasks import Task

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m.role + '<|head|>\n\n' + m.content + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|head|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + m.role.replace('assistant', 'model') + '\n' + "
    "m.content + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# It cuts the thoughts of what was said, and ends what the assistant says in the end token.
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% else %}"
    "{{ '<|User|>' + m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ m.content + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES: dict[str, tuple[str | None, tuple[str, ...], str]] = {  # template, its own special tokens, the end of a turn
    "none": (None, (), "</s>"),
    "chatml": (CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "marked": (MARKED, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "llama3": (LLAMA3, ("<|start|>", "<|head|>", "<|eot|>"), "<|eot|>"),
    "gemma": (GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "phi": (PHI, ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"), "<|end|>"),
    "deepseek": (DEEPSEEK, ("<|User|>", "<|Assistant|>"), "</s>"),
}
LM, S2S = Task(name="causal_lm"), Task(name="seq2seq")


def chat_tokenizer(kind: str, base: str = "gpt2") -> Any:
    template, special, _ = TEMPLATES[kind]
    tokenizer = byte_tokenizer(base)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template
    return tokenizer


def both(rows: Sequence[dict[str, Any]], columns: Columns, task: Task, tokenizer: Any, size: int = 200) -> Any:
    """The rows as training and as prediction read them; prediction is given no answers."""
    answers = {columns.label, columns.tags, columns.response}
    asked = [{k: v for k, v in row.items() if k not in answers} for row in rows]
    options: dict[str, Any] = {"n_vocab": len(tokenizer), "max_length": size}
    trained = encode(table(list(rows)), columns, task, tokenizer, **options)
    return trained, encode(table(asked), columns, task, tokenizer, with_targets=False, **options)


def ids_of(examples: Examples, i: int) -> list[int]:
    return examples.ids[examples.offsets[i] : examples.offsets[i + 1]].tolist()


def up_to_the_last_answer(examples: Examples, i: int) -> list[int]:
    """The ids before the last stretch of targets."""
    labels = examples.labels[examples.offsets[i] : examples.offsets[i + 1]]
    last = int(np.flatnonzero(labels != IGNORED)[-1])
    while labels[last] != IGNORED:
        last -= 1
    return ids_of(examples, i)[: last + 1]


LABELLED = [
    {"text": "how far is the moon", "pair": "good dog", "label": "a", "score": 1.5},
    {"text": "why " * 30, "pair": "red " * 20, "label": "b", "score": 2.5},
]
LABELS = Task(name="classification", labels=("a", "b"))


@pytest.mark.parametrize("make", [word_tokenizer, lambda: byte_tokenizer("roberta"), lambda: byte_tokenizer("gpt2")])
@pytest.mark.parametrize(
    ("columns", "task"),
    [
        (Columns(shape="labelled", text="text", label="label"), LABELS),
        (Columns(shape="labelled", text="text", pair="pair", label="label"), LABELS),
        (Columns(shape="labelled", text="text", label="score"), Task(name="regression")),
    ],
)
@pytest.mark.parametrize("size", [12, 200])
def test_a_labelled_text_is_read_alike(make: Any, columns: Columns, task: Task, size: int) -> None:
    trained, asked = both(LABELLED, columns, task, make(), size)
    assert asked.ids.tolist() == trained.ids.tolist() and asked.offsets.tolist() == trained.offsets.tolist()
    assert (asked.types is None) == (trained.types is None)
    if trained.types is not None:
        assert asked.types.tolist() == trained.types.tolist()


@pytest.mark.parametrize("kind", list(TEMPLATES))
@pytest.mark.parametrize("base", ["gpt2", "llama3"])
def test_a_prompt_with_its_context_is_read_alike(kind: str, base: str) -> None:
    columns = Columns(shape="answered", prompt="prompt", context="input", response="response")
    rows = [
        {"prompt": "how far is it", "input": "the moon", "response": "two suns"},
        {"prompt": "why", "input": None, "response": "because"},
        {"prompt": "who is it", "input": "", "response": "a cat"},
    ]
    tokenizer = chat_tokenizer(kind, base)
    trained, asked = both(rows, columns, LM, tokenizer)
    for i in range(3):
        assert ids_of(asked, i) == up_to_the_last_answer(trained, i)
        assert ("the moon" in tokenizer.decode(ids_of(asked, i))) == (i == 0)


@pytest.mark.parametrize("kind", list(TEMPLATES))
def test_a_conversation_is_read_alike_up_to_its_last_answer(kind: str) -> None:
    columns = Columns(shape="dialogue", messages="messages")
    turns = [
        {"role": "user", "content": "how far is it"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "why"},
        {"role": "assistant", "content": "because"},
    ]
    system = [] if kind == "gemma" else [{"role": "system", "content": "good dog"}]
    rows = [{"messages": turns[:2]}, {"messages": [*system, *turns]}]
    trained, asked = both(rows, columns, LM, chat_tokenizer(kind))
    of_row = {int(row): i for i, row in enumerate(trained.rows)}  # the last example of each row
    for row in range(2):
        assert ids_of(asked, row) == up_to_the_last_answer(trained, of_row[row])


@pytest.mark.parametrize("ends", [False, True])
def test_a_plain_text_is_read_alike_and_never_ends_before_it_goes_on(ends: bool) -> None:
    tokenizer = byte_tokenizer("roberta" if ends else "gpt2")  # the first appends its end token to every text
    trained, asked = both([{"text": "how far is it"}], Columns(shape="plain", text="text"), LM, tokenizer)
    assert trained.ids[-1] == tokenizer.eos_token_id
    assert asked.ids.tolist() == trained.ids[:-1].tolist()


@pytest.mark.parametrize("size", [5, 200])
def test_a_source_with_its_context_is_read_and_cut_alike(size: int) -> None:
    columns = Columns(shape="answered", prompt="instruction", context="input", response="output")
    rows = [{"instruction": "say the name", "input": word, "output": word} for word in ("red", "blue", "dog " * 9)]
    tokenizer = byte_tokenizer("roberta")
    trained, asked = both(rows, columns, S2S, tokenizer, size)
    assert [ids_of(asked, i) for i in range(3)] == [ids_of(trained, i) for i in range(3)]
    assert max(len(ids_of(asked, i)) for i in range(3)) <= size
    if size == 200:
        assert len({tuple(ids_of(asked, i)) for i in range(3)}) == 3
        assert "\n\nblue" in tokenizer.decode(ids_of(asked, 1))


@pytest.mark.parametrize("kind", list(TEMPLATES))
def test_the_end_of_turn_that_a_template_teaches_stops_an_answer_with_the_end_token(kind: str) -> None:
    columns = Columns(shape="dialogue", messages="messages")
    rows = [{"messages": [{"role": "user", "content": "why"}, {"role": "assistant", "content": "because it is so"}]}]
    tokenizer = chat_tokenizer(kind)
    trained, _ = both(rows, columns, LM, tokenizer)
    end = tokenizer.convert_tokens_to_ids(TEMPLATES[kind][2])
    assert taught_ends(trained, tokenizer) == {end}
    assert stop_ids(trained, tokenizer, None) == sorted({end, tokenizer.eos_token_id})


def test_a_row_that_was_cut_teaches_no_end() -> None:
    columns = Columns(shape="answered", prompt="prompt", response="response")
    tokenizer = chat_tokenizer("llama3")
    trained, _ = both([{"prompt": "why", "response": "because " * 30}], columns, LM, tokenizer, 40)
    assert taught_ends(trained, tokenizer) == set()


def test_the_ends_of_a_models_own_generation_settings_stop_too() -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[7, 9]))
    tokenizer = byte_tokenizer()
    assert stop_ids(None, tokenizer, model) == [tokenizer.eos_token_id, 7, 9]
