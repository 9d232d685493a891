"""The house itself: names, cards, pages, exports, errors. A new file is held to it by being there."""

import ast
import dataclasses
import importlib
import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

import luthier
from luthier.cli._main import verbs
from luthier.cli._shelf import SHELF, as_markdown, shares
from luthier.core import LuthierError, errors
from luthier.training import STRATEGIES

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "luthier"
EVERY = SHELF.ours()


# --- methods


@pytest.mark.parametrize("name", EVERY)
def test_a_file_registers_the_class_of_its_own_name(name: str) -> None:
    assert SHELF.card(name).name == name
    below = Path(SHELF.card(name).path).relative_to(SOURCE / "methods").parts
    assert below[0] == SHELF.card(name).family, "the first folder is the family; folders by idea may follow"


def test_no_two_files_on_the_shelf_have_one_name() -> None:
    files = [p for p in (SOURCE / "methods").rglob("*.py") if not p.name.startswith("_")]
    stems = [p.stem for p in files if p.parent.name != "parts"]
    assert len(stems) == len(set(stems)) == len(EVERY)


def test_a_familys_folder_holds_methods_only() -> None:
    inside = [p for p in (SOURCE / "methods").rglob("*.py") if p.parent.name != "parts" and p.name != "__init__.py"]
    assert not [p.name for p in inside if p.stem not in EVERY], "what methods share belongs into methods/parts"


def test_the_page_of_the_parts_lists_what_they_give() -> None:
    page = str(importlib.import_module("luthier.methods.parts").__doc__)
    home = ""
    listed: dict[str, set[str]] = {}
    for line in page.splitlines():
        if line.startswith("    "):
            piece, given = line[4:22].strip(), line[22:]
            home = piece or home
            names = given.split("  ")[0] if "  " in given.strip() else given
            listed.setdefault(home, set()).update(n.strip() for n in names.split(","))
    files = (p.stem for p in (SOURCE / "methods" / "parts").glob("*.py") if p.name != "__init__.py")
    assert listed == {name: set(importlib.import_module(f"luthier.methods.parts.{name}").__all__) for name in files}


@pytest.mark.parametrize("name", EVERY)
def test_a_method_imports_no_other_method(name: str) -> None:
    text = Path(SHELF.card(name).path).read_text(encoding="utf-8")
    modules = re.findall(r"from (luthier\.methods\.\S+) import", text)
    assert all(m.startswith("luthier.methods.parts.") for m in modules), "move what two share into methods/parts"


@pytest.mark.parametrize("family", ["reparameterised", "all others"])
def test_the_median_file_of_a_method_has_at_most_90_lines(family: str) -> None:
    cards = [SHELF.card(name) for name in EVERY]
    meant = [card for card in cards if (card.family == "reparameterised") == (family == "reparameterised")]
    lines = [len(Path(card.path).read_text(encoding="utf-8").splitlines()) for card in meant]
    assert statistics.median(lines) <= 90, "what is no paper, or is two methods', belongs into methods/parts"


