"""Strategies that learn from answers of their own: writing, rewards, what is kept, and the losses of GRPO and RLOO."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from in_memory import Runs, alike
from little import Heard, little_data, little_spec
from rollout_runs import TINY, WIDE, spec_of, view_of
from tiny import tiny
from transformers import GenerationConfig

from luthier.core import ConfigError, DataError, IntegrityError, ModelError, NothingTrains, UnknownName
from luthier.data.batches import Batch
from luthier.data.examples import IGNORED
from luthier.runs.spec import BatchSpec, DataSpec, OptimSpec
from luthier.strategies.rollouts import _engine
from luthier.strategies.rollouts._answers import Lines, in_lines
from luthier.strategies.rollouts._rewards import Asked, Rewards, parts_of, rewards_of
from luthier.surgery import attach
from luthier.training import STRATEGIES
from luthier.training.answers import token_log_chances
from luthier.workflow import evaluate, predict, resume, train
from luthier.workflow.resume_proof import run_digests

torch.set_num_threads(1)
GRPO, RLOO = STRATEGIES.get("grpo"), STRATEGIES.get("rloo")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("rollouts"))


def moved(by=0.3, seed=3):
    """A plain tiny model away from its start."""
    model = tiny("llama", "lm").eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=draw) * by * p.std())
    return model


def four_answers():
    """Two answers to each of two prompts of three tokens, as a batch and as TRL has them."""
    draw = torch.Generator().manual_seed(5)
    prompts = torch.randint(5, 60, (2, 3), generator=draw).repeat_interleave(2, 0)
    sizes, width = [4, 2, 3, 4], 4
    answers = torch.randint(5, 60, (4, width), generator=draw)
    mask = (torch.arange(width) < torch.tensor(sizes)[:, None]).long()
    ids = torch.cat([prompts, answers * mask], 1)
    labels = torch.cat([torch.full((4, 3), IGNORED), answers.masked_fill(mask == 0, IGNORED)], 1)
    both = torch.cat([torch.ones(4, 3, dtype=torch.long), mask], 1)
    batch = Batch(
        inputs={"input_ids": ids, "attention_mask": both}, labels=labels, rows=np.arange(4), n_targets=4,
        n_tokens=int(both.sum()),
    )  # fmt: skip
    trl = {"prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts), "completion_ids": answers * mask}
    return batch, {**trl, "completion_mask": mask}, sizes


# --- the losses


def trainer_of(kind, tmp_path, model, beta, **options):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from word_tables import word_tokenizer

    cls, config = (trl.GRPOTrainer, trl.GRPOConfig) if kind == "grpo" else (trl.RLOOTrainer, trl.RLOOConfig)
    args = config(
        str(tmp_path), report_to=[], use_cpu=True, bf16=False, per_device_train_batch_size=4, num_generations=2,
        max_completion_length=4, max_steps=1, activation_checkpointing=False, beta=0.0, **options,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": "how far"}] * 4)
    rewards = iter([[1.0, 0.25, 0.5, 0.5]])
    trainer = cls(
        model=model, reward_funcs=lambda **given: next(rewards), args=args, train_dataset=data,
        processing_class=word_tokenizer("gpt"),
    )  # fmt: skip
    trainer.beta = beta  # set now: a model of the hub would be loaded as reference
    return trainer


@pytest.mark.parametrize(
    ("per", "loss_type", "beta", "high"),
    [("answer", "grpo", 0.3, 0.0), ("token", "dapo", 0.0, 0.4), ("fixed", "dr_grpo", 0.1, 0.0)],
)
def test_grpo_has_the_numbers_and_gradients_of_trl(per, loss_type, beta, high, tmp_path):
    plain = moved()
    batch, theirs, _ = four_answers()
    draw = torch.Generator().manual_seed(1)
    tuned = attach(moved(), "full")
    tuned.model.eval()
    one = GRPO(reward="length", samples=2, new_tokens=4, per=per, beta=beta, epsilon_high=high)
    advantage = one.advantages(torch.tensor([[1.0, 0.25], [0.5, 0.5]])).view(-1)
    chance = in_lines(*token_log_chances(tuned, batch, chunked=True), 4)
    apart = [chance.detach() + 0.3 * torch.randn(chance.shape, generator=draw) for _ in range(2)]
    mask = theirs["completion_mask"].float()
    old, base = (t * mask for t in apart)
    lines = Lines(chance=chance, mask=mask, first=False, held={"old": old, "base": base, "advantage": advantage})
    loss = one.losses(None, lines).sum() / one.counts(mask).sum()
    trainer = trainer_of(
        "grpo",
        tmp_path,
        plain,
        beta,
        loss_type=loss_type,
        use_bias_correction_kl=False,
        epsilon_high=high or None,
        temperature=1.0,
    )
    inputs = {**theirs, "old_per_token_logps": old, "ref_per_token_logps": base, "advantages": advantage}
    wanted = trainer._compute_loss(plain, {**inputs, "num_items_in_batch": mask.sum()})
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-4)
    loss.backward()
    wanted.backward()
    by_name = dict(plain.named_parameters())
    compared = 0
    for name, p in tuned.model.named_parameters():
        if p.grad is not None and p.grad.abs().max() > 1e-4:
            torch.testing.assert_close(p.grad, by_name[name].grad, rtol=2e-3, atol=1e-5)
            compared += 1
    assert compared > 10


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_advantages_are_those_of_trl(kind, tmp_path):
    """The trainer's own scoring of the same answers, the divergence from its reference in it."""
    plain = moved()
    batch, theirs, sizes = four_answers()
    trainer = trainer_of(kind, tmp_path, plain, 0.3, temperature=1.0)
    trainer.ref_model = tiny("llama", "lm").eval()
    prompts = theirs["prompt_ids"].tolist()
    answers = [line[:n] for line, n in zip(theirs["completion_ids"].tolist(), sizes, strict=True)]
    made = (prompts, answers, ["x"] * 4)
    if kind == "grpo":
        made = (prompts, answers, None, ["x"] * 4, None, {}, None, None)
    trainer._generate = lambda asked: made

    def chances(model, ids, mask, keep, *args, **more):
        logits = model(input_ids=ids, attention_mask=mask).logits[:, -keep - 1 : -1]
        return logits.log_softmax(-1).gather(2, ids[:, -keep:, None])[..., 0], None, None

    trainer._get_per_token_logps_and_entropies = chances
    trainer.model.eval()
    found = trainer._generate_and_score_completions([{"prompt": "how far"}] * 4)
    rewards = torch.tensor([1.0, 0.25, 0.5, 0.5])
    if kind == "grpo":
        ours = GRPO(reward="length", samples=2).worth(None, {"reward": rewards})["advantage"]
    else:
        held = {"reward": rewards}
        for name, model in (("old", plain), ("base", trainer.ref_model)):
            with torch.no_grad():
                tuned = SimpleNamespace(model=model)
                held[name] = in_lines(*token_log_chances(tuned, batch, chunked=False), 4)
        ours = RLOO(reward="length", samples=2, beta=0.3).worth(None, held)["advantage"]
    assert ours.abs().max() > 0.1
    torch.testing.assert_close(ours, found["advantages"], rtol=1e-4, atol=1e-4)


