"""raft: questions beside the document that answers them and others."""

import json

import pytest
import torch
from little import little_data, little_spec
from recipe_rows import ROWS, write_lines

from luthier.core import ConfigError, DataError
from luthier.data.documents import load_documents, quotes_in
from luthier.data.rows import normalised
from luthier.runs.spec import DataSpec
from luthier.strategies.recipes.raft import RAFT
from luthier.workflow.recipes import follow

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("raft")


def spec_of(home, out, **changes):
    given = {**ROWS["raft"](home), "method": "lora", "steps": 2, "strategy": "raft"}
    given["settings"] = given.pop("settings", {}) | changes.pop("settings", {})
    return little_spec(home, out=str(out), **{**given, **changes})


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def done(home):
    return follow(spec_of(home, home / "done"))


@pytest.fixture(scope="module")
def many(home):
    """The documents that 2,000 questions show, at p = 0.7."""
    ROWS["raft"](home)
    found = load_documents(str(home / "documents.jsonl"), "raft", DataSpec(source="rows.jsonl"))
    recipe = RAFT(distractors=3, by="drawn")
    return [(i % len(found), recipe.shown(f"q {i}", i % len(found), found, None, 0, 0.7)) for i in range(2000)]


def test_raft_documents_are_read_as_the_rows_are_stored_where_they_are_a_table_of_text(tmp_path):
    (tmp_path / "d.csv").write_bytes("id;text\na;Žluť\n".encode("cp1250"))
    rows = DataSpec(source="rows.csv", delimiter=";", encoding="cp1250")
    assert load_documents(str(tmp_path / "d.csv"), "raft", rows).texts == ("Žluť",)
    write_lines(tmp_path / "d.jsonl", [{"text": "Žluť"}])
    assert load_documents(str(tmp_path / "d.jsonl"), "raft", rows).texts == ("Žluť",)


@pytest.mark.acid("raft", 1)
def test_raft_the_oracle_is_there_in_its_share_of_the_rows(many):
    there = sum(oracle in shown for oracle, shown in many)
    assert abs(there - 1400) < 4 * (2000 * 0.7 * 0.3) ** 0.5
    assert all(len(shown) == len(set(shown)) == 4 for _, shown in many)


@pytest.mark.acid("raft", 2)
def test_raft_the_oracle_is_never_among_its_own_distractors(home, done):
    found = load_documents(str(home / "documents.jsonl"), "raft", DataSpec(source="rows.jsonl"))
    texts = dict(zip(found.names, found.texts, strict=True))
    asked = lines(home / "asked.jsonl")
    rows = [*lines(done.path / "rows-answers.jsonl"), *lines(done.path / "rows-held.jsonl")]
    assert len(rows) == len(asked) and len(rows[0]["documents"]) == 3
    for row in rows:
        oracle = asked[int(row["from"].rpartition(":")[2]) - 1]["oracle"]
        beside = [name for i, name in enumerate(row["documents"], 1) if i != row["oracle"]]
        # The last document is a copy of the first under another name: it is no distractor of its own text.
        assert normalised(texts[oracle]) not in {normalised(texts[name]) for name in beside}
        assert not row["oracle"] or row["documents"][row["oracle"] - 1] == oracle
        assert all(f"Document {i}: {texts[name]}" in row["prompt"] for i, name in enumerate(row["documents"], 1))
    assert all(row["oracle"] for row in lines(done.path / "rows-held.jsonl"))
    assert {bool(row["oracle"]) for row in lines(done.path / "rows-answers.jsonl")} == {True, False}


