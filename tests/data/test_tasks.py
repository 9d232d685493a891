import dataclasses

import numpy as np
import pytest
from word_tables import table

from luthier.core import ConfigError, DataError, ModelError, UnknownName
from luthier.data.columns import Columns
from luthier.data.infer_task import infer_task
from luthier.data.tasks import Task

LABELLED = Columns(shape="labelled", text="text", label="label")
TAGGED = Columns(shape="tagged", tokens="tokens", tags="tags")
ANSWERED = Columns(shape="answered", prompt="prompt", response="response")
PLAIN = Columns(shape="plain", text="text")


def labelled(*labels, name="train.csv"):
    return table([{"text": f"t{i}", "label": label} for i, label in enumerate(labels)], name)


def tagged(*pairs, name="train.jsonl"):
    return table([{"tokens": tokens, "tags": tags} for tokens, tags in pairs], name, 1)


class Config:
    def __init__(self, model_type, both=False):
        self.model_type, self.is_encoder_decoder = model_type, both


def test_words_are_classes_in_alphabetical_order():
    task = infer_task(labelled("dog", "cat", "dog"), None, LABELLED)
    assert (task.name, task.labels, task.n_outputs) == ("classification", ("cat", "dog"), 2)
    assert task.targets(labelled("dog", "cat"), LABELLED).tolist() == [1, 0]
    assert task.headline == "accuracy"
    assert task.auto_class == "AutoModelForSequenceClassification"


@pytest.mark.parametrize("labels", [(10, 2, 2), ("10", "2", "2"), (10.0, 2.0, 2)])
def test_whole_numbers_are_classes_by_value_and_it_is_said(labels):
    task = infer_task(labelled(*labels), None, LABELLED)
    assert task.labels == ("2", "10")
    assert "read as classes" in task.notes[0]


def test_true_and_false_are_classes():
    assert infer_task(labelled(True, False), None, LABELLED).labels == ("false", "true")


@pytest.mark.parametrize("labels", [(0.5, 1, 2), ("0.5", "1", "2.25"), ("1e-3", "4", "5")])
def test_fractions_are_measures(labels):
    task = infer_task(labelled(*labels), None, LABELLED)
    assert (task.name, task.n_outputs, task.headline) == ("regression", 1, "pearson")
    assert task.targets(labelled(*labels), LABELLED).dtype == np.float32


def test_whole_numbers_are_measures_when_asked():
    assert infer_task(labelled(1, 2, 3), None, LABELLED, "regression").name == "regression"


@pytest.mark.parametrize("rows", [(["a", "b"], [], ["b"]), ('["a", "b"]', "[]", '["b"]')])
def test_lists_are_several_labels(rows):
    task = infer_task(labelled(*rows), None, LABELLED)
    assert (task.multi_label, task.labels, task.headline) == (True, ("a", "b"), "micro_f1")
    assert task.targets(labelled(*rows), LABELLED).tolist() == [[1, 1], [0, 0], [0, 1]]
    assert task.decode(np.array([[0.3, -1.0], [-2.0, -0.1]])) == [["a"], []]


def test_a_name_in_brackets_is_one_label():
    assert infer_task(labelled("[spam]", "[ham]"), None, LABELLED).labels == ("[ham]", "[spam]")


@pytest.mark.parametrize(
    ("tags", "spans", "headline"), [(["B-A", "I-A", "O"], True, "span_f1"), (["N", "V", "N"], False, "token_macro_f1")]
)
def test_tags_in_three_letters_are_spans(tags, spans, headline):
    task = infer_task(tagged((["a", "b", "c"], tags), ("a b c", " ".join(tags))), None, TAGGED)
    assert (task.name, task.spans, task.headline) == ("token_classification", spans, headline)


def test_prompts_with_responses_go_to_the_kind_of_model_there_is():
    data = table([{"prompt": "a", "response": "b"}])
    assert infer_task(data, None, ANSWERED, model_config=Config("t5", both=True)).name == "seq2seq"
    assert infer_task(data, None, ANSWERED, model_config=Config("llama")).name == "causal_lm"
    assert infer_task(data, None, ANSWERED).name == "causal_lm"


@pytest.mark.parametrize(
    ("asked", "config", "word"),
    [
        ("seq2seq", Config("llama"), "'llama' is none"),
        ("causal_lm", Config("bert"), "'bert' is an encoder: it sees the tokens"),
        ("causal_lm", Config("t5", both=True), "'t5' is an encoder-decoder"),
        ("masked_lm", Config("bart", both=True), "masked_lm needs an encoder .*'bart' is none"),
    ],
)
def test_a_model_without_the_head_for_the_task_is_refused(asked, config, word):
    with pytest.raises(ModelError, match=word):
        infer_task(table([{"prompt": "a", "response": "b"}]), None, ANSWERED, asked, config)


def test_outputs_are_read_back():
    task = Task(name="classification", labels=("x", "y", "z"))
    logits = np.array([[0.1, 2.0, -1.0], [5.0, 0.0, 0.0]])
    assert task.decode(logits) == ["y", "x"]
    assert np.allclose(task.probabilities(logits).sum(1), 1)
    assert np.allclose(task.probabilities(logits)[0], np.exp(logits[0]) / np.exp(logits[0]).sum())
    assert Task(name="regression").decode(np.array([[0.5], [2.0]])) == [0.5, 2.0]
    several = dataclasses.replace(task, multi_label=True)
    assert np.allclose(several.probabilities(logits), 1 / (1 + np.exp(-logits)))
    assert np.isfinite(several.probabilities(np.array([[1e4, -1e4, 0.0]]))).all()


