"""The FISH mask: its own tests, beside those that every method passes."""

import math

import pytest
import torch
from little import Heard, at_call, little_spec
from methods.checks import train
from methods.sizes import trained
from safetensors.torch import load_file
from tiny import inputs, tiny
from torch.func import functional_call, grad, vmap

from luthier import HooksCallback
from luthier import train as run
from luthier.core import ConfigError, Interrupted
from luthier.methods.partial.fish_mask import FishMask, fisher
from luthier.methods.parts.own_tensors import own_unfrozen
from luthier.runs.spec import OptimSpec
from luthier.surgery import Look, OneRow, attach, method
from luthier.training.loop import Loop
from luthier.training.stop_signals import StopRequested
from luthier.workflow import resume
from luthier.workflow.resume_proof import run_digests

STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}


def one_by_one(model, batch):
    """A step of which the rows can be had one by one."""

    def row(i):
        out = model(**{k: v[i : i + 1] for k, v in batch.items()})
        return OneRow(out.loss, out.logits)

    return Look([lambda: model(**batch).loss], [lambda i=i: row(i) for i in range(len(batch["labels"]))])


def prepared(**settings):
    made = method("fish_mask", {"share": 0.1, **settings})
    tuned = attach(tiny("bert", **STILL), made)
    made.prepare(tuned, [one_by_one(tuned.model, inputs(tuned.model, seed=1))])
    return tuned, made


@pytest.mark.acid("fish_mask", 3)
def test_the_budget_holds_the_head():
    assert trained("bert", "fish_mask") == 547_411
    assert trained("bert-for-two", "fish_mask") == 547_411 - (2 * 768 + 2)
    assert trained("bert-for-two", "fish_mask", counts_head=False) == 547_411
    tuned, made = prepared()
    assert tuned.n_trained() == made.n_params(tuned.anatomy)
    assert all(u.mask is None for k, u in tuned.tuning().unfrozen.items() if k.startswith("head/"))


@pytest.mark.acid("fish_mask", 1)
def test_scores_of_rows_alone_are_those_of_vmap_and_the_squared_gradient_of_a_batch_is_not():
    model = tiny("bert", **STILL).eval()
    model.config._attn_implementation = "eager"
    batch = inputs(model, seed=1)
    batch = {n: t for n, t in batch.items() if n in ("input_ids", "labels")}
    name = "bert.encoder.layer.2.output.dense.weight"
    parameter = dict(model.named_parameters())[name]
    (scores,) = fisher([parameter], one_by_one(model, batch).rows, expected=False)

    rest = {n: p.detach() for n, p in model.named_parameters() if n != name} | dict(model.named_buffers())

    def loss(value, ids, label):
        out = functional_call(model, {**rest, name: value}, kwargs={"inputs_embeds": ids[None]})
        return torch.nn.functional.cross_entropy(out.logits, label[None])

    embedded = model.bert.embeddings.word_embeddings(batch["input_ids"]).detach()
    rows = vmap(grad(loss), in_dims=(None, 0, 0))(parameter.detach(), embedded, batch["labels"])
    whole = torch.autograd.grad(
        sum(loss(parameter, e, y) for e, y in zip(embedded, batch["labels"], strict=True)) / len(embedded), parameter
    )[0]
    torch.testing.assert_close(scores, rows.square().mean(0), atol=1e-9, rtol=1e-3)
    assert (scores - whole.square()).norm() > 0.1 * scores.norm()


@pytest.mark.acid("fish_mask", 2)
def test_opposite_gradients_do_not_cancel():
    model = tiny("bert", **STILL)
    planted = model.bert.pooler.dense.weight
    rows = [lambda s=s: OneRow(s * planted[0].sum() + 0.0 * planted.sum()) for s in (1.0, -1.0)]
    (scores,) = fisher([planted], rows, expected=False)
    assert torch.equal(scores[0], torch.ones(48)) and not scores[1:].any()


