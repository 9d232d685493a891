"""The end of a run: the command that it names works, and rows that its tuning keeps are told of."""

import json
from pathlib import Path

import pytest
from cli.conftest import Call
from fillers import filler

TASKS = "".join(f"{a} {b},{('good', 'bad')[i % 2]},{('mood', 'size')[i % 4 > 1]}\n" for i, (a, b) in enumerate(
    (a, b) for a in ("cat", "dog", "sun", "moon") for b in ("red", "blue", "tall", "far", "one")
))  # fmt: skip


@pytest.mark.parametrize("more", [("--row-task", "task", "--strategy", "mt_dnn"), ("--pair", "task")])
def test_where_a_text_is_too_little_a_file_is_asked_for_and_does(
    luthier: Call, model: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("words,label,task\n" + TASKS)
    options = ("--text", "words", "--label", "label", *more, "--steps", 2, "--lr", "1e-3", "--out", "run")
    trained = luthier("train", model, "--data", rows, *options)
    assert trained.code == 0, trained.err
    assert "Next: luthier predict run --data FILE  (its columns: words, task)" in trained.err + trained.out
    asked = tmp_path / "asked.csv"
    asked.write_text("words,task\nred sun,mood\n")
    assert luthier("predict", "run", "--data", asked).code == 0
    assert luthier("predict", "run", "--text", "red sun").code != 0


def test_rows_that_are_shown_beside_others_are_said_to_stand_in_the_tuning(luthier: Call, tmp_path: Path) -> None:
    rows, model = tmp_path / "rows.csv", filler(tmp_path / "filler")
    rows.write_text("words,label,task\n" + TASKS)
    options = ("--text", "words", "--label", "label", "--words", "good=good,bad=bad", "--steps", 2, "--lr", "1e-3")
    for template, kept in (("{shown:2} {text} is {mask}", True), ("{text} is {mask}", False)):
        out = f"run-{kept}"
        trained = luthier("train", model, "--data", rows, *options, "--template", template, "--out", out)
        assert trained.code == 0, trained.err
        shown = json.loads(Path(out, "tuning", "tuning.json").read_text())["task"]["shown"]
        assert bool(shown) == kept
        said = f"Its tuning holds {len(shown)} training rows, texts and labels"
        assert (said in trained.err + trained.out) == kept