@pytest.mark.parametrize(
    ("train", "test", "asked", "words"),
    [
        (labelled("a", "a"), None, "auto", ["train.csv", "all 2 labels", "'a'", "nothing to learn", "--label"]),
        (labelled("a", "b", None, " "), None, "auto", ["2 rows have no label", "train.csv:4, train.csv:5", "'label'"]),
        (labelled("a", "b"), labelled("a", "c", name="test.csv"), "auto", ["test.csv:3 ('c')", "(a, b)"]),
        (labelled("a", 1.5), None, "regression", ["train.csv:2 ('a')", "regression needs", "--task classification"]),
        (labelled(1.5, float("inf")), None, "regression", ["train.csv:3 (inf)"]),
        (labelled(2.5, 2.5), None, "auto", ["all 2 numbers", "2.5"]),
        (labelled(0.5, 1.5), labelled("x", name="test.csv"), "auto", ["test.csv:2 ('x')"]),
        (labelled(*range(40)), None, "auto", ["40 different values", "--task regression"]),
        (
            labelled(*[f"{i}.5" for i in range(40)], "3,5"),
            None,
            "auto",
            ["1 of 41 values are none: '3,5' at", "--task regression"],
        ),
        (labelled(*[f"id{i}" for i in range(40)]), None, "auto", ["40 of them occur once", "--label"]),
        (labelled(["a"], "b"), None, "auto", ["train.csv:3", "'b'"]),
        (labelled("a", ["b"]), None, "auto", ["1 rows have a list", "train.csv:3"]),
        (labelled([], []), None, "auto", ["only empty lists"]),
        (labelled(["a"], ["b"]), labelled(["c"], name="test.csv"), "auto", ["test.csv:2 ('c')"]),
    ],
)
def test_labels_that_cannot_be_learnt_are_named_with_their_place(train, test, asked, words):
    with pytest.raises(DataError) as caught:
        infer_task(train, test, LABELLED, asked)
    for word in words:
        assert word in str(caught.value)


def test_tags_that_do_not_fit_their_words_are_named_with_their_place():
    with pytest.raises(DataError, match=r"train\.jsonl:2: 2 words in 'tokens' but 1 tags in 'tags'"):
        infer_task(tagged((["a"], ["O"]), (["a", "b"], ["O"])), None, TAGGED)
    with pytest.raises(DataError, match="all tags are 'O'"):
        infer_task(tagged((["a"], ["O"])), None, TAGGED)
    good, bad = tagged((["a", "b"], ["O", "B-X"])), tagged((["a"], ["B-Y"]), name="test.jsonl")
    with pytest.raises(DataError, match=r"test\.jsonl:1 \('B-Y'\)"):
        infer_task(good, bad, TAGGED)
    with pytest.raises(DataError, match=r"train\.jsonl:1: field 'tokens' is 4; it must be a list"):
        infer_task(tagged((4, ["O"])), None, TAGGED)


def test_both_halves_must_name_their_columns_alike():
    test = table([{"text": "a", "class": "b"}], "test.csv")
    with pytest.raises(DataError, match=r"test\.csv: no column 'label'.*'text', 'class'"):
        infer_task(labelled("a", "b"), test, LABELLED)


def test_an_unknown_task_is_answered_with_near_names():
    with pytest.raises(UnknownName, match="'clasification'.*'classification'"):  # noqa: RUF043
        infer_task(labelled("a", "b"), None, LABELLED, "clasification")


def test_a_row_without_the_field_is_named():
    data = table([{"text": "a", "label": "x"}, {"text": "b"}], "train.jsonl", 1)
    with pytest.raises(DataError, match=r"train\.jsonl:2: no field 'label'; its fields are 'text'"):
        infer_task(data, None, LABELLED)


@pytest.mark.parametrize("score", ["rouge_l", "bleu", "exact_match", "token_f1"])
def test_a_score_of_written_text_needs_rows_with_one_right_answer(score: str) -> None:
    assert Task(name="causal_lm").check_metric(score) == Task(name="seq2seq").check_metric(score) == score
    with pytest.raises(ConfigError, match=f"'{score}' compares what is written.*pair_accuracy, margin"):
        Task(name="preference").check_metric(score)
    several = Task(name="classification", labels=("a", "b"), multi_label=True)
    assert several.check_metric("exact_match") == "exact_match", "of labels it is computed"


@pytest.mark.parametrize(("classes", "more"), [(12, ""), (13, ", and 1 more classes"), (15, ", and 3 more classes")])
def test_the_rows_of_each_class_are_counted_the_largest_first_and_those_not_shown_named_as_more(classes, more):
    names = [f"c{i:02}" for i in range(classes) for _ in range(classes + 1 - i)]
    said = next(note for note in infer_task(labelled(*names), None, LABELLED).notes if "rows of each class" in note)
    shown = ", ".join(f"c{i:02} {classes + 1 - i}" for i in range(12))
    assert said == f"rows of each class: {shown}{more}"
