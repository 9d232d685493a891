import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier.core import DataError
from luthier.samples.parsers import PARSERS, Parsed

Read = Callable[..., Parsed]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Parse texts as if they were members: read("trec6", {"a.txt": "..."})."""

    def parse(parser: str, texts: dict[str, str | bytes]) -> Parsed:
        members = {}
        for number, (name, text) in enumerate(texts.items()):
            members[name] = tmp_path / f"member-{number}"
            members[name].write_bytes(text if isinstance(text, bytes) else text.encode())
        return PARSERS[parser](members)

    return parse


def lines(*values: Any) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def test_trec6_keeps_the_coarse_label(read: Read) -> None:
    parsed = read("trec6", {"q.txt": "DESC:def What is  a fife ?\n\nNUM:date When ?\n"})
    assert parsed.rows == [{"text": "What is  a fife ?", "label": "DESC"}, {"text": "When ?", "label": "NUM"}]


@pytest.mark.parametrize("line", ["no label here", "DESC What ?", "DESC:def ", ":def What ?"])
def test_trec6_names_the_line_it_cannot_read(read: Read, line: str) -> None:
    with pytest.raises(DataError, match=r"q\.txt:2: expected"):
        read("trec6", {"q.txt": f"NUM:date When ?\n{line}\n"})


def test_a_wrong_encoding_is_named_with_its_byte(read: Read) -> None:
    with pytest.raises(DataError, match=r"q\.txt: byte 11 is not UTF-8"):
        read("trec6", {"q.txt": b"A:b hello x\xff\n"})


def test_sms_spam_reads_quoted_line_ends(read: Read) -> None:
    parsed = read("sms_spam", {"s.csv": ',spam,text\n0,0,"one, ""two""\nthree"\n1,1,win &amp; go\n'})
    assert parsed.rows == [{"text": 'one, "two"\nthree', "label": "ham"}, {"text": "win &amp; go", "label": "spam"}]
    with pytest.raises(DataError, match=r"s\.csv:2"):
        read("sms_spam", {"s.csv": ",spam,text\n0,maybe,hello\n"})


def test_movie_snippets_label_by_sign_and_count_the_neutral(read: Read) -> None:
    parsed = read("movie_snippets", {"m.txt": "id\tsentiment\ttext\r\n1\t2.5\tGood\r\n2\t-0.1\tBad\r\n3\t0.0\tMeh\r\n"})
    assert parsed.rows == [{"text": "Good", "label": "positive"}, {"text": "Bad", "label": "negative"}]
    assert parsed.left_out == {"mean rating is exactly 0": 1}
    with pytest.raises(DataError, match=r"m\.txt:2: expected a number"):
        read("movie_snippets", {"m.txt": "id\tsentiment\ttext\n1\tgood\tGood\n"})


def test_sarcasm_reads_the_users_message(read: Read) -> None:
    chat = [{"role": "system", "content": "say"}, {"role": "user", "content": "area man"}]
    assert read("sarcasm", {"s": lines({"input": chat, "ideal": "1"})}).rows == [
        {"text": "area man", "label": "sarcastic"}
    ]
    with pytest.raises(DataError, match="s:1"):
        read("sarcasm", {"s": lines({"input": chat, "ideal": "2"})})
    with pytest.raises(DataError, match="s:1: not JSON"):
        read("sarcasm", {"s": "{"})


def test_orange_files_keep_their_halves(read: Read) -> None:
    head = "Category\tText\nd\tstring\nclass\t\n"
    parsed = read("tab_halves", {"x-train.tab": f"{head}earn\tone \n", "x-test.tab": f"{head}acq\ttwo\n"})
    assert parsed.rows == [{"text": "one ", "label": "earn"}]
    assert parsed.test == [{"text": "two", "label": "acq"}]
    with pytest.raises(DataError, match="three header lines"):
        read("tab_halves", {"x-train.tab": "earn\tone\n", "x-test.tab": head})


def test_chitchat_joins_turns_and_leaves_out_short_and_lonely_talks(read: Read) -> None:
    def says(sender: str, *texts: str) -> list[dict[str, str]]:
        return [{"sender": sender, "text": text} for text in texts]

    talk = [
        says("a", "Hi", "you there?"),
        says("b", "Yes"),
        says("a", " "),
        says("b", "So?"),
        says("a", "k"),
        says("b", "y"),
    ]
    parsed = read(
        "chitchat",
        {
            "d.json": json.dumps(
                {
                    "1": {"messages": talk},
                    "2": {"messages": [says("a", "Hi")]},
                    "3": {"messages": [says("a", "Hi"), says("b", "Hi"), says("a", "Bye")]},
                }
            )
        },
    )
    assert parsed.rows == [
        {
            "messages": [
                {"role": "user", "content": "Hi\nyou there?"},
                {"role": "assistant", "content": "Yes\nSo?"},
                {"role": "user", "content": "k"},
                {"role": "assistant", "content": "y"},
            ]
        }
    ]
    assert parsed.left_out == {"fewer than two speakers": 1, "fewer than four turns": 1}


def test_chatterbot_takes_the_first_two_lines_and_guesses_nothing(read: Read) -> None:
    parsed = read("chatterbot", {"a.yml": "conversations:\n- - What?\n  - This.\n  - Or that.\n- stray text\n"})
    assert parsed.rows == [
        {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "This."}]}
    ]
    assert parsed.left_out == {"not a question and an answer": 1}
    with pytest.raises(DataError, match=r"a\.yml"):
        read("chatterbot", {"a.yml": "categories: [x]\n"})


def test_chatterbot_yaml_cannot_make_objects(read: Read) -> None:
    with pytest.raises(DataError, match="expected YAML"):
        read("chatterbot", {"a.yml": "conversations: !!python/object/apply:os.getcwd []\n"})


def test_nq_open_answers_with_the_first(read: Read) -> None:
    parsed = read("nq_open", {"n": lines({"question": "who", "answer": ["A", "B"]})})
    assert parsed.rows == [{"prompt": "who", "response": "A", "answers": ["A", "B"]}]
    with pytest.raises(DataError, match="n:1: expected a list of answers"):
        read("nq_open", {"n": lines({"question": "who", "answer": []})})


def test_pairs_name_their_source(read: Read) -> None:
    row = {"question": "is it", "passage": "it is", "context": "we sell it", "answer": "True"}
    boolq = read("boolq", {"b": lines(row)})
    assert boolq.rows == [{"text": "is it", "text_pair": "it is", "label": "True"}]
    assert boolq.source is not None and boolq.source(boolq.rows[0]) == "it is"
    policy = read("privacy_policy", {"p": lines(row)})
    assert policy.rows[0]["text_pair"] == "we sell it"
    assert policy.source is not None and policy.source(policy.rows[0]) == "is it"
    with pytest.raises(DataError, match="b:1: expected the answer"):
        read("boolq", {"b": lines({**row, "answer": None})})


def test_multiple_choice_finds_the_marked_place(read: Read) -> None:
    row = {"question": "Why?", "options": "\nA. this\nB. that ", "answer": "B. that "}
    assert read("multiple_choice", {"m": lines(row)}).rows == [
        {
            "prompt": "Why?\nA. this\nB. that",
            "response": "B. that",
            "question": "Why?",
            "choices": ["this", "that"],
            "answer": 1,
        }
    ]


@pytest.mark.parametrize(
    "question, options, answer",
    [
        ("Where", "\nA. here\nB. there?", "B. there"),
        ("Where?", "\nA. here\nB. there", "B. there"),
        ("Where?\nA. here", "\nB. there", "B. there"),
    ],
)
def test_misplaced_options_and_marks_are_put_right(read: Read, question: str, options: str, answer: str) -> None:
    (row,) = read("multiple_choice", {"m": lines({"question": question, "options": options, "answer": answer})}).rows
    assert (row["question"], row["choices"], row["answer"]) == ("Where?", ["here", "there"], 1)


@pytest.mark.parametrize("options, answer", [("A. x\nB. y", "C. z"), ("A. x\nC. y", "A. x"), ("A. x\nB. y", "A. y")])
def test_options_that_do_not_fit_the_answer_are_refused(read: Read, options: str, answer: str) -> None:
    with pytest.raises(DataError, match="m:1"):
        read("multiple_choice", {"m": lines({"question": "Why?", "options": options, "answer": answer})})


def test_a_marked_option_is_chosen_over_each_other_one(read: Read) -> None:
    row = {"passage": "Ann fell.", "question": "Feels?", "options": "A. sad\nB. glad\nC. odd", "answer": "A. sad"}
    parsed = read("marked_preference", {"s": lines(row)})
    assert parsed.rows == [
        {"prompt": "Ann fell.\nFeels?", "chosen": "sad", "rejected": wrong} for wrong in ("glad", "odd")
    ]
    assert parsed.source is not None and {parsed.source(row) for row in parsed.rows} == {"Ann fell."}
    twice = read("marked_preference", {"s": lines({**row, "options": "A. sad\nB. sad\nC. odd"})})
    assert [r["rejected"] for r in twice.rows] == ["odd"] and twice.left_out == {"both options are one text": 1}


def test_plays_become_passages_that_lose_no_line(read: Read) -> None:
    text = "\n\n".join(f"Speaker {n}. " + "word " * 60 for n in range(9))
    parsed = read("plays", {"t/lear_gut.txt": text})
    assert all(len(row["text"]) >= 1000 for row in parsed.rows[:-1])
    assert {row["work"] for row in parsed.rows} == {"lear"}
    assert "\n\n".join(row["text"] for row in parsed.rows).split() == text.split()
