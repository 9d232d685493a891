"""self_instruct: tasks that a model writes, filters, and a ledger of what was asked."""

import json
from itertools import combinations

import pytest
import torch
from little import little_data, little_model, little_spec
from recipe_rows import ROWS, write_lines

from luthier.core import ConfigError, DataError, IntegrityError
from luthier.runs.spec import DataSpec
from luthier.strategies.recipes._written_tasks import (
    SeedTask,
    complaint,
    instances_in,
    labelled_in,
    rouge_l,
    tasks_in,
)
from luthier.strategies.recipes.self_instruct import SelfInstruct
from luthier.workflow.recipes import follow
from luthier.workflow.text_writer import TextWriter

torch.set_num_threads(1)
SEEDS = [
    SeedTask("Name the city of the sun", "", "Rome", "s:1", False),
    SeedTask("Say who wrote the book", "Moby Dick", "Melville", "s:2", False),
    SeedTask("Is the mood good or bad", "a red day", "good", "s:3", True),
    SeedTask("Count the moons of a planet", "Mars", "two", "s:4", False),
]


class Stub:
    """A writer whose answers are made of the number of the request; it remembers what it was asked."""

    digest = "stub"

    def __init__(self):
        self.asked = []

    def write(self, text, **given):
        self.asked.append((text, given["seed"]))
        if text.startswith("Come up"):
            n = len([t for t, _ in self.asked if t.startswith("Come up")])
            tasks = [f"Tell about ax{n} bx{n} cx{n}", "draw a picture of a red cat", "Say who wrote the book now"]
            return "\n".join(
                [f" {tasks[0]}", f"6. {tasks[1]}", f"7. {tasks[2]}", f"8. Say what part{n} y{n} z{n} weighs"]
            )
        if "classification" in text.splitlines()[0]:
            return " Yes" if "part" in text.splitlines()[-2] else " No"
        if text.endswith("Label:"):
            return " heavy\nInput: iron\nLabel: light\nInput: air\nLabel: heavy\nInput: lead\nLabel: light\nInput: air"
        return " none\nOutput: in the sea\nInput: a\nOutput: b\nInput: a\nOutput: c\nInput: d\nOutput:"

    def log_chance(self, text, answer):
        raise AssertionError


class Home:
    """A desk that keeps what is written."""

    def __init__(self):
        self.files, self.said = {}, []

    def write(self, name, rows):
        self.files[name] = list(rows)
        return name

    def say(self, line):
        self.said.append(line)


def made(seed=0, **settings):
    home, stub = Home(), Stub()
    recipe = SelfInstruct(**{"shown": 4, "wanted": 6, "requests": 10, **settings})
    return list(recipe.rows(home, stub, SEEDS, seed)), home, stub


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("written")


def spec_of(home, out, **changes):
    given = {**ROWS["self_instruct"](home), "method": "lora", "steps": 2, "strategy": "self_instruct"}
    tiny = {f"self_instruct.{k}": v for k, v in SelfInstruct.tiny.items()}
    given["settings"] = tiny | changes.pop("settings", {})
    return little_spec(home, out=str(out), **{**given, **changes})


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.acid("self_instruct", 1)
def test_self_instruct_no_two_tasks_are_too_much_alike():
    rows, home, _ = made()
    tasks = list(dict.fromkeys(row["prompt"] for row in rows))
    assert len(tasks) == 4 + 6
    assert all(rouge_l(a, b) <= 0.7 for a, b in combinations(tasks, 2) if not {a, b} <= {s.instruction for s in SEEDS})
    why = [one["because"] for one in home.files["left_out"]]
    assert any("holds 'draw'" in one for one in why) and any("too much alike" in one for one in why)
    assert "6 of 6 tasks were written" in home.said[0]


def test_rouge_l_is_that_of_the_library():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    for one, other in combinations(["a b c d e", "b c e a", "the red cat, the dog", "x", "dog the cat red the"], 2):
        assert rouge_l(one, other) == pytest.approx(scorer.score(one, other)["rougeL"].fmeasure)


@pytest.mark.acid("self_instruct", 2)
def test_self_instruct_a_writer_that_answers_alike_gives_the_same_rows():
    rows, _, stub = made()
    again, _, other = made()
    assert rows == again and stub.asked == other.asked
    elsewhere, _, third = made(seed=1)
    assert [t for t, _ in third.asked] != [t for t, _ in stub.asked], "another seed shows others"
    assert elsewhere[-1]["seed"] == 1


@pytest.mark.acid("self_instruct", 3)
def test_self_instruct_every_row_says_where_it_came_from():
    rows, home, _ = made()
    assert [row["from"] for row in rows[:4]] == ["s:1", "s:2", "s:3", "s:4"]
    for row in rows[4:]:
        assert row["writer"] == "stub" and row["seed"] == 0 and row["request"] >= 0 and len(row["shown"]) == 4
    assert any(not {s.instruction for s in SEEDS} >= set(row["shown"]) for row in rows[4:]), "written ones are shown"
    assert all(one["because"] and "request" in one for one in home.files["left_out"])


