"""Rows that somebody should look at, each with its place, its kind and its text."""

import csv
import io
from pathlib import Path

from luthier.data.load_data import load_data
from luthier.data.problems import MOST, Problem, problems_csv, problems_said
from luthier.runs.spec import DataSpec

ROWS = """text,label
where is it,delivery
Where  is it,delivery
send the bill,invoice
send the bill,refund
,refund
what is this,?
money back,refund
money back now,delivry
"""


def _with_more(path: Path) -> Path:
    more = "".join(f"text number {i},{('delivery', 'invoice', 'refund')[i % 3]}\n" for i in range(120))
    path.write_text(ROWS + more)
    return path


def test_each_kind_of_row_is_listed_with_its_place_and_its_text(tmp_path: Path) -> None:
    path = _with_more(tmp_path / "mail.csv")
    data = load_data(DataSpec(source=str(path)))
    found = {(p.place.rpartition(":")[2], p.kind): (p.text, p.about.replace(f"{path}:", "")) for p in data.problems}
    assert found == {
        ("6", "set aside"): ("", "field 'text' is empty"),
        ("3", "repeated"): ("Where  is it", "first 2"),
        ("5", "repeated"): ("send the bill", "first 4"),
        ("4", "several labels"): ("send the bill", "invoice; of all: invoice 1, refund 1"),
        ("5", "several labels"): ("send the bill", "refund; of all: invoice 1, refund 1"),
        ("7", "label reads like none"): ("what is this", "?"),
        ("9", "label looks like another"): ("money back now", "delivry; larger: delivery 42"),
    }
    assert problems_said(data.problems) == (
        "rows to look at: 1 set aside, 2 repeated, 2 of texts with several labels, 1 with a label that reads like "
        "none, 1 with a label that looks like another"
    )
    assert any("reads like none: '?' 1" in note for note in data.notes)
    rows = list(csv.DictReader(io.StringIO(problems_csv(data.problems).decode())))
    assert list(rows[0]) == ["place", "kind", "text", "about"] and len(rows) == len(data.problems)


def test_a_row_of_test_that_is_also_learnt_says_where(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nred,x\nblue,y\n")
    (tmp_path / "b.csv").write_text("text,label\ngreen,x\nRED,x\n")
    data = load_data(DataSpec(source=str(tmp_path / "a.csv"), test=str(tmp_path / "b.csv")))
    assert data.problems == (Problem(f"{tmp_path}/b.csv:3", "in both halves", "RED", f"also {tmp_path}/a.csv:2"),)


def test_a_clean_file_has_nothing_to_look_at_and_a_long_list_ends_in_a_count(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"row {i},{'xy'[i % 2]}\n" for i in range(20)))
    assert load_data(DataSpec(source=str(tmp_path / "a.csv"))).problems == ()
    many = [Problem(f"a:{i}", "repeated", "t", "first a:1") for i in range(MOST + 3)]
    assert problems_csv(many).decode().splitlines()[-1] == ",,,and 3 more"
