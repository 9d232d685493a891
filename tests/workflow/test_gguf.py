"""A file for llama.cpp answers as the run does, is caught where it was damaged, and llama.cpp itself agrees."""

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from byte_words import byte_model, byte_tokenizer
from little import little_data, little_spec
from tokenizers import pre_tokenizers

from luthier.core import CannotMerge, ConfigError
from luthier.runs.spec import DataSpec, OptimSpec
from luthier.workflow import gguf_vocabulary, train
from luthier.workflow.certify_run import certify
from luthier.workflow.formats import export
from luthier.workflow.fresh import answer_of
from luthier.workflow.gguf_export import export_gguf
from luthier.workflow.gguf_layout import stored_as
from luthier.workflow.gguf_reader import MODEL, read_file
from luthier.workflow.merged_folder import merged_model
from luthier.workflow.prediction import Predictor

gguf = pytest.importorskip("gguf")


def trained(home: Path, kind: str = "llama", method: str = "lora", **changes: Any) -> Path:
    byte_model(home / kind, kind)
    data = DataSpec(source=str(little_data(home / "turns.csv", kind="turns")))
    out = home / f"run-{kind}-{method}"
    spec = little_spec(home, method, kind, data=data, optim=OptimSpec(lr=1e-2), out=str(out), **changes)
    train(spec)
    return out


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("gguf")
    trained(place)
    return place


@pytest.fixture(scope="module")
def written(home: Path) -> Path:
    return export_gguf(home / "run-llama-lora", home / "file", dtype="f32", check=False).path


def test_a_file_alone_gives_the_trained_models_answers_words_and_stops(home: Path, written: Path) -> None:
    found = certify(home / "run-llama-lora", folder=written, do=answer_of)
    step = found.steps[-1]
    assert step.name == "gguf" and step.status == "passed" and step.greedy == 1.0
    assert step.off is not None and step.off < 1e-5 and step.from_base is not None and step.from_base > 1e-2
    assert "from the file alone" in step.reason
    facts, tensors = read_file(written / MODEL)
    assert facts["tokenizer.ggml.pre"] == "smollm" and facts["general.architecture"] == "llama"
    assert facts["tokenizer.ggml.tokens"][-1] == "[PAD423]" and facts["tokenizer.ggml.token_type"][-1] == 5
    # As the format says: row 2 i + j of a head is row j d/2 + i of transformers'.
    weight = merged_model(home / "run-llama-lora", dtype="fp32").model.model.layers[1].self_attn.k_proj.weight
    for head, i, j in ((0, 0, 1), (1, 2, 0), (1, 5, 1)):
        assert torch.equal(tensors["blk.1.attn_k.weight"][head * 12 + 2 * i + j], weight[head * 12 + j * 6 + i])


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("llama", "q8_0"), ("qwen2", "f16"), *(pytest.param("qwen3", d, marks=pytest.mark.slow) for d in ("bf16", "f32"))],
)
def test_files_of_other_families_and_types_pass(kind: str, dtype: str, home: Path) -> None:
    run = home / "run-llama-lora" if kind == "llama" else trained(home, kind)
    export_gguf(run, home / f"{kind}-{dtype}", dtype=dtype, check=False)
    found = certify(run, folder=home / f"{kind}-{dtype}", do=answer_of)
    assert found.passed, [step.reason for step in found.failed]


