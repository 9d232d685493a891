"""The examples in docstrings run and print what they show; every name on the front page has one.

They run in a folder that holds the files of docs/files, such as reviews.csv.
"""

import doctest
import importlib
import shutil
from pathlib import Path

import pytest

import luthier

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "luthier"


def modules() -> list[str]:
    """Every module of ours with an example in it."""
    found = [p for p in sorted(SOURCE.rglob("*.py")) if "    >>> " in p.read_text(encoding="utf-8")]
    names = [".".join(p.relative_to(SOURCE.parent).with_suffix("").parts) for p in found]
    return ["luthier", *names]


@pytest.mark.samples
@pytest.mark.filterwarnings("default")  # a reader's own process shows warnings and goes on
@pytest.mark.parametrize("name", modules())
def test_the_examples_of_a_module_print_what_they_show(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in (ROOT / "docs" / "files").iterdir():
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    done = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert done.attempted > 0 and done.failed == 0


@pytest.mark.parametrize("name", luthier.__all__)
def test_every_name_of_the_front_page_has_an_example(name: str) -> None:
    thing = luthier if name == "__version__" else getattr(luthier, name)
    examples = doctest.DocTestParser().get_examples(str(thing.__doc__))
    assert any(name in example.source for example in examples)
    assert not any(doctest.SKIP in example.options for example in examples)
