"""What a pass computed stays its own: another tuning, another batch or another caller in between changes nothing."""

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from unusual import COMMON, clip, learnt, llama, random_model, word_ids

from luthier.core import ConfigError, ModelError
from luthier.surgery import Tuned, attach

IDS = word_ids(3, 9)
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("lora", {}),
    ("dora", {}),
    ("ia3", {}),
    ("prefix_tuning", {"length": 3}),
    ("mam", {"width": 5, "length": 3}),
    ("unipelt", {"length": 3}),
    ("bitfit", {"add_missing_biases": True}),
    ("parallel_adapter", {"dropout": 0.0}),
    ("prompt_tuning", {"length": 3}),
    ("full", {}),
]


def two_tunings(method: str, settings: dict[str, Any]) -> tuple[Any, Tuned]:
    model = llama()
    for i, name in enumerate("ab"):
        tuned = attach(model, method, name=name, seed=i, **settings)
    for i, name in enumerate("ab"):
        tuned.activate(name)
        with torch.no_grad():
            for j, parameter in enumerate(tuned.trained(name).values()):
                draw = torch.Generator().manual_seed(100 * i + j)
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    for module in model.modules():
        if isinstance(getattr(module, "p", None), float):
            module.p = 0.0
    return model.train(), tuned


@pytest.mark.parametrize(("method", "settings"), METHODS)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_two_tunings_before_one_backward_pass_have_the_gradients_of_each_alone_or_are_refused(
    method: str, settings: dict[str, Any], checkpointed: bool
) -> None:
    wanted = {}
    for name in "ab":
        model, tuned = two_tunings(method, settings)
        tuned.activate(name)
        model(input_ids=IDS, labels=IDS).loss.backward()
        if method != "full":
            wanted |= {f"{name}:{k}": p.grad for k, p in tuned.trained(name).items() if p.grad is not None}
    model, tuned = two_tunings(method, settings)
    if checkpointed:
        tuned.checkpoint_activations()
    tuned.activate("a")
    one = model(input_ids=IDS, labels=IDS).loss
    tuned.activate("b")
    two = model(input_ids=IDS, labels=IDS).loss
    if method == "full":  # both hold the same tensors: there is one gradient for two values
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (one + two).backward()
        return
    (one + two).backward()
    found = {f"{n}:{k}": p.grad for n in "ab" for k, p in tuned.trained(n).items() if p.grad is not None}
    assert found.keys() == wanted.keys() and found
    for key, grad in wanted.items():
        torch.testing.assert_close(found[key], grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("method", "settings"), METHODS)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_pass_of_the_base_before_the_backward_pass_changes_no_gradient(
    method: str, settings: dict[str, Any], checkpointed: bool
) -> None:
    found = []
    for reference in (False, True):
        model = llama()
        tuned = learnt(attach(model, method, **settings), 0.05)
        model.train()
        for module in model.modules():
            if isinstance(getattr(module, "p", None), float):
                module.p = 0.0
        if checkpointed and reference:
            tuned.checkpoint_activations()
        loss = model(input_ids=IDS, labels=IDS).loss
        if reference:
            with torch.no_grad(), tuned.base_only():
                model(input_ids=word_ids(2, 5, 7))
        loss.backward()
        found.append([p.grad for p in tuned.trained().values()])
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-4)


def test_a_backward_pass_through_another_value_of_a_tensor_is_refused() -> None:
    model = llama()
    tuned = learnt(attach(model, "full"), 0.05)
    with tuned.base_only():
        model.requires_grad_(True)
        loss = model(input_ids=IDS, labels=IDS).loss
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("method", "settings"), [("lora", {}), ("prefix_tuning", {"length": 3}), ("unipelt", {})])
def test_the_reentrant_kind_of_checkpointing_is_answered_by_the_other_with_its_gradients(
    method: str, settings: dict[str, Any]
) -> None:
    found = []
    for asked in (False, True):
        model = llama()
        tuned = learnt(attach(model, method, **settings), 0.05)
        model.train()
        if asked:
            with pytest.warns(UserWarning, match="use_reentrant"):
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append([p.grad for p in tuned.trained().values()])
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-4)


def test_checkpointing_that_was_on_before_attaching_is_seen_and_given_back() -> None:
    model = llama()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    before = model.model.layers[0]._gradient_checkpointing_func
    tuned = attach(model, "lora", name="a")
    assert model.model.layers[0]._gradient_checkpointing_func is not before
    assert tuned.detach().model.layers[0]._gradient_checkpointing_func is before


