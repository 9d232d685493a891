import pytest
from word_tables import table

from luthier.core import DataError
from luthier.data.columns import find_columns
from luthier.runs.spec import DataSpec


def found(*names, task="auto", **flags):
    return find_columns(table([dict.fromkeys(names, "x")]), DataSpec(source="rows.csv", **flags), task)


@pytest.mark.parametrize(
    ("names", "used"),
    [
        (["text", "label"], {"text": "text", "label": "label"}),
        (["Sentence", "Labels", "idx"], {"text": "Sentence", "label": "Labels"}),
        (["question", "target"], None),
        (["content", "class"], {"text": "content", "label": "class"}),
        (["premise", "hypothesis", "label"], {"text": "premise", "pair": "hypothesis", "label": "label"}),
        (["text", "text_pair", "label"], {"text": "text", "pair": "text_pair", "label": "label"}),
        (["sentence1", "sentence2", "score"], {"text": "sentence1", "pair": "sentence2", "label": "score"}),
        (
            ["instruction", "input", "output", "text"],
            {"prompt": "instruction", "context": "input", "response": "output"},
        ),
        (["question", "answer"], {"prompt": "question", "response": "answer"}),
        (["prompt", "completion"], {"prompt": "prompt", "response": "completion"}),
        (["input", "output"], {"prompt": "input", "response": "output"}),
        (["article", "highlights"], {"prompt": "article", "response": "highlights"}),
        (["prompt", "response", "question", "choices", "answer"], {"prompt": "prompt", "response": "response"}),
        (["messages"], {"messages": "messages"}),
        (["id", "conversations"], {"messages": "conversations"}),
        (["tokens", "ner_tags"], {"tokens": "tokens", "tags": "ner_tags"}),
        (["tokens", "labels"], {"tokens": "tokens", "tags": "labels"}),
        (["text"], {"text": "text"}),
        (["text", "work"], {"text": "text"}),
    ],
)
def test_columns_are_found_by_the_names_that_data_sets_use(names, used):
    if used is None:
        with pytest.raises(DataError, match=r"could be a text with a label or a prompt with its response.*--task"):
            found(*names)
        return
    columns = found(*names)
    assert columns.used() == used
    for name in names:
        assert repr(name) in columns.sentence()
    assert set(columns.unused) == set(names) - set(used.values())


def test_the_task_settles_what_the_names_leave_open():
    assert found("question", "target", task="classification").shape == "labelled"
    assert found("question", "target", task="seq2seq").shape == "answered"


def test_flags_are_taken_as_they_are():
    columns = found("a", "b", "c", "text", text="b", label="c")
    assert columns.used() == {"text": "b", "label": "c"}
    assert found("a", "text", "label", pair="a").used() == {"text": "text", "pair": "a", "label": "label"}
    assert found("messages", "text", "label", messages="messages").shape == "dialogue"


@pytest.mark.parametrize(
    ("names", "flags", "words"),
    [
        (["text", "sentence", "label"], {}, ["'text' and 'sentence'", "--text"]),
        (["text", "label", "target"], {}, ["'label' and 'target'", "--label"]),
        (["foo", "bar"], {}, ["'foo', 'bar'", "--text and --label"]),
        (["texts", "label"], {"text": "txts"}, ["no column 'txts'", "'texts'", "--text"]),
        (["text", "label"], {"label": "kind"}, ["no column 'kind'", "'text', 'label'"]),
        (["text", "Text", "label"], {}, ["differ only in case", "'Text'"]),
        (["text", "label"], {"text": "text", "messages": "text"}, ["--text, --messages", "do not belong together"]),
        (["text", "label"], {"text": "label", "label": "label"}, ["one column stands for two roles"]),
        (["text", "label", "messages"], {}, ["chat messages", "--task"]),
        (["text", "label"], {"task": "token_classification"}, ["words with tags", "--tokens and --tags"]),
        (["text", "label"], {"task": "seq2seq", "text": "text"}, ["task seq2seq needs a prompt with its response"]),
    ],
)
def test_a_column_that_is_missing_or_unclear_is_answered_with_the_columns_and_the_flag(names, flags, words):
    with pytest.raises(DataError) as caught:
        found(*names, **flags)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("names", "row", "wanted"),
    [
        (["text", "label"], {"text": "why", "label": " a "}, "a"),
        (["tokens", "ner_tags"], {"tokens": ["how", "far"], "ner_tags": ["O", "B"]}, True),
        (["text"], {"text": "why"}, ""),
    ],
)
def test_what_a_row_answers_is_its_label_or_its_tags_and_nothing_where_the_shape_has_none(names, row, wanted):
    outcome = found(*names).outcome(row)
    assert outcome == wanted if isinstance(wanted, str) else bool(outcome)