def test_rloo_has_the_loss_of_trl(tmp_path):
    plain = moved()
    batch, theirs, _ = four_answers()
    tuned = attach(moved(), "full")
    tuned.model.eval()
    one, mask = RLOO(reward="length", samples=2), theirs["completion_mask"].float()
    chance = in_lines(*token_log_chances(tuned, batch, chunked=True), 4)
    old = chance.detach() + 0.1 * torch.randn(chance.shape, generator=torch.Generator().manual_seed(1)) * mask
    advantage = torch.tensor([1.0, -1.0, 0.4, -0.4])
    loss = one.losses(None, Lines(chance=chance, mask=mask, first=False, held={"old": old, "advantage": advantage}))
    trainer = trainer_of("rloo", tmp_path, plain, 0.3, temperature=1.0)
    wanted = trainer._compute_loss(plain, {**theirs, "old_logps": (old * mask).sum(1), "advantages": advantage})
    assert loss.mean().item() == pytest.approx(wanted.item(), abs=1e-4)


@pytest.mark.acid("grpo", 1, 2)
@pytest.mark.parametrize("cls", [GRPO, RLOO])
def test_advantages_of_a_group_add_up_to_nothing_and_equal_rewards_teach_nothing(cls):
    one = cls(reward="length", samples=3, beta=0.0)
    rewards = torch.tensor([[0.1, 0.1, 0.1], [0.3, 0.9, 0.0]])
    found = one.advantages(rewards)
    assert torch.equal(found[0], torch.zeros(3)) and found[1].abs().min() > 0.05
    assert found.sum(1).abs().max() < 1e-6
    chance = torch.randn(3, 4).requires_grad_()
    held = {"advantage": found[0], "old": chance.detach() - 0.5}
    one.losses(None, Lines(chance=chance, mask=torch.ones(3, 4), first=False, held=held)).sum().backward()
    assert torch.equal(chance.grad, torch.zeros(3, 4))


