"""CoDA: the acid tests of its paper, beside those that every method passes; and blocks that are run for some tokens."""

from dataclasses import replace

import pytest
import torch
from little import little_spec
from methods.checks import attach_double, counted, logits, stir
from tiny import inputs, tiny

from luthier import train as run
from luthier.core import AnatomyError, CompositionError
from luthier.methods.additive.coda import Routed, soft_top_k
from luthier.surgery import attach
from luthier.workflow import resume
from luthier.workflow.resume_proof import run_digests

NAMES = [("bert", "classification"), ("roberta", "classification"), ("modernbert", "classification"), ("t5", "seq2seq")]


def scored(rows=5, tokens=40, k=10, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(rows, tokens, generator=draw, dtype=dtype)
    return scores, torch.full((rows,), k), torch.ones(rows, tokens, dtype=torch.bool)


def calls(tuned, batch):
    """Of each block: what it was run for, x, and what came out."""
    found = []
    modules = list(tuned.modules(Routed).values())
    for module in modules:
        around = module.around

        def watched(call, x, module=module, around=around):
            picked = []

            def told(states, pick, kept):
                out = call(states, pick, kept)
                picked.append((pick, kept, out.detach()))
                return out

            told.rest = call.rest
            out = around(told, x)
            found.append((module, x.detach(), *picked[0], out.detach()))
            return out

        module.around = watched
    logits(tuned.model, batch)
    for module in modules:
        del module.around
    return found


def test_count_is_that_of_the_catalogue():
    assert counted("coda") == 1_198_848


@pytest.mark.acid("coda", 1)
@pytest.mark.parametrize("epsilon", [0.03, 0.3, 1.0])
def test_shares_lie_between_0_and_1_and_the_solvers_agree_in_the_end(epsilon):
    scores, k, real = scored()
    exact = soft_top_k(scores, k, real, epsilon, "exact")
    assert ((exact.sum(-1) - k).abs() < 1e-6).all() and exact.min() >= 0 and exact.max() <= 1
    few = soft_top_k(scores, k, real, epsilon, "iterative")
    assert few.min() >= 0 and few.max() <= 1 and (few.sum(-1) - k <= 1e-9).all()
    top = scores.topk(10).indices.sort(-1).values
    for shares in (exact, few):
        threshold = shares.gather(-1, top).amin(-1, keepdim=True)
        assert (shares > threshold + 1e-12).sum(-1).le(10).all(), "nothing outside of the best has more"
    many = soft_top_k(scores, k, real, epsilon, "iterative", steps=5000)
    torch.testing.assert_close(many, exact, rtol=0, atol=1e-6)
    hidden = real.clone()
    hidden[:, 30:] = False
    part = soft_top_k(scores, k, hidden, epsilon, "exact")
    assert not part[:, 30:].any()
    torch.testing.assert_close(part[:, :30], soft_top_k(scores[:, :30], k, hidden[:, :30], epsilon, "exact"))


@pytest.mark.acid("coda", 2)
@pytest.mark.parametrize(("name", "task"), NAMES)
def test_attention_sees_as_many_tokens_as_are_picked(name, task):
    model = tiny(name, task)
    tuned = attach(model, "coda", reduction=3, width=6)
    seen = []
    site = next(s for s in tuned.anatomy.all_sites if s.kind == "attn.q" and s.layer == 1)
    handle = tuned.edited.modules[site.path].register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1]))
    logits(model, inputs(model, padded=False))
    handle.remove()
    assert seen == [3], "of seven tokens"


@pytest.mark.acid("coda", 3)
@pytest.mark.parametrize(("name", "task"), NAMES)
def test_tokens_that_are_not_picked_have_the_adapter_alone(name, task):
    tuned = attach(tiny(name, task), "coda", reduction=2, width=6)
    stir(tuned)
    for module, x, pick, kept, _, out in calls(tuned, inputs(tuned.model)):
        outside = torch.ones(x.shape[:2], dtype=torch.bool)
        for row in range(len(x)):
            outside[row, pick[row][kept[row]]] = False
        light = x + module.up(torch.relu(module.down(x)))
        torch.testing.assert_close(out[outside], light[outside], rtol=1e-5, atol=1e-5)
        assert (out[~outside] - light[~outside]).abs().max() > 1e-3


@pytest.mark.acid("coda", 4)
@pytest.mark.parametrize("solver", ["iterative", "exact"])
def test_the_router_learns(solver):
    tuned = attach(tiny("bert"), "coda", reduction=2, width=6, solver=solver)
    tuned.model(**inputs(tuned.model)).loss.backward()
    assert all(m.router.grad.abs().max() > 0 for m in tuned.modules(Routed).values())
    scores, k, real = scored(rows=2, tokens=12, k=4)
    free = scores.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: soft_top_k(s, k, real, 1.0, "exact"), (free,))


