"""The options of `luthier train` are the fields of the spec and the settings of the method; nothing is listed twice."""

import dataclasses
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pytest
import typer
from cli.conftest import Call

from luthier.cli import _spec_options as options
from luthier.cli import train
from luthier.cli._main import _take_words_as_they_are
from luthier.cli._shelf import SHELF, STRATEGIES
from luthier.core import at_least
from luthier.runs.spec import TASKS, OptimSpec, RunSpec, Task
from luthier.runs.spec_changes import RESUME

# The names people use; a rule that would rename one of them is wrong.
USED = {
    "data.source": "data", "data.test": "test", "task": "task", "data.text": "text", "data.pair": "pair",
    "data.label": "label", "data.prompt": "prompt", "data.context": "context", "data.response": "response",
    "data.messages": "messages", "data.tokens": "tokens", "data.tags": "tags", "data.strict": "strict",
    "method": "method", "epochs": "epochs", "steps": "steps", "optim.lr": "lr", "batch.size": "batch", "seed": "seed",
    "max_length": "max-length", "precision": "precision", "device": "device", "threads": "threads", "out": "out",
    "data.test_share": "test-share",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class WiderOptim(OptimSpec):
    """A part of a spec with a field more."""

    warmth: Annotated[float, "how warm the optimiser is kept", at_least(0)] = 36.6


@dataclass(frozen=True, kw_only=True)
class Wider(RunSpec):
    """A spec with two fields more."""

    optim: Annotated[WiderOptim, "optimiser"] = WiderOptim()
    luck: Annotated[Literal["good", "bad"], "what the run hopes for"] = "good"


def made_by_typer(verb: Any) -> Any:
    app = typer.Typer(add_completion=False)
    app.command()(verb)
    made = typer.main.get_command(app)
    _take_words_as_they_are(made)
    return made


def asked(spec: type[RunSpec], monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    """The spec that `luthier train WORDS` would train with, had it the fields of `spec`."""
    taken: list[Any] = []
    monkeypatch.setattr("luthier.workflow.train", lambda made, listener: taken.append(made))
    monkeypatch.setattr("luthier.cli._progress.show_result", lambda result: None)
    from luthier.cli._output import Screen

    Screen.start(as_json=False)
    made_by_typer(train.command_for(words, spec))(args=list(words), standalone_mode=False)
    return taken[0]


def test_every_field_of_the_spec_is_one_option_under_a_name_of_its_own() -> None:
    every = options.spec_options(RunSpec)
    assert len({o.name for o in every}) == len(every)
    made = [o for o in every if o.gives is None]
    assert {o.field for o in made} == set(RESUME) - {"model", "settings", "chosen"}
    assert len({o.name for o in made}) == len(made)
    assert {o.field: o.name for o in made if o.field in USED} == USED
    assert {o.name: (o.field, o.gives) for o in every if o not in made} == {"skip-bad": ("data.accept_refused", 1.0)}
    assert all(o.help for o in made)


def test_a_new_field_of_the_spec_is_an_option_and_a_field_of_its_file_without_another_edit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    made_by_typer(train.command_for((), Wider))(args=["--help"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "--warmth" in shown and "how warm the optimiser is kept" in shown and "36.6" in shown
    assert "--luck" in shown and "good|bad" in shown
    spec = asked(Wider, monkeypatch, "m", "--data", "d.csv", "--warmth", "40", "--luck", "bad")
    assert spec.optim.warmth == 40.0 and spec.luck == "bad" and spec.optim.lr is None
    file = tmp_path / "spec.toml"
    file.write_text(spec.to_toml())
    assert 'luck = "bad"' in file.read_text()
    again = asked(Wider, monkeypatch, str(file), "--warmth", "41")
    assert again == dataclasses.replace(spec, optim=dataclasses.replace(spec.optim, warmth=41.0))


def test_a_field_that_ends_as_another_does_stands_with_its_part() -> None:
    names = {o.field: o.name for o in options.spec_options(RunSpec)}
    assert names["batch.tokens"] == "batch-tokens" and names["data.tokens"] == "tokens"

    @dataclass(frozen=True, kw_only=True)
    class Doubled(WiderOptim):
        patience: Annotated[int, "how long the optimiser waits"] = 1
        epochs: Annotated[int, "no name to take from the run"] = 1

    @dataclass(frozen=True, kw_only=True)
    class Run(RunSpec):
        optim: Annotated[Doubled, "optimiser"] = Doubled()

    names = {o.field: o.name for o in options.spec_options(Run)}
    assert names["optim.patience"] == "optim-patience" and names["eval.patience"] == "eval-patience"
    assert names["epochs"] == "epochs" and names["optim.epochs"] == "optim-epochs"


def test_tasks_are_written_once() -> None:
    assert get_args(Task) == TASKS


def test_words_become_the_values_that_the_fields_have(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--betas", "0.8,0.9", "--gradient-checkpointing", "true", "--no-fast", "--strict", "--text", "12"]
    spec = asked(RunSpec, monkeypatch, "m", "--data", "d.csv", *words)
    assert spec.optim.betas == (0.8, 0.9) and spec.gradient_checkpointing is True
    assert spec.fast is False and spec.data.strict is True and spec.data.text == "12"


def test_a_switch_gives_a_field_its_value_and_stands_alone(luthier: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(RunSpec, monkeypatch, "m", "--data", "d", "--skip-bad").data.accept_refused == 1.0
    assert asked(RunSpec, monkeypatch, "m", "--data", "d").data.accept_refused == 0.05
    answer = luthier("train", "m", "--data", "d", "--skip-bad", "--accept-refused", "0.5")
    assert answer.code == 2 and "--skip-bad" in answer.err and "--accept-refused" in answer.err


# --- settings of methods and strategies


@pytest.mark.parametrize("name", SHELF.names())
def test_the_settings_of_a_method_are_options_with_default_and_sentence(
    luthier: Call, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = luthier("train", "--method", name, "--help").out
    card = SHELF.card(name)
    for setting in card.settings:
        assert setting.name.replace("_", "-").replace(".", "-") in shown
        assert " ".join(setting.meaning.split()[:4]) in shown
    assert (f"Settings of {name}" in shown) == bool(card.settings)


def test_the_settings_of_a_strategy_stand_beside_the_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("m", "--data", "d.csv", "--method", "lora", "--strategy", "llrd", "--decay", "0.8", "--rank", "4")
    assert asked(RunSpec, monkeypatch, *words).settings == {"lora.rank": 4, "llrd.decay": 0.8}


def test_a_setting_that_is_also_a_field_of_the_run_stands_with_its_methods_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ("m", "--data", "d.csv", "--method", "adalora", "--warmup", "0.2", "--adalora-warmup", "0.3")
    spec = asked(RunSpec, monkeypatch, *words)
    assert spec.optim.warmup == 0.2 and spec.settings == {"warmup": 0.3}


def test_a_setting_may_be_given_either_way_and_not_both(luthier: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(RunSpec, monkeypatch, "m", "--data", "d", "--rank", "4").settings == {"rank": 4}
    assert asked(RunSpec, monkeypatch, "m", "--data", "d", "--set", "rank=4").settings == {"rank": 4}
    answer = luthier("train", "m", "--data", "d", "--rank", "4", "--set", "rank=5")
    assert answer.code == 2 and "4" in answer.err and "5" in answer.err and "twice" in answer.err


def test_a_misspelt_setting_is_answered_with_near_names(luthier: Call) -> None:
    answer = luthier("train", "m", "--data", "d", "--method", "dora", "--rnak", "4")
    assert answer.code == 2 and "--rank" in answer.err and "--method dora --help" in answer.err
    answer = luthier("train", "m", "--data", "d", "--strategy", "lrd")
    assert answer.code == 2 and "'llrd'" in answer.err and "luthier strategies" in answer.err


def test_strategies_are_listed_and_have_pages(luthier: Call) -> None:
    listed = luthier("strategies").out
    assert all(name in listed for name in STRATEGIES.names())
    for name in STRATEGIES.names():
        page = luthier("strategies", name)
        assert page.code == 0 and STRATEGIES.card(name).page in page.out
    facts = {one["name"]: one for one in luthier("strategies", "--json").json["strategies"]}
    assert facts["freelb"]["settings"] and (facts["freelb"]["kind"], facts["freelb"]["passes"]) == ("strategy", 2.0)
    assert (facts["mezo"]["passes"], facts["mezo"]["forwards"]) == (0.0, 2.0)
    assert facts["replay"]["needs"]["rows"] == ["old"] and facts["pet"]["kind"] == "recipe"


def test_the_command_that_a_strategys_page_ends_on_names_what_it_needs(luthier: Call) -> None:
    assert luthier("strategies", "replay").out.rstrip().endswith("--strategy replay --also old=FILE")
    assert luthier("strategies", "kd_logits").out.rstrip().endswith("--strategy kd_logits --set kd_logits.teacher=RUN")


# --- completion


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("luthier train --method lo", "lora"),
        ("luthier train --method lora+pro", "lora+prompt_tuning"),
        ("luthier train m --method adalora --targ", "--target-rank"),
        ("luthier train m --method adalora --set targ", "target_rank="),
        ("luthier train m --data samp", "sample:trec6"),
        ("luthier train samp", "sample:minilm-l6"),
        ("luthier train m --precision b", "bf16"),
        ("luthier methods adal", "adalora"),
        ("luthier pred", "predict"),
    ],
)
def test_the_shell_completes_what_there_is(line: str, expected: str) -> None:
    words = {"_LUTHIER_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    done = subprocess.run(
        [sys.executable, "-m", "luthier"], env=os.environ | words, capture_output=True, text=True, check=False
    )
    assert expected in done.stdout.split(), done