def test_a_policy_comes_to_the_optimum_of_reward_and_divergence():
    """Five arms, rewards and a base known: p ∝ p0 exp(r / β)."""
    base = torch.tensor([1.0, 0.0, -0.5, 0.5, -1.0]).log_softmax(0)
    rewards, beta = torch.tensor([0.0, 1.0, 0.5, 0.0, 0.8]), 0.5
    wanted = (base + rewards / beta).softmax(0)
    logits = base.clone().requires_grad_()
    one, draw = RLOO(reward="length", samples=400, beta=beta), torch.Generator().manual_seed(0)
    for _ in range(250):
        now = logits.log_softmax(0)
        arms = torch.multinomial(now.detach().exp(), 400, replacement=True, generator=draw)
        held = {"reward": rewards[arms], "old": now.detach()[arms, None], "base": base[arms, None]}
        held |= one.worth(None, held)
        chance = now[arms][:, None]
        one.losses(None, Lines(chance=chance, mask=torch.ones_like(chance), held=held)).mean().backward()
        with torch.no_grad():
            logits -= 0.8 * logits.grad
            logits.grad = None
    got = logits.detach().softmax(0)
    assert 0.5 * float((got - wanted).abs().sum()) < 0.04 < 0.5 * float((base.exp() - wanted).abs().sum())


# --- answers


def test_the_chances_of_a_pass_are_those_of_the_writing_and_the_first_ratio_is_1(runs):
    for temperature in (1.0, 0.7):
        loop, one, course = view_of(runs, updates=2, temperature=temperature)
        held = course.memory.tensors
        for batch in one.batches(course, loop.feed.cut(0)):
            chosen = batch.marks[:, 0].long()
            with torch.no_grad():
                chance, _ = one._pass(course, batch, held["answer"].shape[1])
                logits = course.tuned.model(**batch.inputs).logits[:, :-1].float() / temperature
            torch.testing.assert_close(chance, held["old"][chosen], rtol=1e-5, atol=1e-5)
            told = batch.labels[:, 1:] != IGNORED
            by_hand = logits.log_softmax(-1)[told].gather(1, batch.labels[:, 1:][told][:, None])[:, 0]
            torch.testing.assert_close(chance[chance != 0], by_hand, rtol=1e-5, atol=1e-5)
            lines = Lines(chance=chance, mask=torch.ones_like(chance), held={"old": chance - 1})
            assert torch.equal(lines.old, chance), "nothing has been learnt from them yet"
            assert torch.equal(dataclasses.replace(lines, first=False).old, chance - 1)


def test_an_answer_does_not_hang_on_its_neighbours_nor_samples_on_one_another(runs):
    _, one, course = view_of(runs)
    held = course.memory.tensors
    line = held["line"].numpy()
    prompts = _engine.prompts_of(course.examples(), line)
    together = one._write(course, line, prompts)
    pick = np.flatnonzero(line == line[-1])
    assert [together[k] for k in pick] == one._write(course, line[pick], [prompts[k] for k in pick])
    assert len({tuple(together[k]) for k in pick}) > 1, "each sample has draws of its own"
    assert [held["answer"][k, : held["size"][k]].tolist() for k in range(len(line))] == together


def test_what_a_models_files_say_of_writing_changes_no_answer_that_is_learnt_from(runs):
    """A penalty of repetitions would draw from another distribution than the one whose chances are compared."""
    _, one, course = view_of(runs)
    held = course.memory.tensors
    line = held["line"].numpy()
    prompts, model = _engine.prompts_of(course.examples(), line), course.tuned.model
    plain = one._write(course, line, prompts)
    theirs = GenerationConfig(repetition_penalty=50.0, suppress_tokens=sorted({t for a in plain for t in a})[:9])
    before, model.generation_config = model.generation_config, theirs
    try:
        assert one._write(course, line, prompts) == plain
        assert model.generation_config is theirs, "it is as it was for whoever writes next"
    finally:
        model.generation_config = before


