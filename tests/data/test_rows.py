import json
import subprocess
import sys

import pytest
from word_tables import table

from luthier.core import BadInput, DataError, UnknownName
from luthier.data.columns import Columns, find_columns
from luthier.data.problems import find_problems
from luthier.data.rows import count_duplicates, fold_of, load_rows, normalised, split_rows
from luthier.data.rows import rows_of as rows_of_data
from luthier.data.tasks import Task
from luthier.runs.spec import DataSpec

LABELLED = Columns(shape="labelled", text="text", label="label")


def rows_of(n, classes=3, copies=1):
    return table([{"text": f"text {i}", "label": f"c{i % classes}"} for i in range(n) for _ in range(copies)])


def texts(part):
    return [row["text"] for row in part.rows]


def test_a_split_holds_out_the_share_of_each_class():
    train, test = split_rows(rows_of(300), 0.2, 0, LABELLED.content, LABELLED.outcome)
    assert sorted(texts(train) + texts(test)) == sorted(texts(rows_of(300)))
    assert [sum(r["label"] == f"c{c}" for r in test.rows) for c in range(3)] == [20, 20, 20]
    assert test.places[0].startswith("rows.csv:")


def test_a_split_follows_from_content_and_seed_not_from_the_order():
    forward = rows_of(100)
    backward = forward.take(range(99, -1, -1))
    halves = [set(texts(split_rows(t, 0.3, 1, LABELLED.content, LABELLED.outcome)[1])) for t in (forward, backward)]
    assert halves[0] == halves[1]
    assert halves[0] != set(texts(split_rows(forward, 0.3, 2, LABELLED.content, LABELLED.outcome)[1]))


def test_repeated_rows_stay_on_one_side():
    data = rows_of(60, copies=3)
    train, test = split_rows(data, 0.25, 0, LABELLED.content, LABELLED.outcome)
    assert not set(texts(train)) & set(texts(test))
    found = count_duplicates(train, test, LABELLED.content, LABELLED.outcome)
    assert found.across == 0
    assert found.in_train + found.in_test == 120


def test_a_rare_class_stays_in_training():
    data = table([{"text": f"t{i}", "label": "common"} for i in range(20)] + [{"text": "x", "label": "rare"}])
    train, test = split_rows(data, 0.4, 0, LABELLED.content, LABELLED.outcome)
    assert "rare" in {r["label"] for r in train.rows}
    assert len(test) == 8


def test_too_few_rows_to_hold_any_out_is_said():
    with pytest.raises(DataError, match=r"rows\.csv: 1 different rows .* too few to hold out 20%.*--test"):
        split_rows(rows_of(1), 0.2, 0, LABELLED.content)
    train, test = split_rows(rows_of(1), 0, 0, LABELLED.content)
    assert (len(train), test) == (1, None)


def test_duplicates_are_counted_within_and_across_whatever_case_and_blanks():
    train = table([{"text": t, "label": "a"} for t in ("How far?", "how  far? ", "Why", "tall")], "train.csv")
    test = table([{"text": t, "label": "b"} for t in ("WHY", "why", "new")], "test.csv")
    found = count_duplicates(train, test, LABELLED.content, LABELLED.outcome)
    assert (found.in_train, found.in_test, found.across, found.conflicts) == (1, 1, 2, 1)
    assert found.examples == (("train.csv:4", "test.csv:2"), ("train.csv:4", "test.csv:3"))
    assert "2 of test also in train (such as test.csv:2 = train.csv:4)" in found.sentence()
    with pytest.raises(DataError, match=r"2 rows of the test half.*test\.csv:2 = train\.csv:4"):
        found.refuse_leakage()
    count_duplicates(train, None, LABELLED.content).refuse_leakage()


def test_pairs_are_the_same_only_when_both_texts_are():
    columns = Columns(shape="labelled", text="a", pair="b", label="l")
    data = table([{"a": "x", "b": "y", "l": 1}, {"a": "x", "b": "z", "l": 1}, {"a": "xy", "b": "", "l": 1}])
    assert count_duplicates(data, None, columns.content).in_train == 0


def test_normalised_is_alike_for_lists_and_unicode_forms():
    assert normalised("cafe\u0301") == normalised("CAFÉ")
    assert normalised([{"b": 1, "a": "X"}]) == normalised([{"a": "x", "b": 1}])


def test_the_fingerprint_changes_with_any_value_and_with_the_order():
    data = rows_of(5)
    changed = table([dict(r) for r in data.rows])
    assert data.fingerprint() == changed.fingerprint()
    changed = table([{**r, "label": "other"} if i == 3 else r for i, r in enumerate(data.rows)])
    assert data.fingerprint() != changed.fingerprint()
    assert data.fingerprint() != data.take([1, 0, 2, 3, 4]).fingerprint()


