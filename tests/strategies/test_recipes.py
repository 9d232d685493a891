"""Recipes: the contract runs on each file of the shelf because it is there; then their own acid tests."""

import ast
import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from fillers import encoder, filler
from little import Heard, at_call, little_data, little_model, little_spec
from recipe_rows import ROWS
from word_tables import WORDS

from luthier.core import CompositionError, ConfigError, IntegrityError, UnknownName
from luthier.data.rows import load_rows
from luthier.runs import RunFolder
from luthier.runs.spec import BatchSpec, CheckpointSpec, DataSpec, EvalSpec, OptimSpec, RunSpec
from luthier.strategies.recipes._soft import logits_of, most_sure, soft_labels
from luthier.strategies.recipes.pet import _others
from luthier.surgery import tuning_files
from luthier.training import STRATEGIES
from luthier.training.loop import Loop
from luthier.training.recipe import Recipe
from luthier.trust import safetensors
from luthier.workflow import resume, train
from luthier.workflow.cross_validation import cross_validate
from luthier.workflow.recipes import _Run, follow
from luthier.workflow.resume_proof import run_digests

torch.set_num_threads(1)
EVERY = [card.name for card in STRATEGIES.cards() if card.family == "recipes"]


class Killed(Exception):
    """In place of the process's end: nothing of ours catches it."""


def kill() -> None:
    raise Killed


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("recipes")


def recipe_spec(home: Path, words: str, out: Path, kind: str = "bert", **changes) -> RunSpec:
    model = encoder(home / "encoder") if kind == "bert" else little_model(home / kind, kind)
    tiny = {f"{w}.{k}": v for w in words.split("+") for k, v in STRATEGIES.get(w).tiny.items() if w in EVERY}
    tiny |= {"dapt.corpus": str(corpus(home))} if "dapt" in words else {}
    given = {"model": str(model), "method": "full", "steps": 4, "settings": tiny | changes.pop("settings", {})}
    rows = little_data(home / "rows.csv")
    if {"pet", "ipet"} & set(words.split("+")):
        data = DataSpec(source=str(rows), words="good=good, bad=bad, red=red")
        given |= {"model": str(filler(home / "filler")), "data": data}
    if words == "lm_bff":
        data = DataSpec(source=str(rows), words="good=good, bad=bad, red=red", template="{text} ! it is {mask} .")
        given |= {"model": str(filler(home / "filler")), "data": data}
    if words == "kd_sequence":
        llama = str(little_model(home / "llama", "llama"))
        data = DataSpec(source=str(little_data(home / "turns.csv", rows=30, kind="turns")))
        given |= {"model": llama, "data": data, "steps": 30, "optim": OptimSpec(lr=1e-2), "trunk_dropout": "off"}
        given["settings"] |= {"kd_sequence.teacher_model": llama}
    if words == "task_mixture":
        given |= {"model": str(little_model(home / "llama", "llama")), "data": DataSpec(source=str(rows))}
        told = '[train]\ntemplates = ["{text} ? ||| {label}"]\n[old]\ntemplates = ["say {label} ||| {text}"]\n'
        (home / "templates.toml").write_text(told)
        given["settings"] |= {"task_mixture.templates": str(home / "templates.toml")}
        given |= {"also": (f"old={little_data(home / 'more.csv', rows=20, seed=5)}",)}
    if words in ROWS:
        made = ROWS[words](home)
        given["settings"] |= made.pop("settings", {})
        given |= made
    if words == "setfit":
        given |= {"batch": BatchSpec(size=8, tokens=4096)}  # pairs are those of a whole step
    also = {}
    if words == "startup":
        given |= {"batch": BatchSpec(size=8, tokens=4096)}
        given |= {"data": DataSpec(source=str(two_labels(home / "two.csv")))}
        also = {"also": (f"source={rows}", f"unlabelled={little_data(home / 'more.csv', rows=20, seed=5)}")}
        return little_spec(home, strategy=words, out=str(out), **{**given, **also, **changes})
    if any("unlabelled" in getattr(STRATEGIES.get(w), "sets", ()) for w in words.split("+")):
        also = {"also": (f"unlabelled={little_data(home / 'more.csv', rows=20, seed=5)}",)}
    return little_spec(
        home, strategy=words, out=str(out), **{"data": DataSpec(source=str(rows)), **given, **also, **changes}
    )


