"""Training the top, and freezing the bottom: their own tests, beside those that every method passes."""

import pytest
import torch
from methods.checks import logits, train
from methods.sizes import anatomy_of, trained
from tiny import inputs, tiny

from luthier.core import AnatomyError, ConfigError
from luthier.surgery import attach


def named(tuned):
    return {n.partition("/")[2] for n in tuned.trained()}


def test_counts_are_those_of_the_catalogue():
    pooler = 590_592
    assert trained("bert", "top_k_layers", k=1) == 7_087_872 + pooler
    assert trained("bert", "top_k_layers") == 14_175_744 + pooler
    assert trained("bert", "freeze_bottom", blocks=9) == 21_263_616 + pooler == trained("bert", "freeze_bottom")


@pytest.mark.acid("top_k_layers", 1)
@pytest.mark.parametrize(
    ("words", "settings"), [("top_k_layers", {"k": 1}), ("freeze_bottom", {"blocks": 2}), ("top_k_layers", {"k": 2})]
)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_states_of_the_frozen_blocks_have_no_graph(words, settings, name):
    tuned = attach(tiny(name, "classification"), words, **settings)
    out = tuned.model(**inputs(tuned.model), output_hidden_states=True)
    frozen = 3 - settings.get("k", 1)
    assert [s.grad_fn is None for s in out.hidden_states[:3]] == [i <= frozen for i in range(3)]
    assert out.hidden_states[-1].grad_fn is not None


def test_the_encoder_and_the_lower_decoder_of_t5_have_no_graph():
    tuned = attach(tiny("t5"), "top_k_layers", k=1)
    out = tuned.model(**inputs(tuned.model), output_hidden_states=True)
    assert all(s.grad_fn is None for s in (*out.encoder_hidden_states, out.decoder_hidden_states[1]))
    assert {n.partition(".")[0] for n in named(tuned)} == {"decoder"}
    both = attach(tiny("t5"), "top_k_layers", k=1, encoder=True)
    assert {n.partition(".")[0] for n in named(both)} == {"encoder", "decoder"}


@pytest.mark.acid("top_k_layers", 2)
def test_the_tensors_of_the_top_are_these():
    last = "bert.encoder.layer.2."
    model = tiny("bert", "classification")
    wanted = {n for n, _ in model.named_parameters() if n.startswith((last, "bert.pooler.", "classifier."))}
    assert named(attach(model, "top_k_layers", k=1)) == wanted
    model = tiny("llama")
    wanted = {n for n, _ in model.named_parameters() if n.startswith(("model.layers.2.", "model.norm."))}
    assert named(attach(model, "top_k_layers", k=1)) == wanted
    tied = named(attach(tiny("gpt2"), "top_k_layers", k=3))
    assert not any("wte" in n or "wpe" in n or "lm_head" in n for n in tied)


@pytest.mark.acid("top_k_layers", 3)
@pytest.mark.acid("freeze_bottom", 2)
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ("top_k_layers", {"embeddings": True, "encoder": True}),
        ("freeze_bottom", {"blocks": 0, "embeddings": False}),
    ],
)
def test_all_blocks_and_the_embeddings_are_full_fine_tuning_step_for_step(name, words, settings):
    if words == "top_k_layers":
        settings = {**settings, "k": 2 if name == "t5" else 3}
    if name == "t5" and words == "top_k_layers":
        assert named(attach(tiny(name), words, **settings)) < named(attach(tiny(name), "full"))
        return  # its stacks are not equally deep here
    one, other = attach(tiny(name), words, **settings), attach(tiny(name), "full")
    assert named(one) == named(other)
    assert train(one, 2) == train(other, 2)
    assert torch.equal(logits(one.model), logits(other.model))


@pytest.mark.acid("freeze_bottom", 1)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "roberta", "modernbert"])
def test_what_stays_and_what_trains_are_disjoint_and_cover_the_model(name):
    model = tiny(name)
    everything = {n for n, _ in model.named_parameters()}
    tuned = attach(model, "freeze_bottom", share=0.5)
    learns = named(tuned)
    stays = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert not learns & stays and learns | stays == everything
    assert not any("embeddings" in n or "wte" in n or "wpe" in n or "shared" in n or "embed" in n for n in learns)
    first = tuned.anatomy.blocks[0].path
    assert not any(n.startswith(f"{first}.") for n in learns)


def test_named_layers_and_patterns_stay():
    tuned = attach(tiny("bert", "classification"), "freeze_bottom", layers=(1,), names=("*.bias",))
    learns = named(tuned)
    assert not any("layer.1." in n or ("bert." in n and n.endswith(".bias")) for n in learns)
    assert any("layer.0." in n for n in learns) and any("layer.2." in n for n in learns)


@pytest.mark.parametrize(
    ("words", "settings", "says"),
    [
        ("top_k_layers", {"k": 4}, "has 3 blocks. Set it to 3 or less"),
        ("top_k_layers", {"k": 0}, "at least 1"),
        ("freeze_bottom", {"blocks": 4}, "has 3 in a stack"),
        ("freeze_bottom", {"layers": (7,)}, "they are 0 to 2"),
        ("freeze_bottom", {"blocks": 1, "layers": (0,)}, "Give one of them"),
        ("freeze_bottom", {"names": ("*.baias",)}, "fits no tensor"),
    ],
)
def test_more_blocks_than_there_are_and_names_that_fit_nothing_are_refused(words, settings, says):
    model = tiny("bert")
    with pytest.raises((ConfigError, AnatomyError), match=says):
        attach(model, words, **settings)
    assert list(model.state_dict()) == list(tiny("bert").state_dict())


def test_of_an_encoder_decoder_the_decoders_blocks_count():
    anatomy = anatomy_of("t5")
    blocks = [b.path for b in anatomy.blocks if b.stack == "decoder"][-2:]
    inside = sum(
        torch.Size(s).numel() for n, s in anatomy.tensors.items() if n.startswith(tuple(f"{p}." for p in blocks))
    )
    assert trained("t5", "top_k_layers") == inside + 768
