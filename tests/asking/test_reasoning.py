"""Ways that write before they answer, as functions of a machine that is a rule."""

from __future__ import annotations

import re

import pytest
from asking.stub import Stub, asked, desk, query, shown

from luthier.asking import WAYS
from luthier.asking.chains import Chained, voted
from luthier.asking.graph import checked_plan
from luthier.core import ConfigError, DataError

CoT, SC, PoT, ToT, GoT, SoT = (WAYS.get(n) for n in ("cot", "self_consistency", "pot", "tot", "got", "sot"))
POOL = [shown(f"{n} and {n}", str(2 * n), n, why=f"{n} twice is {2 * n}.", code=f"ans = {n} + {n}") for n in range(6)]


def reasons(prompt: str, seed: int) -> str:
    """Adds two numbers, or says what stands behind the reasoning; a draw may slip by one."""
    a, b = re.findall(r"Question: (\d+) and (\d+)", prompt)[-1]
    slip = seed % 3 == 0 and seed > 0
    if prompt.endswith("So the answer is"):
        return f" {re.findall(r'are (.+)[.]', prompt)[-1]}."
    return f" {a} and {b} are {int(a) + int(b) + slip}."


def test_a_reasoning_without_an_announced_answer_is_asked_for_it() -> None:
    machine = Stub(text=reasons)
    told = asked(CoT(), ["17 and 25", "3 and 4"], desk(POOL), machine)
    assert [one.answer.said for one in told] == ["42", "7"]
    assert told[0].prompts[0] == "Question: 17 and 25\nAnswer: Let's think step by step."
    assert told[0].prompts[1].endswith("17 and 25 are 42.\nSo the answer is")
    announced = asked(CoT(), ["1 and 1"], desk(POOL), Stub(text=lambda p, s: " It is two. So the answer is 2."))
    assert announced[0].answer.said == "2" and len(announced[0].prompts) == 1


def test_shown_rows_have_their_reasoning_and_are_never_the_row_itself() -> None:
    [told] = asked(CoT(k=5, rationale="why"), ["3 and 3"], desk(POOL), Stub(text=reasons))
    shots = told.prompts[0].split("\n\n")[:-1]
    assert len(shots) == 5 and not any("3 and 3" in shot for shot in shots)
    assert told.prompts[0].endswith("Question: 3 and 3\nAnswer:"), "it goes on as the shown rows do"
    assert "Question: 2 and 2\nAnswer: 2 twice is 4. So the answer is 4." in shots
    with pytest.raises(ConfigError, match="no column with the rationale"):
        CoT(k=2).refuse(desk(POOL), [])
    with pytest.raises(DataError, match=r"no column 'wy'.*'why'"):
        CoT(k=2, rationale="wy").refuse(desk(POOL), [])
    with pytest.raises(DataError, match="9 shots, and 6 rows"):
        CoT(k=9, rationale="why").refuse(desk(POOL), [])


@pytest.mark.acid("cot", 2)
@pytest.mark.acid("self_consistency", 1)
def test_one_reasoning_at_temperature_0_is_cot() -> None:
    one, other = (
        asked(way, ["17 and 25", "8 and 9"], desk(POOL), Stub(text=reasons)) for way in (CoT(), SC(m=1, temperature=0))
    )
    assert [(t.prompts, t.written, t.answer.said) for t in one] == [
        (t.prompts, t.written, t.answer.said) for t in other
    ]
    with pytest.raises(ConfigError, match="at temperature 0 are all the same"):
        SC(m=3, temperature=0).refuse(desk(POOL), [])


def test_the_answer_of_most_reasonings_is_taken() -> None:
    machine = Stub(text=reasons)
    told = asked(SC(m=15), [f"{n} and 25" for n in range(12)], desk(POOL), machine)
    right = sum(one.answer.said == str(n + 25) for n, one in enumerate(told))
    votes = told[0].answer.facts["votes"]
    assert right >= 9 and sum(votes.values()) == 15 and len(votes) == 2


