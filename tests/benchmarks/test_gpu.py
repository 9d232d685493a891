"""`make gpu` on a CPU, at tiny sizes: every part runs, and one that fails is told and does not lose the others."""

import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import page
from benchmarks.gpu.__main__ import Part, main, planned, run, unequal
from benchmarks.gpu.part import CONTESTANTS, absent

ROOT = Path(__file__).parents[2]


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("tiny", [True, False])
def test_every_part_has_a_name_of_its_own_and_a_function_that_takes_its_arguments(tiny, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "contracts"))
    parts = planned(tiny, "cuda")
    assert len({part.name for part in parts}) == len(parts)
    for part in parts:
        function = getattr(importlib.import_module(f"benchmarks.gpu.{part.module}"), part.function)
        inspect.signature(function).bind(lambda name, facts: None, **part.arguments)
    sizes = [part.arguments.get("size") for part in parts if part.kind == "speed"]
    assert set(sizes) == ({"tiny"} if tiny else {"1b", "8b"})


def test_contestants_take_turns_and_second_turns_come_last():
    names = [part.name for part in planned(False, "cuda") if part.kind == "speed"]
    assert names == [f"{size}, {who}, {turn}" for turn in (1, 2) for size in ("1b", "8b") for who in CONTESTANTS]


def test_the_checks_of_a_method_pass_on_the_cpu_and_the_page_counts_them(tmp_path, capfd):
    assert main(["--tiny", "--only", "contract", "--method", "lora", "--out", str(tmp_path)]) == 0
    found = results(tmp_path)
    (part,) = found["parts"]
    assert part["ok"] and list(part["facts"]) == ["lora"]
    checks = part["facts"]["lora"]["checks"]
    assert len(checks) == 5 and set(checks.values()) == {"passed"}
    assert "  lora: ok" in capfd.readouterr().out
    text = page.section(tmp_path / "results.json")
    assert "| lora | 5 | 0 | 0 |" in text and "no figure means anything" in text


def test_a_part_that_fails_and_one_that_is_ended_say_why_and_the_next_one_runs(tmp_path, monkeypatch, capfd):
    broken = Part("speed", "broken", "page", "section", 60.0, {"path": 1})
    ended = Part("speed", "ended", "speed", "steps", 0.001)  # no interpreter starts in that time
    lost = Part("speed", "lost", "nowhere", "steps", 60.0)
    monkeypatch.setattr("benchmarks.gpu.__main__.planned", lambda *_: [broken, ended, lost])
    monkeypatch.setattr("benchmarks.gpu.__main__.SLOW", 1)
    assert main(["--tiny", "--out", str(tmp_path)]) == 1
    first, second, third = results(tmp_path)["parts"]
    assert first["facts"]["the part itself"]["error"].startswith("TypeError")
    assert second["error"].startswith("not done after")
    assert third["facts"]["import"]["missing"] == "benchmarks.gpu.nowhere"
    assert not any(part["ok"] for part in (first, second, third))
    assert "wrong: broken, ended, lost" in capfd.readouterr().out


def test_a_process_that_dies_is_told_by_its_code(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false" if Path("/bin/false").exists() else "/usr/bin/false")
    found = run(Part("speed", "dead", "speed", "steps", 60.0), 60.0)
    assert not found["ok"] and found["error"] == "the process ended with code 1"


def test_sides_that_start_with_other_losses_are_told():
    def part(who: str, loss: float) -> dict:
        facts = {"full rows": {"losses": [loss, 1.0]}, "padded rows": {"losses": [loss + 5, 1.0]}}
        return {"kind": "speed", "name": who, "facts": facts}

    assert unequal([part("1b, luthier, 1", 11.7), part("1b, peft, 1", 11.75), part("8b, peft, 1", 3.0)]) == []
    (line,) = unequal([part("1b, luthier, 1", 11.7), part("1b, peft, 1", 12.0)])
    assert "1b, peft, 1" in line and "12.0000" in line


def test_what_is_missing_is_said_before_anything_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.gpu.__main__.installed", lambda library: library != "tomli_w")
    assert main(["--tiny", "--out", str(tmp_path)]) == 2
    assert "nothing can be run: tomli_w cannot be imported" in capsys.readouterr().err
    monkeypatch.setattr("benchmarks.gpu.part.installed", lambda library: library != "liger_kernel")
    assert absent("peft + Liger") == "not installed: liger_kernel"
    assert absent("luthier") is None


def test_without_results_the_page_says_not_measured_and_by_which_command(tmp_path):
    text = page.section(tmp_path / "results.json")
    assert "Not measured yet" in text and "`make gpu`" in text


def test_the_written_page_has_the_section_that_the_results_give():
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert page.section(ROOT / "benchmarks" / "results" / "gpu" / "results.json") in text


@pytest.mark.slow
@pytest.mark.timeout(1900)  # a processor that others use too is no fault
def test_the_whole_of_it_runs_on_the_cpu_at_tiny_sizes(tmp_path):
    # Liger's kernels need a GPU: in their place something that only leaves a mark.
    liger = tmp_path / "site" / "liger_kernel"
    liger.mkdir(parents=True)
    (liger / "__init__.py").write_text("")
    (liger / "transformers.py").write_text("def apply_liger_kernel_to_llama():\n    print('liger was asked for')\n")
    paths = [str(tmp_path / "site"), str(ROOT / "src")]
    told = subprocess.run(
        ["make", "gpu", "TINY=1", f"PYTHON={sys.executable}", f"GPU_OUT={tmp_path}"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": ":".join(paths)},
        capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert told.returncode == 0, told.stdout + told.stderr
    assert "liger was asked for" in told.stdout
    found = results(tmp_path)
    assert found["unequal"] == [] and all(part["ok"] for part in found["parts"])
    speed = {part["name"]: part["facts"] for part in found["parts"] if part["kind"] == "speed"}
    assert list(speed) == ["tiny, luthier, 1", "tiny, peft, 1", "tiny, peft + Liger, 1"]
    for facts in speed.values():
        full, padded = facts["full rows"], facts["padded rows"]
        assert (full["tokens"], full["padded_places"]) == (4 * 32, 0)
        assert padded["tokens"] + padded["padded_places"] == 4 * 32 and padded["padded_places"] > 0
        assert 0 < padded["supervised_tokens"] < padded["tokens"]
        assert full["gradient"]["tensors_not_zero"] == full["gradient"]["tensors"] == 12
        assert full["trained_numbers"] == speed["tiny, peft, 1"]["full rows"]["trained_numbers"]
    text = page.section(tmp_path / "results.json")
    assert "| tiny, peft + Liger, 1 | padded rows |" in text and "| lora, bf16 | 8 | nothing |" in text
