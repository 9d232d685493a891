"""S3: one regression test for each published vulnerability that concerns files; those of servers come later."""

import ast
import json
import re
import stat
from pathlib import Path
from typing import Any

import pytest
from trust import corpus

import luthier
from luthier.core import LuthierError, Refused
from luthier.trust import Limits, archive, config, convert, gguf, jail, model, safetensors, scan, template, text

SOURCES = {p: p.read_text(encoding="utf-8") for p in Path(next(iter(luthier.__path__))).rglob("*.py")}
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def folder_with(place: Path, file: str, **keys: Any) -> Path:
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text('{"model_type": "bert"}')
    (place / "model.safetensors").write_bytes(corpus.st_bytes({"w": corpus._t()}, bytes(8)))
    model.check_folder(place)  # without the keys it passes
    (place / file).write_text(json.dumps({"model_type": "bert", **keys}))
    return place


@pytest.mark.parametrize(
    "advisory, file, keys",
    [
        ("transformers CVE-2026-4372", "config.json", {"_attn_implementation_internal": "evil/kernel"}),
        (
            "transformers CVE-2026-4372, the next of its kind",
            "config.json",
            {"_mlp_implementation_internal": "evil/kernel"},
        ),
        ("transformers PR 46482", "config.json", {"megatron_core": "evil"}),
        ("peft 3085", "adapter_config.json", {"auto_mapping": {"parent_library": "evil", "base_model_class": "X"}}),
        ("peft 2888", "adapter_config.json", {"tokenizer_kwargs": {"trust_remote_code": True}}),
        ("vLLM CVE-2026-22807", "config.json", {"auto_map": {"AutoModel": "evil.Evil"}}),
        ("vLLM CVE-2026-22807 in a part", "config.json", {"vision_config": {"auto_map": {"AutoConfig": "evil.Evil"}}}),
        (
            "vLLM CVE-2026-22807 in the tokenizer",
            "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": ["e.E", None]}},
        ),
        ("NeMo CVE-2025-23304", "config.json", {"encoder": {"_target_": "os.system"}}),
        ("Lightning 21832", "config.json", {"_instantiator": "os.system"}),
        ("gradio CVE-2026-28416", "config.json", {"proxy_url": "http://evil"}),
    ],
)
def test_a_configuration_names_no_code_and_no_address(
    tmp_path: Path, advisory: str, file: str, keys: dict[str, Any]
) -> None:
    with pytest.raises(Refused):
        model.check_folder(folder_with(tmp_path / "m", file, **keys))


def test_transformers_cve_2026_1839_torch_cve_2025_32434_and_24747_nothing_is_loaded_with_torch() -> None:
    for path, source in SOURCES.items():
        calls = [ast.unparse(n.func) for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]
        assert not [c for c in calls if c in ("torch.load", "torch.save", "torch.jit.load", "torch.hub.load")], path


def test_vllm_cve_2026_27893_the_literal_that_allows_remote_code_stands_nowhere() -> None:
    for path, source in SOURCES.items():
        assert not re.search(r"trust_remote_code\s*[=:]\s*True", source), path


def test_stanza_112_a_refused_file_is_not_tried_with_a_weaker_reader(tmp_path: Path) -> None:
    place = folder_with(tmp_path / "m", "generation_config.json")
    (place / "pytorch_model.bin").write_bytes(corpus.checkpoint(corpus.tensor_pickle(), {"0": bytes(16)}))
    (place / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(Refused, match=r"model\.safetensors"):
        model.check_folder(place)


def test_vllm_cve_2025_62164_a_sparse_tensor_is_no_tensor_of_ours(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(corpus.checkpoint(corpus.pickle_bytes("torch._utils", "_rebuild_sparse_tensor")))
    with pytest.raises(Refused, match="_rebuild_sparse_tensor"):
        convert.pickle_to_safetensors(tmp_path / "a.pt", tmp_path / "a.safetensors")


def test_vllm_cve_2025_62426_a_row_cannot_set_the_variables_of_the_template() -> None:
    row = [
        {"role": "user", "content": "hi", "add_generation_prompt": True, "bos_token": "evil", "tokenize": True},
        TALK[1],
    ]
    shown = "{{ bos_token }}|{{ add_generation_prompt }}|{{ tokenize }}|{{ messages[1].content }}"
    assert template.render(shown, row, {"bos_token": "<s>"}) == "<s>|False||hello"


def test_vllm_cve_2025_48944_every_number_of_a_file_has_a_bound(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"n": ' + "9" * 100 + "}")
    with pytest.raises(LuthierError, match="100 digits"):
        config.read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    "attack",
    [
        "{{ cycler.__init__.__globals__.os.popen('touch CANARY').read() }}",
        "{% for c in [].__class__.__base__.__subclasses__() %}{{ c }}{% endfor %}",
        "{{ ''|attr('__cl'~'ass__') }}",
    ],
)
def test_sglang_cve_2026_5760_and_llama_cpp_python_cve_2024_34359_templates_are_sandboxed(attack: str) -> None:
    with pytest.raises(Refused):
        template.render(attack, TALK)


def test_sglang_cve_2026_3059_and_shadowmq_no_pickle_crosses_a_process_boundary() -> None:
    talks = {
        p
        for p, source in SOURCES.items()
        if re.search(r"^\s*(import|from) (zmq|multiprocessing\.connection)", source, re.M)
    }
    assert talks == set()


@pytest.mark.parametrize(
    "name", ["2**64-1 tensors", "tensor shape wraps", "key of 2**64-1 bytes", "tensor offset 2**63"]
)
def test_llama_cpp_cve_2026_33298_27940_21869_and_ollama_7482_sizes_are_checked_against_the_file(
    tmp_path: Path, name: str
) -> None:
    (case,) = [c for c in corpus.gguf_cases() if c.name == f"gguf: {name}"]
    with pytest.raises(Refused):
        gguf.check(case.make(tmp_path))


def test_safetensors_entries_and_header_have_caps_of_our_own(tmp_path: Path) -> None:
    assert Limits().header_bytes < 100_000_000 and Limits().entries < 100_000
    for case in corpus.safetensors_cases():
        if "100000 tensors" in case.name or "100 MB" in case.name:
            with pytest.raises(Refused):
                safetensors.check_header(case.make(tmp_path))


def test_llama_factory_cve_2025_53002_a_pickle_beside_the_weights_is_never_opened(tmp_path: Path) -> None:
    place = folder_with(tmp_path / "m", "generation_config.json")
    (place / "vhead.bin").write_bytes(corpus.pickle_bytes(argument=f"touch {tmp_path}/CANARY"))
    model.check_folder(place)
    assert [f.level for f in scan.scan(place) if f.place.endswith("vhead.bin")] == ["refused"]
    assert not (tmp_path / "CANARY").exists()


def test_llama_factory_10646_and_open_webui_cve_2026_45400_nothing_here_fetches() -> None:
    for path, source in SOURCES.items():
        if "trust" in path.parts:
            names = {a.name for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Import) for a in n.names}
            names |= {n.module or "" for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom)}
            assert not {n.split(".")[0] for n in names} & {
                "requests",
                "urllib",
                "http",
                "socket",
                "httpx",
                "huggingface_hub",
            }, path


