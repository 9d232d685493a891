"""Model folders, and the scan of a folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import ALSO, TINY, config_of

from luthier.core import ModelError, Refused
from luthier.trust import model, scan


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def honest(folder: Path, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "bert", "_name_or_path": "x/y", "limit": [0, 1], **config})
    )
    save_file({"w": torch.ones(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)}, folder / "model.safetensors")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizerFast", "chat_template": "{{ messages }} https://x"})
    )
    (folder / "vocab.txt").write_text("[PAD]\n_target_\n")
    return folder


def test_an_honest_folder_passes_with_its_shapes_and_template(tmp_path: Path) -> None:
    found = model.check_folder(honest(tmp_path / "m"))
    assert dict(found.shapes) == {"w": (2, 3), "b": (5,)} and dict(found.dtypes) == {"w": "F32", "b": "BF16"}
    assert found.chat_template == "{{ messages }} https://x" and found.config["limit"] == [0, 1]
    assert [p.name for p in found.tokenizer_files] == ["tokenizer_config.json", "vocab.txt"]
    (tmp_path / "m" / "chat_template.jinja").write_text("{{ own }}")
    assert model.check_folder(tmp_path / "m").chat_template == "{{ own }}"


def test_shards_are_read_by_their_index(tmp_path: Path) -> None:
    folder = honest(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    save_file({"a": torch.ones(2)}, folder / "model-1.safetensors")
    save_file({"b": torch.ones(3)}, folder / "model-2.safetensors")
    table = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(table))
    found = model.check_folder(folder)
    assert dict(found.shapes) == {"a": (2,), "b": (3,)} and len(found.weights) == 2


def test_the_digest_follows_the_bytes_and_is_cached(tmp_path: Path, cache: Path) -> None:
    folder = honest(tmp_path / "m")
    first = model.check_folder(folder).digest
    entries = list((cache / ".digests").iterdir())
    assert len(entries) == 2 and model.check_folder(folder).digest == first
    assert list((cache / ".digests").iterdir()) == entries
    entries[0].write_text("torn{")
    assert model.check_folder(folder).digest == first
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert model.check_folder(folder).digest != first
    assert model.check_folder(honest(tmp_path / "n", other=1)).digest != first


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    first = model.check_folder(honest(tmp_path / "m")).digest
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "file" / "below"))
    assert model.check_folder(tmp_path / "m").digest == first


def test_a_pickle_beside_safetensors_is_never_touched(tmp_path: Path) -> None:
    folder = honest(tmp_path / "m")
    (folder / "pytorch_model.bin").write_bytes(b"anything")
    assert [p.name for p in model.check_folder(folder).weights] == ["model.safetensors"]


def test_pickled_weights_alone_are_refused_with_the_way_out(tmp_path: Path) -> None:
    folder = honest(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(Refused, match="luthier convert"):
        model.check_folder(folder)


def test_a_name_of_a_hub_model_is_told_that_nothing_is_fetched(tmp_path: Path) -> None:
    honest(tmp_path / "minilm-l6")
    with pytest.raises(ModelError, match=r"Did you mean 'minilm-l6'\? Models are read from local folders"):
        model.check_folder(tmp_path / "minlm-l6")


def test_folders_written_by_transformers_pass(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    small: dict[str, Any] = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 12,
    }
    for cls, config in ((BertModel, BertConfig), (LlamaForCausalLM, LlamaConfig)):
        place = tmp_path / cls.__name__
        cls(config(vocab_size=20, **small)).save_pretrained(place)
        assert model.check_folder(place).shapes


def saved_config(config: Any, folder: Path) -> Path:
    config.save_pretrained(folder)
    save_file({"w": torch.ones(2, 3)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", [*TINY, *ALSO])
def test_the_configuration_of_every_promised_architecture_is_read_as_transformers_writes_it(
    name: str, tmp_path: Path
) -> None:
    found = model.check_folder(saved_config(config_of(name), tmp_path / "m"))
    assert found.config["model_type"] == config_of(name).model_type


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the defaults of many classes complain of themselves
def test_every_configuration_that_transformers_can_make_by_itself_is_read(tmp_path: Path) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    refused, n_read = [], 0
    for kind in CONFIG_MAPPING:
        try:
            config = CONFIG_MAPPING[kind]()
        except Exception:  # some need settings: nothing that transformers writes
            continue
        try:
            model.check_folder(saved_config(config, tmp_path / kind))
            n_read += 1
        except Refused as error:
            refused.append(f"{kind}: {error}")
    assert not refused and n_read > 300


@pytest.mark.parametrize(
    "config",
    [
        {"_remove_final_layer_norm": "import x"},
        {"_frame_rate": {"_target_": "x"}},
        {"_frame_rate": [1]},
        {"limit": {"__float__": "os.system"}},
        {"_some_switch": True},
    ],
)
def test_private_keys_that_are_no_plain_numbers_of_transformers_are_refused(
    config: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(Refused):
        model.check_folder(honest(tmp_path / "m", **config))


def test_scan_lists_the_worst_first_and_loads_nothing(tmp_path: Path) -> None:
    folder = honest(tmp_path / "m")
    (folder / "evil.pkl").write_bytes(b"cos\nsystem\n(S'touch CANARY'\ntR.")
    (folder / "modeling_x.py").write_text("raise SystemExit")
    (folder / "leads_out").symlink_to("/etc/passwd")
    found = scan.scan(folder)
    assert [(f.level, Path(f.place).name) for f in found][:3] == [
        ("refused", "evil.pkl"),
        ("warning", "leads_out"),
        ("warning", "modeling_x.py"),
    ]
    assert {Path(f.place).name for f in found if f.level == "fine"} == {
        *("m", "config.json", "model.safetensors", "tokenizer_config.json"),
    }
