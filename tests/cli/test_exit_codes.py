"""Every exit code of docs/exit-codes.md comes out of `python -m luthier`, each in a process of its own."""

import json
import os
import re
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from little import at_call, little_spec

from luthier.runs import RunFolder, checkpoints
from luthier.runs.spec import CheckpointSpec, RunSpec
from luthier.testing import Template
from luthier.training.loop import Loop
from luthier.training.objective import Objective
from luthier.workflow import resume, train

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("little")


@pytest.fixture(scope="module")
def template() -> Iterator[Template]:
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT / "tests")
    try:
        with Template(("torch", "little", "luthier.training", "luthier.methods")) as made:
            yield made
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


# --- in the child


def refuse_memory(patch: pytest.MonkeyPatch) -> None:
    def call(self: Objective, batch: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    patch.setattr(Objective, "__call__", call)


def give_nan(patch: pytest.MonkeyPatch) -> None:
    inner = Loop._loss
    patch.setattr(Loop, "_loss", lambda self, *given: inner(self, *given) * torch.nan)


def compute_wrongly(patch: pytest.MonkeyPatch) -> None:
    inner, calls = Loop._loss, [0]

    def loss(self: Loop, *given: Any) -> Any:
        calls[0] += 1
        return inner(self, *given) * (1 + 1e-6 * calls[0])

    patch.setattr(Loop, "_loss", loss)


def break_us(patch: pytest.MonkeyPatch) -> None:
    def load(self: Loop, *given: Any) -> None:
        raise AttributeError("the wheel came off")

    patch.setattr(Loop, "_loss", load)


def send(number: int) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: void(at_call(patch, Loop, "_loss", 8, lambda: os.kill(os.getpid(), number)))


def void(_: object) -> None:
    return None


DISTURBANCES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "": void, "memory": refuse_memory, "nan": give_nan, "wrong": compute_wrongly, "bug": break_us,
    "SIGINT": send(signal.SIGINT), "SIGTERM": send(signal.SIGTERM), "SIGHUP": send(signal.SIGHUP),
    "SIGUSR1": send(signal.SIGUSR1),
}  # fmt: skip


