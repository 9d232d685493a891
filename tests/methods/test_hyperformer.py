"""HyperFormer and HyperFormer++: the acid tests of their paper, beside those that every method passes."""

import copy

import pytest
import torch
from methods.checks import counted, logits, stir
from tiny import inputs, tiny

from luthier.core import ModelError
from luthier.methods.additive.hyperformer import Written
from luthier.surgery import attach, load, method

SMALL = {"tasks": 3, "reduction": 8, "embedding": 5, "hidden": 7, "mixed": 6}
NAMES = ["hyperformer", "hyperformer_pp"]


def tuned_with(name, arch="bert", task="", **more):
    tuned = attach(tiny(arch, task), name, **{**SMALL, **more})
    stir(tuned)
    tuned.model.eval()
    return tuned


@pytest.mark.acid("hyperformer_pp", 2)
@pytest.mark.parametrize(("name", "numbers"), [("hyperformer", 5_120_624), ("hyperformer_pp", 2_581_464)])
def test_its_numbers_on_bert_base_are_those_of_the_paper(name, numbers):
    assert counted(name, tasks=8, train_norms=False) == numbers + 8 * 64
    assert counted(name, tasks=9, train_norms=False) - counted(name, tasks=8, train_norms=False) == 64


@pytest.mark.acid("hyperformer_pp", 4)
def test_a_layer_more_costs_one_vector():
    counts = []
    for layers in (3, 4):
        model = tiny("bert", num_hidden_layers=layers)
        counts.append(attach(model, "hyperformer_pp", **SMALL, train_norms=False).n_trained())
    assert counts[1] - counts[0] == SMALL["embedding"]


