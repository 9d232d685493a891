"""`luthier ask` as a user calls it, with a model of some hundred words."""

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
from cli.conftest import Call
from little import little_model


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("asking")


@pytest.fixture(scope="module")
def llama(home: Path) -> Path:
    return little_model(home / "llama", "llama", max_position_embeddings=96)


@pytest.fixture(scope="module")
def rows(home: Path) -> Path:
    """60 rows of three labels."""
    draw = random.Random(0)
    with (home / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for n in range(60):
            words = [draw.choice(["how", "far", "is", "the", "moon", "sun", "who", "when"]) for _ in range(6)]
            writer.writerow([" ".join([*words, str(n)]), ["city", "name", "cat"][n % 3]])
    return home / "rows.csv"


def asks(luthier: Call, *words: object) -> Any:
    return luthier("ask", *words, "--json").json


def test_several_ways_are_compared_on_the_same_rows(luthier: Call, llama: Path, rows: Path) -> None:
    ways = "icl,contextual_calibration,pmi_dc:k=0,icl_retrieval"
    found = asks(luthier, llama, "--data", rows, "--strategy", ways, "--set", "k=2", "--out", "a.jsonl", "--seeds", 2)
    assert {s["name"] for s in found["standings"]} == set(ways.split(",")) and len(found["pairs"]) == 6
    lines = [json.loads(line) for line in Path("a.jsonl").read_text().splitlines()]
    assert len(lines) == 4 * 2 * found["rows"]
    for way in ways.split(","):
        own = [line for line in lines if line["way"] == way]
        score = sum(line["answer"] == line["wanted"] for line in own) / len(own)
        [standing] = [s for s in found["standings"] if s["name"] == way]
        assert standing["score"] == pytest.approx(score) and standing["low"] <= score <= standing["high"]
        assert {line["place"] for line in own} == {line["place"] for line in lines}
        assert standing["read"] > standing["computed"] > 0 or way in ("pmi_dc:k=0", "icl_retrieval")
    first = {line["seed"]: line["prompts"] for line in lines if line["way"] == "icl" and line["row"] == 0}
    assert first[0] != first[1], "another seed shows other rows"
    assert len(lines[0]["prompts"][0]) == 16 and set(lines[0]["shares"]) == {"cat", "city", "name"}
    again = luthier("ask", llama, "--data", rows, "--strategy", "icl", "--out", "a.jsonl")
    assert again.code == 2 and "is there already" in again.err


def test_the_rows_are_those_that_runs_hold_out_and_a_guess_stands_beside(
    luthier: Call, llama: Path, rows: Path
) -> None:
    from luthier.data.load_data import load_data
    from luthier.runs.spec import DataSpec

    shown = luthier("ask", llama, "--data", rows, "--strategy", "icl", "--set", "k=0", "--show", "2")
    held = load_data(DataSpec(source=str(rows))).test
    assert held is not None and f"on {len(held)} rows" in shown.out
    assert f"Text: {held.rows[0]['text']}\nAnswer:" in shown.out and f"Text: {held.rows[1]['text']}" in shown.out
    assert f"Text: {held.rows[2]['text']}" not in shown.out
    assert "No result: " in shown.out and "always answering" in shown.out
    assert "always 'c" in shown.out


def test_a_model_that_knows_is_told_apart_from_the_guess() -> None:
    from asking.stub import Stub, asked, desk, shown

    from luthier.asking import WAYS
    from luthier.asking.engine import Of
    from luthier.asking.machine import Cost
    from luthier.asking.scoring import judged

    words = {"N": "number", "P": "place"}
    knows = Stub(lambda prompt, option: 0.0 if ("how" in prompt) == (option == " number") else -2.0)
    texts = [f"{'how' if i % 2 else 'where'} {i} {'x' * i}" for i in range(40)]
    told = asked(WAYS.get("icl")(k=0), texts, desk([shown("a", "P")], words), knows)
    run = Of(name="icl", seed=0, told=tuple(told), cost=Cost())
    found = judged(
        ["icl"], [run], ["N" if "how" in t else "P" for t in texts], texts, labels=("N", "P"), common="P",
        metric="accuracy", seeds=[0],
    )  # fmt: skip
    assert found.standings[0].score == 1 and found.guess_score == 0.5 and found.standings[0].above_guess[1] > 0.2
    assert not any(line.startswith("No result") for line in found.findings)


WRONG = [
    ("--strategy icll", 2, "No way is called 'icll'", "'icl'"),
    ("--strategy llrd", 2, "llrd: is a way of learning", "icl_retrieval"),
    ("--strategy icl --set kk=3", 2, "icl has no setting 'kk'", "'k'"),
    ("--strategy icl --set pmi_dc.k=3", 2, "'pmi_dc' is none of the ways", "They are icl"),
    ("--strategy icl --set k=-1", 2, "-1", "at least 0"),
    ("--strategy icl:k", 2, "'k' is no setting", "icl:k=4"),
    ("--strategy icl,icl", 2, "icl is named twice", "icl:NAME=VALUE"),
    ("", 2, "no way of asking", "--strategy icl"),
    ("--strategy icl --metric acuracy", 2, "'acuracy'", "'accuracy'"),
    ("--strategy icl --set k=20", 2, "20 shots do not fit", "--set icl.k="),
    ("--strategy icl --set k=4000", 2, "4000 shots, and there are", "--set icl.k=48"),
    ("--strategy icl --template {text}", 2, "must end with {label}", "Answer: {label}"),
    ("--strategy icl --template {txt}{label}", 2, "{txt}", "{text}"),
    ("--strategy icl --words city=a", 2, "no word for", "cat=great"),
    ("--strategy icl --words city=a,name=a,cat=b", 2, "two labels have the word 'a'", "another"),
    ("--strategy icl --out a.csv", 2, "a.csv", ".jsonl"),
    ("--strategy icl_retrieval --set by=nomodel", 3, "nomodel", "no such model folder"),
]


@pytest.mark.parametrize(("words", "code", "what", "todo"), WRONG, ids=[w[0] or "none" for w in WRONG])
def test_wrong_inputs_say_what_and_what_to_do(
    luthier: Call, llama: Path, rows: Path, words: str, code: int, what: str, todo: str
) -> None:
    answer = luthier("ask", llama, "--data", rows, *words.split())
    assert answer.code == code, answer
    assert what in answer.err and todo in answer.err, answer.err
    assert "Traceback" not in answer.err and not list(Path().iterdir())


def test_models_and_rows_that_cannot_be_asked_are_refused(luthier: Call, home: Path, llama: Path, rows: Path) -> None:
    encoder = luthier("ask", little_model(home / "bert", "bert"), "--data", rows, "--strategy", "icl")
    assert encoder.code == 3 and "is an encoder" in encoder.err
    bare = home / "bare.csv"
    bare.write_text("text\n" + "\n".join(f"how far is {n}" for n in range(20)))
    unlabelled = luthier("ask", llama, "--data", bare, "--strategy", "icl")
    assert unlabelled.code == 3 and "--label" in unlabelled.err
    empty = home / "empty.csv"
    empty.write_text("text,label\n" + "\n".join(f"{'' if n % 3 == 0 else f'how {n}'},{'ab'[n % 2]}" for n in range(40)))
    said = luthier("ask", llama, "--data", empty, "--strategy", "icl")
    assert said.code == 3 and "empty.csv:2" in said.err, said.err


def test_labels_that_begin_with_one_token_are_told_apart(llama: Path) -> None:
    from luthier.asking.models import open_model
    from luthier.asking.way import Score

    on = open_model(str(llama), device="cpu", precision="fp32")
    [whole] = on.score([Score(prompt="how far is", options=(" red cat", " red dog", " red"))])
    assert len(set(whole.chances)) == 3 and whole.chances[2] > max(whole.chances[:2])


def test_ways_are_listed_with_strategies_and_have_pages(luthier: Call) -> None:
    from luthier.asking import WAYS
    from luthier.cli._shelf import WAYS as LISTED

    facts = {one["name"]: one for one in luthier("strategies", "--json").json["strategies"]}
    assert {n for n, one in facts.items() if one["kind"] == "asking"} == set(WAYS.names()) == set(LISTED.names())
    assert facts["icl"]["passes"] is None and facts["icl"]["paper"] == "arXiv:2005.14165"
    listed = luthier("strategies", "--family", "asking").out
    assert all(name in listed for name in WAYS.names()) and "llrd" not in listed
    assert "luthier ask sample:smollm2-135m" in luthier("strategies", "icl").out


@pytest.mark.parametrize("name", __import__("luthier.asking").asking.WAYS.ours())
def test_a_ways_page_has_its_parts(name: str) -> None:
    from luthier.asking import WAYS

    card = WAYS.card(name)
    lines = card.page.splitlines()
    assert card.name == name == Path(card.path).stem and card.family == "asking"
    assert lines[0].endswith(".") and len(lines[0]) <= 120 and any(line.startswith("    ") for line in lines)
    for part in ("Paper:", "Cost:", "Claims:", "Pitfalls:"):
        assert any(line.startswith(part) for line in lines), part
    assert card.paper in card.page and all(s.meaning for s in card.settings)
    assert WAYS.get(name).scores or WAYS.get(name).writes
    others = [line for line in Path(card.path).read_text().splitlines() if "luthier.asking.ways" in line]
    assert not others, "a way imports no other way"


def test_what_a_machine_keeps_is_dropped_also_where_asking_fails(rows: Path) -> None:
    from asking.stub import Stub

    from luthier.asking import WAYS
    from luthier.asking.ask import AskSpec, ask
    from luthier.core import ModelError
    from luthier.runs.spec import DataSpec

    class Failing(Stub):
        dropped = 0

        def forget(self) -> None:
            self.dropped += 1

        def score(self, requests: Any) -> Any:
            raise ModelError("gives no number")

    machine = Failing()
    with pytest.raises(ModelError, match="gives no number"):
        ask(machine, {"icl": WAYS.get("icl")(k=0)}, AskSpec(data=DataSpec(source=str(rows))))
    assert machine.dropped == 2, "before the way, and after it"
