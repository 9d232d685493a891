"""The page: what it says, how large it is, that what is hostile stays inert, and what it says of runs that are gone."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report.planted import plant_comparison, plant_run

from luthier.cli._main import main
from luthier.comparison import statistics
from luthier.core import ConfigError
from luthier.report import as_csv, as_markdown, gather, page_of, write_report
from luthier.report.page import MOST_BYTES


@pytest.fixture(autouse=True)
def _fewer_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "DRAWS", 100)


EMPTY = {"meta", "br", "path", "rect", "polyline", "use"}


class Reader(HTMLParser):
    """Which elements with which attributes a page has; complains where one is not closed."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def numbers_of(page: str) -> Any:
    match = re.search(r'<script type="application/json" id="numbers">(.*?)</script>', page, re.DOTALL)
    assert match is not None
    return json.loads(match[1])


def test_twenty_runs_fit_and_every_number_names_its_run(tmp_path: Path) -> None:
    methods = ["full", "bitfit", "ia3", "lora", "lora:rank=64"]
    home = plant_comparison(
        tmp_path / "race", methods, seeds=4, rows=1500, labels=[f"class-{i:02d}" for i in range(40)]
    )
    story = gather([home])
    page = page_of(story)
    assert len(story.runs) == 20
    assert len(page.encode()) <= MOST_BYTES == 300_000
    assert page == page_of(gather([home])), "the same folders give the same bytes"
    told = numbers_of(page)
    assert [run["name"] for run in told["runs"]] == [run.name for run in story.runs]
    assert all(run["scores"]["accuracy"] and run["loss_by_step"] and run["memory"] for run in told["runs"])
    assert {name for m in told["methods"] for name in m["runs"]} == {run.name for run in story.runs}
    assert re.search(r"The first \d+ stand here; predictions\.csv of each run has all\.", page)
    ids = [told.get("id") for _, told in read(page).elements if told.get("id")]
    assert len(ids) == len(set(ids))
    links = {told["href"] for tag, told in read(page).elements if tag in ("a", "use") and told.get("href")}
    assert all(link is not None and link[1:] in ids for link in links), "every link leads into the page"


def test_the_page_has_words_first_then_tables_then_charts_that_say_what_they_show(tmp_path: Path) -> None:
    home = plant_comparison(tmp_path / "race", ["lora", "ia3"], failed={"full": "too large"})
    page = page_of(gather([home]))
    reader = read(page)
    assert page.index('class="findings"') < page.index("<table") < page.index("<svg")
    drawn = [told for tag, told in reader.elements if tag == "svg"]
    assert len(drawn) >= 9
    for told in drawn:
        title, says = str(told["aria-labelledby"]).split()
        assert re.search(f'<title id="{title}">[^<]+</title><desc id="{says}">[^<]+</desc>', page)
    assert "full has no result: too large" in page and ">failed</td>" in page
    heads = [told for tag, told in reader.elements if tag == "th"]
    assert heads and all(told.get("scope") in ("row", "col") for told in heads)
    assert "luthier compare sample:minilm-l6 --data sample:trec6 --method lora,ia3,full --steps 200 --seeds 2" in page
    assert not [told for _, told in reader.elements if "style" in told or any(name.startswith("on") for name in told)]


def test_a_single_run_has_a_page(tmp_path: Path) -> None:
    run = plant_run(
        tmp_path / "one", method="lora", seed=3, texts=["a b", "c d", "e f"], wanted=["x", "y", "y"],
        said=["x", "x", "y"], changed={"settings": {"rank": 4}},
    )  # fmt: skip
    page = page_of(gather([run]))
    read(page)
    assert "accuracy 0.667 (0.647 to 0.687) on 3 held-out rows" in page
    assert "luthier train sample:minilm-l6 --data sample:trec6 --method lora --steps 200 --seed 3 --set rank=4" in page
    assert "c d" in page and "Rows answered wrongly" in page