# -- who enters further inside -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "settings"), METHODS[:6] + METHODS[8:9] + [("lst", {})])
def test_the_trunk_called_directly_gives_what_the_whole_model_has_inside(method: str, settings: dict[str, Any]) -> None:
    batch = {"input_ids": word_ids(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    model, base = llama(), llama()
    tuned = learnt(attach(model, method, **settings))
    model.eval()
    with torch.no_grad():
        first = model.model(**batch)[0]
        whole = model(**batch, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(first, whole)
        torch.testing.assert_close(model.lm_head(first), model(**batch).logits)
        with tuned.base_only():
            torch.testing.assert_close(model.model(**batch)[0], base.model(**batch)[0])
        model(**batch)
        for parameter in tuned.trained().values():
            parameter.mul_(1.5)
        again = model.model(**batch)[0]
        assert (again - first).abs().max() > 1e-3
        torch.testing.assert_close(again, model(**batch, output_hidden_states=True).hidden_states[-1])


def test_one_tower_called_directly_has_its_prefix() -> None:
    image = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model, base = clip(), clip()
    learnt(attach(model, "prefix_tuning", length=3))
    with torch.no_grad():
        found, plain = (m.vision_model(pixel_values=image)[0] for m in (model, base))
        assert (found - plain).abs().max() > 1e-3
        whole = model(input_ids=word_ids(2, 7), pixel_values=image)
        torch.testing.assert_close(whole.vision_model_output[0], found)


def test_a_pass_that_ends_in_an_error_leaves_the_next_one_whole() -> None:
    model = llama()
    learnt(attach(model, "prefix_tuning", length=3))
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, 3), 10**6))
        torch.testing.assert_close(model(input_ids=IDS).logits, wanted)


# -- somebody else sets the attention ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "settings"), METHODS[3:6])
def test_a_prefix_stays_where_another_attention_is_asked_for_later(method: str, settings: dict[str, Any]) -> None:
    model = llama()
    learnt(attach(model, method, **settings))
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(input_ids=IDS).logits, wanted, atol=1e-5, rtol=1e-5)


def test_models_of_one_configuration_object_keep_their_own_prefixes_and_its_own_attention_comes_back() -> None:
    config = llama().config
    before = config._attn_implementation
    one, other = (random_model(hf.LlamaForCausalLM, config, seed) for seed in (0, 1))
    first, second = (learnt(attach(m, "prefix_tuning", length=4)) for m in (one, other))
    with torch.no_grad():
        wanted = other(input_ids=IDS).logits
        first.detach()
        torch.testing.assert_close(other(input_ids=IDS).logits, wanted)
    second.detach()
    assert config._attn_implementation == before


# -- conversations -----------------------------------------------------------------------------------------------------


def gated() -> tuple[Any, dict[str, Any]]:
    ids = word_ids(2, 6)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    model = llama()
    model.generation_config.eos_token_id = None
    learnt(attach(model, "unipelt"))
    return model, {
        "input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "max_new_tokens": 8, "do_sample": False,
        "pad_token_id": 0,
    }  # fmt: skip


def test_gates_read_a_prompt_as_a_whole_whatever_cache_it_fills() -> None:
    model, asked = gated()
    wanted = model.generate(**asked, use_cache=False)
    assert torch.equal(model.generate(**asked), wanted)
    assert torch.equal(model.generate(**asked, cache_implementation="static", disable_compile=True), wanted)
    with pytest.warns(UserWarning, match="prefill_chunk_size=2 is left out"):
        assert torch.equal(model.generate(**asked, prefill_chunk_size=2), wanted)


def test_conversations_in_turn_keep_their_own_gates() -> None:
    model, _ = gated()
    a, b = word_ids(1, 9, 3), word_ids(1, 8, 4)

    @torch.no_grad()
    def step(ids: Tensor, start: int, end: int, cache: Any = None) -> Any:
        return model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True)

    cache = step(a, 0, 5).past_key_values
    alone = [step(a, i, i + 1, cache).logits for i in range(5, 9)]
    cache, other = step(a, 0, 5).past_key_values, step(b, 0, 4).past_key_values
    for i in range(5, 9):
        torch.testing.assert_close(step(a, i, i + 1, cache).logits, alone[i - 5])
        step(b, i - 1, i, other)
    with pytest.raises(ModelError, match="in one piece"):
        step(a, 5, 8, step(a, 0, 5).past_key_values)
    with pytest.raises(ModelError, match="in one piece"):  # a cache whose prompt nobody saw here
        step(a, 5, 6, copy.deepcopy(step(a, 0, 5).past_key_values))


