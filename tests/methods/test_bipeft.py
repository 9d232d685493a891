"""The iterative search of places and ranks: the acid tests of its paper."""

import warnings
from dataclasses import replace

import pytest
import torch
from cells import Trainer, objective
from little import little_spec
from methods.checks import logits, stir
from tiny import inputs, tiny

from luthier.core import ConfigError
from luthier.methods.hybrid.bipeft import ALL_ON, BIPEFT, Choices
from luthier.methods.parts.by_halves import half_of
from luthier.methods.parts.searched import Components, Gates
from luthier.runs.spec import BatchSpec, DataSpec
from luthier.surgery import attach
from luthier.surgery.checkpointing import checkpoints_itself
from luthier.workflow import train


def searched_model(total=16, **settings):
    model = tiny("bert")
    tuned = attach(model, BIPEFT(**{"share": 0.05, "ranks": (1, 2, 4), "stable": -1.0, "prunes": 4, **settings}))
    trainer = Trainer(tuned, model, inputs(model), total=total, lr=2e-2)
    model.luthier.train()
    (gates,) = tuned.modules(Gates).values()
    return tuned, trainer, gates


@pytest.mark.acid("bipeft", 1)
def test_what_is_left_never_grows_after_the_first_cut_and_waits_for_agreement():
    tuned, trainer, gates = searched_model(16)
    budget, left = tuned.tuning().method.budget(tuned.anatomy), [gates.numbers()]
    for _ in range(8):
        trainer.step()
        left.append(gates.numbers())
    assert left == sorted(left, reverse=True) and left[1] < left[0] and left[-1] <= budget + 400
    assert bool((gates.widest[gates.active > 0] < 2).any()), "ranks were cut in their turn"
    _, trainer, gates = searched_model(16, stable=1.0)
    whole = gates.numbers()
    for _ in range(6):
        trainer.step()
    assert gates.numbers() == whole, "gradients that never agree cut nothing"


@pytest.mark.acid("bipeft", 2)
@pytest.mark.parametrize(("stable", "share"), [(-1.0, 0.05), (1.0, 0.05), (-1.0, 0.005)])
def test_the_result_is_within_the_budget(stable, share):
    tuned, trainer, _ = searched_model(8, stable=stable, share=share)
    trainer.run()
    tuned.finish()
    held = sum(p.numel() for m in tuned.modules(Components).values() for p in m.parameters())
    method = tuned.tuning().method
    assert 0 < held <= method.budget(tuned.anatomy)
    assert held == BIPEFT(plan=method.plan_of(tuned)).n_params(tuned.anatomy)


@pytest.mark.acid("bipeft", 3)
def test_with_one_rank_and_one_round_places_alone_are_searched():
    tuned, trainer, gates = searched_model(12, ranks=(2,), rounds=1, stable=1.0)
    trainer.step()  # nothing stands behind the gates yet
    for _ in range(5):
        trainer.step()
        assert not gates.searches_ranks
        assert not trainer.gradients["gates.alpha"][:, 2:].any() and trainer.gradients["gates.alpha"][:, :2].any()
    widths = gates.z().detach()
    lora = torch.tensor(gates.lora)
    assert all(set(row.tolist()) in ({0.0}, {1.0}) for row in widths), "on or off, and never narrower"
    trainer.run()
    plan = tuned.tuning().method.plan_of(tuned)
    assert any(lora) and all(name.endswith("=2") for name in plan if name.startswith("lora:"))
    other, trainer, gates = searched_model(12, rounds=1, stable=1.0)
    seen = set()
    for _ in range(6):
        trainer.step()
        seen.add(gates.searches_ranks)
    assert seen == {False, True} and other is not tuned


