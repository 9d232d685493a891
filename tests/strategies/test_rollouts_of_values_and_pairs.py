"""PPO, Nash-MD and best of n: against what is written out by hand, and games whose best play is known."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from in_memory import Runs
from little import Heard
from rollout_runs import spec_of, view_of

from luthier.core import ConfigError, DataError, NothingTrains
from luthier.strategies.rollouts._answers import Lines, prompts_of
from luthier.strategies.rollouts.nash_md import Mixture
from luthier.strategies.rollouts.ppo import advantages, whitened
from luthier.training import STRATEGIES
from luthier.training.answers import Answer
from luthier.workflow import evaluate, resume, train
from luthier.workflow.resume_proof import run_digests

torch.set_num_threads(1)
PPO, Nash, Best, DPO = (STRATEGIES.get(name) for name in ("ppo", "nash_md", "rejection_sft", "dpo"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("rollouts"))


# --- ppo


@pytest.mark.acid("ppo", 2, 3)
def test_advantages_are_those_worked_by_hand_and_equal_ones_whiten_to_nothing():
    rewards, values = torch.tensor([[0.1, -0.2, 1.0, 9.0]]), torch.tensor([[0.3, 0.5, -0.1, 9.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    gamma, lam = 0.9, 0.8
    d3 = 1.0 - -0.1
    d2 = -0.2 + gamma * -0.1 - 0.5
    d1 = 0.1 + gamma * 0.5 - 0.3
    wanted = [d1 + gamma * lam * (d2 + gamma * lam * d3), d2 + gamma * lam * d3, d3, 0.0]
    torch.testing.assert_close(advantages(rewards, values, mask, gamma, lam)[0], torch.tensor(wanted))
    whole = advantages(rewards, values, mask, gamma, 1.0)[0]
    monte_carlo = torch.tensor([0.1 + gamma * (-0.2 + gamma * 1.0), -0.2 + gamma, 1.0]) - values[0, :3]
    torch.testing.assert_close(whole[:3], monte_carlo)
    assert torch.equal(whitened(torch.full((2, 3), 0.7), torch.ones(2, 3)), torch.zeros(2, 3))
    made = whitened(torch.tensor([[1.0, 2.0, 99.0]]), torch.tensor([[1.0, 1.0, 0.0]]))
    assert made[0, 2] == 0 and abs(float(made.sum())) < 1e-5 and float(made[0, 1]) == pytest.approx(1, abs=1e-4)


@pytest.mark.acid("ppo", 1, 4, 7)
def test_the_loss_of_ppo_is_its_formula_and_counts_no_token_behind_the_end(runs):
    loop, one, course = view_of(runs, "ppo", updates=2, beta=0.3)
    held = course.memory.tensors
    (batch,) = one.batches(course, loop.feed.cut(0))
    with torch.no_grad():
        chance, values = one._pass(course, batch, held["answer"].shape[1])
    chosen = batch.marks[:, 0].long()
    torch.testing.assert_close(chance, held["old"][chosen], rtol=1e-5, atol=1e-5)
    assert torch.equal(values, torch.zeros_like(values)), "the head begins at nothing"
    mask = one._mask(held, chosen)
    assert batch.n_targets == int(mask.sum()) and (mask.sum(1) == held["size"][chosen]).all()
    first = Lines(chance=chance, values=values, mask=mask, held={n: t[chosen] for n, t in held.items()})
    ratio = (first.chance - first.old).exp()
    assert torch.equal(ratio, torch.ones_like(ratio))
    draw = torch.Generator().manual_seed(0)
    old = chance + 0.3 * torch.randn(chance.shape, generator=draw)
    later = dataclasses.replace(
        first, first=False, values=0.5 * torch.randn(chance.shape, generator=draw), held={**first.held, "old": old}
    )
    got = one.losses(course, later)
    wanted = torch.zeros(len(got))
    for k in range(len(got)):
        for t in range(int(mask[k].sum())):
            a, v, goal = (float(later.held[n][k, t]) for n in ("advantage", "value", "goal"))
            rho, new = float((chance - old)[k, t].exp()), float(later.values[k, t])
            near = v + max(-0.2, min(0.2, new - v))
            wanted[k] += max(-a * rho, -a * max(0.8, min(1.2, rho))) + 0.05 * max((new - goal) ** 2, (near - goal) ** 2)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    junk = dataclasses.replace(later, chance=torch.where(mask == 1, chance, chance + 50.0))
    torch.testing.assert_close(one.losses(course, junk), got)


def test_the_reward_stands_at_the_last_token_and_the_divergence_at_each(runs):
    _, one, course = view_of(runs, "ppo", updates=2, beta=0.3, gamma=1.0, lam=1.0)
    held = dict(course.memory.tensors)
    held["base"] = held["old"] - 0.1 * (held["old"] != 0)
    goal = one.worth(course, held)["goal"]
    for k, n in enumerate(held["size"].tolist()):
        left = torch.arange(n, 0, -1) * -0.3 * 0.1 + held["reward"][k]
        torch.testing.assert_close(goal[k, :n], left, rtol=1e-4, atol=1e-5)
        assert (goal[k, n:] == 0).all()


def bandit(one, beta_base, steps, lr, seed=0):
    """A policy over four arms that learns by PPO; its end."""
    base = torch.tensor([1.0, 0.0, -0.5, 0.2]).log_softmax(0)
    rewards = torch.tensor([0.0, 0.3, 1.0, 0.1])
    logits, value = base.clone().requires_grad_(), torch.zeros(1, requires_grad=True)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        now = logits.detach().log_softmax(0)
        arms = torch.multinomial(now.exp(), 256, replacement=True, generator=draw)
        old, mask = now[arms][:, None], torch.ones(256, 1)
        got = rewards[arms][:, None] - beta_base * (old - base[arms][:, None])
        values = value.detach().expand(256, 1)
        raw = advantages(got, values, mask, 1.0, 0.95)
        held = {"old": old, "value": values, "goal": raw + values, "advantage": whitened(raw, mask)}
        for turn in range(one.updates):
            chance = logits.log_softmax(0)[arms][:, None]
            lines = Lines(chance=chance, values=value.expand(256, 1), mask=mask, held=held, first=turn == 0)
            one.losses(None, lines).mean().backward()
            with torch.no_grad():
                for p in (logits, value):
                    p -= lr * p.grad
                    p.grad = None
    return logits.detach().softmax(0), base.exp(), value.item()


@pytest.mark.acid("ppo", 5, 6)
def test_a_bandit_is_solved_and_an_endless_divergence_keeps_the_base():
    one = PPO(reward="length", updates=2, value_weight=1.0)
    end, _, value = bandit(one, 0.0, 150, 0.3)
    assert end.argmax() == 2 and end[2] > 0.9 and abs(value - 1.0) < 0.2, (end, value)
    end, base, _ = bandit(one, 1e4, 60, 0.3)
    assert 0.5 * float((end - base).abs().sum()) < 0.1, end


def test_beta_is_led_to_its_target_and_minibatches_part_the_answers(runs):
    loop, one, course = view_of(runs, "ppo", updates=2, minibatches=2, target=0.5)
    assert course.memory.facts["beta"] == pytest.approx(0.05 * (1 - 0.02)), "no divergence yet, so it may be more"
    rows = [loop.feed.rows(step).tolist() for step in range(4)]
    assert sorted(rows[0] + rows[1]) == sorted(rows[2] + rows[3]) and not set(rows[0]) & set(rows[1])
    assert sorted(set(course.memory.tensors["line"].tolist())) == sorted(rows[0] + rows[1])
    for step in range(2):
        (batch,) = one.batches(course, loop.feed.cut(step))
        assert sorted(set(batch.rows.tolist())) == sorted(rows[step])


# --- nash_md


@pytest.mark.acid("nash_md", 1)
@pytest.mark.parametrize("method", ["lora", "prefix_tuning"])
def test_the_mixture_is_policy_base_or_what_lies_between_token_by_token(runs, method):
    _, _, course = view_of(runs, "nash_md", method)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in course.weights().values():
            p.add_(0.3 * torch.randn(p.shape, generator=draw))
    model = course.tuned.model.eval()
    prompt = torch.tensor(prompts_of(course.examples(), np.array([0])))
    for share in (0.0, 0.3, 1.0):
        mixed = Mixture(course.tuned, share)
        ids = prompt
        for token in (5, 9, 17):  # the second call goes on from the first one's keys
            with torch.no_grad():
                own = model(ids).logits[:, -1].log_softmax(-1)
                with course.tuned.base_only():
                    base = model(ids).logits[:, -1].log_softmax(-1)
            assert not torch.allclose(own, base, atol=1e-2)
            got = mixed(ids, own).log_softmax(-1)
            torch.testing.assert_close(got, ((1 - share) * own + share * base).log_softmax(-1), rtol=1e-4, atol=1e-4)
            ids = torch.cat([ids, torch.tensor([[token]])], 1)


GAME = torch.tensor([[0.5, 1.0, 0.0], [0.0, 0.5, 1.0], [1.0, 0.0, 0.5]])  # rock, scissors, paper


def played(game, tau, mixture, steps, lr, start=(1.5, 0.0, -1.0), base=(0.0, 0.0, 0.0)):
    """The last policy over three answers, by exact gradients of the strategy's loss."""
    one = Nash(reward="length", tau=tau, mixture=mixture)
    logits, base = torch.tensor(start).requires_grad_(), torch.tensor(base).log_softmax(0)
    for _ in range(steps):
        chance = logits.log_softmax(0)
        now = chance.detach()
        against = ((1 - mixture) * now + mixture * base).softmax(0)
        held = {"liked": game @ against, "base": base[:, None]}
        loss = one.losses(None, Lines(chance=chance[:, None], mask=torch.ones(3, 1), held=held))
        (loss * now.exp()).sum().backward()
        with torch.no_grad():
            logits -= lr * logits.grad
            logits.grad = None
    return logits.detach().softmax(0)


