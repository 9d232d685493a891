"""Labels that are asked for by a gap in a text, of masked, causal and T5 models."""

import dataclasses

import numpy as np
import pytest
import torch
from fillers import encoder, filler, t5, writer
from little import Heard, little_data, little_spec
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoTokenizer

from luthier.core import ConfigError, ModelError
from luthier.data.cloze import shown_beside
from luthier.data.tasks import Task
from luthier.runs.spec import DataSpec, OptimSpec
from luthier.workflow import evaluate, merge, resume, train
from luthier.workflow.build import _order
from luthier.workflow.load_model import find_model
from luthier.workflow.prediction import Predictor
from luthier.workflow.preparation import prepare
from luthier.workflow.resume_proof import run_digests

torch.set_num_threads(1)
KINDS = ("encoder", "decoder", "both")
WORDS = "good=good, bad=bad, red=red"


def asking(home, kind, **changes):
    made = {"encoder": filler, "decoder": writer, "both": t5}[kind](home / kind)
    template = "{text} ! it is {mask}" + ("" if kind == "decoder" else " .")
    fields = {"source": str(little_data(home / "rows.csv")), "template": template, "words": WORDS}
    data = DataSpec(**{**fields, **changes.pop("data", {})})
    given = {"model": str(made), "method": "lora", "steps": 6, "data": data, "settings": {}}
    return little_spec(home, **{**given, **changes})


