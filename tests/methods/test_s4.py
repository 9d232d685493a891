"""S4: its own tests, beside those that every method passes."""

import math

import pytest
import transformers as hf
from methods.sizes import anatomy_of
from tiny import tiny

from luthier.core import AnatomyError, ConfigError
from luthier.methods.hybrid.s4 import HOLDS, S4, sizes
from luthier.methods.parts.layer_plan import cost_of
from luthier.surgery import attach, method

STEPS = {"adapter": 2 * 768 + 1, "prefix": 2 * 768, "lora": 4 * 768}


@pytest.mark.acid("s4", 1)
@pytest.mark.parametrize("layers", range(4, 81))
def test_groups_cover_the_layers_few_more_more_few(layers):
    first, second, third, last = sizes(layers)
    assert first + second + third + last == layers and min(first, second, third, last) >= 1
    assert first == last and second <= third <= second + 1
    assert first <= second or layers < 6


def test_the_count_is_that_of_the_catalogue():
    anatomy = anatomy_of("roberta")
    assert method("s4").n_params(anatomy) == 605_332
    plan = S4().plan(anatomy)
    assert [plan["", n].adapter for n in (0, 2, 6, 10)] == [16, 16, 13, 0]
    assert [plan["", n].lora for n in (0, 2, 6, 10)] == [8, 0, 0, 7]
    assert [plan["", n].prefix for n in (0, 2, 6, 10)] == [0, 16, 14, 14]


@pytest.mark.acid("s4", 2, 3)
@pytest.mark.parametrize("share", [0.002, 0.005, 0.05])
def test_layers_cost_alike_and_the_whole_stays_within_its_share(share):
    anatomy = anatomy_of("roberta")
    plan = S4(share=share).plan(anatomy)
    kinds = ("adapter", "lora", "prefix", "biases")
    costs = {k: sum(cost_of(anatomy, k, kind, getattr(here, kind)) for kind in kinds) for k, here in plan.items()}
    assert sum(costs.values()) == method("s4", {"share": share}).n_params(anatomy) <= share * anatomy.n_params
    if share == 0.005:
        assert max(costs.values()) - min(costs.values()) < max(STEPS.values())
    head = sum(math.prod(anatomy.tensors[n]) for n in anatomy.head_tensors)
    room = int(share * (anatomy.n_params - head)) // 12
    for layer, cost in costs.items():
        assert room - sum(STEPS[k] for k in STEPS if getattr(plan[layer], k)) < cost <= room


@pytest.mark.acid("s4", 4, 5)
def test_each_layer_holds_the_strategies_of_its_group_and_no_other():
    model = tiny("bert", num_hidden_layers=6)
    tuned = attach(model, "s4", share=0.1)
    rows = list(tuned.modules()["prefix"].rows)
    assert len(rows) == 5, "all but the first group"
    trained = list(tuned.trained())
    for layer, group in enumerate([0, 1, 1, 2, 2, 3] if sizes(6) == (1, 2, 2, 1) else []):
        found = {
            "adapter": f"ffn_out@{layer}.up.weight" in trained,
            "lora": f"attn.q@{layer}.a" in trained and f"attn.v@{layer}.a" in trained,
            "biases": any(f"layer.{layer}." in n and n.endswith("bias") for n in trained),
        }
        wanted = set(HOLDS[group]) - {"prefix"}
        assert {k for k, there in found.items() if there} == wanted, layer
    assert sizes(6) == (1, 2, 2, 1)


def test_without_biases_their_part_goes_to_the_others():
    plan = S4(share=0.1).plan(attach(tiny("mistral", num_hidden_layers=6), "lora").anatomy)
    assert not any(here.biases for here in plan.values())
    assert plan["", 5].prefix and plan["", 5].lora


@pytest.mark.parametrize(
    ("attends", "says"),
    [((0, 2, 3), "s4: layer 1 of this lfm2 model has no attention"), ((1, 2, 3), "s4: this lfm2 model has 'attn.q'")],
)
def test_a_layer_without_attention_is_refused_by_name(attends, says):
    kinds = ["full_attention" if n in attends else "conv" for n in range(4)]
    sizes_of_it = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2}
    given = hf.Lfm2Config(vocab_size=131, num_hidden_layers=4, layer_types=kinds, pad_token_id=0, **sizes_of_it)
    with pytest.raises(AnatomyError, match=says):
        attach(hf.Lfm2ForCausalLM(given), "s4", share=0.1)


def test_a_share_that_is_too_small_is_refused():
    with pytest.raises(ConfigError, match="Set a larger share"):
        attach(tiny("bert"), "s4", share=0.001)
