"""PASTA: the acid tests of its paper, beside those that every method passes; and what is done at a block's entrance."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from little import little_spec
from methods.checks import counted, logits, stir
from tiny import tiny

from luthier import train as run
from luthier.core import AnatomyError, CompositionError, ConfigError, ModelError
from luthier.methods.additive.pasta import AtSpecialTokens
from luthier.surgery import attach
from luthier.workflow import resume
from luthier.workflow.resume_proof import run_digests

CLS, SEP = 1, 2


def batch_of(rows):
    """Rows of ids, padded on the right."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


ONE, PAIR = [CLS, 40, 41, SEP], [CLS, 50, 51, 52, SEP, 60, SEP]


def tuned_on(name="bert", task="", **settings):
    tuned = attach(tiny(name, task), "pasta", special=(CLS, SEP), vectors=3, **settings)
    stir(tuned)
    return tuned


def first_reads(model, batch, layer):
    blocks = {"bert": lambda m: m.bert.encoder.layer}
    seen = []
    block = blocks["bert"](model)[layer]
    module = getattr(block, "base", block)
    handle = module.register_forward_pre_hook(lambda m, args, kwargs: seen.append(args[0].clone()), with_kwargs=True)
    logits(model, batch)
    handle.remove()
    return seen[0]


@pytest.mark.acid("pasta", 1)
def test_the_text_stays_as_long_as_it_is():
    tuned = tuned_on(task="tokens")
    batch = batch_of([ONE, PAIR])
    assert logits(tuned.model, batch).shape[1] == 7
    assert first_reads(tuned.model, batch, 1).shape[1] == 7


@pytest.mark.acid("pasta", 2)
def test_all_other_tokens_of_the_first_layers_input_are_the_bases_bits():
    base, tuned = tiny("bert"), tuned_on()
    batch = batch_of([ONE, PAIR])
    held, found = first_reads(base, batch, 0), first_reads(tuned.model, batch, 0)
    special = torch.isin(batch["input_ids"], torch.tensor([CLS, SEP]))
    assert torch.equal(found[~special], held[~special])
    vectors = tuned.modules(AtSpecialTokens)["block_out@0"].vectors.detach()
    torch.testing.assert_close(found[1][special[1]] - held[1][special[1]], vectors)
    torch.testing.assert_close(found[0][special[0]] - held[0][special[0]], vectors[:2])


@pytest.mark.acid("pasta", 3)
@pytest.mark.parametrize("beside", ["", "+prompt_tuning", "+p_tuning"])
def test_rows_with_two_and_with_three_in_one_batch_are_as_alone(beside):
    length = {"": {}, "+prompt_tuning": {"prompt_tuning.length": 2}, "+p_tuning": {"p_tuning.length": 4}}[beside]
    of = "pasta." if beside else ""
    tuned = attach(tiny("bert"), f"pasta{beside}", **{f"{of}special": (CLS, SEP), f"{of}vectors": 3, **length})
    stir(tuned)
    together = logits(tuned.model, batch_of([ONE, PAIR]))
    for row, found in zip((ONE, PAIR), together, strict=True):
        torch.testing.assert_close(logits(tuned.model, batch_of([row]))[0], found, rtol=1e-4, atol=1e-5)


@pytest.mark.acid("pasta", 4)
def test_counts_are_those_of_the_paper():
    for n, wanted in ((2, 18_432), (3, 27_648), (4, 36_864)):
        assert counted("pasta", special=(CLS,), vectors=n) == wanted


def test_a_pass_looks_for_special_tokens_once():
    tuned = tuned_on()
    with patch.object(AtSpecialTokens, "_found", autospec=True, side_effect=AtSpecialTokens._found) as looks:
        one, other = logits(tuned.model, batch_of([ONE])), logits(tuned.model, batch_of([PAIR]))
    assert looks.call_count == 2 and len(tuned.modules(AtSpecialTokens)) == 3
    assert not torch.allclose(one, other)


def test_it_acts_on_the_encoder_of_two_stacks_and_in_generation():
    tuned = tuned_on("t5")
    assert all("encoder" in key for key in tuned.modules(AtSpecialTokens))
    model = tuned.model.eval()
    given = batch_of([[40, 41, 2], [50, 51, 52, 53, 2]])
    asked = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(**given, **asked), model.generate(**given, **asked, use_cache=False))


def test_a_run_takes_the_ids_from_its_tokenizer_and_goes_on_to_the_bit(tmp_path):
    spec = replace(little_spec(tmp_path, "lora"), method="pasta", settings={}, steps=6)
    run(replace(spec, out=str(tmp_path / "whole")))
    text = (tmp_path / "whole" / "tuning" / "tuning.json").read_text()
    assert '"vectors": 2' in text and '"special": []' not in text
    run(replace(spec, out=str(tmp_path / "cut")), stop_at=3)
    resume(tmp_path / "cut")
    assert run_digests(tmp_path / "cut") == run_digests(tmp_path / "whole")


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ConfigError, match="which ids are special tokens is not known here"):
        attach(tiny("bert"), "pasta")
    with pytest.raises(AnatomyError, match="writes token by token"):
        attach(tiny("llama"), "pasta", special=(1,))
    tuned = tuned_on()
    with pytest.raises(ModelError, match=r"a row has 4 special tokens, and there are vectors for 3\. Set vectors=4"):
        logits(tuned.model, batch_of([[1, 2, 1, 2, 40]]))
    with pytest.raises(ModelError, match="Give the text as input_ids"):
        tuned.model(inputs_embeds=torch.randn(1, 3, 48))
    with (
        pytest.raises(CompositionError, match="takes part in how blocks are called"),
        tuned.rows(["default", None]),
    ):
        pass
