"""instruct_uie: entities, relations and events as lines that read back."""

import json
import random

import pytest
import torch
from little import little_data, little_model, little_spec
from recipe_rows import ROWS, write_lines

from luthier.core import ConfigError, DataError
from luthier.data.extraction import NOTHING, Item, micro_f1, read_items, read_line, written
from luthier.data.rows import Table
from luthier.runs.spec import DataSpec
from luthier.strategies.recipes.instruct_uie import InstructUIE
from luthier.workflow.recipes import follow

torch.set_num_threads(1)
KINDS = ("ner", "relation", "event")
PIECES = ["Ada", "a;b", "c: d", "e, f", "(g", "h)", "\\", "\\n", "i\nj", ")(", "none", "é", ";", ":"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("uie")


def spec_of(home, out, **changes):
    given = {**ROWS["instruct_uie"](home), "method": "lora", "steps": 2, "strategy": "instruct_uie"}
    given["settings"] = {"instruct_uie.new_tokens": 4} | changes.pop("settings", {})
    return little_spec(home, out=str(out), **{**given, **changes})


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def drawn(kind, draw):
    """Items of any words, the signs of the format among them."""

    def words():
        return " ".join(draw.choices(PIECES, k=draw.randint(1, 3))).strip()

    arguments = tuple((words(), words()) for _ in range(draw.randint(0, 3))) if kind == "event" else ()
    return Item(f"t {words()}", tuple(words() for _ in range(2 if kind == "relation" else 1)), arguments)


@pytest.mark.acid("instruct_uie", 1)
@pytest.mark.parametrize("kind", KINDS)
def test_instruct_uie_what_is_written_reads_back_as_it_was(kind):
    draw = random.Random(kind)
    for _ in range(400):
        items = tuple(drawn(kind, draw) for _ in range(draw.randint(0, 4)))
        line = written(items, kind)
        assert "\n" not in line and read_line(line, kind).items == items, line
        assert not read_line(line, kind, strict=True).problems
    assert written((), kind) == NOTHING


@pytest.mark.acid("instruct_uie", 2)
def test_instruct_uie_every_span_stands_in_its_text_letter_for_letter(home, tmp_path):
    text, at = "Ada saw the old bridge", "rows:3: field 'items'"
    good = [{"type": "saw", "trigger": "saw", "arguments": [{"role": "what", "text": "old bridge"}]}]
    assert read_items(good, "event", text, at) == (Item("saw", ("saw",), (("what", "old bridge"),)),)
    for kind, items, words in (
        ("ner", [{"type": "person", "text": "ada"}], r"item 1: 'ada' does not stand in the text"),
        ("relation", [{"type": "saw", "head": "Ada", "tail": "bridges"}], r"'bridges' does not stand in the text"),
        (
            "event",
            [{"type": "saw", "trigger": "saw", "arguments": [{"role": "a", "text": "x"}]}],
            r"'x' does not stand",
        ),
        ("event", [{"type": "saw", "trigger": "saw", "arguments": ["x"]}], r"argument 1 is 'x'; it must have role"),
        ("ner", [{"type": "person", "txt": "Ada"}], r"no field 'txt' is read. Did you mean 'text'"),
        ("ner", [{"type": "", "text": "Ada"}], r"item 1: type is ''"),
        ("ner", [{"type": "none", "text": "Ada"}], r"stands for nothing found"),
        ("ner", "Ada", r"must be a list of objects"),
        ("ner", ["Ada"], r"item 1 is 'Ada'; it must have type, text"),
        ("relation", [{"type": "saw", "head": "Ada"}], r"tail is None"),
    ):
        with pytest.raises(DataError, match=rf"rows:3: field 'items'.*{words}"):
            read_items(items, kind, text, at)
    bad = write_lines(tmp_path / "bad.jsonl", [{"text": "sun", "items": [{"type": "a", "text": "moon"}]}])
    with pytest.raises(DataError, match=r"bad.jsonl:1: field 'items', item 1: 'moon' does not stand"):
        follow(spec_of(home, tmp_path / "out", data=DataSpec(source=str(bad), test_share=0.0)))
    assert not (tmp_path / "out").exists()


@pytest.mark.acid("instruct_uie", 3)
def test_instruct_uie_only_words_and_type_together_are_right():
    ada, paris = Item("person", ("Ada",)), Item("place", ("Paris",))
    assert micro_f1([[ada, paris]], [[ada, paris]], "ner")["micro_f1"] == 1
    found = micro_f1([[ada, paris], [ada]], [[Item("place", ("Ada",)), paris, paris], []], "ner")
    assert (found["right"], found["found"], found["wanted"]) == (1, 2, 3) and found["micro_f1"] == pytest.approx(0.4)
    assert micro_f1([[], []], [[], []], "ner")["micro_f1"] == 1 and micro_f1([[]], [[ada]], "ner")["micro_f1"] == 0
    assert micro_f1([[Item("saw", ("Ada", "Paris"))]], [[Item("saw", ("Paris", "Ada"))]], "relation")["right"] == 0
    hit = Item("hit", ("hit",), (("what", "wall"), ("who", "Ada")))
    part = micro_f1([[hit]], [[Item("hit", ("hit",), (("what", "wall"), ("by", "Ada")))]], "event")
    assert (part["right"], part["found"], part["wanted"]) == (2, 3, 3)


@pytest.mark.acid("instruct_uie", 4)
@pytest.mark.parametrize(
    ("kind", "line", "kept", "problems"),
    [
        ("ner", "person: Ada; well; place: Paris", 2, 1),
        ("ner", "person Ada", 0, 1),
        ("ner", "person: Ada;", 1, 1),
        ("ner", "person: Ada: Eve", 0, 1),
        ("ner", "(person: Ada", 0, 1),
        ("relation", "saw: Ada; saw: Ada, Paris", 1, 1),
        ("event", "saw: saw (what: bridge", 0, 1),
        ("event", "saw: saw", 0, 1),
        ("event", "saw: saw (bridge)", 0, 1),
        ("event", "saw: saw (what: bridge))", 0, 1),
        ("ner", "", 0, 1),
        ("ner", "none", 0, 0),
    ],
)
def test_instruct_uie_what_cannot_be_read_is_counted_and_no_error(kind, line, kept, problems):
    read = read_line(line, kind)
    assert (len(read.items), len(read.problems)) == (kept, problems)
    strict = read_line(line, kind, strict=True)
    assert strict.problems == read.problems and len(strict.items) == (kept if not problems else 0)


def test_instruct_uie_a_wrong_type_or_span_stays_as_a_wrong_answer_and_is_named():
    read = read_line("person: Ada; town: Rome", "ner", types=("person",), text="Ada", strict=True)
    assert len(read.items) == 2
    assert read.problems == ("the type 'town' was not asked for", "'Rome' does not stand in the text")


def test_instruct_uie_rows_ask_in_three_ways_and_held_out_rows_are_answered_and_scored(home):
    done = follow(spec_of(home, home / "done", steps=2, task="auto"))
    rows, held = lines(done.path / "rows-lines.jsonl"), lines(done.path / "rows-held.jsonl")
    assert {row["asks"] for row in rows} == {"ner", "spans", "types"} and {row["asks"] for row in held} == {"ner"}
    assert not {row["from"] for row in rows} & {row["from"] for row in held} and len(held) == 8
    assert all("Types: city, name." in row["prompt"] for row in [*rows, *held])
    spans = next(row for row in rows if row["asks"] == "spans")
    assert spans["response"] in spans["prompt"] and ":" not in spans["response"]
    found, scores = lines(done.path / "rows-found.jsonl"), lines(done.path / "rows-scores.jsonl")[0]
    assert len(found) == 8 and scores["rows"] == 8
    assert scores["wanted"] == sum(len(one["wanted"]) for one in found) > 0
    assert scores["rows_with_problems"] == sum(bool(one["problems"]) for one in found)


def test_instruct_uie_answers_are_scored_and_an_empty_one_is_no_none():
    class Both:  # a desk and a finished run
        def __init__(self):
            self.files, self.said = {}, []

        def write(self, name, rows):
            self.files[name] = rows

        def say(self, line):
            self.said.append(line)

        def written(self, rows, **_):
            return [(answer, True) for answer in ("name: Ada; city: Rome", "", "none", "name Ada")][: len(rows)]

    both, ada = Both(), Item("name", ("Ada",))
    held = Table([{"text": "Ada saw Paris"}] * 4, [f"r:{n}" for n in range(4)], "r")
    InstructUIE().score(both, both, held, [{"prompt": "p"}] * 4, [(ada,), (), (), (ada,)], ["name", "city"])
    [scores] = both.files["scores"]
    assert (scores["right"], scores["found"], scores["wanted"]) == (1, 2, 2) and scores["micro_f1"] == 0.5
    problems = [bool(one["problems"]) for one in both.files["found"]]
    assert problems == [True, True, False, True] and scores["rows_with_problems"] == 3
    assert "micro-F1 0.500" in both.said[0] and "3 answers with problems" in both.said[0]


def test_instruct_uie_what_cannot_be_learnt_is_refused_before_anything_is_written(home, tmp_path):
    for words, error, changes in (
        ("no column 'found'", DataError, {"settings": {"instruct_uie.items": "found"}}),
        ("leaves out 'name'", ConfigError, {"settings": {"instruct_uie.types": "city"}}),
        ("a model that writes", ConfigError, {"model": str(little_model(home / "bert", "bert"))}),
        ("no column 'items'", DataError, {"data": DataSpec(source=str(little_data(tmp_path / "rows.csv")))}),
        ("no field 'text' is read", DataError, {"settings": {"instruct_uie.kind": "relation"}}),
    ):
        with pytest.raises(error, match=words):
            follow(spec_of(home, tmp_path / "out", **changes))
        assert not (tmp_path / "out").exists()
