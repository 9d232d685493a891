"""What tests of methods that act in generation share: caches, padding, checkpointed blocks, low precision."""

from typing import Any

import torch
from methods.checks import stir
from tiny import inputs, tiny
from torch import Tensor

from luthier.surgery import Tuned, attach


def stirred(name: str, method: str, **settings: Any) -> Tuned:
    """A tiny model with a tuning whose numbers are nowhere zero."""
    tuned = attach(tiny(name), method, **settings)
    stir(tuned, 0.2)
    return tuned


def texts() -> tuple[Tensor, Tensor]:
    """Two texts, the second padded on the left: ids, mask."""
    ids = torch.randint(4, 131, (2, 6), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0
    return ids, mask


def written(tuned: Tuned, ids: Tensor, mask: Tensor, beams: int, cache: bool) -> tuple[Tensor, Tensor]:
    """Seven words, without those of the prompt, and the logits of every step: (rows * beams, 7, vocabulary)."""
    out = tuned.model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=7,
        num_beams=beams,
        use_cache=cache,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[:, -7:], torch.stack(out.logits, 1)


def check_generation(tuned: Tuned, beams: int) -> None:
    """The cache changes no word and no logit; nor does padding, nor a neighbour.

    Encoder-decoders are padded on the right: T5 counts distances over pads, BART counts places.
    """
    ids, mask = texts()
    start = 3
    if tuned.anatomy.is_encoder_decoder:
        ids, mask, start = ids.flip(1), mask.flip(1), 0
    words, seen = written(tuned, ids, mask, beams, cache=True)
    words_uncached, seen_uncached = written(tuned, ids, mask, beams, cache=False)
    assert torch.equal(words, words_uncached)
    torch.testing.assert_close(seen, seen_uncached, rtol=1e-4, atol=2e-4)
    alone, seen_alone = written(tuned, ids[1:, start : start + 3], mask[1:, start : start + 3], beams, cache=True)
    assert torch.equal(words[1:], alone)
    torch.testing.assert_close(seen[beams:], seen_alone, rtol=1e-4, atol=2e-4)


def gradients(tuned: Tuned) -> dict[str, Tensor]:
    """Gradients of one batch in training mode, dropout at a fixed seed."""
    tuned.model.train()
    tuned.model.zero_grad()
    torch.manual_seed(11)
    tuned.model(**inputs(tuned.model), **uncached(tuned)).loss.backward()
    return {n: p.grad.clone() for n, p in tuned.trained().items() if p.grad is not None}


def uncached(tuned: Tuned) -> dict[str, bool]:
    """No cache in training, where the model has one: checkpointed blocks would warn of it."""
    return {"use_cache": False} if tuned.anatomy.is_decoder or tuned.anatomy.is_encoder_decoder else {}


def check_checkpointing(tuned: Tuned) -> None:
    """Blocks computed twice give the gradients of blocks computed once."""
    once = gradients(tuned)
    assert once
    tuned.forward.checkpoint_activations()
    twice = gradients(tuned)
    assert once.keys() == twice.keys()
    for name, gradient in once.items():
        torch.testing.assert_close(twice[name], gradient, rtol=1e-4, atol=1e-6)


def check_low_precision(name: str, method: str, **settings: Any) -> None:
    """A bf16 model trains fp32 numbers, and its loss is finite."""
    tuned = attach(tiny(name).to(torch.bfloat16), method, **settings)
    assert {p.dtype for p in tuned.trained().values()} == {torch.float32}
    tuned.model.train()
    loss = tuned.model(**inputs(tuned.model)).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in tuned.trained().values() if p.grad is not None)
