"""Configurations as data."""

from pathlib import Path

import pytest

from luthier.core import ConfigError, LuthierError, Refused, UnknownName
from luthier.trust import config


def put(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_honest_files_of_all_three_kinds_come_back_as_the_same_data(tmp_path: Path) -> None:
    expected = {"rank": 8, "alpha": 1.5, "sites": ["attn.q", "a = b # c"], "on": True, "deep": {"x": {"y": "z"}}}
    text = '{"rank": 8, "alpha": 1.5, "sites": ["attn.q", "a = b # c"], "on": true, "deep": {"x": {"y": "z"}}}'
    toml = 'rank = 8 # eight\nalpha = 1.5\nsites = ["attn.q", "a = b # c"]\non = true\n[deep.x]\ny = "z"\n'
    yaml = 'rank: 8\nalpha: 1.5\nsites:\n  - attn.q\n  - "a = b # c"\non_: true\ndeep: {x: {y: z}}\n'
    assert config.read_json(put(tmp_path, "a.json", text)) == expected
    assert config.read_toml(put(tmp_path, "a.toml", toml)) == expected
    found = config.read_yaml(put(tmp_path, "a.yaml", yaml))
    assert {("on" if k == "on_" else k): v for k, v in found.items()} == expected


def test_a_byte_order_mark_and_crlf_are_allowed(tmp_path: Path) -> None:
    assert config.read_json(put(tmp_path, "a.json", b'\xef\xbb\xbf{"a":\r\n1}')) == {"a": 1}
    assert config.read_toml(put(tmp_path, "a.toml", b"\xef\xbb\xbfa = 1\r\nb = 2\r\n")) == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    "name, text, place",
    [
        ("a.json", '{"rank": 1,\n\n"x": }', "a.json':3: not JSON"),
        ("a.toml", "rank = 1\n\nx = = 2", "a.toml':3: not TOML"),
        ("a.yaml", "rank: 1\nx: [1\n", "a.yaml':3: not YAML"),
    ],
)
def test_a_syntax_error_names_file_and_line(tmp_path: Path, name: str, text: str, place: str) -> None:
    reader = {"a.json": config.read_json, "a.toml": config.read_toml, "a.yaml": config.read_yaml}[name]
    with pytest.raises(ConfigError) as error:
        reader(put(tmp_path, name, text))
    assert place in str(error.value)


@pytest.mark.parametrize(
    "name, text",
    [("a.json", '{"rank": 1,\n"alhpa": 2}'), ("a.toml", "rank = 1\nalhpa = 2"), ("a.yaml", "rank: 1\nalhpa: 2")],
)
def test_an_unknown_key_names_its_line_and_near_keys(tmp_path: Path, name: str, text: str) -> None:
    reader = {"a.json": config.read_json, "a.toml": config.read_toml, "a.yaml": config.read_yaml}[name]
    with pytest.raises(UnknownName, match=rf"{name}':2: unknown key 'alhpa'\. Did you mean 'alpha'"):
        reader(put(tmp_path, name, text), ["rank", "alpha"])


def test_a_prompt_full_of_dots_brackets_and_digits_is_no_bomb(tmp_path: Path) -> None:
    text = "." * 500 + "[" * 500 + "9" * 500 + "{" * 500
    quoted = f'prompt = "{text}"\nlong = """\n{text}\n"""\nraw = \'\'\'\n{text}\'\'\' # {text}\n'
    found = config.read_toml(put(tmp_path, "a.toml", quoted))
    assert found == {"prompt": text, "long": text + "\n", "raw": text}
    assert config.read_json(put(tmp_path, "a.json", f'{{"prompt": "{text}"}}')) == {"prompt": text}


def test_infinity_is_read_only_where_it_is_allowed(tmp_path: Path) -> None:
    path = put(tmp_path, "config.json", '{"time_step_limit": [0.0, Infinity]}')
    assert config.read_json(path, allow_nonfinite=True)["time_step_limit"][1] == float("inf")
    with pytest.raises(ConfigError, match="Infinity is no number"):
        config.read_json(path)


def test_a_key_in_two_objects_is_no_double_key(tmp_path: Path) -> None:
    assert config.read_json(put(tmp_path, "a.json", '{"a": {"x": 1}, "b": {"x": 2}}'))["b"] == {"x": 2}


def test_a_pipe_a_folder_and_a_device_are_refused_without_waiting(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    for path in (tmp_path / "pipe.json", tmp_path / "folder.json", Path("/dev/zero")):
        with pytest.raises(LuthierError, match="not a regular file"):
            config.read_json(path)


def test_a_message_quotes_hostile_names_inertly(tmp_path: Path) -> None:
    with pytest.raises(UnknownName) as error:
        config.read_json(put(tmp_path, "a.json", '{"\\u001b[31m\\u202e": 1}'), ["rank"])
    assert "\x1b" not in str(error.value) and "\u202e" not in str(error.value) and "\\x1b[31m" in str(error.value)


def test_interpolation_and_class_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="filled in"):
        config.read_toml(put(tmp_path, "a.toml", 'x = "${HOME}"'))
    with pytest.raises(Refused, match="names code to run"):
        config.read_yaml(put(tmp_path, "a.yaml", "x: {_target_: os.system}"))