def exploitability(game, policy):
    return float((game @ policy).max()) - 0.5


@pytest.mark.acid("nash_md", 2)
def test_of_a_preference_that_goes_in_a_circle_the_mixed_answer_is_found_and_dpo_finds_none():
    for mixture in (0.0, 0.5):
        assert exploitability(GAME, played(GAME, 0.05, mixture, 1500, 0.5)) < 1e-3
    assert exploitability(GAME, played(GAME, 0.0, 0.0, 1500, 0.5)) > 0.1, "it goes round and round"
    base = torch.tensor([1.5, 0.0, -1.0]).log_softmax(0)
    logits, one = base.clone().requires_grad_(), DPO(beta=0.1)
    win, lose = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0])
    for _ in range(200):
        chance = logits.log_softmax(0)
        answers = [Answer(chance[side], torch.ones(3), base[side]) for side in (win, lose)]
        one.losses(*answers, torch.tensor([[1.0, 0.0]] * 3)).mean().backward()
        with torch.no_grad():
            logits -= 0.5 * logits.grad
            logits.grad = None
    end = logits.detach().softmax(0)
    torch.testing.assert_close(end, base.exp(), rtol=1e-3, atol=1e-3)  # no reward says what goes in a circle
    assert exploitability(GAME, end) > 0.25


