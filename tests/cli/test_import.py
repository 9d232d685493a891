"""`luthier import`: what peft saved computes the same as a tuning; what cannot is refused and nothing is written."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.conftest import Call
from little import little_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from luthier.surgery import load

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft


def _adapter(base: Any, folder: Path, config: Any, model: Path) -> Path:
    """What peft saves of an adapter with numbers in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(base, config)
        with torch.no_grad():
            for number, parameter in enumerate(p for p in made.parameters() if p.requires_grad):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
        made.peft_config["default"].base_model_name_or_path = str(model)
        made.save_pretrained(folder)
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return little_model(tmp_path / "llama", "llama")


@pytest.fixture
def adapter(llama: Path, tmp_path: Path) -> Path:
    base = AutoModelForCausalLM.from_pretrained(llama)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return _adapter(base, tmp_path / "adapter", config, llama)


def test_a_language_models_adapter_becomes_a_tuning(luthier: Call, llama: Path, adapter: Path) -> None:
    answer = luthier("import", adapter, "--out", "tuning", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["method"] == "lora" and answer.json["gap"] < 1e-5
    ids = torch.tensor([[5, 6, 7, 8]])
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    load(model, "tuning")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), str(adapter)).eval()
        assert torch.allclose(model(ids).logits, theirs(ids).logits, atol=1e-5)
    again = luthier("import", adapter, "--out", "tuning")
    assert again.code == 2 and "is there already" in again.err


def test_a_classifier_comes_with_its_head(luthier: Call, tmp_path: Path) -> None:
    model = little_model(tmp_path / "bert")
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=3)
    config = peft.IA3Config(target_modules=["key", "value"], feedforward_modules=[], task_type="SEQ_CLS")
    adapter = _adapter(base, tmp_path / "adapter", config, model)
    answer = luthier("import", adapter, "--out", "tuning")
    assert answer.code == 0 and "ia3" in answer.out and "peft's own" in answer.out
    assert any("classifier" in n or n.startswith("head") for n in load_file("tuning/tuning.safetensors"))


def test_what_cannot_be_read_is_refused_and_nothing_is_written(luthier: Call, adapter: Path, tmp_path: Path) -> None:
    def refused(told: str, code: int, *more: object) -> None:
        answer = luthier("import", adapter, "--out", "tuning", *more)
        assert answer.code == code and told in answer.err, answer.err
        assert not Path("tuning").exists()

    weights, facts = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    whole, told = load_file(weights), facts.read_text()
    first = sorted(whole)[0]
    refused("no such model folder", 3, "--model", "./nowhere")
    refused("right base", 3, "--model", little_model(tmp_path / "bert"))
    for value, said, code in (
        (whole[first] * float("nan"), "not finite", 4),
        (whole[first][:1], first.split(".")[-2], 4),
        (None, "nothing", 4),
    ):
        changed = {n: t for n, t in whole.items() if n != first} | ({} if value is None else {first: value})
        save_file(changed, weights, {"format": "pt"})
        answer = luthier("import", adapter, "--out", "tuning")
        assert answer.code == code, (said, answer.err)
        assert not Path("tuning").exists()
    save_file({n: torch.zeros_like(t) if "lora_B" in n else t for n, t in whole.items()}, weights, {"format": "pt"})
    refused("nothing to import", 3)
    save_file(whole, weights, {"format": "pt"})
    facts.write_text(json.dumps({**json.loads(told), "surprise": True}))
    refused("surprise", 2)
    facts.write_text(json.dumps({**json.loads(told), "task_type": "QUESTION_ANS"}))
    refused("task_type", 2)
    weights.unlink()
    facts.write_text(told)
    refused("adapter_model.safetensors", 3)


def test_an_adapter_of_another_kind_becomes_the_nearest_lora_and_it_is_said_how_near(
    luthier: Call, llama: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(llama)
    config = peft.LoHaConfig(r=4, alpha=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    adapter = _adapter(base, llama.parent / "loha", config, llama)
    found = luthier("import", adapter, "--out", "thin", "--as", "lora", "--rank", 16, "--json")
    assert found.code == 0, found.err
    assert found.json["method"] == "loha, as LoRA of rank 16"  # of rank 4 times 4, so it is the same
    assert "off by" in found.json["notes"][-1]
    facts = json.loads(Path("thin/tuning.json").read_text())
    assert facts["method"] == "lora"
    near = luthier("import", adapter, "--out", "thinner", "--as", "lora", "--rank", 2, "--json")
    assert "which is near it and not the same" in near.json["method"]
    for words, told in (
        (("--as", "dora", "--rank", 2), "--as dora: lora is what"),
        (("--as", "lora"), "go together"),
        (("--rank", 2), "go together"),
        (("--as", "lora", "--rank", 0), "must be 1 or more"),
    ):
        wrong = luthier("import", adapter, "--out", "wrong", *words)
        assert wrong.code == 2 and told in wrong.err
    assert not Path("wrong").exists()