def two_labels(path: Path) -> Path:
    """Rows of another task: two labels of its own, by a word."""
    if not path.exists():
        words = {"sun": "day", "moon": "night"}
        lines = [f"{' '.join(WORDS[i % 9 : i % 9 + 4])} {word},{words[word]}" for i in range(15) for word in words]
        path.write_text("\n".join(["text,label", *lines]) + "\n")
    return path


def corpus(home: Path) -> Path:
    path = home / "corpus.jsonl"
    rows, _ = load_rows(str(little_data(home / "domain.csv", rows=30, seed=9)))
    path.write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in rows.rows))
    return path


def phases_of(path: Path) -> list[Path]:
    return sorted(p.parent for p in path.glob("*/run.json"))


@pytest.mark.parametrize("name", EVERY)
def test_a_file_registers_its_own_name_and_its_page_has_its_parts(name):
    card, cls = STRATEGIES.card(name), STRATEGIES.get(name)
    path = Path(card.path)
    assert issubclass(cls, Recipe) and card.name == cls.name == path.stem and path.parent.name == card.family
    page = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert page.splitlines()[0].endswith(".") and any(line.startswith("    ") for line in page.splitlines())
    for part in ("Paper:", "Cost:", "Claims:", "Pitfalls:"):
        assert any(line.startswith(part) for line in page.splitlines()), part
    assert card.paper in page
    own = {f.name for f in dataclasses.fields(cls)}
    assert not own & {n for n in dir(Recipe) if not n.startswith("_")}, "hides a moment"
    assert own == {s.name for s in card.settings} and set(cls.tiny) <= own


@pytest.mark.parametrize("name", EVERY)
def test_killed_in_its_second_phase_and_resumed_it_is_the_undisturbed_one(name, home, tmp_path, monkeypatch):
    whole = follow(recipe_spec(home, name, tmp_path / "whole"))
    assert whole.phases and whole.last is not None
    one = len(whole.phases) == 1  # then it is killed there
    spec = recipe_spec(home, name, tmp_path / "stopped", checkpoint=CheckpointSpec(every_steps=1))
    first = json.loads((whole.path / "recipe.json").read_text())["asked"]
    steps = [e for e in RunFolder.open(phases_of(whole.path)[0], write=False).events() if "step" in e and "at" not in e]
    with monkeypatch.context() as patch:
        at_call(patch, Loop, "_train_step", 3 if one else len(steps) + 3, kill)
        with pytest.raises(Killed):
            follow(spec)
    done, begun = (phases_of(tmp_path / "stopped") * 2)[:2]
    assert RunFolder.open(done, write=False).finished != one and not RunFolder.open(begun, write=False).finished
    before = {p: p.stat().st_mtime_ns for p in done.rglob("*") if p.is_file()}
    heard = Heard()
    resume(tmp_path / "stopped", listener=heard)
    if not one:
        assert f"is finished in {done}, and not run again" in heard.text
        assert before == {p: p.stat().st_mtime_ns for p in done.rglob("*") if p.is_file()}
    for own, other in zip(phases_of(whole.path), phases_of(tmp_path / "stopped"), strict=True):
        assert own.name == other.name
        assert tuning_files.weights_digest(own / "tuning") == tuning_files.weights_digest(other / "tuning")
        assert (own / "scores.json").read_text() == (other / "scores.json").read_text()
    told = [json.loads((p / "lineage.json").read_text()) for p in phases_of(tmp_path / "stopped")]
    assert [t["phase"] for t in told] == list(range(1, len(first) + 1)) and (one or told[-1]["made_of"])
    with pytest.raises(ConfigError, match="this recipe is finished"):
        resume(tmp_path / "stopped")