@pytest.mark.acid("nash_md", 3, 4)
def test_where_rewards_tell_all_the_best_answer_wins_and_where_nothing_is_preferred_the_base_stays():
    worth = torch.tensor([0.0, 3.0, 1.0])
    bradley = torch.sigmoid(worth[:, None] - worth[None])
    end = played(bradley, 0.001, 0.125, 600, 1.0, start=(0.0, 0.0, 0.0))
    assert end.argmax() == 1 and end[1] > 0.9
    base = (0.8, 0.1, -0.4)
    end = played(torch.full((3, 3), 0.5), 0.05, 0.125, 300, 0.5, start=base, base=base)
    torch.testing.assert_close(end, torch.tensor(base).softmax(0), rtol=1e-4, atol=1e-5)


def test_a_judge_of_ones_own_is_asked_both_ways_and_names_what_is_wrong(tmp_path):
    (tmp_path / "judge.py").write_text(
        "def prefers(prompt, first, second, row):\n"
        "    return 0.8 if len(first) >= len(second) else 0.1\n\n"
        "def odd(prompt, first, second, row):\n    return 1.5\n"
    )
    own = {"reward": "", "judge": str(tmp_path / "judge.py")}
    result = train(spec_of(tmp_path, "nash_md", own=own, steps=2, out=str(tmp_path / "run")))
    lines = [json.loads(line) for line in (tmp_path / "run/rollouts.jsonl").read_text().splitlines()]
    likes = {round((a + 1 - b) / 2, 6) for a, b in ((0.8, 0.1), (0.1, 0.8), (0.8, 0.8))}
    assert {line["reward"] for line in lines} <= likes and len({line["reward"] for line in lines}) > 1
    assert result.scores["base_reward"] == 0.5 and 0.1 < result.scores["reward"] < 0.9
    assert evaluate(tmp_path / "run", str(tmp_path / "turns.csv")).scores["base_reward"] == 0.5
    with pytest.raises(DataError, match=r"it says 1\.5 and 1\.5, which are no chances"):
        train(spec_of(tmp_path, "nash_md", own={**own, "judge": f"{own['judge']}:odd"}, out=str(tmp_path / "odd")))

    def refused(words, **changes):
        with pytest.raises(ConfigError, match=words):
            train(spec_of(tmp_path, "nash_md", own={**own, **changes}, out=str(tmp_path / "no")))

    refused("both a judge and rewards", reward="length")
    refused("Name a file with a function", judge="someone")
    refused("there is no ratio here", updates=2)
    refused("has no function none", judge=f"{own['judge']}:none")


