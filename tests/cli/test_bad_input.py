"""Bad input: the message names value, place and what to do; the exit code says what kind; nothing is written."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli.conftest import Call


def here() -> set[str]:
    return {str(p) for p in Path().rglob("*")}


def refused(luthier: Call, *words: object, code: int, says: tuple[str, ...]) -> None:
    """The command fails with `code`, its message holds every word of `says`, and the folder is as it was."""
    before = here()
    answer = luthier(*words)
    assert answer.code == code, answer.err
    for word in says:
        assert word in answer.err, f"{word!r} is not in: {answer.err}"
    assert not answer.out
    assert "Traceback" not in answer.err
    assert here() == before
    as_json = luthier(*words, "--json")
    error = as_json.json["error"]
    assert as_json.code == error["exit_code"] == code
    assert all(word in error["message"] or word in error["type"] for word in says)
    assert here() == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("trian",), ("'trian'", "'train'")),
        (("methods", "lroa"), ("'lroa'", "'lora'", "luthier methods")),
        (("samples", "fetsh", "trec6"), ("'fetsh'", "'fetch'")),
        (("samples", "fetch"), ("which?", "luthier samples fetch")),
        (("samples", "fetch", "trec7"), ("'trec7'", "'trec6'")),
        (("train", "sample:minilm-l6", "--data", "sample:trec7"), ("'trec7'", "'trec6'")),
        (("train", "sample:minilm-l7", "--data", "sample:trec6"), ("'minilm-l7'", "'minilm-l6'")),
        (("train", "sample:minilm-l6", "--data", "sample:trec6", "--method", "lroa"), ("'lroa'", "'lora'")),
        (("train", "sample:minilm-l6", "--data", "sample:trec6", "--method", "lora+"), ("'lora+'", "missing")),
        (("train", "sample:minilm-l6", "--data", "sample:trec6", "--metod", "lora"), ("--metod", "--method")),
        (("train", "sample:minilm-l6"), ("--data", "sample:trec6")),
        (("train", "sample:minilm-l6", "--data", "x.csv", "--steps", "many"), ("--steps", "many")),
        (("train", "x", "--data", "x.csv", "--steps", "3", "--epochs", "1"), ("--steps 3", "--epochs 1", "one of")),
        (("train", "x", "--data", "x.csv", "--set", "rank"), ("'rank'", "--set rank=16")),
        (("predict", "x"), ("--text", "--data")),
    ],
)
def test_wrong_use_is_said_before_anything_heavy_is_imported(
    luthier: Call, words: tuple[str, ...], says: tuple[str, ...]
) -> None:
    refused(luthier, *words, code=2, says=says)


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        (("--set", "rnak=3"), 2, ("'rnak'", "'rank'")),
        (("--set", "rank=0"), 2, ("lora.rank", "at least 1", "0")),
        (("--set", "rank=wide"), 2, ("lora.rank", "whole number", "'wide'")),
        (("--set", "rank=2.5"), 2, ("lora.rank", "2.5")),
        (("--set", "dropout=1.5"), 2, ("lora.dropout", "at most", "1.5")),
        (("--set", "optim.lrr=1"), 2, ("'lrr'", "'lr'")),
        (("--set", "optim.warmup=2"), 2, ("warmup", "at most 1")),
        (("--set", "sites=attn.z"), 3, ("'attn.z'", "attn.q")),
        (("--set", "sites=ffn.gate"), 3, ("'ffn.gate'", "ffn.up")),
        (("--task", "classificaton"), 2, ("task", "'classificaton'", "'classification'")),
        (("--precision", "fp8"), 2, ("precision", "'fp8'", "bf16")),
        (("--lr", "-1"), 2, ("lr", "above 0")),
        (("--text", "txet"), 3, ("'txet'", "'text'")),
        (("--method", "full+lora"), 3, ("full", "lora", "cannot stand together")),
    ],
)
def test_a_value_that_cannot_work_is_named_with_what_can(
    luthier: Call, model: Path, rows: Path, more: tuple[str, ...], code: int, says: tuple[str, ...]
) -> None:
    refused(luthier, "train", model, "--data", rows, *more, code=code, says=says)


@pytest.mark.parametrize(
    ("content", "name", "says"),
    [
        (None, "none.csv", ("none.csv",)),
        (b"", "empty.csv", ("empty.csv", "empty")),
        (b"text,label\nhow is it,a\nwho,b,c\n", "ragged.csv", ("ragged.csv", "3")),
        (b'{"text": "how", "label": "a"}\n{"text": \n', "torn.jsonl", ("torn.jsonl", "2")),
        (b"text,label\n" + 4 * b"\xc1\xc2\x81,a\n", "greek.csv", ("greek.csv", "UTF-8", "--encoding")),
        (b"text,text,label\nhow,is,a\n", "twice.csv", ("twice.csv", "'text'")),
        (b"words,kind\nhow,a\n", "other.csv", ("words", "kind")),
        (b"text,label\nhow is it,a\nwho is it,a\nwhat is it,a\nwhen is it,a\n", "one.csv", ("'a'",)),
        (b"text,label\n,a\n,b\n,a\n,b\n", "hollow.csv", ("hollow.csv",)),
    ],
)
def test_rows_that_cannot_be_used_are_named_by_file_and_line(
    luthier: Call, model: Path, tmp_path: Path, content: bytes | None, name: str, says: tuple[str, ...]
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    refused(luthier, "train", model, "--data", path, code=3, says=says)


def test_a_label_that_only_the_test_rows_have_is_refused(
    luthier: Call, model: Path, rows: Path, tmp_path: Path
) -> None:
    test = tmp_path / "test.csv"
    test.write_text("text,label\nhow far is it,animal\nwho is it,planet\n")
    refused(luthier, "train", model, "--data", rows, "--test", test, code=3, says=("'planet'",))


def test_a_model_folder_that_is_none_is_refused(luthier: Call, model: Path, rows: Path, tmp_path: Path) -> None:
    refused(luthier, "train", "./nowhere", "--data", rows, code=3, says=("nowhere", "sample:NAME"))
    bare = tmp_path / "bare"
    bare.mkdir()
    refused(luthier, "train", bare, "--data", rows, code=3, says=("bare", "config.json"))
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((model / "config.json").read_bytes())
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    refused(luthier, "inspect", pickled, code=4, says=("pytorch_model.bin", "luthier convert"))
    remote = tmp_path / "remote"
    remote.mkdir()
    for file in model.iterdir():
        (remote / file.name).write_bytes(file.read_bytes())
    config = json.loads((remote / "config.json").read_text()) | {"auto_map": {"AutoModel": "evil.Model"}}
    (remote / "config.json").write_text(json.dumps(config))
    refused(luthier, "train", remote, "--data", rows, code=4, says=("auto_map",))


def test_a_run_for_another_model_is_refused(luthier: Call, finished: Path, model: Path, tmp_path: Path) -> None:
    config = (model / "config.json").read_bytes()
    weights = model / "model.safetensors"
    before = weights.read_bytes()
    altered = bytearray(before)
    altered[-3] ^= 1
    try:
        weights.write_bytes(bytes(altered))
        refused(luthier, "predict", finished, "--text", "how", code=4, says=("changed", str(finished)))
    finally:
        weights.write_bytes(before)
    assert (model / "config.json").read_bytes() == config
    assert luthier("predict", finished, "--text", "how").code == 0


def test_an_out_folder_that_cannot_be_used_is_refused(
    luthier: Call, model: Path, rows: Path, finished: Path, tmp_path: Path
) -> None:
    words = ("train", model, "--data", rows, "--steps", 1, "--out")
    refused(luthier, *words, finished, code=2, says=(str(finished), "finished run", "--out"))
    Path("notes").mkdir()
    Path("notes/todo.txt").write_text("mine")
    refused(luthier, *words, "notes", code=2, says=("notes", "--out"))
    assert Path("notes/todo.txt").read_text() == "mine"
    Path("file").write_text("mine")
    refused(luthier, *words, "file", code=2, says=("file", "--out"))
    refused(luthier, *words, "file/run", code=5, says=("file",))
    assert Path("file").read_text() == "mine"


def test_what_is_no_run_can_be_neither_resumed_nor_asked(luthier: Call, finished: Path, tmp_path: Path) -> None:
    refused(luthier, "resume", tmp_path, code=2, says=(str(tmp_path), "run.json"))
    refused(luthier, "predict", tmp_path, "--text", "how", code=2, says=(str(tmp_path), "run.json"))
    refused(luthier, "resume", finished, code=2, says=("finished",))


def test_a_bug_of_ours_says_so_and_keeps_its_traceback(luthier: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier.cli import _shelf

    def broken() -> None:
        raise RuntimeError("the wheel came off")

    monkeypatch.setattr(_shelf.SHELF, "cards", broken)
    answer = luthier("methods", "--json")
    assert answer.code == 1 and answer.json["error"]["exit_code"] == 1
    assert "bug in luthier" in answer.json["error"]["message"]
    assert "Traceback" in answer.err and "the wheel came off" in answer.err


def test_ctrl_c_outside_of_training_ends_with_130(luthier: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier.cli import _shelf

    def stopped() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_shelf.SHELF, "cards", stopped)
    answer = luthier("methods")
    assert answer.code == 130 and "Traceback" not in answer.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_training_leaves_a_run_that_resumes(
    luthier: Call, model: Path, rows: Path, number: signal.Signals, code: int
) -> None:
    words = [sys.executable, "-m", "luthier.cli", "train", model, "--data", rows, "--threads", "1", "--out", "run"]
    child = subprocess.Popen(
        [*map(str, words), "--epochs", "4000", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    log = Path("run/events.jsonl")
    while child.poll() is None and not (log.exists() and b'"step"' in log.read_bytes()):
        time.sleep(0.05)
    child.send_signal(number)
    out, err = child.communicate(timeout=60)
    assert child.returncode == code, err
    error = json.loads(out)["error"]
    assert error["exit_code"] == code and "luthier resume" in error["message"]
    done = int(error["message"].partition("after step ")[2].split()[0])
    resumed = luthier("resume", "run", "--set", f"steps={done + 2}", "--json")
    assert resumed.code == 0, resumed.err
    assert resumed.json["status"] == "finished"


def test_output_that_nobody_reads_on_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m luthier.cli methods | head -1", shell=True, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