@pytest.mark.parametrize("name", ["ulmfit"])
def test_a_file_of_the_recipe_and_the_strategy_are_the_same(name, home, tmp_path):
    spec = recipe_spec(home, name, tmp_path / "one")
    one = follow(spec)
    file = RunSpec.from_toml(one.path / "spec.toml")
    two = train(dataclasses.replace(file, out=str(tmp_path / "two")))
    assert run_digests(two.path)["tuning"] == run_digests(one.result)["tuning"]
    assert two.path == tmp_path / "two" / one.result.name


def test_what_cannot_work_is_refused_before_anything_is_written(home, tmp_path):
    def refused(error, words, strategy, **changes):
        spec = recipe_spec(home, strategy, tmp_path / "out", **changes)
        with pytest.raises(error, match=words):
            train(spec)
        assert not (tmp_path / "out").exists()

    refused(CompositionError, "each is a chain of runs", "ulmfit+tapt")
    refused(CompositionError, "would own the moment 'rate'", "ulmfit+clr")
    refused(UnknownName, "ulmfit has no setting 'epochs_of_texts'", "ulmfit", settings={"ulmfit.epochs_of_texts": 1})
    refused(ConfigError, "texts_method=full", "tapt", method="prefix_tuning")
    refused(ConfigError, "a text and a label", "tapt", kind="llama", data=turns(home))
    refused(ConfigError, "needs texts of the domain", "dapt", settings={"dapt.corpus": None})
    with pytest.raises(CompositionError, match=r"tapt is a recipe.*each fold"):
        cross_validate(recipe_spec(home, "tapt", tmp_path / "cv"), 2)
    with pytest.raises(ConfigError, match="leave stop_at and changes out"):
        train(recipe_spec(home, "tapt", tmp_path / "out"), stop_at=2)


def turns(home: Path) -> DataSpec:
    return DataSpec(source=str(little_data(home / "turns.csv", kind="turns")))


def test_another_recipe_in_the_folder_and_changed_rows_are_refused(home, tmp_path, monkeypatch):
    rows = little_data(tmp_path / "rows.csv")
    spec = recipe_spec(home, "tapt", tmp_path / "out", data=DataSpec(source=str(rows)))
    with monkeypatch.context() as patch:
        at_call(patch, Loop, "_train_step", 2, kill)
        with pytest.raises(Killed):
            follow(spec)
    with pytest.raises(ConfigError, match="holds another recipe"):
        follow(dataclasses.replace(spec, seed=5))
    rows.write_text(rows.read_text() + "the moon is red red red,red\n")
    with pytest.raises(IntegrityError, match="other rows were written there"):
        resume(tmp_path / "out")


def test_a_folder_whose_making_was_killed_and_an_empty_one_are_begun_in(home, tmp_path):
    for name, left in (("empty", ()), ("begun", ("recipe.lock", "spec.toml"))):
        (tmp_path / name).mkdir()
        for file in left:
            (tmp_path / name / file).write_text("")
        assert follow(recipe_spec(home, "label_words", tmp_path / name, steps=1)).phases
    for file in ("mine.txt", "spec.toml"):
        (tmp_path / f"with {file}").mkdir()
        (tmp_path / f"with {file}" / file).write_text("mine")
        with pytest.raises(ConfigError, match="is not empty and holds no recipe"):
            follow(recipe_spec(home, "label_words", tmp_path / f"with {file}"))
        assert (tmp_path / f"with {file}" / file).read_text() == "mine"


@pytest.mark.parametrize("name", ["pet", "setfit", "kd_sequence"])
def test_how_the_users_own_file_is_stored_is_no_word_on_rows_that_were_written(name, home, tmp_path):
    spec, rows = recipe_spec(home, name, tmp_path / "out"), tmp_path / "rows.csv"
    rows.write_bytes(Path(spec.data.source).read_text().replace(",", ";").encode("utf-16"))
    data = dataclasses.replace(spec.data, source=str(rows), delimiter=";", encoding="utf-16", accept_refused=1.0)
    done = follow(dataclasses.replace(spec, data=data))
    specs = [RunFolder.open(p, write=False).spec["data"] for p in phases_of(done.path)]
    written = [one for one in specs if "rows-" in one["source"]]
    assert written and all(one["accept_refused"] == 1.0 and one["encoding"] is None for one in written)


