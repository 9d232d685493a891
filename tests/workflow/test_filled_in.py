"""Runs that fill in what was taken out of texts: masked_lm of an encoder, span_corruption of a T5."""

import dataclasses

import pytest
import torch
from fillers import encoder, t5
from little import Heard, little_data, little_spec

from luthier.core import ConfigError, ModelError
from luthier.data.batches import Batch
from luthier.data.examples import IGNORED
from luthier.data.tasks import Task
from luthier.runs.spec import DataSpec, OptimSpec
from luthier.surgery import attach, compose
from luthier.training.objective import Objective
from luthier.workflow import evaluate, merge, resume, train
from luthier.workflow.load_model import find_model, load_model
from luthier.workflow.prediction import Predictor
from luthier.workflow.resume_proof import run_digests

torch.set_num_threads(1)
TASKS = ("masked_lm", "span_corruption")


def filling(home, task, **changes):
    model = encoder(home / "encoder") if task == "masked_lm" else t5(home / "t5")
    rows = little_data(home / "rows.csv")
    given = {"data": DataSpec(source=str(rows)), "task": task, "method": "full", "settings": {}, "model": str(model)}
    return little_spec(home, **{**given, **changes})


@pytest.mark.parametrize("task", TASKS)
def test_perplexity_of_held_out_texts_falls_and_labels_are_never_read(task, tmp_path):
    spec = filling(tmp_path, task, steps=40, optim=OptimSpec(lr=5e-3))
    heard = Heard()
    one = train(dataclasses.replace(spec, steps=1, method="lora", optim=OptimSpec(lr=1e-9), out=str(tmp_path / "one")))
    many = train(spec, listener=heard)
    assert many.scores["perplexity"] < 0.8 * one.scores["perplexity"]
    assert sorted(many.scores) == ["loss", "perplexity", "token_accuracy"]
    parts = ("weights", "trained", "gradients", "optimiser")
    assert [one.record.forecast[p] for p in parts] == [one.record.memory[p] for p in parts], "a new head of words too"
    assert "not used: 'label'" in heard.text
    again = evaluate(many.path, str(tmp_path / "rows.csv"))
    assert again.scores == evaluate(many.path, str(tmp_path / "rows.csv")).scores, "what is scored is corrupted alike"
    with pytest.raises(ConfigError, match="luthier merge"):
        Predictor(many.path).texts(["the moon is far"])


@pytest.mark.parametrize("task", TASKS)
def test_a_stopped_run_ends_with_the_bits_of_the_whole_one(task, tmp_path):
    spec = filling(tmp_path, task, steps=6)
    train(dataclasses.replace(spec, out=str(tmp_path / "whole")))
    train(dataclasses.replace(spec, out=str(tmp_path / "stopped")), stop_at=3)
    resume(tmp_path / "stopped")
    assert run_digests(tmp_path / "stopped") == run_digests(tmp_path / "whole")


@pytest.mark.parametrize(("kind", "cut"), [("bert", True), ("roberta", True), ("albert", True), ("distilbert", False)])
def test_words_that_were_not_taken_out_cost_nothing_and_change_nothing(kind, cut, tmp_path):
    task = Task(name="masked_lm")
    source = find_model(str(encoder(tmp_path / kind, kind)))
    model, fresh = load_model(source, task, dtype=torch.float32, device=torch.device("cpu"), seed=0)
    assert fresh, "the sample has no head of words"
    tuned = attach(model, compose.method("lora", {}), new_tensors=fresh)
    some, whole = Objective(tuned, task), Objective(tuned, task, full_logits=True)
    assert some.chunked is cut and (cut or "modules, not one" in some.why_all_logits)
    ids = torch.randint(8, 40, (3, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(9) % 4 != 1, IGNORED)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch = Batch(inputs=inputs, labels=labels, rows=torch.arange(3).numpy(), n_targets=6, n_tokens=27)
    one, two = some(batch), whole(batch)
    torch.testing.assert_close(one.loss, two.loss, rtol=1e-5, atol=1e-5)
    assert one.logits is not None and two.logits is not None
    assert (len(one.logits) == 6) is cut and two.logits.shape[:2] == (3, 9)


def test_a_model_that_learnt_words_is_what_a_classifier_starts_from(tmp_path):
    spec = filling(tmp_path, "masked_lm", steps=3)
    learnt = train(spec)
    merge(learnt.path, tmp_path / "merged")
    task = Task(name="classification", labels=("a", "b"))
    model, _ = load_model(
        find_model(str(tmp_path / "merged")), task, dtype=torch.float32, device=torch.device("cpu"), seed=0
    )
    held = {n.split("|")[0].removeprefix("bert."): p for n, p in learnt.tuned.model.named_parameters()}
    base = dict(model.base_model.named_parameters())
    same = [n for n, p in base.items() if n in held and torch.equal(p, held[n])]
    assert len(same) == len([n for n in base if "pooler" not in n]) > 30


def test_models_of_another_kind_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"masked_lm needs an encoder.*span_corruption"):
        train(filling(tmp_path, "masked_lm", model=str(t5(tmp_path / "t5"))))
    with pytest.raises(ModelError, match=r"span_corruption needs an encoder-decoder.*masked_lm"):
        train(filling(tmp_path, "span_corruption", model=str(encoder(tmp_path / "encoder"))))