@pytest.mark.acid("bipeft", 4)
def test_hard_choices_compute_what_the_plan_alone_computes_with_the_same_weights():
    tuned, _, gates = searched_model()
    stir(tuned, 0.2)
    with torch.no_grad():
        gates.alpha.copy_(torch.randn(gates.alpha.shape, generator=torch.Generator().manual_seed(2)))
        gates.alpha[range(48), [2 + i // 2 % 3 for i in range(48)]] += 9
    tuned.model.eval()
    wide = logits(tuned.model)
    with torch.no_grad():
        on, ranks = gates.alpha[:, :2].argmax(-1) == 0, gates.alpha[:, 2:].argmax(-1)
    method = tuned.tuning().method
    names = [
        f"{p.name}={gates.ranks[int(ranks[i])]}" if p.kind == "lora" else p.name
        for i, p in enumerate(method.places(tuned.anatomy))
        if on[i]
    ]
    assert 10 < len(names) < len(on) - 10 and {n[-2:] for n in names if "=" in n} == {"=1", "=2", "=4"}
    alone = attach(tiny("bert"), BIPEFT(plan=tuple(names)))
    with torch.no_grad():
        for name, parameter in alone.trained().items():
            held = tuned.trained()[name]
            parameter.copy_(held[tuple(slice(n) for n in parameter.shape)] if held.shape != parameter.shape else held)
    torch.testing.assert_close(logits(alone.model), wide, rtol=1e-5, atol=1e-5)


def test_in_the_first_steps_every_place_acts_and_so_moves_before_one_is_shut():
    tuned, trainer, _ = searched_model(16, stable=1.0)
    start = {n: p.detach().clone() for n, p in tuned.trained().items()}
    for _ in range(ALL_ON):
        trainer.step()
    moved = {n.rpartition("_")[0] for n, p in tuned.trained().items() if not torch.equal(p, start[n])}
    places = {n.rpartition("_")[0] for n in start if "gates" not in n and "@" in n}
    assert len(places) > 20 and places <= moved


def test_what_is_not_searched_in_a_step_does_not_move_by_momentum():
    _, trainer, gates = searched_model(16, stable=1.0)
    turns = []
    for _ in range(8):
        before = gates.alpha.detach().clone()
        trainer.step()
        moved = gates.alpha.detach() != before
        searched, rests = (moved[:, 2:], moved[:, :2]) if gates.searches_ranks else (moved[:, :2], moved[:, 2:])
        assert not rests.any()
        turns.append((gates.searches_ranks, bool(searched.any())))
    assert {ranks for ranks, moves in turns if moves} == {False, True}


def test_ranks_that_were_cut_speak_no_more_for_a_place():
    gates = Choices([[2, 4, 8], [3, 3, 3]], [True, False], BIPEFT(ranks=(1, 2, 4)))
    gates.felt.copy_(torch.tensor([[1.0, 9.0, 9.0, 9.0], [3.0, 0.0, 0.0, 0.0]]))
    gates.widest[0] = 0
    gates.prune(3, 1)
    assert gates.active.tolist() == [0, 1]
    gates.active.fill_(1)
    gates.choose(3)
    assert gates.fixed.tolist() == [0, 1]


@pytest.mark.parametrize("pieces", [2, 6])
def test_a_step_in_micro_batches_tells_what_one_batch_tells(pieces):
    """All of them count for what is cut, and not the last one; also where a piece has rows of one half alone."""
    found = []
    for n in (1, pieces):
        model = tiny("bert")
        tuned = attach(model, BIPEFT(share=0.05, ranks=(1, 2, 4)))
        stir(tuned, 0.1)
        (gates,) = tuned.modules(Gates).values()
        model.eval()
        model.luthier.train()
        method, batch = tuned.tuning().method, inputs(model, batch=12, padded=False)
        torch.manual_seed(3)
        method.before_step(tuned, 5, 16)
        halves = half_of(batch["input_ids"], None)
        assert 2 < int(halves.sum()) < 10
        if n == 6:
            assert any(len(set(part.tolist())) == 1 for part in halves.chunk(n)), "a piece without one half"
        stale = torch.full_like(gates.alpha, 1e3)
        gates.of_training = stale  # of the step before
        for i in range(n):
            part = {k: v.chunk(n)[i] for k, v in batch.items()}
            (method.loss(tuned, objective(model, part)).loss / 12).backward()
        method.after_backward(tuned, 5, 16)
        grads = {k: p.grad for k, p in tuned.trained().items() if p.grad is not None}
        found.append((gates.of_training, gates.felt.clone(), gates.agreement.clone(), grads))
    (whole, felt, agreement, grads), (in_parts, felt_too, agrees_too, grads_too) = found
    torch.testing.assert_close(in_parts, whole, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(felt_too, felt, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(agrees_too, agreement, rtol=1e-4, atol=1e-5)
    assert 0 < abs(float(agreement)) < 1
    for name, gradient in grads.items():
        torch.testing.assert_close(grads_too[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def _within(model, cut):
    """The model, whose passes compute the last block for what the head reads; a run's do."""
    plain = model.forward

    def forward(**given):
        with cut.on():
            return plain(**given)

    model.forward = forward


@pytest.mark.parametrize("method", ["bipeft", "s3delta_m"])
def test_blocks_that_are_computed_anew_give_the_search_the_same_gradients(method):
    found = []
    for anew in (False, True):
        model = tiny("bert")
        settings = {"ranks": (1, 2), "stable": 1.0} if method == "bipeft" else {}
        tuned = attach(model, method, share=0.03, **settings)
        stir(tuned, 0.1)
        trainer = Trainer(tuned, model, inputs(model), total=8, lr=2e-2)
        cut = tuned.fast.first_token()
        assert cut is not None
        _within(model, cut)
        if anew:
            tuned.checkpoint_activations()
        model.luthier.train()
        for module in model.modules():
            if anew and checkpoints_itself(module):
                module.training = True
        trainer.step()
        found.append(trainer.gradients)
    assert found[0].keys() == found[1].keys() and found[0]["gates.alpha"].any()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize(("method", "passes"), [("bipeft", 3), ("s3delta_m", 4)])
def test_a_step_of_the_search_takes_as_many_passes_as_its_page_says(method, passes):
    model = tiny("bert")
    trainer = Trainer(attach(model, method, share=0.03), model, inputs(model), total=8)
    model.luthier.train()
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1))
    trainer.step()
    assert len(seen) == passes


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"share": 1e-6}, "the smallest place holds"),
        ({"ranks": (4, 1)}, "the smallest first"),
        ({"plan": ("lora:attn.q@0=x",)}, "the rank of 'lora:attn.q@0' is 'x'"),
        ({"plan": ("lora:attn.q@9",)}, "no place 'lora:attn.q@9'"),
    ],
)
def test_what_cannot_work_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        attach(tiny("bert"), BIPEFT(**settings))