# --- rejection_sft


@pytest.mark.acid("rejection_sft", 1, 2, 3)
def test_the_best_is_kept_more_samples_find_better_ones_and_copies_count_once():
    draw = torch.Generator().manual_seed(0)
    reward = torch.rand(60 * 8, generator=draw)
    answer, size = torch.arange(480)[:, None], torch.ones(480, dtype=torch.long)
    means = []
    for n in (2, 4, 8):
        one = Best(reward="length", samples=n)
        some = reward.view(60, 8)[:, :n].reshape(-1)  # the same draws, and more of them
        kept = one.kept_of(some, answer[: len(some)], size)
        assert (kept.view(-1, n).sum(1) == 1).all()
        assert torch.equal(kept.view(-1, n).argmax(1), some.view(-1, n).argmax(1))
        means.append(float(some[kept == 1].mean()))
    assert means[0] < means[1] < means[2]
    one = Best(reward="length", samples=4, keep="passing", least=0.5)
    answer = torch.tensor([[7, 1], [7, 1], [7, 2], [8, 9], [1, 0], [2, 0], [3, 0], [4, 0]])
    size = torch.tensor([2, 2, 2, 2, 1, 1, 1, 1])
    found = one.kept_of(torch.tensor([0.6, 0.6, 0.9, 0.1, 0.0, 0.2, 0.3, 0.4]), answer, size)
    assert found.tolist() == [1, 0, 1, 0, 0, 0, 0, 0], "copies once, and none of a prompt that has none"
    held = {"reward": torch.tensor([0.1, 0.9, 0.4, 0.2]), "cut": torch.tensor([0.0, 1.0, 0.0, 0.0])}
    held |= {"answer": torch.arange(4)[:, None], "size": torch.ones(4, dtype=torch.long)}
    for cut, wanted in (("keep", [0, 1, 0, 0]), ("mask", [0, 0, 1, 0])):
        one = Best(reward="length", samples=4, cut=cut)
        assert one.worth(None, held)["kept"].tolist() == wanted, "the best that may be learnt"


@pytest.mark.acid("rejection_sft", 4)
def test_prompts_of_which_none_passes_are_dropped_and_counted_and_the_rest_is_learnt_as_text(runs, tmp_path):
    loop, one, course = view_of(runs, "rejection_sft", samples=4)
    held = course.memory.tensors
    dropped = (held["kept"].view(-1, 4).sum(1) == 0).float().mean()
    assert loop.moments.numbers()["rejection_sft.dropped"] == pytest.approx(float(dropped), abs=1e-5)
    batches = one.batches(course, loop.feed.cut(0))
    lines = np.concatenate([batch.marks[:, 0].numpy() for batch in batches]).astype(int)
    assert sorted(lines.tolist()) == torch.nonzero(held["kept"])[:, 0].tolist()
    (batch,) = batches
    logits = course.tuned.model.eval()(**batch.inputs).logits[:, :-1]
    plain = F.cross_entropy(logits.transpose(1, 2), batch.labels[:, 1:], reduction="sum")
    loop.moments._piece = None
    from luthier.training.course import Piece

    result = one.loss(course, Piece(batch=batch, index=0, n_targets=batch.n_targets), lambda: None)
    torch.testing.assert_close(result.loss, plain, rtol=1e-5, atol=1e-4)
    own = {"keep": "passing", "least": 5.0}
    with pytest.raises(NothingTrains, match=r"No result.*no answer to any prompt got a reward of 5; the best got"):
        train(spec_of(tmp_path, "rejection_sft", own=own, out=str(tmp_path / "run")))


def test_a_killed_run_goes_on_to_the_bit_with_the_same_ledger(tmp_path):
    heard = Heard()
    spec = spec_of(tmp_path, "ppo", own={"updates": 2}, steps=3, out=str(tmp_path / "whole"))
    train(spec, listener=heard)
    train(dataclasses.replace(spec, out=str(tmp_path / "stopped")), stop_at=1)
    resume(tmp_path / "stopped")
    assert run_digests(tmp_path / "stopped") == run_digests(tmp_path / "whole")
    files = [(tmp_path / which / "rollouts.jsonl").read_bytes() for which in ("whole", "stopped")]
    assert files[0] == files[1] and files[0]
    assert "of its answers, rewarded" in heard.text
