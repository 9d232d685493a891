"""A LoRA for llama.cpp, for vLLM, or in place of another method: it answers as the run does, or says how near."""

import json
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from byte_words import byte_model
from little import little_data, little_spec
from transformers import AutoModelForCausalLM

from luthier.core import CannotMerge, ConfigError, IntegrityError
from luthier.runs.spec import DataSpec, OptimSpec
from luthier.workflow import train, vllm_export
from luthier.workflow.certificate import certify_folder
from luthier.workflow.certify_run import certify
from luthier.workflow.formats import export
from luthier.workflow.fresh import answer_of
from luthier.workflow.gguf_adapter import export_gguf_adapter
from luthier.workflow.gguf_export import export_gguf
from luthier.workflow.gguf_reader import ADAPTER, MODEL, read_file
from luthier.workflow.merged_folder import Merged, merged_model
from luthier.workflow.prediction import Predictor

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module", autouse=True)
def _in_this_process() -> Iterator[None]:
    """A folder that was written is read back here: a process for each takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(certify_folder.__kwdefaults__ or {}, "do", answer_of)
        yield


def _trained(home: Path, method: str, name: str = "", **changes: Any) -> Path:
    out = home / (name or method)
    data = DataSpec(source=str(little_data(home / "turns.csv", kind="turns")))
    train(little_spec(home, method, "llama", data=data, out=str(out), **{"optim": OptimSpec(lr=1e-2), **changes}))
    return out


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("others")
    byte_model(place / "llama")
    # q and k, of which the file turns the rows; two ranks, of which llama.cpp has one alpha; a scale of its own
    _trained(place, "lora", settings={"sites": ["attn.q", "attn.k", "ffn.down"], "rank": {"*": 3, "ffn.down": 2}})
    _trained(place, "dora")
    return place


@pytest.fixture(scope="module")
def adapter(home: Path) -> Path:
    return export_gguf_adapter(home / "lora", home / "adapter", check=False).path


def test_an_adapters_file_beside_the_base_gives_the_trained_models_answers(home: Path, adapter: Path) -> None:
    found = certify(home / "lora", folder=adapter, do=answer_of)
    step = found.steps[-1]
    assert step.name == "gguf_adapter" and step.status == "passed" and step.greedy == 1.0
    assert step.off is not None and step.off < 1e-5 and step.from_base is not None and step.from_base > 1e-2
    _, tensors = read_file(adapter / ADAPTER)
    assert tensors["blk.0.attn_q.weight.lora_a"].shape == (3, 48)
    assert tensors["blk.2.ffn_down.weight.lora_b"].shape == (48, 2)
    assert len(tensors) == 2 * 9


def _changed(change: Callable[[dict[str, Any]], None], alpha: float = 1.0) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        facts, tensors = read_file(folder / ADAPTER)
        held = {name: value.numpy() for name, value in tensors.items()}
        change(held)
        writer = gguf.GGUFWriter(str(folder / ADAPTER), "llama")
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha * facts["adapter.lora.alpha"])
        for name, value in held.items():
            writer.add_tensor(name, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return act


def _in_halves(tensors: dict[str, Any]) -> None:
    b = tensors["blk.0.attn_q.weight.lora_b"]
    tensors["blk.0.attn_q.weight.lora_b"] = b.reshape(4, -1, 2, b.shape[-1]).swapaxes(1, 2).reshape(b.shape).copy()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_changed(lambda t: t["blk.1.attn_k.weight.lora_b"].__imul__(-1)), "off by"),
        (_changed(_in_halves), "off by"),
        (_changed(lambda t: None, alpha=2.0), "off by"),
        (_changed(lambda t: t.pop("blk.1.attn_k.weight.lora_b")), "one half of its update"),
        (_changed(lambda t: [t.pop(f"blk.1.attn_k.weight.lora_{x}") for x in "ab"]), "off by"),
        (lambda folder: (folder / ADAPTER).write_bytes((folder / ADAPTER).read_bytes()[:200]), "it claims 18 tensors"),
    ],
)
def test_an_adapters_file_that_was_damaged_is_caught(
    damage: Callable[[Path], Any], told: str, home: Path, adapter: Path, tmp_path: Path
) -> None:
    sent = tmp_path / "sent"
    shutil.copytree(adapter, sent)
    damage(sent)
    found = certify(home / "lora", folder=sent, do=answer_of)
    assert [step.name for step in found.failed] == ["gguf_adapter"]
    assert told in found.failed[0].reason, found.failed[0].reason


def test_a_method_that_is_no_lora_is_refused_with_the_nearest_and_written_at_a_rank_with_what_it_costs(
    home: Path,
) -> None:
    with pytest.raises(CannotMerge, match=r"dora\): attn.q@0: its change is of a rank above .*--as lora --rank N"):
        export_gguf_adapter(home / "dora", home / "out", check=False)
    with pytest.raises(CannotMerge, match=r"vLLM does not do DoRA, and this is dora.*--as lora.*--to merged"):
        export(home / "dora", home / "out", to="vllm")
    assert not (home / "out").exists()
    written = export(home / "dora", home / "thin", to="vllm", rank=16)
    said = " ".join(written.notes)
    assert "rank 16 keeps 9" in said and "least at attn." in said
    assert "loss on 9 held-out rows: " in said and " before, " in said and "--max-lora-rank 16" in written.line
    assert written.step is not None and written.step.status == "passed" and written.step.off is not None
    assert written.step.off > 1e-5, "near it, and not the same"
    facts = json.loads((home / "thin" / "adapter_config.json").read_text())
    assert facts["r"] == facts["lora_alpha"] == 16 and not facts["use_dora"] and "rank_pattern" not in facts
    assert "dora, as LoRA of rank 16, which is near it" in (home / "thin" / "README.md").read_text()


def test_a_rank_that_loses_too_much_is_not_written(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.workflow.certificate.OF_THE_EFFECT", 1e-4)
    with pytest.raises(IntegrityError, match=r"off by .* A higher --rank is nearer\. --accept"):
        export(home / "dora", home / "out", rank=2)
    assert not (home / "out").exists()


def test_the_limits_of_vllm_are_checked_before_a_folder_has_its_name(home: Path, tmp_path: Path) -> None:
    with pytest.raises(CannotMerge, match=r"rank_pattern is .*vLLM takes one for all layers, and ignores it"):
        export(home / "lora", home / "out", to="vllm")
    assert not (home / "out").exists() and not list(home.glob(".tmp-out*"))
    good = {"peft_type": "LORA", "r": 8, "target_modules": ["model.layers.0.self_attn.q_proj"], "bias": "none"}
    for change, told in (
        ({}, None),
        ({"r": 513}, "at most 512"),
        ({"use_dora": True}, "without DoRA"),
        ({"peft_type": "IA3"}, "loads LoRA"),
        ({"alpha_pattern": {"x": 1}}, "alpha_pattern"),
        ({"modules_to_save": ["score"]}, "score is trained whole"),
        ({"bias": "all"}, "bias"),
        ({"target_modules": ["model.embed_tokens"]}, "embed_tokens is tuned"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**good, **change}))
        if told is None:
            vllm_export.check(tmp_path)
            continue
        with pytest.raises(CannotMerge, match=told):
            vllm_export.check(tmp_path)
    train(little_spec(home, "lora", steps=2, out=str(home / "labels")))
    with pytest.raises(ConfigError, match=r"is of task classification.*Nearest is --to merged"):
        export(home / "labels", home / "out", to="vllm")
    with pytest.raises(ConfigError, match="--rank 0: must be 1 or more"):
        export(home / "dora", home / "out", rank=0)
    with pytest.raises(ConfigError, match="--to gguf takes none; peft, gguf-adapter, vllm"):
        export(home / "dora", home / "out", to="gguf", rank=4)


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
@pytest.mark.filterwarnings("default")
def test_llama_cpp_itself_adds_the_adapter_to_a_file_of_the_base(
    home: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import llama_cpp

    def of_base(path: Path, *, dtype: str) -> Merged:
        found = merged_model(path, dtype=dtype)
        found.model.load_state_dict(AutoModelForCausalLM.from_pretrained(home / "llama").state_dict())
        return found

    monkeypatch.setattr("luthier.workflow.gguf_export.merged_model", of_base)
    export_gguf(home / "lora", home / "base-file", dtype="f32", check=False)
    predictor = Predictor(home / "lora", dtype=torch.float32)
    ids = predictor.tokenizer("### User:\nhow far is the moon 12\n### Assistant:\n")["input_ids"]
    file = llama_cpp.Llama(
        str(home / "base-file" / MODEL), lora_path=str(adapter / ADAPTER), n_ctx=64, n_threads=1, logits_all=True,
        verbose=False, type_k=0, type_v=0,
    )  # fmt: skip
    file.eval(ids)
    found = torch.tensor(np.array(file.scores[: len(ids)]))
    file.close()
    with torch.no_grad():
        wanted = predictor.tuned.model(input_ids=torch.tensor([ids])).logits[0]
        with predictor.tuned.base_only():
            base = predictor.tuned.model(input_ids=torch.tensor([ids])).logits[0]
    assert (found - wanted).abs().max() < 1e-3 * wanted.abs().max() < 0.1 * (base - wanted).abs().max()
