"""`luthier export` as a user calls it: what it writes is read by peft in the one line that it prints."""

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.conftest import Call
from little import little_model
from safetensors.torch import load_file
from tiny import inputs, tiny
from transformers import AutoTokenizer

from luthier.surgery import attach, load, to_peft
from luthier.workflow.prediction import Predictor

READ = """
import json, sys, warnings
warnings.simplefilter("ignore")
import peft, torch
from transformers import AutoTokenizer
model = {line}.eval()
tokenizer = AutoTokenizer.from_pretrained({folder!r})
asked = {asked!r}
given = tokenizer(asked, return_tensors="pt")
given = {{k: v for k, v in given.items() if k in ("input_ids", "attention_mask", "token_type_ids")}}
with torch.no_grad():
    if {writes!r}:
        out = model.generate(**given, max_new_tokens=8, do_sample=False)[0, given["input_ids"].shape[1]:]
        stop = model.generation_config.eos_token_id
        found = {{"text": tokenizer.decode(out, skip_special_tokens=True).strip(), "stop": stop}}
    else:
        logits = model(**given).logits[0]
        names = model.config.id2label
        found = {{"label": names[int(logits.argmax(-1))]}} if logits.dim() == 1 else {{
            "tags": [names[int(k)] for k in logits.argmax(-1)[1:-1]]}}
        if logits.dim() == 1:
            found["probabilities"] = {{names[i]: float(p) for i, p in enumerate(logits.softmax(-1))}}
print(json.dumps(found))
"""


def _read_by_peft(line: str, folder: str, asked: str, writes: bool = False) -> dict[str, Any]:
    """What peft answers in a process of its own, where nothing of luthier is imported."""
    code = READ.format(line=line, folder=folder, asked=asked, writes=writes)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _train(luthier: Call, model: Path, data: Path, *more: object) -> None:
    words = ("train", model, "--data", data, "--steps", 6, "--threads", 1, "--precision", "fp32", "--out", "run")
    answer = luthier(*words, *more)
    assert answer.code == 0, answer.err


def test_a_classifier_is_read_in_one_line_with_its_labels_and_answers_equally(
    luthier: Call, model: Path, tmp_path: Path
) -> None:
    rows = [f"{w} {label} is it,{label}" for label in ("good", "bad", "red") for w in ("how", "what", "who", "why")]
    data = tmp_path / "three.csv"
    data.write_text("\n".join(["text,label", *rows]) + "\n")
    _train(luthier, model, data, "--test-share", 0)
    answer = luthier("export", "run", "adapter", "--json")
    assert answer.code == 0 and answer.json["format"] == "peft"
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= set(answer.json["bytes"])
    assert not any(name.endswith(".safetensors") and "base" in name for name in answer.json["bytes"]), "no base weight"
    names = list(load_file("adapter/adapter_model.safetensors"))
    assert names and all(name.startswith("base_model.model.") and ".base." not in name for name in names)
    facts = json.loads(Path("adapter/adapter_config.json").read_text())
    assert facts["task_type"] == "SEQ_CLS"
    ours = luthier("predict", "run", "--text", "how good is it", "--json").json["answers"][0]
    theirs = _read_by_peft(answer.json["python"], "adapter", "how good is it")
    assert theirs["label"] == ours["label"]
    assert theirs["probabilities"] == pytest.approx(ours["probabilities"], abs=1e-5)
    assert Path("adapter").stat().st_mode & 0o055, "made to be given away"
    again = luthier("export", "run", "adapter")
    assert again.code == 2 and "is there already" in again.err
    # Given away: the folder and its base lie elsewhere, and the folder's own README says how it is read there.
    shutil.copytree(model, "elsewhere")
    Path("sent").mkdir()
    shutil.move("adapter", "sent/adapter")
    lines = Path("sent/adapter/README.md").read_text().split("```python\n")[2].split("```")[0]
    found: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own, about names of transformers
        exec(lines.replace("BASE", "elsewhere").replace('"adapter"', '"sent/adapter"'), found)
    given = AutoTokenizer.from_pretrained("sent/adapter")("how good is it", return_tensors="pt")
    with torch.no_grad():
        shares = found["model"](**given).logits[0].softmax(-1).tolist()
    assert shares == pytest.approx(list(ours["probabilities"].values()), abs=1e-5)


