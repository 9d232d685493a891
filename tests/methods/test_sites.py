"""Every method with a choice of places takes the same words for it, and its count follows."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from cells import logits, shake
from tiny import inputs, tiny

from luthier.anatomy import Anatomy
from luthier.core import AnatomyError, ConfigError
from luthier.runs.spec import RunSpec
from luthier.surgery import METHODS, attach, compose, from_peft, load, to_peft

D, M, LAYERS = 48, 80, 3

# (method, settings, trained numbers in tiny BERT by hand)
CELLS: list[tuple[str, dict[str, Any], int]] = [
    ("lora", {"sites": "attn.q@0,2", "rank": 3}, 2 * 3 * 2 * D),
    ("lora", {"sites": "*@last1", "rank": 2}, 4 * 2 * 2 * D + 2 * 2 * (D + M)),
    ("lora", {"sites": "attn.q", "rank": "3, attn.q@0: 5"}, (5 + 3 + 3) * 2 * D),
    ("lora", {"sites": "attn.q", "rank": {"default": 3, "attn.q@last2": 5}}, (3 + 5 + 5) * 2 * D),
    ("dora", {"sites": "attn.v@0-1", "rank": "2, attn.v@1: 4"}, (2 + 4) * 2 * D + 2 * D),
    ("adalora", {"sites": "ffn@1", "rank": 4, "target_rank": 2}, 2 * 4 * (D + M + 1)),
    ("ia3", {"outputs": "attn.k@1,2", "inputs": "ffn.down@first1"}, 2 * D + M),
    ("bitfit", {"sites": "attn.q@last1, ffn.up@0"}, D + M),
    ("bitfit", {"sites": "*@0"}, 4 * D + M + D + 2 * D),
    ("parallel_adapter", {"sites": "ffn_out@last2", "width": 5}, 2 * (2 * D * 5 + 5 + D)),
    ("parallel_adapter", {"sites": "*@0", "width": 5}, 2 * (2 * D * 5 + 5 + D)),
    ("sequential_adapter", {"sites": "ffn_out@1", "width": 5, "train_norms": False}, 2 * D * 5 + 5 + D),
    ("sequential_adapter", {"sites": "ffn_out@1", "width": 5}, 2 * D * 5 + 5 + D + 4 * D),
    ("adamix", {"sites": "ffn_out@last1", "width": 5, "experts": 2}, 2 * (D * 5 + 5) + 5 * D + D),
]


@pytest.mark.parametrize(("name", "settings", "count"), CELLS)
def test_the_count_follows_the_choice_and_is_what_trains(name: str, settings: dict[str, Any], count: int) -> None:
    model = tiny("bert")
    method = compose.method(name, settings)
    assert method.n_params(Anatomy.read(model)) == count
    tuned = attach(model, method)
    assert tuned.n_trained() == count


@pytest.mark.parametrize(("name", "settings", "count"), CELLS)
def test_settings_come_back_from_their_plain_form(name: str, settings: dict[str, Any], count: int) -> None:
    method = compose.method(name, settings)
    again = compose.method(name, method.settings())
    assert again == method and again.n_params(Anatomy.read(tiny("bert"))) == count
    spec = RunSpec.from_plain({"model": "m", "data": {"source": "d"}, "method": name, "settings": settings})
    assert compose.method(name, spec.settings) == method


# peft asks transformers a question by its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["lora", "dora"])
def test_a_tuning_with_ranks_by_site_computes_the_same_saved_merged_and_in_peft(name: str, tmp_path: Path) -> None:
    settings = {"sites": "attn.q, attn.v, ffn.up@1", "rank": "2, attn.q: 3, *@last1: 5", "alpha": "7, attn.v@0: 9"}
    model = tiny("bert")
    tuned = attach(model, name, **settings)
    shake(tuned)
    model.eval()
    batch = inputs(model)
    ours = logits(model, batch)
    assert {key: len(m.a) for key, m in tuned.modules().items()} == {
        "attn.q@0": 3, "attn.q@1": 3, "attn.q@2": 5, "attn.v@0": 2, "attn.v@1": 2, "attn.v@2": 5, "ffn.up@1": 2,
    }  # fmt: skip
    tuned.save(tmp_path / "tuning")
    torch.testing.assert_close(logits(load(tiny("bert"), tmp_path / "tuning").model.eval(), batch), ours)
    to_peft(tuned, tmp_path / "peft")
    theirs = peft.PeftModel.from_pretrained(tiny("bert"), str(tmp_path / "peft")).eval()
    torch.testing.assert_close(logits(theirs, batch), ours, rtol=1e-5, atol=1e-5)
    again = from_peft(tiny("bert"), tmp_path / "peft")
    torch.testing.assert_close(logits(again.model.eval(), batch), ours)
    assert {k: len(m.a) for k, m in again.modules().items()} == {k: len(m.a) for k, m in tuned.modules().items()}
    tuned.merge()
    torch.testing.assert_close(logits(model, batch), ours, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_layers_and_patterns_that_peft_wrote_are_read(tmp_path: Path) -> None:
    facts = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=["query", "value"], layers_to_transform=[0, 2], init_lora_weights=False,
        rank_pattern={"layer.2.attention.self.query": 5}, alpha_pattern={"value": 9},
    )  # fmt: skip
    theirs = peft.get_peft_model(tiny("bert"), facts).eval()
    theirs.save_pretrained(str(tmp_path / "peft"))
    ours = from_peft(tiny("bert"), tmp_path / "peft")
    ranks = {key: len(m.a) for key, m in ours.modules().items()}
    assert ranks == {"attn.q@0": 3, "attn.v@0": 3, "attn.q@2": 5, "attn.v@2": 3}
    batch = inputs(ours.model)
    torch.testing.assert_close(logits(ours.model.eval(), batch), logits(theirs, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings", "error", "says"),
    [
        ("lora", {"sites": "attn.q@7"}, AnatomyError, "lora.sites: 'attn.q@7'"),
        ("lora", {"sites": "attn.q@2-0"}, ConfigError, "counts down"),
        ("lora", {"rank": "8, attn.o: 3"}, AnatomyError, "lora.rank: 'attn.o'"),
        ("lora", {"rank": "8, attn.q: 0"}, ConfigError, "lora.rank: must be at least 1, got 0"),
        ("ia3", {"outputs": "attn.k@9"}, AnatomyError, "ia3.outputs: 'attn.k@9'"),
        ("bitfit", {"sites": "attn.q", "subset": True}, ConfigError, "Give one"),
        ("sequential_adapter", {"sites": "attn.q"}, AnatomyError, "attn.q@0 is not what a sublayer gives"),
        ("adamix", {"form": "adapter", "sites": "norm"}, AnatomyError, "adamix.sites: norm@0.0 is not what a sublayer"),
        ("propetl", {"form": "adapter", "sites": "embed"}, AnatomyError, "propetl.sites: embed is not what a sublayer"),
        ("krona_b_res", {"sites": "attn.q"}, AnatomyError, "krona_b_res.sites: attn.q@0 is not what a sublayer gives"),
        ("adamix", {"sites": "ffn_out@5"}, AnatomyError, "adamix.sites"),
    ],
)
def test_a_choice_that_cannot_be_is_refused_by_its_setting(
    name: str, settings: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error) as raised:
        compose.method(name, settings).n_params(Anatomy.read(tiny("bert")))
    assert says in str(raised.value)


def test_keys_of_cross_attention_follow_the_decoders_layers_alone() -> None:
    anatomy = Anatomy.read(tiny("t5"))
    method = compose.method("ia3", {"outputs": "attn.k@encoder.0", "inputs": "ffn.down@encoder.0"})
    one = method.n_params(anatomy)
    both = compose.method("ia3", {"outputs": "attn.k@0", "inputs": "ffn.down@encoder.0"}).n_params(anatomy)
    width = anatomy.sites("attn.k@decoder.0")[0].d_out
    assert both - one == 2 * width, "its own keys and those of cross-attention"


SITED = [
    (name, setting.name)
    for name in METHODS.names()
    for setting in METHODS.card(name).settings
    if setting.name in ("sites", "inputs", "outputs") and name != "adapter_soup"  # its places are those of its sources
]


@pytest.mark.parametrize(("name", "field"), SITED)
def test_a_place_that_the_model_lacks_is_refused_by_the_setting_that_named_it(name: str, field: str) -> None:
    with pytest.raises(AnatomyError) as refused:
        compose.method(name, {field: "cross.q"}).n_params(Anatomy.read(tiny("bert")))
    who, _, said = str(refused.value).partition(": ")
    assert said.startswith("this bert model has no site 'cross.q'.")
    named, _, setting = who.partition(".")
    assert setting == field and name.startswith(named)  # krona_b_res has its places from krona_b


@pytest.mark.parametrize(
    ("name", "settings", "kinds"),
    [
        ("adamix", {"form": "adapter"}, {"attn_out", "ffn_out"}),
        ("adamix", {"form": "lora"}, {"attn.q", "attn.k", "attn.v", "attn.o", "ffn.up", "ffn.down"}),
        ("threshold_mask", {}, {"attn.q", "attn.k", "attn.v", "attn.o", "ffn.up", "ffn.down"}),
        ("parallel_adapter", {}, {"attn_out", "ffn_out"}),
    ],
)
def test_a_star_means_the_places_of_the_methods_own_kind(name: str, settings: dict[str, Any], kinds: set[str]) -> None:
    anatomy = Anatomy.read(tiny("bert"))
    every = compose.method(name, {**settings, "sites": "*"}).n_params(anatomy)
    assert every == compose.method(name, {**settings, "sites": ", ".join(sorted(kinds))}).n_params(anatomy) > 0


@pytest.mark.parametrize("name", ["lora", "beft", "hira", "deft"])
def test_a_method_of_projections_without_a_site_says_that_none_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}\.sites: none are named"):
        attach(tiny("bert"), name, sites=())


def test_beft_trains_a_bias_at_every_value_without_decay_and_merges_where_there_was_none() -> None:
    model = tiny("llama")
    tuned = attach(model, "beft")
    assert tuned.n_trained() == sum(s.d_out for s in tuned.anatomy.sites("attn.v", asked_by="test"))
    (group,) = tuned.tuning().method.groups(tuned)
    assert set(group.names) == {*tuned.trained()} and group.weight_decay == 0.0
    shake(tuned)
    model.eval()
    before = logits(model, inputs(model))
    tuned.merge()
    torch.testing.assert_close(logits(model, inputs(model)), before, rtol=1e-4, atol=1e-4)
