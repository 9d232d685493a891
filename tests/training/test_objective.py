"""The loss in chunks is the model's own loss, and cutting a step finer changes nothing."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from contracts.cells import shake
from little import settings
from tiny import ALSO, TINY, inputs, tasks, tiny
from torch.testing import assert_close
from unusual import COMMON, random_model

from luthier.core import AnatomyError, ConfigError
from luthier.data.batches import Batch
from luthier.data.tasks import Task
from luthier.surgery import METHODS, attach
from luthier.training.objective import Objective


def _batch(model: torch.nn.Module) -> Batch:
    given = inputs(model, padded=True)
    labels = given.pop("labels").clone()
    labels[given["attention_mask"] == 0] = -100
    labels[:, :3] = -100
    n = int((labels[:, 1:] != -100).sum())
    return Batch(inputs=given, labels=labels, rows=torch.arange(len(labels)).numpy(), n_targets=n, n_tokens=0)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "gpt-neox", "opt", "qwen2", "mistral", "bloom", "phi3"])
def test_chunks_give_the_loss_and_the_gradients_of_all_logits(arch: str) -> None:
    found = []
    for full in (False, True):
        model = tiny(arch, "lm")
        tuned = attach(model, "lora")
        with torch.no_grad():
            for number, parameter in enumerate(tuned.trained().values()):
                generator = torch.Generator().manual_seed(number)
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        batch = _batch(model)
        result = Objective(tuned, Task(name="causal_lm"), full_logits=full)(batch)
        assert (result.logits is None) != full, "the way that was asked for was not taken"
        result.loss.backward()
        found.append((result.loss.detach(), [p.grad for p in tuned.trained().values()]))
    assert_close(found[0][0], found[1][0], atol=1e-4, rtol=1e-5)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_scoring_counts_what_all_logits_count(arch: str) -> None:
    model = tiny(arch, "lm")
    tuned = attach(model, "lora")
    batch = _batch(model)
    with torch.inference_mode():
        scored = Objective(tuned, Task(name="causal_lm"), scoring=True)(batch)
        whole = Objective(tuned, Task(name="causal_lm"), full_logits=True)(batch)
    assert batch.labels is not None and whole.logits is not None
    told = batch.labels[:, 1:] != -100
    right = int((whole.logits[:, :-1].argmax(-1) == batch.labels[:, 1:])[told].sum())
    assert scored.correct == right
    assert_close(float(scored.loss), float(whole.loss), rtol=1e-5, atol=1e-4)


SEPARABLE = [name for name in (*TINY, *ALSO) if "lm" in tasks(name) and name != "modernbert-decoder"]
MORE = {
    "modernbert-decoder": lambda: tiny("modernbert-decoder", "lm"),
    "bert": lambda: random_model(hf.BertLMHeadModel, hf.BertConfig(**COMMON, is_decoder=True)),
    "roberta": lambda: random_model(hf.RobertaForCausalLM, hf.RobertaConfig(**COMMON, is_decoder=True)),
    "electra": lambda: random_model(
        hf.ElectraForCausalLM, hf.ElectraConfig(**COMMON, embedding_size=16, is_decoder=True)
    ),
    "granite": lambda: random_model(hf.GraniteForCausalLM, hf.GraniteConfig(**COMMON, logits_scaling=3.0)),
    "cohere": lambda: random_model(hf.CohereForCausalLM, hf.CohereConfig(**COMMON, logit_scale=0.25)),
    "falcon-h1": lambda: random_model(hf.FalconH1ForCausalLM, hf.FalconH1Config(**{**COMMON, **FALCON_H1})),
    "future transform": lambda: random_model(_TransformForCausalLM, hf.LlamaConfig(**COMMON)),
    "future factor": lambda: random_model(_FactorForCausalLM, hf.LlamaConfig(**COMMON)),
    "future cut": lambda: random_model(_CutForCausalLM, hf.LlamaConfig(**COMMON)),
}
FALCON_H1 = {
    "mamba_d_ssm": 64,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "num_key_value_heads": 2,
    "lm_head_multiplier": 0.0390625,
}


class _FactorForCausalLM(hf.LlamaForCausalLM):
    """A head of a kind that no setting tells of: its logits are changed after the matrix."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        labels = kwargs.pop("labels", None)
        out = super().forward(*args, **kwargs)
        out.logits = self.after(out.logits)
        if labels is not None:
            out.loss = self.loss_function(out.logits, labels, vocab_size=out.logits.shape[-1])
        return out

    def after(self, logits: torch.Tensor) -> torch.Tensor:
        return logits * 1.01


