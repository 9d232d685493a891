"""A mixture of soft prompts: the acid tests of its paper."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from methods.test_warp import scores_of
from workflow.test_cloze import asking

from luthier import train as run
from luthier.core import CompositionError, ConfigError
from luthier.methods.additive.soft_prompt_mixture import Deviations, Prompts, responsibilities
from luthier.surgery import attach
from luthier.training.objective import Objective
from luthier.workflow import resume
from luthier.workflow.load_model import collator_of, load_model
from luthier.workflow.prediction import Predictor
from luthier.workflow.preparation import prepare
from luthier.workflow.resume_proof import run_digests

SOFT = {"encoder": "{text} {soft:3} {mask} .", "decoder": "{text} {soft:3} {mask}", "both": "{text} {soft:3} {mask} ."}
HARD = ("! it is", "moon sun red")


def mixing(home, kind="encoder", **changes):
    settings = {"prompts": HARD, "mixture": 2, **changes.pop("settings", {})}
    data = {"template": SOFT[kind], **changes.pop("data", {})}
    return asking(home, kind, method="soft_prompt_mixture", data=data, settings=settings, **changes)


def tuned_on(home, **changes):
    """The method on a model of words, one batch of it, and the objective."""
    made = prepare(mixing(home, **changes))
    model, fresh = load_model(made.source, made.task, dtype=torch.float32, device=torch.device("cpu"), seed=0)
    model.config.pad_token_id = made.pad_id
    tuned = attach(model, made.method, new_tensors=fresh)
    model.eval()
    collator = collator_of(made.task, model, made.tokenizer, pad_id=made.pad_id, pad_to=1, seed=0)
    return tuned, collator(made.train, np.arange(9)), Objective(tuned, made.task, full_logits=True)


@pytest.mark.acid("soft_prompt_mixture", 1)
@pytest.mark.parametrize("kind", SOFT)
def test_without_deviations_each_prompt_is_the_written_one(kind, tmp_path):
    rows = slice(0, 6)
    for number, words in enumerate(HARD):
        one = mixing(tmp_path, kind, settings={"prompts": (words,), "mixture": 1})
        template = SOFT[kind].replace("{soft:3}", words)
        written = asking(tmp_path, kind, method="lora", data={"template": template})
        hard = torch.log_softmax(scores_of(prepare(written), rows), -1)
        torch.testing.assert_close(scores_of(prepare(one), rows), hard, rtol=1e-4, atol=1e-5, msg=str(number))


@pytest.mark.acid("soft_prompt_mixture", 2)
def test_the_mixture_is_of_probabilities_and_sums_to_one(tmp_path):
    tuned, batch, objective = tuned_on(tmp_path)
    (prompts,) = tuned.modules(Prompts).values()
    prompts.shares.copy_(torch.tensor([0.3, 0.7]))
    with torch.no_grad():
        for parameter in tuned.trained().values():
            parameter.add_(2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        found = objective(batch).logits
        each = [_one(objective, prompts, batch, t) for t in range(2)]
    assert not torch.allclose(each[0], each[1], atol=1e-3)
    by_hand = torch.logsumexp(torch.stack(each) + torch.tensor([0.3, 0.7]).log()[:, None, None], 0)
    torch.testing.assert_close(found, by_hand)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(len(found)))


@pytest.mark.acid("soft_prompt_mixture", 3)
def test_shares_of_a_row_sum_to_one_and_new_shares_of_prompts_never_lower_the_likelihood(tmp_path):
    generator = torch.Generator().manual_seed(0)
    log_p, labels = torch.log_softmax(torch.randn(3, 40, 4, generator=generator), -1), torch.arange(40) % 4
    shares, before = torch.tensor([0.6, 0.3, 0.1]), -torch.inf
    for _ in range(20):
        joint = log_p + shares.log()[:, None, None]
        likelihood = float(torch.logsumexp(joint[:, torch.arange(40), labels], 0).sum())
        assert likelihood >= before - 1e-4
        before, rho = likelihood, responsibilities(joint, labels)
        torch.testing.assert_close(rho.sum(0), torch.ones(40))
        shares = rho.sum(1) / rho.sum()
    # And the method does just that, with the rows of the steps between.
    tuned, batch, objective = tuned_on(tmp_path)
    (prompts,) = tuned.modules(Prompts).values()
    method = tuned.tuning().method
    prompts.shares.copy_(torch.tensor([0.2, 0.8]))
    method.before_step(tuned, 1, 10)
    with torch.no_grad():
        method.loss(tuned, lambda: objective(batch))
        scores = torch.stack([_one(objective, prompts, batch, t) for t in range(2)])
        method.on_step(tuned, 1, 10)
    rho = responsibilities(scores + torch.tensor([0.2, 0.8]).log()[:, None, None], batch.labels).sum(1)
    torch.testing.assert_close(prompts.shares, rho / rho.sum())


def _one(objective, prompts, batch, number):
    prompts.now = number
    found = torch.log_softmax(objective.gap._of_one_pass(batch), -1)
    prompts.now = 0
    return found


@pytest.mark.acid("soft_prompt_mixture", 4)
def test_slots_and_other_tokens_have_no_deviation(tmp_path):
    tuned, batch, _ = tuned_on(tmp_path)
    d = tuned.anatomy.d
    assert tuned.n_trained() == 2 * (3 + 1) * 3 * d, "two prompts of three words, at the embedding and behind 3 layers"
    embedding = tuned.model.get_input_embeddings()
    (prompts,) = tuned.modules(Prompts).values()
    ids = batch.inputs["input_ids"]
    soft = ids >= embedding.weight.shape[0]
    assert soft.sum() == 3 * len(ids)
    tuned.model(**batch.inputs)
    embedded = embedding(ids)
    embedded[~soft].sum().backward()
    assert prompts.deltas.grad is None or not prompts.deltas.grad.any()
    seen = {}
    site = tuned.modules(Deviations)["block_out@1"]
    torch.nn.init.ones_(site.deltas)
    y = torch.zeros(*ids.shape, d)
    with torch.no_grad():
        prompts.after(ids, torch.zeros(*ids.shape, d))
        seen = site.after(None, y)
    assert (seen[soft] == 1).all() and not seen[~soft].any()


def test_at_its_defaults_an_encoder_learns_although_nothing_reads_the_words_behind_its_last_block(tmp_path):
    tuned = run(mixing(tmp_path, "encoder", steps=4, settings={"prompts": (), "mixture": 2})).tuned
    moved = {key: bool(m.deltas.any()) for key, m in tuned.modules(Deviations).items()}
    assert moved == {"block_out@0": True, "block_out@1": True, "block_out@2": False}


def test_it_learns_resumes_to_the_bit_and_answers_as_it_scored(tmp_path):
    spec = mixing(tmp_path, "decoder", steps=24, settings={"prompts": (), "mixture": 3, "updates": 4, "l2": 1e-4})
    spec = dataclasses.replace(spec, optim=dataclasses.replace(spec.optim, lr=0.03))
    whole = run(spec)
    (prompts,) = whole.tuned.modules(Prompts).values()
    assert float(prompts.shares.std()) > 1e-3 and float(prompts.shares.sum()) == pytest.approx(1)
    run(dataclasses.replace(spec, out=str(tmp_path / "stopped")), stop_at=9)
    resume(tmp_path / "stopped")
    assert run_digests(tmp_path / "stopped") == run_digests(whole.path)
    asked = Predictor(whole.path)
    answer = asked.texts(["moon sun good"])[0]
    assert sum(answer["probabilities"].values()) == pytest.approx(1)
    asked.tuned.add("lora", name="other")
    asked.tuned.activate("default")
    with pytest.raises(CompositionError, match="mixes the answers of several passes"):
        asked.tuned.rows(["default", "other"]).__enter__()


@pytest.mark.parametrize("kind", SOFT)
def test_several_mixtures_answer_each_its_own_rows_of_one_batch(kind, tmp_path):
    """Of three prompts, of two and of one; in the same rows they are refused, and beside a base without their words."""
    tuned, batch, objective = tuned_on(tmp_path, kind=kind, settings={"prompts": (), "mixture": 3})
    generator, names = torch.Generator().manual_seed(0), ("default", "other", "third")
    for number, name in enumerate(names):
        if number:
            settings = dataclasses.replace(tuned.tuning("default").method, mixture=3 - number)
            tuned.add(settings, name=name, seed=number)
        tuned.activate(name)
        for parameter in tuned.trained(name).values():
            parameter.data.add_(2 * torch.randn(parameter.shape, generator=generator))
        (prompts,) = (m for m in tuned.tuning(name).modules() if isinstance(m, Prompts))
        prompts.shares.copy_(torch.softmax(torch.randn(3 - number, generator=generator), 0))
    alone = {}
    with torch.no_grad():
        for name in names:
            tuned.activate(name)
            alone[name] = objective(batch).logits
    apart = [float((alone[a] - alone[b]).abs().max()) for a, b in itertools.combinations(names, 2)]
    assert min(apart) > 2e-4, apart
    of_rows = [names[i % 3] for i in (0, 1, 2, 1, 1, 0, 2, 0, 1)]
    tuned.activate("third")
    with tuned.rows(of_rows):
        together = objective(batch).logits
    torch.testing.assert_close(
        together, torch.stack([alone[n][i] for i, n in enumerate(of_rows)]), rtol=1e-4, atol=1e-4
    )
    with tuned.rows(["other"] * 9):
        torch.testing.assert_close(objective(batch).logits, alone["other"], rtol=0, atol=1e-5)
    with pytest.raises(CompositionError, match="mixes the answers of several passes"):
        tuned.rows(["other"] * 8 + [None]).__enter__()
    tuned.activate("default", "other")
    with pytest.raises(
        CompositionError, match="'default' and 'other' each mix the answers of several passes, and would act"
    ):
        objective(batch)


def test_a_prompt_of_another_length_than_the_template_has_room_for_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="'moon' is 1 tokens, and the template has 3"):
        prepare(mixing(tmp_path, settings={"prompts": ("moon",)}))
    with pytest.raises(ConfigError, match="there is no word to train"):
        prepare(mixing(tmp_path, data={"template": "{text} {mask}"}, settings={"prompts": ()}))
