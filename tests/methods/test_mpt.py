"""MPT: the acid tests of its paper, beside those that every method passes."""

import pytest
import torch
from methods.checks import counted, logits, stir
from methods.saved import saved
from tiny import inputs, tiny

from luthier.core import ConfigError, ModelError
from luthier.methods.additive.mpt import TaskPrompts, _with_states
from luthier.surgery import attach, load, open_source
from luthier.training.objective import Result


def prompts(tuned):
    return tuned.modules(TaskPrompts)["prompt"]


@pytest.mark.parametrize(("tasks", "numbers"), [(1, 77_668), (6, 82_008)])
def test_its_numbers_on_bert_base_are_those_of_the_paper(tasks, numbers):
    assert counted("mpt", tasks=tasks) == numbers


@pytest.mark.acid("mpt", 1)
def test_a_tasks_prompt_over_the_shared_one_has_rank_one():
    tuned = attach(tiny("bert"), "mpt", tasks=2, length=4)
    stir(tuned)
    module = prompts(tuned)
    shares = (module.of_tasks(torch.tensor([1]))[0] / module.vectors).detach().double()
    singular = torch.linalg.svdvals(shares)
    assert singular[1] < 1e-4 * singular[0]


@pytest.mark.acid("mpt", 2)
def test_a_loss_on_one_task_moves_the_shared_prompt_and_no_other_tasks_factors():
    tuned = attach(tiny("bert"), "mpt", tasks=3, length=4)
    tuned.model(**inputs(tuned.model), row_task=torch.tensor([1, 1, 1])).loss.backward()
    module = prompts(tuned)
    assert module.vectors.grad.any()
    for factor in (module.u.grad, module.v.grad):
        assert factor[1].any()
        assert not factor[0].any()
        assert not factor[2].any()


@pytest.mark.acid("mpt", 3)
def test_with_factors_of_one_it_is_prompt_tuning(tmp_path):
    place = saved(tmp_path, 0, "prompt_tuning")
    model, other = tiny("gpt2"), tiny("gpt2")
    place = saved(tmp_path / "gpt2", 0, "prompt_tuning", "gpt2")
    mine = attach(model, "mpt", sources=[place])
    plain = attach(other, "prompt_tuning", length=3)
    held = open_source(place).tensors["prompt.vectors"]
    assert torch.equal(prompts(mine).vectors.detach(), held)
    next(iter(plain.trained().values())).data.copy_(held)
    assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("arch", ["bert", "gpt2", "t5"])
def test_in_a_mixed_batch_each_row_has_its_own_tasks_prompt(arch):
    tuned = attach(tiny(arch), "mpt", tasks=3, length=3)
    stir(tuned)
    batch = inputs(tuned.model, padded=False) | {"row_task": torch.tensor([2, 0, 1])}
    together = logits(tuned.model, batch)
    for i in range(3):
        alone = logits(tuned.model, {k: v[i : i + 1] for k, v in batch.items()})
        torch.testing.assert_close(together[i], alone[0], rtol=1e-4, atol=2e-5)
    with pytest.raises(ModelError, match="mpt keeps numbers for 3 tasks"):
        logits(tuned.model)


@pytest.mark.parametrize("beams", [1, 2])
def test_beams_have_the_prompt_of_their_row(beams):
    tuned = attach(tiny("gpt2"), "mpt", tasks=3, length=3)
    stir(tuned)
    model = tuned.model.eval()
    batch = inputs(model, padded=False)
    given = {k: batch[k] for k in ("input_ids", "attention_mask")} | {"row_task": torch.tensor([2, 0, 1])}
    asked = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "eos_token_id": None}
    together = model.generate(**given, **asked)
    for i in range(3):
        assert torch.equal(together[i], model.generate(**{k: v[i : i + 1] for k, v in given.items()}, **asked)[0])
    assert torch.equal(together, model.generate(**given, **asked, use_cache=False))


