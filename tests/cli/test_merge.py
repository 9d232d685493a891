"""`luthier merge` as a user calls it, and what a program that knows nothing of luthier reads there."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cli.conftest import Call
from little import little_data, little_model
from word_tables import WORDS

ASK = """
import json, sys
from transformers import pipeline
found = {}
for task, folder, asked, more in json.loads(sys.argv[1]):
    found[folder] = pipeline(task, model=folder, device="cpu", **more.get("make", {}))(asked, **more.get("call", {}))
assert not any(name.startswith("luthier") for name in sys.modules)
print(json.dumps(found, default=float))
"""


def test_merged_folders_answer_in_a_plain_pipeline_as_the_runs_do(luthier: Call, tmp_path: Path) -> None:
    texts = ["how far is the moon", "who is bad bad bad"]
    bert, llama = little_model(tmp_path / "bert"), little_model(tmp_path / "llama", "llama")
    rows, turns = little_data(tmp_path / "rows.csv"), little_data(tmp_path / "turns.csv", kind="turns")
    tags = tmp_path / "tags.jsonl"
    lines = [
        {"tokens": WORDS[i : i + 5], "tags": ["X" if w < "h" else "Y" for w in WORDS[i : i + 5]]} for i in range(30)
    ]
    tags.write_text("\n".join(map(json.dumps, lines)) + "\n")
    measures = tmp_path / "prices.csv"
    prices = [f"{' '.join(WORDS[i % 30 : i % 30 + 4])},{250_000 + 3000 * (i % 7)}.5" for i in range(46)]
    measures.write_text("\n".join(["text,score", *prices]) + "\n")
    common = ("--batch", 8, "--threads", 1, "--precision", "fp32", "--lr", 0.02)
    for name, model, data in (
        ("class", bert, rows),
        ("words", bert, tags),
        ("write", llama, turns),
        ("price", bert, measures),
    ):
        answer = luthier(
            "train",
            model,
            "--data",
            data,
            "--method",
            "lora",
            *common,
            "--steps",
            8 if name != "write" else 60,
            "--out",
            name,
        )
        assert answer.code == 0, answer.err
        answer = luthier("merge", name, "--out", f"{name}-model", "--json")
        assert answer.code == 0, answer.err
        assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(answer.json["bytes"])
    chats = [[{"role": "user", "content": text}] for text in texts]
    asked = [
        ("text-classification", "class-model", texts, {"call": {"top_k": None}}),
        ("text-classification", "price-model", texts, {"call": {"function_to_apply": "none"}}),
        ("token-classification", "words-model", texts, {}),
        ("text-generation", "write-model", chats, {"call": {"max_new_tokens": 9, "do_sample": False}}),
    ]
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(asked)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])

    def answers(run: str) -> list[dict]:
        words = [w for text in texts for w in ("--text", text)]
        return luthier("predict", run, *words, "--max-new-tokens", 9, "--json").json["answers"]

    for plain, ours in zip(found["class-model"], answers("class"), strict=True):
        assert {p["label"]: p["score"] for p in plain} == pytest.approx(ours["probabilities"], abs=1e-5)
    for plain, ours in zip(found["price-model"], answers("price"), strict=True):
        assert plain["score"] == pytest.approx(ours["value"], rel=1e-5)
        assert 200_000 < ours["value"] < 300_000
    for plain, ours in zip(found["words-model"], answers("words"), strict=True):
        assert [p["entity"] for p in plain] == ours["tags"]
    for plain, ours in zip(found["write-model"], answers("write"), strict=True):
        assert plain[0]["generated_text"][-1]["content"].strip() == ours["text"].strip()
        assert ours["text"]


def test_a_merged_folder_has_ordinary_permissions_and_names_no_place_of_this_machine(
    luthier: Call, finished: Path
) -> None:
    before = os.umask(0o022)
    try:
        assert luthier("merge", finished, "--out", "given").code == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE(Path("given").stat().st_mode) == 0o755
    assert {stat.S_IMODE(p.stat().st_mode) for p in Path("given").iterdir()} == {0o644}
    assert [p.name for p in Path().iterdir()] == ["given"]
    for path in Path("given").glob("*.*"):
        assert str(finished.parent.parent).encode() not in path.read_bytes(), path.name
    card = Path("given/README.md").read_text()
    assert "animal, colour" in card and "text-classification" in card


def test_what_cannot_be_merged_is_refused_and_nothing_is_written(
    luthier: Call, model: Path, rows: Path, finished: Path
) -> None:
    Path("there").mkdir()
    again = luthier("merge", finished, "--out", "there")
    assert again.code == 2 and "there: is there already" in again.err
    nowhere = luthier("merge", finished, "--out", "no/where")
    assert nowhere.code == 2 and "does not exist" in nowhere.err
    words = ("train", model, "--data", rows, "--steps", 3, "--threads", 1, "--precision", "fp32", "--out", "run")
    assert luthier(*words, "--method", "prefix_tuning").code == 0
    stuck = luthier("merge", "run", "--out", "given")
    assert (
        stuck.code == 3 and "prefix_tuning cannot be merged" in stuck.err and "luthier methods --mergeable" in stuck.err
    )
    coarse = luthier("merge", finished, "--out", "given", "--dtype", "fp64")
    assert coarse.code == 2 and "'fp64'" in coarse.err and "bf16" in coarse.err
    missing = luthier("merge", "nothing", "--out", "given")
    assert missing.code == 2 and "nothing" in missing.err
    assert not Path("given").exists()