def by_hand(kind, folder, text):
    """Log-odds of the three words, from transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = [tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in ("bad", "good", "red")]
    said = f"{text} ! it is"
    if kind == "encoder":
        ids = torch.tensor([tokenizer(f"{said} [MASK] .")["input_ids"]])
        at = int((ids[0] == tokenizer.mask_token_id).nonzero())
        return AutoModelForMaskedLM.from_pretrained(folder)(input_ids=ids).logits[0, at, words]
    if kind == "decoder":
        ids = torch.tensor([tokenizer(said)["input_ids"]])
        return AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits[0, -1, words]
    ids = torch.tensor([tokenizer(f"{said} <extra_id_0> .")["input_ids"]])
    read = torch.tensor([[0, tokenizer.convert_tokens_to_ids("<extra_id_0>")]])
    return AutoModelForSeq2SeqLM.from_pretrained(folder)(input_ids=ids, decoder_input_ids=read).logits[0, 1, words]


@pytest.mark.parametrize("kind", KINDS)
def test_pet_zero_shot_equals_the_raw_scores_of_the_model(kind, tmp_path):
    spec = asking(tmp_path, kind, steps=1, optim=OptimSpec(lr=1e-6))
    done = train(spec)
    text = "how far is the moon"
    answer = Predictor(done.path).texts([text])[0]
    with torch.no_grad():
        wanted = torch.softmax(by_hand(kind, spec.model, text).double(), -1)
    found = [answer["probabilities"][label] for label in ("bad", "good", "red")]
    np.testing.assert_allclose(found, wanted.numpy(), atol=2e-4)
    assert sorted(done.scores) == ["accuracy", "loss", "macro_f1", "mcc"]
    parts = ("weights", "trained", "gradients", "optimiser")
    assert [done.record.forecast[p] for p in parts] == [done.record.memory[p] for p in parts], "no new head is counted"


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_no_new_head_and_resumes_to_the_bit(kind, tmp_path):
    heard = Heard()
    spec = asking(tmp_path, kind, steps=40, optim=OptimSpec(lr=1e-2))
    whole = train(spec, listener=heard)
    assert whole.scores["accuracy"] > 0.6 and "no new head" in heard.text
    assert not [n for n in whole.tuned.trained() if "cls" in n or "lm_head" in n]
    train(dataclasses.replace(spec, out=str(tmp_path / "stopped")), stop_at=17)
    resume(tmp_path / "stopped")
    assert run_digests(tmp_path / "stopped") == run_digests(whole.path)
    again = evaluate(whole.path, str(tmp_path / "rows.csv"))
    assert again.scores["accuracy"] > 0.6


def test_merged_it_is_a_model_of_words(tmp_path):
    done = train(asking(tmp_path, "encoder", steps=2))
    merge(done.path, tmp_path / "merged")
    assert "fill-mask" in (tmp_path / "merged" / "README.md").read_text()
    AutoModelForMaskedLM.from_pretrained(tmp_path / "merged")


def test_a_long_text_is_cut_and_its_template_is_not(tmp_path):
    rows = tmp_path / "long.csv"
    rows.write_text("text,label\n" + "".join(f"{'moon sun ' * 30}{x},{x}\n" for x in ("good", "bad", "red") * 8))
    prepared = prepare(asking(tmp_path, "encoder", data={"source": str(rows), "test_share": 0.0}, max_length=24))
    gap = prepared.task.gap
    ids = np.split(prepared.train.ids, prepared.train.offsets[1:-1])
    assert all((row == gap).sum() == 1 and len(row) <= 24 for row in ids)
    assert prepared.train.ledger.counts()["truncated"] == len(ids)


@pytest.mark.parametrize(
    ("kind", "data", "words"),
    [
        ("encoder", {"template": "{text} it is good"}, "0 gaps"),
        ("encoder", {"template": "{mask} {text} {mask}"}, "2 gaps"),
        ("encoder", {"template": "it is {mask}"}, "does not hold the row's text"),
        ("encoder", {"template": "{text} {what} {mask}"}, "what"),
        ("encoder", {"template": "{text} {pair} {mask}"}, "rows have one text"),
        ("decoder", {"template": "{text} it is {mask} ."}, "must end with"),
        ("encoder", {"words": "good=good, bad=bad"}, "no word for red"),
        ("encoder", {"words": f"{WORDS}, blue=blue"}, "blue is no label"),
        ("encoder", {"words": "good=good, bad=very bad, red=red"}, "is 2 tokens|unknown"),
        ("encoder", {"words": "good=moon sun, bad=bad, red=red"}, "'moon sun' of label 'good' is 2 tokens"),
        ("encoder", {"words": "good=xyz, bad=bad, red=red"}, "unknown to the tokenizer"),
        ("encoder", {"words": "good=bad, bad=bad, red=red"}, "the same word"),
        ("encoder", {"template": None}, "words are for the gap"),
    ],
)
def test_templates_and_words_that_cannot_work_are_refused(kind, data, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        train(asking(tmp_path, kind, data=data))
    assert not (tmp_path / "run").exists()


def test_windows_of_a_text_with_one_gap_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="one gap in one text"):
        train(asking(tmp_path, "encoder", long="windows"))


def test_a_model_without_a_head_of_words_is_refused(tmp_path):
    model = str(encoder(tmp_path / "bare"))
    assert find_model(model)
    with pytest.raises(ModelError, match="are not in its weights"):
        train(asking(tmp_path, "encoder", model=model))


# --- labelled rows that are shown beside a row


def shown_spec(home, kind="encoder", draws=3, **changes):
    gap = "it is {mask}" + ("" if kind == "decoder" else " .")
    return asking(home, kind, data={"template": f"{{shown:{draws}}} {{text}} ! {gap}"}, **changes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.acid("lm_bff", 2)
def test_a_row_of_each_label_is_shown_with_its_word_and_never_the_row_itself(kind, tmp_path):
    prepared = prepare(shown_spec(tmp_path, kind))
    task, train, tokenizer = prepared.task, prepared.train, prepared.tokenizer
    assert task.draws == 3 and len(task.shown) == len(set(task.shown)) <= 3 * 16
    assert np.array_equal(train.rows, np.repeat(train.read_rows, 3))
    pool = {text: label for label, text in task.shown}
    said = [tokenizer.decode(ids) for ids in np.split(train.ids, train.offsets[1:-1])]
    for row, one in zip(train.rows, said, strict=True):
        own = " ".join(tokenizer.tokenize(train.ledger.table.rows[row]["text"]))
        shown = shown_beside(task, [train.ledger.table.rows[row]["text"]], 0)
        assert [pool[text] for (text,) in shown] == list(task.labels)
        assert one.count(own) == 1, "once as itself, and not beside"
        for word in task.words:
            assert f"it is {word}" in one
    assert len(set(said)) > 2 * len(train.read_rows), "versions differ"
    assert any(text in pool for text in (row["text"] for row in train.ledger.table.rows))


def test_what_is_shown_is_of_the_half_with_most_words_in_common():
    shown = (*(("good", f"moon sun cat {i}") for i in range(5)), *(("good", f"one two three {i}") for i in range(3)))
    task = Task(name="classification", labels=("good",), draws=8, shown=shown)
    found = {shown_beside(task, ["moon sun cat 1"], draw)[0][0] for draw in range(8)}
    assert len(found) > 1 and all(text.startswith("moon") and not text.endswith("1") for text in found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.acid("lm_bff", 3)
def test_an_answer_is_the_mean_of_what_each_version_says_and_resumes(kind, tmp_path):
    spec = shown_spec(tmp_path, kind, steps=5)
    done = train(spec)
    train(dataclasses.replace(spec, out=str(tmp_path / "stopped")), stop_at=2)
    resume(tmp_path / "stopped")
    assert run_digests(tmp_path / "stopped") == run_digests(done.path)
    predictor = Predictor(done.path)
    text = "how far is the moon"
    (answer,) = predictor.texts([text])
    examples = predictor._encoded(predictor.table_of([text]))
    assert len(examples) == 3
    each = [predictor.objective(predictor.collator()(examples, np.asarray([k]))).logits[0].detach() for k in range(3)]
    wanted = torch.softmax(torch.stack(each).mean(0).double(), -1)
    assert len({tuple(logits.tolist()) for logits in each}) > 1
    np.testing.assert_allclose([answer["probabilities"][x] for x in predictor.task.labels], wanted, atol=1e-5)


def test_each_epoch_reads_one_version_of_each_row(tmp_path):
    prepared = prepare(shown_spec(tmp_path))
    order = _order(prepared)
    steps = range(order.steps_per_epoch)
    epochs = [np.concatenate([order.rows(epoch, step) for step in steps]) for epoch in (0, 1)]
    assert not set(epochs[0]) & set(epochs[1])
    assert all(np.array_equal(np.sort(prepared.train.rows[one]), prepared.train.read_rows) for one in epochs)


def test_texts_that_are_shown_give_way_to_the_row_itself(tmp_path):
    rows = tmp_path / "long.csv"
    lines = [f"{i} {'moon sun ' * 6}{x},{x}\n" for i in range(8) for x in ("good", "bad", "red")]
    rows.write_text("text,label\n" + "".join(lines))
    spec = shown_spec(tmp_path)
    prepared = prepare(dataclasses.replace(
        spec, data=dataclasses.replace(spec.data, source=str(rows), test_share=0.0), max_length=60,
    ))  # fmt: skip
    lengths = np.diff(prepared.train.offsets)
    assert lengths.max() <= 60 and prepared.train.ledger.counts()["truncated"] == 0


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{shown} {shown} {text} {mask}", "at one place"),
        ("{shown:0} {text} {mask}", "1 to 64 versions"),
        ("{shown:99} {text} {mask}", "1 to 64 versions"),
        ("{text:3} {mask}", "other fields have no number"),
    ],
)
def test_templates_that_show_rows_wrongly_are_refused(template, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        train(asking(tmp_path, "encoder", data={"template": template}))


def test_a_label_of_one_row_has_nothing_to_be_shown(tmp_path):
    rows = tmp_path / "few.csv"
    rows.write_text("text,label\n" + "".join(f"moon {i},good\n" for i in range(9)) + "sun,bad\nsun cat,red\ndog,red\n")
    with pytest.raises(ConfigError, match="of 'bad' there are 1"):
        spec = shown_spec(tmp_path)
        prepare(dataclasses.replace(spec, data=dataclasses.replace(spec.data, source=str(rows), test_share=0.0)))
