"""Prompt tuning: its own tests, beside those that every method passes."""

import pytest
import torch
from methods.checks import frozen_copy, logits, same, stir, train
from methods.generation import check_checkpointing, check_generation, check_low_precision, stirred
from tiny import inputs, tiny
from torch.nn import functional as F
from transformers import RobertaConfig, RobertaForSequenceClassification

from luthier.anatomy import Anatomy
from luthier.core import ConfigError, ModelError
from luthier.surgery import attach, load, method

WORDS = ((17,), (90,), (5,), (44,))
NAMES = ["bert", "llama", "t5"]


def longer(batch, front):
    """The same batch with real words before the text."""
    rows = len(batch["input_ids"])
    ids = torch.tensor(front)[None].expand(rows, -1)
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {k: torch.cat([more[k], v], 1) if k in more else v for k, v in batch.items() if k != "labels"}


@pytest.mark.acid("prompt_tuning", 1)
@pytest.mark.parametrize(
    ("name", "task"),
    [("bert", "tokens"), ("roberta", "tokens"), ("electra", "tokens"), ("modernbert", "tokens"),
     ("deberta-v2", "tokens"), ("gpt2", "lm"), ("llama", "lm"), ("opt", "lm"), ("bloom", "lm"), ("gemma2", "lm"),
     ("gemma3", "lm"), ("t5", "seq2seq"), ("bart", "seq2seq"), ("llama", "classification"),
     ("gpt2", "classification")],
)  # fmt: skip
def test_vectors_that_are_words_act_as_those_words(name, task):
    model = tiny(name, task)
    batch = inputs(model)
    text = longer(batch, [17, 90, 5, 44])
    decoder = {"decoder_input_ids": batch["labels"]} if task == "seq2seq" else {}
    expected = logits(model, text | decoder)
    attach(model, "prompt_tuning", length=4, init="words", words=WORDS)
    found = logits(model, {k: v for k, v in batch.items() if k != "labels"} | decoder)
    if task in ("tokens", "lm"):
        expected = expected[:, 4:]
    real = batch["attention_mask"].bool() if task in ("tokens", "lm") else ...
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["bert", "electra", "modernbert"])
@pytest.mark.parametrize("kind", [0, 1])
def test_vectors_are_of_the_first_type_whatever_the_text_is_of(name, kind):
    model = tiny(name, "tokens")
    batch = {k: v for k, v in inputs(model).items() if k != "labels"}
    text = longer(batch, [17, 90, 5, 44])
    if name != "modernbert":  # which has no types
        batch["token_type_ids"] = torch.full_like(batch["input_ids"], kind)
        text["token_type_ids"] = torch.cat([torch.zeros(3, 4, dtype=torch.long), batch["token_type_ids"]], 1)
    expected = logits(model, text)[:, 4:]
    attach(model, "prompt_tuning", length=4, init="words", words=WORDS)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits(model, batch)[real], expected[real], rtol=1e-5, atol=2e-5)


def test_a_bert_classifier_pools_the_first_word_not_the_first_vector():
    model = tiny("bert")
    batch = inputs(model)
    hidden = model.bert(**longer(batch, [17, 90, 5, 44])).last_hidden_state[:, 4]
    expected = model.classifier(torch.tanh(model.bert.pooler.dense(hidden))).detach()
    attach(model, "prompt_tuning", length=4, init="words", words=WORDS)
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.acid("prompt_tuning", 2)
@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_the_vectors_matters(name):
    tuned = stirred(name, "prompt_tuning", length=5)
    before = logits(tuned.model)
    (prompt,) = tuned.modules().values()
    prompt.vectors.data = prompt.vectors.data.flip(0)
    assert (logits(tuned.model) - before).abs().max() > 1e-3


@pytest.mark.acid("prompt_tuning", 3)
def test_the_loss_is_that_of_the_text_alone():
    tuned = stirred("llama", "prompt_tuning", length=5)
    batch = inputs(tuned.model)
    out = tuned.model(**batch)
    assert out.logits.shape[1] == batch["input_ids"].shape[1]
    shifted = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(out.loss, shifted)


@pytest.mark.parametrize("name", NAMES)
def test_vectors_start_as_words_of_the_vocabulary_and_only_they_move(name):
    model = tiny(name)
    tuned = attach(model, "prompt_tuning", length=5)
    (prompt,) = tuned.modules().values()
    table = model.get_input_embeddings().weight
    distance = (prompt.vectors.detach()[:, None] - table.detach()[None]).abs().amax(-1)
    assert distance.min(1).values.max() == 0
    assert len(set(distance.argmin(1).tolist())) == 5
    before, vectors = frozen_copy(tuned), prompt.vectors.detach().clone()
    train(tuned, 3)
    assert same(dict(model.named_parameters()), before)
    assert ((prompt.vectors - vectors).abs().sum(1) > 0).all()


def test_uniform_vectors_fill_the_span_of_the_paper():
    (prompt,) = attach(tiny("bert"), "prompt_tuning", init="uniform").modules().values()
    assert 0.45 < prompt.vectors.abs().max() <= 0.5
    assert prompt.vectors.min() < -0.4


def test_words_of_several_tokens_are_averaged_and_the_rest_is_sampled():
    model = tiny("bert")
    tuned = attach(model, "prompt_tuning", length=3, init="words", words=((5, 9),))
    (prompt,) = tuned.modules().values()
    table = model.get_input_embeddings().weight.detach()
    torch.testing.assert_close(prompt.vectors[0].detach(), (table[5] + table[9]) / 2)
    assert (prompt.vectors[1:].detach()[:, None] - table[None]).abs().amax(-1).min(1).values.max() == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init": "words"}, "needs words"),
        ({"words": ((1,),)}, "other inits take none"),
        ({"init": "words", "length": 1, "words": ((1,), (2,))}, "at most one group"),
        ({"init": "words", "words": ((),)}, "at least one token id"),
        ({"init": "words", "words": ((131,),)}, "the vocabulary has 131"),
    ],
)
def test_words_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        attach(tiny("bert"), method("prompt_tuning", settings))


