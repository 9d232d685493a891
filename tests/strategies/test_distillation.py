"""The acid tests of distillation: soft labels by their formula; teachers that fit, and refusals of others."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from in_memory import Runs, alike
from little import little_data, little_model, little_spec

from luthier.core import ConfigError, ModelError
from luthier.data.tasks import Task
from luthier.runs.spec import DataSpec
from luthier.training.objective import Result
from luthier.training.other_models import soft_loss
from luthier.workflow import resume, train

torch.set_num_threads(1)
TASK = Task(name="classification", labels=tuple("abc"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("distillation"))


def result(logits, labels=(0, 1, 2, 0)):
    labels = torch.tensor(labels)
    return Result(F.cross_entropy(logits, labels, reduction="sum"), len(labels), logits, labels)


# --- kd_logits


@pytest.mark.acid("kd_logits", 1)
def test_kd_logits_a_student_that_equals_its_teacher_has_no_soft_loss_and_no_gradient():
    logits = torch.randn(4, 3, requires_grad=True)
    loss = soft_loss(TASK, logits.detach(), result(logits), 3.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6) and logits.grad.abs().max() < 1e-6


def test_kd_logits_is_the_divergence_of_the_formula():
    teacher, student = torch.randn(4, 3), torch.randn(4, 3)
    p, q = (torch.softmax(z / 2.5, -1) for z in (teacher, student))
    wanted = 2.5**2 * (p * (p / q).log()).sum()
    assert torch.allclose(soft_loss(TASK, teacher, result(student), 2.5), wanted, rtol=1e-5)


@pytest.mark.acid("kd_logits", 2)
def test_kd_logits_the_square_keeps_the_gradient_where_the_temperature_changes():
    teacher, student = 0.1 * torch.randn(4, 3), (0.1 * torch.randn(4, 3)).requires_grad_()
    sizes = [
        torch.autograd.grad(soft_loss(TASK, teacher, result(student), t), student)[0].norm().item() for t in (5, 50)
    ]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_kd_logits_words_without_loss_are_left_out():
    logits, labels = torch.randn(2, 4, 7), torch.full((2, 4), -100)
    labels[0, 2] = 3  # the word after place 1
    other = logits.clone()
    other[1] += torch.randn(4, 7)
    other[0, 2:] += torch.randn(2, 7)
    seen = Result(logits.new_zeros(()), 1, logits, labels)
    assert soft_loss(Task(name="causal_lm"), other, seen, 1.0).item() == pytest.approx(0, abs=1e-6)
    other[0, 1, 0] += 1
    assert soft_loss(Task(name="causal_lm"), other, seen, 1.0) > 0.001


@pytest.mark.acid("kd_logits", 6)
def test_kd_logits_kept_answers_are_those_of_the_live_teacher(runs):
    loop = runs.loop("kd_logits")
    (_, course), *_ = loop.moments._asked
    kept = course.models["teacher"].answers
    assert kept.shape[0] == len(loop.feed.batches.examples) and not kept.requires_grad
    assert course.models["teacher"].model is None, "the teacher is let go"
    from luthier.workflow.prediction import Predictor

    live = Predictor(course.models["teacher"].name).tuned.model.eval()
    for batch in loop.feed.cut(1):
        with torch.no_grad():
            assert torch.allclose(live(**batch.inputs).logits, kept[torch.from_numpy(batch.rows)], atol=1e-5)


@pytest.mark.acid("kd_logits", 5)
def test_kd_logits_no_gradient_reaches_a_live_teacher(runs):
    loop = runs.after("kd_logits", kind="llama", steps=1)
    (_, course), *_ = loop.moments._asked
    assert all(not p.requires_grad and p.grad is None for p in course.models["teacher"].model.parameters())


def test_kd_logits_draws_the_student_to_its_teacher(runs):
    distances = []
    for alpha in (0.0, 1.0):
        loop = runs.after("kd_logits", kind="bert-dry", steps=20, values={"kd_logits.alpha": alpha})
        (_, course), *_ = loop.moments._asked
        batch = loop.feed.cut(0)[0]
        with torch.no_grad(), course.still():
            found = course.forward(batch)
        distances.append(float(soft_loss(course.task, course.models["teacher"].logits(batch), found, 1.0)))
    assert distances[1] < 0.7 * distances[0], distances


@pytest.mark.acid("kd_logits", 4)
def test_a_teacher_that_does_not_fit_is_refused(runs, tmp_path):
    def refused(error, words, kind="bert", **settings):
        spec = little_spec(runs.home, kind=kind, strategy="kd_logits", out=str(tmp_path / "run"))
        with pytest.raises(error, match=words):
            train(dataclasses.replace(spec, settings=spec.settings | settings))
        assert not (tmp_path / "run" / "tuning").exists()

    refused(ConfigError, "no teacher is named")
    refused(ModelError, "no such model folder", teacher=str(tmp_path / "nothing"))
    refused(ConfigError, r"answers with the labels .*learns bad, good, red", teacher=str(runs.home / "bert"))
    others = little_data(tmp_path / "others.csv")
    others.write_text(others.read_text().replace("good", "blue"))
    spec = little_spec(runs.home, steps=2, out=str(tmp_path / "other"), data=DataSpec(source=str(others)))
    train(spec, stop_at=1)
    refused(ConfigError, "has no result yet", teacher=str(tmp_path / "other"))
    resume(tmp_path / "other")
    refused(ConfigError, "answers with the labels bad, blue, red", teacher=str(tmp_path / "other"))
    refused(ConfigError, "learnt the task classification", kind="llama", teacher=str(tmp_path / "other"))
    refused(ConfigError, "has another vocabulary", kind="llama", teacher=str(little_model(runs.home / "bert")))


# --- lwf


@pytest.mark.acid("lwf", 2, 3)
def test_lwf_a_heavy_weight_freezes_what_the_model_says(runs):
    moved = []
    for weight in (0.0, 100.0):
        loop = runs.after("lwf", kind="llama", steps=8, values={"lwf.old": "", "lwf.weight": weight})
        assert not loop.spec.also, "of new rows alone"
        (_, course), *_ = loop.moments._asked
        batch = loop.feed.cut(0)[0]
        with torch.no_grad(), course.still():
            new = course.forward(batch)
            with course.tuned.base_only():
                old = course.forward(batch).logits
        moved.append(float(soft_loss(course.task, old, new, 1.0)))
    assert moved[1] < 0.2 * moved[0], moved


@pytest.mark.acid("lwf", 1)
def test_lwf_the_sleeping_base_answers_as_the_folder_does(runs):
    asleep = runs.after("lwf", kind="llama", values={"lwf.old": ""})
    assert alike(asleep, runs.after("lwf", kind="llama", values={"lwf.old": asleep.spec.model}), 1e-5)


def test_lwf_needs_old_answers(runs):
    with pytest.raises(ConfigError, match="the base has no head for its labels"):
        runs.loop("lwf", values={"lwf.old": ""})


@pytest.mark.parametrize("weights", [(1.0,), (0.0, 0.0), (float("nan"), 1.0), (float("inf"), 1.0), (-1.0, 3.0)])
def test_weights_of_teachers_that_weigh_nothing_sensible_are_refused(weights, tmp_path):
    settings = {"kd_ensemble.teachers": "one,two", "kd_ensemble.weights": weights}
    with pytest.raises(ConfigError, match=r"kd_ensemble\.weights: (give 2 numbers|got nan|got inf|must be at least 0)"):
        train(little_spec(tmp_path, strategy="kd_ensemble", settings=settings))
