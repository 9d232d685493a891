"""Strategies that learn from two answers, one better: their formulas written out, and TRL's numbers."""

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from in_memory import Runs, alike, same
from little import Heard, little_data, little_spec
from tiny import tiny

from luthier import kernels
from luthier.core import CompositionError, ConfigError
from luthier.data.batches import Batch
from luthier.data.examples import IGNORED
from luthier.data.tasks import Task
from luthier.runs.spec import BatchSpec, DataSpec
from luthier.surgery import attach
from luthier.training import STRATEGIES
from luthier.training.answers import Answer, log_odds
from luthier.training.objective import Objective
from luthier.workflow import Predictor, evaluate, predict, resume, train
from luthier.workflow.resume_proof import run_digests

torch.set_num_threads(1)
PAIRS = Task(name="preference")
DPO, ORPO, CPO, SimPO = (STRATEGIES.get(name) for name in ("dpo", "orpo", "cpo", "simpo"))
PREFERENCE = ["dpo", "orpo", "cpo", "simpo"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("preference"))


def batch_of(seed: int = 0, prompt: int = 3, answers: tuple[int, int] = (4, 2)) -> Batch:
    """Two pairs of one prompt each: lines 0 and 1 are the better answers."""
    draw = torch.Generator().manual_seed(seed)
    width = prompt + max(answers)
    asked = torch.randint(5, 60, (2, prompt), generator=draw)
    ids, labels, mask = (torch.zeros(4, width, dtype=torch.long) for _ in range(3))
    labels += IGNORED
    for line in range(4):
        n = answers[line // 2]
        words = torch.randint(5, 60, (n,), generator=draw)
        ids[line, : prompt + n] = torch.cat([asked[line % 2], words])
        labels[line, prompt : prompt + n] = words
        mask[line, : prompt + n] = 1
    marks = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    return Batch(
        inputs={"input_ids": ids, "attention_mask": mask}, labels=labels, rows=np.arange(2), n_targets=2,
        n_tokens=int(mask.sum()), marks=marks,
    )  # fmt: skip


def swapped(batch: Batch) -> Batch:
    turn = [2, 3, 0, 1]
    assert batch.labels is not None
    return dataclasses.replace(batch, inputs={n: t[turn] for n, t in batch.inputs.items()}, labels=batch.labels[turn])


def moved(kind: str = "llama", method: str = "lora", by: float = 0.3) -> Any:
    """A tuned model whose tuning does something."""
    tuned = attach(tiny(kind, "lm"), method)
    tuned.model.eval()
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in tuned.trained().values():
            p.add_(torch.randn(p.shape, generator=draw) * by)
    return tuned


def by_hand(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ log p of the answer's tokens, one token after the other, and how many they are."""
    with torch.no_grad():
        logits = model(**batch.inputs).logits.double()
    sums, counts = [], []
    for line, labels in enumerate(batch.labels.tolist()):
        places = [t for t, label in enumerate(labels) if label != IGNORED]
        sums.append(sum(logits[line, t - 1].log_softmax(-1)[labels[t]] for t in places))
        counts.append(len(places))
    return torch.stack(sums), torch.tensor(counts, dtype=torch.float64)


# --- what all of them share


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("chunked", [True, False])
def test_an_answer_has_the_log_probability_of_its_tokens_alone(kind, chunked):
    tuned, batch = moved(kind), batch_of()
    objective = Objective(tuned, PAIRS, full_logits=not chunked, judge=DPO())
    assert objective.chunked == chunked
    seen = {}
    judge = _Watching(seen)
    objective.judge = judge
    objective(batch)
    sums, counts = by_hand(tuned.model, batch)
    with tuned.base_only():
        base, _ = by_hand(tuned.model, batch)
    for side, name in enumerate(("chosen", "rejected")):
        lines = slice(2 * side, 2 * side + 2)
        torch.testing.assert_close(seen[name].chance.double(), sums[lines], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(seen[name].base.double(), base[lines], rtol=1e-5, atol=1e-5)
        assert seen[name].tokens.tolist() == counts[lines].tolist()


class _Watching:
    reference = True

    def __init__(self, seen: dict[str, Answer]) -> None:
        self.seen = seen

    def losses(self, chosen: Answer, rejected: Answer, marks: torch.Tensor) -> torch.Tensor:
        self.seen |= {"chosen": chosen, "rejected": rejected}
        return chosen.ratio

    def reward(self, answer: Answer) -> torch.Tensor:
        return answer.ratio


def test_losses_of_tokens_have_the_gradients_of_all_logits():
    draw = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(50, 8, generator=draw), torch.randn(50, generator=draw)
    hidden, labels = torch.randn(7, 8, generator=draw), torch.randint(50, (7,), generator=draw)
    factor = torch.randn(7, generator=draw)
    found = []
    for cap in (None, 3.0):
        grads = []
        for size in (1, 1 << 20):  # a token at a time, and all
            parts = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
            losses = kernels.token_losses(*parts, labels, chunk_bytes=size, softcap=cap)
            (losses * factor).sum().backward()
            grads.append([losses.detach(), *(p.grad for p in parts)])
        parts = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        logits = F.linear(*parts)
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        losses = F.cross_entropy(logits, labels, reduction="none")
        (losses * factor).sum().backward()
        for made in grads:
            for one, wanted in zip(made, [losses.detach(), *(p.grad for p in parts)], strict=True):
                torch.testing.assert_close(one, wanted, rtol=1e-5, atol=1e-6)
        found.append(losses.detach())
    assert not torch.allclose(*found), "the cap is heeded"


@pytest.mark.acid("dpo", 2)
@pytest.mark.parametrize("name", PREFERENCE)
def test_no_word_of_the_prompt_is_compared(name):
    """The gradient of the logits that predict a word of the prompt is nothing, and no other than the answers' is."""
    tuned, batch = moved(), batch_of()
    objective = Objective(tuned, PAIRS, full_logits=True, judge=STRATEGIES.get(name)())
    held = []

    def keep(module: Any, args: Any, out: Any) -> None:
        if out.logits.requires_grad:
            out.logits.retain_grad()
            held.append(out.logits)

    handle = tuned.model.register_forward_hook(keep)
    objective(batch).loss.backward()
    handle.remove()
    (logits,) = held
    told = torch.zeros_like(batch.labels, dtype=torch.bool)
    told[:, :-1] = batch.labels[:, 1:] != IGNORED
    moves = logits.grad.abs().sum(-1) > 0
    assert not moves[~told].any() and moves[:2][told[:2]].all()


@pytest.mark.parametrize("name", PREFERENCE)
def test_swapping_the_pair_flips_the_margin(name):
    tuned = moved()
    objective = Objective(tuned, PAIRS, judge=STRATEGIES.get(name)())
    one, other = (objective(b).logits for b in (batch_of(), swapped(batch_of())))
    assert one.shape == (2, 2)
    torch.testing.assert_close(one[:, 0] - one[:, 1], other[:, 1] - other[:, 0])
    assert (one[:, 0] - one[:, 1]).abs().min() > 1e-3


def test_other_strategies_stand_beside_or_are_refused_with_what_to_use(runs):
    runs.after("dpo+llrd+l2_sp", kind="llama-pairs", steps=2)
    for other in ("focal", "kd_logits", "freelb", "scl"):
        with pytest.raises(ConfigError, match=f"strategy {other} cannot learn the task preference"):
            runs.loop(other, kind="llama-pairs", values={})
    with pytest.raises(ConfigError, match="dpo cannot learn the task causal_lm: it learns preference alone"):
        runs.loop("dpo", kind="llama")


# --- dpo


@pytest.mark.acid("dpo", 1)
@pytest.mark.parametrize("form", ["sigmoid", "normalised"])
def test_dpo_begins_at_ln_2_with_rewards_of_0(form):
    tuned = attach(tiny("llama", "lm"), "lora")
    tuned.model.eval()
    result = Objective(tuned, PAIRS, judge=DPO(form=form))(batch_of())
    assert result.loss.item() / result.n_targets == pytest.approx(math.log(2), abs=1e-6)
    assert torch.equal(result.logits, torch.zeros(2, 2))


def test_a_prompt_that_both_answers_share_cancels_in_dpo():
    tuned, batch = moved(), batch_of()
    objective = Objective(tuned, PAIRS, judge=DPO())
    known = objective(batch).loss
    seen = dataclasses.replace(
        batch, labels=torch.where(batch.inputs["attention_mask"] > 0, batch.inputs["input_ids"], IGNORED)
    )
    torch.testing.assert_close(objective(seen).loss, known)  # both answers have one prompt: it cancels
    sums, _ = by_hand(tuned.model, batch)
    with tuned.base_only():
        base, _ = by_hand(tuned.model, batch)
    h = (sums - base)[:2] - (sums - base)[2:]
    torch.testing.assert_close(known.double(), -F.logsigmoid(0.1 * h).sum(), rtol=1e-5, atol=1e-6)


@pytest.mark.acid("dpo", 3)
def test_swapping_a_pair_flips_dpos_margin_and_moves_the_other_way():
    tuned = moved()
    objective = Objective(tuned, PAIRS, judge=DPO(beta=1.0))
    one, other = objective(batch_of()), objective(swapped(batch_of()))
    margins = one.logits[:, 0] - one.logits[:, 1]
    torch.testing.assert_close(other.logits[:, 0] - other.logits[:, 1], -margins)
    torch.testing.assert_close(other.loss - one.loss, margins.sum(), rtol=1e-4, atol=1e-5)  # -log σ(-m) + log σ(m) = m


@pytest.mark.acid("dpo", 4)
def test_a_stored_reference_is_the_live_one_to_the_bit_and_lasts(runs):
    given = {"kind": "llama-pairs", "steps": 4}
    live, stored = (runs.after("dpo", values={"dpo.stored": on}, **given) for on in (False, True))
    assert alike(live, stored, 1e-6)
    kept = stored.moments._asked[0][1].memory.tensors["reference"]
    assert kept.shape == (len(stored.feed.batches.examples), 2) and (kept < 0).all()
    resumed = runs.resumed(2, "dpo", "lora", "llama-pairs", values={"dpo.stored": True}, steps=4)
    assert same(resumed, stored)
    calls = []
    loop = runs.loop("dpo", values={"dpo.stored": True}, **given)
    loop.moments.before_step(0, 4, 0)
    inner = loop.tuned.base_only
    loop.tuned.base_only = lambda: calls.append(1) or inner()
    loop._train_step(0, loop.feed.cut(0))
    assert not calls, "the base is not asked again"


@pytest.mark.acid("dpo", 5)
@pytest.mark.parametrize("method", ["lora", "prefix_tuning", "pfeiffer_adapter", "ia3", "full"])
def test_the_reference_is_the_base_with_the_tuning_asleep(method):
    """No second model: the numbers in memory are those of the plain run, and dropout is off in the reference alone."""
    tuned = moved(method=method, by=0.05)
    before = {id(p) for p in tuned.model.parameters()}
    objective, batch = Objective(tuned, PAIRS, judge=DPO()), batch_of()
    tuned.model.train()
    found = objective.base_chances(batch)
    assert tuned.model.training, "and awake again afterwards"
    base, _ = by_hand(tiny("llama", "lm").eval(), batch)
    torch.testing.assert_close(found.double(), base.view(2, 2).T, rtol=1e-5, atol=1e-5)
    assert {id(p) for p in tuned.model.parameters()} == before
    assert not found.requires_grad and objective(batch).loss.requires_grad


def held_by(objective: Objective, batch: Batch) -> int:
    """Bytes that the graph of a pass keeps, each storage once."""
    kept: dict[int, tuple[int, Any]] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = (
            t.untyped_storage().nbytes(),
            t,
        )  # held, so that no other takes its place
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = objective(batch)
    assert result.loss.requires_grad
    return sum(n for n, _ in kept.values())


def test_the_graph_of_dpo_holds_no_more_than_plain_training_on_both_answers():
    tuned, batch = moved(), batch_of(prompt=12, answers=(12, 10))
    plain = Objective(tuned, Task(name="causal_lm"))
    ours = Objective(tuned, PAIRS, judge=DPO())
    assert plain.chunked and ours.chunked
    both = dataclasses.replace(batch, marks=None, n_targets=44)
    assert held_by(ours, batch) <= 1.15 * held_by(plain, both)


def test_the_forms_of_dpo_are_their_formulas():
    chosen = Answer(torch.tensor([-4.0, -9.0]), torch.tensor([2.0, 3.0]), torch.tensor([-5.0, -7.0]))
    rejected = Answer(torch.tensor([-6.0, -3.0]), torch.tensor([4.0, 1.0]), torch.tensor([-4.0, -3.5]))
    marks = torch.tensor([[1.0, 0.0]] * 2)
    h, means = torch.tensor([3.0, -2.5]), torch.tensor([1 / 2 + 2 / 4, -2 / 3 - 0.5])
    wanted = {
        "sigmoid": -torch.log(torch.sigmoid(0.2 * h)),
        "ipo": (means - 1 / 0.4) ** 2,
        "hinge": torch.clamp(1 - 0.2 * h, min=0),
        "normalised": -torch.log(torch.sigmoid(0.2 * means)),
    }
    for form, losses in wanted.items():
        torch.testing.assert_close(DPO(beta=0.2, form=form).losses(chosen, rejected, marks), losses)
    noisy = DPO(beta=0.2, form="robust", noise=0.25).losses(chosen, rejected, marks)
    right, wrong = -torch.log(torch.sigmoid(0.2 * h)), -torch.log(torch.sigmoid(-0.2 * h))
    torch.testing.assert_close(noisy, (0.75 * right - 0.25 * wrong) / 0.5)
    told = torch.tensor([[0.8, 0.0], [0.6, 2.0]])
    shared = DPO(beta=0.2, form="shares").losses(chosen, rejected, told)
    torch.testing.assert_close(shared, told[:, 0] * right + (1 - told[:, 0]) * wrong)


def test_slips_in_dpos_settings_are_refused(tmp_path):
    spec = little_spec(tmp_path, kind="llama", strategy="dpo", settings={"dpo.noise": 0.1})
    with pytest.raises(ConfigError, match=r"dpo\.noise is 0\.1 and dpo\.form 'sigmoid'.*form=robust"):
        train(spec)
    with pytest.raises(ConfigError, match="beta"):
        train(dataclasses.replace(spec, settings={"dpo.beta": 0}))


# --- orpo, cpo, simpo


@pytest.mark.acid("orpo", 1)
def test_orpo_without_its_odds_is_plain_training_on_the_better_answers():
    """Against the language task's own loss on the same rows, where the answers of a step are of one length."""
    tuned, batch = moved(), batch_of()
    ours = Objective(tuned, PAIRS, judge=ORPO(weight=0.0))(batch)
    better = dataclasses.replace(
        batch, inputs={n: t[:2] for n, t in batch.inputs.items()}, labels=batch.labels[:2], n_targets=8, marks=None
    )
    plain = Objective(tuned, Task(name="causal_lm"))(better)
    torch.testing.assert_close(ours.loss / 2, plain.loss / 8)
    grads = []
    for result, n in ((ours, 2), (plain, 8)):
        grads.append(torch.autograd.grad(result.loss / n, list(tuned.trained().values())))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def answers(chosen: tuple[float, int], rejected: tuple[float, int]) -> tuple[Answer, Answer, torch.Tensor]:
    one, other = (Answer(torch.tensor([s]), torch.tensor([float(n)])) for s, n in (chosen, rejected))
    return one, other, torch.tensor([[1.0, 0.0]])


@pytest.mark.acid("orpo", 2)
def test_orpo_reads_means_not_sums():
    short, long = answers((-2.0, 2), (-6.0, 3)), answers((-20.0, 20), (-60.0, 30))
    torch.testing.assert_close(ORPO().losses(*short), ORPO().losses(*long))
    p, q = math.exp(-1.0), math.exp(-2.0)
    odds = math.log(p / (1 - p)) - math.log(q / (1 - q))
    wanted = 1.0 - 0.1 * math.log(1 / (1 + math.exp(-odds)))
    assert ORPO().losses(*short).item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.acid("orpo", 3)
def test_orpo_is_finite_where_an_answer_is_certain():
    for sums in ((0.0, -1.0), (-1e-9, -1e-30), (-1e-12, -1e4), (-3e3, 0.0)):
        one = torch.tensor([sums[0]], requires_grad=True)
        other = torch.tensor([sums[1]], requires_grad=True)
        count = torch.tensor([1.0])
        loss = ORPO(weight=1.0).losses(Answer(one, count), Answer(other, count), torch.ones(1, 2))
        loss.sum().backward()
        assert torch.isfinite(loss).all() and torch.isfinite(one.grad).all() and torch.isfinite(other.grad).all()
    x = torch.tensor([-1e-6, -1e-3, -0.5, -5.0, -50.0], dtype=torch.float64)
    torch.testing.assert_close(log_odds(x), torch.log(x.exp() / (1 - x.exp())), rtol=1e-8, atol=1e-8)
    exact = -math.log(1e-6)  # of 1 - 1e-6: in fp32 1 - P has two digits left
    assert log_odds(torch.tensor([-1e-6])).item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.acid("orpo", 4)
@pytest.mark.parametrize("name", ["orpo", "cpo", "simpo"])
def test_nothing_but_the_policy_is_asked(name):
    tuned = moved()
    objective = Objective(tuned, PAIRS, judge=STRATEGIES.get(name)())
    tuned.base_only = None  # type: ignore[method-assign]  # whoever asks the base fails
    asked = []
    handle = tuned.model.get_submodule(tuned.anatomy.blocks[0].path).register_forward_hook(lambda *a: asked.append(1))
    objective(batch_of())
    handle.remove()
    assert len(asked) == 1


def test_cpo_and_simpo_are_their_formulas():
    pair = answers((-4.0, 2), (-6.0, 4))
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    assert CPO(beta=0.3).losses(*pair).item() == pytest.approx(-math.log(sigmoid(0.3 * 2)) + 2)
    assert CPO(beta=0.3, form="hinge", weight=0).losses(*pair).item() == pytest.approx(1 - 0.6)
    assert CPO(beta=0.3, form="ipo", weight=0).losses(*pair).item() == pytest.approx((-0.5 - 1 / 0.6) ** 2)
    wanted = -math.log(sigmoid(2 * (-2 + 1.5) - 0.7)) + 0.5 * 2
    assert SimPO(beta=2, gap=0.7, weight=0.5).losses(*pair).item() == pytest.approx(wanted)


@pytest.mark.slow  # importing TRL alone takes seconds
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("ours", "loss_type", "more"),
    [
        ("orpo", "", {}),
        ("cpo", "sigmoid", {"cpo_alpha": 0.0}),
        ("cpo", "hinge", {"cpo_alpha": 0.0}),
        ("simpo", "simpo", {"cpo_alpha": 0.0, "simpo_gamma": 0.4}),
    ],
)
def test_losses_without_a_reference_have_the_numbers_of_trl(ours, loss_type, more):
    pytest.importorskip("trl")
    from types import SimpleNamespace

    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    seen: dict[str, Answer] = {}
    tuned, batch = moved(), batch_of()
    objective = Objective(tuned, PAIRS, judge=_Watching(seen))
    objective(batch)
    chosen, rejected = seen["chosen"], seen["rejected"]
    shared = {"beta": 0.3, "loss_type": loss_type, "label_smoothing": 0.0, "alpha": 0.0}
    shared |= {"accelerator": SimpleNamespace(device="cpu"), "simpo_gamma": more.get("simpo_gamma", 0.0)}
    me = SimpleNamespace(**shared)
    if ours == "orpo":
        theirs = chosen.mean * -1 - ORPOTrainer.odds_ratio_loss(me, chosen.mean, rejected.mean)[0]
        judge = ORPO(weight=0.3)
    else:
        by_mean = ours == "simpo"
        values = [a.mean if by_mean else a.chance for a in (chosen, rejected)]
        theirs = CPOTrainer.cpo_loss(me, *values)[0]
        judge = SimPO(beta=0.3, gap=0.4) if by_mean else CPO(beta=0.3, weight=0.0, form=loss_type)
    torch.testing.assert_close(judge.losses(chosen, rejected, batch.marks), theirs, rtol=1e-5, atol=1e-5)
    objective.judge = judge
    assert objective(batch).loss.item() == pytest.approx(theirs.sum().item(), abs=1e-4)


# --- a whole run


def pairs_spec(home: Any, **changes: Any) -> Any:
    source = little_data(home / "pairs.csv", kind="pairs")
    return little_spec(
        home,
        kind="llama",
        data=DataSpec(source=str(source)),
        **{"strategy": "dpo", "batch": BatchSpec(size=8, tokens=96, accumulate=2), **changes},
    )


def test_a_run_learns_pairs_is_scored_stopped_and_answers(tmp_path):
    given = {"settings": {"dpo.beta": 0.5}, "steps": 30, "trunk_dropout": "off"}
    result = train(pairs_spec(tmp_path, **given, out=str(tmp_path / "whole")))
    assert set(result.scores) == {"pair_accuracy", "margin", "chosen_reward", "loss"}
    assert result.scores["pair_accuracy"] > 0.8 and result.scores["margin"] > 0.1
    assert result.scores["loss"] < math.log(2)
    rows = [json.loads(line) for line in (tmp_path / "whole/events.jsonl").read_text().splitlines()]
    first = next(row for row in rows if row["event"] == "step")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    found = evaluate(tmp_path / "whole", str(tmp_path / "pairs.csv"))
    assert found.rows == 46 and found.scores["pair_accuracy"] > 0.8
    train(pairs_spec(tmp_path, **given, out=str(tmp_path / "stopped")), stop_at=11)
    resume(tmp_path / "stopped")
    assert run_digests(tmp_path / "stopped") == run_digests(tmp_path / "whole")
    (answer,) = predict(tmp_path / "whole", texts=["red red"], max_new_tokens=4)
    assert "text" in answer
    assert Predictor(tmp_path / "whole").judge == DPO(beta=0.5)


def test_evaluation_has_the_numbers_of_the_loss(tmp_path):
    result = train(pairs_spec(tmp_path, steps=6, trunk_dropout="off"))
    predictor = Predictor(result.path)
    found = evaluate(result.path, str(tmp_path / "pairs.csv"))
    again = evaluate(result.path, str(tmp_path / "pairs.csv"))
    assert found.scores == again.scores
    objective = Objective(predictor.tuned, PAIRS, full_logits=True, judge=DPO())
    assert objective.judge.reference


def test_pairs_without_a_strategy_are_learnt_as_text_and_that_is_said(tmp_path):
    heard = Heard()
    result = train(pairs_spec(tmp_path, strategy=None, steps=2), listener=heard)
    assert "the better answers are learnt as text, the worse ones not at all; dpo learns" in heard.text
    assert result.scores["chosen_reward"] == pytest.approx(-result.scores["loss"], rel=1e-6)


def test_two_that_learn_different_rows_are_refused(tmp_path):
    with pytest.raises(CompositionError, match="dpo and kto cannot stand together"):
        train(pairs_spec(tmp_path, strategy="dpo+kto"))


# --- TRL


@pytest.mark.slow  # importing TRL alone takes seconds
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("form", "theirs", "noise"),
    [
        ("sigmoid", "sigmoid", 0),
        ("ipo", "ipo", 0),
        ("hinge", "hinge", 0),
        ("robust", "robust", 0.2),
        ("normalised", "sigmoid_norm", 0),
    ],
)
def test_dpo_has_the_numbers_of_trl(form, theirs, noise, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from word_tables import word_tokenizer

    tuned, batch = moved(), batch_of()
    rows = []
    for line in range(2):
        ids = [batch.inputs["input_ids"][k][batch.inputs["attention_mask"][k] > 0].tolist() for k in (line, line + 2)]
        rows.append({"prompt_ids": ids[0][:3], "chosen_ids": ids[0][3:], "rejected_ids": ids[1][3:]})
    args = trl.DPOConfig(
        str(tmp_path), beta=0.3, loss_type=[theirs], label_smoothing=noise, report_to=[], use_cpu=True, bf16=False,
        per_device_train_batch_size=2, max_steps=1,
    )  # fmt: skip
    base = tiny("llama", "lm").eval()
    plain = moved().model  # the policy; TRL holds a second model beside
    words = word_tokenizer("gpt")
    data = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
    trainer = trl.DPOTrainer(model=plain, ref_model=base, args=args, train_dataset=data, processing_class=words)
    plain.eval()
    inputs = trainer.data_collator(rows)
    loss = trainer._compute_loss(plain, inputs, return_outputs=False)
    ours = Objective(tuned, PAIRS, judge=DPO(beta=0.3, form=form, noise=noise))(batch)
    assert ours.loss.item() / 2 == pytest.approx(loss.item(), abs=1e-4)
    metrics = trainer._metrics["eval"]
    if form in ("sigmoid", "hinge", "robust"):
        assert ours.logits[:, 0].mean().item() == pytest.approx(metrics["rewards/chosen"][-1], abs=1e-4)
        margins = ours.logits[:, 0] - ours.logits[:, 1]
        assert margins.mean().item() == pytest.approx(metrics["rewards/margins"][-1], abs=1e-4)
    loss.backward()
    ours.loss.div(2).backward()
    theirs_by_name = dict(plain.named_parameters())
    for name, p in tuned.model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, theirs_by_name[name].grad, rtol=1e-3, atol=1e-5)