@pytest.mark.acid("coda", 5)
@pytest.mark.parametrize(("name", "task"), NAMES)
def test_with_all_tokens_picked_it_is_a_parallel_adapter_around_the_block(name, task):
    base = tiny(name, task)
    wanted = logits(base)
    tuned = attach(tiny(name, task), "coda", reduction=1, width=6, train_head=False)
    torch.testing.assert_close(logits(tuned.model), wanted, rtol=1e-5, atol=1e-5)
    stir(tuned)
    blocks = [b.path for b in tuned.anatomy.blocks if b.stack in ("", "encoder")]
    for block, module in zip(blocks, tuned.modules(Routed).values(), strict=True):

        def beside(m, args, kwargs, out, module=module):
            x = args[0] if args else kwargs["hidden_states"]
            light = module.up(torch.relu(module.down(x)))
            return (out[0] + light, *out[1:]) if isinstance(out, tuple) else out + light

        base.get_submodule(block).register_forward_hook(beside, with_kwargs=True)
    torch.testing.assert_close(logits(tuned.model), logits(base), rtol=1e-4, atol=1e-4)


@pytest.mark.acid("coda", 6)
@pytest.mark.parametrize("solver", ["iterative", "exact"])
def test_shares_keep_the_order_of_the_scores(solver):
    scores, k, real = scored()
    shares = soft_top_k(scores, k, real, 0.5, solver)
    ordered = shares.gather(-1, scores.argsort(-1))
    assert (ordered.diff(dim=-1) >= -1e-12).all()


@pytest.mark.parametrize("name", ["bert", "modernbert", "t5"])
def test_what_is_picked_sees_what_a_shorter_text_of_those_tokens_would(name):
    """The block run for some tokens equals the block under a mask that hides the others, positions kept."""
    task = "seq2seq" if name == "t5" else "classification"
    tuned = attach_double(name, "coda", task, reduction=2, width=6)
    found = []
    modules = list(tuned.modules(Routed).values())
    for module in modules:

        def around(call, x, module=module):
            given = call.given.get("attention_mask")
            pick = torch.tensor([[0, 2, 5]]).expand(len(x), -1)
            some = call(x, pick, torch.ones(len(x), 3, dtype=torch.bool))
            hidden = torch.zeros(len(x), 1, 1, x.shape[1], dtype=torch.bool)
            hidden[..., [0, 2, 5]] = True
            shown = hidden.expand(-1, -1, x.shape[1], -1)
            if given is None or given.dtype == torch.bool:
                call.given["attention_mask"] = shown if given is None else shown & given
            else:
                call.given["attention_mask"] = given.masked_fill(~shown, torch.finfo(x.dtype).min)
            whole = call(x)
            call.given["attention_mask"] = given
            found.append((some, whole[:, [0, 2, 5]]))
            return whole

        module.around = around
    logits(tuned.model, inputs(tuned.model, padded=False))
    assert len(found) == 3
    for some, whole in found:
        torch.testing.assert_close(some, whole, rtol=1e-7, atol=1e-7)


def test_a_stopped_run_goes_on_to_the_bit(tmp_path):
    spec = replace(little_spec(tmp_path, "lora"), method="coda", settings={"width": 6}, steps=6)
    run(replace(spec, out=str(tmp_path / "whole")))
    run(replace(spec, out=str(tmp_path / "cut")), stop_at=3)
    resume(tmp_path / "cut")
    assert run_digests(tmp_path / "cut") == run_digests(tmp_path / "whole")


def test_what_it_cannot_stand_on_or_beside_is_refused():
    with pytest.raises(AnatomyError, match="would pick tokens by later ones"):
        attach(tiny("gpt2"), "coda")
    with pytest.raises(CompositionError, match="takes the calls of blocks over"):
        attach(tiny("bert"), "coda+lst")
    with pytest.raises(AnatomyError, match="which part of that belongs to which token is not known"):
        attach(tiny("deberta-v2"), "coda")
    tuned = attach(tiny("bert"), "coda", name="a", width=6, train_head=False)
    with pytest.raises(CompositionError, match="a and b both want the call of the block"):
        tuned.add("coda", name="b", train_head=False)
        tuned.activate("a", "b")
    with pytest.raises(CompositionError, match="in how blocks are called"), tuned.rows(["a", None, "a"]):
        pass


def test_the_first_token_always_goes_through_the_block():
    """A head of labels reads it; padding before it is not it."""
    for first in (True, False):
        tuned = attach(tiny("bert"), "coda", reduction=3.0, width=6, first=first)
        module = tuned.modules(Routed)["block_out@1"]
        with torch.no_grad():
            module.router.copy_(-module.router)
        picks = []
        batch = {"input_ids": torch.randint(3, 100, (4, 9)), "attention_mask": torch.ones(4, 9, dtype=torch.long)}
        batch["attention_mask"][1, :3] = 0
        real = batch["attention_mask"].bool()

        def call(x, pick, kept, picks=picks):
            picks.append((pick, kept))
            return x[torch.arange(len(x))[:, None], pick]

        module.context.masks = {"": batch["attention_mask"]}
        with torch.no_grad():
            module.router.zero_()
            module.router[0] = 1.0
            x = torch.zeros(4, 9, 48)
            x[:, :, 0] = torch.arange(9.0)  # the last tokens score highest
            module.around(call, x)
        ((pick, kept),) = picks
        chosen = [set(p[k].tolist()) for p, k in zip(pick, kept, strict=True)]
        assert all((int(r.long().argmax()) in c) == first for r, c in zip(real, chosen, strict=True))
