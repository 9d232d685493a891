"""Laplace-LoRA: its own tests, beside those that every method passes; and what answers otherwise than a plain pass."""

import json

import numpy as np
import pytest
import torch
from little import little_spec
from methods.checks import logits, stir, train
from methods.sizes import anatomy_of
from tiny import CLASSES, inputs, tiny

from luthier import evaluate, predict
from luthier import train as run
from luthier.core import CompositionError, ConfigError
from luthier.methods.parts.posterior import Posterior, Root, evidence_precision
from luthier.methods.reparameterised.laplace_lora import PRIORS
from luthier.surgery import Look, OneRow, answered, attach, load, method
from luthier.training.objective import Result
from luthier.workflow import Predictor, merge

STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}


def look(tuned, batch):
    """One step of one pass, with its logits."""

    def once():
        out = tuned.model(**batch)
        return OneRow(out.loss * len(batch["labels"]), out.logits, batch["labels"])

    return Look([lambda: once().loss / len(batch["labels"])], (), [once])


def concluded(batches, model=None, moved=0.1, **settings):
    tuned = attach(model or tiny("bert", **STILL), method("lora+laplace_lora", {"lora.rank": 3, **settings}))
    tuned.model.eval()
    stir(tuned, moved)
    part(tuned).conclude(tuned, [look(tuned, batch) for batch in batches])
    return tuned


def part(tuned):
    return tuned.tuning().method.parts()[-1]


def posteriors(tuned):
    return [m for m in tuned.model.modules() if isinstance(m, Posterior)]


def answers(tuned, batch):
    def forward():
        out = tuned.model(**batch)
        return Result(out.loss, len(batch["labels"]), out.logits, batch["labels"])

    with torch.no_grad():
        return answered(tuned, forward).logits


