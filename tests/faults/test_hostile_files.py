"""The faults of the list that come in through files: each by its number, from a user's side.

The 500 and more generated files stand in tests/trust/corpus.py; here is one telling example of each fault.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from trust import corpus

from luthier.core import BadInput, DataError, LuthierError, Refused
from luthier.trust import archive, config, convert, gguf, jail, model, row_files, safetensors, template, text

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def put(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.fault("F21", "base", "tuning")
def test_f21_a_nan_in_base_weights_or_an_adapter_is_refused_with_the_tensors_name(tmp_path: Path) -> None:
    weights = torch.ones(4, 3)
    weights[2, 1] = float("nan")
    save_file({"encoder.layer.0.weight": weights, "fine": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(Refused, match=r"'encoder\.layer\.0\.weight' \(1 of 12\)"):
        safetensors.read(tmp_path / "a.safetensors")


@pytest.mark.fault("F26", "all named at once")
def test_f26_bad_lines_are_told_with_file_line_and_reason_all_at_once(tmp_path: Path) -> None:
    good = '{"text": "a"}'
    path = put(tmp_path, "a.jsonl", f'\ufeff{good}\r\n{{"text": \r\n{{"text": "\\ud800"}}\r\n{good}\r\n')
    with pytest.raises(DataError) as error:
        row_files.read(path)
    assert "2 bad rows" in str(error.value)
    assert "a.jsonl:2: not JSON" in str(error.value) and "a.jsonl:3: column 'text' holds half of" in str(error.value)
    with pytest.raises(DataError, match="line 2 holds a NUL"):
        row_files.read(put(tmp_path, "b.jsonl", f'{good}\n{{"text": "\x00"}}\n'))
    assert row_files.read(path, skip_bad=2).left_out and len(row_files.read(path, skip_bad=2)) == 2


@pytest.mark.fault("F27", "named")
def test_f27_missing_extra_and_wrongly_typed_columns_are_named(tmp_path: Path) -> None:
    path = put(
        tmp_path,
        "a.jsonl",
        '{"text": "a", "n": 1}\n{"text": "a"}\n{"text": "a", "n": "1"}\n{"text": "a", "n": 1, "x": 0}',
    )
    with pytest.raises(DataError) as error:
        row_files.read(path, types={"n": int})
    for line, reason in {2: "lacks column 'n'", 3: "column 'n' must be int", 4: "unknown column 'x'"}.items():
        assert f"a.jsonl:{line}: " in str(error.value) and reason in str(error.value)
    with pytest.raises(DataError, match=r"a\.csv:3: expected 2 columns"):
        row_files.read(put(tmp_path, "a.csv", "text,label\na,b\nc\n"))


@pytest.mark.fault("F28", "empty and duplicate")
def test_f28_empty_files_and_texts_are_refused_and_duplicates_counted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is empty"):
        row_files.read(put(tmp_path, "a.csv", ""))
    with pytest.raises(DataError, match="holds no rows"):
        row_files.read(put(tmp_path, "b.csv", "text\n"))
    with pytest.raises(DataError, match=r"c\.csv:3: column 'text' is empty"):
        row_files.read(put(tmp_path, "c.csv", "text,label\na,b\n ,b\n"), require=["text"])
    assert len(row_files.read(put(tmp_path, "d.csv", "text\na\nb\na\na\n")).duplicates()) == 2


def test_f29_a_row_beyond_the_cap_is_listed_not_cut(tmp_path: Path) -> None:
    from luthier.trust import Limits

    path = put(tmp_path, "a.jsonl", json.dumps({"text": "x" * 5000}) + "\n" + json.dumps({"text": "y"}) + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl:1: 5012 characters in one row"):
        row_files.read(path, limits=Limits(row_chars=1000))
    assert len(row_files.read(path).rows[0]["text"]) == 5000


@pytest.mark.fault("F32", "template")
@pytest.mark.parametrize(
    "hostile, says",
    [
        ("", "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        (
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
            "drops the assistant",
        ),
    ],
)
def test_f32_a_template_that_is_missing_raises_or_drops_the_answer_stops_with_the_row(hostile: str, says: str) -> None:
    with pytest.raises(LuthierError, match=says) as error:
        template.render(hostile, TALK)
    assert not hostile or "hi" in str(error.value)


@pytest.mark.fault("F50", "refused, converted only in the jail")
@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl"])
def test_f50_a_pickle_is_refused_where_weights_are_expected_and_converted_only_in_the_jail(
    tmp_path: Path, suffix: str
) -> None:
    evil = corpus.checkpoint(corpus.pickle_bytes("os", "system", f"touch {tmp_path}/CANARY"))
    put(tmp_path, "config.json", '{"model_type": "bert"}')
    path = put(tmp_path, f"model{suffix}", evil)
    with pytest.raises(Refused, match="luthier convert"):
        model.check_folder(tmp_path)
    with pytest.raises(Refused, match="pickle checkpoint under another name"):
        safetensors.check_header(path)
    with pytest.raises(Refused, match=r"asks for 'os\.system'"):
        convert.pickle_to_safetensors(path, tmp_path / "out.safetensors")
    assert not (tmp_path / "CANARY").exists() and not (tmp_path / "out.safetensors").exists()


@pytest.mark.fault("F51", "refused")
@pytest.mark.parametrize(
    "key, value",
    [
        ("auto_map", {"AutoModel": "evil/repo--modeling.Evil"}),
        ("_attn_implementation_internal", "evil/kernel"),
        ("parent_library", "evil"),
        ("tokenizer_kwargs", {"trust_remote_code": True}),
    ],
)
def test_f51_a_configuration_that_imports_fetches_or_points_elsewhere_is_refused(
    tmp_path: Path, key: str, value: object
) -> None:
    put(tmp_path, "config.json", json.dumps({"model_type": "bert", key: value}))
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(Refused, match=key):
        model.check_folder(tmp_path)


@pytest.mark.fault("F52", "refused")
@pytest.mark.parametrize("case", list(corpus.safetensors_cases()), ids=lambda c: c.name)
def test_f52_a_hostile_safetensors_file_is_refused(tmp_path: Path, case: corpus.Case) -> None:
    with pytest.raises(LuthierError):
        safetensors.read(case.make(tmp_path))


@pytest.mark.fault("F53", "refused")
def test_f53_gguf_counts_alignment_and_texts_are_checked_against_the_file(tmp_path: Path) -> None:
    for number, case in enumerate(list(corpus.gguf_cases())[::9]):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(Refused):
            gguf.check(case.make(folder))


@pytest.mark.fault("F54", "nothing outside")
@pytest.mark.parametrize("word", ["up", "absolute", "symlink", "hardlink", "device", "bomb", "collision by case"])
def test_f54_an_archive_writes_nothing_outside_its_target(tmp_path: Path, word: str) -> None:
    cases = [c for c in corpus.archive_cases() if word in c.name]
    assert cases
    for number, case in enumerate(cases):
        folder = tmp_path / str(number) / "in"
        folder.mkdir(parents=True)
        path = case.make(folder)
        with pytest.raises(Refused):
            archive.extract(path, folder / "target")
        assert {p.name for p in folder.parent.rglob("*")} == {"in", path.name}
    assert not Path("/tmp", corpus.CANARY).exists()


@pytest.mark.fault("F55", "limits")
def test_f55_a_template_bomb_ends_at_its_limits() -> None:
    with pytest.raises(Refused, match=r"256\.0 MB of memory"):
        template.render('{{ "x"*500000000 }}', TALK)
    with pytest.raises(Refused, match="processor time"):
        template.render("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", TALK)
    with pytest.raises(Refused, match="more than 1000000 characters"):
        template.render("{% for a in range(99999) %}{{ 'x'*99 }}{% endfor %}", TALK)


@pytest.mark.fault("F56", "data only")
def test_f56_configurations_are_data_without_tags_aliases_or_interpolation(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="anchors and aliases"):
        config.read_yaml(put(tmp_path, "a.yaml", "a: &a [x]\nb: *a\n"))
    with pytest.raises(Refused, match="asks for a type"):
        config.read_yaml(put(tmp_path, "b.yaml", "a: !!python/object/apply:os.system [x]\n"))
    with pytest.raises(Refused, match="filled in"):
        config.read_toml(put(tmp_path, "c.toml", 'a = "${HOME}"'))
    with pytest.raises(Refused, match="names code"):
        config.read_json(put(tmp_path, "d.json", '{"_target_": "os.system"}'))
    with pytest.raises(Refused, match=r"may have 1\.0 MB"):
        config.read_toml(put(tmp_path, "e.toml", "".join(f"k{n} = 1\n" for n in range(1_000_000))))


@pytest.mark.fault("F57", "inert")
def test_f57_foreign_text_is_inert_in_messages_and_wherever_it_is_shown(tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07<script>\u202e"
    with pytest.raises(LuthierError) as error:
        config.read_json(put(tmp_path, "a.json", json.dumps({evil: 1})), ["rank"])
    assert str(error.value).isprintable()
    assert "<" not in text.for_html(evil) and text.for_terminal(evil).isprintable()


@pytest.mark.fault("F62", "readers")
@pytest.mark.parametrize("place", ["with blank", "ünï 🙂", "-n", "a'b\"c", "per%cent", "new\nline"])
def test_f62_every_reader_works_below_odd_folders_in_any_locale_with_no_home_and_no_network(
    tmp_path: Path, place: str
) -> None:
    folder = tmp_path / place
    folder.mkdir()
    put(folder, "rows.jsonl", '{"text": "é"}\n')
    put(folder, "set.toml", "a = 1\n")
    put(folder, "model.gguf", corpus.gguf_bytes(body=bytes(64)))
    put(folder, "a.zip", corpus.zip_bytes([("ä.txt", b"x")]))
    put(folder, "config.json", '{"model_type": "bert"}')
    put(folder, "w.pt", corpus.checkpoint(corpus.tensor_pickle(), {"0": bytes(16)}))
    put(
        folder,
        "model.safetensors",
        corpus.st_bytes({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"\1"),
    )
    code = (
        "import sys, pathlib; from luthier import trust; p = pathlib.Path(sys.argv[1])\n"
        "assert trust.row_files.read(p / 'rows.jsonl').rows == [{'text': chr(233)}]\n"
        "assert trust.config.read_toml(p / 'set.toml') == {'a': 1}\n"
        "trust.gguf.check(p / 'model.gguf'); trust.archive.extract(p / 'a.zip', p / 'out')\n"
        "assert len(trust.model.check_folder(p).digest) == 64\n"
        "trust.convert.pickle_to_safetensors(p / 'w.pt', p / 'w.safetensors')\n"
        "talk = [{'role': 'user', 'content': chr(233)}]\n"
        "assert trust.template.render('{{ messages[0].content }}', talk) == chr(233)\n"
    )
    environment = {"HOME": "/proc/nothing", "LANG": "C", "LC_ALL": "C", "PATH": os.environ["PATH"]}
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, stdin=subprocess.DEVNULL, timeout=120)
    assert done.returncode == 0, done.stderr.decode()


def test_f62_the_children_have_no_network_where_the_kernel_allows_it_and_no_socket_anywhere() -> None:
    with pytest.raises(Refused, match="socket"):
        jail.run("socket:socket", 2, what="x")


@pytest.mark.fault("F63", "shapes and infinity")
def test_f63_a_tuning_of_the_wrong_shapes_or_with_an_infinity_is_refused_before_any_merge(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4, 3), "b": torch.full((3, 5), float("inf"))}, tmp_path / "t.safetensors")
    with pytest.raises(Refused, match=r"'a' has shape \[4, 3\], expected \[8, 3\]"):
        safetensors.read(tmp_path / "t.safetensors", expect={"a": (8, 3), "b": (3, 5)})
    with pytest.raises(Refused, match="infinity in 'b'"):
        safetensors.read(tmp_path / "t.safetensors", expect={"a": (4, 3), "b": (3, 5)})


def test_a_missing_file_is_told_with_near_names_by_every_reader(tmp_path: Path) -> None:
    put(tmp_path, "train.jsonl", "{}")
    for reader in (row_files.read, safetensors.read, config.read_json, gguf.check):
        with pytest.raises(BadInput, match=r"there is no such file\. Did you mean 'train\.jsonl'"):
            reader(tmp_path / "tran.jsonl")  # type: ignore[operator]
