"""The command line sees methods that are not ours: lists, shows, trains and asks them."""

import re
from pathlib import Path

import pytest
from cli.conftest import Call

from luthier.surgery import METHODS

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "own-methods.md"
METHOD, PRESET = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "mine"
    home.mkdir()
    (home / "output_shift.py").write_text(METHOD)
    (home / "wide_lora.py").write_text(PRESET)
    monkeypatch.setenv("LUTHIER_SHELF", str(home))
    return home


def test_the_list_and_the_page_say_where_a_method_comes_from(luthier: Call, folder: Path) -> None:
    answer = luthier("methods")
    assert answer.code == 0 and f"output_shift is from the folder {folder}." in answer.out
    page = luthier("methods", "wide_lora").out
    assert f"a preset of lora · from the folder {folder}" in page and re.search(r"rank +int.* 64 ", page)
    listed = {m["name"]: m for m in luthier("methods", "--json").json["methods"]}
    assert listed["output_shift"]["from"] == f"folder {folder}" and listed["lora"]["from"] == "luthier"
    assert listed["wide_lora"]["preset_of"] == "lora"


def test_a_method_of_ones_own_is_trained_beside_ours_and_asked_while_its_folder_is_named(
    luthier: Call, folder: Path, model: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--data", rows, "--steps", 4, "--threads", 1, "--out", "run", "--method", "output_shift+lora")
    answer = luthier("train", model, *words, "--set", "output_shift.sites=attn.o")
    assert answer.code == 0, answer.err
    answer = luthier("predict", "run", "--text", "the cat", "--json")
    assert answer.code == 0, answer.err
    monkeypatch.delenv("LUTHIER_SHELF")
    METHODS.refresh()  # as a new process would
    refused = luthier("predict", "run", "--text", "the cat")
    assert refused.code == 2 and "output_shift" in refused.err and "LUTHIER_SHELF" in refused.err


def test_a_name_of_ours_ends_the_command_with_exit_code_2(luthier: Call, folder: Path) -> None:
    (folder / "ia3.py").write_text(METHOD.replace("output_shift", "ia3"))
    for words in (("methods",), ("methods", "lora")):
        answer = luthier(*words)
        assert answer.code == 2 and str(folder / "ia3.py") in answer.err
