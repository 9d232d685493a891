"""The acid tests of the catalogue, for each strategy: its formulas, written out."""

import dataclasses
import json

import pytest
import torch
from little import little_spec
from tiny import inputs, tiny

from luthier.data.batches import Batch
from luthier.data.tasks import Task
from luthier.runs.spec import OptimSpec
from luthier.surgery import attach
from luthier.surgery.layer_groups import layer_groups
from luthier.training import STRATEGIES
from luthier.training.course import Course, Piece, Progress
from luthier.training.optimiser import optimiser_of
from luthier.workflow import train

torch.set_num_threads(1)
LLRD, STLR, FreeLB = (STRATEGIES.get(name) for name in ("llrd", "stlr", "freelb"))


# --- llrd


@pytest.mark.acid("llrd", 2)
@pytest.mark.parametrize(
    ("kind", "method", "blocks"),
    [("bert", "full", 3), ("gpt2", "full", 3), ("t5", "full", 5), ("albert", "full", 1), ("llama", "lora", 3)],
)
def test_layer_groups_are_found_in_every_kind_of_model(kind, method, blocks):
    tuned = attach(tiny(kind), method)
    names = list(tuned.trained())
    groups = layer_groups(tuned, names)
    assert len(groups) == blocks + 2
    assert sorted(n for g in groups for n in g) == sorted(names), "each trained tensor is in one group"
    assert all(groups[1:-1]), "every block has numbers that train"
    if method == "full":
        assert any("embed" in n or "shared" in n or "wte" in n for n in groups[-1])


@pytest.mark.acid("llrd", 2)
def test_the_decoder_stands_above_the_encoder():
    tuned = attach(tiny("t5"), "lora")
    groups = layer_groups(tuned, list(tuned.trained()))
    assert all("decoder" in n for n in groups[1]) and all("encoder" in n for n in groups[-2])


@pytest.mark.acid("llrd", 1)
def test_adjacent_groups_differ_by_the_decay_and_factors_of_a_method_multiply():
    tuned = attach(tiny("bert", "classification"), "full")
    own = LLRD(decay=1 / 2.6).groups(tuned)
    assert [g.lr_factor for g in own] == pytest.approx([2.6**-g for g in range(len(own))])
    named = tuned.trained()
    half = [dataclasses.replace(g, lr_factor=0.5, weight_decay=0.25) for g in own]
    optimiser = optimiser_of(OptimSpec(lr=1.0, weight_decay=0.1), named, half, 1.0, own)
    for g, group in enumerate(own):
        for name in group.names:
            rate, decay, _ = optimiser._pace(name, 1.0)
            assert rate == pytest.approx(0.5 * 2.6**-g) and decay == 0.25


def test_lower_layers_move_less(tmp_path):
    spec = little_spec(tmp_path, "bitfit", steps=1, strategy="llrd", optim=OptimSpec(lr=1e-2))
    spec = dataclasses.replace(spec, settings={"llrd.decay": 0.1})
    tuned = train(spec).tuned
    moved = {n: (u.parameter.detach() - u.original).abs().max().item() for n, u in tuned.tuning().unfrozen.items()}
    layer = {i: max(m for n, m in moved.items() if f"layer.{i}." in n) for i in range(3)}
    assert layer[0] < 0.2 * layer[1] < 0.04 * layer[2] * 1.01


# --- stlr


@pytest.mark.acid("stlr", 1)
def test_the_triangle_has_the_values_of_its_formula():
    one = STLR(cut_frac=0.1, ratio=32)
    total, cut = 100, 10
    rates = [one.rate(step, total) for step in range(1, total + 2)]
    assert rates[0] == pytest.approx(1 / 32) and rates[cut] == pytest.approx(1) and max(rates) == rates[cut]
    assert rates[total] == pytest.approx(1 / 32), "t = T"
    assert rates[5] == pytest.approx((1 + 0.5 * 31) / 32) and rates[55] == pytest.approx((1 + 0.5 * 31) / 32)
    assert min(STLR(cut_frac=0.3).rate(step, 11) for step in range(1, 13)) >= 1 / 32


def test_a_run_logs_the_rates_of_the_triangle(tmp_path):
    train(little_spec(tmp_path, steps=10, strategy="stlr", optim=OptimSpec(lr=1e-2, schedule="constant", warmup=0.5)))
    rows = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    rates = [row["lr"] for row in rows if row.get("lr")]
    assert rates == pytest.approx([1e-2 * STLR().rate(s, 10) for s in range(1, 11)])


# --- freelb


