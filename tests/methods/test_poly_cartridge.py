"""Poly's mixtures and a cartridge's start; their numbers against peft's stand in test_peft_whole.py."""

from pathlib import Path

import peft
import pytest
import torch
from methods.checks import logits, stir
from tiny import inputs, tiny

from luthier.core import AnatomyError, ConfigError
from luthier.surgery import attach, to_peft

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.parametrize("training", [False, True])
def test_poly_has_pefts_outputs_and_gradients_also_where_skills_are_drawn(training: bool, tmp_path: Path) -> None:
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
    model = tiny("bert", "classification", **still)
    tuned = attach(model, "poly", tasks=3, splits=2, rank=3, train_head=False)
    stir(tuned, 0.2)
    to_peft(tuned, tmp_path / "ours")
    bare = tiny("bert", "classification", **still)
    theirs = peft.PeftModel.from_pretrained(bare, str(tmp_path / "ours"), is_trainable=True)
    batch = inputs(model)
    task = torch.tensor([2, 0, 1])
    outs = []
    for one, more in ((model, {"row_task": task}), (theirs, {"task_ids": task})):
        one.train(training)
        torch.manual_seed(3)
        out = one(**batch, **more)
        out.loss.backward()
        outs.append(out.logits.detach())
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-5)
    there = [p.grad for n, p in theirs.named_parameters() if p.requires_grad and "poly" in n]
    mine = [p.grad for p in tuned.trained().values()]
    assert len(there) == len(mine) == 18
    assert sorted(round(float(g.norm()), 4) for g in there) == sorted(round(float(g.norm()), 4) for g in mine)


def test_a_task_of_poly_has_its_own_mixture_and_no_other_tasks_logits_move() -> None:
    tuned = attach(tiny("llama"), "poly", tasks=3, rank=3, skills=2)
    stir(tuned, 0.3)
    batch = inputs(tuned.model, padded=False)
    first, second = (logits(tuned.model, batch | {"row_task": torch.tensor([n] * 3)}) for n in (0, 1))
    assert not torch.allclose(first, second, atol=1e-4)
    tuned.model(**batch, row_task=torch.tensor([1, 1, 1])).loss.backward()
    for module in tuned.modules().values():
        assert module.logits.grad[1].abs().max() > 0
        assert not module.logits.grad[[0, 2]].any()
    with pytest.raises(ConfigError, match=r"poly\.splits"):
        attach(tiny("llama"), "poly", splits=5)


def test_a_fresh_cartridge_of_a_whole_text_answers_as_if_the_text_had_been_read_before() -> None:
    words = [5, 9, 30, 7, 12]
    model = tiny("llama", "lm").eval()
    ids = inputs(model, padded=False)["input_ids"]
    before = torch.tensor([words]).expand(len(ids), -1)
    wanted = logits(model, {"input_ids": torch.cat([before, ids], dim=1)})[:, len(words) :]
    tuned = attach(model.train(), "cartridge", words=words, length=5)
    torch.testing.assert_close(logits(model, {"input_ids": ids}), wanted, rtol=1e-5, atol=1e-5)
    cache = tuned.modules()["prefix"]
    held = cache.first.clone()
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD(tuned.trained().values(), lr=1.0).step()
    assert torch.equal(cache.first, held)
    assert not torch.allclose(logits(model, {"input_ids": ids}), wanted, atol=1e-4)


def test_what_a_cartridge_cannot_do_is_said() -> None:
    for arch in ("bert", "t5"):
        with pytest.raises(AnatomyError, match="Use prefix_tuning"):
            attach(tiny(arch), "cartridge", words=list(range(3, 30)))
    with pytest.raises(ConfigError, match=r"cartridge\.words: 3 for a length of 20"):
        attach(tiny("llama"), "cartridge", words=[3, 4, 5])
    with pytest.raises(ConfigError, match=r"cartridge\.words: 999 is no token of the 131"):
        attach(tiny("llama"), "cartridge", words=[3, 999], length=2)
    with pytest.raises(ConfigError, match=r"cartridge\.still: 4 of 4"):
        attach(tiny("llama"), "cartridge", length=4, still=4)
