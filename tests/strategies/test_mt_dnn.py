"""mt_dnn: several tasks, a head each."""

import csv
import dataclasses
import json

import pytest
import torch
from in_memory import Runs, of_tasks
from little import little_spec

from luthier.core import CannotMerge, CompositionError, ConfigError
from luthier.data.load_data import load_inputs
from luthier.methods.additive.answer_turns import Turns
from luthier.runs.spec import BatchSpec, DataSpec, OptimSpec
from luthier.strategies.mixture.mt_dnn import heads
from luthier.workflow import certify, evaluate, resume, train
from luthier.workflow.prediction import Predictor
from luthier.workflow.resume_proof import run_digests

torch.set_num_threads(1)
WIDE = BatchSpec(size=8, tokens=4096)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("mt_dnn"))


def loop_of(runs, method="lora", **changes):
    loop = runs.loop("mt_dnn", method, "bert-tasks", **{"batch": WIDE, "steps": 8, **changes})
    loop.moments.start()
    ((_, course),) = loop.moments._asked
    return loop, course


@pytest.mark.acid("mt_dnn", 1)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_mt_dnn_a_step_of_one_task_moves_the_trunk_and_no_other_head(runs, method):
    loop, course = loop_of(runs, method, optim=OptimSpec(lr=1e-2, weight_decay=0.3))
    seen = set()
    for step in range(8):
        before = {n: p.detach().clone() for n, p in course.weights().items()}
        (batch,) = loop.feed.cut(step)
        (task,) = set(batch.inputs["row_task"].tolist())
        seen.add(task)
        loop._train_step(step, [batch])
        own, others = (list(course.task.heads[k]) for k in (task, 1 - task))
        for name, p in heads(course).items():
            assert torch.equal(p.detach()[others], before[name][others]), "not by momentum or decay either"
            assert not torch.equal(p.detach()[own], before[name][own])
        trunk = [n for n in before if n not in heads(course)]
        assert any(not torch.equal(course.weights()[n].detach(), before[n]) for n in trunk)
    assert seen == {0, 1}


@pytest.mark.acid("mt_dnn", 2)
def test_mt_dnn_the_row_says_which_head_answers(runs, tmp_path):
    rows = of_tasks(tmp_path / "rows.csv")
    data = DataSpec(source=str(rows), row_task="task")
    spec = little_spec(tmp_path, strategy="mt_dnn", data=data, steps=40, optim=OptimSpec(lr=1e-2))
    done = train(spec)
    predictor = Predictor(done.path)
    asked = tmp_path / "asked.csv"
    asked.write_text("text,task\nhow far is the moon,mood\nhow far is the moon,time\n")
    mood, time = predictor.rows(load_inputs(str(asked), predictor.columns)[0])
    assert sorted(mood["probabilities"]) == ["mood: bad", "mood: good", "mood: red"] and mood["label"][:5] == "mood:"
    assert sorted(time["probabilities"]) == ["time: moon", "time: sun"] and time["label"][:5] == "time:"
    assert all(sum(one["probabilities"].values()) == pytest.approx(1) for one in (mood, time))
    assert done.scores["accuracy"] > 0.6 and evaluate(done.path, str(rows)).scores["accuracy"] > 0.6
    train(dataclasses.replace(spec, steps=6, out=str(tmp_path / "whole")))
    train(dataclasses.replace(spec, steps=6, out=str(tmp_path / "stopped")), stop_at=4)
    resume(tmp_path / "stopped")
    assert run_digests(tmp_path / "stopped") == run_digests(tmp_path / "whole")


@pytest.mark.acid("mt_dnn", 3)
def test_mt_dnn_another_task_does_not_change_how_a_head_begins(runs, tmp_path):
    rows = of_tasks(runs.home / "tasks.csv")
    wider = tmp_path / "wider.csv"
    wider.write_text(rows.read_text() + "".join(f"moon {i} cat,{('cat', 'dog')[i % 2]},animal\n" for i in range(8)))
    _, course = loop_of(runs)
    _, others = loop_of(runs.__class__(tmp_path), data=DataSpec(source=str(wider), row_task="task"))
    assert len(course.task.heads) == 2 and len(others.task.heads) == 3
    for name, p in heads(course).items():
        theirs = heads(others)[name]
        for labels in course.task.heads:
            place = [others.task.labels.index(course.task.labels[i]) for i in labels]
            assert torch.equal(p.detach()[list(labels)], theirs.detach()[place])
    weights = [p for p in heads(course).values() if p.dim() > 1]
    assert weights and 0.01 < float(weights[0].detach().std()) < 0.04