def command(words: list[str], disturbance: str) -> None:
    """`python -m luthier WORDS`; ends the process as the command does."""
    DISTURBANCES[disturbance](pytest.MonkeyPatch())
    sys.argv = ["luthier", *words]
    code: Any = 0
    try:
        runpy.run_module("luthier", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


# --- what may go wrong


def written(spec: RunSpec) -> str:
    path = Path(str(spec.out)).with_suffix(".toml")
    path.write_text(spec.to_toml())
    return str(path)


def training(home: Path, here: Path, **changes: Any) -> list[str]:
    spec = little_spec(home, out=str(here / "run"), **changes)
    return ["train", written(spec), "--out", str(here / "run")]


def stopped(home: Path, here: Path, **changes: Any) -> Path:
    spec = little_spec(home, out=str(here / "run"), steps=6, checkpoint=CheckpointSpec(every_steps=2), **changes)
    train(spec, stop_at=4)
    return here / "run"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def bad_spec(home: Path, here: Path, old: str, new: str) -> list[str]:
    words = training(home, here)
    text = Path(words[1]).read_text()
    assert old in text
    Path(words[1]).write_text(text.replace(old, new))
    return words


def damaged_checkpoints(home: Path, here: Path) -> list[str]:
    run = stopped(home, here)
    for path in checkpoints(RunFolder.open(run, write=False)):
        flip(path / "adapter.safetensors")
    return ["resume", str(run)]


def damaged_tuning(home: Path, here: Path) -> list[str]:
    run = stopped(home, here)
    resume(run)
    flip(run / "tuning" / "tuning.safetensors")
    return ["predict", str(run), "--text", "what is the moon"]


def other_rows(home: Path, here: Path) -> list[str]:
    data = here / "rows.csv"
    spec = little_spec(here, out=str(here / "run"))
    train(spec, stop_at=2)
    data.write_text(data.read_text() + "what is the moon bad,bad\n")
    return ["resume", str(here / "run")]


def a_gate(home: Path, here: Path) -> list[str]:
    train(little_spec(home, kind="llama", out=str(here / "run"), steps=2))
    (here / "prompts.txt").write_text("what is the moon\n")
    return ["safety-audit", str(here / "run"), "--prompts", str(here / "prompts.txt"), "--most-kl", "0"]


def no_rows(home: Path, here: Path) -> list[str]:
    words = training(home, here)
    return [*words, "--data", str(here / "nowhere.csv")]


def no_model(home: Path, here: Path) -> list[str]:
    return ["train", str(here / "nowhere"), "--data", str(home / "rows.csv"), "--out", str(here / "run")]


@dataclass(frozen=True)
class Case:
    """A command, what disturbs it, and how it must end."""

    code: int
    words: Callable[[Path, Path], list[str]]
    says: tuple[str, ...] = ()
    disturbance: str = ""
    fault: str = ""


CASES = {
    "done": Case(0, lambda home, here: training(home, here, steps=3)),
    "a list": Case(0, lambda home, here: ["methods"]),
    "a bug": Case(1, training, ("AttributeError", "the wheel came off", "bug in luthier"), "bug"),
    "no such command": Case(2, lambda home, here: ["trian"], ("'trian'", "'train'")),
    "no such option": Case(2, lambda home, here: ["train", "x", "--metod", "lora"], ("--metod",)),
    "an unknown field": Case(
        2, lambda home, here: bad_spec(home, here, "steps = 12", "stepz = 12"), ("stepz", "steps")
    ),
    "a value out of range": Case(
        2, lambda home, here: bad_spec(home, here, "lr = 0.003", "lr = -1.0"), ("lr", "above 0")
    ),
    "no TOML": Case(2, lambda home, here: bad_spec(home, here, "steps = 12", "steps = = 12"), ("not valid TOML",)),
    "no spec file": Case(2, lambda home, here: ["train", str(here / "none.toml")], ("none.toml", "cannot be read")),
    "no run": Case(2, lambda home, here: ["resume", str(here)], ("run.json",)),
    "another seed on resume": Case(
        2, lambda home, here: ["resume", str(stopped(home, here)), "--set", "seed=5"], ("seed", "must keep")
    ),
    "no rows": Case(3, no_rows, ("nowhere.csv",)),
    "no model": Case(3, no_model, ("nowhere",)),
    "damaged checkpoints": Case(4, damaged_checkpoints, ("none of the", "verifies")),
    "a damaged tuning": Case(4, damaged_tuning, ("tuning.safetensors",)),
    "other rows on resume": Case(4, other_rows, ("data changed", "--accept-drift data")),
    "out of memory": Case(5, training, ("does not fit in memory", "max_length"), "memory"),
    "a full disk": Case(5, training, ("no space left",), fault="save:3:enospc"),
    "diverged": Case(6, training, ("again after going back", "last good checkpoint stays"), "nan"),
    "a gate": Case(7, a_gate, ("the tuning made it worse", "nats a token")),
    "wrong arithmetic": Case(17, lambda home, here: training(home, here, recheck=1), ("computed twice",), "wrong"),
    "SIGHUP": Case(129, training, ("luthier resume",), "SIGHUP"),
    "SIGINT": Case(130, training, ("luthier resume",), "SIGINT"),
    "SIGUSR1": Case(138, training, ("luthier resume",), "SIGUSR1"),
    "SIGTERM": Case(143, training, ("luthier resume",), "SIGTERM"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_command_ends_with_its_code_and_says_why(name: str, template: Template, home: Path, tmp_path: Path) -> None:
    case = CASES[name]
    words = case.words(home, tmp_path)
    given = {"words": words, "disturbance": case.disturbance}
    outcome = template.run(__file__, "command", given, fault=case.fault)
    assert outcome.status == case.code, outcome.output
    assert all(word in outcome.output for word in case.says), outcome.output
    assert ("Traceback" in outcome.output) == (case.code == 1)
    if case.code > 128 or case.code in (6, 17):  # the last good checkpoint is there to go on from
        resume(tmp_path / "run", changed={"steps": 9})


def test_a_run_that_another_process_holds_ends_with_5_and_its_number(
    template: Template, home: Path, tmp_path: Path
) -> None:
    run = stopped(home, tmp_path)
    with RunFolder.open(run):
        outcome = template.run(__file__, "command", {"words": ["resume", str(run)], "disturbance": ""})
    assert outcome.status == 5
    assert f"process {os.getpid()} on this host" in outcome.output


@pytest.mark.parametrize("name", ["a value out of range", "no rows", "damaged checkpoints", "diverged", "SIGTERM"])
def test_with_json_the_code_stands_in_the_one_object_too(
    name: str, template: Template, home: Path, tmp_path: Path
) -> None:
    case = CASES[name]
    given = {"words": [*case.words(home, tmp_path), "--json"], "disturbance": case.disturbance}
    outcome = template.run(__file__, "command", given, fault=case.fault)
    assert outcome.status == case.code
    (line,) = [line for line in outcome.output.splitlines() if line.startswith("{")]
    error = json.loads(line)["error"]
    assert error["exit_code"] == case.code and error["type"]


def test_every_code_on_the_page_is_tried_here() -> None:
    page = (ROOT / "docs" / "exit-codes.md").read_text(encoding="utf-8")
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    assert codes == {case.code for case in CASES.values()}
