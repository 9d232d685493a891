"""Acid tests of the strategies that change the loss: their formulas, written out."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from in_memory import Runs
from little import little_spec

from luthier.core import ConfigError
from luthier.data.tasks import Task
from luthier.runs.spec import BatchSpec
from luthier.training import STRATEGIES
from luthier.training.objective import Result
from luthier.training.told import Told, apart, told_of
from luthier.workflow import train

torch.set_num_threads(1)
ClassWeights, LabelSmoothing, Focal, RDrop = (
    STRATEGIES.get(n) for n in ("class_weights", "label_smoothing", "focal", "r_drop")
)
THREE = Task(name="classification", labels=("bad", "good", "red"))
SEVERAL = dataclasses.replace(THREE, multi_label=True)
LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.3, -0.2], [-1.0, 1.5, 3.0]])
LABELS = torch.tensor([0, 2, 2])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("loss"))


def passed(logits=LOGITS, labels=LABELS):
    return Result(F.cross_entropy(logits, labels, reduction="sum"), len(labels), logits, labels)


# --- told


@pytest.mark.parametrize("name", ["classification", "several", "regression", "causal_lm", "seq2seq"])
def test_losses_of_targets_add_up_to_the_tasks_loss(name):
    from luthier.training.objective import Objective

    draw = torch.Generator().manual_seed(0)
    task = {"several": SEVERAL, "classification": THREE}.get(name) or Task(name=name)
    if name in ("causal_lm", "seq2seq"):
        logits, labels = torch.randn(2, 5, 7, generator=draw), torch.randint(7, (2, 5), generator=draw)
        labels[0, 1:3] = -100
    elif name == "regression":
        logits, labels = torch.randn(4, 1, generator=draw), torch.randn(4, generator=draw)
    else:
        logits = torch.randn(4, 3, generator=draw)
        labels = torch.tensor([0, 2, 1, 1])
        labels = F.one_hot(labels, 3).float() if name == "several" else labels
    objective = Objective.__new__(Objective)
    objective.task = task
    wanted = objective.loss(logits, labels)
    told = told_of(task, Result(wanted, 0, logits, labels))
    assert torch.allclose(told.losses.sum(), wanted, rtol=1e-6)
    assert len(told.logits) == len(told.labels) == len(told.losses)


# --- class_weights


def test_balanced_weights_are_those_of_the_counts(runs):
    loop = runs.loop("class_weights", values={})
    loop.moments.start()
    (_, course) = loop.moments._asked[0]
    targets = course.examples().targets
    counts = np.bincount(targets, minlength=3)
    weights = course.memory.tensors["of_class"]
    assert torch.allclose(weights, torch.tensor(len(targets) / (3 * counts)).float())
    assert float(weights[torch.as_tensor(targets)].mean()) == pytest.approx(1, rel=1e-6), "1 on average"


def test_a_weighted_step_has_the_gradient_of_the_weighted_loss(runs):
    loop = runs.loop("class_weights", "bitfit", "bert-dry", values={"class_weights.weights": "good=4,bad=0"})
    loop.moments.start()
    loop.set_mode(training=True)
    batches = loop.feed.cut(0)
    loop._gradients(0, batches)
    found = {n: p.grad.clone() for n, p in loop.tuned.trained().items() if p.grad is not None}
    loop.optimiser.zero_grad()
    weights = torch.tensor([{"good": 4.0, "bad": 0.0}.get(name, 1.0) for name in loop.moments._task.labels])
    total = sum(b.n_targets for b in batches)
    for batch in batches:
        each = F.cross_entropy(loop.tuned.model(**batch.inputs).logits, batch.labels, reduction="none")
        ((weights[batch.labels] * each).sum() / total).backward()
    assert found and all(torch.allclose(g, loop.tuned.trained()[n].grad, atol=1e-6) for n, g in found.items())


@pytest.mark.parametrize("words", ["good", "good=x", "good=-1", "=2", "good=inf"])
def test_weights_that_are_none_are_refused(words):
    with pytest.raises(ConfigError, match="no class with a weight"):
        ClassWeights(weights=words).check(None)


def test_a_class_that_the_data_lack_is_refused_before_the_folder_is_made(tmp_path):
    spec = little_spec(tmp_path, strategy="class_weights", out=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"no class 'god'.*'good'"):
        train(dataclasses.replace(spec, settings={**spec.settings, "class_weights.weights": "god=2"}))
    assert not (tmp_path / "run").exists()
    assert "weights are of classes" in ClassWeights().suits(Task(name="regression"))
    assert "weights are of classes" in ClassWeights().suits(SEVERAL)


# --- label_smoothing


def test_smoothing_is_torchs_own():
    found = LabelSmoothing(eps=0.2).loss(course_of(THREE), None, passed).loss
    assert torch.allclose(found, F.cross_entropy(LOGITS, LABELS, label_smoothing=0.2, reduction="sum"))


def test_smoothing_of_several_labels_moves_each_target_towards_a_half():
    labels = F.one_hot(LABELS, 3).float()
    plain = F.binary_cross_entropy_with_logits(LOGITS, labels, reduction="none").mean(-1).sum()
    found = LabelSmoothing(eps=0.2).loss(course_of(SEVERAL), None, lambda: Result(plain, 3, LOGITS, labels)).loss
    wanted = F.binary_cross_entropy_with_logits(LOGITS, 0.8 * labels + 0.1, reduction="none").mean(-1).sum()
    assert torch.allclose(found, wanted)


# --- focal


def test_focal_loss_is_its_formula_with_the_gradient_through_the_chance():
    logits = LOGITS.clone().requires_grad_()
    told = told_of(THREE, passed(logits))
    (Focal(gamma=2.0).weigh(None, None, told) * told.losses).sum().backward()
    ours, logits.grad = logits.grad, None
    p = logits.softmax(-1).gather(-1, LABELS[:, None])[:, 0]
    (-((1 - p) ** 2) * p.log()).sum().backward()
    assert torch.allclose(ours, logits.grad, atol=1e-6)


def test_what_is_certain_has_no_focal_loss_and_a_finite_gradient():
    logits = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    told = told_of(THREE, passed(logits, torch.tensor([0])))
    loss = (Focal(gamma=0.5).weigh(None, None, told) * told.losses).sum()
    loss.backward()
    assert loss.item() == 0 and torch.isfinite(logits.grad).all()


def test_chances_of_several_labels_are_those_of_each_question():
    labels = F.one_hot(LABELS, 3).float()
    told = told_of(SEVERAL, Result(torch.zeros(()), 3, LOGITS, labels))
    wanted = torch.where(labels.bool(), LOGITS.sigmoid(), 1 - LOGITS.sigmoid())
    assert torch.allclose(told.chances, wanted, atol=1e-6)


def test_factors_of_two_strategies_multiply(runs):
    values = {"class_weights.weights": "good=3", "focal.gamma": 1.0}
    loop = runs.loop("class_weights+focal", "bitfit", "bert-dry", values=values, batch=BatchSpec(size=6, tokens=4096))
    loop.moments.start()
    loop.set_mode(training=True)
    batch = loop.feed.cut(0)[0]
    found = loop._gradients(0, [batch])[0]
    with torch.no_grad():
        each = F.cross_entropy(loop.tuned.model(**batch.inputs).logits, batch.labels, reduction="none")
    weights = torch.tensor([{"good": 3.0}.get(n, 1.0) for n in loop.moments._task.labels])[batch.labels]
    assert found == pytest.approx(float((weights * (1 - (-each).exp()) * each).mean()), rel=1e-5)


# --- r_drop


def test_r_drop_is_the_mean_of_two_passes_and_their_distance():
    other = LOGITS.flip(0)
    passes = iter((passed(), passed(other)))
    course = course_of(THREE)
    found = RDrop(alpha=3.0).loss(course, piece(), lambda: next(passes)).loss
    p, q = LOGITS.softmax(-1), other.softmax(-1)
    far = (p * (p / q).log()).sum() + (q * (q / p).log()).sum()
    assert torch.allclose(found, (passed().loss + passed(other).loss) / 2 + 3.0 * far / 2)
    assert course.progress.numbers["r_drop.apart"] == pytest.approx(float(far) / 3)
    assert apart(THREE, LOGITS, LOGITS) == 0


def test_two_passes_of_r_drop_have_different_dropout_also_over_a_frozen_trunk(runs):
    loop = runs.after("r_drop", "lora", trunk_dropout="auto", steps=1)
    assert loop.run.rows[0]["r_drop.apart"] > 0


def test_r_drop_without_dropout_is_refused():
    with pytest.raises(ConfigError, match="compares two dropouts"):
        RDrop().check(dataclasses.replace(little_spec_of_nothing(), trunk_dropout="off"))


# --- helpers


def course_of(task):
    from luthier.training.course import Course, Progress

    return Course(
        name="r_drop",
        tuned=None,
        task=task,
        optimiser=None,
        device=torch.device("cpu"),
        seed=0,
        progress=Progress(1, 3),
    )


def piece():
    from luthier.training.course import Piece

    return Piece(batch=None, index=0, n_targets=3)


def little_spec_of_nothing():
    from luthier.runs.spec import DataSpec, RunSpec

    return RunSpec(model="m", data=DataSpec(source="d"))


def test_told_is_flat():
    assert Told(LOGITS, LABELS, torch.ones(3)).chances.shape == (3,)


# --- dft


@pytest.mark.acid("dft", 1)
def test_the_gradient_of_dft_is_the_chance_times_that_of_the_loss():
    logits = LOGITS.clone().requires_grad_()
    told = told_of(THREE, passed(logits))
    (STRATEGIES.get("dft")().weigh(None, None, told) * told.losses).sum().backward()
    p = LOGITS.softmax(-1)
    chance = p.gather(-1, LABELS[:, None])
    assert torch.allclose(logits.grad, chance * (p - F.one_hot(LABELS, 3)), atol=1e-6)


@pytest.mark.acid("dft", 2, 3)
def test_what_is_absurd_teaches_dft_nothing_and_masked_words_have_no_part():
    task = Task(name="seq2seq")
    logits = torch.tensor([[[20.0, 0.0, 0.0], [0.1, 0.2, 0.3], [0.5, 0.0, 0.0]]], requires_grad=True)
    told = told_of(task, Result(torch.zeros(()), 2, logits, torch.tensor([[2, 1, -100]])))
    (STRATEGIES.get("dft")().weigh(None, None, told) * told.losses).sum().backward()
    assert logits.grad[0, 0].abs().max() < 1e-6 and logits.grad[0, 1].any() and not logits.grad[0, 2].any()


# --- scl


@pytest.mark.acid("scl", 1, 2)
def test_contrast_of_four_states_is_that_computed_by_hand():
    one = STRATEGIES.get("scl")(tau=0.5)
    states, labels = torch.tensor([[1.0, 0.2], [0.9, -0.1], [-1.0, 0.3], [0.1, 1.0]]), torch.tensor([0, 0, 1, 0])
    h = states / states.norm(dim=-1, keepdim=True)
    wanted = []
    for i in range(4):
        alike = [j for j in range(4) if j != i and labels[j] == labels[i]]
        below = sum((h[i] @ h[k] / 0.5).exp() for k in range(4) if k != i)
        if alike:
            wanted.append(-sum(((h[i] @ h[j] / 0.5).exp() / below).log() for j in alike) / len(alike))
    assert torch.allclose(one.contrast(states, labels), torch.stack(wanted).mean(), atol=1e-6)
    assert torch.allclose(one.contrast(states * torch.tensor([[3.0]]), labels), torch.stack(wanted).mean(), atol=1e-6)


@pytest.mark.acid("scl", 3)
def test_without_two_rows_of_a_label_the_rest_of_the_cross_entropy_is_left():
    states = torch.randn(3, 4, requires_grad=True)
    apart = STRATEGIES.get("scl")().contrast(states, torch.tensor([0, 1, 2]))
    apart.backward()
    assert apart.item() == 0 and not states.grad.any()


@pytest.mark.parametrize("kind", ["bert", "llama-labels"])
def test_scl_has_a_gradient_on_the_trunk_by_its_states_alone(kind, runs):
    loop = runs.loop("scl", "lora", kind, values={"scl.weight": 1.0}, batch=BatchSpec(size=6, tokens=4096))
    loop.moments.start()
    loop.moments.before_step(0, 3, 0)
    loop.set_mode(training=True)
    loop._gradients(0, loop.feed.cut(0))
    trained = loop.tuned.trained()
    assert any(p.grad is not None and p.grad.any() for n, p in trained.items() if "head/" not in n)
    assert not any(p.grad is not None and p.grad.any() for n, p in trained.items() if "head/" in n)


@pytest.mark.acid("scl", 5)
def test_rows_of_other_micro_batches_change_the_loss_and_the_gradient_goes_to_ones_own(runs):
    """The catalogue gathers rows over processes; a run is one process, and the pieces of a step stand for them.

    That the pieces' gradients add up to that of one piece is the contract's test of a step in pieces.
    """
    loop = runs.loop("scl", "lora", "bert-dry", values={"scl.weight": 1.0}, batch=BatchSpec(size=6, tokens=20))
    loop.moments.start()
    loop.set_mode(training=True)
    loop.moments.before_step(0, 3, 0)
    batches = loop.moments.batches(loop.feed.cut(0))
    assert len(batches) > 1
    ((_, course),) = loop.moments._asked
    found, alone = [], []
    for kept in (found, alone):
        for micro, batch in enumerate(batches):
            loop.optimiser.zero_grad()
            (loss,) = loop.moments.passes(micro, batch, 6, partial(loop._loss, 0, micro, batch))
            loss.backward()
            slope = sum(float(p.grad.abs().sum()) for p in loop.tuned.trained().values() if p.grad is not None)
            kept.append((float(loss.detach()), slope))
        course.aside.clear()
    assert all(slope > 1e-4 for _, slope in found), "each piece has a gradient on its own rows"
    assert all(abs(one[0] - other[0]) > 1e-4 for one, other in zip(found, alone, strict=True))
    assert len({round(loss / len(batch.rows), 4) for (loss, _), batch in zip(found, batches, strict=True)}) == 1


def test_a_step_in_pieces_compares_rows_under_the_dropout_of_their_own_pass(runs):
    loop = runs.loop("scl", "lora", "bert", batch=BatchSpec(size=6, tokens=20))
    loop.moments.start()
    loop.set_mode(training=True)
    loop.moments.before_step(0, 3, 0)
    batches = loop.moments.batches(loop.feed.cut(0))
    ((_, course),) = loop.moments._asked
    held = {index: states for index, (states, _) in course.aside.items()}
    for micro, batch in enumerate(batches):
        with course.states() as seen:
            next(loop.moments.passes(micro, batch, 6, partial(loop._loss, 0, micro, batch)))
        assert torch.equal(seen.pooled(batch).float(), held[micro])
    other = course.rehearse(batches[0], 1), course.rehearse(batches[0], 0)
    assert not torch.equal(other[0].logits, other[1].logits), "there is dropout"


# --- aux_lm


@pytest.mark.acid("aux_lm", 3, 4)
def test_the_loss_of_words_is_that_of_the_language_models_own_head_and_leaves_padding_and_labels_out(runs):
    from transformers import AutoModelForCausalLM

    from luthier.data.batches import Batch

    settings = {"aux_lm.weight": 0.5}
    one_piece = BatchSpec(size=6, tokens=4096)
    loop = runs.loop("aux_lm", "lora", "llama-labels-tied-dry", values=settings, batch=one_piece)
    loop.moments.start()
    loop.set_mode(training=True)
    loop.moments.before_step(0, loop.total, 0)
    batch = loop.feed.cut(0)[0]
    loop._gradients(0, [batch])
    noted = loop.moments.numbers()["aux_lm.words"]
    writer = AutoModelForCausalLM.from_pretrained(loop.spec.model).eval()
    rows = []
    for ids, mask in zip(batch.inputs["input_ids"], batch.inputs["attention_mask"], strict=True):
        text = ids[: int(mask.sum())][None]
        rows.append(float(writer(input_ids=text, labels=text).loss.detach()))
    assert batch.inputs["attention_mask"].sum() < batch.inputs["attention_mask"].numel(), "some rows are padded"
    assert noted == pytest.approx(sum(rows) / len(rows), rel=1e-4)
    other = Batch(**{**vars(batch), "labels": (batch.labels + 1) % 3})
    loop._gradients(0, [other])
    assert loop.moments.numbers()["aux_lm.words"] == noted, "whatever the labels are"


@pytest.mark.acid("aux_lm", 2)
def test_the_table_of_words_has_a_gradient_only_by_the_loss_of_words(runs):
    table = []
    for weight in (0.0, 0.5):
        loop = runs.loop("aux_lm", "full", "llama-labels-tied-dry", values={"aux_lm.weight": weight})
        loop.moments.start()
        loop.set_mode(training=True)
        loop.moments.before_step(0, loop.total, 0)
        loop._gradients(0, loop.feed.cut(0))
        grad = loop.tuned.model.get_input_embeddings().weight.grad
        seen = torch.cat([b.inputs["input_ids"].flatten() for b in loop.feed.cut(0)]).unique()
        unseen = [i for i in range(len(grad)) if i not in seen]
        table.append(bool(grad[unseen].any()))
    assert table == [False, True], "words that the rows do not hold are pushed down by the loss of words alone"


@pytest.mark.parametrize(("kind", "why"), [("bert", "no decoder"), ("llama-labels", "not the table of its words")])
def test_models_whose_words_cannot_be_scored_are_refused(kind, why, runs):
    loop = runs.loop("aux_lm", "lora", kind)
    with pytest.raises(ConfigError, match=why):
        loop.moments.start()