def wide(seed, rows=12, low=4, high=130):
    """Rows of words from a range."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(low, high, (rows, 9), generator=draw)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % CLASSES}


@pytest.mark.acid("laplace_lora", 1)
def test_training_is_that_of_lora_and_measuring_moves_nothing():
    alone = attach(tiny("bert"), method("lora", {"rank": 3}))
    beside = attach(tiny("bert"), method("lora+laplace_lora", {"lora.rank": 3}))
    with torch.no_grad():  # beside another method places draw otherwise
        for one, other in zip(alone.trained().values(), beside.trained().values(), strict=True):
            one.copy_(other)
    assert train(alone, 4) == train(beside, 4)
    batch = inputs(beside.model)
    before = {n: t.clone() for n, t in beside.trained().items()}
    torch.manual_seed(3)
    drawn = torch.get_rng_state()
    part(beside).conclude(beside, [look(beside, batch)])
    assert all(torch.equal(t, before[n]) and t.grad is None for n, t in beside.trained().items())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert torch.equal(logits(beside.model, batch), logits(alone.model, batch))
    assert not torch.equal(answers(beside, batch), logits(beside.model, batch))


@pytest.mark.acid("laplace_lora", 2)
def test_loss_and_calibration_error_fall_where_few_rows_were_learnt_by_heart():
    from luthier.training.quality import _calibration_error

    def measured(given, batch):
        shares = given.softmax(-1).numpy().astype(np.float64)
        wanted = batch["labels"].numpy()
        right = shares.argmax(1) == wanted
        return -np.log(shares[np.arange(len(wanted)), wanted]).mean(), _calibration_error(shares.max(1), right)

    learnt, held = wide(1, rows=24), wide(2, rows=200)
    tuned = attach(tiny("bert", **STILL), method("lora+laplace_lora", {"lora.rank": 3, "sites": ("*",)}))
    optimiser = torch.optim.AdamW(tuned.trained().values(), lr=1e-2)
    tuned.calls_hooks = True
    for _ in range(60):
        optimiser.zero_grad()
        tuned.model(**learnt).loss.backward()
        optimiser.step()
    tuned.model.eval()
    part(tuned).conclude(tuned, [look(tuned, learnt)])
    plain, by_posterior = measured(logits(tuned.model, held), held), measured(answers(tuned, held), held)
    assert by_posterior[0] < 0.8 * plain[0] and by_posterior[1] < 0.8 * plain[1], (plain, by_posterior)


@pytest.mark.acid("laplace_lora", 3)
@pytest.mark.parametrize("kind", ["sample", "probit"])
def test_with_an_infinite_prior_the_answers_are_the_plain_ones(kind):
    batch = inputs(tiny("bert"))
    tuned = concluded([batch], prior=1e12, answers=kind)
    gap = answers(tuned, batch).softmax(-1) - logits(tuned.model, batch).softmax(-1)
    assert float(gap.abs().max()) < 2e-4  # the root's jitter of 1e-6 is what is left
    loose = concluded([batch], prior=1.0, answers=kind)
    assert float((answers(loose, batch).softmax(-1) - logits(loose.model, batch).softmax(-1)).abs().max()) > 0.01


@pytest.mark.acid("laplace_lora", 4)
def test_variance_is_larger_off_the_data():
    tuned = concluded([wide(seed, low=4, high=14) for seed in range(6)], prior=0.1)
    found = {}
    held = part(tuned)

    def spy(means, spread):
        found["spread"] = spread
        return means

    held.__class__._mean, kept = (lambda self, means, spread: spy(means, spread)), held.__class__._mean
    try:
        sizes = []
        for batch in (wide(20, low=4, high=14), wide(21, low=90, high=130)):
            answers(tuned, batch)
            sizes.append(float(found["spread"].diagonal(dim1=1, dim2=2).sum(1).mean()))
    finally:
        held.__class__._mean = kept
    assert sizes[1] > 1.1 * sizes[0], sizes


@pytest.mark.acid("laplace_lora", 5)
def test_on_a_linear_model_with_gaussian_noise_it_is_the_exact_posterior():
    draw = torch.Generator().manual_seed(0)
    x, new = torch.randn(40, 6, generator=draw), torch.randn(3, 6, generator=draw)
    noise, prior, n_out = 0.5, 0.7, 4
    made = Posterior(n_out, 6, directions=6)
    read, given = Root(made.inputs), Root(made.outputs)
    for some in x.split(7):
        read.add(some)
        given.add(torch.eye(n_out).repeat(len(some), 1) / noise)  # a root of the curvature of one row's squared error
    made.inputs.copy_(read.rows() / len(x) ** 0.5)
    made.outputs.copy_(given.rows())
    made.precision.fill_(prior)
    jacobian = torch.einsum("oc,ni->noci", torch.eye(n_out), new)  # of output o in W, (n_out, 6)
    exact = (
        new.double() @ torch.linalg.inv(x.T.double() @ x.double() / noise**2 + prior * torch.eye(6)) @ new.T.double()
    )
    covariance = made.covariance(jacobian)
    for row in range(3):
        wanted = exact[row, row] * torch.eye(n_out, dtype=torch.float64)
        assert torch.allclose(covariance[row], wanted, atol=1e-6)


@pytest.mark.acid("laplace_lora", 6)
@pytest.mark.parametrize("letter", ["a", "b"])
def test_for_one_row_of_one_token_the_two_factors_are_the_whole_curvature(letter):
    batch = {"input_ids": torch.tensor([[7]]), "attention_mask": torch.ones(1, 1, dtype=torch.long)}
    batch["labels"] = torch.tensor([1])
    tuned = concluded([batch], sites=("attn.v@1",), directions=200)
    (module,) = (m for k, m in tuned.modules().items() if "attn.v@1" in k)
    matrix, made = getattr(module, letter), getattr(module, f"posterior_{letter}")
    found = tuned.model(**batch).logits[0]
    jacobian = torch.stack([torch.autograd.grad(one, matrix, retain_graph=True)[0].flatten() for one in found]).double()
    shares = found.detach().double().softmax(-1)
    wanted = jacobian.T @ (torch.diag(shares) - torch.outer(shares, shares)) @ jacobian
    inputs_, outputs = made.inputs.double(), made.outputs.double()
    held = torch.kron(outputs.T @ outputs, inputs_.T @ inputs_)
    assert float(wanted.abs().max()) > 0
    assert torch.allclose(held, wanted, atol=1e-5 * float(wanted.abs().max()))


def test_where_passes_are_in_bf16_the_answers_are_those_of_fp32():
    new = wide(9, rows=30)
    for moved, apart in ((0.1, 0.01), (0.3, 1.0)):  # so far moved, bf16 gives other logits, and still answers
        tuned = concluded([wide(seed) for seed in range(3)], moved=moved, sites=("*",), prior=0.1)
        wanted, plain = answers(tuned, new).softmax(-1), logits(tuned.model, new).softmax(-1)
        with torch.autocast("cpu", torch.bfloat16):
            found = answers(tuned, new).float().softmax(-1)
        assert float((plain - wanted).abs().max()) > 0.3
        assert float((found - wanted).abs().max()) < apart


def test_padding_is_no_token():
    batch = wide(3, rows=4)
    longer = {n: torch.nn.functional.pad(t, (0, 5)) if t.dim() == 2 else t for n, t in batch.items()}
    for one, other in zip(posteriors(concluded([batch])), posteriors(concluded([longer])), strict=True):
        gram, again = (p.inputs.T @ p.inputs for p in (one, other))
        assert torch.allclose(gram, again, atol=1e-4 * float(gram.abs().max()))


def test_the_prior_is_where_the_evidence_is_greatest():
    tuned = concluded([wide(seed) for seed in range(3)])
    held = posteriors(tuned)
    square = sum(float(p.detach().double().square().sum()) for n, p in tuned.trained().items() if "head" not in n)
    known = torch.cat([p.curvature().flatten() for p in held])
    found = evidence_precision(held, square)
    assert float(held[0].precision) == pytest.approx(found, rel=1e-4)
    grid = found * torch.tensor([0.5, 0.9, 1.0, 1.1, 2.0], dtype=torch.float64)
    evidence = [float(-g * square / 2 - torch.log1p(known / g).sum() / 2) for g in grid]
    assert max(evidence) == evidence[2]


def test_with_rows_held_out_the_prior_is_the_one_that_answers_them_best():
    learnt, held = [wide(seed) for seed in range(2)], wide(9, rows=40)
    tuned = concluded(learnt)
    part(tuned).conclude(tuned, [look(tuned, b) for b in learnt], [look(tuned, held)])
    chosen = float(posteriors(tuned)[0].precision)
    losses = {}
    for prior in PRIORS:
        for posterior in posteriors(tuned):
            posterior.precision.fill_(prior)
        losses[prior] = float(torch.nn.functional.cross_entropy(answers(tuned, held), held["labels"]))
    assert losses[min(PRIORS, key=lambda p: abs(p - chosen))] == min(losses.values())
    assert part(tuned).holds_out and not method("lora+laplace_lora", {"prior": 2.0}).parts()[-1].holds_out


def test_wide_factors_keep_their_leading_directions_also_where_the_sum_is_never_held(monkeypatch):
    draw = torch.Generator().manual_seed(1)
    rows = torch.randn(300, 40, generator=draw) * torch.logspace(0, -3, 40)
    exact = Root(torch.zeros(5, 40))
    exact.add(rows)
    monkeypatch.setattr("luthier.methods.parts.posterior._WIDE", 10)
    torch.manual_seed(0)
    bit_by_bit = Root(torch.zeros(5, 40))
    for some in rows.split(50):
        bit_by_bit.add(some)
    assert torch.allclose(bit_by_bit.rows().norm(dim=1), exact.rows().norm(dim=1), rtol=1e-2)


@pytest.mark.parametrize(
    "settings", [{}, {"layers": "last"}, {"directions": 2}, {"lora.train_a": False}, {"lora.start": "svd"}]
)
def test_what_is_saved_is_counted_and_answers_the_same(tmp_path, settings):
    batch = inputs(tiny("bert"))
    tuned = concluded([batch], **settings)
    tuned.save(tmp_path / "tuning")
    again = load(tiny("bert", **STILL), tmp_path / "tuning")
    assert torch.equal(answers(again, batch), answers(tuned, batch))
    numbers = sum(t.numel() for m in tuned.modules().values() for t in m.state_dict().values())
    assert numbers == tuned.tuning().method.n_stored(tuned.anatomy)
    assert len(posteriors(tuned)) == (4 if settings.get("layers") else 6 if "lora.train_a" in settings else 12)


def test_the_file_grows_by_little():
    anatomy = anatomy_of("roberta")
    made = method("lora+laplace_lora")
    assert made.n_params(anatomy) == 294_912
    # a place: A and B, each a square of 8 and ten directions of 768, and the prior
    assert made.n_stored(anatomy) == 294_912 + 24 * 2 * (64 + 7680 + 1)


def test_a_run_answers_by_it_and_says_what_it_was_worth(tmp_path):
    spec = little_spec(tmp_path, "lora+laplace_lora", out=str(tmp_path / "run"))
    result = run(spec)
    quality = json.loads((tmp_path / "run" / "quality.json").read_text())
    assert quality["nll"] == pytest.approx(result.scores["loss"], rel=1e-5) and quality["plain_nll"] != quality["nll"]
    assert quality["plain_calibration_error"] is not None
    again = evaluate(tmp_path / "run", spec.data.source)
    assert again.quality is not None and again.quality.plain_nll is not None
    text = "good good w5"
    told = predict(tmp_path / "run", texts=[text, "bad"])[0]["probabilities"]
    assert sum(told.values()) == pytest.approx(1, abs=1e-5)
    alone = predict(tmp_path / "run", texts=[text])[0]["probabilities"]
    assert all(told[n] == pytest.approx(alone[n], abs=2e-3) for n in told)


def test_merged_it_is_the_point_estimate_and_the_card_says_so(tmp_path):
    run(little_spec(tmp_path, "lora+laplace_lora", out=str(tmp_path / "run")))
    out = merge(tmp_path / "run", tmp_path / "merged")
    assert "laplace_lora makes of the model's outputs is not in these weights" in (out / "README.md").read_text()


def test_rows_of_several_tunings_are_refused(tmp_path):
    run(little_spec(tmp_path, "lora+laplace_lora", out=str(tmp_path / "run")))
    with pytest.raises(ConfigError, match="more than one pass"):
        Predictor(tmp_path / "run").texts(["good"], tunings=["default"])


def test_what_cannot_be_is_refused(tmp_path):
    tuned = attach(tiny("bert"), "lora+laplace_lora")
    with pytest.raises(ConfigError, match="no training row"):
        part(tuned).conclude(tuned, [])
    with pytest.raises(CompositionError, match="lora"):
        method("dora+laplace_lora")
    with pytest.raises(ConfigError, match="above 0"):
        method("lora+laplace_lora", {"prior": 0.0})
    with pytest.raises(ConfigError, match="this task is causal_lm"):
        run(little_spec(tmp_path, "lora+laplace_lora", kind="llama"))