def test_mt_dnn_an_epoch_has_every_row_once_in_steps_of_one_task(runs):
    loop, _ = loop_of(runs)
    order, tasks = loop.feed.batches.order, loop.feed.batches.examples.facts["task"]
    for epoch in (0, 1):
        steps = [order.rows(epoch, step) for step in range(order.steps_per_epoch)]
        assert all(len(set(tasks[rows].tolist())) == 1 for rows in steps)
        assert sorted(i for rows in steps for i in rows) == list(range(len(tasks)))


def test_mt_dnn_labels_of_one_name_are_two_labels_and_what_cannot_be_is_refused(tmp_path):
    rows = tmp_path / "rows.csv"
    with rows.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label", "task"))
        writer.writerows((f"moon {i} sun", i % 2, "even" if i % 4 < 2 else "odd") for i in range(40))
    spec = little_spec(tmp_path, strategy="mt_dnn", data=DataSpec(source=str(rows), row_task="task"), steps=2)
    done = train(spec)
    facts = json.loads((done.path / "tuning" / "tuning.json").read_text())
    assert facts["task"]["labels"] == ["even: 0", "even: 1", "odd: 0", "odd: 1"]
    spec = dataclasses.replace(spec, out=str(tmp_path / "no"))
    with pytest.raises(CompositionError, match=r"mt_dnn and label_smoothing.*those of other tasks"):
        train(dataclasses.replace(spec, strategy="mt_dnn+label_smoothing"))
    with pytest.raises(ConfigError, match="cannot tell which task"):
        train(dataclasses.replace(spec, data=DataSpec(source=str(rows))))
    rows.write_text(rows.read_text() + "moon,1,alone\nsun,1,alone\n")
    with pytest.raises(ConfigError, match="'alone' has one label"):
        train(spec)


@pytest.mark.acid("mt_dnn", 4)
def test_mt_dnn_a_head_of_several_turns_answers_by_their_mean(runs):
    loop, course = loop_of(runs, "lora+answer_turns")
    assert [p.labels for p in course.tuned.tuning().method.parts() if p.name == "answer_turns"] == [(3, 2)]
    loop.run_to(2)
    (turns,) = course.tuned.modules(Turns).values()
    (batch,) = loop.feed.cut(0)
    course.tuned.model.eval()
    with torch.no_grad():
        answer = course.tuned.model(**batch.inputs).logits.exp()
        heard, mean_of = [], turns.after
        turns.after = lambda x, y: mean_of(x, heard.append(y) or y)
        course.tuned.model(**batch.inputs)
    (each,) = heard  # (rows, turns, labels)
    assert each.shape == (len(batch.rows), 3, 5)
    for labels in course.task.heads:
        mean = each[..., list(labels)].softmax(-1).mean(1)
        torch.testing.assert_close(answer[:, list(labels)], mean, rtol=1e-5, atol=1e-6)
        assert float((each[..., list(labels)].mean(1).softmax(-1) - mean).abs().max()) > 1e-6, "not of logits"


@pytest.mark.acid("mt_dnn", 1)
def test_mt_dnn_with_turns_a_step_of_one_task_still_moves_no_other_head(runs):
    loop, course = loop_of(runs, "lora+answer_turns", optim=OptimSpec(lr=1e-2, weight_decay=0.3))
    for step in range(4):
        before = {n: p.detach().clone() for n, p in heads(course).items()}
        (batch,) = loop.feed.cut(step)
        (task,) = set(batch.inputs["row_task"].tolist())
        loop._train_step(step, [batch])
        others = list(course.task.heads[1 - task])
        assert all(torch.equal(p.detach()[others], before[n][others]) for n, p in heads(course).items())


def test_mt_dnn_a_run_with_turns_resumes_to_the_bit_predicts_and_is_certified(tmp_path):
    rows = of_tasks(tmp_path / "rows.csv")
    spec = little_spec(
        tmp_path, "lora+answer_turns", strategy="mt_dnn", data=DataSpec(source=str(rows), row_task="task"), steps=6
    )
    done = train(spec)
    train(dataclasses.replace(spec, out=str(tmp_path / "stopped")), stop_at=4)
    resume(tmp_path / "stopped")
    assert run_digests(tmp_path / "stopped") == run_digests(done.path)
    assert certify(done.path).passed
    predictor = Predictor(done.path)
    asked = tmp_path / "asked.csv"
    asked.write_text("text,task\nhow far is the moon,mood\nhow far is the moon,time\n")
    mood, time = predictor.rows(load_inputs(str(asked), predictor.columns)[0])
    assert sorted(mood["probabilities"]) == ["mood: bad", "mood: good", "mood: red"]
    assert all(sum(one["probabilities"].values()) == pytest.approx(1) for one in (mood, time))
    with pytest.raises(CannotMerge, match="answer_turns"):
        predictor.tuned.merge()
