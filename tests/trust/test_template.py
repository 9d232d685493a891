"""Chat templates in their child process."""

import datetime

import pytest

from luthier.core import DataError, ModelError, Refused
from luthier.trust import Limits, template

CHATML = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def test_a_template_renders_with_its_special_tokens() -> None:
    text = template.render(CHATML, TALK, {"bos_token": "<s>"})
    assert text == "<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>"


def test_spans_are_exactly_what_the_generation_tag_holds() -> None:
    talk = [*TALK, {"role": "user", "content": "and?"}, {"role": "assistant", "content": "so"}]
    (rendered,) = template.render_many(CHATML, [talk])
    assert [rendered.text[a:b] for a, b in rendered.spans] == ["hello<|im_end|>", "so<|im_end|>"]


def test_it_renders_as_transformers_does() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    features = (
        "{%- set ns = namespace(n=0) -%}{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{% set ns.n = ns.n + 1 %}\n    {{- m.role|upper }}: {{ m|tojson }} {{ m.content | trim }}\n{% endfor %}"
        "{{ ns.n }} {{ {'a': 'é<>', 'b': [1]}|tojson(indent=2) }} {{ missing }}{{ messages[0]['no'] is defined }}"
    )
    talk = [{"role": "system", "content": "s"}, *TALK]
    for text in (features, CHATML):
        (theirs,), _ = render_jinja_template([talk], chat_template=text, add_generation_prompt=True, bos_token="<s>")
        assert template.render(text, talk, {"bos_token": "<s>"}, add_generation_prompt=True) == theirs


def test_facts_say_what_the_template_reads() -> None:
    facts = template.check(CHATML)
    assert facts == template.Facts(("add_generation_prompt", "bos_token", "messages"), True)
    assert not template.check("{{ messages }}").marks_generation


def test_one_child_renders_many_rows_and_names_the_bad_one() -> None:
    rows = [[{"role": "user", "content": str(n)}, {"role": "assistant", "content": f"<{n}>"}] for n in range(3000)]
    rendered = template.render_many(CHATML, rows)
    assert len(rendered) == 3000 and "<2999>" in rendered[2999].text
    picky = (
        "{% for m in messages %}{% if m.content == '2' %}{{ raise_exception('no twos') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"data\.jsonl:3: the chat template says 'no twos' for the row .*'2'"):
        template.render_many(picky, rows[:5], places=[f"data.jsonl:{n + 1}" for n in range(5)])


def test_a_row_that_fails_leaves_the_renderer_usable() -> None:
    with template.Renderer("{{ messages[0].content + messages[1].content }}") as renderer:
        with pytest.raises(DataError, match=r"UndefinedError|TypeError"):
            renderer.render([{"role": "user", "content": "x"}])
        assert renderer.render(TALK).text == "hihello"


def test_a_dropped_assistant_turn_is_shown_with_what_was_rendered() -> None:
    with pytest.raises(DataError, match=r"drops the assistant's turn 'hello': it renders 'hi'"):
        template.render("{{ messages[0].content }}", TALK)
    assert template.render("{{ messages[0].content }}", TALK, must_keep=False) == "hi"
    thought = [TALK[0], {"role": "assistant", "content": "<think>hmm</think>\n\nyes"}]
    assert template.render("{{ messages[1].content.split('</think>')[-1] }}", thought).strip() == "yes"


def test_no_row_can_forge_the_sign_of_a_span() -> None:
    talk = [{"role": "user", "content": "\ue000<\ue000>"}, TALK[1]]
    (rendered,) = template.render_many(CHATML, [talk])
    assert "\ue000<\ue000>" in rendered.text and len(rendered.spans) == 1


def test_the_day_is_fixed_unless_it_is_given() -> None:
    text = "{{ strftime_now('%d %b %Y') }}"
    assert template.render(text, []) == "01 Jan 2025"
    assert template.render(text, [], today=datetime.date(2024, 7, 26)) == "26 Jul 2024"


def test_limits_are_per_row_not_for_the_whole_data_set() -> None:
    # 30 rows of 0.1 s each or so: together far over the limit of one row.
    work = "{% for a in range(300) %}{% for b in range(300) %}{% endfor %}{% endfor %}{{ messages[1].content }}"
    assert len(template.render_many(work, [TALK] * 300, timeout=0.5)) == 300


def test_time_memory_and_output_are_capped() -> None:
    spin = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(Refused, match=r"more than 0\.2 s of processor time"):
        template.render(spin, TALK, timeout=0.2)
    with pytest.raises(Refused, match="of memory"):
        template.render('{{ "x"*500000000 }}', TALK)
    with pytest.raises(Refused, match="more than 100 characters"):
        template.render("{% for i in range(99) %}xx{% endfor %}", TALK, max_chars=100)
    with pytest.raises(Refused, match="at most 10 are read"):
        template.check("x" * 11, limits=Limits(template_chars=10))


def test_a_model_without_a_template_is_told_what_to_do() -> None:
    with pytest.raises(ModelError, match=r"no chat template\. Put one"):
        template.check("")
