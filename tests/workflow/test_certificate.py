"""A certificate passes what was trained, and catches each thing that can happen to it on its way out, once."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from little import little_data, little_model, little_spec, made_of
from safetensors.torch import load_file, save_file
from word_tables import WORDS

from luthier.core import (
    AnatomyError,
    CompositionError,
    ConfigError,
    DataError,
    IntegrityError,
    LuthierError,
    NothingTrains,
)
from luthier.runs import durable
from luthier.runs.spec import DataSpec
from luthier.surgery import METHODS
from luthier.workflow import merge, train
from luthier.workflow.certificate import Certificate, Step, compared
from luthier.workflow.certify_run import certify
from luthier.workflow.export import export_peft
from luthier.workflow.fresh import answer_of
from luthier.workflow.prediction import Predictor
from luthier.workflow.reference import Reference, Seen, read_reference

EVERY = [name for name in METHODS.names() if not METHODS.get(name).modifies]

QUICK = {("lora", "llama"), ("prefix_tuning", "bert"), ("bitfit", "bert"), ("sequential_adapter", "bert")}


def _steps(found: Certificate) -> dict[str, Step]:
    return {step.name: step for step in found.steps}


def _here(run: Path, **options: Any) -> Certificate:
    """All steps in this process: a process for each takes seconds, and one test starts them."""
    return certify(run, do=answer_of, **options)


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        pytest.param(name, kind, marks=[] if (name, kind) in QUICK else pytest.mark.slow)
        for kind in ("bert", "llama")
        for name in EVERY
    ],
)
def test_a_run_of_every_method_passes_every_step_that_the_method_can_do(method: str, kind: str, tmp_path: Path) -> None:
    try:
        train(little_spec(tmp_path, method, kind, steps=3, **made_of(method, tmp_path, kind)))
    except (AnatomyError, CompositionError, ConfigError, NothingTrains) as error:
        pytest.skip(str(error))
    found = _here(tmp_path / "run")
    steps = _steps(found)
    if method == "boft":  # without its CUDA code peft takes one factor, whatever the file says: the certificate sees it
        assert [step.name for step in found.failed] == ["exported"] and "size mismatch" in steps["exported"].reason
        return
    assert found.passed, [(step.name, step.reason) for step in found.failed]
    assert {"reloaded", "served", "detached", "merged", "exported"} == set(steps)
    if method != "longlora":  # which attends by another way in training
        assert steps["reloaded"].same_bits
    assert steps["detached"].same_bits or method == "longlora"
    assert all(step.from_base for step in steps.values() if step.status == "passed")
    for step in steps.values():
        assert step.status == "passed" or (step.name in ("merged", "exported") and step.reason)
    if METHODS.get(method).peft is not None:
        assert steps["exported"].status == "passed" or "peft" in steps["exported"].reason
    stored = json.loads((tmp_path / "run" / "certificate.json").read_text())
    assert stored["passed"] and len(stored["steps"]) == 5 and stored["versions"]["torch"] == torch.__version__
    if kind == "llama":
        assert steps["reloaded"].greedy == 1.0


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of lora on a language model with a tied head, one of another seed, and what came out of the first."""
    home = tmp_path_factory.mktemp("chat")
    little_model(home / "llama", "llama", tie_word_embeddings=True)
    train(little_spec(home, "lora", "llama", steps=12))
    train(little_spec(home, "lora", "llama", steps=12, seed=5, out=str(home / "other")))
    merge(home / "run", home / "merged")
    export_peft(Predictor(home / "run"), home / "exported")
    export_peft(Predictor(home / "other"), home / "stale")
    return home


def test_what_is_written_carries_its_certificate(chat: Path) -> None:
    for folder, step in (("merged", "merged"), ("exported", "exported")):
        found = json.loads((chat / folder / "certificate.json").read_text())
        assert found["passed"] and not found["accepted"]
        assert [each["name"] for each in found["steps"]] == [step]
        assert _here(chat / "run", folder=chat / folder).passed


