"""CPT: its bounds, its second loss against peft's, and the context that a run makes of examples."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from methods.checks import logits, stir, train
from tiny import inputs, tiny
from torch.testing import assert_close
from word_tables import word_tokenizer

from luthier.core import CannotMerge, ConfigError, IntegrityError
from luthier.data.batches import Batch
from luthier.data.tasks import Task
from luthier.methods.additive.cpt import Context, limits
from luthier.surgery import METHODS, attach, from_peft, to_peft
from luthier.training.objective import Objective

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
WORDS, TYPES = (5, 9, 17, 30, 6, 11, 23, 31, 32), (1, 2, 3, 4, 5, 6, 7, 8, 8)
ROW = {"words": WORDS, "types": TYPES, "epsilon": 2.0, "format_epsilon": 1.0}


def context(tuned: Any) -> Context:
    (found,) = tuned.modules(Context).values()
    return found


def test_words_of_answers_stay_and_the_others_stay_within_their_bounds() -> None:
    tuned = attach(tiny("gpt2"), "cpt", train_head=False, **ROW)
    start = context(tuned)().detach().clone()
    assert torch.equal(start, tuned.model.get_input_embeddings()(torch.tensor(WORDS)))
    assert tuned.n_trained() == 6 * 48
    train(tuned, 30, lr=0.1)
    moved = (context(tuned)().detach() - start).norm(dim=1)
    bounds = limits(tuned.tuning().method, 48)
    assert torch.equal(moved[[3, 7, 8]], torch.zeros(3)) and torch.equal(bounds[[3, 7, 8]], torch.zeros(3))
    assert_close(bounds[[0, 1, 2]], torch.tensor([1.0, 2.0, 1.0]) * (48 / 2048) ** 0.5)
    assert bool((moved <= bounds + 1e-5).all()) and bool((moved > bounds * 0.999)[[0, 1]].all())
    assert_close(context(tuned).offset.detach(), context(tuned).within())


@pytest.mark.parametrize("decay", [1.0, 0.25])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_its_loss_and_gradient_are_pefts_times_the_share_of_the_row_s_words(arch: str, decay: float) -> None:
    tuned = attach(tiny(arch), "cpt", decay=decay, **ROW)
    stir(tuned, 0.02)
    config = peft.CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=list(WORDS), cpt_mask=[1] * 9, cpt_tokens_type_mask=list(TYPES),
        opt_weighted_loss_type="decay", opt_loss_decay_factor=decay, opt_projection_epsilon=2.0,
        opt_projection_format_epsilon=1.0,
    )  # fmt: skip
    theirs = peft.get_peft_model(tiny(arch), config).eval()
    delta = theirs.prompt_encoder["default"].delta_embedding.weight
    moving = [i for i, kind in enumerate(TYPES) if kind % 4]
    with torch.no_grad():
        delta[moving] = context(tuned).offset
    ids = torch.randint(3, 131, (2, 7), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[:, :4] = -100
    wanted = theirs(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
    wanted.backward()
    batch = Batch(
        inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels=labels,
        rows=torch.arange(2).numpy(), n_targets=6, n_tokens=14,
    )  # fmt: skip
    tuned.model.eval()
    context(tuned).train()
    for objective in (
        Objective(tuned, Task(name="causal_lm")),
        Objective(tuned, Task(name="causal_lm"), full_logits=True),
    ):
        context(tuned).offset.grad = None
        found = tuned.tuning().method.loss(tuned, lambda of=objective: of(batch))
        found.loss.backward()
        assert_close(found.loss / (6 + 2 * 3), wanted, rtol=1e-5, atol=1e-5)
        assert_close(context(tuned).offset.grad / (6 + 2 * 3), delta.grad[moving], rtol=1e-4, atol=1e-6)
    context(tuned).eval()  # in answers the row's alone
    alone = tuned.tuning().method.loss(tuned, lambda: objective(batch))
    assert float(alone.loss.detach()) < float(found.loss.detach())


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("Granite", {"logits_scaling": 8.0}),
        ("Cohere", {"logit_scale": 0.0625}),
        ("Gemma2", {"final_logit_softcapping": 2.0, "head_dim": 12}),
    ],
)
def test_the_context_s_loss_is_of_the_logits_that_the_model_makes(arch: str, changes: dict[str, Any]) -> None:
    """Models scale or bound what their head gives; the reference is the model's own answer to context and text."""
    size = {
        "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 131, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(hf, f"{arch}ForCausalLM")(getattr(hf, f"{arch}Config")(**size, **changes)).eval()
    ids = torch.randint(3, 131, (1, 7), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # far from zero: a factor shows
        told = model(input_ids=torch.cat([torch.tensor([WORDS]), ids], 1)).logits[0].float().log_softmax(-1)
    wanted = -sum(told[i - 1, WORDS[i]] for i in (3, 7, 8))
    tuned = attach(model, "cpt", **ROW)
    tuned.model.eval()
    context(tuned).train()
    batch = Batch(
        inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels=ids, rows=torch.arange(1).numpy(),
        n_targets=6, n_tokens=7,
    )  # fmt: skip
    objective = Objective(tuned, Task(name="causal_lm"))
    alone = objective(batch).loss.detach()
    found = tuned.tuning().method.loss(tuned, lambda: objective(batch)).loss.detach()
    assert_close(found - alone, wanted, rtol=1e-3, atol=1e-3)


def test_left_pads_do_not_change_the_context_s_loss() -> None:
    tuned = attach(tiny("llama"), "cpt", **ROW)
    prompt = context(tuned)
    prompt.listens = True
    ids = torch.randint(3, 131, (1, 7), generator=torch.Generator().manual_seed(2))
    heard = []
    for pads in (0, 3):
        given = torch.cat([torch.zeros(1, pads, dtype=torch.long), ids], 1)
        mask = (torch.arange(7 + pads) >= pads).long()[None]
        tuned.model.eval()(input_ids=given, attention_mask=mask)
        heard.append(prompt.heard)
    assert heard[0].shape == (1, 9, 48)
    assert_close(heard[0], heard[1], rtol=1e-4, atol=1e-5)


def test_a_run_makes_words_and_types_of_examples() -> None:
    method = METHODS.get("cpt")(examples=(("good film", "yes"), ("bad", "no")), before_answer="is", behind="")
    tokenizer = word_tokenizer("gpt")
    made = method.completed(tokenizer, pair=False)
    pieces = ["good film", "is", "yes", "bad", "is", "no"]
    ids = [tokenizer(p, add_special_tokens=False)["input_ids"] for p in pieces]
    assert made.words == tuple(i for piece in ids for i in piece)
    assert made.types == tuple(k for k, piece in zip((2, 3, 4, 6, 7, 8), ids, strict=True) for _ in piece)
    assert made.completed(tokenizer, pair=False) is made


def test_what_has_no_context_or_none_that_fits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="they are what it tunes"):
        attach(tiny("bert"), "cpt")
    with pytest.raises(ConfigError, match="1 for 2 words"):
        attach(tiny("bert"), "cpt", words=(5, 6), types=(1,))
    with pytest.raises(ConfigError, match="count from 1"):
        attach(tiny("bert"), "cpt", words=(5, 6), types=(1, 0))
    with pytest.raises(ConfigError, match="no token has the id 900"):
        attach(tiny("bert"), "cpt", words=(5, 900), types=(1, 2))
    with pytest.raises(CannotMerge, match="language models alone"):
        to_peft(attach(tiny("bert"), "cpt", **ROW), tmp_path / "a")


def test_a_file_of_another_base_or_beyond_its_bounds_is_refused(tmp_path: Path) -> None:
    tuned = attach(tiny("llama"), "cpt", **ROW)
    stir(tuned, 1.0)
    to_peft(tuned, tmp_path / "ours")
    other = tiny("llama")
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(0.1)
    with pytest.raises(IntegrityError, match="words of answers have moved"):
        from_peft(other, tmp_path / "ours")
    config = tmp_path / "ours" / "adapter_config.json"
    config.write_text(config.read_text().replace('"opt_projection_epsilon": 2.0', '"opt_projection_epsilon": 0.1'))
    with pytest.raises(IntegrityError, match="further from their words"):
        from_peft(tiny("llama"), tmp_path / "ours")
    assert torch.equal(logits(tiny("llama"), inputs(tiny("llama"))), logits(tiny("llama")))
