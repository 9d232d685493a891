"""The list of faults is whole, every part of it has a test, and the page says where."""

import pytest
from faults.marks import PAGE, listed, on_page, table
from marked import TESTS, all_marked, marked

REQUIRED = [f"F{n:02}" for n in (*range(1, 43), *range(49, 58), 62, 63, 64)]


def test_the_list_holds_every_fault_of_training_data_files_and_signals() -> None:
    found = listed()
    assert list(found) == REQUIRED
    assert all(what and parts and len(set(parts)) == len(parts) for what, parts in found.values())


@pytest.mark.parametrize("number", REQUIRED)
def test_every_part_of_a_fault_has_a_test(number: str) -> None:
    marks = all_marked("fault")
    missing = [part for part in listed()[number][1] if not marks.get((number, part))]
    assert not missing, f"{number}: nothing is marked with {missing}"


def test_no_mark_is_of_a_fault_or_part_that_the_list_does_not_have() -> None:
    known = {(number, part) for number, (_, parts) in listed().items() for part in parts}
    strays = {f"{mark}: {tests[0]}" for mark, tests in all_marked("fault").items() if mark not in known}
    assert not strays


def test_a_mark_counts_only_on_a_test_and_a_missing_one_is_seen() -> None:
    source = '@pytest.mark.fault("F01", "a", "b")\ndef test_x() -> None: ...\n\n\ndef test_y() -> None: ...\n'
    assert marked("fault", source, "f.py") == {("F01", "a"): ["f.py::test_x"], ("F01", "b"): ["f.py::test_x"]}
    with pytest.raises(AssertionError, match="is no test"):
        marked("fault", '@pytest.mark.fault("F01")\ndef helper() -> None: ...\n', "f.py")


def test_no_marked_test_is_skipped_or_expected_to_fail() -> None:
    files = {test.split("::")[0] for tests in all_marked("fault").values() for test in tests}
    for name in files:
        source = (TESTS / name).read_text(encoding="utf-8")
        assert not {w for w in ("pytest.skip(", "mark.skip", "mark.xfail", "pytest.xfail(") if w in source}, name


def test_the_page_says_where_each_fault_is_tried() -> None:
    assert on_page(PAGE.read_text(encoding="utf-8")) == table(), (
        "write it anew: PYTHONPATH=tests python tests/faults/marks.py"
    )
