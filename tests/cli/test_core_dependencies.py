"""What `pip install luthier` brings, without extras, is enough for a classification from first to last."""

import contextlib
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]

# Packages as if not installed: whoever looks for one finds nothing.
CALL = """
import sys
from importlib.machinery import PathFinder
missing = set({missing!r})
class Rest:
    find_distributions = PathFinder.find_distributions
    invalidate_caches = PathFinder.invalidate_caches
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in missing else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Rest
from luthier.cli import main
for words in {calls!r}:
    code = main(words)
    print("code", code, *words[:1], file=sys.stderr)
"""
# The name that a distribution is imported by, where it is another one.
IMPORTED = {"scikit-learn": "sklearn", "rouge-score": "rouge_score", "pyyaml": "yaml"}


def brought(wanted: list[str]) -> set[str]:
    """The packages that these bring, and those that these need, as installed here; extras are left out."""
    found: set[str] = set()
    waiting = [Requirement(w) for w in wanted]
    while waiting:
        one = waiting.pop()
        if one.name.lower() in found or (one.marker is not None and not one.marker.evaluate({"extra": ""})):
            continue
        found.add(one.name.lower())
        with contextlib.suppress(PackageNotFoundError):
            waiting += [Requirement(w) for w in requires(one.name) or ()]
    return found


def extras() -> set[str]:
    """Packages that only extras bring, by the names they are imported by; pandas comes with datasets."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    more = project["optional-dependencies"]
    named = {Requirement(w).name.lower() for extra in more if extra not in ("dev", "docs") for w in more[extra]}
    rest = named - brought(project["dependencies"]) - {"luthier"}
    found = {IMPORTED.get(name, name.replace("-", "_")) for name in rest} | {"pandas"}
    assert {"datasets", "sklearn", "scipy", "pyarrow", "openpyxl", "peft", "accelerate"} <= found
    return found


def called(here: Path, *calls: list[object]) -> "subprocess.CompletedProcess[str]":
    script = CALL.format(missing=sorted(extras()), calls=[[str(w) for w in words] for words in calls])
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, cwd=here)


def test_a_classification_is_trained_resumed_asked_scored_and_merged(model: Path, rows: Path, tmp_path: Path) -> None:
    common = ["--data", rows, "--threads", 1, "--precision", "fp32", "--batch", 8]
    done = called(
        tmp_path,
        ["train", model, *common, "--steps", 4, "--method", "lora", "--out", "run"],
        ["verify-resume", "run/spec.toml", "--steps", 2],
        ["predict", "run", "--text", "how is cat one"],
        ["evaluate", "run", "--data", rows],
        ["merge", "run", "--out", "plain"],
        ["methods", "lora"],
    )
    codes = re.findall(r"^code (\d+) (\S+)$", done.stderr, re.MULTILINE)
    assert codes == [("0", v) for v in ("train", "verify-resume", "predict", "evaluate", "merge", "methods")], (
        done.stderr
    )
    assert "accuracy" in done.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--data", "org/name"], ("'org/name'", "pip install 'luthier[hub]'")),
        (["--data", "rows.parquet"], ("rows.parquet", "pip install 'luthier[parquet]'")),
    ],
)
def test_what_needs_an_extra_says_which(model: Path, tmp_path: Path, words: list[str], says: tuple[str, ...]) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1" + b"\0" * 8 + b"PAR1")
    done = called(tmp_path, ["train", model, *words])
    assert "code 3 train" in done.stderr and all(word in done.stderr for word in says), done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["rows.parquet"]
