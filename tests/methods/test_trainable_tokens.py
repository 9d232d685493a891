"""Trainable tokens: which rows move, in tables and output matrices, tied and not; peft computes the same."""

import peft
import pytest
import torch
from methods.checks import logits, stir, train
from tiny import inputs, tiny

from luthier.core import ConfigError
from luthier.surgery import attach

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_peft_computes_the_same_and_gives_the_same_gradients(arch: str) -> None:
    ids, table = [3, 17, 40], {"llama": "embed_tokens", "gpt2": "wte"}[arch]
    model = tiny(arch, "lm")
    tuned = attach(model, "trainable_tokens", tokens=ids, output_matrix=False)
    stir(tuned, 0.3)
    other = peft.get_peft_model(tiny(arch, "lm"), peft.TrainableTokensConfig(target_modules=[table], token_indices=ids))
    theirs = next(p for n, p in other.named_parameters() if "trainable_tokens_delta" in n)
    (moves,) = tuned.trained().values()
    with torch.no_grad():
        theirs.add_(moves)
    batch = inputs(model)
    assert set(ids) & set(batch["input_ids"].flatten().tolist())
    out, wanted = model.eval()(**batch), other.eval()(**batch)
    torch.testing.assert_close(out.logits, wanted.logits, rtol=1e-5, atol=1e-5)
    out.loss.backward()
    wanted.loss.backward()
    torch.testing.assert_close(moves.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    tuned.merging.fold()
    torch.testing.assert_close(logits(model, batch), wanted.logits.detach(), rtol=1e-5, atol=1e-5)


def test_only_the_named_rows_move_and_the_words_of_others_are_read_as_before() -> None:
    model = tiny("llama", "lm")
    before = model.model.embed_tokens.weight.detach().clone()
    real = [b["input_ids"][b["attention_mask"].bool()] for b in (inputs(model, seed=s) for s in (0, 1))]
    read = sorted({*real[0].tolist()} & {*real[1].tolist()})[:2]
    tuned = attach(model, "trainable_tokens", tokens=tuple(read), output_matrix=False)
    train(tuned, 2)
    tuned.merging.fold()
    moved = (model.model.embed_tokens.weight != before).any(1).nonzero().flatten().tolist()
    assert moved == read


def test_an_output_matrix_of_its_own_has_numbers_of_its_own() -> None:
    for arch, tables in (("llama", 2), ("gpt2", 1)):
        model = tiny(arch, "lm")
        tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert tied is (tables == 1)
        for outputs in (True, False):
            tuned = attach(model, "trainable_tokens", tokens=(3, 17), output_matrix=outputs)
            assert sum(p.numel() for p in tuned.trained().values()) == 2 * 48 * (tables if outputs else 1)
            tuned.detach()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ((131,), "trainable_tokens.tokens: 131 is no row of the 131 of "),
        ((-1,), "trainable_tokens.tokens: -1 is no row"),
        ((4, 4), "trainable_tokens.tokens: 4 stands there twice"),
    ],
)
def test_ids_that_are_not_there_are_refused(tokens: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attach(tiny("bert"), "trainable_tokens", tokens=tokens)
