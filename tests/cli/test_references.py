"""Every option, command, file and setting that a message, a help text or a document names is there."""

import ast
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from luthier.cli._main import application, verbs
from luthier.cli._shelf import SHELF, STRATEGIES, WAYS
from luthier.cli._spec_options import RunSpec, setting_options, spec_options

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "luthier"
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]

OPTION = re.compile(r"(?<![\w/-])--[a-z][a-z0-9-]*(?![\w*])")
COMMAND = re.compile(r"(?:`|\$ |^ *|: +|\"|by )luthier ((?:--)?[a-z][a-z-]*)\b([^`\n]*)", re.MULTILINE)
SETTING = re.compile(r"--set ([a-z_][a-z0-9_.]*)=")
PAGE = re.compile(
    r"(?<![\w/.])((?:docs|tests|scripts|benchmarks|experiments|examples)/[\w./-]+\.(?:md|py|toml|json|svg))"
)
TARGET = re.compile(r"[`$] ?make ([a-z][a-z-]*)")
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)\s#]+)")

# Options of other programs, which these lines are about.
OTHERS = re.compile(
    r"\b(pip|pytest|git|mypy|ruff|mkdocs|uv|peft)\b|python -m (benchmarks|experiments|pytest)"
    r"|python (scripts|benchmarks)/|--hash=sha256|sparse member|make mutants|--tests faults"
)

# Such options in texts whose line does not say whose they are; each is needed, or the test says so.
FOREIGN = {
    "src/luthier/workflow/gguf_adapter.py": {"--lora", "--chat-template-file"},  # of llama.cpp
    "src/luthier/workflow/vllm_export.py": {"--enable-lora", "--max-lora-rank", "--lora-modules", "--chat-template"},
    "docs/decisions/0063-new-tokens-make-a-new-base.md": {"--add-tokens"},  # what was not chosen
    "docs/howto/compare.md": {"--ntasks"},  # of Slurm
}


def spoken(path: Path) -> Iterator[tuple[str, str]]:
    """(place, text) of every string of a Python file, f-strings with their holes as `{}`; docstrings too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            text = node.value
        else:
            continue
        yield f"{path.relative_to(ROOT)}:{node.lineno}", text


@lru_cache(maxsize=1)
def texts() -> list[tuple[str, str]]:
    found = [pair for path in sorted(SOURCE.rglob("*.py")) for pair in spoken(path)]
    for path in DOCUMENTS:
        lines = path.read_text(encoding="utf-8").splitlines()
        found += [(f"{path.relative_to(ROOT)}:{n}", line) for n, line in enumerate(lines, start=1)]
    return found


@lru_cache(maxsize=1)
def options_of() -> dict[str, set[str]]:
    """Verb -> its options; those of `luthier` alone under ""."""
    made = application(verbs())
    found = {"": {o for p in made.params for o in p.opts} | {"--help"}}
    for name, command in made.commands.items():
        found[name] = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
    fields = spec_options(RunSpec)
    for shelf in (SHELF, STRATEGIES, WAYS):
        for card in shelf.cards():
            for option in setting_options([card], fields):
                found["train"] |= {f"--{option.name}", f"--no-{option.name}"}
    return found


def place_of_words(text: str) -> bool:
    """Whether a string is no sentence but one word of a command that is put together: `"--no-deps"`."""
    return text.startswith("--") and " " not in text


def test_every_option_that_is_named_is_an_option() -> None:
    known = set().union(*options_of().values())
    unknown = [
        (place, option)
        for place, text in texts()
        if not OTHERS.search(text) and not place_of_words(text)
        for option in OPTION.findall(text)
        if option not in known
    ]
    strange = [f"{at}: {name}" for at, name in unknown if name not in FOREIGN.get(at.partition(":")[0], ())]
    assert not strange, "\n".join(strange)
    met = {(at.partition(":")[0], name) for at, name in unknown}
    idle = [f"{at}: {name}" for at, names in FOREIGN.items() for name in names if (at, name) not in met]
    assert not idle, f"FOREIGN names what no text says any more: {idle}"


def test_every_command_that_is_named_is_a_verb_with_these_options() -> None:
    strange = []
    for place, text in texts():
        for verb, rest in COMMAND.findall(text):
            if verb.startswith("--"):
                if verb not in options_of()[""]:
                    strange.append(f"{place}: luthier {verb}")
            elif verb not in options_of():
                strange.append(f"{place}: luthier {verb}")
            else:
                strange += [f"{place}: luthier {verb} {o}" for o in OPTION.findall(rest) if o not in options_of()[verb]]
    assert not strange, "\n".join(strange)


def test_every_setting_that_is_named_is_a_field_or_a_setting() -> None:
    fields = {option.field for option in spec_options(RunSpec)}
    known = fields | {f"run.{field}" for field in fields}
    for shelf in (SHELF, STRATEGIES, WAYS):
        for card in shelf.cards():
            known |= {name for s in card.settings for name in (s.name, f"{card.name}.{s.name}")}
    strange = [f"{place}: {name}" for place, text in texts() for name in SETTING.findall(text) if name not in known]
    assert not strange, "\n".join(strange)


def test_every_file_and_target_that_is_named_is_there() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    strange = []
    for place, text in texts():
        strange += [
            f"{place}: {name}"
            for name in PAGE.findall(text)
            if not any((at / name).exists() for at in (ROOT, ROOT / "docs"))
        ]
        strange += [f"{place}: make {name}" for name in TARGET.findall(text) if name not in targets]
    for path in DOCUMENTS:
        for name in LINK.findall(path.read_text(encoding="utf-8")):
            if not (path.parent / name).exists():
                strange.append(f"{path.relative_to(ROOT)}: {name}")
    assert not strange, "\n".join(strange)
