"""The command that each strategy's page ends on fits the strategy: model, rows and options."""

import re
import shlex
from dataclasses import fields, replace

import pytest

from luthier.asking import WAYS
from luthier.cli._shelf import STRATEGIES as SHELF
from luthier.cli._shelf import WAYS as ASKING
from luthier.cli.strategies import tried
from luthier.core import ConfigError, LuthierError
from luthier.data.columns import Columns
from luthier.data.rows import Table
from luthier.data.tasks import Task
from luthier.runs.spec import DataSpec, RunSpec
from luthier.samples import SAMPLES
from luthier.training import STRATEGIES
from luthier.training.recipe import Recipe, plan_of

LABELS = Task(name="classification", labels=("bad", "good"))
SHAPES = {
    "sample:trec6": Columns(shape="labelled", text="text", label="label"),
    "PAIRS.jsonl": Columns(shape="preferred", prompt="prompt", chosen="chosen", rejected="rejected"),
}
ANSWERED = Columns(shape="answered", prompt="prompt", response="response")
UNFIT = re.compile(r"decoder|of the kind|model that writes|model of|reads alone|these rows? (are|have)|these are")


class Reached(Exception):
    """More was asked of the desk than of what kind model and rows are."""


class Desk:
    """Knows the kind of a model and of rows; and nothing else."""

    def __init__(self, kind: str, columns: Columns) -> None:
        self.kind, self._columns = kind, columns

    def rows(self):
        return Table([], [], "rows"), None, self._columns

    def __getattr__(self, name):
        raise Reached(name)


def kind_of(model: str) -> str:
    """What a sample is; a MODEL that the reader has to make is taken for what the page wants."""
    what = next((one.title for one in SAMPLES.values() if f"sample:{one.name}" == model), "decoder")
    return "decoder" if "decoder" in what else "encoder"


def parted(line: str) -> tuple[str, str, dict[str, str]]:
    """Model, rows, and settings of a command."""
    words = shlex.split(line)
    given = dict(words[k + 1].split("=", 1) for k, word in enumerate(words) if word == "--set")
    return words[2], words[words.index("--data") + 1], {k.rpartition(".")[2]: v for k, v in given.items()}


def refusal(name: str, model: str, rows: str, given: dict[str, str]) -> str:
    """Why a recipe cannot begin with a model and rows of these kinds; empty where it can."""
    spec = RunSpec(
        model=model, data=DataSpec(source=rows), strategy=name, method="lora",
        settings={f"{name}.{k}": v for k, v in given.items() if k != "patterns"},
    )  # fmt: skip
    also = tuple(f"{wanted}=FILE" for wanted in STRATEGIES.get(name).sets)
    plan = plan_of(replace(spec, also=also or None), ())
    try:
        next(plan.recipe.phases(plan, Desk(kind_of(model), SHAPES.get(rows, ANSWERED))))
    except ConfigError as error:
        return str(error) if UNFIT.search(str(error)) else ""
    except (LuthierError, Reached, OSError):
        return ""
    return ""


@pytest.mark.parametrize("name", STRATEGIES.names())
def test_the_example_of_a_strategy_names_a_model_and_rows_that_it_can_learn_from(name):
    cls = STRATEGIES.get(name)
    model, rows, given = parted(tried(SHELF.card(name)))
    assert cls.example == SHELF.card(name).facts.get("example", ""), "the listing reads what the class says"
    assert set(given) <= {field.name for field in fields(cls)}
    if issubclass(cls, Recipe):
        assert refusal(name, model, rows, given) == ""
        return
    one = cls(**dict.fromkeys(cls.roles, "a model"))
    labelled = rows == "sample:trec6"
    writes = cls.learns or bool(one.suits(LABELS))
    assert not (labelled and writes), f"{name} learns no labels"
    if writes or cls.tiny_kind.startswith("llama"):
        assert kind_of(model) == "decoder"
    line = tried(SHELF.card(name))
    assert ("--template" in line) == cls.tiny_kind.endswith("-gap")
    assert all(f"--also {wanted}" in line for wanted in cls.sets if wanted != "*")


@pytest.mark.parametrize(
    "name",
    ["agent_sft", "cai", "instruct_sft", "instruct_uie", "kd_sequence", "ra_dit", "raft", "rlaif", "self_instruct",
     "self_rag", "task_mixture"],
)  # fmt: skip
def test_an_encoder_and_labelled_texts_are_found_not_to_fit(name):
    _, _, given = parted(tried(SHELF.card(name)))
    assert refusal(name, "sample:minilm-l6", "sample:trec6", given)


def test_the_example_of_a_way_of_asking_is_one_line_that_a_shell_reads():
    for name in WAYS.names():
        line = tried(ASKING.card(name))
        model, _, given = parted(line)
        assert shlex.split(line)[:2] == ["luthier", "ask"] and kind_of(model) == "decoder"
        assert set(given) <= {field.name for field in fields(WAYS.get(name))}
    assert "--set 'plan=" in tried(ASKING.card("got")), "blanks and semicolons are quoted"
    assert "sample:trec6" not in tried(ASKING.card("sot")), "it refuses labels"