@pytest.mark.acid("cot", 3)
@pytest.mark.acid("self_consistency", 2)
def test_a_tie_is_broken_by_log_probability_and_noted() -> None:
    found = [
        Chained(text="", said="1,000", chance=-3.0), Chained(text="", said="7", chance=-1.0),
        Chained(text="", said="1000.0", chance=-1.0), Chained(text="", said="7", chance=-4.0),
        Chained(text="", said=None, chance=0.0),
    ]  # fmt: skip
    answer = voted(found, False)
    assert answer.said == "1,000" and "a tie of 1000 and 7 with 2 votes each" in answer.note
    assert answer.facts == {"votes": {"1000": 2, "7": 2}, "without": 1}


@pytest.mark.acid("cot", 4)
def test_a_row_without_an_answer_is_answered_by_none() -> None:
    silent = Stub(text=lambda prompt, seed: "" if "17" in prompt else reasons(prompt, seed))
    told = asked(SC(m=4), ["17 and 25", "3 and 4"], desk(POOL), silent)
    assert told[0].answer.said is None and told[0].answer.facts["without"] == 4
    assert told[1].answer.said is not None


@pytest.mark.acid("pot", 1, 4)
def test_programs_run_only_where_it_is_said_and_cot_answers_where_they_fail() -> None:
    with pytest.raises(ConfigError, match=r"has not been told to. Say so: --set pot.run=true"):
        PoT().refuse(desk(POOL), [])

    def writes(prompt: str, seed: int) -> str:
        if "# Python" not in prompt.rpartition("Question:")[2]:
            return reasons(prompt, seed)
        a, b = re.findall(r"Question: (\d+) and (\d+)", prompt)[-1]
        return f"```python\nans = {a} + {b}\n```" if a != "3" else "import os\nans = os.getpid()"

    told = asked(PoT(run=True, k=2, program="code"), ["17 and 25", "3 and 4"], desk(POOL), Stub(text=writes))
    assert [one.answer.said for one in told] == ["42", "7"]
    assert told[0].answer.facts == {"program": "ran"} and "importing 'os'" in told[1].answer.note
    assert told[0].prompts[0].count("# Python that computes") == 3 and "ans = " in told[0].prompts[0]


# --- searches. A state is lines of digits; its worth is exact: how near its digits come to 9 each.


def digits(prompt: str) -> list[str]:
    return re.findall(r"(?:^|:)(\d)$", prompt, re.MULTILINE)


def searcher(prompt: str, seed: int) -> str:
    if prompt.endswith("Verdict:"):
        share = sum(map(int, digits(prompt))) / (9 * max(1, len(digits(prompt))))
        return "sure" if share > 0.95 else "likely" if share > 0.4 else "impossible"
    if prompt.endswith("So the answer is"):
        return " " + "".join(digits(prompt))
    return str(seed % 10)


@pytest.mark.acid("tot", 1)
def test_with_exact_values_the_search_by_levels_finds_the_best() -> None:
    machine = Stub(text=searcher)
    way = ToT(b=8, k=40, depth=3, judges=1, calls=2000, think="")
    [told] = asked(way, ["highest digits"], desk(), machine)
    assert told.answer.said == "999"
    assert told.answer.facts["calls"] == len(told.prompts) - 1 > 100, "all but the closing one"
    assert told.answer.facts["states"] <= 10 + 2 * 8 * 10, "a digit that is drawn twice is one state"


@pytest.mark.acid("tot", 2)
@pytest.mark.parametrize("search", ["bfs", "dfs"])
def test_calls_are_counted_and_capped(search: str) -> None:
    machine = Stub(text=searcher)
    [told] = asked(ToT(search=search, b=4, k=4, depth=9, calls=20, threshold=0.0, think=""), ["x"], desk(), machine)
    assert told.answer.facts["calls"] <= 20 and len(machine.requests) <= 21
    assert told.answer.note == "stopped by 20 calls" and told.answer.said is not None


