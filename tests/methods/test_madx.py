"""MAD-X: the acid tests of its paper, beside those that every method passes."""

import pytest
import torch
from methods.checks import attach_double, counted, logits, read_by, stir
from tiny import inputs, tiny

from luthier.core import ConfigError
from luthier.methods.additive.madx import Coupling
from luthier.surgery import attach, load

SMALL = {"language_reduction": 4}


def language(folder, seed, arch="bert"):
    tuned = attach(tiny(arch), "madx", seed=seed, train_head=False, **SMALL)
    stir(tuned, seed=seed)
    tuned.save(folder / f"language-{seed}")
    return folder / f"language-{seed}"


def test_its_numbers_on_bert_base_are_those_of_the_paper():
    assert counted("madx") == 7_387_776
    assert counted("madx", invertible=False) == 7_091_712
    assert counted("madx", part="task", language_reduction=2) == 894_528


@pytest.mark.acid("madx", 1, 4)
@pytest.mark.parametrize("d", [8, 9])
def test_the_map_is_undone_exactly_in_the_right_order(d):
    coupling = Coupling(d)
    with torch.no_grad():
        for parameter in coupling.parameters():
            parameter.normal_()
    x = torch.randn(3, 5, d)
    y = coupling(x)
    assert (y - x).abs().max() > 0.1
    torch.testing.assert_close(coupling.inverse(y), x, rtol=1e-5, atol=1e-5)
    one, two = x[..., : d // 2], x[..., d // 2 :]
    first = one + coupling.f(two)
    torch.testing.assert_close(y, torch.cat([first, two + coupling.g(first)], -1))


@pytest.mark.acid("madx", 2)
def test_another_language_gives_other_answers_and_leaves_the_task_as_it_was(tmp_path):
    first, second = language(tmp_path, 0), language(tmp_path, 1)
    model = tiny("bert")
    tuned = attach(model, "madx", part="task", sources=[first])
    stir(tuned, seed=5)
    tuned.save(tmp_path / "task")
    swapped = tiny("bert")
    other = attach(swapped, "madx", part="task", sources=[tmp_path / "task", second])
    assert (logits(swapped) - logits(model)).abs().max() > 1e-3
    mine, theirs = tuned.trained(), other.trained()
    assert mine.keys() == theirs.keys()
    task = [n for n in mine if ".task." in n]
    assert len(task) == 3 * 4
    assert all(torch.equal(mine[n], theirs[n]) for n in task)
    again = load(tiny("bert"), tmp_path / "task")  # it needs its language no more
    assert torch.equal(logits(again.model), logits(model))


@pytest.mark.acid("madx", 3)
def test_each_part_trains_its_own_numbers_alone(tmp_path):
    alone = attach(tiny("bert"), "madx", train_head=False, **SMALL).trained()
    assert all(".language." in n or n.startswith("invertible.") for n in alone)
    assert any(n.startswith("invertible.") for n in alone)
    task = attach(tiny("bert"), "madx", part="task", train_head=False, sources=[language(tmp_path, 0)]).trained()
    assert all(".task." in n for n in task)


def test_the_map_acts_behind_the_norm_of_the_embeddings_and_is_undone_before_the_output_words():
    for arch, behind in (("bert", "bert.embeddings.LayerNorm"), ("gpt2", "transformer.wte")):
        tuned = attach_double(arch, "madx", **SMALL)
        stir(tuned)
        coupling = tuned.modules(Coupling)["invertible"]
        layer = tuned.model.get_submodule(behind)
        seen = []
        layer.register_forward_hook(lambda m, a, out, seen=seen: seen.append((a[0], out)))
        logits(tuned.model)
        read, given = seen[0]
        torch.testing.assert_close(given, coupling(layer.base(read)).detach())
    head, states = tuned.model.lm_head, read_by(tuned.model.lm_head, tuned.model)
    scored = torch.nn.functional.linear(coupling.inverse(states), head.weight).detach()
    torch.testing.assert_close(logits(tuned.model), scored)


def test_it_stands_beside_a_prompt():
    tuned = attach(tiny("gpt2"), "madx+prompt_tuning", **{"madx.language_reduction": 4, "prompt_tuning.length": 3})
    stir(tuned, 0.1)
    found, embed = [], tuned.model.transformer.wte
    embed.register_forward_hook(lambda m, a, out: found.append(out.detach()))
    logits(tuned.model, inputs(tuned.model))
    coupling = tuned.modules(Coupling)["madx:invertible"]
    words = embed.base(inputs(tuned.model)["input_ids"])
    torch.testing.assert_close(found[0], coupling(words).detach())


def test_a_task_without_a_language_and_a_language_with_a_source_are_refused(tmp_path):
    place = language(tmp_path, 0)
    with pytest.raises(ConfigError, match="madx: part=task stands on a language"):
        attach(tiny("bert"), "madx", part="task")
    with pytest.raises(ConfigError, match=r"part=language is made of nothing, .* Did you mean part=task"):
        attach(tiny("bert"), "madx", sources=[place])
    with pytest.raises(ConfigError, match=r"language_reduction=8, and .* with language_reduction=4"):
        attach(tiny("bert"), "madx", part="task", language_reduction=8, sources=[place])
    with pytest.raises(ConfigError, match=r"invertible=False, and .* with invertible=True"):
        attach(tiny("bert"), "madx", part="task", invertible=False, sources=[place])