def _change(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def _facts(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _dropped_key(folder: Path) -> None:
    _change(folder / "adapter_model.safetensors", lambda t: t.pop(sorted(t)[-1]))  # type: ignore[arg-type,return-value]


def _flipped_sign(folder: Path) -> None:
    def flip(tensors: dict[str, torch.Tensor]) -> None:
        name = next(n for n in sorted(tensors) if "lora_B" in n)
        tensors[name] = -tensors[name]

    _change(folder / "adapter_model.safetensors", flip)


def _wrong_scale(folder: Path) -> None:
    facts = json.loads((folder / "adapter_config.json").read_text())
    _facts(folder / "adapter_config.json", lora_alpha=2 * facts["lora_alpha"])


def _other_template(folder: Path) -> None:
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text().replace("### ", "## "))


def _stale(folder: Path) -> None:
    shutil.copy(folder.parent.parent / "stale" / "adapter_model.safetensors", folder)


def _untied(folder: Path) -> None:
    def head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    _change(folder / "model.safetensors", head)
    _facts(folder / "config.json", tie_word_embeddings=False)


def _lost(folder: Path) -> None:
    shutil.copy(folder.parent.parent / "llama" / "model.safetensors", folder)


def _no_stop(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    _facts(folder / "config.json", eos_token_id=None)


@pytest.mark.parametrize(
    ("folder", "damage", "told"),
    [
        ("exported", _dropped_key, "tensors that the file does not"),
        ("exported", _flipped_sign, "off by"),
        ("exported", _wrong_scale, "off by"),
        ("exported", _other_template, "tokenizer or template"),
        ("exported", _stale, "off by"),
        ("merged", _other_template, "tokenizer or template"),
        ("merged", _untied, "no longer tied"),
        ("merged", _lost, "what the base computes"),
        ("merged", _no_stop, "token"),
    ],
)
def test_a_folder_that_was_damaged_on_its_way_is_caught(
    folder: str, damage: Callable[[Path], None], told: str, chat: Path
) -> None:
    sent = chat / "sent" / folder
    shutil.rmtree(sent, ignore_errors=True)
    shutil.copytree(chat / folder, sent)
    damage(sent)
    found = _here(chat / "run", folder=sent)
    assert [step.name for step in found.failed] == [folder]
    assert told in found.failed[0].reason
    assert not json.loads((chat / "run" / "certificate.json").read_text())["passed"]


def test_a_tuning_of_another_run_in_the_place_of_this_ones_is_caught(chat: Path) -> None:
    mixed = chat / "mixed"
    shutil.copytree(chat / "run", mixed)
    shutil.rmtree(mixed / "tuning")
    shutil.copytree(chat / "other" / "tuning", mixed / "tuning")  # whole in itself: its own digests hold
    found = _here(mixed)
    assert found.failed[0].name == "reloaded" and "off by" in found.failed[0].reason


def test_a_reference_that_was_touched_is_named(chat: Path) -> None:
    touched = chat / "touched"
    shutil.copytree(chat / "run", touched)
    _change(touched / "reference.safetensors", lambda t: t["trained.0"].mul_(2))  # type: ignore[arg-type,return-value]
    with pytest.raises(IntegrityError, match=r"reference\.json"):
        _here(touched)


def test_merge_and_export_write_nothing_that_fails_unless_it_is_accepted(
    chat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = read_reference(chat / "run")
    assert kept is not None
    off = replace(kept.trained, logits=tuple(t * 1.001 for t in kept.trained.logits))
    monkeypatch.setattr(
        "luthier.workflow.certificate.read_reference", lambda folder: Reference(kept.rows, off, kept.base)
    )
    for write in (
        lambda accept: merge(chat / "run", chat / "refused", accept=accept),
        lambda accept: export_peft(Predictor(chat / "run"), chat / "refused", accept=accept),
    ):
        with pytest.raises(IntegrityError, match=r"not the model that was trained.*--accept"):
            write(False)
        assert not (chat / "refused").exists() and not list(chat.glob(".tmp-refused*"))
        write(True)
        found = json.loads((chat / "refused" / "certificate.json").read_text())
        assert found["accepted"] and not found["passed"]
        shutil.rmtree(chat / "refused")


def test_a_reference_is_read_by_the_counts_that_it_was_written_with(
    chat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("luthier.workflow.reference.MOST_NUMBERS", 131)
    monkeypatch.setattr("luthier.workflow.reference.NEW_TOKENS", 1)
    assert _here(chat / "run").passed, "as where a later version keeps fewer"


def test_the_users_prompts_are_compared_too(chat: Path) -> None:
    prompts = chat / "prompts.txt"
    prompts.write_text("how far is the moon\n\nwho is it\n")
    found = _here(chat / "run", prompts=str(prompts))
    assert found.passed and found.prompts == 2
    assert _steps(found)["merged"].greedy == 1.0
    with pytest.raises(ConfigError, match="1 to 64"):
        (chat / "none.txt").write_text("\n")
        _here(chat / "run", prompts=str(chat / "none.txt"))
    with pytest.raises(DataError, match=r"gone\.txt: cannot be read"):
        _here(chat / "run", prompts=str(chat / "gone.txt"))


def test_a_prompt_that_cannot_be_read_and_a_folder_of_neither_kind_are_named_before_any_step(
    chat: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("prompt,response\nhow far is the moon,far\n,who\n")
    for wrong, told in (
        ({"prompts": str(rows)}, r"1 of 2 rows cannot be read: .*rows\.csv:3"),
        ({"folder": tmp_path}, "neither a merged model"),
    ):
        steps: list[Step] = []
        with pytest.raises(LuthierError, match=told):
            _here(chat / "run", say=steps.append, **wrong)
        assert not steps


def test_a_run_that_answers_otherwise_than_its_weights_says_so(tmp_path: Path) -> None:
    train(little_spec(tmp_path, "laplace_lora", steps=3))
    step = _steps(_here(tmp_path / "run"))["merged"]
    assert step.status == "passed" and "what laplace_lora makes of them is not in the weights" in step.reason


def test_a_run_that_weighs_answers_passes_and_its_prompts_need_both_columns(tmp_path: Path) -> None:
    source = little_data(tmp_path / "pairs.csv", kind="pairs")
    train(little_spec(tmp_path, "lora", "llama", data=DataSpec(source=str(source)), task="reward", steps=3))
    assert _here(tmp_path / "run").passed
    (tmp_path / "prompts.txt").write_text("how far is the moon\n")
    with pytest.raises(ConfigError, match="both columns in a file with --prompts"):
        _here(tmp_path / "run", prompts=str(tmp_path / "prompts.txt"))


def test_codes_may_cost_the_merged_model_what_they_cost_the_base(chat: Path) -> None:
    steps = _steps(_here(chat / "run", store="nf4"))
    assert steps["quantised to nf4"].status == "passed", steps["quantised to nf4"].reason
    assert "its base's by" in steps["quantised to nf4"].reason


@pytest.mark.parametrize("task", ["tags", "price", "seq2seq", "plain", "codes"])
def test_runs_of_every_task_pass(task: str, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    some = [WORDS[i % 20 : i % 20 + 5] for i in range(30)]
    made: dict[str, list[dict[str, Any]]] = {
        "tags": [{"tokens": words, "tags": ["X" if w < "h" else "Y" for w in words]} for words in some],
        "price": [{"text": " ".join(words), "score": 250_000.5 + 3000 * (i % 7)} for i, words in enumerate(some)],
        "plain": [{"text": " ".join(words)} for words in some],
    }
    kind = {"seq2seq": "t5", "plain": "llama", "codes": "llama"}.get(task, "bert")
    if task in made:
        rows.write_text("".join(json.dumps(row) + "\n" for row in made[task]))
        source = rows
    else:
        source = little_data(tmp_path / "turns.csv", kind="turns")
    more = {"store": "nf4"} if task == "codes" else {}
    train(little_spec(tmp_path, "lora", kind, data=DataSpec(source=str(source)), steps=6, **more))
    found = _here(tmp_path / "run")
    steps = _steps(found)
    assert found.passed, [(step.name, step.reason) for step in found.failed]
    assert steps["merged"].status == "passed", steps["merged"].reason
    assert steps["exported"].status == "passed" or task == "codes", steps["exported"].reason


def test_a_run_of_an_older_luthier_says_what_is_missing(tmp_path: Path) -> None:
    train(little_spec(tmp_path, steps=3))
    for name in ("reference.json", "reference.safetensors"):
        durable.remove(tmp_path / "run" / name)
    found = _here(tmp_path / "run")
    assert not found.passed and found.steps[0].status == "not done" and "older luthier" in found.steps[0].reason
    (tmp_path / "prompts.txt").write_text("how far is the moon\n")
    found = _here(tmp_path / "run", prompts=str(tmp_path / "prompts.txt"))
    assert found.passed and _steps(found)["merged"].status == "passed"


def test_a_near_tie_may_be_written_otherwise_and_nothing_else() -> None:
    logits = (torch.tensor([[1.0, 2.0]]),)
    base = (torch.tensor([[1.0, 0.0]]),)
    trained = Seen(((1, 2),), logits, ((4, 5, 6),), ((0.5, 1e-6, 0.5),))
    other = replace(trained, written=((4, 7, 8),))
    from luthier.workflow.certificate import Expected

    assert compared("x", Expected(trained, base), other).status == "passed"
    far = Expected(replace(trained, leads=((0.5, 0.1, 0.5),)), base)
    assert "token 2" in compared("x", far, other).reason
    assert "token 3" in compared("x", Expected(trained, base), replace(trained, written=((4, 5),))).reason