@pytest.mark.acid("mpt", 4)
@pytest.mark.parametrize("arch", ["bert", "gpt2"])
def test_distilling_costs_nothing_where_the_own_prompt_is_the_teachers(arch, tmp_path):
    places = [saved(tmp_path / str(n), n, "prompt_tuning", arch) for n in range(2)]
    model = tiny(arch, "lm" if arch == "gpt2" else "")
    tuned = attach(model, "mpt", tasks=2, distil=0.9, sources=places)
    model.luthier.train()
    module, method = prompts(tuned), tuned.tuning().method
    batch = inputs(model)
    task = torch.arange(len(batch["input_ids"])) % 2

    def forward():
        out = model(**batch, row_task=task)
        return Result(out.loss, 1, out.logits, batch["labels"])

    teachers = module.teachers.clone()
    assert len(teachers) == 2 and not torch.equal(teachers[0], teachers[1])
    plain = float(forward().loss.detach())
    apart = float(method.loss(tuned, forward).loss.detach())
    assert apart > plain + 1e-4
    with torch.no_grad():
        module.vectors.copy_(teachers[0])
        module.v[1] = 1.0
        task.zero_()
    same = method.loss(tuned, forward)
    assert float(same.loss.detach()) == pytest.approx(float(forward().loss.detach()), abs=1e-6)
    assert torch.equal(module.teachers, teachers)
    with torch.no_grad():
        module.vectors.add_(torch.randn(module.vectors.shape, generator=torch.Generator().manual_seed(1)))
    moved = method.loss(tuned, forward)
    moved.loss.backward()
    assert float(moved.loss.detach()) > float(forward().loss.detach()) + 1e-6 and module.vectors.grad.any()
    tuned.finish()
    tuned.save(tmp_path / "tuning")
    model.eval()
    again = load(tiny(arch, "lm" if arch == "gpt2" else ""), tmp_path / "tuning")
    with torch.no_grad():
        assert torch.equal(again.model(**batch, row_task=task).logits, model(**batch, row_task=task).logits)


@pytest.mark.parametrize("arch", ["bert", "gpt2", "t5"])
def test_what_is_distilled_is_of_real_tokens_and_of_all_that_carry_loss(arch, tmp_path):
    places = [saved(tmp_path, 0, "prompt_tuning", arch)]
    kind = "lm" if arch == "gpt2" else ""
    model = tiny(arch, kind)
    tuned = attach(model, "mpt", tasks=1, distil=1.0, sources=places)
    stir(tuned)
    model.luthier.train()
    method, batch = tuned.tuning().method, inputs(model, padded=False)
    if arch == "gpt2":
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][:, :4] = -100

    def distilled(given, spread=False):
        def forward():
            out = model(**given)
            logits = out.logits
            if spread:  # only the token before the first answer says anything else
                logits = logits * (torch.arange(logits.shape[1]) == 3)[None, :, None]
            return Result(torch.zeros(()), 1, logits, given["labels"])

        return float(method.loss(tuned, forward).loss.detach())

    wide = dict(batch)
    for name, filler in (("input_ids", 0), ("attention_mask", 0), *([("labels", -100)] if arch == "gpt2" else ())):
        wide[name] = torch.nn.functional.pad(batch.get(name, torch.ones_like(batch["input_ids"])), (0, 3), value=filler)
    batch["attention_mask"] = wide["attention_mask"][:, :-3]
    assert distilled(wide) == pytest.approx(distilled(batch), rel=1e-4)
    states = _with_states(tuned, lambda: model(**batch))[1]
    assert states is not None and states.shape[-1] == tuned.anatomy.d
    if arch == "gpt2":
        assert distilled(batch, spread=True) > distilled({**batch, "labels": batch["labels"] * 0 - 100}, spread=True)


def test_teachers_are_as_many_as_tasks(tmp_path):
    place = saved(tmp_path, 0, "prompt_tuning")
    with pytest.raises(ConfigError, match="1 teachers for 2 tasks"):
        attach(tiny("bert"), "mpt", tasks=2, distil=0.9, sources=[place])