@pytest.mark.parametrize("name", ["bipeft", "s3delta_m"])
def test_small_batches_without_a_row_of_the_half_that_teaches_the_choices_do_not_end_a_run(name, tmp_path):
    """Batches of one row are of one half: a run whose first three steps were all of it ended, one time in eight."""
    rows = tmp_path / "rows.csv"
    texts = [f"{word} it was" for word in ("good", "bad", "fine", "poor", "great", "awful", "nice", "sad")]
    rows.write_text("text,label\n" + "".join(f"{text},{i % 2}\n" for i, text in enumerate(texts * 4)))
    untaught = 0
    for seed in range(12):  # with some of them the first three rows are of one half, or of the other
        spec = little_spec(tmp_path, method=name, steps=12, seed=seed, out=str(tmp_path / f"run-{seed}"))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            train(replace(spec, batch=BatchSpec(size=1), data=DataSpec(source=str(rows)), settings={"share": 0.05}))
        untaught += any("no step of the search taught it what to keep" in str(one.message) for one in told)
    assert untaught < 12, "a search that nothing taught says so, another one does not"


def test_a_search_that_nothing_taught_says_that_its_choice_says_nothing():
    tuned, trainer, _ = searched_model(16)
    with pytest.warns(UserWarning, match="no step of the search taught it what to keep"):
        tuned.tuning().method.finish(tuned)
    tuned, trainer, gates = searched_model(16)
    for _ in range(4):
        trainer.step()
    assert gates.alpha.any()
    tuned.tuning().method.finish(tuned)  # a warning would be an error here