# --- tapt


def test_tapt_reads_inputs_only_and_no_held_out_ones_unless_transductive(home, tmp_path):
    found = {}
    for transductive in (False, True):
        out = tmp_path / f"{transductive}"
        follow(recipe_spec(home, "tapt", out, settings={"tapt.transductive": transductive}))
        texts, _ = load_rows(str(out / "rows-texts.jsonl"))
        assert list(texts.columns) == ["text"], "labels are never read"
        ledger = [json.loads(line) for line in (phases_of(out)[-1] / "rows.jsonl").read_text().splitlines()]
        rows, _ = load_rows(str(home / "rows.csv"))
        text_at = dict(zip(rows.places, (row["text"] for row in rows.rows), strict=True))
        held = {text_at[line["place"]] for line in ledger if line["half"] == "test"}
        found[transductive] = held & {row["text"] for row in texts.rows}
        assert held
    assert not found[False] and found[True]


def test_tapt_the_classifier_starts_from_what_the_texts_made(home, tmp_path):
    done = follow(recipe_spec(home, "tapt", tmp_path / "out", method="lora", settings={"tapt.texts_epochs": 2.0}))
    texts, task = phases_of(done.path)
    merged = safetensors.read(tmp_path / "out" / f"{texts.name}-merged" / "model.safetensors")
    assert RunFolder.open(task, write=False).spec["model"].endswith("1-texts-merged")
    held = dict(done.last.tuned.detach().named_parameters())
    same = [n for n in merged if n in held and torch.equal(held[n].detach(), torch.as_tensor(merged[n]))]
    assert sum("encoder.layer" in n for n in same) > 30 and not any(n.startswith("cls.") for n in held)
    base = safetensors.read(home / "encoder" / "model.safetensors")
    moved = [n for n in merged if "query.weight" in n and not torch.equal(
        torch.as_tensor(merged[n]), torch.as_tensor(base[n.removeprefix("bert.")])
    )]  # fmt: skip
    assert moved, "phase 1 has moved the weights"


def test_tapt_perplexity_on_the_tasks_texts_falls(home, tmp_path):
    spec = recipe_spec(home, "tapt", tmp_path / "few", settings={"tapt.texts_epochs": 0.2, "tapt.texts_lr": 1e-9})
    few = follow(spec)
    many = follow(recipe_spec(home, "tapt", tmp_path / "many", settings={"tapt.texts_epochs": 12.0}))
    assert many.phases["texts"]["perplexity"] < 0.9 * few.phases["texts"]["perplexity"]


# --- dapt


def test_dapt_reads_the_corpus_and_nothing_of_the_task(home, tmp_path):
    done = follow(recipe_spec(home, "dapt", tmp_path / "out"))
    first = RunFolder.open(phases_of(done.path)[0], write=False).spec
    assert first["data"]["source"] == str(corpus(home)) and first["task"] == "masked_lm"


# --- ulmfit


def test_ulmfit_is_its_three_strategies_on_what_the_texts_made(home, tmp_path):
    done = follow(recipe_spec(home, "ulmfit+focal", tmp_path / "out", settings={"llrd.decay": 0.385, "gamma": 1.0}))
    first, last = (RunFolder.open(p, write=False).spec for p in phases_of(done.path))
    assert first["strategy"] == "llrd+stlr" and last["strategy"] == "llrd+stlr+gradual_unfreeze+focal"
    assert first["settings"]["llrd.decay"] == last["settings"]["llrd.decay"] == 0.385
    assert last["settings"]["focal.gamma"] == 1.0 and "focal.gamma" not in first["settings"]
    lines = [e for e in RunFolder.open(done.result, write=False).events() if "gradual_unfreeze.groups" in e]
    assert lines and lines[0]["gradual_unfreeze.groups"] == 2, "the head and the last block first"