def climbing(kind="bert", method="lora", **settings):
    """A tuned model in training mode with its course, a piece, and the loss of one pass."""
    tuned = attach(tiny(kind, "classification"), method, **({"dropout": 0.1} if method == "lora" else {}))
    tuned.model.train()
    tuned.model.luthier.train()
    for p in tuned.trained().values():
        with torch.no_grad():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    given = inputs(tuned.model, padded=False)
    mask = torch.ones_like(given["input_ids"])
    mask[0, -3:] = 0
    given = {"input_ids": given["input_ids"], "attention_mask": mask}
    rows = len(mask)
    batch = Batch(
        inputs=given, labels=torch.arange(rows) % 5, rows=torch.arange(rows).numpy(), n_targets=rows,
        n_tokens=int(mask.sum()),
    )  # fmt: skip
    optimiser = optimiser_of(OptimSpec(), tuned.trained(), [], 1e-3)
    course = Course(
        name="freelb", tuned=tuned, task=Task(name="classification", labels=tuple("abcde")), optimiser=optimiser,
        device=torch.device("cpu"), seed=0, progress=Progress(step=1, total=3),
    )  # fmt: skip
    piece = Piece(batch=batch, index=0, n_targets=rows)
    seen = []

    def loss():
        # A hook put on last sees what the changes before it gave.
        handle = tuned.model.get_input_embeddings().register_forward_hook(lambda module, args, out: seen.append(out))
        torch.manual_seed(7)
        try:
            return one_pass()
        finally:
            handle.remove()

    def one_pass():
        return torch.nn.functional.cross_entropy(tuned.model(**given).logits, batch.labels, reduction="sum")

    return tuned, course, piece, loss, seen


def gradients(tuned):
    found = {n: p.grad.clone() for n, p in tuned.trained().items() if p.grad is not None}
    for p in tuned.trained().values():
        p.grad = None
    return found


@pytest.mark.acid("freelb", 2)
def test_the_change_is_zero_on_padding_and_inside_its_ball():
    _, course, piece, _, _ = climbing()
    one = FreeLB(init_mag=50.0, epsilon=0.3)
    delta = one._first(course, piece)
    mask = piece.batch.inputs["attention_mask"].bool()
    assert not delta[~mask].any() and delta[mask].any()
    norms = torch.linalg.vector_norm(delta, dim=(1, 2))
    assert (norms <= 0.3 + 1e-6).all() and norms.max() > 0.29
    delta = delta.requires_grad_()
    delta.grad = torch.randn(delta.shape) * mask[..., None]
    climbed = one._climb(delta)
    assert not climbed[~mask].any() and (torch.linalg.vector_norm(climbed, dim=(1, 2)) <= 0.3 + 1e-6).all()


def test_the_first_change_has_the_size_of_the_formula():
    _, course, piece, _, _ = climbing()
    mask = piece.batch.inputs["attention_mask"]
    delta = FreeLB(init_mag=0.2, epsilon=0.0)._first(course, piece)
    bound = 0.2 / (mask.sum(-1) * delta.shape[-1]).sqrt()  # (rows,)
    largest = delta.abs().amax((1, 2))
    assert (largest <= bound).all() and (largest > 0.95 * bound).all()


@pytest.mark.acid("freelb", 3, 4)
def test_the_gradient_is_the_mean_of_k_single_passes_with_one_dropout():
    tuned, course, piece, loss, seen = climbing()
    one = FreeLB(k=3, alpha=0.5, init_mag=0.4, epsilon=0.0)
    for part in one.passes(course, piece, loss):
        part.backward()
    summed, changed = gradients(tuned), [e.detach() for e in seen]
    seen.clear()
    plain = tuned.model.get_input_embeddings()(piece.batch.inputs["input_ids"]).detach()
    assert len(changed) == 3 and not torch.equal(changed[0], changed[1])
    singles = []
    for embedded in changed:
        with course.embedding(lambda e, delta=embedded - plain: e + delta):
            loss().backward()
        singles.append(gradients(tuned))
    for name, found in summed.items():
        mean = sum(s[name] for s in singles) / 3
        assert torch.allclose(found, mean, rtol=1e-4, atol=1e-6), name
        assert not torch.allclose(found, singles[-1][name], rtol=1e-3, atol=1e-6), "the last alone"


def test_the_change_climbs_the_loss():
    _, course, piece, loss, _ = climbing()
    parts = [float(p.detach()) for p in _driven(FreeLB(k=4, alpha=0.5, init_mag=0.1, epsilon=0.0), course, piece, loss)]
    assert parts[-1] > parts[0]


def _driven(one, course, piece, loss):
    for part in one.passes(course, piece, loss):
        part.backward()
        yield part


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_prompts_before_the_text_are_left_alone(method):
    tuned, course, piece, loss, seen = climbing(method=method)
    for part in FreeLB().passes(course, piece, loss):
        part.backward()
    assert seen[0].shape[1] == piece.batch.inputs["input_ids"].shape[1], "the text alone is changed"
    assert gradients(tuned)


def test_a_draw_does_not_depend_on_neighbours_or_padding():
    _, course, piece, _, _ = climbing()
    whole = course.draw(piece, 5)
    inner = piece.batch.inputs["attention_mask"]
    short = Batch(
        inputs={"attention_mask": inner[:1, :-3]}, labels=None, rows=piece.batch.rows[:1], n_targets=1, n_tokens=1
    )
    alone = course.draw(Piece(batch=short, index=4, n_targets=1), 5)
    assert torch.equal(alone[0], whole[0, :-3])