class _CutForCausalLM(_FactorForCausalLM):
    def after(self, logits: torch.Tensor) -> torch.Tensor:
        return logits[..., :120]


class _TransformForCausalLM(_FactorForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.dense = torch.nn.Linear(config.vocab_size, config.vocab_size)

    def after(self, logits: torch.Tensor) -> torch.Tensor:
        return self.dense(logits)


def _loss_is_the_models_own(model: Any, method: str, *, chunked: bool | None) -> None:
    tuned = attach(model, method, **settings(method))
    shake(tuned)
    model.eval()
    batch = _batch(model)
    if model.config.vocab_size == COMMON["vocab_size"]:
        ids = batch.inputs["input_ids"] % 120
        batch = replace(batch, inputs={**batch.inputs, "input_ids": ids}, labels=ids.where(batch.labels != -100, -100))
    with torch.no_grad():
        try:
            own = float(model(**batch.inputs, labels=batch.labels).loss)
        except Exception as error:
            if method != "lst":  # some blocks cannot be narrowed; that is not asked here
                raise
            pytest.skip(f"the side network does not run in this model: {error}")
        for scoring in (False, True):
            modes = [m.training for m in model.modules()]
            draws = torch.random.get_rng_state()
            objective = Objective(tuned, Task(name="causal_lm"), scoring=scoring)
            assert torch.equal(torch.random.get_rng_state(), draws), "asking drew numbers that training draws"
            assert modes == [m.training for m in model.modules()]
            assert float(objective(batch).loss) / batch.n_targets == pytest.approx(own, rel=1e-4, abs=1e-4)
            if chunked is not None:
                assert objective.chunked == chunked, objective.why_all_logits


@pytest.mark.parametrize("arch", SEPARABLE)
def test_the_loss_in_chunks_is_the_models_own_with_labels(arch: str) -> None:
    _loss_is_the_models_own(tiny(arch, "lm"), "lora", chunked=True)


@pytest.mark.parametrize("arch", list(MORE))
def test_a_head_that_is_more_than_a_matrix_is_found_by_trying_and_its_loss_is_the_models_own(arch: str) -> None:
    _loss_is_the_models_own(MORE[arch](), "lora", chunked=False)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS.names())
@pytest.mark.parametrize("arch", [*SEPARABLE, *MORE])
def test_the_loss_is_the_models_own_with_every_method_on_every_decoder(arch: str, method: str) -> None:
    model = MORE[arch]() if arch in MORE else tiny(arch, "lm")
    try:
        _loss_is_the_models_own(model, method, chunked=None)
    except (AnatomyError, ConfigError) as error:
        pytest.skip(f"{method} does not go there: {error}")


def test_lora_on_the_output_matrix_itself_is_in_the_loss() -> None:
    model = tiny("llama", "lm")
    tuned = attach(model, "lora", sites=["head"])
    shake(tuned)
    batch = _batch(model)
    with torch.no_grad():
        own = float(model(**batch.inputs, labels=batch.labels).loss)
        objective = Objective(tuned, Task(name="causal_lm"))
        assert float(objective(batch).loss) / batch.n_targets == pytest.approx(own, rel=1e-5)
    assert not objective.chunked and "more than one matrix" in objective.why_all_logits


@pytest.mark.parametrize("arch", ["gemma2", "llama"])
def test_bf16_rounds_and_is_no_reason_to_hold_all_logits(arch: str) -> None:
    tuned = attach(tiny(arch, "lm").to(torch.bfloat16), "lora")
    assert Objective(tuned, Task(name="causal_lm")).chunked
