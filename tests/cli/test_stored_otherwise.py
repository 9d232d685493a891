"""Rows to answer or to score that are stored in a way that their bytes do not show."""

from pathlib import Path

from cli.conftest import Call


def test_predict_and_evaluate_are_told_how_a_file_is_written(luthier: Call, finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "more.csv"
    path.write_bytes("text~label\nthe cat š~animal\nthe red š~colour\n".encode("cp1250"))
    stored = ("--delimiter", "~", "--encoding", "cp1250")
    assert luthier("predict", finished, "--data", path, *stored, "--out", "answers.csv").code == 0
    assert Path("answers.csv").read_text().splitlines()[1].startswith("the cat š,animal,")
    assert luthier("evaluate", finished, "--data", path, *stored, "--json").json["rows"] == 2
    refused = luthier("predict", finished, "--text", "a cat", *stored)
    assert refused.code == 2 and "--data" in refused.err


def test_what_was_recognised_in_a_file_is_said(luthier: Call, finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "more.csv"
    path.write_bytes("text;label\nthe cat \xe9;animal\nthe red;colour\n".encode("cp1252"))
    for verb in ("predict", "evaluate"):
        said = luthier(verb, finished, "--data", path)
        assert said.code == 0 and "read as cp1252 (Western Windows); --encoding names another" in said.err