HOSTILE = [
    "<script>document.title='owned'</script>", "<img src=x onerror=alert(1)>", '"><svg onload=alert(1)>',
    "</script><script>alert(1)</script>", "</style><b>", "<!-- <script>", "javascript:alert(1)", "=HYPERLINK(\"x\")",
    "\u202egnp.exe", "\x00\x1b[31m", "' onmouseover='alert(1)", "&lt;b&gt; &amp;", "]]>", "`rm -rf`", "|a|b|", "\ud800",
]  # fmt: skip


def test_hostile_labels_texts_and_names_are_inert(tmp_path: Path) -> None:
    labels = [*HOSTILE[:9], *HOSTILE[10:15]]
    home = plant_comparison(
        tmp_path / "race", ["lora", "<b>ia3</b>"], rows=400, labels=labels, text=lambda i: HOSTILE[i % 15] * 2,
        failed={"</title><script>": "<script>alert(2)</script>"},
    )  # fmt: skip
    story = gather([home])
    page = page_of(story)
    reader = read(page)
    assert [told.get("type") for tag, told in reader.elements if tag == "script"] == ["application/json", None]
    tags = {tag for tag, _ in reader.elements}
    assert not tags & {"img", "iframe", "object", "embed", "link", "base", "form"}
    for _, told in reader.elements:
        assert not any(name.startswith("on") for name in told)
        assert str(told.get("href", "#")).startswith("#")
    assert not any(c in page for c in "\x00\x1b\u202e")
    assert numbers_of(page)["methods"][1]["name"] == "<b>ia3</b>"
    text = "\n".join(line for line in as_markdown(story).splitlines() if not line.startswith("    luthier"))  # code
    assert "<script" not in text and "<b>" not in text
    assert "\n'=HYPERLINK" not in text
    sheet = as_csv(story)
    assert not re.search(r"(^|[,\n])[=@]", sheet)


def test_a_run_that_is_gone_is_a_row_that_says_so(tmp_path: Path) -> None:
    home = plant_comparison(tmp_path / "race", ["lora", "ia3"])
    gone, broken, cut = sorted((home / "cells").iterdir())[:3]
    shutil.rmtree(gone)
    (broken / "record.json").write_text("{")
    (cut / "predictions.csv").write_bytes(b"\xff\xfe")
    story = gather([home])
    states = {run.name: run.state for run in story.runs}
    assert (states[gone.name], states[broken.name]) == ("deleted", "unreadable")
    page = page_of(story)
    assert "deleted: its folder is not there any more" in page and "is no record of a run" in page
    assert "2 runs of 4 cannot be read any more" in page
    assert "has the highest accuracy" in page, "what the comparison found stands"
    rows = as_csv(story).splitlines()
    assert len(rows) == 5 and sum("deleted" in row for row in rows) == 1


@pytest.mark.parametrize(
    ("last", "state", "says"),
    [
        ({"event": "diverged", "step": 7, "reason": "loss nan"}, "diverged", "numbers went wrong at step 7: loss nan"),
        ({"event": "interrupted", "step": 9, "signal": 2}, "stopped", "interrupted at step 9; go on: luthier resume"),
        ({"event": "created"}, "unfinished", "go on: luthier resume"),
    ],
)
def test_a_run_without_a_result_says_what_became_of_it(tmp_path: Path, last: Any, state: str, says: str) -> None:
    run = plant_run(tmp_path / "one", method="lora", seed=0, texts=["a"], wanted=["x"], said=["x"])
    (run / "record.json").unlink()
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps(last) + "\n")
    (found,) = gather([run]).runs
    assert (found.state, found.finished) == (state, False) and says in found.why
    assert found.steps, "what it learnt until then is drawn"
    assert "This run has no result" in page_of(gather([run]))


