"""LLaMA-Adapter: the acid tests of its paper, beside those that every method passes."""

import pytest
import torch
import transformers as hf
from methods.checks import attach_double, counted, logits, stir
from methods.generation import check_generation
from tiny import inputs, tiny

from luthier.anatomy import Anatomy
from luthier.core import CompositionError, ConfigError
from luthier.methods.additive.llama_adapter import Tokens
from luthier.surgery import attach, method


def test_its_numbers_on_llama_7b_are_those_of_the_paper():
    with torch.device("meta"):
        anatomy = Anatomy.read(hf.LlamaForCausalLM(hf.LlamaConfig(tie_word_embeddings=False)))
    assert method("llama_adapter").n_params(anatomy) == 1_229_760
    assert counted("llama_adapter") == 76_920


@pytest.mark.acid("llama_adapter", 1)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "qwen3"])
def test_it_starts_at_the_base_with_its_tokens_attended_to(name):
    model = tiny(name)
    base = logits(model)
    tuned = attach(model, "llama_adapter", length=3, skip=1)
    assert all(m.tokens.abs().sum() > 0 for m in tuned.modules(Tokens).values())
    torch.testing.assert_close(logits(model), base, rtol=0, atol=1e-6)


@pytest.mark.acid("llama_adapter", 2)
def test_at_first_only_the_gates_have_a_gradient_and_then_the_tokens_too():
    tuned = attach(tiny("llama"), "llama_adapter", length=3, skip=1)
    trained = tuned.trained()
    tuned.model(**inputs(tuned.model)).loss.backward()
    assert all(p.grad.any() == name.endswith("gate") for name, p in trained.items())
    with torch.no_grad():
        for name, p in trained.items():
            if name.endswith("gate"):
                p.sub_(0.1 * p.grad.sign())
            p.grad = None
    tuned.model(**inputs(tuned.model)).loss.backward()
    assert all(p.grad.any() for p in trained.values())


@pytest.mark.acid("llama_adapter", 3)
@pytest.mark.parametrize("prefix", [False, True])
def test_what_it_adds_is_its_own_softmax_and_the_texts_still_sums_to_one(prefix):
    words = "llama_adapter+prefix_tuning" if prefix else "llama_adapter"
    more = {"prefix_tuning.length": 2, "prefix_tuning.mlp_width": 0} if prefix else {}
    of = "llama_adapter." if prefix else ""
    tuned = attach_double("llama", words, **{f"{of}length": 3, f"{of}skip": 1, **more})
    stir(tuned)
    module = next(iter(tuned.modules(Tokens).values()))
    seen = []
    keep = module.attend

    def attend(inner, query, key, value):
        out = keep(inner, query, key, value)
        seen.append((query, key, value, inner(query, key, value), out))
        return out

    module.attend = attend
    with torch.no_grad():
        module.gate.fill_(50.0)  # tanh is 1: nothing of the text's share may be taken away
        logits(tuned.model)
        query, key, value, of_text, out = seen[0]
        # (P, H_kv D) -> (H_kv, P, D), each for the heads of its group
        made = [layer.linear(module.tokens).view(3, module.heads, -1).transpose(0, 1) for layer in
                (module.of_keys, module.of_values)]  # fmt: skip
        times = query.shape[1] // module.heads
        keys, values = (m.repeat_interleave(times, 0) for m in made)
        shares = (query @ keys.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(-1)
        torch.testing.assert_close(out, of_text + (shares @ values).transpose(1, 2), rtol=1e-9, atol=1e-9)
        if not prefix:
            scores = query @ key.repeat_interleave(times, 1).transpose(2, 3) / query.shape[-1] ** 0.5
            later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            wanted = scores.masked_fill(later, -torch.inf).softmax(-1) @ value.repeat_interleave(times, 1)
            torch.testing.assert_close(of_text[0], wanted[0].transpose(0, 1), rtol=1e-9, atol=1e-9)  # row 0: no pads


@pytest.mark.acid("llama_adapter", 4)
def test_the_bottom_layers_have_nothing():
    tuned = attach(tiny("llama"), "llama_adapter", length=3, skip=2)
    assert list(tuned.modules(Tokens)) == ["attn.attend@2"]
    with pytest.raises(ConfigError, match=r"llama_adapter\.skip: 3 layers are left out, and this llama model has 3"):
        attach(tiny("llama"), "llama_adapter", skip=3)


@pytest.mark.acid("llama_adapter", 5)
def test_generation_is_the_same_with_and_without_a_cache():
    tuned = attach(tiny("llama"), "llama_adapter", length=3, skip=1)
    stir(tuned)
    tuned.model.eval()
    check_generation(tuned, beams=2)


def test_two_that_want_one_attention_cannot_act_together():
    tuned = attach(tiny("llama"), "llama_adapter", name="a", length=3, skip=1)
    tuned.add("llama_adapter", name="b")
    with pytest.raises(CompositionError, match=r"a and b both want the attention at .*; one can act at a time"):
        tuned.activate("a", "b")


def test_in_rows_it_is_refused_beside_others():
    tuned = attach(tiny("llama"), "llama_adapter", length=3, skip=1)
    tuned.model.eval()
    with (
        pytest.raises(CompositionError, match="attends in a way of its own, in every row"),
        tuned.rows(["default", None]),
    ):
        pass
