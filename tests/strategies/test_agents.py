"""agent_sft and instruct_sft: traces of agents, and what `train` does with prompts and answers."""

import json
import shutil

import pytest
import torch
from little import little_model, little_spec
from recipe_rows import ROWS, write_lines
from word_tables import byte_tokenizer, table

from luthier.core import ConfigError, DataError
from luthier.data.traces import Action, Step, Trace, chat_of, read_trace, said
from luthier.runs import RunFolder
from luthier.runs.spec import DataSpec
from luthier.strategies.recipes.agent_sft import AgentSFT
from luthier.workflow import train
from luthier.workflow.agent_loop import act, writer_of
from luthier.workflow.prediction import Predictor
from luthier.workflow.recipes import follow
from luthier.workflow.resume_proof import run_digests

torch.set_num_threads(1)
CALLS = (
    "{% for m in messages %}{{ m.role + ':' + m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '<call>' + {'name': c.function.name, 'arguments': c.function.arguments} | tojson + '</call>' }}{% endfor %}"
    "{{ '</s>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
TRACE = Trace(
    "who wrote it ?",
    (
        Step(thought="look it up", action=Action("search", {"input": "Moby [Dick]"}), observation="a novel"),
        Step(action=Action("lookup", {"page": 3, "of": {"a": [1]}}), observation="Action: none\nof it"),
        Step(thought="two\nlines", answer="Melville"),
    ),
)


def read(steps, tools=None, **row):
    given = {"question": "who wrote it ?", "steps": steps, **row}
    return read_trace(given, "t.jsonl:4", question="question", steps="steps", tools=tools)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("agents")


def spec_of(home, out, name="agent_sft", **changes):
    given = {**ROWS[name](home), "method": "lora", "steps": 2, "strategy": name}
    given["settings"] = given.pop("settings", {}) | changes.pop("settings", {})
    return little_spec(home, out=str(out), **{**given, **changes})


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_trace_reads_back_from_its_text_and_from_its_steps():
    text = [said(step) + (f"\nObservation 1: {step.observation}" if step.action else "") for step in TRACE.steps]
    plain = Trace(TRACE.question, (TRACE.steps[0], TRACE.steps[2]))
    assert read("\n".join([text[0], text[2]])) == plain
    bare = read("Action: search[x]\nObservation: y\nAnswer: z")
    assert [(step.observation, step.answer) for step in bare.steps] == [("y", ""), ("", "z")]
    steps = [
        {"thought": "look it up", "action": "search[Moby [Dick]]", "observation": "a novel"},
        {
            "action": {"name": "lookup", "arguments": {"page": 3, "of": {"a": [1]}}},
            "observation": "Action: none\nof it",
        },
        {"thought": "two\nlines", "action": "Finish[Melville]"},
    ]
    assert read(steps) == read(json.dumps(steps)) == TRACE


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([{"thought": "hm"}], r"t.jsonl:4: field 'steps', step 1: neither an action nor an answer"),
        ([{"action": "serch[x]", "observation": "y"}, {"answer": "z"}], r"'serch' is not among.*search.*Did you mean"),
        ([{"action": "search[x]"}, {"answer": "z"}], r"step 1: the action 'search' has no observation"),
        ([{"answer": "z"}, {"answer": "z"}], r"step 1: an answer, and 1 more steps behind it"),
        ([{"action": "search[x]", "observation": "y"}], r"ends without an answer after step 1"),
        ([{"action": "search x", "observation": "y"}], r"step 1: the action 'search x' is not name\[arguments\]"),
        ([{"thoght": "x", "answer": "y"}], r"no field 'thoght' is read.*thought"),
        ([{"thought": "a\nAction: b[c]", "answer": "y"}], r"thought holds a line that begins as a heading"),
        ([{"action": {"arguments": {}}, "observation": "y"}], r"has no name"),
        ([{"action": "search[x]", "answer": "y"}], r"both an action and an answer"),
        ("well\nAnswer: z", r"'well' stands under no heading"),
        ("[{", r"begins as a list and is no JSON"),
        (7, r"is '7'; it must be a list of steps"),
        ([], r"has no step"),
        (["x"], r"step 1 is 'x'; it must have thought"),
        ([{"answer": 5}], r"step 1: answer is 5 \(int\), not text"),
    ],
)
def test_a_malformed_trace_is_refused_with_row_step_and_field(steps, words):
    with pytest.raises(DataError, match=words):
        read(steps, tools=[{"type": "function", "function": {"name": "search"}}])
    with pytest.raises(DataError, match=r"t.jsonl:4: field 'question' is ' '"):
        read(steps, question=" ")


