"""The tuned model is still the user's model: `generate` and `pipeline` take it as it is."""

import warnings
from typing import Any

import pytest
import torch
from kinds import KINDS, logits, shaken, tokenizer
from tiny import tiny

OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}


def step_by_step(model: Any, ids: torch.Tensor, mask: torch.Tensor, n: int) -> torch.Tensor:
    """Greedy decoding by whole passes over the text, without `generate`: what every other way must equal."""
    for _ in range(n):
        with torch.no_grad():
            # Positions count real tokens, as `generate` counts them.
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            word = (
                model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1].argmax(-1, keepdim=True)
            )
        ids, mask = torch.cat([ids, word], 1), torch.cat([mask, torch.ones_like(word)], 1)
    return ids


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@pytest.mark.parametrize("name", list(KINDS))
def test_every_way_of_decoding_gives_the_tokens_of_whole_passes(name: str, arch: str) -> None:
    _, model, batch = shaken(name, arch, side="left")
    given = {k: batch[k] for k in ("input_ids", "attention_mask")}
    expected = step_by_step(model, given["input_ids"], given["attention_mask"], 6)
    assert torch.equal(model.generate(**given, **OPTIONS), expected)
    assert torch.equal(model.generate(**given, **OPTIONS, use_cache=False), expected)
    assert torch.equal(model.generate(**given, **OPTIONS, num_beams=1, cache_implementation="dynamic"), expected)


@pytest.mark.parametrize("name", list(KINDS))
def test_padding_on_the_left_changes_no_row(name: str) -> None:
    _, model, batch = shaken(name, "llama", side="left")
    given = {k: batch[k] for k in ("input_ids", "attention_mask")}
    for beams in (1, 3):
        together = model.generate(**given, **OPTIONS, num_beams=beams)
        for i, row in enumerate(together):
            real = given["attention_mask"][i].bool()
            alone = model.generate(input_ids=given["input_ids"][i : i + 1, real], **OPTIONS, num_beams=beams)
            assert torch.equal(alone[0, int(real.sum()) :], row[len(real) :])


@pytest.mark.parametrize("name", list(KINDS))
def test_several_samples_of_one_text_and_beams_among_them(name: str) -> None:
    _, model, batch = shaken(name, "gpt2", side="left")
    given = {k: batch[k] for k in ("input_ids", "attention_mask")}
    for more in ({"num_return_sequences": 2, "do_sample": True}, {"num_beams": 2, "do_sample": True}):
        drawn = []
        for cached in (True, False):
            torch.manual_seed(3)
            drawn.append(model.generate(**given, **{**OPTIONS, **more}, use_cache=cached))
        assert torch.equal(*drawn)


@pytest.mark.parametrize("name", ["lora", "prompt_tuning", "prefix_tuning", "lst"])
def test_a_draft_model_changes_no_token(name: str) -> None:
    _, model, batch = shaken(name, "llama")
    draft = tiny("llama", "lm", seed=4)
    given = {k: batch[k][:1] for k in ("input_ids", "attention_mask")}
    expected = model.generate(**given, **OPTIONS)
    assert torch.equal(model.generate(**given, **OPTIONS, assistant_model=draft), expected)


@pytest.mark.parametrize("name", [n for n in KINDS if n != "bitfit"])
def test_an_encoder_decoder_decodes_the_same_with_and_without_a_cache(name: str) -> None:
    _, model, batch = shaken(name, "t5")
    given = {k: batch[k] for k in ("input_ids", "attention_mask")}
    for beams in (1, 2):
        one, two = (model.generate(**given, **OPTIONS, num_beams=beams, use_cache=c) for c in (True, False))
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", list(KINDS))
def test_a_pipeline_writes_what_generate_writes(name: str) -> None:
    from transformers import pipeline

    _, model, _ = shaken(name, "gpt2")
    tok = tokenizer()
    texts = ["w5 w9 w20", "w7 w8 w9 w10 w11"]
    pipe = pipeline("text-generation", model=model, tokenizer=tok)
    model.generation_config.eos_token_id = None
    said = pipe(texts, max_new_tokens=5, do_sample=False, return_full_text=False, batch_size=2)
    batch = tok(texts, return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    out = model.generate(**batch, max_new_tokens=5, do_sample=False, pad_token_id=0)
    expected = [tok.decode(row[batch["input_ids"].shape[1] :], skip_special_tokens=True) for row in out]
    assert [s[0]["generated_text"].strip() for s in said] == [e.strip() for e in expected]
    assert type(model).__name__ == "GPT2LMHeadModel"


@pytest.mark.parametrize("name", list(KINDS))
def test_a_pipeline_classifies_as_the_model_does(name: str) -> None:
    from transformers import pipeline

    _, model, _ = shaken(name, "bert", "classification")
    tok = tokenizer()
    texts = ["w5 w9 w20", "w7 w8 w9 w10 w11"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*token_type_ids.*")
        said = pipeline("text-classification", model=model, tokenizer=tok)(texts, top_k=None, batch_size=2)
    batch = dict(tok(texts, return_tensors="pt", padding=True))
    scores = logits(model, batch).softmax(-1)
    for row, answers in zip(scores, said, strict=True):
        found = {a["label"]: a["score"] for a in answers}
        assert max(abs(found[f"LABEL_{i}"] - float(p)) for i, p in enumerate(row)) < 1e-5
