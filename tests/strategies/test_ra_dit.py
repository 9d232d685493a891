"""ra_dit and retriever_kl: an encoder learns what helps a language model, which learns to use what is found."""

import json

import pytest
import torch
from in_memory import Runs
from little import little_data, little_model, little_spec
from recipe_rows import ROWS

from luthier.core import ConfigError, DataError
from luthier.runs import RunFolder
from luthier.runs.spec import DataSpec
from luthier.strategies.distillation.retriever_kl import _told
from luthier.strategies.recipes.ra_dit import RADIT, posterior
from luthier.trust import safetensors
from luthier.workflow.recipes import follow
from luthier.workflow.sentence_vectors import SentenceVectors

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("dual")


def spec_of(home, out, **changes):
    given = {**ROWS["ra_dit"](home), "steps": 2, "strategy": "ra_dit"}
    tiny = {f"ra_dit.{k}": v for k, v in RADIT.tiny.items()} | {"ra_dit.retriever_epochs": 5.0, "ra_dit.tau": 0.3}
    given["settings"] = tiny | {"ra_dit.retriever_lr": 1e-2} | given["settings"] | changes.pop("settings", {})
    return little_spec(home, out=str(out), **{**given, **changes})


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def done(home):
    return follow(spec_of(home, home / "done"))


@pytest.mark.acid("ra_dit", 1)
def test_ra_dit_as_many_rows_a_question_as_documents_each_with_one(home, done):
    asked, rows = lines(home / "asked.jsonl"), lines(done.path / "rows-answers.jsonl")
    texts = {row["id"]: row["text"] for row in lines(home / "documents.jsonl")}
    of: dict[str, list] = {}
    for row in rows:
        of.setdefault(row["from"], []).append(row)
        assert row["prompt"].count("Document") == 1 and f"Document 1: {texts[row['document']]}" in row["prompt"]
        assert row["response"] == asked[int(row["from"].rpartition(":")[2]) - 1]["answer"]
    assert {len(own) for own in of.values()} == {2} and len(of) == 32
    assert all([row["rank"] for row in own] == [1, 2] and len({r["document"] for r in own}) == 2 for own in of.values())


@pytest.mark.acid("ra_dit", 2)
def test_ra_dit_each_step_moves_one_model_alone(home, done):
    encoder, model = little_model(home / "bert", "bert"), little_model(home / "llama", "llama")
    first, second = (RunFolder.open(done.path / name, write=False).spec for name in ("1-retriever", "2-answers"))
    assert first["model"] == str(encoder) and second["model"] == str(model)
    assert first["strategy"] == "retriever_kl" and second["strategy"] is None
    base, merged = (safetensors.read(p / "model.safetensors") for p in (encoder, done.path / "1-retriever-merged"))
    moved = [n for n in base if not torch.equal(base[n], merged[f"bert.{n}"])]
    assert moved and all("attention" in n for n in moved), "what the method trains, in the encoder"
    assert done.result.name == "2-answers"


@pytest.mark.acid("ra_dit", 3)
def test_ra_dit_the_vectors_of_documents_are_those_of_the_encoder_as_it_was(tmp_path):
    runs = Runs(tmp_path)
    loop = runs.loop("retriever_kl", "full", "bert-found-dry")
    loop.moments.start()
    memory = loop.moments.tensors()
    name = next(n for part in memory.values() for n in part if n.endswith("vectors"))
    held = next(part[name] for part in memory.values() if name in part).clone()
    texts = list(dict.fromkeys(t for row in lines(tmp_path / "found.jsonl") for t in row["documents"]))
    wanted = torch.nn.functional.normalize(torch.from_numpy(SentenceVectors(loop.spec.model)(texts)), dim=-1)
    nearest = (held @ wanted.T).max(-1).values
    assert torch.allclose(nearest, torch.ones_like(nearest), atol=1e-5)
    loop.run_to()
    after = loop.moments.tensors()
    assert torch.equal(next(part[name] for part in after.values() if name in part), held)


@pytest.mark.acid("ra_dit", 4)
def test_ra_dit_the_encoders_chances_come_nearer_to_those_of_the_model(home, done):
    rows = lines(done.path / "rows-found.jsonl")
    apart = {}
    for name in (str(little_model(home / "bert", "bert")), str(done.path / "1-retriever-merged")):
        queries, index, total = SentenceVectors(name), SentenceVectors(str(home / "bert")), 0.0
        for row in rows:
            unit = [
                torch.nn.functional.normalize(torch.from_numpy(of(some)), dim=-1)
                for of, some in ((queries, [row["text"]]), (index, row["documents"]))
            ]
            wanted, chances = torch.tensor(row["shares"]), (unit[0] @ unit[1].T / 0.05).log_softmax(-1)[0]
            total += float((wanted * (wanted.clamp(min=1e-30).log() - chances)).sum())
        apart[name] = total / len(rows)
    before, after = apart.values()
    assert after < 0.9 * before, (before, after)
    assert all(abs(sum(row["shares"]) - 1) < 1e-6 and len(row["documents"]) == 3 for row in rows)
    assert posterior([-1.0, -1.0, -9.0], 0.01)[:2] == [0.5, 0.5]


def test_ra_dit_what_cannot_work_is_refused_before_anything_is_written(home, tmp_path):
    for words, changes in (
        ("needs documents", {"settings": {"ra_dit.documents": None}}),
        ("needs 90 documents", {"settings": {"ra_dit.candidates": 90}}),
        ("rows of the kind labelled", {"data": DataSpec(source=str(little_data(tmp_path / "rows.csv")))}),
    ):
        with pytest.raises(ConfigError, match=words):
            follow(spec_of(home, tmp_path / "out", **changes))
        assert not (tmp_path / "out").exists()
    for row, words in (
        ({"shares": [1.0]}, "'documents' is 'None'"),
        ({"documents": ["a"], "shares": [0.5, 0.5]}, "a number for each of 1"),
        ({"documents": ["a", "b"], "shares": [0.5, 0.2]}, "must add up to 1"),
        ({"documents": ["a", "b"], "shares": [1.5, -0.5]}, "must add up to 1"),
    ):
        with pytest.raises(DataError, match=f"r:1: field.*{words}"):
            _told(row, "r:1")