@pytest.mark.parametrize("name", EVERY)
def test_a_card_read_from_the_file_equals_the_imported_class(name: str) -> None:
    from luthier.surgery import METHODS, Combined

    card, cls = SHELF.card(name), METHODS.get(name)
    assert cls.name == name
    told = cls() if issubclass(cls, Combined) else cls  # a sum's facts follow from its parts
    assert (card.mergeable, card.starts_at_base) == (told.mergeable, told.starts_at_base)
    assert card.facts.get("default_lr", told.default_lr) == told.default_lr
    assert cls.facts == {k: v for k, v in card.facts.items() if k in cls.facts}
    if isinstance(told, Combined):
        assert {s.name for s in card.settings} == set(told.settings())
        return
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    assert [s.name for s in card.settings] == [f.name for f in fields], "a setting without a meaning is on no page"
    for setting, field in zip(card.settings, fields, strict=True):
        assert setting.meaning
        if field.default is not dataclasses.MISSING:
            assert eval(setting.default, vars(importlib.import_module(cls.__module__))) == field.default
    module = importlib.import_module(cls.__module__)
    assert card.page == ast.get_docstring(ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", EVERY)
def test_the_page_of_a_method_has_its_parts(name: str) -> None:
    page = SHELF.card(name).page
    lines = page.splitlines()
    assert lines[0].endswith(".") and len(lines[0]) <= 120, "one plain sentence first"
    assert any(line.startswith("    ") for line in lines), "an equation, indented"
    for part in ("Count:", "Claims:", "Pitfalls:"):
        assert any(line.startswith(part) for line in lines), f"no {part}"
    assert re.fullmatch(r"arXiv:\d{4}\.\d{4,5}|doi:\S+|openreview:\w+|github:\S+", SHELF.card(name).paper), (
        "a paper that can be found"
    )
    assert SHELF.card(name).paper in page


def test_the_shipped_shares_are_what_the_formulas_give() -> None:
    from luthier.cli._parameter_shares import count_shares

    counted = count_shares()
    stale = {name for name in set(shares()) | set(counted) if shares().get(name) != counted.get(name)}
    assert not stale, f"{sorted(stale)}: run `make docs`"


def test_the_shape_that_shares_are_counted_on_is_that_of_the_sample(minilm_l6: Path) -> None:
    from luthier.cli._parameter_shares import MINILM_L6

    config = json.loads((minilm_l6 / "config.json").read_text())
    assert {k: config[k] for k in MINILM_L6 if k != "num_labels"} == {
        k: v for k, v in MINILM_L6.items() if k != "num_labels"
    }


def test_the_written_pages_are_those_of_the_shelf() -> None:
    folder = ROOT / "docs" / "methods"
    stale = [
        name
        for name in EVERY
        if not (folder / f"{name}.md").is_file()
        or (folder / f"{name}.md").read_text(encoding="utf-8") != as_markdown(SHELF.card(name))
    ]
    assert not stale, f"{stale}: run `make docs`"


# --- rooms


def rooms() -> Iterator[str]:
    for path in sorted(SOURCE.glob("*/__init__.py")):
        yield f"luthier.{path.parent.name}"


@pytest.mark.parametrize("room", list(rooms()))
def test_a_room_says_what_it_is_for_and_gives_out_what_it_lists(room: str) -> None:
    module = importlib.import_module(room)
    assert module.__doc__, f"{room}: no docstring"
    named = getattr(module, "__all__", [])
    assert sorted(named) == sorted(set(named))
    for name in named:
        assert getattr(module, name, None) is not None, f"{room}.__all__ lists {name}, which is not there"
    imported = {
        alias.asname or alias.name
        for node in ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("luthier")
        for alias in node.names
        if alias.name != "*"
    }
    assert imported <= set(named), f"{room}: imported but not given out: {sorted(imported - set(named))}"


def test_the_front_page_gives_out_what_it_lists() -> None:
    assert luthier.__all__ == sorted(luthier.__all__, key=lambda n: (n.islower(), n)) or luthier.__all__
    for name in luthier.__all__:
        assert getattr(luthier, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        luthier.trian  # noqa: B018


def test_every_file_of_ours_says_what_it_holds() -> None:
    silent = [str(p) for p in SOURCE.rglob("*.py") if not ast.get_docstring(ast.parse(p.read_text(encoding="utf-8")))]
    assert silent in ([], [str(SOURCE / "__version__.py")])


# --- errors


def every_error() -> list[type[LuthierError]]:
    found = [getattr(errors, n) for n in errors.__all__ if isinstance(getattr(errors, n), type)]
    return [e for e in found if issubclass(e, LuthierError)]


@pytest.mark.parametrize("error", every_error())
def test_every_error_has_its_exit_code_and_its_place_in_the_tree(error: type[LuthierError]) -> None:
    documented = {2, 3, 4, 5, 6, 7, 17}
    if error is LuthierError:
        assert error.exit_code == 1
    elif error.__name__ == "Interrupted":
        assert errors.Interrupted("stopped", 15).exit_code == 143
        assert errors.Interrupted("stopped", 2).exit_code == 130
    else:
        assert error.exit_code in documented
        line = next(line for line in str(errors.__doc__).splitlines() if re.search(rf"\b{error.__name__}\b", line))
        assert line.split()[-1] == str(error.exit_code) or str(error.exit_code) in line
    assert error.__doc__


def test_the_exit_codes_are_documented_where_a_user_looks() -> None:
    page = (ROOT / "docs" / "exit-codes.md").read_text(encoding="utf-8")
    for error in every_error():
        if error is not LuthierError:
            assert f"`{error.__name__}`" in page
    for code in (0, 1, 2, 3, 4, 5, 6, 17, 130, 143):
        assert f"| {code} |" in page


def test_every_error_that_a_user_can_meet_has_its_exit_code_from_the_tree() -> None:
    strays = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            plain = ("Exception", "ValueError", "RuntimeError", "TypeError", "OSError")
            if isinstance(node, ast.ClassDef) and any(isinstance(b, ast.Name) and b.id in plain for b in node.bases):
                strays.append((path.relative_to(SOURCE).as_posix(), node.name))
    # What begins with an underscore, a class or a file, is met by no user.
    open_ones = [(path, name) for path, name in strays if not name.startswith("_") and "/_" not in path]
    outside = [name for path, name in open_ones if path != "core/errors.py"]
    assert not outside, outside


# --- verbs


@pytest.mark.parametrize("verb", verbs())
def test_a_verb_teaches_and_is_one_file(verb: str) -> None:
    module = importlib.import_module(f"luthier.cli.{verb.replace('-', '_')}")
    assert "Examples:" in module.command.__doc__
    assert f"luthier {verb}" in module.command.__doc__


# --- sizes


def test_the_median_file_of_a_strategy_has_at_most_80_lines() -> None:
    files = {STRATEGIES.card(name).path for name in STRATEGIES.ours()}
    lines = [len(Path(path).read_text(encoding="utf-8").splitlines()) for path in files]
    assert statistics.median(lines) <= 80, "what is no paper, or is two strategies', belongs into training or data"


def test_no_class_does_everything() -> None:
    large = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                methods = sum(isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef) for item in node.body)
                if lines > 400 or methods > 25:
                    large.append(f"{path.relative_to(SOURCE)}: {node.name} has {lines} lines and {methods} methods")
    assert not large, "\n".join(large)
