"""kd_tinybert and kd_minilm: a copy of the teacher has nothing to learn, padding counts for nothing, shapes fit."""

import dataclasses

import pytest
import torch
from in_memory import Runs
from little import little_model, little_spec

from luthier.core import ConfigError
from luthier.runs.spec import BatchSpec
from luthier.strategies.distillation.kd_minilm import apart
from luthier.strategies.distillation.kd_tinybert import _states
from luthier.training.course import Piece
from luthier.training.taps import real_pairs
from luthier.workflow import train

torch.set_num_threads(1)
WHOLE = BatchSpec(size=6, tokens=4096)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("layers"))


def first_loss(runs, name, method="lora", by=0.0, **values):
    """The strategy's own loss of the first step, its teacher the student's own folder; and the loop with gradients."""
    folder = runs.loop(None, method, "llama-dry", batch=WHOLE).spec.model
    given = {f"{name}.alpha": 1.0, f"{name}.teacher": folder, **{f"{name}.{k}": v for k, v in values.items()}}
    loop = runs.loop(name, method, "llama-dry", values=given, batch=WHOLE)
    loop.moments.start()
    loop.set_mode(training=True)
    loop.moments.before_step(0, loop.total, 0)
    with torch.no_grad():
        for n, p in loop.tuned.trained().items():
            if by:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n))), alpha=by)
    return sum(loop._gradients(0, loop.feed.cut(0))), loop


@pytest.mark.acid("kd_tinybert", 1)
def test_kd_tinybert_a_copy_of_the_teacher_has_no_loss(runs):
    loss, loop = first_loss(runs, "kd_tinybert")
    assert loss == pytest.approx(0, abs=1e-9)
    assert torch.equal(loop.optimiser.named["kd_tinybert/states"], torch.eye(loop.tuned.anatomy.d))
    assert first_loss(runs, "kd_tinybert", by=0.1)[0] > 1e-4


def test_kd_tinybert_is_its_formula_with_each_layer_of_the_student_beside_its_own_of_a_deeper_teacher(runs):
    deep = little_model(runs.home / "deep", "bert", num_hidden_layers=6)
    teacher = train(little_spec(runs.home, "ia3", model=str(deep), steps=3, out=str(runs.home / "deep-run"))).path
    given = {"kd_tinybert.alpha": 1.0, "kd_tinybert.teacher": str(teacher)}
    loop = runs.loop("kd_tinybert", "lora", "bert-dry", values=given, batch=WHOLE)
    loop.tuned.model.eval()
    (one, course), (batch,) = loop.moments._asked[0], loop.feed.cut(0)
    found = one.loss(course, Piece(batch=batch, index=0, n_targets=6), lambda: course.forward(batch)).loss
    real = batch.inputs["attention_mask"].bool()

    def inside(model):
        states = model(**batch.inputs, output_hidden_states=True).hidden_states
        scores = []
        for layer, x in zip(model.bert.encoder.layer, states, strict=False):
            q, k = (m(x).unflatten(-1, (4, -1)) for m in (layer.attention.self.query, layer.attention.self.key))
            scores.append(torch.einsum("rihd,rjhd->rhij", q, k) / q.shape[-1] ** 0.5)
        return states, scores

    (ours, own), (theirs, told) = inside(loop.tuned.model), inside(course.models["teacher"].model)
    assert (len(own), len(told)) == (3, 6)
    wanted = 0.0
    for row, mask in enumerate(real):
        for m in range(4):
            wanted += (ours[m][row] - theirs[2 * m][row])[mask].square().mean()
        for m in range(3):
            wanted += (own[m][row] - told[2 * m + 1][row])[:, mask][:, :, mask].square().mean()
    assert len(real) == 6 and found.item() == pytest.approx(wanted.item(), rel=1e-4) and found > 1e-3


@pytest.mark.acid("kd_minilm", 1)
def test_kd_minilm_a_copy_of_the_teacher_has_no_loss_and_no_gradient(runs):
    loss, loop = first_loss(runs, "kd_minilm", heads=4)
    grads = [p.grad for p in loop.optimiser.named.values() if p.grad is not None]
    assert loss == pytest.approx(0, abs=1e-6) and max(float(g.abs().max()) for g in grads) < 1e-5
    assert first_loss(runs, "kd_minilm", by=0.1, heads=4)[0] > 1e-4


