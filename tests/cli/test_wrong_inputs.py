"""Wrong inputs as a table: each message holds the value, the place, and what to do. More are in test_bad_input."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli.conftest import Call

from luthier.core import LuthierError

# (words, value, place, what to do). TRAIN stands for a model and rows, RUN for a finished run.
COMMANDS: list[tuple[str, str, str, str]] = [
    ("TRAIN --method lorra", "'lorra'", "method", "'lora'"),
    ("TRAIN --rank 0", "0", "lora.rank", "at least 1"),
    ("TRAIN --rank eight", "'eight'", "lora.rank", "whole number"),
    ("TRAIN --alpha -1", "-1", "lora.alpha", "above 0"),
    ("TRAIN --dropout 2", "2", "lora.dropout", "at most 0.99"),
    ("TRAIN --lr fast", "'fast'", "--lr", "number"),
    ("TRAIN --lr 0", "0", "--lr:", "above 0"),
    ("TRAIN --epochs 0", "0", "--epochs:", "above 0"),
    ("TRAIN --epochs -3", "-3", "--epochs:", "above 0"),
    ("TRAIN --steps 1.5", "'1.5'", "--steps", "integer"),
    ("TRAIN --batch 0", "0", "--batch:", "at least 1"),
    ("TRAIN --seed -1", "-1", "--seed:", "at least 0"),
    ("TRAIN --seed x", "'x'", "--seed", "integer"),
    ("TRAIN --precision int8", "'int8'", "--precision:", "'bf16'"),
    ("TRAIN --device gpu", "'gpu'", "device", "'cuda'"),
    ("TRAIN --task clasification", "'clasification'", "--task:", "'classification'"),
    ("TRAIN --text tekst", "'tekst'", "--text", "'text'"),
    ("TRAIN --label lable", "'lable'", "--label", "'label'"),
    ("TRAIN --test nofile.csv", "nofile.csv", "no such file", "Give a .csv"),
    ("TRAIN --test-share 1.5", "1.5", "--test-share:", "at most 0.9"),
    ("TRAIN --schedule cosin", "'cosin'", "--schedule:", "'cosine'"),
    ("TRAIN --warmup 7", "7", "--warmup:", "at most 1"),
    ("TRAIN --optimiser adam", "'adam'", "--optimiser:", "'adamw'"),
    ("TRAIN --strategy lrd", "'lrd'", "strategy", "'llrd'"),
    ("TRAIN --set rank", "'rank'", "--set", "--set rank=16"),
    ("TRAIN --set rnak=3", "'rnak'", "lora", "'rank'"),
    ("TRAIN --set r=3", "'r'", "lora", "rank=3"),
    ("TRAIN --set sites=q_proj", "'q_proj'", "lora.sites", "'attn.q'"),
    ("TRAIN --sites attn.z", "'attn.z'", "lora.sites", "'attn.q'"),
    ("TRAIN --sites attn.q@9", "attn.q@9", "lora.sites", "0 to 2"),
    ("TRAIN --r 4", "--r", "--rank 4", "luthier train --help"),
    ("TRAIN --lora-alpha 8", "--lora-alpha", "--alpha 8", "luthier train --help"),
    ("TRAIN --target-modules q_proj,v_proj", "--target-modules", "--sites attn.q,attn.v", "luthier train --help"),
    ("TRAIN --learning-rate 1", "--learning-rate", "--lr 1", "luthier train --help"),
    ("TRAIN --max-length 0", "0", "--max-length:", "at least 1"),
    ("TRAIN --eval-every -1", "-1", "--eval-every:", "at least 0"),
    ("TRAIN --patience 0", "0", "--patience:", "at least 1"),
    ("TRAIN --metric acuracy", "'acuracy'", "classification", "'accuracy'"),
    ("TRAIN --out RUN", "run", "finished run", "another --out"),
    ("TRAIN --checkpoint-keep 0", "0", "--checkpoint-keep:", "at least 1"),
    ("TRAIN --steps 2 --epochs 1", "--steps 2", "--epochs 1", "one of the two"),
    ("TRAIN --delimiter ||", "'||'", "delimiter", "one character"),
    ("TRAIN --encoding utf-99", "'utf-99'", "encoding", "cp1252"),
    ("TRAIN --threads 0", "0", "--threads:", "at least 1"),
    ("train nomodel --data ROWS", "nomodel", "model folder", "sample:NAME"),
    ("train ROWS --data ROWS", "rows.csv", "is a file", "a folder with config.json"),
    ("train sample:minilm --data ROWS", "'minilm'", "sample", "'minilm-l6'"),
    ("train MODEL --data sample:trec", "'trec'", "sample", "'trec6'"),
    ("train nospec.toml", "nospec.toml", "cannot be read", "Name a .toml"),
    ("predict RUN", "predict", "--text", "--data"),
    ("predict nowhere --text a", "nowhere", "no run", "luthier train"),
    ("predict RUN --data none.csv", "none.csv", "no such file", "Give a .csv"),
    ("predict RUN --text a --max-new-tokens 0", "'0'", "--max-new-tokens", "equal to 1"),
    ("predict MODEL --text a", "tiny-bert", "no run", "luthier train"),
    ("evaluate RUN", "--data", "--harness", "--help says more"),
    ("evaluate nowhere --data ROWS", "nowhere", "no run", "luthier train"),
    ("merge RUN", "Missing", "--out", "luthier merge --help"),
    ("merge MODEL --out x", "tiny-bert", "no run", "luthier train"),
    ("export RUN MODEL", "tiny-bert", "is there already", "does not exist"),
    ("resume RUN", "run", "finished", "Its result is in"),
    ("resume nowhere", "nowhere", "no run", "luthier train"),
    ("methods lroa", "'lroa'", "method", "'lora'"),
    ("methods --family adative", "'adative'", "--family", "'additive'"),
    ("strategies llrdd", "'llrdd'", "strategy", "'llrd'"),
    ("samples fetch trec7", "'trec7'", "sample", "'trec6'"),
    ("inspect nomodel", "nomodel", "model folder", "sample:NAME"),
    ("TRAIN --method lora,ia3", "'lora,ia3'", "--method", "luthier compare"),
    ("train MODEL ROWS", "rows.csv", "extra argument", "--data"),
    ("predict RUN ROWS", "rows.csv", "extra argument", "--data"),
    ("look MODEL ROWS", "rows.csv", "extra argument", "--data"),
    ("look MODEL", "look", "no rows", "--data FILE"),
    ("look MODEL --data ROWS --html nowhere/x.html", "nowhere/x.html", "--html", "does not exist"),
    ("look RUN --data ROWS", "run", "is a run", "luthier merge"),
    ("plan RUN", "run", "is a run", "luthier merge"),
    ("plan ROWS", "rows.csv", "no config.json", "--data"),
    ("plan MODEL --method lora:rank=abc", "'abc'", "lora.rank", "whole number"),
    ("plan MODEL --method ia3,lora:r=8", "'r'", "lora", "rank=8"),
    ("demmo", "'demmo'", "command", "'demo'"),
    ("TRAIN --method lora+lora", "'lora+lora'", "--method", "Name each once"),
    ("TRAIN --strategy freelb+freelb", "'freelb+freelb'", "--strategy", "Name each once"),
    ("compare MODEL --data ROWS --method ia3,lora+lora", "'lora+lora'", "--method", "Name each once"),
    ("plan MODEL --method lora+lora", "'lora+lora'", "--method", "Name each once"),
    ("evaluate RUN --data ROWS --out nowhere/x.csv", "nowhere/x.csv", "folder does not exist", "Make it"),
]


@pytest.mark.parametrize(("words", "value", "place", "what"), COMMANDS, ids=[c[0] for c in COMMANDS])
def test_a_wrong_command_is_answered_with_value_place_and_what_to_do(
    luthier: Call, model: Path, rows: Path, finished: Path, words: str, value: str, place: str, what: str
) -> None:
    stand_for = {"TRAIN": f"train {model} --data {rows}", "MODEL": model, "ROWS": rows, "RUN": finished}
    full = " ".join(str(stand_for.get(word, word)) for word in words.split())
    answer = luthier(*full.split())
    assert answer.code in (2, 3) and not answer.out, answer
    said = answer.err.rpartition("error: ")[2]
    assert [word for word in (value, place, what) if word not in said] == [], said
    assert "Traceback" not in answer.err and not list(Path().iterdir())


def calls() -> list[tuple[str, Any, str, str, str]]:
    """(what it is, the call, value, place, what to do)."""
    import luthier
    from luthier import DataSpec, RunSpec
    from luthier.runs.spec import BatchSpec, CheckpointSpec, EvalSpec, OptimSpec
    from luthier.surgery import METHODS, attach, compose, load
    from luthier.workflow import evaluate, merge, predict, resume, train

    lora: Any = METHODS["lora"]
    spec = lambda **given: RunSpec(**{"model": "m", "data": DataSpec(source="r.csv"), **given})
    return [
        ("epochs", lambda: spec(epochs=-1), "-1", "epochs", "above 0"),
        ("steps", lambda: spec(steps=0), "0", "steps", "at least 1"),
        ("both", lambda: spec(steps=1, epochs=2), "2", "epochs", "one of the two"),
        ("seed", lambda: spec(seed="a"), "'a'", "seed", "whole number"),
        ("precision", lambda: spec(precision="int8"), "'int8'", "precision", "'bf16'"),
        ("task", lambda: spec(task="classify"), "'classify'", "task", "'classification'"),
        ("data", lambda: spec(data="r.csv"), "'r.csv'", "data", "DataSpec(source="),
        ("field", lambda: spec(epoch=1), "'epoch'", "RunSpec", "'epochs'"),
        ("lr", lambda: OptimSpec(lr=-1), "-1", "lr", "above 0"),
        ("nan", lambda: OptimSpec(lr=float("nan")), "nan", "lr", "must be a number"),
        ("inf", lambda: OptimSpec(lr=float("inf")), "inf", "lr", "finite"),
        ("alpha", lambda: lora(alpha=float("inf")), "inf", "lora.alpha", "finite"),
        ("optimiser", lambda: OptimSpec(name="adam"), "'adam'", "name", "'adamw'"),  # type: ignore[arg-type]
        ("betas", lambda: OptimSpec(betas=(0.9,)), "(0.9,)", "betas", "a list of"),  # type: ignore[arg-type]
        ("size", lambda: BatchSpec(size=0), "0", "size", "at least 1"),
        ("workers", lambda: BatchSpec(workers=100), "100", "workers", "at most 64"),
        ("numpy", lambda: BatchSpec(size=np.int64(0)), "0", "size", "at least 1"),  # type: ignore[arg-type]
        ("patience", lambda: EvalSpec(patience=0), "0", "patience", "at least 1"),
        ("keep", lambda: CheckpointSpec(keep=0), "0", "keep", "at least 1"),
        ("share", lambda: DataSpec(source="r", test_share=2), "2", "test_share", "at most 0.9"),
        ("rank", lambda: lora(rank=0), "0", "lora.rank", "at least 1"),
        ("word", lambda: lora(rank="8"), "'8'", "lora.rank", "whole number"),
        ("r", lambda: lora(r=4), "'r'", "lora", "rank=4"),
        ("lora_alpha", lambda: compose.method("lora", {"lora_alpha": 8}), "'lora_alpha'", "lora", "alpha=8"),
        ("modules", lambda: lora(target_modules=["q_proj"]), "'target_modules'", "lora", "sites='attn.q'"),
        ("method", lambda: compose.method("lroa"), "'lroa'", "method", "'lora'"),
        ("shelf", lambda: METHODS["lroa"], "'lroa'", "method", "'lora'"),
        ("attach", lambda: attach("sample:minilm-l6", "lora"), "'sample:minilm-l6'", "attach", "model_path"),  # type: ignore[arg-type]
        ("number", lambda: attach(3, "lora"), "int", "attach", "a loaded model"),  # type: ignore[arg-type]
        ("load", lambda: load("sample:minilm-l6", "x"), "'sample:minilm-l6'", "load", "model_path"),  # type: ignore[arg-type]
        ("train", lambda: train(object(), "r.csv"), "object", "model", "luthier.attach"),  # type: ignore[arg-type]
        ("no rows", lambda: train("m"), "no rows", "data", "a file"),
        ("table", lambda: train("m", 3), "int", "data", "a list of dictionaries"),
        ("row", lambda: train("m", ["a"]), "str", "data[0]", '"text"'),
        ("setting", lambda: luthier.train("m", "r.csv", rnak=3), "'rnak'", "train", "'rank'"),
        ("predict", lambda: predict("nowhere", texts=["a"]), "nowhere", "no run", "luthier train"),
        ("neither", lambda: predict("nowhere"), "texts", "a file of rows", "one of the two"),
        ("resume", lambda: resume("nowhere"), "nowhere", "no run", "luthier train"),
        ("evaluate", lambda: evaluate("nowhere", "r.csv"), "nowhere", "no run", "luthier train"),
        ("merge", lambda: merge("nowhere", "x", dtype="fp8"), "'fp8'", "dtype", "bf16"),  # type: ignore[arg-type]
    ]


CALLS = calls()


@pytest.mark.parametrize(("call", "value", "place", "what"), [c[1:] for c in CALLS], ids=[c[0] for c in CALLS])
def test_a_wrong_call_is_answered_with_value_place_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Any, value: str, place: str, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LuthierError) as refused:
        call()
    said = str(refused.value)
    assert [word for word in (value, place, what) if word not in said] == [], said
    assert not list(tmp_path.iterdir())


def test_the_tables_are_as_long_as_they_are_meant_to_be() -> None:
    assert len(COMMANDS) >= 60 and len(CALLS) >= 30