def test_a_text_without_room_for_the_vectors_is_refused_with_the_numbers():
    tuned = attach(tiny("gpt2"), "prompt_tuning", length=60)
    with pytest.raises(ModelError, match=r"67 positions; the model has 64"):
        tuned.model(**inputs(tuned.model))


def of_pictures(words="prompt_tuning", task="", **settings):
    tuned = attach(tiny("vit", task), words, **{"length": 4, **settings})
    stir(tuned)
    return tuned


def test_beside_patches_vectors_are_what_more_states_at_the_first_block_are():
    tuned = of_pictures()
    model, vit = tiny("vit"), tiny("vit").vit
    batch = inputs(model)
    with torch.no_grad():
        states = vit.embeddings(batch["pixel_values"])
        vectors = tuned.modules()["prompt"].vectors
        states = torch.cat(
            [states[:, :1], vectors.expand(3, -1, -1), states[:, 1:]], 1
        )  # behind [CLS], as the paper has it
        for layer in vit.layers:
            states = layer(states, None)
        head = {
            n.split("/")[1].removeprefix("classifier."): p for n, p in tuned.trained().items() if n.startswith("head/")
        }
        wanted = F.linear(vit.layernorm(states)[:, 0], head["weight"], head["bias"])
    torch.testing.assert_close(logits(tuned.model, batch), wanted, rtol=1e-5, atol=1e-5)
    assert tuned.n_trained() == tuned.tuning().method.n_params(tuned.anatomy) == 4 * 48
    assert 0 < attach(tiny("vit"), "prompt_tuning").modules()["prompt"].vectors.abs().max() <= (3 / 48) ** 0.5


@pytest.mark.parametrize("words", ["prompt_tuning", "p_tuning", "mpt", "attempt"])
def test_beside_patches_a_picture_gives_as_many_states_as_before(words, tmp_path):
    more = {"attempt": {"prompts": 2, "hidden": 5}}.get(words, {})
    tuned = of_pictures(words, "base", **more)
    batch = inputs(tuned.model)
    out = tuned.model.eval()(**batch, output_hidden_states=True)
    assert {h.shape for h in out.hidden_states} == {(3, 10, 48)} == {out.last_hidden_state.shape}
    assert torch.equal(out.hidden_states[0], tiny("vit", "base").embeddings(batch["pixel_values"]))
    tuned.finish()
    held = tuned.model(**batch).last_hidden_state
    tuned.save(tmp_path / "t")
    again = tiny("vit", "base")
    load(again, tmp_path / "t")
    assert torch.equal(again(**batch).last_hidden_state, held)
    assert torch.equal(tuned.detach()(**batch).last_hidden_state, tiny("vit", "base")(**batch).last_hidden_state)


def test_beside_patches_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="this vit model has none"):
        attach(tiny("vit"), "prompt_tuning", length=4, init="words", words=WORDS)
    tuned = of_pictures()
    batch = inputs(tuned.model)
    with pytest.raises(ModelError, match="such as a mask"):
        tuned.model.vit(pixel_values=batch["pixel_values"], attention_mask=torch.tensor([[1] * 9 + [0]]).expand(3, -1))


def test_roberta_base_with_a_head_of_two_trains_607_490_numbers():
    with torch.device("meta"):
        config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, num_labels=2)
        tuned = attach(RobertaForSequenceClassification(config), "prompt_tuning", length=20)
    assert tuned.n_trained() == tuned.tuning().method.n_params(tuned.anatomy) == 15_360
    assert tuned.n_trained(head=True) == 607_490


@pytest.mark.parametrize("width", [20, 48])
def test_the_count_is_the_width_of_the_word_embedding(width):
    anatomy = Anatomy.read(tiny("electra" if width == 20 else "bert", device="meta"))
    assert method("prompt_tuning", {"length": 7}).n_params(anatomy) == 7 * width


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_it_computes_what_peft_computes(name):
    peft = pytest.importorskip("peft")
    tuned = stirred(name, "prompt_tuning", length=5)
    (prompt,) = tuned.modules().values()
    batch = inputs(tuned.model, padded=name == "t5")
    ours = logits(tuned.model, batch)
    task = "SEQ_2_SEQ_LM" if name == "t5" else "CAUSAL_LM"
    theirs = peft.get_peft_model(tiny(name), peft.PromptTuningConfig(task_type=task, num_virtual_tokens=5)).eval()
    weight = theirs.prompt_encoder["default"].embedding.weight
    weight.data[:5] = prompt.vectors.data  # for T5 it has 10 rows, of which 5 are used
    with torch.no_grad():
        found = theirs(**batch).logits
    found = found if name == "t5" else found[:, 5:]
    torch.testing.assert_close(ours, found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart", "opt"])
def test_generation_does_not_depend_on_cache_or_padding(name, beams):
    check_generation(stirred(name, "prompt_tuning", length=5), beams)


@pytest.mark.parametrize("name", NAMES)
def test_checkpointed_blocks_give_the_same_gradients(name):
    check_checkpointing(stirred(name, "prompt_tuning", length=5))


def test_a_bf16_model_trains_fp32_numbers():
    check_low_precision("llama", "prompt_tuning", length=5)