def test_a_tagger_is_read_in_one_line_and_answers_equally(luthier: Call, model: Path, tmp_path: Path) -> None:
    rows = [{"tokens": ["the", w, "is", "good"], "tags": ["A", "B", "C", "A"]} for w in ("moon", "sun", "cat", "dog")]
    data = tmp_path / "tags.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    _train(luthier, model, data, "--test-share", 0)
    line = luthier("export", "run", "adapter", "--json").json["python"]
    ours = luthier("predict", "run", "--text", "the moon is red", "--json").json["answers"][0]
    assert _read_by_peft(line, "adapter", "the moon is red") == {"tags": ours["tags"]}


def test_a_language_model_is_read_in_one_line_writes_equally_and_stops_where_it_was_taught(
    luthier: Call, tmp_path: Path
) -> None:
    data = tmp_path / "plain.jsonl"
    data.write_text("".join(json.dumps({"text": f"how far is the {w}"}) + "\n" for w in ("moon", "sun", "cat", "dog")))
    _train(luthier, little_model(tmp_path / "llama", "llama"), data, "--test-share", 0)
    line = luthier("export", "run", "adapter", "--json").json["python"]
    ours = luthier("predict", "run", "--text", "how far", "--max-new-tokens", 8, "--json").json["answers"][0]
    theirs = _read_by_peft(line, "adapter", "how far", writes=True)
    assert theirs["text"] == ours["text"]
    stop = json.loads(Path("run/tuning/tuning.json").read_text())["contract"]["stop"]
    assert theirs["stop"] == stop == json.loads(Path("adapter/generation_config.json").read_text())["eos_token_id"]


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_what_is_saved_and_exported_does_not_depend_on_what_speeds_up_serves_or_is_folded(
    method: str, tmp_path: Path
) -> None:
    model = tiny("bert", "classification").to(torch.bfloat16)
    tuned = attach(model, method)
    with torch.no_grad():
        for number, parameter in enumerate(tuned.trained().values()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    tuned.save(tmp_path / "trained")
    model = tiny("bert", "classification").to(torch.bfloat16)
    tuned = load(model, tmp_path / "trained")  # frozen, as for prediction: the head is sped up too

    def written(name: str) -> list[dict[str, bytes]]:
        tuned.save(tmp_path / name / "saved")
        to_peft(tuned, tmp_path / name / "out")
        folders = (tmp_path / name / "saved", tmp_path / name / "out")
        return [{p.name: p.read_bytes() for p in sorted(folder.iterdir())} for folder in folders]

    for name in ("plain", "quick", "serving", "used", "folded", "asleep"):
        (tmp_path / name).mkdir()
    plain = written("plain")
    tuned.forward.route_attention()
    tuned.fast.accelerate(training=False)
    tuned.edited.socket("classifier")  # as where a CPU's fast layers take the head, and its tensors another name
    assert written("quick") == plain
    with tuned.serving():
        model(**{k: v for k, v in inputs(model).items() if k != "labels"})
        assert written("serving") == plain
    assert written("used") == plain
    tuned.merging.fold()
    assert written("folded") == plain
    tuned.merging.unfold()
    tuned.activate()
    assert written("asleep") == plain


def test_a_method_that_peft_does_not_have_is_refused(luthier: Call, finished: Path) -> None:
    answer = luthier("export", finished, "adapter")
    assert answer.code == 3 and "lora, dora" in answer.err
    assert not Path("adapter").exists()


def test_a_regression_is_exported_in_the_unit_of_its_rows(luthier: Call, model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "years.csv"
    rows.write_text("text,label\n" + "".join(f"{'good ' * (1 + i % 5)}{i},{1900 + i % 5}.5\n" for i in range(40)))
    _train(luthier, model, rows, "--task", "regression")
    answer = luthier("export", "run", "out")
    assert answer.code == 0 and "unit of the rows" not in answer.out + answer.err
    predictor = Predictor(Path("run"))
    head = {name: p.detach().float() for name, p in predictor.tuned.model.named_parameters()}
    task, written = predictor.task, load_file("out/adapter_model.safetensors")
    assert task.center > 1900 and 1 < task.scale < 2
    assert torch.allclose(written["base_model.model.classifier.weight"], head["classifier.weight"] * task.scale)
    assert torch.allclose(
        written["base_model.model.classifier.bias"], head["classifier.bias"] * task.scale + task.center
    )


def test_a_place_that_cannot_be_written_to_is_no_bug(luthier: Call, finished: Path, rows: Path) -> None:
    answer = luthier("export", finished, rows / "adapter")  # below a file
    assert answer.code == 5 and f"{rows} is a file" in answer.err and "Name another place" in answer.err
    assert "Traceback" not in answer.err