def test_llama_factory_paths_are_compared_as_paths_not_as_text(tmp_path: Path) -> None:
    allowed, beside = tmp_path / "safe", tmp_path / "safe-evil"
    allowed.mkdir()
    beside.mkdir()
    with pytest.raises(Refused, match="opening"):
        jail.run("builtins:open", str(beside / "x"), what="x", writable=str(allowed))


def test_open_webui_cve_2026_44568_escaping_happens_at_output_and_for_the_place() -> None:
    evil = "<script>[x](javascript:alert(1))"
    assert "<" not in text.for_html(evil) and "<" not in text.for_markdown(evil) and "](" not in text.for_markdown(evil)


def test_mlflow_cve_2026_2614_a_file_in_an_index_is_a_plain_name(tmp_path: Path) -> None:
    for case in corpus.model_cases():
        if "index leaves" in case.name or "index absolute" in case.name:
            place = tmp_path / case.name.split()[-1]
            place.mkdir()
            with pytest.raises(Refused, match="plain name"):
                model.check_folder(case.make(place))


def test_mlflow_cve_2026_4137_work_folders_belong_to_their_owner_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    modes: list[int] = []
    kept = tempfile.mkdtemp

    def watched(*args: Any, **options: Any) -> str:
        made = str(kept(*args, **options))
        modes.append(stat.S_IMODE(Path(made).stat().st_mode))
        return made

    monkeypatch.setattr(tempfile, "mkdtemp", watched)
    (tmp_path / "a.zip").write_bytes(corpus.zip_bytes([("a", b"x")]))
    (tmp_path / "a.pt").write_bytes(corpus.checkpoint(corpus.tensor_pickle(), {"0": bytes(16)}))
    archive.extract(tmp_path / "a.zip", tmp_path / "out")
    convert.pickle_to_safetensors(tmp_path / "a.pt", tmp_path / "a.safetensors")
    assert modes == [0o700, 0o700]


@pytest.mark.parametrize("suffix", [".safetensors", ".json", ".txt", ""])
def test_picklescan_cve_2025_10155_a_pickle_is_refused_under_every_suffix(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(corpus.checkpoint(corpus.pickle_bytes()))
    with pytest.raises(Refused):
        safetensors.check_header(path)
    with pytest.raises(Refused, match=r"asks for 'os\.system'"):
        convert.pickle_to_safetensors(path, tmp_path / "out.safetensors")


def test_picklescan_cve_2025_10156_a_wrong_checksum_does_not_hide_a_member(tmp_path: Path) -> None:
    content = corpus.checkpoint(corpus.pickle_bytes())
    at = content.index(b"PK\x01\x02")
    (tmp_path / "a.pt").write_bytes(content[: at + 16] + b"\0\0\0\0" + content[at + 20 :])
    with pytest.raises(Refused):
        convert.pickle_to_safetensors(tmp_path / "a.pt", tmp_path / "a.safetensors")


def test_cpython_cve_2025_4517_no_link_is_ever_unpacked_and_no_filter_of_tarfile_is_trusted(tmp_path: Path) -> None:
    (case,) = [c for c in corpus.archive_cases() if "through a link" in c.name]
    with pytest.raises(Refused, match="link"):
        archive.extract(case.make(tmp_path), tmp_path / "out")
    for path, source in SOURCES.items():
        calls = [n.func for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]
        assert not [c for c in calls if isinstance(c, ast.Attribute) and c.attr == "extractall"], path
