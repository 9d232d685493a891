"""A type checker has nothing to say about README's snippets, and something about a wrong setting in one."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
WRONG = """from luthier import DataSpec, RunSpec, train

train(RunSpec(model=3, data=DataSpec(source="sample:trec6")))
train("sample:minilm-l6", "sample:trec6").scores.upper()
"""
PYRIGHT = shutil.which("basedpyright", path=str(Path(sys.executable).parent)) or shutil.which("basedpyright")


def complaints(checker: str, folder: Path, text: str) -> list[str]:
    """The lines with errors that a checker prints for one file."""
    file = folder / "snippet.py"
    file.write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(ROOT / ".mypy_cache"), str(file)]
    if checker == "basedpyright":
        if PYRIGHT is None:
            pytest.skip("basedpyright is not installed: pip install basedpyright")
        settings = {"typeCheckingMode": "standard", "extraPaths": [str(ROOT / "src")]}
        (folder / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
        command = [PYRIGHT, "--pythonpath", sys.executable, "--project", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode in (0, 1), done.stderr
    return [line for line in done.stdout.splitlines() if "error:" in line or " - error" in line]


@pytest.mark.parametrize("checker", ["mypy", "basedpyright"])
def test_a_type_checker_finds_no_fault_in_the_readme(checker: str, tmp_path: Path) -> None:
    assert len(SNIPPETS) >= 2
    assert complaints(checker, tmp_path, "\n".join(SNIPPETS)) == []


@pytest.mark.parametrize("checker", ["mypy", "basedpyright"])
def test_a_type_checker_sees_wrong_settings_and_results(checker: str, tmp_path: Path) -> None:
    assert len(complaints(checker, tmp_path, WRONG)) == 2
