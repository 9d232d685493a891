"""S2: every hostile file is refused, quickly, in little memory, and nothing happens besides."""

from pathlib import Path
from typing import Any

import pytest
from trust import corpus, reader
from trust.asking import ask

CASES = corpus.cases()
BY_READER = sorted({case.reader for case in CASES})


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return ask(CASES, tmp_path_factory.mktemp("hostile"))


def test_the_corpus_holds_at_least_200_files_of_different_names() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 200


@pytest.mark.parametrize("kind", BY_READER)
def test_every_hostile_file_is_refused_with_an_exit_code_and_a_message(
    kind: str, answers: dict[str, dict[str, Any]]
) -> None:
    believed = {c.name: answers[c.name]["error"] for c in CASES if c.reader == kind and not answers[c.name]["refused"]}
    assert believed == {}
    for case in CASES:
        if case.reader == kind:
            answer = answers[case.name]
            assert answer["code"] in (2, 3, 4), case.name
            assert len(answer["error"]) < 10_000 and answer["error"].replace("\n", "").isprintable(), case.name


def test_files_are_refused_by_the_readers_themselves_and_for_their_own_fault(
    answers: dict[str, dict[str, Any]],
) -> None:
    # A wall of the jail that is hit means that a parser let something through, or that the jail is in its own way.
    assert {n: a["error"] for n, a in answers.items() if "tried something that reading never needs" in a["error"]} == {}
    for case in CASES:
        if case.name.startswith("pickle: calls"):
            name = case.name.removeprefix("pickle: calls ")
            assert f"asks for '{name}'" in answers[case.name]["error"], case.name


@pytest.mark.parametrize("kind", BY_READER)
def test_the_audit_hook_is_silent(kind: str, answers: dict[str, dict[str, Any]]) -> None:
    assert {c.name: answers[c.name]["seen"] for c in CASES if c.reader == kind and answers[c.name]["seen"]} == {}


@pytest.mark.parametrize("kind", BY_READER)
def test_nothing_is_left_behind_inside_or_outside_the_folder(kind: str, answers: dict[str, dict[str, Any]]) -> None:
    assert {c.name: answers[c.name]["left"] for c in CASES if c.reader == kind and answers[c.name]["left"]} == {}
    assert not Path("/tmp", corpus.CANARY).exists()


def test_no_file_costs_more_than_the_enforced_second_and_256_megabytes(answers: dict[str, dict[str, Any]]) -> None:
    # Both limits are enforced while reading (a timer of processor time, RLIMIT_AS): beyond them, nothing is "refused".
    assert all(answer["error"] != "too slow" for answer in answers.values())
    assert max(answer["peak"] for answer in answers.values()) <= reader.LIMIT_BYTES
