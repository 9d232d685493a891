"""The examples, each run as a reader runs it: a process of its own, from another folder, without a network.

The processes are forks of one that has loaded the libraries, which takes longer than most examples.
"""

import ast
import os
import runpy
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from luthier.testing import Template

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SLOW = ("02_tune_a_chat_model.py", "10_compare_methods.py")  # a larger model; several runs

# What a reader should see, beside what the example itself asserts.
SHOWS = {
    "01_classify_a_csv.py": "Who wrote Moby Dick?  HUM",
    "02_tune_a_chat_model.py": "Berlin",
    "03_compose_two_methods.py": "refused: ",
    "04_a_method_of_your_own.py": "9,216 numbers trained",
    "05_your_own_loop.py": "it says HUM",
    "06_the_hugging_face_trainer.py": "lora, active, frozen",
    "07_resume_after_a_kill.py": "killed\nresumed and untouched: the same",
    "08_several_tunings_at_once.py": "rows of one batch",
    "09_merge_and_ship.py": "merged, saved and loaded by transformers alone",
    "10_compare_methods.py": "lora",
}


def test_every_example_is_listed_here_numbered_and_fits_on_a_screen_or_two() -> None:
    assert [p.name for p in EXAMPLES] == sorted(SHOWS)
    for number, path in enumerate(EXAMPLES, start=1):
        text = path.read_text(encoding="utf-8")
        assert path.name.startswith(f"{number:02}_")
        assert len(text.splitlines()) < 80
        assert ast.get_docstring(ast.parse(text)), f"{path.name}: begins with what it shows"


@pytest.fixture(scope="module")
def template() -> Iterator[Template]:
    with Template(("torch", "transformers", "luthier.workflow", "luthier.methods")) as made:
        yield made


def run_example(path: str, folder: str) -> None:
    """Runs in a fork."""
    os.chdir(folder)
    os.environ |= {"TMPDIR": folder, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src")}
    tempfile.tempdir = None
    sys.argv = [path]
    runpy.run_path(path, run_name="__main__")


@pytest.mark.samples
@pytest.mark.parametrize(
    "name", [pytest.param(p.name, marks=pytest.mark.slow) if p.name in SLOW else p.name for p in EXAMPLES]
)
def test_the_example_runs_and_shows_what_it_says(name: str, tmp_path: Path, template: Template) -> None:
    path = str(ROOT / "examples" / name)
    ran = template.run(__file__, "run_example", {"path": path, "folder": str(tmp_path)}, timeout_s=540)
    assert ran.status == 0, ran.output[-3000:]
    assert SHOWS[name] in ran.output
