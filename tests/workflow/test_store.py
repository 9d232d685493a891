"""`--store`: a run over a base in codes, from its refusals to its merged folder."""

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from little import little_data, little_model
from transformers import AutoModelForCausalLM

from luthier.core import AnatomyError, ConfigError, ModelError
from luthier.data.tasks import Task
from luthier.kernels import FORMATS, StoredLinear
from luthier.surgery import storage
from luthier.workflow import resume, train
from luthier.workflow.load_model import find_model, load_model
from luthier.workflow.merged_folder import merge
from luthier.workflow.prediction import Predictor

WORDS: dict[str, Any] = {"steps": 4, "batch": 4, "threads": 1, "precision": "fp32", "progress": False}
CAUSAL = Task(name="causal_lm")


def loaded(folder: Path, store: str | None, dtype: torch.dtype = torch.float32) -> Any:
    return load_model(
        find_model(str(folder)), CAUSAL, dtype=dtype, device=torch.device("cpu"), seed=0, store=store
    )[0]  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("store", list(FORMATS))
def test_codes_are_those_of_the_file_whatever_the_rest_is_loaded_in(tmp_path: Path, kind: str, store: str) -> None:
    folder = little_model(tmp_path / "model", kind)
    wide, half, plain = loaded(folder, store), loaded(folder, store, torch.bfloat16), loaded(folder, None)
    names = [n for n, m in wide.named_modules() if isinstance(m, StoredLinear)]
    assert names
    for name in names:
        one, two, whole = wide.get_submodule(name), half.get_submodule(name), plain.get_submodule(name).weight
        whole = whole.T if one.transposed else whole
        for part, value in one.form.encode(whole).items():
            assert torch.equal(value, one.get_buffer(part)) and torch.equal(value, two.get_buffer(part))
        assert torch.equal(one.original(), whole)
        assert (one.dtype, two.dtype) == (torch.float32, torch.bfloat16)
        if one.bias is not None:
            assert torch.equal(one.bias, plain.get_submodule(name).bias)
    rest = {n: p for n, p in plain.named_parameters() if n.removesuffix(".weight") not in names}
    assert {n for n, _ in wide.named_parameters()} == set(rest)
    assert all(torch.equal(p, rest[n]) for n, p in wide.named_parameters())
    assert not hasattr(wide.config, "quantization_config")
    wide.to(torch.float16)  # transformers forbids this of models that it thinks quantised


def test_no_two_float_weights_stand_in_memory_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = little_model(tmp_path / "model", "llama")
    seen: list[weakref.ref[torch.Tensor]] = []
    put = storage.put_codes

    def watched(model: Any, path: str, weight: torch.Tensor, *more: Any) -> Any:
        gc.collect()
        assert not [ref for ref in seen if ref() is not None], f"{path}: an earlier weight is still there"
        assert all(p.is_meta or p.dim() < 2 or "layers" not in n for n, p in model.named_parameters())
        seen.append(weakref.ref(weight))
        return put(model, path, weight, *more)

    monkeypatch.setattr("luthier.workflow.load_stored.put_codes", watched)
    loaded(folder, "nf4")
    assert len(seen) > 10


def test_an_original_that_has_changed_since_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = little_model(tmp_path / "model", "llama")
    model = loaded(folder, "nf4")
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t * -1 for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    layer = next(m for m in model.modules() if isinstance(m, StoredLinear))
    with pytest.raises(ModelError, match=r"no longer what the base was made of"):
        layer.original()


@pytest.mark.parametrize("store", ["nf4", "int4"])
def test_a_run_over_codes_resumes_to_the_bit_answers_and_merges(tmp_path: Path, store: str) -> None:
    model = little_model(tmp_path / "model", "llama")
    data = little_data(tmp_path / "rows.csv", kind="prompts")
    out = tmp_path / "run"
    assert train(model, data, out=str(out), stop_at=2, rank=2, store=store, **WORDS).record.status == "paused"
    found = resume(out).record
    assert found.status == "finished" and found.bit_exact and found.spec["store"] == store
    parts = ("weights", "trained", "gradients", "optimiser")
    assert [found.forecast[part] for part in parts] == [found.memory[part] for part in parts]
    whole = train(model, data, out=str(tmp_path / "whole"), rank=2, store=store, **WORDS)
    tuning = (out / "tuning" / "tuning.safetensors").read_bytes()
    assert tuning == (Path(whole.path) / "tuning" / "tuning.safetensors").read_bytes()
    tuned = Predictor(out).tuned.model
    assert any(isinstance(m, StoredLinear) for m in tuned.modules())
    merged = AutoModelForCausalLM.from_pretrained(merge(out, tmp_path / "merged"), dtype=torch.float32)
    assert f"held as {store}" in (tmp_path / "merged" / "README.md").read_text()
    ids = torch.arange(5, 17).view(2, 6)
    with torch.no_grad():
        wanted = tuned(input_ids=ids).logits
        torch.testing.assert_close(merged.eval()(input_ids=ids).logits, wanted, atol=1e-4, rtol=1e-3)


def test_refusals_come_before_a_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = little_model(tmp_path / "model", "llama")
    data = little_data(tmp_path / "rows.csv", kind="prompts")
    monkeypatch.setattr("luthier.workflow.build.load_model", lambda *a, **k: pytest.fail("a weight was read"))
    with pytest.raises(AnatomyError, match=r"store = nf4: full: the tensor .* is quantised \(it holds nf4 codes\)"):
        train(model, data, method="full", store="nf4", out=str(tmp_path / "a"), **WORDS)
    with pytest.raises(ConfigError, match=r"store = bf16 under precision = fp32"):
        train(model, data, store="bf16", out=str(tmp_path / "b"), **WORDS)
    with pytest.raises(ConfigError, match=r"store: .*nf5"):
        train(model, data, store="nf5", out=str(tmp_path / "c"), **WORDS)
    assert not (tmp_path / "a").exists()


def test_a_model_that_is_quantised_already_is_refused(tmp_path: Path) -> None:
    folder = little_model(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"is quantised already"):
        loaded(folder, "nf4")