@pytest.mark.acid("grpo", 3)
def test_answers_that_reach_the_limit_are_as_others_or_unlearnt_or_less(runs):
    made = {cut: view_of(runs, cut=cut, cut_penalty=0.5) for cut in ("keep", "mask", "penalty")}
    for cut, (loop, one, course) in made.items():
        held = course.memory.tensors
        assert held["cut"].any(), "four tokens are few"
        last = held["answer"].gather(1, held["size"][:, None] - 1)[:, 0]
        ends = torch.tensor(_engine.ends_of(course))
        assert torch.equal(held["cut"] == 1, ~torch.isin(last, ends))
        mask = one._mask(held, torch.arange(len(held["cut"])))
        assert bool((mask[held["cut"] == 1] == 0).all()) == (cut == "mask")
        assert loop.moments.numbers()["grpo.cut"] == pytest.approx(float(held["cut"].mean()), abs=1e-5)
    keep, less = (made[cut][2].memory.tensors for cut in ("keep", "penalty"))
    torch.testing.assert_close(less["reward"], keep["reward"] - 0.5 * keep["cut"])
    _, one, course = made["mask"]
    held = {**course.memory.tensors, "cut": torch.ones(len(keep["cut"]))}
    assert "all answers reached 4 tokens" in one._nothing(held, torch.zeros(1)), "no step is made of nothing"


@pytest.mark.acid("grpo", 4)
def test_a_token_that_is_rewarded_becomes_likelier(runs, tmp_path):
    early = "def reward(prompt, answer, row):\n    return sum(word < 'm' for word in answer.split()) / 3\n"
    (tmp_path / "good.py").write_text(early)
    given = {"reward": str(tmp_path / "good.py"), "samples": 8, "new_tokens": 3, "beta": 0.01}
    loop = runs.loop(
        "grpo", "full", "llama-prompts-dry", values={f"grpo.{k}": v for k, v in given.items()}, batch=WIDE, steps=25,
        optim=OptimSpec(lr=3e-3),
    )  # fmt: skip
    loop.run_to()
    seen = [row["grpo.reward"] for row in loop.run.rows if row.get("event") == "step"]
    assert np.mean(seen[-5:]) > np.mean(seen[:5]) + 0.3, seen


def test_several_updates_learn_from_one_batch_of_answers(runs):
    loop, _, course = view_of(runs, updates=2)
    first = {n: t.clone() for n, t in course.memory.tensors.items()}
    assert loop.feed.rows(0).tolist() == loop.feed.rows(1).tolist() != loop.feed.rows(2).tolist()
    loop._train_step(0, loop.feed.cut(0))
    loop._train_step(1, loop.feed.cut(1))
    assert all(torch.equal(t, course.memory.tensors[n]) for n, t in first.items())
    loop._train_step(2, loop.feed.cut(2))
    assert not torch.equal(first["line"], course.memory.tensors["line"])


def test_memory_that_runs_out_while_writing_or_learning_changes_no_number(runs, monkeypatch):
    given = {"values": {f"grpo.{k}": v for k, v in TINY.items()}, "batch": WIDE, "steps": 2}
    whole = runs.after("grpo", "lora", "llama-prompts-dry", **given)
    calls = {"write": 0, "pass": 0}
    loop = runs.loop("grpo", "lora", "llama-prompts-dry", **given)
    write, look = loop.tuned.model.generate, _engine.token_log_chances

    def narrow(*args, input_ids, **more):
        if len(input_ids) > 3 and not calls["write"]:
            calls["write"] += 1
            raise MemoryError
        return write(*args, input_ids=input_ids, **more)

    def tight(tuned, batch, **more):
        if len(batch.rows) > 5 and calls["pass"] < 2:
            calls["pass"] += 1
            raise MemoryError
        return look(tuned, batch, **more)

    loop.tuned.model.generate = narrow
    monkeypatch.setattr(_engine, "token_log_chances", tight)
    loop.run_to()
    assert min(calls.values()) > 0 and alike(loop, whole, 2e-5)


# --- what is kept