@pytest.fixture(scope="module")
def done(home):
    return follow(spec_of(home, home / "done"))


@pytest.mark.acid("agent_sft", 1)
def test_agent_sft_observations_carry_no_loss(done):
    from luthier.data.encode import encode
    from luthier.data.encode_language import loss_view
    from luthier.data.rows import load_rows

    run, (rows, _) = Predictor(done.result), load_rows(str(done.path / "rows-traces.jsonl"))
    examples = encode(rows, run.columns, run.task, run.tokenizer, n_vocab=run._vocabulary(), max_length=200)
    for i, row in enumerate(rows.rows):
        said_by = {role: [m["content"] for m in row["messages"] if m["role"] == role] for role in ("user", "assistant")}
        assert len(said_by["user"]) == 2 and said_by["user"][1].startswith("Observation: red")
        learnt = [word for word, loss in loss_view(examples, i, run.tokenizer) if loss]
        wanted = [w for text in said_by["assistant"] for w in (*run.tokenizer.tokenize(text), run.tokenizer.eos_token)]
        assert learnt == wanted


@pytest.mark.acid("agent_sft", 2)
def test_agent_sft_a_tool_call_comes_back_out_of_the_template(home):
    model = home / "byte"
    shutil.copytree(little_model(home / "llama", "llama"), model)
    byte_tokenizer(chat_template=CALLS).save_pretrained(model)
    AgentSFT(form="calls").refuse_lost_calls(str(model), [(TRACE, "t.jsonl:4")])
    messages = chat_of(TRACE, form="calls", thoughts=False)
    assert [m["role"] for m in messages] == ["user", *["assistant", "tool"] * 2, "assistant"]
    assert messages[1]["content"] == "" and messages[-1]["content"] == "Melville"
    with pytest.raises(ConfigError, match=r"t.jsonl:4: the chat template .* Use agent_sft.form=react"):
        AgentSFT(form="calls").refuse_lost_calls(str(little_model(home / "llama")), [(TRACE, "t.jsonl:4")])
    with pytest.raises(ConfigError, match=r"Use agent_sft\.form=react"):
        follow(spec_of(home, home / "lost", settings={"agent_sft.form": "calls"}))
    assert not (home / "lost").exists()


@pytest.mark.acid("agent_sft", 3)
def test_agent_sft_what_is_learnt_met_the_threshold_and_the_others_are_counted(home, done):
    given = lines(home / "traces.jsonl")
    good = [f"{home}/traces.jsonl:{i}" for i, row in enumerate(given, 1) if row["reward"] >= 1]
    assert [row["from"] for row in lines(done.path / "rows-traces.jsonl")] == good and len(good) == 30
    told = {"traces": 40, "kept": 30, "left_out": 10, "least": 1.0, "general": 0}
    assert lines(done.path / "rows-made.jsonl") == [told]


@pytest.mark.acid("agent_sft", 4)
def test_agent_sft_the_runner_calls_registered_functions_alone_and_so_many_times_at_most():
    called, seen = [], []

    def writes(*texts):
        given = iter(texts)

        def write(messages):
            seen.append([m["content"] for m in messages])
            return next(given)

        return write

    tools = {"add": lambda text: called.append(text) or 5, "fail": lambda **given: 1 / 0}
    found = act(
        writes("Action: add[2 3]", "Action: os.system[ls]", 'Action: fail[{"a": 1}]', "Answer: 5"), "2 + 3 ?", tools
    )
    assert found.ended == "answer" and found.answer == "5" and called == ["2 3"]
    back = [step.observation for step in found.steps]
    assert back == ["5", "no tool 'os.system'; there are add, fail", "ZeroDivisionError: division by zero", ""]
    assert seen[1] == ["2 + 3 ?", "Action: add[2 3]", "Observation: 5"]
    found = act(lambda messages: "Action: add[1]", "?", tools, turns=3)
    assert found.ended == "turns" and len(found.steps) == 3 and len(called) == 4
    found = act(writes("Action: add[1]", "well"), "?", tools)
    assert found.ended == "unreadable" and "turn 2" in found.why and len(found.steps) == 1
    with pytest.raises(ConfigError, match="turns: got 0"):
        act(writes(), "?", tools, turns=0)