def test_ulmfit_with_a_decoder_learns_the_next_words_first(home, tmp_path):
    spec = recipe_spec(home, "ulmfit", tmp_path / "out", kind="llama", method="lora")
    done = follow(spec)
    first = RunFolder.open(phases_of(done.path)[0], write=False).spec
    assert first["task"] == "causal_lm" and "accuracy" in done.phases["task"]


def test_ulmfit_learns_general_texts_first_and_killed_in_its_second_phase_it_is_the_undisturbed_one(
    home, tmp_path, monkeypatch
):
    given = {"also": (f"general={corpus(home)}",), "checkpoint": CheckpointSpec(every_steps=1), "steps": 3}
    whole = follow(recipe_spec(home, "ulmfit", tmp_path / "whole", **given))
    assert list(whole.phases) == ["general", "texts", "task"]
    first, texts, task = (RunFolder.open(p, write=False).spec for p in phases_of(whole.path))
    assert first["data"]["source"] == str(corpus(home)) and first["strategy"] is None
    assert first["task"] == texts["task"] == "masked_lm" and task["also"] is None
    assert texts["model"].endswith("1-general-merged") and task["model"].endswith("2-texts-merged")
    lines = [json.loads((p / "lineage.json").read_text())["made_of"] for p in phases_of(whole.path)]
    assert [list(made_of) for made_of in lines] == [[], ["general"], ["texts"]]
    steps = [e for e in RunFolder.open(phases_of(whole.path)[0], write=False).events() if e["event"] == "step"]
    with monkeypatch.context() as patch:
        at_call(patch, Loop, "_train_step", len(steps) + 2, kill)
        with pytest.raises(Killed):
            follow(recipe_spec(home, "ulmfit", tmp_path / "stopped", **given))
    assert [p.name for p in phases_of(tmp_path / "stopped")] == ["1-general", "2-texts"]
    resume(tmp_path / "stopped")
    for own, other in zip(phases_of(whole.path), phases_of(tmp_path / "stopped"), strict=True):
        assert run_digests(own) == run_digests(other), own.name
    with pytest.raises(ConfigError, match="generel"):
        follow(recipe_spec(home, "ulmfit", tmp_path / "no", also=(f"generel={corpus(home)}",)))
    assert not (tmp_path / "no").exists()


# --- pet, ipet


def pet_spec(home, out, **changes):
    words = "good=good, bad=bad, red=red"
    data = DataSpec(source=str(little_data(home / "few.csv", rows=24)), words=words)
    return recipe_spec(home, "pet", out, model=str(filler(home / "filler")), data=data, method="lora", **changes)


def test_pet_soft_labels_are_distributions_and_the_classifier_learns_them(home, tmp_path):
    done = follow(pet_spec(home, tmp_path / "out", steps=30))
    assert list(done.phases) == ["pattern-1", "pattern-2", "classifier"]
    last = RunFolder.open(done.result, write=False).spec
    assert last["strategy"] == "kd_ensemble" and last["data"]["template"] is None
    assert len(last["settings"]["kd_ensemble.teachers"].split(",")) == 2
    runs = [_Run(p) for p in phases_of(done.path)[:2]]
    table, _ = load_rows(str(home / "more.csv"))
    said = [logits_of(run, table, ["bad", "good", "red"]) for run in runs]
    shares = soft_labels(said, temperature=2.0)
    np.testing.assert_allclose(shares.sum(-1), 1.0)
    alone = [soft_labels([one]) for one in said]
    mean = np.exp(sum(np.log(a) for a in alone) / 2 / 2.0)
    np.testing.assert_allclose(shares, mean / mean.sum(-1, keepdims=True), atol=1e-6)
    kept = [json.loads((p / "scores.json").read_text())["accuracy"] for p in phases_of(done.path)]
    assert len(kept) == 3, "all are scored on the same held-out rows"
    texts = {line["text"] for line in load_rows(str(tmp_path / "out" / "rows-held.jsonl"))[0].rows}
    learnt = {line["text"] for line in load_rows(str(tmp_path / "out" / "rows-soft.jsonl"))[0].rows}
    assert texts and not texts & learnt