def _changed(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Write the file again with other tensors, and the same metadata."""

    def act(folder: Path) -> None:
        reader = gguf.GGUFReader(str(folder / MODEL))
        tensors = {t.name: np.array(t.data) for t in reader.tensors}
        change(tensors)
        writer = gguf.GGUFWriter(str(folder / "new.gguf"), "llama")
        for name, field in reader.fields.items():
            if not name.startswith("GGUF.") and name != "general.architecture":
                kind = field.types[0]
                writer.add_key_value(name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
        for name, value in tensors.items():
            writer.add_tensor(name, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        del reader
        (folder / "new.gguf").replace(folder / MODEL)

    return act


def _negated(tensors: dict[str, Any]) -> None:
    tensors["blk.2.ffn_down.weight"] *= -1


def _in_halves(tensors: dict[str, Any]) -> None:
    value = tensors["blk.0.attn_q.weight"]
    tensors["blk.0.attn_q.weight"] = value.reshape(4, -1, 2, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)


def _lying(folder: Path) -> None:
    whole = bytearray((folder / MODEL).read_bytes())
    whole[8:16] = (2**40).to_bytes(8, "little")
    (folder / MODEL).write_bytes(whole)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_changed(_negated), "off by"),
        (_changed(_in_halves), "off by"),
        (_changed(lambda t: t["output.weight"].__imul__(1.001)), "off by"),
        (_changed(lambda t: t.pop("blk.1.ffn_up.weight")), "blk.1.ffn_up.weight"),
        (_lying, "it claims 1099511627776 tensors"),
    ],
)
def test_a_file_that_was_damaged_is_caught(
    damage: Callable[[Path], None], told: str, home: Path, written: Path, tmp_path: Path
) -> None:
    sent = tmp_path / "sent"
    shutil.copytree(written, sent)
    damage(sent)
    found = certify(home / "run-llama-lora", folder=sent, do=answer_of)
    assert [step.name for step in found.failed] == ["gguf"]
    assert told in found.failed[0].reason


def test_rules_that_cut_texts_are_known_by_what_they_do() -> None:
    for name, cut in gguf_vocabulary.cutters().items():
        assert gguf_vocabulary._name_of(byte_tokenizer(cut)) == name
    with pytest.raises(CannotMerge, match=r"none of the rules that are known here \(gpt-2, smollm"):
        gguf_vocabulary._name_of(byte_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=True)))


def test_what_llama_cpp_cannot_hold_is_refused_and_nothing_is_left(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run = home / "run-llama-lora"
    with pytest.raises(ConfigError, match="written in f32, f16"):
        export_gguf(run, out, dtype="q4")
    with pytest.raises(ConfigError, match="--to onnx takes none; merged, gguf"):
        export(run, out, to="onnx", dtype="f16")
    train(little_spec(home, "lora", steps=2, out=str(home / "labels")))
    with pytest.raises(ConfigError, match=r"is of task classification.*Nearest is --to onnx"):
        export(home / "labels", out, to="gguf")
    train(little_spec(home, "lora", "gpt2", steps=2, out=str(home / "gpt2-run")))
    with pytest.raises(CannotMerge, match=r"GPT2LMHeadModel: files for llama.cpp are written for Llama, .*--to merged"):
        export(home / "gpt2-run", out, to="gguf")
    with pytest.raises(CannotMerge, match=r"7e\+04 does not fit f16"):
        stored_as(torch.full((2, 32), 7e4), "f16")
    monkeypatch.setattr("luthier.workflow.gguf_export.write_vocabulary", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_gguf(run, out)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
@pytest.mark.filterwarnings("default")
def test_llama_cpp_itself_computes_the_trained_models_logits(home: Path, written: Path) -> None:
    import llama_cpp

    predictor = Predictor(home / "run-llama-lora", dtype=torch.float32)
    text = "### User:\nhow far is the moon 12\n### Assistant:\n"
    ids = predictor.tokenizer(text)["input_ids"]
    file = llama_cpp.Llama(
        str(written / MODEL), n_ctx=64, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0
    )
    assert file.tokenize(text.encode(), add_bos=False, special=True) == ids
    file.eval(ids)
    found = torch.tensor(np.array(file.scores[: len(ids)]))
    file.close()
    with torch.no_grad():
        wanted = predictor.tuned.model(input_ids=torch.tensor([ids])).logits[0]
    assert (found - wanted).abs().max() < 1e-3 * wanted.abs().max()
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))