def test_a_finished_run_acts(done):
    found = act(writer_of(Predictor(done.result), max_new_tokens=4), "what is the sun", {}, turns=1)
    assert found.ended == "unreadable" and "turn 1" in found.why  # of random weights


def test_agent_sft_general_chats_are_mixed_in_as_a_share_and_thoughts_can_be_left_out(home, tmp_path):
    general = write_lines(tmp_path / "g.jsonl", [{"prompt": "how", "response": f"{w} far"} for w in "abcdefghijklm"])
    given = {"agent_sft.general": str(general), "agent_sft.general_share": 0.25, "agent_sft.thoughts": "drop"}
    done = follow(spec_of(home, tmp_path / "out", settings=given, seed=0))
    rows = lines(done.path / "rows-traces.jsonl")
    drawn = [row["from"] for row in rows if "g.jsonl" in row["from"]]
    assert len(rows) == 40 and len(drawn) == 10
    assert not any("Thought" in m["content"] for row in rows for m in row["messages"])
    recipe = AgentSFT(general=str(general), general_share=0.25)
    first, second = ([r["from"] for r in recipe.others(30, seed, DataSpec(source="traces.jsonl"))] for seed in (0, 1))
    assert first == drawn != second
    (tmp_path / "g.csv").write_bytes("prompt;response\nhow;Žluť\n".encode("cp1250"))
    stored = DataSpec(source="traces.csv", delimiter=";", encoding="cp1250")
    others = AgentSFT(general=str(tmp_path / "g.csv"), general_share=0.5).others(1, 0, stored)
    assert others[0]["messages"][-1]["content"] == "Žluť"


def test_agent_sft_what_cannot_be_learnt_is_refused_before_anything_is_written(home, tmp_path):
    few = write_lines(tmp_path / "few.jsonl", [{"prompt": "how", "response": "far"}])
    bad = write_lines(tmp_path / "bad.jsonl", [{"question": "a", "steps": [{"answer": "b"}], "reward": "well"}])
    (tmp_path / "tools.json").write_text("{}")
    for words, error, changes in (
        ("no column 'success'", DataError, {"settings": {"agent_sft.reward": "success"}}),
        ("no trace has a reward of 2 or more", DataError, {"settings": {"agent_sft.least": 2}}),
        (r"bad.jsonl:1: field 'reward' is 'well'", DataError, {"data": DataSpec(source=str(bad))}),
        ("asks for 120 general rows", ConfigError, {"settings": {"agent_sft.general": str(few)}}),
        ("must be a list of functions", ConfigError, {"settings": {"agent_sft.tools": str(tmp_path / "tools.json")}}),
        ("needs a decoder", ConfigError, {"model": str(little_model(home / "bert", "bert"))}),
    ):
        with pytest.raises(error, match=words):
            follow(spec_of(home, tmp_path / "out", **changes))
        assert not (tmp_path / "out").exists()


def test_instruct_sft_is_the_plain_run_by_name(home, tmp_path):
    named = follow(spec_of(home, tmp_path / "named", "instruct_sft", steps=1))
    plain = train(spec_of(home, tmp_path / "plain", "instruct_sft", steps=1, strategy=None))
    assert run_digests(named.result)["tuning"] == run_digests(plain.path)["tuning"]
    assert RunFolder.open(named.result, write=False).spec["strategy"] is None
    from recipe_rows import little_data

    labelled = DataSpec(source=str(little_data(tmp_path / "rows.csv")))
    with pytest.raises(ConfigError, match="rows of the kind labelled"):
        follow(spec_of(home, tmp_path / "out", "instruct_sft", data=labelled))


@pytest.mark.acid("instruct_sft", 3)
def test_instruct_sft_a_row_without_a_target_is_left_out_and_counted():
    from word_tables import word_tokenizer

    from luthier.data.columns import Columns
    from luthier.data.encode import encode
    from luthier.data.tasks import Task

    tokenizer, columns = word_tokenizer("gpt"), Columns(shape="answered", prompt="prompt", response="response")
    rows = table([{"prompt": "how far is it", "response": "red"}, {"prompt": "the " * 60, "response": "red"}])
    found = encode(
        rows, columns, Task(name="causal_lm"), tokenizer, n_vocab=len(tokenizer), max_length=30, accept_refused=0.5
    )
    assert found.rows.tolist() == [0] and found.n_targets.tolist() == [2]
    refused = [record for record in found.ledger if record["row"] == 1]
    assert "no target remains" in refused[0]["reason"]