@pytest.mark.acid("self_instruct", 4)
def test_self_instruct_labels_that_come_first_have_as_many_inputs_each():
    rows, _, _ = made()
    of = [row for row in rows[4:] if row["prompt"] == "Say what part1 y1 z1 weighs"]
    assert [(row["label"], row["input"]) for row in of] == [("heavy", "iron"), ("light", "air")]
    other = [row for row in rows[4:] if "Tell" in row["prompt"]]
    assert other and all(row["label"] == "" and row["response"] == "in the sea" for row in other), "a stands with two"


@pytest.mark.acid("self_instruct", 5)
def test_self_instruct_a_resumed_recipe_asks_nothing_twice(home, tmp_path, monkeypatch):
    llama = str(little_model(home / "llama", "llama"))
    calls = []
    inner = TextWriter._written

    def counted(self, *given):
        found = inner(self, *given)
        calls.append(given)
        return found

    monkeypatch.setattr(TextWriter, "_written", counted)
    one = TextWriter(llama, tmp_path / "asked.jsonl")
    drawn = [one.write("how far is it", seed=s, max_new_tokens=5, temperature=1.0) for s in (1, 2, 3)]
    assert len(set(drawn)) > 1 and len(calls) == 3
    file = tmp_path / "asked.jsonl"
    file.write_bytes(file.read_bytes() + b'{"asked": "to')  # a stop tore the last line
    two = TextWriter(llama, file)
    assert [two.write("how far is it", seed=s, max_new_tokens=5, temperature=1.0) for s in (1, 2, 3)] == drawn
    assert len(calls) == 3 and "_model" not in vars(two), "no model is loaded for what is known"
    assert two.write("how far is it", seed=4, max_new_tokens=5, temperature=1.0) is not None and len(calls) == 4
    assert len(file.read_text().splitlines()) == 4
    two._once({"write": "lines"}, lambda: "one\u2028two\x85three")  # ends of lines to Python, not to a ledger
    assert TextWriter(llama, file)._once({"write": "lines"}, list) == "one\u2028two\x85three"
    file.write_text("[]\n")
    with pytest.raises(IntegrityError, match="cannot be read"):
        TextWriter(llama, file)
    calls.clear()
    done = follow(spec_of(home, tmp_path / "out"))
    n = len(calls)
    assert n >= 3 and len(lines(done.path / "asked.jsonl")) == n
    follow(done.path)
    assert len(calls) == n


def test_an_answer_is_scored_as_the_model_finds_it(home, tmp_path):
    from luthier.data.tasks import Task
    from luthier.workflow.load_model import find_model, load_model, load_tokenizer

    source = find_model(str(little_model(home / "llama", "llama")))
    asked = TextWriter(source.name, tmp_path / "asked.jsonl")
    model, _ = load_model(source, Task(name="causal_lm"), dtype=torch.float32, device=torch.device("cpu"), seed=0)
    ids = load_tokenizer(source)("how far is it")["input_ids"]
    with torch.inference_mode():
        chances = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    wanted = float(chances[1, ids[2]] + chances[2, ids[3]])
    assert asked.log_chance("how far", " is it") == (pytest.approx(wanted, abs=1e-5), 2)
    with pytest.raises(DataError, match="must have one at least"):
        asked.log_chance("how far", "")
    greedy = asked.write("how far", seed=0, max_new_tokens=6)
    assert asked.write("how far", seed=9, max_new_tokens=6) == greedy, "the likeliest needs no seed"
    if word := greedy.split()[-1:]:
        assert asked.write("how far", seed=0, max_new_tokens=6, stop=(word[0],)) == greedy.split(word[0])[0]


def test_what_a_writer_says_is_read():
    assert tasks_in(" one thing to do\n6. two more\n 7. \n8.three", 5) == ["one thing to do", "two more", "three"]
    assert [(i.input, i.output) for i in instances_in(" None\nOutput: x\nInput: y\nInput: z\nOutput: w")] == [
        ("", "x"),
        ("z", "w"),
    ]
    assert labelled_in("well") == [] == instances_in("well")
    for task, words in (
        ("Say it", "2 words"),
        ("Plot the course of a day", "'plot'"),
        ("Please go to the next town", "'go to'"),
        ("élan is what you need", "does not begin"),
        ("Write a program for the sum", "asks for a program"),
    ):
        assert words in complaint(task), task
    assert complaint("Name three rivers of Peru") is None


def test_self_instruct_what_cannot_begin_is_refused_before_anything_is_written(home, tmp_path):
    labelled = DataSpec(source=str(little_data(tmp_path / "rows.csv")))
    blank = write_lines(tmp_path / "blank.jsonl", [{"prompt": "who is it", "response": "  "}] * 4)
    for words, error, changes in (
        ("begins with seed tasks", ConfigError, {"data": labelled}),
        ("there are 37 seed tasks", ConfigError, {"settings": {"self_instruct.shown": 90}}),
        (r"blank.jsonl:1: a seed task needs words", DataError, {"data": DataSpec(source=str(blank), test_share=0.0)}),
        ("alike", ConfigError, {"settings": {"self_instruct.alike": 2.0}}),
    ):
        with pytest.raises(error, match=words):
            follow(spec_of(home, tmp_path / "out", **changes))
        assert not (tmp_path / "out").exists()
