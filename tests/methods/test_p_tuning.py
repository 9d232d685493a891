"""P-tuning: the acid tests of its paper, beside those that every method passes; and vectors behind the text."""

import pytest
import torch
from methods.checks import counted, frozen_copy, logits, same, stir, train
from safetensors.torch import load_file
from tiny import inputs, tiny

from luthier.core import AnatomyError, ConfigError
from luthier.methods.additive.p_tuning import EncodedPrompt
from luthier.surgery import attach, load


def prompt(tuned):
    return next(iter(tuned.modules(EncodedPrompt).values()))


def with_words(tuned, ids):
    """Let the vectors be those of words."""
    model = tuned.model
    embed = model.get_encoder().get_input_embeddings() if model.config.is_encoder_decoder else (
        model.get_input_embeddings()
    )  # fmt: skip
    prompt(tuned).settle(embed(torch.tensor(ids)).detach())


def test_its_numbers_on_bert_base_are_those_of_the_catalogue():
    assert counted("p_tuning") == 8_278_272
    assert counted("p_tuning", encoder="mlp") == 1_188_096


@pytest.mark.acid("p_tuning", 1)
def test_the_vectors_alone_are_stored_and_give_the_same(tmp_path):
    tuned = attach(tiny("bert"), "p_tuning", length=4)
    train(tuned, 3)
    before = logits(tuned.model)
    tuned.save(tmp_path / "t")
    found = load_file(tmp_path / "t" / "tuning.safetensors")
    assert {n: tuple(t.shape) for n, t in found.items() if not n.startswith("head/")} == {"prompt.vectors": (4, 48)}
    tuned.finish()
    assert prompt(tuned).mlp is None
    # Another kernel of the LSTM computes them where no gradient is wanted: the same to rounding.
    torch.testing.assert_close(logits(tuned.model), before, rtol=1e-5, atol=1e-6)
    finished = logits(tuned.model)
    tuned.save(tmp_path / "finished")
    for name, wanted in (("t", before), ("finished", finished)):
        again = tiny("bert")
        load(again, tmp_path / name)
        torch.testing.assert_close(logits(again), wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(logits(again), finished)


@pytest.mark.acid("p_tuning", 2)
@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
def test_one_embedding_moves_every_vector_through_the_lstm_and_one_without_it(encoder):
    tuned = attach(tiny("bert"), "p_tuning", length=5, encoder=encoder)
    module = prompt(tuned)
    before = module().detach()
    with torch.no_grad():
        module.vectors[2] += 1.0
    moved = (module().detach() - before).abs().amax(-1) > 1e-7
    assert moved.tolist() == [encoder == "lstm" or i == 2 for i in range(5)]


@pytest.mark.acid("p_tuning", 3)
@pytest.mark.parametrize(
    ("name", "task"),
    [("bert", "tokens"), ("roberta", "tokens"), ("electra", "tokens"), ("modernbert", "tokens"),
     ("deberta-v2", "tokens"), ("t5", "seq2seq"), ("bart", "seq2seq")],
)  # fmt: skip
@pytest.mark.parametrize("padded", [True, False])
def test_vectors_that_are_words_on_both_sides_act_as_those_words(name, task, padded):
    front, back = [17, 90, 5], [44, 23]
    model = tiny(name, task)
    batch = inputs(model, padded=padded)
    decoder = {"decoder_input_ids": batch.pop("labels")} if task == "seq2seq" else {}
    ends = batch["attention_mask"].sum(-1).tolist()
    wanted = []
    for row, end in zip(batch["input_ids"], ends, strict=True):
        ids = torch.tensor([front + row[:end].tolist() + back])
        more = {k: v[len(wanted) : len(wanted) + 1] for k, v in decoder.items()}
        wanted.append(logits(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | more)[0])
    tuned = attach(model, "p_tuning", length=5, behind=2)
    with_words(tuned, front + back)
    found = logits(model, {k: v for k, v in batch.items() if k != "labels"} | decoder)
    for got, want, end in zip(found, wanted, ends, strict=True):
        if task == "tokens":
            got, want = got[:end], want[3 : 3 + end]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)
    other = attach(tiny(name, task), "p_tuning", length=5, behind=0)
    with_words(other, front + back)
    elsewhere = logits(other.model, {k: v for k, v in batch.items() if k != "labels"} | decoder)
    assert (elsewhere - found).abs().max() > 1e-3, "where they stand says nothing"


@pytest.mark.acid("p_tuning", 4)
def test_the_model_is_frozen_unless_it_is_asked_to_train():
    tuned = attach(tiny("bert"), "p_tuning", length=4)
    held = frozen_copy(tuned)
    train(tuned, 5, decay=0.1)
    assert same(dict(tuned.model.named_parameters()), held)
    both = attach(tiny("bert"), "p_tuning", length=4, tune_lm=True)
    whole = sum(p.numel() for n, p in tiny("bert").named_parameters() if not n.startswith("classifier"))
    assert both.n_trained() == both.tuning().method.n_params(both.anatomy) > whole
    (group,) = both.groups()
    assert group.lr_factor == 0.02 and all(n.startswith("model/") for n in group.names) and len(group.names) > 40


def test_left_padding_and_prompts_of_two_methods_stand_in_one_row():
    both = {"p_tuning.length": 5, "p_tuning.behind": 2, "prompt_tuning.length": 2}
    tuned = attach(tiny("bert", "tokens"), "p_tuning+prompt_tuning", **both)
    stir(tuned)
    right, left = (inputs(tuned.model, side=side) for side in ("right", "left"))
    for batch in (right, left):
        together = logits(tuned.model, batch)
        for i in range(3):
            real = batch["attention_mask"][i].bool()
            alone = {k: v[i : i + 1] for k, v in batch.items()}
            alone = alone | {k: alone[k][:, real] for k in ("input_ids", "attention_mask")}
            del alone["labels"]
            torch.testing.assert_close(together[i][real], logits(tuned.model, alone)[0], rtol=1e-4, atol=2e-5)


def test_behind_the_text_of_a_decoder_it_is_refused():
    with pytest.raises(AnatomyError, match="behind the text of a decoder are read by nothing"):
        attach(tiny("llama"), "p_tuning", length=4, behind=2)
    tuned = attach(tiny("llama"), "p_tuning", length=4)
    assert prompt(tuned).behind == 0
    with pytest.raises(ConfigError, match=r"behind: 5 of 4 vectors"):
        attach(tiny("bert"), "p_tuning", length=4, behind=5)
