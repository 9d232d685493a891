"""A row of a padded batch is what it is alone: every method and architecture, both sides, with and without caches."""

import dataclasses
import inspect
from typing import Any

import pytest
import torch
from cells import shake, small
from tiny import TINY, inputs, tasks, tiny

from luthier.core import AnatomyError
from luthier.surgery import METHODS, attach

QUICK_METHODS, QUICK_MODELS = ("lora", "prefix_tuning", "prompt_tuning", "unipelt"), ("bert", "llama", "t5")


def cells(models: tuple[str, ...]) -> list[Any]:
    return [
        pytest.param(method, name, marks=() if method in QUICK_METHODS and name in QUICK_MODELS else pytest.mark.slow)
        for name in models
        for method in METHODS.names()
    ]


def tuned_model(method: str, name: str) -> Any:
    model = tiny(name)
    try:
        tuned = attach(model, small(method))
    except AnatomyError:
        pytest.skip("the method does not go there")
    for part in tuned.tuning().method.parts():
        if part.looks_at_data:
            with torch.enable_grad():  # it looks at gradients
                part.prepare(tuned, [lambda: model(**inputs(model)).loss] * 2)
    shake(tuned)
    return model.eval()


def close(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("method", "name"), cells(tuple(n for n in TINY if n != "vit")))
def test_a_padded_row_is_what_it_is_alone(method: str, name: str, side: str) -> None:
    base, model = tiny(name), tuned_model(method, name)
    batch = inputs(model, side=side)
    batch.pop("labels", None)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    row = 2
    real = mask[row].bool()
    more = {}
    if model.config.is_encoder_decoder:
        decoder = torch.randint(4, 100, (len(ids), 5), generator=torch.Generator().manual_seed(2))
        seen = torch.ones_like(decoder)
        seen[row, 3:] = 0
        more = {"decoder_input_ids": decoder, "decoder_attention_mask": seen}
    counted = "position_ids" in inspect.signature(model.forward).parameters
    positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if side == "left" and counted else {}
    alone_more = {k: v[row : row + 1, :3] for k, v in more.items() if k == "decoder_input_ids"}

    def difference(one: Any) -> Any:
        together = one(input_ids=ids, attention_mask=mask, **more, **positions).logits[row]
        alone = one(input_ids=ids[row : row + 1, real], **alone_more).logits[0]
        if together.dim() == 2:
            together = together[:3] if more else together[real]
        return together, alone

    plain, plain_alone = difference(base)
    if not torch.allclose(plain, plain_alone, atol=2e-4, rtol=1e-3):
        pytest.skip("the base itself is another for a row that is padded so")
    close(*difference(model))


@torch.no_grad()
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize(("method", "name"), cells(tuple(n for n in TINY if {"lm", "seq2seq"} & set(tasks(n)))))
def test_a_row_is_continued_as_it_is_alone_in_a_batch_with_any_cache(method: str, name: str, cache: str | None) -> None:
    model = tuned_model(method, name)
    batch = inputs(model, side="right" if model.config.is_encoder_decoder else "left")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    asked: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    real = mask[2].bool()
    wanted = model.generate(input_ids=ids[2:3, real], use_cache=False, **asked)[0, -4:]
    settings = {} if cache is None else {"cache_implementation": cache, "disable_compile": True}
    try:
        found = model.generate(input_ids=ids, attention_mask=mask, **asked, **settings)[2, -4:]
    except Exception as error:  # a refusal of ours is an answer, anything else is not
        if type(error).__module__.startswith("luthier"):
            return
        with pytest.raises(type(error)):  # the base offers no such cache either
            tiny(name).generate(input_ids=ids, attention_mask=mask, **asked, **settings)
        return
    assert torch.equal(found, wanted)


def test_every_method_is_in_the_matrix() -> None:
    assert all(dataclasses.is_dataclass(METHODS.get(name)) for name in METHODS.names())