@pytest.mark.acid("tot", 3)
def test_the_search_into_the_depth_takes_the_best_first_and_goes_back() -> None:
    tree = {"": "ab", "a": "cd", "b": "ef", "ac": "gg", "ad": "hh"}  # the k-th draw of a state is its k-th letter
    worth = {"a": "sure", "b": "likely", "ac": "impossible", "ad": "impossible", "be": "sure", "bf": "impossible"}

    class Tree(Stub):
        def write(self, requests, names):  # type: ignore[no-untyped-def]
            self.rounds.append(list(requests))
            return [tuple(self._said(r, n) for n in range(r.n)) for r in requests]

        def _said(self, request, n):  # type: ignore[no-untyped-def]
            from luthier.asking.way import Text

            path = "".join(re.findall(r"(?:^|:)([a-h])$", request.prompt, re.MULTILINE))
            if request.prompt.endswith("Verdict:"):
                return Text(text=worth[path])
            if request.prompt.endswith("So the answer is"):
                return Text(text=f" {path}.")
            return Text(text=tree.get(path, "xy")[n])

    machine = Tree(text=searcher)
    way = ToT(search="dfs", k=2, depth=2, judges=1, threshold=0.25, think="")
    [told] = asked(way, ["x"], desk(), machine)
    grown = ["".join(re.findall(r"(?:^|:)([a-h])$", r.prompt, re.MULTILINE)) for r in machine.requests if r.n == 2]
    assert grown == ["", "a", "b"], "a first, then back to b"
    assert told.prompts[-1].endswith(":b\ne\nSo the answer is")


@pytest.mark.acid("tot", 4)
def test_one_line_at_a_time_is_cot() -> None:
    script = [" First 3.", "Then 4.", "So the answer is 7."]

    def writes(prompt: str, seed: int) -> str:
        have = [line for line in script if line in prompt]
        return "\n".join(script[len(have) :])

    [whole] = asked(CoT(), ["3 and 4"], desk(), Stub(text=writes))
    [steps] = asked(ToT(b=1, k=1, depth=5), ["3 and 4"], desk(), Stub(text=writes))
    assert steps.answer.said == whole.answer.said == "7"
    assert "\n".join(steps.written) == whole.written[0]
    assert not any("Verdict" in prompt for prompt in steps.prompts)


# --- graphs