@pytest.mark.acid("raft", 3)
def test_raft_what_is_quoted_stands_in_the_oracle(home, done, tmp_path):
    texts = {row["id"]: row["text"] for row in lines(home / "documents.jsonl")}
    asked = lines(home / "asked.jsonl")
    assert any(quotes_in(row["answer"], "") for row in asked)
    assert all(quote in texts[row["oracle"]] for row in asked for quote in quotes_in(row["answer"], ""))
    for answer, words in (
        ("##begin_quote##blue##end_quote##", r"bad.jsonl:1: field 'answer' quotes 'blue', which does not stand in"),
        ("##begin_quote##red", r"do not stand in pairs"),
    ):
        bad = [{"question": "who", "answer": answer, "oracle": "0"}, *asked[1:]]
        data = DataSpec(source=str(write_lines(tmp_path / "bad.jsonl", bad)), test_share=0.0)
        with pytest.raises(DataError, match=words):
            follow(spec_of(home, tmp_path / "out", data=data))
    assert not (tmp_path / "out").exists()


@pytest.mark.acid("raft", 4)
def test_raft_the_oracle_stands_at_every_place_alike(many):
    places = [shown.index(oracle) for oracle, shown in many if oracle in shown]
    counts, even = [places.count(i) for i in range(4)], len(places) / 4
    assert sum((n - even) ** 2 / even for n in counts) < 16.3  # chi-square of 3 degrees, p = 0.001


def test_raft_distractors_are_near_to_the_question_and_the_draw_is_named_by_the_seed(home):
    found = load_documents(str(home / "documents.jsonl"), "raft", DataSpec(source="rows.jsonl"))
    from luthier.data.retrieval import Words

    near, recipe = Words(found.texts), RAFT(distractors=2)
    asked = lines(home / "asked.jsonl")[3]["question"]
    oracle = found.names.index(lines(home / "asked.jsonl")[3]["oracle"])
    others = set(recipe.shown(asked, oracle, found, near, 0, 1.0)) - {oracle}
    scores = near.scores([asked])[0]
    out = found.alike(oracle)
    assert min(scores[n] for n in others) >= max(scores[n] for n in set(range(len(found))) - others - out)
    assert recipe.shown(asked, oracle, found, near, 0, 1.0) == recipe.shown(asked, oracle, found, near, 0, 1.0)
    orders = {tuple(recipe.shown(asked, oracle, found, near, seed, 1.0)) for seed in range(20)}
    assert len(orders) > 1


def test_raft_what_cannot_be_made_is_refused_before_anything_is_written(home, tmp_path):
    asked = lines(home / "asked.jsonl")
    strange = [{**asked[0], "oracle": "nowhere"}, *asked[1:]]
    empty = write_lines(tmp_path / "empty.jsonl", [{"text": "  "}])
    twice = write_lines(tmp_path / "twice.jsonl", [{"id": "a", "text": "red"}, {"id": "a", "text": "blue"}])
    other = write_lines(tmp_path / "other.jsonl", [{"words": "red"}])
    for words, error, changes in (
        ("needs documents: --set raft.documents=FILE", ConfigError, {"settings": {"raft.documents": None}}),
        ("share", ConfigError, {"settings": {"raft.share": 1.5}}),
        ("needs 42 documents or more", ConfigError, {"settings": {"raft.distractors": 40}}),
        ("no column 'gold'", DataError, {"settings": {"raft.oracle": "gold"}}),
        (r"empty.jsonl:1: field 'text' is '  '", DataError, {"settings": {"raft.documents": str(empty)}}),
        ("two documents have the id 'a'", DataError, {"settings": {"raft.documents": str(twice)}}),
        ("documents need a column 'text'", DataError, {"settings": {"raft.documents": str(other)}}),
        (
            r"strange.jsonl:1: field 'oracle' is 'nowhere', which is neither",
            DataError,
            {"data": DataSpec(source=str(write_lines(tmp_path / "strange.jsonl", strange)), test_share=0.0)},
        ),
        (
            "the rows have 'context' beside them, which would be lost",
            ConfigError,
            {
                "data": DataSpec(
                    source=str(write_lines(tmp_path / "more.jsonl", [{**a, "context": "x"} for a in asked]))
                )
            },
        ),
        ("and these are labelled", ConfigError, {"data": DataSpec(source=str(little_data(tmp_path / "rows.csv")))}),
    ):
        with pytest.raises(error, match=words):
            follow(spec_of(home, tmp_path / "out", **changes))
        assert not (tmp_path / "out").exists()
