"""A tiny model folder and small tables, and the command line called in this process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

WORDS = ["how", "far", "tall", "is", "it", "the", "moon", "sun", "what", "who", "when", "a", "of", "cat", "dog", "good"]
WORDS += ["bad", "red", "blue", "one", "two", "three", "why"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


class Answer(NamedTuple):
    """What one command left: its exit code and its two streams."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on standard output."""
        lines = self.out.splitlines()
        assert len(lines) == 1, self.out
        found: dict[str, Any] = json.loads(lines[0])
        return found


Call = Callable[..., Answer]


@pytest.fixture
def luthier(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """`luthier("methods", "lora")` in an empty folder."""
    from luthier.cli import main

    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def call(*words: object) -> Answer:
        code = main([str(word) for word in words])
        return Answer(code, *capfd.readouterr())

    return call


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of three layers with a tokenizer of words."""
    from tiny import tiny
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    tiny("bert", "base").save_pretrained(folder)
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *WORDS])}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False, **names).save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A table of 48 rows in three classes that differ by a word."""
    path = tmp_path / "rows.csv"
    kinds = {"animal": ("cat", "dog"), "colour": ("red", "blue"), "number": ("one", "two")}
    lines = ["text,label"]
    for i in range(16):
        for kind, words in kinds.items():
            lines.append(f"{WORDS[i % 11]} is {words[i % 2]} {WORDS[(3 * i) % 13]} {WORDS[i]},{kind}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short finished run."""
    from luthier.cli import main

    home = tmp_path_factory.mktemp("runs")
    table = home / "rows.csv"
    kinds = (("cat", "animal"), ("dog", "animal"), ("red", "colour"), ("blue", "colour"))
    lines = [f"{w} is {word} {v},{kind}" for w in WORDS[:6] for v in WORDS[12:15] for word, kind in kinds]
    table.write_text("text,label\n" + "\n".join(lines) + "\n")
    words = ["train", model, "--data", table, "--steps", 12, "--batch", 6, "--threads", 1, "--out", home / "run"]
    assert main([str(w) for w in [*words, "--precision", "fp32", "--method", "bitfit"]]) == 0
    return home / "run"
