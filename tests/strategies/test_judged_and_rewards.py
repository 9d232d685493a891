"""Answers that are liked or not (kto), and numbers for answers (reward_model): their formulas, and TRL's numbers."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from in_memory import Runs
from little import Heard, little_data, little_spec
from strategies.test_preference import batch_of, by_hand, moved, swapped
from tiny import tiny
from word_tables import WORDS

from luthier.core import ConfigError, DataError
from luthier.data.batches import Batch
from luthier.data.tasks import Task
from luthier.runs.spec import BatchSpec, DataSpec
from luthier.surgery import attach
from luthier.training import STRATEGIES
from luthier.training.answers import Answer, Ranked, answers_elsewhere
from luthier.training.objective import Objective
from luthier.workflow import Predictor, evaluate, predict, train
from luthier.workflow.preparation import prepare

torch.set_num_threads(1)
JUDGED, REWARD = Task(name="judged"), Task(name="reward")
KTO, RewardModel = STRATEGIES.get("kto"), STRATEGIES.get("reward_model")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("judged"))


def judged(liked: tuple[float, ...] = (1, 0, 1, 0)) -> Batch:
    """Four answers by themselves."""
    batch = batch_of()
    return dataclasses.replace(batch, marks=torch.tensor(liked)[:, None], rows=torch.arange(4).numpy(), n_targets=4)


# --- kto


@pytest.mark.acid("kto", 1)
def test_kto_weighs_each_kind_however_rare_it_is():
    answer = Answer(torch.tensor([-3.0, -5.0, -4.0]), torch.ones(3), torch.tensor([-4.0, -4.0, -4.0]))
    liked = torch.tensor([1.0, 0.0, 0.0])
    found = KTO(beta=0.5, liked=2.0, disliked=0.25).losses(answer, liked, None)
    s = torch.sigmoid
    r = torch.tensor([0.5, -0.5, 0.0])
    torch.testing.assert_close(found, torch.stack([2 * (1 - s(r[0])), 0.25 * (1 - s(-r[1])), 0.25 * (1 - s(-r[2]))]))
    for marks in ((1, 1, 1, 1), (0, 0, 0, 0)):  # a step of one kind alone
        tuned = moved()
        result = Objective(tuned, JUDGED, judge=KTO())(judged(marks))
        result.loss.backward()
        assert torch.isfinite(result.loss)
        assert all(torch.isfinite(p.grad).all() for p in tuned.trained().values())


@pytest.mark.acid("kto", 2)
def test_ktos_level_has_no_gradient_and_is_never_below_0():
    answer = Answer(torch.tensor([-3.0]), torch.ones(1), torch.tensor([-4.0]))
    liked = torch.ones(1)
    for gain, z in ((2.0, 2.0), (-2.0, 0.0)):
        chance = torch.tensor([gain - 4.0], requires_grad=True)
        loss = KTO(beta=1.0).losses(answer, liked, Answer(chance, torch.ones(1), torch.tensor([-4.0])))
        assert not loss.requires_grad
        assert loss.item() == pytest.approx(1 - 1 / (1 + math.exp(-(1.0 - z))))


@pytest.mark.acid("kto", 3)
def test_a_step_of_one_row_and_a_step_in_pieces_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"kto: an answer is held against one to another prompt.*--batch 2"):
        train(judged_spec(tmp_path, batch=BatchSpec(size=1, tokens=96)))
    with pytest.raises(ConfigError, match="kto needs the rows of a step together"):
        train(judged_spec(tmp_path, batch=BatchSpec(size=8, tokens=32)))


@pytest.mark.acid("kto", 4)
def test_kto_learns_from_answers_without_pairs(tmp_path):
    result = train(judged_spec(tmp_path, steps=30))
    assert result.scores["ranked"] > 0.8 and result.scores["reward_gap"] > 0.05
    again = evaluate(result.path, str(tmp_path / "judged.csv"))
    assert again.scores["ranked"] > 0.8
    (answer,) = predict(result.path, texts=["red red"], max_new_tokens=3)
    assert "text" in answer


def judged_spec(home: Path, **changes: Any) -> Any:
    source = little_data(home / "judged.csv", kind="judged")
    given = {"strategy": "kto", "settings": {"kto.beta": 0.5}, "batch": BatchSpec(size=8, tokens=4096)}
    data = DataSpec(source=str(source))
    return little_spec(home, kind="llama", data=data, **{**given, "trunk_dropout": "off", **changes})


def test_kto_begins_at_a_half_and_is_its_formula_with_the_answers_of_other_prompts():
    tuned = attach(tiny("llama", "lm"), "lora")
    tuned.model.eval()
    first = Objective(tuned, JUDGED, judge=KTO())(judged())
    assert first.loss.item() / 4 == pytest.approx(0.5, abs=1e-6)
    tuned, batch = moved(), judged()
    others = answers_elsewhere(batch)
    for line in range(4):
        ids, told = others.inputs["input_ids"][line], others.labels[line]
        assert ids[:3].tolist() == batch.inputs["input_ids"][line, :3].tolist(), "its own prompt"
        before = batch.labels[line - 1]
        assert told[told >= 0].tolist() == before[before >= 0].tolist(), "the answer of the line before"
        assert int(others.inputs["attention_mask"][line].sum()) == 3 + int((told >= 0).sum())
    ratios = []
    for one in (batch, others):
        own, _ = by_hand(tuned.model, one)
        with tuned.base_only():
            base, _ = by_hand(tuned.model, one)
        ratios.append(own - base)
    z = max(0.0, 0.3 * ratios[1].mean().item())
    r = 0.3 * ratios[0]
    wanted = torch.where(batch.marks[:, 0] > 0, 1 - torch.sigmoid(r - z), 1 - torch.sigmoid(z - r)).sum()
    found = Objective(tuned, JUDGED, judge=KTO(beta=0.3))(batch).loss
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def test_an_answer_to_another_prompt_is_cut_where_the_model_has_no_more_positions():
    """Each row fits by itself; a long answer to a long prompt would not."""
    tuned = attach(tiny("gpt2", "lm"), "prompt_tuning", length=3)
    objective = Objective(tuned, JUDGED, judge=KTO())
    limit = tuned.model.config.max_position_embeddings
    assert objective.room == limit - 3, "the tuning's own take three"
    batch, n = judged((1, 0)), objective.room
    ids = torch.full((2, n), 7)
    labels = torch.full((2, n), -100)
    labels[0, n - 2 :], labels[1, 2:] = 7, 7  # a long prompt, and a long answer
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch = dataclasses.replace(batch, inputs=inputs, labels=labels, rows=batch.rows[:2])
    others = answers_elsewhere(batch, objective.room)
    assert (others.labels >= 0).sum(1).tolist() == [2, 2] and others.inputs["input_ids"].shape == (2, n)
    assert torch.isfinite(objective(batch).loss)


def test_marks_that_say_nothing_are_refused_row_by_row(tmp_path):
    path = little_data(tmp_path / "judged.csv", kind="judged")
    lines = path.read_text().splitlines()
    lines[3] = lines[3].rpartition(",")[0] + ",maybe"
    lines[5] = lines[5].rpartition(",")[0] + ","
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(
        DataError, match=r"judged.csv:\d+: field 'liked' (is 'maybe'|is empty); it must be true or false"
    ):
        train(judged_spec(tmp_path))
    heard = Heard()
    spec = judged_spec(tmp_path, steps=1)
    data = dataclasses.replace(spec.data, accept_refused=0.5)
    train(dataclasses.replace(spec, data=data), listener=heard)
    assert "refused (" in heard.text and "it must be true or false" in heard.text


@pytest.mark.slow  # importing TRL alone takes seconds
@pytest.mark.filterwarnings("ignore")
def test_kto_has_the_numbers_of_trl(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from word_tables import word_tokenizer

    tuned, batch = moved(), judged((1, 0, 0, 1))
    others = answers_elsewhere(batch)
    args = trl.KTOConfig(
        str(tmp_path), beta=0.3, desirable_weight=1.5, undesirable_weight=0.5, report_to=[], use_cpu=True, bf16=False,
        per_device_train_batch_size=4, max_steps=1,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": "a", "completion": "b", "label": bool(k % 2)} for k in range(4)])
    policy = moved().model
    trainer = trl.KTOTrainer(
        model=policy, ref_model=tiny("llama", "lm").eval(), args=args, train_dataset=data,
        processing_class=word_tokenizer("gpt"),
    )  # fmt: skip
    policy.eval()
    rows = []
    for line in range(4):
        real = batch.inputs["input_ids"][line][batch.inputs["attention_mask"][line] > 0].tolist()
        other = others.inputs["input_ids"][line][others.inputs["attention_mask"][line] > 0].tolist()
        rows.append(
            {
                "prompt_ids": real[:3],
                "completion_ids": real[3:],
                "KL_completion_ids": other[3:],
                "label": bool(batch.marks[line]),
            }
        )
    theirs = trainer._compute_loss(policy, trainer.data_collator(rows), return_outputs=False)
    ours = Objective(tuned, JUDGED, judge=KTO(beta=0.3, liked=1.5, disliked=0.5))(batch)
    assert ours.loss.item() / 4 == pytest.approx(theirs.item(), abs=1e-4)


# --- rewards


def scored(batch: Batch, kind: str = "llama", **settings: Any) -> Any:
    model = tiny(kind, "classification", num_labels=1)
    model.config.pad_token_id = 0
    return Objective(attach(model.eval(), "lora"), REWARD, judge=RewardModel(**settings) if settings else None)(batch)


@pytest.mark.acid("reward_model", 1)
def test_swapping_a_pair_negates_the_difference():
    one, other = (scored(b).logits for b in (batch_of(), swapped(batch_of())))
    torch.testing.assert_close(one[:, 0] - one[:, 1], other[:, 1] - other[:, 0])
    assert (one[:, 0] - one[:, 1]).abs().min() > 1e-4


@pytest.mark.acid("reward_model", 2)
def test_padding_on_either_side_gives_one_score():
    batch = batch_of()
    left = {}
    lengths = batch.inputs["attention_mask"].sum(1).tolist()
    for name, values in batch.inputs.items():
        left[name] = torch.stack([row.roll(len(row) - n) for row, n in zip(values, lengths, strict=True)])
    assert left["attention_mask"][2, 0] == 0, "there is padding"
    moved_left = scored(dataclasses.replace(batch, inputs=left)).logits
    torch.testing.assert_close(moved_left, scored(batch).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.acid("reward_model", 3)
def test_a_share_of_1_is_the_hard_loss_and_margins_and_shares_are_their_formulas():
    rewards = torch.tensor([[2.0, 0.5], [-1.0, 1.0]])
    hard = -F.logsigmoid(torch.tensor([1.5, -2.0]))
    whole, marked = torch.tensor([[1.0, 0.0]] * 2), torch.tensor([[0.75, 0.0], [1.0, 0.5]])
    torch.testing.assert_close(RewardModel().losses(rewards, whole), hard)
    torch.testing.assert_close(Ranked().losses(rewards, whole), hard)
    soft = -(0.75 * F.logsigmoid(torch.tensor(1.5)) + 0.25 * F.logsigmoid(torch.tensor(-1.5)))
    wide = -F.logsigmoid(torch.tensor(-2.5))
    torch.testing.assert_close(RewardModel().losses(rewards, marked), torch.stack([soft, wide]))
    torch.testing.assert_close(RewardModel(heed="none").losses(rewards, marked), hard)
    torch.testing.assert_close(RewardModel(heed="shares").losses(rewards, marked), torch.stack([soft, hard[1]]))
    torch.testing.assert_close(RewardModel(heed="margins").losses(rewards, marked), torch.stack([hard[0], wide]))


@pytest.mark.acid("reward_model", 4)
def test_a_constant_changes_nothing_but_the_centring():
    rewards, marks = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]), torch.tensor([[0.8, 0.2]] * 2)
    torch.testing.assert_close(RewardModel().losses(rewards + 7, marks), RewardModel().losses(rewards, marks))
    more = RewardModel(center=0.1).losses(rewards, marks) - RewardModel().losses(rewards, marks)
    torch.testing.assert_close(more, 0.1 * rewards.sum(1) ** 2)


@pytest.mark.acid("reward_model", 5)
def test_pairs_that_can_be_told_apart_are_and_answers_are_scored_afterwards(tmp_path):
    source = tmp_path / "pairs.csv"
    words = [WORDS[i % len(WORDS)] for i in range(46)]
    lines = [f"{word} {WORDS[-i % 7]},good {word},bad {word}" for i, word in enumerate(words)]
    source.write_text("\n".join(["prompt,chosen,rejected", *lines]) + "\n")
    spec = little_spec(
        tmp_path, kind="llama", data=DataSpec(source=str(source)), strategy="reward_model", steps=40,
        batch=BatchSpec(size=8, tokens=96, accumulate=2),
    )  # fmt: skip
    result = train(spec)
    assert result.scores["pair_accuracy"] == 1 and result.scores["margin"] > 1
    assert evaluate(result.path, str(source)).scores["pair_accuracy"] == 1
    answers = predict(result.path, data=str(source))
    assert len(answers) == 46 and all(set(a) == {"value"} for a in answers)
    rows = [{"prompt": "red big", "chosen": text} for text in ("good red", "bad red", "")]
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    good, bad, nothing = predict(result.path, data=str(asked))
    assert good["value"] > bad["value"] and "is empty" in nothing["refused"]
    with pytest.raises(ConfigError, match="scores answers to prompts: give both columns"):
        predict(result.path, texts=["red"])
    assert Predictor(result.path).task.name == "reward"


@pytest.mark.slow  # importing TRL alone takes seconds
@pytest.mark.filterwarnings("ignore")
def test_rewards_have_the_numbers_of_trl():
    trl = pytest.importorskip("trl")
    from types import SimpleNamespace

    batch = dataclasses.replace(batch_of(), marks=torch.tensor([[1.0, 0.5], [1.0, 0.0]]))
    model = tiny("llama", "classification", num_labels=1).eval()
    model.config.pad_token_id = 0
    from collections import defaultdict

    keep = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    me = SimpleNamespace(
        model=model, args=SimpleNamespace(center_rewards_coefficient=0.1), accelerator=keep,
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0,
    )  # fmt: skip
    inputs = {**batch.inputs, "margin": batch.marks[:, 1]}
    given = inputs.copy()
    given.pop("margin")
    outputs = model(**given)
    theirs = trl.RewardTrainer.compute_loss(me, _Takes(model, outputs), inputs)
    assert scored(batch, center=0.1).loss.item() / 2 == pytest.approx(float(theirs), abs=1e-4)


class _Takes:
    """TRL hands the margin on to the model, which takes what it is given there."""

    def __init__(self, model: Any, outputs: Any) -> None:
        self.outputs, self.training = outputs, False

    def __call__(self, **inputs: Any) -> Any:
        return self.outputs


def test_shares_and_margins_that_a_run_does_not_read_are_named(tmp_path):
    source = tmp_path / "pairs.csv"
    lines = [f"{WORDS[i % 7]} {i},good {i},bad {i},0.3" for i in range(20)]
    source.write_text("\n".join(["prompt,chosen,rejected,share", *lines]) + "\n")
    spec = little_spec(tmp_path, kind="llama", data=DataSpec(source=str(source)), steps=1)
    for name, said in (("dpo", True), ("reward_model", False)):
        lines = prepare(dataclasses.replace(spec, strategy=name)).lines
        assert any("not heeded: 'share', which reward_model alone reads" in line for line in lines) == said