@pytest.mark.acid("fish_mask", 3)
def test_a_planted_signal_is_found():
    made = method("fish_mask", {"share": 0.01, "counts_head": False})
    tuned = attach(tiny("bert"), made)
    planted = tuned.model.bert.encoder.layer[1].output.dense.weight
    made.prepare(tuned, [lambda: (planted[:5] ** 2).sum()])
    assert tuned.tuning().unfrozen["model/bert.encoder.layer.1.output.dense.weight"].mask[:5].all()


@pytest.mark.acid("fish_mask", 4)
def test_expected_information_is_that_of_the_models_own_odds_and_nothing_for_one_class():
    weight = torch.nn.Parameter(torch.tensor([[1.0, -0.5], [0.3, 0.2], [0.0, 0.7]]))
    x = torch.tensor([[0.5, 2.0]])
    (found,) = fisher([weight], [lambda: OneRow((weight.sum() * 0).sum(), x @ weight.T)], expected=True)
    p = torch.softmax((x @ weight.T)[0].detach(), 0)
    wanted = sum(p[y] * ((torch.eye(3)[y] - p)[:, None] * x).square() for y in range(3))
    torch.testing.assert_close(found, wanted)
    with pytest.raises(ConfigError, match="no gradient reached"):
        fisher([weight], [lambda: OneRow(weight.sum(), (x @ weight.T)[:, :1])], expected=True)
    with pytest.raises(ConfigError, match="Use observed"):
        fisher([weight], [lambda: OneRow(weight.sum())], expected=True)


@pytest.mark.acid("fish_mask", 3)
def test_looking_leaves_no_trace_and_nothing_outside_the_mask_moves():
    tuned, made = prepared()
    before = {n: t.clone() for n, t in tuned.model.state_dict().items()}
    generator = torch.get_rng_state()
    first = {k: u.mask for k, u in tuned.tuning().unfrozen.items() if u.mask is not None}
    made.prepare(tuned, [one_by_one(tuned.model, inputs(tuned.model, seed=1))])
    assert all(torch.equal(t, before[n]) for n, t in tuned.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(tuned.tuning().unfrozen[k].mask, m) for k, m in first.items())
    train(tuned, 3, decay=0.1)
    for unfrozen in tuned.tuning().unfrozen.values():
        if unfrozen.mask is not None:
            assert torch.equal(unfrozen.value[~unfrozen.mask], unfrozen.original[~unfrozen.mask])


def test_a_run_scores_rows_one_by_one_and_no_more_than_asked_for(tmp_path, monkeypatch):
    seen, inner = [], OneRow.__new__

    def counted(cls, loss, logits=None, labels=None):
        seen.append(None if logits is None else tuple(logits.shape))
        return inner(cls, loss, logits, labels)

    monkeypatch.setattr(OneRow, "__new__", counted)
    heard = Heard()
    run(little_spec(tmp_path, "fish_mask", settings={"share": 0.2, "rows": 11}, steps=1), listener=heard)
    assert seen == [(1, 3)] * 11
    assert "fish_mask looks at the data first" in heard.text


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"share": 1e-3}, "less than the head's"), ({"share": 0.0}, "keeps none"), ({"share": 1.0}, "Use full")],
)
def test_budgets_that_leave_nothing_or_everything_are_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        attach(tiny("bert"), "fish_mask", **settings)


ANEW = {"share": 0.2, "rows": 8, "refresh_every": 4}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(t, second[n]) for n, t in first.items())


def stored(folder):
    """What a run's tuning holds, by name."""
    (path,) = (folder / "tuning").glob("*.safetensors")
    return load_file(path)


