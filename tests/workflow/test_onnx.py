"""A graph of ONNX answers as the run does, says what it is, and is caught where it was damaged on its way."""

import csv
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from little import little_data, little_model, little_spec

from luthier.core import CannotMerge, ConfigError, DiskFull, UsageError
from luthier.runs.spec import DataSpec, OptimSpec
from luthier.workflow import onnx_export, train
from luthier.workflow.certificate import certify_folder
from luthier.workflow.certify_run import certify
from luthier.workflow.export import Exported
from luthier.workflow.formats import export
from luthier.workflow.fresh import answer_of
from luthier.workflow.prediction import Predictor

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module", autouse=True)
def _in_this_process() -> Iterator[None]:
    """A folder that was written is read back here: a process for each takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(certify_folder.__kwdefaults__ or {}, "do", answer_of)
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("onnx")
    train(little_spec(place, "lora", steps=60, optim=OptimSpec(lr=1e-2), trunk_dropout="off"))
    return place


@pytest.fixture(scope="module")
def written(home: Path) -> Exported:
    return export(home / "run", home / "graph", to="onnx")


def test_a_classifiers_graph_gives_the_same_labels_for_rows_side_by_side(home: Path, written: Exported) -> None:
    assert written.step is not None and written.step.status == "passed" and written.step.likeliest == 1.0
    assert json.loads((home / "graph" / "certificate.json").read_text())["passed"]
    texts = ["how far good good good", "who bad bad bad", "what is the sun red red red", "who"]
    wanted = Predictor(home / "run").texts(texts)
    readme = (home / "graph" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(readme.replace('"graph', f'"{home}/graph').replace('["..."]', repr(texts)), names)
    shares = torch.tensor(names["logits"]).softmax(-1)
    assert names["labels"] == list(wanted[0]["probabilities"])
    for ours, theirs in zip(wanted, shares, strict=True):
        assert names["labels"][int(theirs.argmax())] == ours["label"]
        assert theirs.tolist() == pytest.approx(list(ours["probabilities"].values()), abs=1e-5)
    assert [ours["label"] for ours in wanted][:3] == ["good", "bad", "red"], "one label for all would prove little"


def test_a_graph_says_what_it_is_and_gives_vectors_of_texts_without_their_padding(
    home: Path, written: Exported
) -> None:
    graph = onnx.load(home / "graph" / "model.onnx")
    assert [o.version for o in graph.opset_import if not o.domain] == [18]
    told = {entry.key: entry.value for entry in graph.metadata_props}
    assert json.loads(told["labels"]) == ["bad", "good", "red"] and told["task"] == "classification"
    assert told["method"] == "lora" and "/" not in told["base"]
    for given in graph.graph.input:
        assert all(side.dim_param for side in given.type.tensor_type.shape.dim), "sizes are open"
    session = onnxruntime.InferenceSession(home / "graph" / "model.onnx")
    ids = torch.tensor([[2, 7, 9, 3]])
    padded = torch.cat([ids, torch.zeros(1, 3, dtype=torch.long)], 1)
    found = []
    for row in (ids, padded):
        batch = {"input_ids": row, "attention_mask": (row > 0).long(), "token_type_ids": torch.zeros_like(row)}
        found.append(torch.tensor(session.run(["vectors"], {n: t.numpy() for n, t in batch.items()})[0]))
    assert found[0].shape == (1, 48) and torch.allclose(found[0], found[1], atol=1e-6)


def _changed(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        graph = onnx.load(folder / "model.onnx")
        change(graph)
        onnx.save(graph, folder / "model.onnx")

    return act


def _scaled(by: float) -> Callable[[Any], None]:
    def act(graph: Any) -> None:
        held = max((t for t in graph.graph.initializer if len(t.dims) == 2), key=lambda t: t.dims[0] == 80)
        value = onnx.numpy_helper.to_array(held) * by
        held.CopyFrom(onnx.numpy_helper.from_array(value.astype("float32"), held.name))

    return act


def _cut(folder: Path) -> None:
    file = folder / "model.onnx"
    file.write_bytes(file.read_bytes()[:-1000])


def test_a_full_disk_is_told_as_that_and_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, before = torch.onnx.ONNXProgram.save, set(home.iterdir())

    def half(program: Any, file: str, **options: Any) -> None:
        whole(program, file, **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", half)
    with pytest.raises(DiskFull, match=r"no space left while writing model\.onnx.*Free some space"):
        export(home / "run", home / "full", to="onnx")
    assert set(home.iterdir()) == before


def test_weights_beyond_one_file_lie_beside_it_and_both_go_together(
    home: Path, written: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "IN_ONE_FILE", 1000)
    parted = export(home / "run", home / "parted", to="onnx")
    graph, data = home / "parted" / "model.onnx", home / "parted" / "model.onnx.data"
    assert any("lie in model.onnx.data: both files go together" in note for note in parted.notes)
    assert not any("model.onnx.data" in note for note in written.notes)
    whole = (home / "graph" / "model.onnx").stat().st_size
    assert data.stat().st_size > 1e5 and graph.stat().st_size < whole - 0.9 * data.stat().st_size, "they left the graph"
    assert parted.step is not None and parted.step.status == "passed"
    moved = home / "elsewhere"
    shutil.copytree(home / "parted", moved)
    batch = {
        "input_ids": torch.tensor([[2, 7, 9, 3]]).numpy(), "attention_mask": torch.ones(1, 4, dtype=torch.long).numpy(),
        "token_type_ids": torch.zeros(1, 4, dtype=torch.long).numpy(),
    }  # fmt: skip
    one, two = (
        onnxruntime.InferenceSession(folder / "model.onnx").run(["logits"], batch)[0]
        for folder in (home / "graph", moved)
    )
    assert torch.equal(torch.tensor(one), torch.tensor(two))
    (moved / "model.onnx.data").unlink()
    found = certify(home / "run", folder=moved, do=answer_of)
    assert [step.name for step in found.failed] == ["onnx"], "half of it is none"
    assert "cannot be read by onnxruntime" in found.failed[0].reason


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_changed(_scaled(-1.0)), "off by"),
        (_changed(_scaled(1.02)), "off by"),
        (_changed(lambda graph: setattr(graph.graph.output[0], "name", "other")), "onnxruntime|logits|outputs"),
        (_cut, "cannot be read by onnxruntime"),
    ],
)
def test_a_graph_that_was_damaged_is_caught(
    damage: Callable[[Path], None], told: str, home: Path, written: Exported, tmp_path: Path
) -> None:
    sent = tmp_path / "sent"
    shutil.copytree(home / "graph", sent)
    assert certify(home / "run", folder=sent, do=answer_of).passed
    damage(sent)
    found = certify(home / "run", folder=sent, do=answer_of)
    assert [step.name for step in found.failed] == ["onnx"]
    assert any(word in found.failed[0].reason for word in told.split("|")), found.failed[0].reason


def test_what_a_graph_cannot_hold_is_refused_and_nothing_is_left(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(little_spec(home, "prompt_tuning", steps=2, out=str(home / "prompts")))
    with pytest.raises(CannotMerge, match=r"prompt_tuning cannot be put into a graph.*Merged: .*Traced .*Nearest"):
        export(home / "prompts", tmp_path / "out", to="onnx")
    train(little_spec(home, "lora", "llama", steps=2, out=str(home / "writes")))
    with pytest.raises(ConfigError, match=r"is of task causal_lm.*Nearest is --to"):
        export(home / "writes", tmp_path / "out", to="onnx")
    with pytest.raises(ConfigError, match="is there already"):
        export(home / "run", tmp_path, to="onnx")
    with pytest.raises(ConfigError, match="does not exist"):
        export(home / "run", tmp_path / "no" / "out", to="onnx")
    monkeypatch.setattr("luthier.workflow.onnx_export.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'luthier\[onnx\]'"):
        export(home / "run", tmp_path / "out", to="onnx")
    assert not list(tmp_path.iterdir())


def _texts(folder: Path) -> list[str]:
    with little_data(folder / "rows.csv").open() as file:
        return [row["text"] for row in csv.DictReader(file)]


def _words_with_tags(path: Path) -> Path:
    rows = [text.split() for text in _texts(path.parent)]
    told = [{"tokens": row, "tags": ["X" if word in ("good", "red") else "O" for word in row]} for row in rows]
    path.write_text("\n".join(map(json.dumps, told)))
    return path


def _numbers(path: Path) -> Path:
    told = [{"text": text, "label": 1000.5 + 50 * len(text.split())} for text in _texts(path.parent)]
    path.write_text("\n".join(map(json.dumps, told)))
    return path


@pytest.mark.parametrize(
    ("task", "kind", "rows"),
    [
        ("token_classification", "bert", _words_with_tags),
        ("regression", "bert", _numbers),
        ("reward", "llama", lambda path: little_data(path, kind="pairs")),
    ],
)
def test_graphs_of_other_tasks_give_the_runs_own_logits_and_numbers(
    task: Any, kind: str, rows: Callable[[Path], Path], tmp_path: Path
) -> None:
    data = DataSpec(source=str(rows(tmp_path / f"data.{'csv' if task == 'reward' else 'jsonl'}")))
    little_model(tmp_path / kind, kind, num_hidden_layers=1)
    train(little_spec(tmp_path, "lora", kind, data=data, task=task, steps=4, optim=OptimSpec(lr=1e-2)))
    found = export(tmp_path / "run", tmp_path / "graph", to="onnx")
    assert found.step is not None and found.step.status == "passed" and found.step.from_base is not None
    predictor = Predictor(tmp_path / "run")
    text = "how far is the moon good red"
    given = predictor.tokenizer([text], return_tensors="pt")
    session = onnxruntime.InferenceSession(tmp_path / "graph" / "model.onnx")
    numpy = {one.name: given[one.name].numpy() for one in session.get_inputs()}
    got = torch.tensor(session.run(["logits"], numpy)[0])
    with torch.no_grad():
        wanted = predictor.tuned.model(**{name: given[name] for name in numpy}).logits
        with predictor.tuned.base_only():
            base = predictor.tuned.model(**{name: given[name] for name in numpy}).logits
    scale, center = (predictor.task.scale, predictor.task.center) if task == "regression" else (1.0, 0.0)
    assert scale > 10 or task != "regression", "a unit of one would prove nothing"
    torch.testing.assert_close(got, wanted * scale + center, rtol=1e-5, atol=1e-5 * scale)
    assert got.shape == ((1, given["input_ids"].shape[1], 2) if task == "token_classification" else (1, 1))
    assert (wanted - base).abs().max() > 1e-3
    if task == "regression":
        assert float(got) == pytest.approx(predictor.texts([text])[0]["value"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sequential_adapter", "full", "dora"])
def test_methods_are_merged_into_a_graph_or_stand_in_it(method: str, tmp_path: Path) -> None:
    train(little_spec(tmp_path, method))
    found = export(tmp_path / "run", tmp_path / "graph", to="onnx")
    assert found.step is not None and found.step.status == "passed"
    assert any("as it stands on the model" in note for note in found.notes) == (method == "sequential_adapter")
