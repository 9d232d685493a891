"""`luthier merge --add`: what several runs have learnt of one base, in one model."""

from pathlib import Path

import pytest
import torch
from cli.conftest import Call
from fillers import filler
from little import little_data, little_model
from safetensors.torch import load_file

from luthier.workflow.certificate import certify_folder
from luthier.workflow.fresh import answer_of
from luthier.workflow.merged_folder import merged_model

COMMON = ("--batch", 8, "--threads", 1, "--precision", "fp32", "--steps", 6)


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that was written is read back here: a process for each takes seconds."""
    monkeypatch.setitem(certify_folder.__kwdefaults__ or {}, "do", answer_of)


@pytest.mark.acid("lt_sft", 4)
def test_differences_of_two_runs_add_up_in_any_order(luthier: Call, tmp_path: Path) -> None:
    base = little_model(tmp_path / "bert")
    for seed, (name, method) in enumerate({"a": "lt_sft", "b": "lt_sft", "low": "lora"}.items()):
        data = little_data(tmp_path / f"{name}.csv", seed=seed)
        more = ("--set", "share=0.3") if method == "lt_sft" else ()
        answer = luthier("train", base, "--data", data, "--method", method, *more, "--lr", 0.02, *COMMON, "--out", name)
        assert answer.code == 0, answer.err
    folders = {
        "a": ("a",),
        "b": ("b",),
        "ab": ("a", "b"),
        "ba": ("b", "a"),
        "low": ("low", "a"),
        "all": ("a", "low", "b"),
    }
    for folder, (first, *others) in folders.items():
        added = [word for other in others for word in ("--add", other)]
        answer = luthier("merge", first, *added, "--out", f"{folder}-model")
        assert answer.code == 0, answer.err
        assert (Path(f"{folder}-model") / "certificate.json").exists() == (not others), "nobody trained a sum"
    assert "added what other runs have learnt" in Path("ab-model/README.md").read_text()
    got = {folder: load_file(f"{folder}-model/model.safetensors") for folder in folders}
    plain = {f"bert.{name}": tensor for name, tensor in load_file(base / "model.safetensors").items()}
    overlaps = 0
    for name in plain.keys() & got["a"].keys():
        start = plain[name]
        a, b, low = got["a"][name] - start, got["b"][name] - start, got["low"][name] - got["a"][name]
        torch.testing.assert_close(got["ab"][name], start + a + b)
        torch.testing.assert_close(got["ab"][name], got["ba"][name])
        torch.testing.assert_close(got["all"][name], start + a + b + low, rtol=1e-4, atol=1e-5)
        overlaps += int(((a != 0) & (b != 0)).sum())
    assert overlaps > 0, "entries that both moved are added up"
    for name in ("classifier.weight", "classifier.bias"):
        assert torch.equal(got["ab"][name], got["a"][name]), "the head is the first run's"


def test_runs_that_cannot_be_added_are_refused_and_nothing_is_written(luthier: Call, tmp_path: Path) -> None:
    data = little_data(tmp_path / "rows.csv")
    one, other = little_model(tmp_path / "bert"), little_model(tmp_path / "wide", intermediate_size=44)
    for name, model, method in (("a", one, "lora"), ("b", other, "lora"), ("c", one, "prefix_tuning")):
        answer = luthier("train", model, "--data", data, "--method", method, *COMMON, "--out", name)
        assert answer.code == 0, answer.err
    for words, said in (
        (("--add", "b"), "another base|not of the base"),
        (("--add", "a"), "named twice"),
        (("--add", "c"), "prefix_tuning"),
        (("--add", "gone"), "gone"),
    ):
        answer = luthier("merge", "a", *words, "--out", "sum")
        assert answer.code != 0
        assert any(part in answer.err for part in said.split("|")), answer.err
        assert not Path("sum").exists()


def test_a_classifier_takes_what_a_model_of_words_has_learnt_without_its_head_and_says_so(
    luthier: Call, tmp_path: Path
) -> None:
    base = filler(tmp_path / "bert")
    rows = little_data(tmp_path / "rows.csv")
    texts = tmp_path / "texts.csv"
    texts.write_text("\n".join(["text", *(line.rpartition(",")[0] for line in rows.read_text().splitlines()[1:])]))
    for name, more in (("task", ("--data", rows)), ("words", ("--data", texts, "--task", "masked_lm"))):
        answer = luthier("train", base, *more, "--method", "full", "--lr", 0.01, *COMMON, "--out", name)
        assert answer.code == 0, answer.err
    answer = luthier("merge", "task", "--add", "words", "--out", "both")
    assert answer.code == 0, answer.err
    assert "of words left out, since this model has none: cls.predictions" in answer.err
    assert "Of words left out, since this model has none: cls.predictions" in Path("both/README.md").read_text()
    start, both = (load_file(folder / "model.safetensors") for folder in (base, Path("both")))
    task, words = (merged_model(Path(run), dtype="fp32").model.state_dict() for run in ("task", "words"))
    for name in ("bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.attention.self.query.bias"):
        assert not torch.equal(words[name], start[name])
        torch.testing.assert_close(both[name], task[name] + words[name] - start[name])
    assert task.keys() == both.keys() and torch.equal(both["classifier.weight"], task["classifier.weight"])