def test_rows_come_from_every_kind_of_file(tmp_path):
    import pyarrow
    import pyarrow.parquet

    wanted = [{"text": "how far, is it", "label": "a"}, {"text": "why", "label": "b"}]
    (tmp_path / "a.csv").write_text('text,label\n"how far, is it",a\nwhy,b\n', encoding="utf-8")
    (tmp_path / "a.tsv").write_text("text\tlabel\nhow far, is it\ta\nwhy\tb\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in wanted), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(wanted), tmp_path / "a.parquet")
    for name in ("a.csv", "a.tsv", "a.jsonl", "a.parquet"):
        found, test = load_rows(str(tmp_path / name))
        assert found.rows == wanted, name
        assert test is None
    assert load_rows(str(tmp_path / "a.csv"))[0].places[1].endswith("a.csv:3")
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "b.txt").write_text("second", encoding="utf-8")
    (folder / "a.txt").write_text("first", encoding="utf-8")
    found, _ = load_rows(str(folder))
    assert [r["text"] for r in found.rows] == ["first", "second"]
    assert find_columns(found, DataSpec(source="x")).shape == "plain"


def test_a_sample_brings_its_own_halves(monkeypatch):
    from luthier import samples

    class Loaded:
        train = [{"text": "a", "label": "x"}]  # noqa: RUF012
        test = [{"text": "b", "label": "x"}]  # noqa: RUF012

    monkeypatch.setattr(samples, "load_sample", lambda name: Loaded if name == "trec6" else None)
    train, test = load_rows("sample:trec6")
    assert (train.rows, test.rows) == (Loaded.train, Loaded.test)
    assert test.places == ["sample:trec6[test]:1"]


def test_an_unknown_sample_is_answered_with_near_names():
    with pytest.raises(UnknownName, match="trec6"):
        load_rows("sample:trec")


def test_a_missing_file_is_answered_with_near_names(tmp_path):
    (tmp_path / "questions.csv").write_text("text\na\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"question\.csv: no such file. Did you mean 'questions\.csv'"):
        load_rows(str(tmp_path / "question.csv"))
    with pytest.raises(DataError, match=r"The folder .*nowhere does not exist"):
        load_rows(str(tmp_path / "nowhere" / "x.csv"))
    with pytest.raises(BadInput):
        load_rows("./questions.json")


def test_a_hub_name_that_cannot_be_loaded_is_explained(monkeypatch):
    import datasets

    def unreachable(name, config):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"'someone/questions' is no file here.*no route to host.*luthier samples"):
        load_rows("someone/questions")


def test_a_hub_data_set_brings_label_names_and_its_test_half(monkeypatch):
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    halves = datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features),
            "validation": datasets.Dataset.from_dict({"text": ["c"], "label": [1]}, features=features),
        }
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: halves)
    train, test = load_rows("someone/reviews")
    assert train.rows == [{"text": "a", "label": "good"}, {"text": "b", "label": "bad"}]
    assert test.rows == [{"text": "c", "label": "good"}]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: {"test": halves["train"]})
    with pytest.raises(DataError, match="no 'train'"):
        load_rows("someone/reviews")


def test_reading_rows_imports_no_data_set_library():
    code = "import sys, luthier.data.rows; print('datasets' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (3, "data: int is no table"),
        ("a,b", "data: str is no table"),
        ([], "data: holds no rows"),
        ([{"text": "a"}, ["b"]], r"data\[1\]: list is no row"),
    ],
)
def test_rows_in_memory_are_a_list_of_dictionaries_or_refused(given, said):
    with pytest.raises(DataError, match=said):
        rows_of_data(given)
    held = [{"text": "a"}, {"text": "b"}]
    rows = rows_of_data(held)
    assert rows == held and all(new is not old for new, old in zip(rows, held, strict=True))


def test_folds_need_as_many_contents_as_there_are_folds():
    some = rows_of(4)
    assert sorted(i for n in (1, 2, 3, 4) for i in fold_of(some, n, 4, 0, LABELLED.content)) == [0, 1, 2, 3]
    with pytest.raises(DataError, match=r"rows\.csv: 4 different rows .* too few for 5 folds"):
        fold_of(some, 1, 5, 0, LABELLED.content)


def test_pairs_of_one_prompt_are_no_copies_of_each_other(tmp_path):
    """A prompt has many pairs: they stay in one half, and only a pair that comes again is a repeated row."""
    path = tmp_path / "pairs.csv"
    pairs = ["ask,good,bad", "ask,good,worse", "other,fine,poor", "ask,good,bad"]
    path.write_text("\n".join(["prompt,chosen,rejected", *pairs]) + "\n")
    table, _ = load_rows(str(path))
    columns = find_columns(table, DataSpec(source=str(path)))
    assert count_duplicates(table, None, columns.content, columns.outcome, columns.whole).in_train == 1
    (found,) = find_problems(table, None, (), columns, Task(name="preference"), any_twice=True)
    assert (found.place, found.about) == (table.places[3], f"first {table.places[0]}")
    assert count_duplicates(table, table.take([1]), columns.content, columns.outcome, columns.whole).across == 1
