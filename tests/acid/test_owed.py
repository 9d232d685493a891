"""Every acid test that a built method or strategy owes is there, or is listed as missing with the reason."""

from typing import Any

import pytest
from acid.marks import counted, functions_of, listed, registered
from marked import TESTS, all_marked, marked


@pytest.mark.parametrize("name", sorted(registered() & listed().keys()))
def test_what_is_owed_is_there_or_says_why_it_is_not(name: str) -> None:
    entry, there = listed()[name], all_marked("acid")
    for number in entry.numbers():
        what = f"{name} {number}, {entry.what[number - 1]}"
        present = (name, number) in there or number in entry.everywhere
        assert present or entry.missing.get(number), (
            f'{what}: no test carries @pytest.mark.acid("{name}", {number}). Write one, or say in tests/acid why it is '
            "missing."
        )
        assert not (present and number in entry.missing), f"{what}: there is a test, so it is not missing"


def test_no_mark_is_of_what_nobody_owes() -> None:
    known = {(name, number) for name, entry in listed().items() for number in entry.numbers()}
    assert not {f"{mark}: {tests[0]}" for mark, tests in all_marked("acid").items() if mark not in known}
    for name, entry in listed().items():
        assert {*entry.everywhere, *entry.missing} <= set(entry.numbers()), name
        assert len(set(entry.what)) == len(entry.what), f"{name}: two of its acid tests have one name"


def test_tests_that_run_for_every_method_are_there() -> None:
    for name, entry in listed().items():
        for test in entry.everywhere.values():
            assert test in functions_of(test.split("::")[0]), f"{name}: {test}"


def test_a_mark_counts_only_on_a_test_and_with_its_number() -> None:
    source = '@pytest.mark.acid("x", 1, 3)\ndef test_x() -> None: ...\n\n\ndef test_y() -> None: ...\n'
    assert marked("acid", source, "f.py") == {("x", 1): ["f.py::test_x"], ("x", 3): ["f.py::test_x"]}
    with pytest.raises(AssertionError, match="is no test"):
        marked("acid", '@pytest.mark.acid("x", 1)\ndef helper() -> None: ...\n', "f.py")
    with pytest.raises(AssertionError, match="by number"):
        marked("acid", '@pytest.mark.acid("x")\ndef test_x() -> None: ...\n', "f.py")


def test_no_marked_test_is_switched_off() -> None:
    for name in sorted({test.split("::")[0] for tests in all_marked("acid").values() for test in tests}):
        source = (TESTS / name).read_text(encoding="utf-8")
        assert not {w for w in ("mark.skip", "mark.xfail", "pytest.skip(", "pytest.xfail(") if w in source}, name


def test_the_count_is_printed(record_property: Any) -> None:
    record_property("line", counted())
    assert counted().startswith("acid tests: owed ")