def test_kd_minilm_is_the_divergence_of_the_formula():
    a, b = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    pairs = torch.ones(1, 3, 3, dtype=torch.bool).tril()
    total = 0.0
    for head in range(2):
        x, y = a[0, :, 2 * head : 2 * head + 2], b[0, :, 2 * head : 2 * head + 2]
        for i in range(3):
            p, q = (torch.softmax(z[i] @ z[: i + 1].T / 2**0.5, -1) for z in (x, y))
            total += (p * (p / q).log()).sum() / (2 * 3)
    assert torch.allclose(apart(a, b, pairs, 2)[0], total, rtol=1e-4)


@pytest.mark.acid("kd_tinybert", 2)
def test_padding_counts_for_nothing():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    batch = dataclasses.make_dataclass("B", ["inputs"])({"attention_mask": mask})
    pairs = real_pairs(batch, 4, causal=False)
    a, b = torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    c = torch.where(mask[..., None].bool(), b, 1e3 * torch.randn(2, 4, 6))
    assert torch.allclose(apart(a, b, pairs, 2), apart(a, c, pairs, 2))
    assert torch.allclose(_states(a, b, torch.eye(6), mask.bool()), _states(a, c, torch.eye(6), mask.bool()))
    short = real_pairs(dataclasses.replace(batch, inputs={"attention_mask": mask[1:, :2]}), 2, causal=False)
    assert torch.allclose(apart(a, b, pairs, 2)[1], apart(a[1:, :2], b[1:, :2], short, 2)[0], rtol=1e-5)


@pytest.mark.acid("kd_tinybert", 3)
def test_kd_tinybert_what_turns_states_trains_and_is_dropped(runs):
    wide = little_model(runs.home / "wide", "llama", hidden_size=96, num_hidden_layers=4)
    loop = runs.loop("kd_tinybert", "lora", "llama-dry", values={"kd_tinybert.teacher": str(wide)}, batch=WHOLE)
    d = loop.tuned.anatomy.d
    start = loop.optimiser.named["kd_tinybert/states"].detach().clone()
    assert start.shape == (d, 96) and d != 96
    loop.run_to()
    assert not torch.equal(loop.optimiser.named["kd_tinybert/states"].detach(), start)
    assert not [n for n in loop.tuned.state.tensors() if "kd_tinybert" in n]


@pytest.mark.acid("kd_minilm", 2)
def test_kd_minilm_shapes_and_numbers_of_heads_may_differ(runs):
    wide = little_model(runs.home / "wide8", "llama", hidden_size=96, num_attention_heads=8, num_key_value_heads=8)
    loss, loop = first_loss(runs, "kd_minilm", teacher=str(wide), heads=4)
    assert loss > 0 and any(p.grad is not None and p.grad.any() for p in loop.optimiser.named.values())


@pytest.mark.acid("kd_minilm", 3)
def test_kd_minilm_nothing_above_the_relations_is_touched_and_nothing_is_projected(runs):
    _, loop = first_loss(runs, "kd_minilm", "full", by=0.01, heads=4)
    assert not loop.optimiser.joined
    last = loop.tuned.anatomy.n_layers - 1
    alive = {n for n, p in loop.optimiser.named.items() if p.grad is not None and p.grad.any()}
    wanted = {f"layers.{last}.self_attn.{x}_proj" for x in "qkv"}
    assert all(any(w in n for n in alive) for w in wanted)
    assert not [n for n in alive if (f"layers.{last}." in n and ("o_proj" in n or "mlp" in n)) or "head/" in n]


@pytest.mark.acid("kd_tinybert", 4)
def test_shapes_that_do_not_fit_are_refused(runs, tmp_path):
    eight = little_model(runs.home / "eight", "llama", num_attention_heads=2)
    with pytest.raises(ConfigError, match=r"kd_tinybert cannot match 3 layers of 4 heads.*of 2: heads must be as many"):
        runs.loop("kd_tinybert", "lora", "llama", values={"kd_tinybert.teacher": str(eight)})
    loop = runs.loop("kd_minilm", "lora", "llama", values={"kd_minilm.heads": 5})
    with pytest.raises(ConfigError, match=r"kd_minilm.heads: 5 does not divide the student's attn.q@2"):
        loop.moments.start()
    for name in ("kd_tinybert", "kd_minilm"):
        with pytest.raises(ConfigError, match=f"{name}.teacher: no teacher is named"):
            train(little_spec(runs.home, strategy=name, out=str(tmp_path / "run")))
    with pytest.raises(ConfigError, match="a prompt of the method stands in front"):
        first_loss(runs, "kd_minilm", "prompt_tuning", heads=4)