def test_ipet_no_model_labels_its_own_next_rows(home, tmp_path, monkeypatch):
    settings = {"pet.generations": 2, "pet.growth": 1.5, "pet.share": 0.6, "pet.repetitions": 2}
    asked, inner = [], _Run.answers
    monkeypatch.setattr(_Run, "answers", lambda run, table: asked.append(run.path.name) or inner(run, table))
    done = follow(pet_spec(home, tmp_path / "out", settings=settings, steps=2))
    assert len(asked) == len(set(asked)) == 8, "each run is asked once, however many panels it is on"
    told = [json.loads(p.read_text()) for p in done.path.glob("*/lineage.json")]
    second = [t for t in told if t["name"].startswith("generation-2-")]
    assert len(second) == 4
    for one in second:
        itself = one["name"].replace("generation-2-", "pattern-")
        assert itself not in one["made_of"] and len(one["made_of"]) == 2
    last = next(t for t in told if t["name"] == "classifier")
    assert sorted(last["made_of"]) == sorted(t["name"] for t in second)
    first, _ = load_rows(str(tmp_path / "out" / "rows-generation-2-1.jsonl"))
    assert len(first) > len(load_rows(str(home / "few.csv"))[0]) * 0.8, "the labelled rows, and more"
    soft, _ = load_rows(str(tmp_path / "out" / "rows-soft.jsonl"))
    own, grown = (Counter(row["label"] for row in rows) for rows in (soft.rows[:-20], first.rows))
    most = {label: round(1.5 * count) for label, count in own.items()}
    assert all(own[label] <= grown[label] <= most[label] for label in own)
    assert any(grown[label] == most[label] > own[label] for label in own), "the labelled rows are among those that grow"


def test_ipet_the_panel_is_a_share_of_the_other_runs_of_one_and_drawn_by_its_seed():
    assert len(_others(6, 0, 0.25, 3, 1)) == 1 and len(_others(7, 0, 0.5, 3, 1)) == 3
    assert _others(3, 1, 1.0, 3, 1) == [0, 2] and len(_others(2, 0, 0.01, 3, 1)) == 1
    assert _others(9, 4, 0.5, 3, 1) == _others(9, 4, 0.5, 3, 1) != _others(9, 4, 0.5, 4, 1)


def test_pet_is_refused_without_patterns_rows_or_words(home, tmp_path):
    for words, changes in (
        ("needs patterns", {"settings": {"pet.patterns": ""}}),
        ("needs further rows: --also unlabelled", {"also": None}),
        ("0 gaps", {"settings": {"pet.patterns": "{text} it is"}}),
        ("two runs at least", {"settings": {"pet.generations": 2, "pet.patterns": "{text} {mask}"}}),
    ):
        with pytest.raises(ConfigError, match=words):
            follow(pet_spec(home, tmp_path / "out", **changes))
        assert not (tmp_path / "out").exists()


def test_pets_classifier_is_judged_as_the_spec_says_and_checked_before_the_first_pattern(home, tmp_path):
    spec = pet_spec(home, tmp_path / "out", steps=2, eval=EvalSpec(best=True))
    done = follow(spec)
    best = [RunFolder.open(p, write=False).spec["eval"]["best"] for p in phases_of(done.path)]
    assert best == [False, False, True]
    with pytest.raises(CompositionError, match="clr and stlr cannot stand together"):
        follow(dataclasses.replace(spec, strategy="pet+clr+stlr", out=str(tmp_path / "not")))
    assert not (tmp_path / "not").exists()


def test_most_sure_takes_the_surest_of_each_label():
    shares = np.asarray([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.2, 0.8], [0.45, 0.55]])
    assert most_sure(shares, [2, 1]) == [(0, 0), (2, 0), (3, 1)]
    assert most_sure(shares, [9, 9]) == [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1)]