def test_runs_on_the_same_rows_are_judged_and_others_are_only_listed(tmp_path: Path) -> None:
    texts, wanted = [chr(97 + i % 26) * (1 + i // 26) for i in range(60)], ["x", "y", "z"] * 20
    for method, wrong in (("lora", 2), ("ia3", 30)):
        said = ["z" if i < wrong else w for i, w in enumerate(wanted)]
        plant_run(tmp_path / "same" / method, method=method, seed=0, texts=texts, wanted=wanted, said=said)
    story = gather([tmp_path / "same"])
    assert story.comparison is not None and story.findings[0].startswith("lora has the highest accuracy")
    plant_run(tmp_path / "other" / "full", method="full", seed=0, texts=["a"], wanted=["x"], said=["x"])
    mixed = gather([tmp_path / "same", tmp_path / "other"])
    assert mixed.comparison is None and mixed.findings[0].startswith("These runs are listed, not compared")
    read(page_of(mixed))


def test_runs_of_one_method_are_told_apart_by_their_settings(tmp_path: Path) -> None:
    for rank in (4, 16):
        plant_run(
            tmp_path / f"r{rank}", method="lora", seed=0, texts=["a", "b"], wanted=["x", "y"], said=["x", "y"],
            changed={"settings": {"rank": rank}},
        )  # fmt: skip
    assert gather([tmp_path]).methods == ["lora:rank=16", "lora:rank=4"] or gather([tmp_path]).methods == [
        "lora:rank=4", "lora:rank=16",
    ]  # fmt: skip


def test_nothing_of_ours_is_written_over_and_no_folder_without_runs_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = plant_run(tmp_path / "one", method="lora", seed=0, texts=["a"], wanted=["x"], said=["x"])
    assert main(["report", "one"]) == 0
    first = Path("report.html").read_bytes()
    assert main(["report", "one", "--out", "report.html"]) == 0, "a page of ours is made anew"
    assert Path("report.html").read_bytes() == first
    Path("mine.html").write_text("<p>mine")
    assert main(["report", "one", "--out", "mine.html"]) == 2 or Path("mine.html").read_text() == "<p>mine"
    assert "no page of a report" in capfd.readouterr().err
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no run is in it"):
        gather([tmp_path / "empty"])
    with pytest.raises(ConfigError, match="is no folder"):
        gather([run / "run.json"])
    assert main(["report", "one", "--out", "x.docx"]) == 2
    assert main(["report", "one", "--format", "pdf"]) == 2
    capfd.readouterr()
    assert main(["report", "one", "--format", "csv"]) == 0
    assert capfd.readouterr().out.startswith("run,method,seed,state,why,model,data,accuracy")


def test_a_sheet_of_parquet_has_a_row_for_each_run(tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    home = plant_comparison(tmp_path / "race", ["lora", "ia3"])
    write_report(gather([home]), tmp_path / "all.parquet")
    table = pq.read_table(tmp_path / "all.parquet").to_pydict()
    assert len(table["run"]) == 4 and table["peak_bytes"][0] == 854_016_000


def test_a_comparison_that_is_not_finished_says_so(tmp_path: Path) -> None:
    home = plant_comparison(tmp_path / "race", ["lora", "ia3"])
    (home / "comparison.json").unlink()
    story = gather([home])
    assert story.comparison is None and "has no result yet" in story.findings[0]
    (home / "comparison.json").write_text("{}")
    with pytest.raises(ConfigError, match="no comparison that this version reads"):
        gather([home])


def test_a_cross_validation_says_its_mean_and_lists_its_folds(tmp_path: Path) -> None:
    for fold in (1, 2):
        texts, wanted = [f"{'abc'[fold]} one", "two"], ["x", "y"]
        plant_run(tmp_path / f"fold-{fold}", method="lora", seed=0, texts=texts, wanted=wanted, said=wanted)
    told = {"folds": 2, "scores": [{"accuracy": 0.5}, {"accuracy": 1.0}], "mean": {"accuracy": 0.75}, "final": "final"}
    (tmp_path / "cv.json").write_text(json.dumps(told))
    story = gather([tmp_path])
    assert story.findings[0].startswith("accuracy 0.750 on average over 2 folds, from 0.500 to 1.000")
    assert story.comparison is None and [run.name for run in story.runs] == ["fold-1", "fold-2"]
    read(page_of(story))
    (tmp_path / "cv.json").write_text(json.dumps({"folds": 2}))
    assert gather([tmp_path]).findings == ("This cross-validation has no result yet: `luthier resume` goes on.",)