@pytest.mark.acid("hyperformer", 1)
@pytest.mark.acid("hyperformer_pp", 1)
@pytest.mark.parametrize("name", NAMES)
def test_written_out_as_plain_adapters_it_computes_the_same(name):
    tuned = tuned_with(name)
    model = tuned.model
    batch = inputs(model) | {"row_task": torch.tensor([2, 2, 2])}
    wanted = logits(model, batch)
    for module in tuned.modules(Written).values():
        with torch.no_grad():
            own = {n: v[0].clone() for n, v in module.adapters(torch.tensor([2])).items()}

        def after(x, y, own=own):
            hidden = torch.nn.functional.gelu(y @ own["down"].T + own["down_bias"])
            wide = hidden @ own["up"].T + own["up_bias"]
            spread = (wide.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            return y + own["scale"] * (wide - wide.mean(-1, keepdim=True)) / spread + own["shift"]

        module.after = after
    torch.testing.assert_close(logits(model, batch), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.acid("hyperformer", 2)
@pytest.mark.acid("hyperformer_pp", 3)
@pytest.mark.parametrize("name", NAMES)
def test_a_loss_on_one_task_moves_no_other_tasks_vector_and_the_shared_networks(name):
    tuned = tuned_with(name)
    tuned.model(**inputs(tuned.model), row_task=torch.tensor([1, 1, 1])).loss.backward()
    gradients = {n: p.grad for n, p in tuned.trained().items()}
    tasks = gradients["tasks.weight"]
    assert tasks[1].any()
    assert not tasks[0].any()
    assert not tasks[2].any()
    assert gradients["writer.mix.0.weight"].any()


@pytest.mark.acid("hyperformer", 3)
@pytest.mark.acid("hyperformer_pp", 5)
@pytest.mark.parametrize("name", ["hyperformer", "hyperformer_pp"])
def test_swapped_tasks_give_swapped_answers(name):
    tuned = tuned_with(name)
    batch = inputs(tuned.model)
    one = {k: v[:1].repeat(2, *[1] * (v.dim() - 1)) for k, v in batch.items()}
    found = logits(tuned.model, one | {"row_task": torch.tensor([0, 2])})
    swapped = logits(tuned.model, one | {"row_task": torch.tensor([2, 0])})
    assert (found[0] - found[1]).abs().max() > 1e-4
    torch.testing.assert_close(found.flip(0), swapped)


@pytest.mark.parametrize("arch", ["bert", "llama", "t5"])
def test_in_a_mixed_batch_each_row_answers_as_it_does_alone(arch):
    tuned = tuned_with("hyperformer_pp", arch)
    batch = inputs(tuned.model, padded=False) | {"row_task": torch.tensor([2, 0, 1])}
    together = logits(tuned.model, batch)
    for i in range(3):
        alone = logits(tuned.model, {k: v[i : i + 1] for k, v in batch.items()})
        torch.testing.assert_close(together[i], alone[0], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("arch", ["llama", "t5"])
@pytest.mark.parametrize("beams", [1, 2])
def test_beams_are_of_the_task_of_their_row(arch, beams):
    tuned = tuned_with("hyperformer", arch)
    batch = inputs(tuned.model, padded=False)
    given = {k: batch[k] for k in ("input_ids", "attention_mask")} | {"row_task": torch.tensor([2, 0, 1])}
    asked = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "eos_token_id": None}
    together = tuned.model.generate(**given, **asked)
    for i in range(3):
        alone = tuned.model.generate(**{k: v[i : i + 1] for k, v in given.items()}, **asked)
        assert torch.equal(together[i], alone[0])
    assert torch.equal(together, tuned.model.generate(**given, **asked, use_cache=False))


def test_rows_of_several_tunings_and_tasks_answer_as_each_does_alone(tmp_path):
    model = tiny("bert")
    first, second = (attach(copy.deepcopy(model), "hyperformer", seed=s, **SMALL, train_norms=False) for s in (0, 1))
    for seed, tuned in enumerate((first, second)):
        stir(tuned, seed=seed)
        tuned.save(tmp_path / str(seed))
    load(model, tmp_path / "0", name="a")
    tuned = load(model, tmp_path / "1", name="b")
    batch = inputs(model, batch=4, padded=False) | {"row_task": torch.tensor([2, 0, 0, 1])}
    names = ["a", "b", None, "b"]
    with tuned.rows(names):
        found = logits(model, batch)
    for i, name in enumerate(names):
        tuned.activate(*[name] if name else [])
        alone = logits(model, {k: v[i : i + 1] for k, v in batch.items()})
        torch.testing.assert_close(found[i], alone[0], rtol=1e-4, atol=2e-5)


def test_a_batch_that_does_not_say_its_tasks_is_refused_and_one_that_says_wrong_ones():
    tuned = tuned_with("hyperformer", "llama")
    model, batch = tuned.model, inputs(tuned.model)
    with pytest.raises(ModelError, match=r"keeps numbers for 3 tasks, .* Give row_task=\[\.\.\.\], a whole number"):
        logits(model, batch)
    with pytest.raises(ModelError, match=r"knows the tasks 0 to 2, and the batch has 0 to 3"):
        logits(model, batch | {"row_task": torch.tensor([0, 1, 3])})
    with pytest.raises(ModelError, match=r"row_task: 2 numbers for a batch of 3 rows"):
        logits(model, batch | {"row_task": torch.tensor([0, 1])})
    with pytest.raises(ModelError, match=r"wants one whole number for each row"):
        logits(model, batch | {"row_task": torch.tensor([0.5, 1.0, 1.0])})
    with pytest.raises(ModelError, match=r"this batch does not say which task"):
        model.generate(batch["input_ids"], max_new_tokens=2)
    with tuned.base_only():  # what does not act needs to know nothing
        logits(model, batch)
    logits(model, batch | {"row_task": [0, 1, 2]})


def test_one_task_needs_no_ids():
    assert method("hyperformer").values_of("task") == 1
    assert torch.isfinite(logits(tuned_with("hyperformer", tasks=1).model)).all()


@pytest.mark.parametrize("name", NAMES)
def test_norms_that_train_are_counted(name):
    bare = attach(tiny("bert"), name, **SMALL, train_norms=False).n_trained()
    found = attach(tiny("bert"), name, **SMALL)
    norms = sum(u.parameter.numel() for key, u in found.tuning().unfrozen.items() if not key.startswith("head/"))
    assert norms > 0 and found.n_trained() == bare + norms == method(name, SMALL).n_params(found.anatomy)