def sorter(prompt: str, seed: int) -> str:
    """Splits, sorts and merges numbers; what it merges must be sorted already."""
    numbers = [int(n) for n in re.findall(r"numbers: ([\d ]+)", prompt)[0].split()]
    if prompt.startswith("split"):
        n = int(prompt.split()[1])
        size = -(-len(numbers) // n)
        return "\n".join(" ".join(map(str, numbers[i : i + size])) for i in range(0, len(numbers), size))
    if prompt.startswith("sort"):
        return " ".join(sorted(prompt.partition("part: ")[2].split(), key=int))
    if prompt.startswith("merge"):
        parts = [[int(n) for n in line.split()] for line in prompt.partition("parts:\n")[2].split("\n")]
        assert all(part == sorted(part) for part in parts)
        return " ".join(map(str, sorted(n for part in parts for n in part)))
    return prompt.rpartition("\n")[0].rpartition("\n")[2]


def sorting(plan: str) -> object:
    return GoT(
        plan=plan, split="split {n} numbers of {question}", generate="sort {question} part: {thought}",
        aggregate="merge {question} parts:\n{thoughts}", refine="mend {question}\n{thought}\n", think="",
    )  # fmt: skip


@pytest.mark.acid("got", 1, 3)
def test_merge_sort_is_exact_and_its_volume_and_latency_are_told() -> None:
    machine = Stub(text=sorter)
    way = sorting("split 4; generate 1; aggregate 2; aggregate 2")
    [told] = asked(way, ["numbers: 9 3 7 1 8 2 6 4"], desk(), machine)  # type: ignore[arg-type]
    assert told.written[-2] == "1 2 3 4 6 7 8 9"
    assert told.answer.facts == {"thoughts": 11, "volume": 10, "latency": 4}
    assert [len(r) for r in machine.rounds] == [1, 4, 2, 1, 1], "an operation's requests are put together"


@pytest.mark.acid("got", 2)
def test_mending_ends_where_nothing_changes_and_after_so_many_times() -> None:
    def mends(prompt: str, seed: int) -> str:
        if prompt.startswith("mend"):
            number = int(prompt.strip().split("\n")[-1])
            return str(min(number + 1, 5))
        return "3" if prompt.startswith("sort") else " 5"

    def refined(times: int) -> list[str]:
        [told] = asked(sorting(f"generate 1; refine {times}"), ["numbers: 1"], desk(), Stub(text=mends))  # type: ignore[arg-type]
        return [text for text, prompt in zip(told.written, told.prompts, strict=True) if prompt.startswith("mend")]

    assert refined(1) == ["4"] and refined(9) == ["4", "5", "5"], "bounded, and ended by a fixed point"
    with pytest.raises(ConfigError, match=r"'genrate' is no operation.*'generate'"):
        checked_plan("genrate 2", "got")
    with pytest.raises(ConfigError, match="no number from 1 to 100"):
        checked_plan("refine 1000", "got")


@pytest.mark.acid("got", 4)
def test_a_plan_of_steps_and_keeps_is_the_search_by_levels() -> None:
    machines = [Stub(text=searcher), Stub(text=searcher)]
    tree = ToT(b=2, k=4, depth=3, judges=1, think="")
    plan = GoT(plan="step 4; keep 2; step 4; keep 2; step 4; keep 2", judges=1, think="")
    one, other = (asked(w, ["highest digits"], desk(), m)[0] for w, m in zip((tree, plan), machines, strict=True))
    assert one.answer.said == other.answer.said and one.prompts == other.prompts and one.written == other.written


# --- outlines


def outliner(prompt: str, seed: int) -> str:
    if prompt.endswith("Verdict:"):
        return " no" if "sum" in prompt else " yes"
    if "Give only the outline" in prompt:
        return " Light\n2. Water\n3. Air" if "plants" in prompt else " no list at all"
    if "in one or two sentences" in prompt:
        return f" about {re.findall(r'Point (.)', prompt)[0]}"
    return " plain text"


@pytest.mark.acid("sot", 1)
def test_all_points_are_one_round_and_each_is_as_if_alone() -> None:
    machine = Stub(text=outliner)
    [told] = asked(SoT(), ["what do plants need"], desk(), machine)
    assert told.answer.said == "1. Light: about 1\n2. Water: about 2\n3. Air: about 3"
    assert [len(r) for r in machine.rounds] == [1, 1, 3]
    points = machine.rounds[2]
    for request in points:
        assert "about" not in request.prompt and all(p in request.prompt for p in ("Light", "Water", "Air"))
    backwards = machine.write(points[::-1], [(0,)] * 3)[::-1]
    assert backwards == machine.write(points, [(0,)] * 3)


@pytest.mark.acid("sot", 2, 4)
def test_without_a_list_or_where_steps_depend_on_each_other_it_writes_plainly() -> None:
    told = asked(SoT(), ["what is a cat", "what is the sum"], desk(), Stub(text=outliner))
    assert [one.answer.said for one in told] == ["plain text", "plain text"]
    assert "an outline of 1 points" in told[0].answer.note and "points do not fit it" in told[1].answer.note
    with pytest.raises(ConfigError, match="these rows have labels"):
        SoT().refuse(desk(POOL, {"a": "b"}), [query("x")])
