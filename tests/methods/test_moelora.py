"""MOELoRA: the acid tests of its paper, beside those that every method passes."""

import pytest
import torch
from methods.checks import counted, logits, stir
from tiny import inputs, tiny

from luthier.core import AnatomyError, ConfigError, ModelError
from luthier.methods.reparameterised.moelora import Mixed
from luthier.surgery import attach

SMALL = {"tasks": 3, "rank": 6, "experts": 2, "width": 5}


def test_its_count_is_that_of_the_catalogue() -> None:
    assert counted("moelora", tasks=5) == 589_824 + 64 * (8 + 5)


@pytest.mark.acid("moelora", 1)
@pytest.mark.parametrize("arch", ["bert", "llama", "t5"])
def test_merged_for_a_task_it_is_that_tasks_and_no_others(arch: str) -> None:
    tuned = attach(tiny(arch), "moelora", **SMALL, train_head=False)
    stir(tuned, 0.5)
    batch = inputs(tuned.model)
    rows = len(batch["input_ids"])
    routed = {j: logits(tuned.model, batch | {"row_task": torch.full((rows,), j)}) for j in (1, 2)}
    merged = tiny(arch)
    paths = {s.key: s.path for s in tuned.anatomy.all_sites}
    with torch.no_grad():
        for key, module in tuned.modules(Mixed).items():
            weights = module.weights(torch.tensor([1]))[0]
            merged.get_submodule(paths[key]).weight += module.scale * (module.b * weights) @ module.a
    torch.testing.assert_close(logits(merged, batch), routed[1], rtol=1e-4, atol=1e-5)
    assert (routed[1] - routed[2]).abs().max() > 1e-3


@pytest.mark.acid("moelora", 2)
def test_with_one_expert_it_is_lora() -> None:
    ours = attach(tiny("bert"), "moelora", tasks=2, rank=3, experts=1, alpha=7.0, train_head=False)
    lora = attach(tiny("bert"), "lora", rank=3, alpha=7.0, train_head=False)
    stir(ours, 0.5)
    with torch.no_grad():
        for key, module in ours.modules(Mixed).items():
            lora.modules()[key].a.copy_(module.a)
            lora.modules()[key].b.copy_(module.b)
    batch = inputs(ours.model)
    tasks = {"row_task": torch.tensor([0, 1, 0])}
    torch.testing.assert_close(logits(ours.model, batch | tasks), logits(lora.model, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.acid("moelora", 3)
@pytest.mark.parametrize("arch", ["bert", "llama", "t5"])
def test_in_a_mixed_batch_each_row_answers_as_it_does_alone(arch: str) -> None:
    tuned = attach(tiny(arch), "moelora", **SMALL, train_head=False)
    stir(tuned, 0.5)
    batch = inputs(tuned.model, padded=False) | {"row_task": torch.tensor([2, 0, 1])}
    together = logits(tuned.model, batch)
    for i in range(3):
        alone = logits(tuned.model, {k: v[i : i + 1] for k, v in batch.items()})
        torch.testing.assert_close(together[i], alone[0], rtol=1e-4, atol=2e-5)


@pytest.mark.acid("moelora", 4)
def test_two_tasks_that_conflict_are_both_learnt_where_one_lora_learns_neither() -> None:
    losses = {}
    for method, settings in (("moelora", SMALL | {"tasks": 2}), ("lora", {"rank": 6})):
        tuned = attach(tiny("bert"), method, **settings, train_head=False)
        one = {k: v[:1].repeat(2, *[1] * (v.dim() - 1)) for k, v in inputs(tuned.model).items()}
        one["labels"] = torch.tensor([0, 1])  # the same text twice, with another answer for each task
        facts = {"row_task": torch.tensor([0, 1])} if method == "moelora" else {}
        step = torch.optim.Adam(tuned.trained().values(), lr=2e-2)
        tuned.calls_hooks = True
        for _ in range(60):
            loss = tuned.model.eval()(**one, **facts).loss
            step.zero_grad()
            loss.backward()
            step.step()
        losses[method] = loss.item()
    assert losses["moelora"] < 0.3
    assert losses["lora"] > 0.68, "two answers to one question cost at least ln 2"


def test_an_expert_count_that_does_not_divide_and_rows_without_a_task_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"moelora.experts: 4 does not divide the rank 6"):
        attach(tiny("bert"), "moelora", rank=6, experts=4)
    tuned = attach(tiny("bert"), "moelora", **SMALL)
    with pytest.raises(ModelError, match="row_task"):
        tuned.model(**inputs(tuned.model))


@pytest.mark.parametrize("kind", ["moelora", "poly"])
def test_where_queries_and_keys_also_read_distances_only_the_values_have_rows(kind: str) -> None:
    settings = {"tasks": 2, "rank": 8, "train_head": False}
    with pytest.raises(AnatomyError, match=r"attn\.q@0 of a deberta-v2 model also projects the distances"):
        attach(tiny("deberta-v2"), kind, **settings)
    with pytest.raises(AnatomyError, match="is an expert"):
        attach(tiny("mixtral"), kind, **settings, sites=("*",))
    tuned = attach(tiny("deberta-v2"), kind, **settings, sites=("attn.v",))
    stir(tuned, 0.5)
    batch = inputs(tuned.model) | {"row_task": torch.tensor([0, 1, 1])}
    together = logits(tuned.model, batch)
    for i in range(3):
        alone = logits(tuned.model, {name: value[i : i + 1] for name, value in batch.items()})
        torch.testing.assert_close(together[i], alone[0], rtol=1e-4, atol=2e-5)
