"""`make mutants`: what it changes, which tests it asks, and that its list of known mutants is of today's code."""

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"

SAMPLE = '''"""Adds up."""
from typing import TYPE_CHECKING

__all__ = ["f"]
if TYPE_CHECKING:
    import os
LIMIT = 3


class A:
    """One."""

    share: float = 0.5

    def f(self, x: int = 1, *, on: bool = True) -> int:
        """Gives a number."""
        assert x is not None
        if x < LIMIT and not on:
            raise ValueError(f"{x + 1} is too small")
        self.kept = x
        print(x, end="")
        return x + 2 if on else -x

    def __repr__(self) -> str:
        return "A" if self.kept == 1 else "B"
'''


@pytest.fixture(scope="module")
def mutants() -> Any:
    sys.path.insert(0, str(SCRIPTS))
    try:
        spec = importlib.util.spec_from_file_location("scripts_mutants", SCRIPTS / "mutants.py")
        assert spec is not None and spec.loader is not None
        module: ModuleType = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # its dataclasses look their module up
        spec.loader.exec_module(module)
        yield module
        del sys.modules[spec.name]
    finally:
        sys.path.remove(str(SCRIPTS))


def made(mutants: Any, folder: Path, text: str = SAMPLE) -> list[Any]:
    path = folder / "sample.py"
    path.write_text(text)
    found: list[Any] = mutants.mutants_of(path, "room/sample.py")
    return found


def test_every_kind_of_change_is_made_and_comes_out_as_python_with_that_change_alone(
    mutants: Any, tmp_path: Path
) -> None:
    found = made(mutants, tmp_path)
    changes = {(m.function, m.kind, m.was, m.becomes) for m in found}
    assert {
        ("", "constant changed", "3", "(4)"),
        ("", "constant changed", "0.5", "(1.0)"),
        ("A.f", "comparison flipped", "x < LIMIT", "(x <= LIMIT)"),
        ("A.f", "and for or", "x < LIMIT and not on", "(x < LIMIT or not on)"),
        ("A.f", "condition negated", "x < LIMIT and not on", "(not (x < LIMIT and (not on)))"),
        ("A.f", "sign or not dropped", "not on", "(on)"),
        ("A.f", "statement deleted", "self.kept = x", "pass"),
        ("A.f", "statement deleted", 'print(x, end="")', "pass"),
        ("A.f", "keyword argument dropped", 'print(x, end="")', "(print(x))"),
        ("A.f", "arithmetic", "x + 2", "(x - 2)"),
        ("A.f", "return value changed", "return x + 2 if on else -x", "return None"),
        ("A.f", "True for False", "True", "(False)"),
    } <= changes
    source = SAMPLE.encode()
    for mutant in found:
        assert mutant.parses(source), mutant
        changed = mutant.applied(source)
        assert changed != source
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source)), mutant


def test_what_no_test_could_notice_is_left_as_it_is(mutants: Any, tmp_path: Path) -> None:
    lines = SAMPLE.splitlines()
    for mutant in made(mutants, tmp_path):
        line = lines[mutant.line - 1]
        assert not any(word in line for word in ("__all__", "TYPE_CHECKING", "assert", '"""', '"B"')), mutant
        assert "x + 1" not in mutant.was or mutant.kind == "statement deleted", "a message is no matter of tests"


def test_the_name_of_a_mutant_stays_when_lines_move_and_is_its_own(mutants: Any, tmp_path: Path) -> None:
    before = made(mutants, tmp_path)
    after = made(mutants, tmp_path, SAMPLE.replace("LIMIT = 3\n", "\n\n# a note\nLIMIT = 3\n"))
    assert [m.name for m in before] == [m.name for m in after]
    assert [m.line for m in before] != [m.line for m in after]
    assert len({m.name for m in before}) == len(before)


def test_a_run_takes_the_same_mutants_again_and_another_seed_takes_others(mutants: Any) -> None:
    def taken(seed: int, count: int) -> list[str]:
        return [m.name for m in mutants.candidates(["training/schedule.py", "training/guards.py"], seed, count)]

    assert taken(0, 6) == taken(0, 6)
    assert len(taken(0, 6)) == 12
    assert set(taken(0, 3)) < set(taken(0, 6)), "a longer run goes on where a shorter one stopped"
    assert taken(0, 6) != taken(1, 6)


def test_the_tests_of_a_mutant_enter_its_function_those_named_after_it_first_then_the_fastest(mutants: Any) -> None:
    (mutant, *_) = mutants.candidates(["training/schedule.py"], 0, 1)
    here = [f"training/schedule.py:{mutant.function}"]
    touched = {
        "tests/x/test_other.py::test_slow": (3.0, here),
        "tests/x/test_other.py::test_quick": (1.0, here),
        "tests/x/test_other.py::test_elsewhere": (0.1, ["training/loop.py:Loop.save"]),
        "tests/training/test_schedule.py::test_own": (2.0, here),
        **{f"tests/x/test_many.py::test_all[{n}]": (0.01, here) for n in range(50)},
    }
    found = mutants.tests_for(mutant, touched, 5.0)
    assert found[0] == "tests/training/test_schedule.py::test_own"
    assert found[-1] == "tests/x/test_other.py::test_quick", "the slow one would be more than 5 seconds"
    assert len(found) == 2 + mutants.ALIKE


def test_every_known_mutant_is_one_of_todays_code_and_has_a_reason(mutants: Any) -> None:
    for one in mutants.known():
        path = mutants.SOURCE / one["file"]
        same = [m for m in mutants.mutants_of(path, one["file"]) if mutants.reason(m, [one])]
        assert same, f"{one['file']}: no mutant makes {one['was']!r} into {one['becomes']!r} in {one['function']}"
        assert len(one["reason"]) > 20
