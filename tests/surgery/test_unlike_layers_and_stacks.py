"""Models whose layers differ from one another, or that have an image tower beside the words."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from cells import shake, small
from torch import nn
from unusual import (
    COMMON,
    UNUSUAL,
    clip,
    gemma4,
    learnt,
    llama,
    llava,
    qwen2_vl,
    qwen3_5,
    qwen3_next,
    random_model,
    seen,
    whisper,
)

from luthier.anatomy import Anatomy
from luthier.core import AnatomyError, CompositionError
from luthier.surgery import METHODS, attach, load, method


def sites(model: Any, kind: str) -> list[tuple[int | None, str]]:
    return [(s.layer, s.path.rpartition(".")[2]) for s in Anatomy.read(model).all_sites if s.kind == kind]


def test_layers_without_keys_of_their_own_have_the_sites_that_they_have_and_it_is_said() -> None:
    model = gemma4(num_kv_shared_layers=2, attention_k_eq_v=True, num_global_key_value_heads=1)
    assert [layer for layer, _ in sites(model, "attn.q")] == [0, 1, 2, 3]
    assert [layer for layer, _ in sites(model, "attn.k")] == [0, 1]
    assert [layer for layer, _ in sites(model, "attn.v")] == [0]
    assert sites(model, "ffn.down") == [(layer, "down_proj") for layer in range(4)]
    anatomy = Anatomy.read(model)
    assert anatomy.m == COMMON["intermediate_size"]
    assert anatomy.remarks == (
        "layer 1: no value projection of their own",
        "layers 2, 3: no key or value projection of their own",
    )
    assert [(a.n_kv_heads, a.d_head) for a in anatomy.attentions] == [(2, 8), (1, 16)] * 2


@pytest.mark.parametrize("build", [qwen3_next, qwen3_5])
def test_layers_with_something_else_in_the_attentions_place_keep_their_feed_forward_sites(build: Any) -> None:
    model = build()
    anatomy = Anatomy.read(model)
    assert [layer for layer, _ in sites(model, "attn.q")] == [3]
    assert [layer for layer, _ in sites(model, "ffn_out")] == [0, 1, 2, 3]
    assert [layer for layer, name in sites(model, "ffn.up")] == [0, 1, 2, 3]
    assert anatomy.pre_norm and anatomy.remarks[0].startswith("layers 0, 1, 2: Qwen3")
    assert "in place of an attention" in anatomy.remarks[0]


def test_layers_of_another_make_are_no_blocks() -> None:
    with pytest.raises(AnatomyError):
        Anatomy.read(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    assert Anatomy.read(llama()).remarks == ()


@pytest.mark.parametrize("arch", UNUSUAL)
@pytest.mark.parametrize(
    "name",
    [n if n in ("lora", "prefix_tuning", "lst") else pytest.param(n, marks=pytest.mark.slow) for n in METHODS.names()],
)
def test_every_method_trains_all_of_itself_there_or_says_early_that_it_does_not_go(
    name: str, arch: str, tmp_path: Path
) -> None:
    model, batch = UNUSUAL[arch](), seen(arch)
    names = list(model.state_dict())
    with torch.no_grad():
        base = model(**batch).logits
    try:
        tuned = attach(model, small(name))
    except AnatomyError as error:
        assert len(str(error)) > 40 and list(model.state_dict()) == names
        return
    for part in tuned.tuning().method.parts():
        if part.looks_at_data:
            part.prepare(tuned, [lambda: model(**batch, labels=batch["input_ids"]).loss] * 2)
    part = tuned.tuning().method
    if name not in ("diff_pruning", "child_tuning_d"):
        assert tuned.n_trained() == part.n_params(tuned.anatomy)
    shake(tuned)
    model.eval()
    out = model(**batch)
    assert (out.logits - base).abs().max() > 1e-4
    model.train()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    model.eval()
    still = [k for k, p in tuned.trained().items() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert (
        not still
        or arch == "qwen2_vl"
        or name in ("full", "bitfit", "adamix", "diff_pruning", "child_tuning_d")
        or (all("experts" in k for k in still))
    ), still
    tuned.finish()
    with torch.no_grad():
        served = model(**batch).logits
    tuned.save(tmp_path / "t")
    fresh = UNUSUAL[arch]()
    load(fresh, tmp_path / "t")
    with torch.no_grad():
        torch.testing.assert_close(fresh(**batch).logits, served, atol=1e-5, rtol=1e-5)


# -- several stacks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llava", "gemma3_vision"])
def test_methods_act_in_the_words_stack_and_in_the_image_tower_where_it_is_named(arch: str) -> None:
    model = UNUSUAL[arch]()
    anatomy = Anatomy.read(model)
    assert anatomy.stacks == ("vision_tower", "language_model") and anatomy.text_stack == "language_model"
    assert (anatomy.d, anatomy.max_positions) == (32, 128)
    tuned = attach(model, "lora")
    assert {k.partition("@")[2].split(".")[0] for k in tuned.trained()} == {"language_model"}
    tuned.detach()
    tuned = attach(model, "lora", sites=["attn.q@vision_tower", "attn.v@language_model"])
    assert {tuple(k.split(".")[:2]) for k in tuned.trained()} == {
        ("attn", "q@vision_tower"), ("attn", "v@language_model"),
    }  # fmt: skip


def test_a_stack_that_is_not_there_is_answered_with_those_that_are() -> None:
    with pytest.raises(AnatomyError, match=r"no stack is called 'vision'.*vision_tower, language_model"):
        attach(llava(), "lora", sites=["attn.q@vision"])
    with pytest.raises(AnatomyError, match=r"has one alone"):
        attach(llama(), "lora", sites=["attn.q@decoder"])


def test_two_towers_of_equal_right_are_both_acted_on() -> None:
    anatomy = Anatomy.read(clip())
    assert anatomy.text_stack == "" and {s.stack for s in anatomy.sites("attn.q")} == set(anatomy.stacks)


# -- prompt vectors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [whisper, qwen2_vl, gemma4])
@pytest.mark.parametrize("name", ["prompt_tuning", "lora+prompt_tuning"])
def test_prompt_vectors_are_refused_at_once_where_they_cannot_be_words(name: str, build: Any) -> None:
    model = build()
    names = list(model.state_dict())
    with pytest.raises(AnatomyError, match="Use prefix_tuning"):
        attach(model, method(name))
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("arch", ["llava", "gemma3_vision"])
def test_prompt_vectors_that_equal_words_are_those_words_in_models_that_see(arch: str) -> None:
    words, batch = torch.tensor([20, 21, 22]), seen(arch)
    longer = {**batch, "input_ids": torch.cat([words.expand(2, 3), batch["input_ids"]], 1)}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    if "token_type_ids" in batch:
        longer["token_type_ids"] = torch.cat([torch.zeros(2, 3, dtype=torch.long), batch["token_type_ids"]], 1)
    with torch.no_grad():
        wanted = UNUSUAL[arch]()(**longer).logits[:, 3:]
        model = UNUSUAL[arch]()
        tuned = attach(model, "prompt_tuning", length=3)
        next(iter(tuned.trained().values())).copy_(model.get_input_embeddings()(words))
        torch.testing.assert_close(model(**batch).logits, wanted, atol=1e-4, rtol=1e-4)
    learnt(tuned, 0.05)
    assert model.generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] >= 3


def test_a_prefix_and_prompt_vectors_do_not_stand_on_whisper_together_but_a_prefix_alone_learns() -> None:
    model = whisper()
    tuned = attach(model, "prefix_tuning", length=3)
    ids = torch.randint(4, 120, (2, 6), generator=torch.Generator().manual_seed(1))
    model(input_features=torch.randn(2, 8, 40), labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in tuned.trained().values())
    with pytest.raises((AnatomyError, CompositionError)):
        attach(model, "prompt_tuning", name="other")


def test_layers_whose_weight_is_read_without_a_call_are_no_sites_and_it_is_said() -> None:
    config = hf.WavLMConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, conv_dim=[16, 16],
        conv_kernel=[3, 3], conv_stride=[2, 2], num_feat_extract_layers=2, num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    model = random_model(hf.WavLMModel, config)
    assert any(
        "q_proj" in remark and "without the layer being called" in remark for remark in Anatomy.read(model).remarks
    )
    with pytest.raises(AnatomyError, match=r"attn\.q"):
        attach(model, "lora")
    tuned = attach(model, "lora", sites=["ffn.up"])
    model(torch.randn(1, 400)).last_hidden_state.square().sum().backward()
    assert all(p.grad is not None for p in tuned.trained().values())