@pytest.mark.acid("fish_mask", 5)
def test_chosen_anew_as_many_move_at_a_time_and_all_supports_together_are_stored(tmp_path, monkeypatch):
    """The second and third mask differ from the first; what left the mask keeps what it has learnt."""
    seen, inner = [], FishMask.prepare

    def watched(self, tuned, batches):
        before = [u.value.clone() for u in own_unfrozen(self, tuned)]
        inner(self, tuned, batches)
        after = own_unfrozen(self, tuned)
        assert all(torch.equal(u.value, b) for u, b in zip(after, before, strict=True))
        assert tuned.n_trained() == self.n_params(tuned.anatomy)
        seen.append([(u.moving.clone(), u.value.clone(), u) for u in after])

    monkeypatch.setattr(FishMask, "prepare", watched)
    changes = {"optim": OptimSpec(lr=3e-3, weight_decay=0.1)}
    run(little_spec(tmp_path, "fish_mask", settings=ANEW, **changes))
    assert len(seen) == 3, "before steps 1, 5 and 9"
    left = moved = 0
    for tensor in zip(*seen, strict=True):
        (first, *_), (second, at_second, _), (third, at_third, unfrozen) = tensor
        still = (first | second) & ~third
        assert torch.equal(unfrozen.value[still], at_third[still]), "what the third mask leaves out lies still"
        only_first = first & ~second
        assert torch.equal(at_third[only_first], at_second[only_first])
        left += int((at_second[only_first] != unfrozen.original[only_first]).sum())
        union = first | second | third
        assert torch.equal(unfrozen.mask, union)
        assert torch.equal(unfrozen.value[~union], unfrozen.original[~union])
        moved += int((unfrozen.value[third & ~first & ~second] != unfrozen.original[third & ~first & ~second]).sum())
    assert left > 100 and moved > 100, "entries left the mask with what they had learnt, and others came"
    union = sum(int(u.mask.sum()) for _, _, u in seen[-1])
    assert union == sum(t.numel() for n, t in stored(tmp_path / "run").items() if n.endswith("|values"))


@pytest.mark.acid("fish_mask", 5)
def test_never_chosen_anew_it_is_the_plain_one_and_stopped_anywhere_it_ends_at_the_same_bits(tmp_path, monkeypatch):
    def ended(name, **settings):
        return little_spec(
            tmp_path, "fish_mask", settings={"share": 0.2, "rows": 4, **settings}, steps=5, out=str(tmp_path / name)
        )

    def stopped():
        raise StopRequested(15)

    for name, every in (("plain", 0), ("late", 5), ("anew", 2)):
        run(ended(name, refresh_every=every))
    ends = {n: stored(tmp_path / n) for n in ("plain", "late", "anew")}
    assert equal(ends["plain"], ends["late"]) and not equal(ends["plain"], ends["anew"])
    with monkeypatch.context() as patch:
        at_call(patch, Loop, "_gradient_norm", 5, stopped)  # the second new mask is chosen, its step is not made
        with pytest.raises(Interrupted):
            run(ended("stopped", refresh_every=2))
    resume(tmp_path / "stopped")
    assert run_digests(tmp_path / "stopped") == run_digests(tmp_path / "anew")


def test_another_trainer_has_no_rows_to_choose_by():
    tuned = attach(tiny("bert"), "fish_mask", share=0.1, refresh_every=3)
    optimiser = torch.optim.SGD(tuned.trained().values(), lr=0.1)
    with pytest.raises(ConfigError, match="prepare every 3 steps"):
        optimiser.step()
    with pytest.raises(ConfigError, match="looks at the rows every 3 steps"):
        HooksCallback(tuned).on_train_begin(None, None, None)


def test_without_a_row_and_without_a_mask_it_refuses():
    made = FishMask(share=0.1)
    tuned = attach(tiny("bert"), made)
    with pytest.raises(ConfigError, match="no batch to score"):
        made.prepare(tuned, [])
    with pytest.raises(ConfigError, match="mask was never chosen"):
        train(tuned, 1)
    assert math.isfinite(made.n_params(tuned.anatomy))