def test_a_run_keeps_its_texts_and_a_killed_one_writes_the_same_file(tmp_path):
    heard = Heard()
    spec = spec_of(tmp_path, own={"updates": 2}, steps=5, out=str(tmp_path / "whole"))
    result = train(spec, listener=heard)
    assert set(result.scores) == {"reward", "base_reward", "answer_tokens"} and 0 < result.scores["answer_tokens"] <= 4
    kept = (tmp_path / "whole/rollouts.jsonl").read_bytes()
    lines = [json.loads(line) for line in kept.splitlines()]
    assert len(lines) == 3 * 4 * 3, "three batches of four prompts, three answers each"
    assert [line["step"] for line in lines[::12]] == [1, 3, 5] and [line["sample"] for line in lines[:4]] == [
        0,
        1,
        2,
        0,
    ]
    one = lines[0]
    assert one["reward"] == pytest.approx(max(0, 1 - abs(len(one["answer"].split()) - 3) / 3), abs=1e-6)
    steps = [json.loads(e) for e in (tmp_path / "whole/events.jsonl").read_text().splitlines()]
    steps = [e for e in steps if e["event"] == "step"]
    assert steps[0]["grpo.reward"] == pytest.approx(np.mean([line["reward"] for line in lines[:12]]), abs=1e-5)
    assert "of its answers, rewarded" in heard.text and "answers reached 4 tokens and were cut" in heard.text

    train(dataclasses.replace(spec, out=str(tmp_path / "stopped")), stop_at=3)  # between two steps of one batch
    with (tmp_path / "stopped/rollouts.jsonl").open("ab") as file:  # written after the checkpoint, then killed
        file.write(kept[: 5 * len(kept) // 12] + b'{"step": 4, "torn')
    resume(tmp_path / "stopped")
    assert run_digests(tmp_path / "stopped") == run_digests(tmp_path / "whole")
    assert (tmp_path / "stopped/rollouts.jsonl").read_bytes() == kept
    found = evaluate(tmp_path / "whole", str(tmp_path / "turns.csv"))
    assert set(found.scores) == set(result.scores)
    assert isinstance(predict(tmp_path / "whole", texts=["the moon is good"])[0]["text"], str)


def test_a_run_that_learnt_rewards_gives_them_and_shares_the_base(tmp_path):
    pairs = little_data(tmp_path / "pairs.csv", kind="pairs")
    judge = little_spec(
        tmp_path, kind="llama", data=DataSpec(source=str(pairs)), strategy="reward_model", steps=3,
        batch=BatchSpec(size=8, tokens=128), out=str(tmp_path / "rm"),
    )  # fmt: skip
    train(judge)
    heard = Heard()
    spec = spec_of(tmp_path, own={"reward": f"{tmp_path / 'rm'}+0.5*length"}, steps=2, out=str(tmp_path / "run"))
    train(spec, listener=heard, stop_at=1)
    line = json.loads((tmp_path / "run/rollouts.jsonl").read_text().splitlines()[0])
    prompt, answer = line["prompt"], line["answer"]
    rows = {row["prompt"]: row for row in _csv(tmp_path / "turns.csv")}
    prompt = next(p for p in rows if p in prompt)
    (tmp_path / "asked.jsonl").write_text(json.dumps({"prompt": prompt, "chosen": answer or " "}) + "\n")
    alone = predict(tmp_path / "rm", data=str(tmp_path / "asked.jsonl"))[0]["value"]
    assert line["rewards"][str(tmp_path / "rm")] == pytest.approx(alone, abs=1e-4)
    assert line["reward"] == pytest.approx(alone + 0.5 * line["rewards"]["length"], abs=1e-4)
    shares = float(heard.text.partition("shares ")[2].split()[0])
    assert shares > 0, heard.text
    shutil.rmtree(tmp_path / "rm")
    train(dataclasses.replace(judge, seed=5))
    with pytest.raises(IntegrityError, match=r"model changed since the run began .*grpo\..*/rm"):
        resume(tmp_path / "run")


def _csv(path):
    import csv

    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# --- rewards


def asked(answer, right=None):
    return Asked(prompt="p", answer=answer, row={}, place="rows.csv:2", right=right)


@pytest.mark.parametrize(
    ("name", "answer", "right", "wanted"),
    [
        ("length", "one two three four five", None, 0.5), ("length", "a b c d e f g h i j", None, 1.0),
        ("length", "a " * 30, None, 0.0), ("regex", "it is 42, sir", None, 1.0), ("regex", "it is", None, 0.0),
        ("format", " 42 ", None, 1.0), ("format", "it is 42", None, 0.0), 
        ("exact_match", "The  Moon.", "the moon", 1.0),
        ("exact_match", "the moon is", "the moon", 0.0), ("contains", "it is the Moon", "moon", 1.0),
        ("numeric", "3 + 4 = 7.0", "7", 1.0), ("numeric", "3 + 4 = 8", "7", 0.0), ("numeric", "1,200", "1200", 1.0),
        ("numeric", "seven", "7", 0.0), ("numeric", "it is 0.500", "0.5", 1.0), ("numeric", "0.125", "125", 0.0),
        ("numeric", "1.234,5", "1234.5", 1.0), ("numeric", "1,2,3", "3", 0.0), ("numeric", "1,2.3,4", "4", 0.0),
    ],
)  # fmt: skip
def test_rewards_by_name(name, answer, right, wanted):
    rewards = rewards_of(name, 10, r"\d+", 5.0)
    ((value,),) = rewards([asked(answer, right)], None)
    assert value == pytest.approx(wanted)


def test_a_reward_that_fails_is_named_with_its_row_and_answer(tmp_path):
    (tmp_path / "bad.py").write_text(
        "import time\n\ndef fails(p, a, row):\n    raise KeyError('x')\n\n"
        "def nothing(p, a, row):\n    return float('nan')\n"
        "\ndef hangs(p, a, row):\n    while True: time.sleep(0.01)\n\ndef text(p, a, row):\n    return 'good'\n"
    )

    def says(name, words, pattern="x"):
        rewards = Rewards(parts=parts_of(name), words=1, pattern=pattern, seconds=0.2)
        with pytest.raises(DataError, match=rf"rows\.csv:2.*'aaaa.*{words}"):
            rewards([asked("a" * 40)], None)

    for name, words in (
        ("fails", "KeyError"),
        ("nothing", "nan, no finite"),
        ("hangs", "longer than 0.2"),
        ("text", "ValueError"),
    ):
        says(f"{tmp_path / 'bad.py'}:{name}", words)
    says("regex", "longer than 0.2", pattern=r"(a+)+b")  # which backtracks for ever


def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path):
    def refused(error, words, **changes):
        with pytest.raises(error, match=words):
            train(spec_of(tmp_path, out=str(tmp_path / "run"), **changes))
        assert not (tmp_path / "run").exists()

    (tmp_path / "odd.py").write_text("import nothing_such\n")
    (tmp_path / "rows.csv").write_text("prompt\n" + "".join(f"how far is {w}\n" for w in "abcdefgh"))
    alone = DataSpec(source=str(tmp_path / "rows.csv"))
    refused(ConfigError, "no reward is named.*my_reward.py", own={"reward": ""})
    refused(UnknownName, "no reward is called 'lenght'.*length", own={"reward": "lenght"})
    refused(ConfigError, "has no number before its", own={"reward": "x*length"})
    refused(ConfigError, "names a reward twice", own={"reward": "length+0.5*length"})
    refused(ConfigError, "wants a pattern", own={"reward": "format"})
    refused(ConfigError, r"is no pattern: .*Python's re", own={"reward": "format", "pattern": "("})
    refused(ConfigError, "only regex and format read it", own={"pattern": "x"})
    refused(ConfigError, "two are needed", own={"samples": 1})
    refused(ConfigError, "there is no file", own={"reward": str(tmp_path / "none.py")})
    refused(ConfigError, "cannot be run .ModuleNotFoundError", own={"reward": str(tmp_path / "odd.py")})
    refused(ConfigError, "no column for it.*--response", own={"reward": "exact_match"}, data=alone)
    refused(ConfigError, "new_tokens is 64, but the model has 64 positions", own={"new_tokens": 64})
    refused(DataError, r"the prompt has \d+ tokens, only 14 fit", own={"new_tokens": 50})
    refused(ModelError, "prompts needs a decoder", model=str(spec_model(tmp_path)))
    with pytest.raises(ConfigError, match=r"task prompts: the rows say nothing to learn.*--strategy grpo"):
        train(dataclasses.replace(little_spec(tmp_path, kind="llama"), task="prompts", out=str(tmp_path / "run")))


def spec_model(home):
    from little import little_model

    return little_model(home / "bert", "bert")


def test_rewards_that_never_differ_are_no_result(tmp_path):
    (tmp_path / "same.py").write_text("def reward(prompt, answer, row):\n    return 0.25\n")
    with pytest.raises(NothingTrains, match=r"No result.*got one reward, such as 0\.25.*raise new_tokens"):
        train(spec_of(tmp_path, own={"reward": str(tmp_path / "same.py")}, out=str(tmp_path / "run")))
    steps = [json.loads(e) for e in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    steps = [e for e in steps if e["event"] == "step"]
    assert len(steps) == 4 and all(e["grpo.constant"] == 1 and "got one reward" in e["skipped"] for e in steps)
