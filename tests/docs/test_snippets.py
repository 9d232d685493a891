"""What README and the pages tell a reader to type, typed: every block of commands or Python runs, or says why not.

Before a block stands `<!-- run -->`, `<!-- run slow -->` or `<!-- not run: why -->`. The blocks of one page run in
their order in one folder, which holds the files of docs/files, as a reader would have fetched them. Commands that train
are cut to two steps; nothing else of them is changed.
"""

import ast
import contextlib
import re
import shlex
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", *(f"docs/{p.relative_to(ROOT / 'docs')}" for p in sorted((ROOT / "docs").glob("howto/*.md")))]
PAGES += ["docs/quickstart.md", "docs/choose.md", "docs/troubleshooting.md"]
FENCE = re.compile(r"^```(console|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- (run|run slow|not run: .+) -->\n$")


class Block(NamedTuple):
    """One fenced block and what stands before it."""

    language: str
    text: str
    mark: str
    line: int


def blocks_of(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for fence in FENCE.finditer(text):
        mark = MARK.search(text[: fence.start()])
        line = text[: fence.start()].count("\n") + 1
        found.append(Block(fence[1], fence[2], mark[1] if mark else "", line))
    return found


def is_slow(page: str) -> bool:
    return any(block.mark == "run slow" for block in blocks_of(page))


def commands(text: str) -> list[list[str]]:
    """The words of each command; a line that ends in a backslash goes on."""
    joined = text.replace("\\\n", " ")
    return [shlex.split(line[2:], comments=True) for line in joined.splitlines() if line.startswith("$ ")]


def shortened(words: list[str]) -> list[str]:
    """A command that trains, with two steps."""
    if words[1] != "train":
        return words
    kept, skip = [], False
    for word in words:
        if skip or word in ("--steps", "--epochs"):
            skip = not skip
            continue
        kept.append(word)
    return [*kept, "--steps", "2", "--set", "eval.rows=20"]


def test_a_command_is_cut_and_nothing_else_of_it_changes() -> None:
    words = commands(
        "$ luthier train m --epochs 3 --out x \\\n    --method lora  # a word\nprinted\n$ luthier methods\n"
    )
    assert words == [
        ["luthier", "train", "m", "--epochs", "3", "--out", "x", "--method", "lora"],
        ["luthier", "methods"],
    ]
    assert shortened(words[0])[:7] == ["luthier", "train", "m", "--out", "x", "--method", "lora"]
    assert shortened(words[1]) == words[1]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_whether_it_is_run(page: str) -> None:
    silent = [f"{page}:{block.line}" for block in blocks_of(page) if not block.mark]
    assert not silent, f"{silent}: put <!-- run --> before it, or <!-- not run: why -->"


def test_the_first_screen_of_the_readme_is_one_sentence_and_lines_that_are_run() -> None:
    first = blocks_of("README.md")[0]
    assert first.mark == "run" and len(first.text.splitlines()) <= 5 and first.line < 10


@pytest.mark.samples
@pytest.mark.filterwarnings("default")  # a reader's own process shows warnings and goes on
@pytest.mark.parametrize("page", [pytest.param(p, marks=pytest.mark.slow) if is_slow(p) else p for p in PAGES])
def test_what_the_page_says_works(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from luthier.cli import main

    for file in (ROOT / "docs" / "files").iterdir():
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks_of(page):
        if not block.mark.startswith("run"):
            continue
        if block.language == "python":
            with contextlib.redirect_stdout(None):
                exec(compile(block.text, f"{page}:{block.line}", "exec"), names)
            continue
        assert commands(block.text), f"{page}:{block.line}: no command"
        for words in commands(block.text):
            assert words[0] == "luthier", f"{page}:{block.line}: {words[0]} is not ours to run"
            code = main(shortened(words)[1:])
            assert code == 0, f"{page}:{block.line}: {shlex.join(words)}\n{capfd.readouterr().err[-2000:]}"


def messages_of_the_source() -> str:
    """All words of all errors: string constants of the source, each on a line, with `...` for what is filled in."""
    said = []
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                said.append("".join(v.value if isinstance(v, ast.Constant) else "..." for v in node.values))  # type: ignore[misc]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(node.value)
    return "\n".join(said)


def test_every_message_of_the_troubleshooting_page_is_one_that_luthier_says() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    said = messages_of_the_source()
    assert len(messages) > 20
    assert not [m for m in messages if m not in said]


def test_the_troubleshooting_page_knows_every_exit_code() -> None:
    codes = re.findall(r"^\| (\d+) \|", (ROOT / "docs" / "exit-codes.md").read_text(encoding="utf-8"), re.MULTILINE)
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    assert codes and not [c for c in codes if c != "0" and not re.search(rf"^\| .*\b{c}\b.* \|", page, re.MULTILINE)]