@pytest.mark.parametrize(("method", "settings"), [("prompt_tuning", {"length": 3}), ("unipelt", {"length": 3})])
def test_texts_packed_behind_one_another_are_refused_where_a_row_is_taken_for_one(
    method: str, settings: dict[str, Any]
) -> None:
    model = llama()
    attach(model, method, **settings)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(3, -1)
    with pytest.raises(ModelError, match="one behind the other"):
        model(input_ids=IDS, position_ids=positions)
    padded = torch.tensor([[1, 1, 0, 1, 2, 3, 4, 5, 6]]).expand(3, -1)  # as transformers numbers padding
    mask = torch.ones_like(IDS)
    mask[:, :2] = 0
    model(input_ids=IDS, position_ids=padded, attention_mask=mask)


def test_packed_texts_are_what_they_are_alone_beside_lora_and_a_prefix() -> None:
    for method, settings in (("lora", {}), ("prefix_tuning", {"length": 3})):
        model = llama()
        learnt(attach(model, method, **settings))
        both, starts = torch.cat([IDS[:1, :4], IDS[1:2, :5]], 1), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
        with torch.no_grad():
            found = model(input_ids=both, position_ids=starts, use_cache=False).logits
            torch.testing.assert_close(found[:, :4], model(input_ids=IDS[:1, :4]).logits, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(found[:, 4:], model(input_ids=IDS[1:2, :5]).logits, atol=1e-5, rtol=1e-4)


# -- changed under a tuning --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "full"])
def test_tokens_are_not_added_under_a_tuning(method: str) -> None:
    model = llama()
    tuned = attach(model, method)
    with pytest.raises(ConfigError, match="Detach, add the tokens, attach"):
        model.resize_token_embeddings(136, mean_resizing=False)
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    assert tuned.detach().resize_token_embeddings(136, mean_resizing=False).weight.shape[0] == 136


def test_a_model_that_was_compiled_before_is_edited_where_it_computes() -> None:
    plain, model = llama(), llama()
    compiled = torch.compile(model, backend="eager")
    tuned, twin = learnt(attach(compiled, "lora")), learnt(attach(plain, "lora"))
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    assert tuned.model is model and list(tuned.detach().state_dict()) == list(twin.detach().state_dict())


def test_the_last_hidden_states_are_those_of_the_side_network() -> None:
    model = llama()
    learnt(attach(model, "lst"))
    with torch.no_grad():
        out = model(input_ids=IDS, output_hidden_states=True)
        torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)


# -- vectors behind the padding ----------------------------------------------------------------------------------------

_C = {**COMMON, "num_hidden_layers": 4, "num_key_value_heads": 2}
_TYPES = ["sliding_attention", "full_attention"] * 2
WINDOWED = {
    "llama": llama,
    "mistral": lambda: random_model(hf.MistralForCausalLM, hf.MistralConfig(**_C, sliding_window=5)),
    "gemma3": lambda: random_model(
        hf.Gemma3ForCausalLM,
        hf.Gemma3TextConfig(**_C, head_dim=8, query_pre_attn_scalar=8, sliding_window=5, layer_types=_TYPES),
    ),
}


@pytest.mark.parametrize("arch", WINDOWED)
@pytest.mark.parametrize("method", ["prefix_tuning", "prompt_tuning"])
def test_a_row_behind_left_padding_is_what_it_is_alone_in_and_out_of_a_window(arch: str, method: str) -> None:
    ids = word_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    model = WINDOWED[arch]()
    learnt(attach(model, method, length=3))
    kept = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 4, "min_new_tokens": 4}
    with torch.no_grad():
        together = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        alone = model(input_ids=ids[1:, 4:], output_hidden_states=True)
        torch.testing.assert_close(together.logits[1:, 4:], alone.logits, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(together.hidden_states[1][1:, 4:], alone.hidden_states[1], atol=1e-5, rtol=1e-4)
        written = model.generate(input_ids=ids, attention_mask=mask, **kept)[1:, 4:]
        assert torch.equal(written, model.generate(input_ids=ids[1:, 4:], **kept))
