"""The page in a real browser: it sorts, filters, asks for nothing, runs nothing hostile, and reads without scripts."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from report.browser import Browser, chromium
from report.planted import plant_comparison

from luthier.comparison import statistics
from luthier.report import gather, write_report

pytestmark = pytest.mark.skipif(chromium() is None, reason="no Chromium is installed here")

HOSTILE = (
    "</td><script>document.title='owned'</script><img src='http://127.0.0.1:9/x' onerror=\"document.title='own'\">"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "DRAWS", 100)
        home = plant_comparison(
            folder / "race", ["lora", "ia3", "bitfit"], rows=120, labels=["LOC", "HUM", "<img src=x onerror=alert(1)>"],
            text=lambda i: f"{HOSTILE} moon" if i % 3 else "what is the sun",
        )  # fmt: skip
    return write_report(gather([home]), folder / "report.html")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


def shown(browser: Browser, column: int, table: str = "#methods table") -> list[str]:
    """The texts of one column."""
    script = f"[...document.querySelector({table!r}).tBodies[0].rows].map(r => r.cells[{column}].textContent)"
    found: list[str] = browser.run(script)
    return found


def test_nothing_is_asked_for_nothing_hostile_runs_and_the_console_is_silent(browser: Browser, page: Path) -> None:
    browser.look(1200)
    browser.open(page)
    assert set(browser.requests) == {page.as_uri()}
    assert browser.said == []
    assert browser.run("document.title").endswith("luthier report")
    assert browser.run("document.images.length") == 0 and browser.run("document.scripts.length") == 2
    assert HOSTILE in browser.run("document.querySelector('#rows').textContent")
    # The policy itself: a script, a style and a picture that somehow came in would still do nothing.
    browser.run(
        "const s = document.createElement('script'); s.textContent = \"document.title='own'\"; document.body.append(s);"
        "const i = new Image(); i.src = 'http://127.0.0.1:9/y.png'; document.body.append(i);"
    )
    assert browser.run("document.title").endswith("luthier report")
    assert len([said for said in browser.said if "Content Security Policy" in said]) >= 2
    browser.said.clear()


def test_a_table_is_sorted_by_its_numbers_with_the_keyboard_alone(browser: Browser, page: Path) -> None:
    browser.look(1200)
    browser.open(page)
    browser.run("document.querySelectorAll('#methods thead th')[1].querySelector('button').focus()")
    browser.press("Enter", "Enter", 13, "\r")
    scores = [float(text) for text in shown(browser, 1)]
    assert scores == sorted(scores) and len(scores) == 4
    head = "document.querySelectorAll('#methods thead th')[1].getAttribute('aria-sort')"
    assert browser.run(head) == "ascending"
    browser.press(" ", "Space", 32, " ")
    assert [float(text) for text in shown(browser, 1)] == sorted(scores, reverse=True)
    assert browser.run(head) == "descending"
    trained = "document.querySelectorAll('#all-runs thead th')[0].querySelector('button').click()"
    browser.run(trained)
    names = shown(browser, 0, "#all-runs table")
    assert names == sorted(names)


def test_rows_are_filtered_by_words_and_by_the_run_that_is_wrong(browser: Browser, page: Path) -> None:
    browser.look(1200)
    browser.open(page)
    seen = "[...document.querySelectorAll('#rows tbody tr')].filter(r => r.checkVisibility()).length"
    every = browser.run(seen)
    assert browser.run("document.querySelector('#rows output').textContent") == f"{every} rows"
    browser.run("document.querySelector('#words').focus()")
    for letter in "sun":
        browser.press(letter, f"Key{letter.upper()}", ord(letter.upper()), letter)
    some = browser.run(seen)
    assert 0 < some < every
    assert browser.run("document.querySelector('#rows output').textContent") == f"{some} rows"
    browser.run(
        "const w = document.querySelector('#which'); w.value = w.options[1].value;w.dispatchEvent(new Event('change'))"
    )
    assert browser.run(seen) < some
    assert all(shown(browser, 2, "#rows table"))


def test_it_reads_without_scripts_in_the_dark_on_a_phone_and_on_paper(browser: Browser, page: Path) -> None:
    browser.look(1200, script=False)
    browser.open(page)
    browser.look(1200, script=True)
    assert browser.run("document.querySelectorAll('button, input, select').length") == 0, "nothing that does nothing"
    assert browser.run("document.querySelectorAll('table').length") >= 6
    paper = browser.run("getComputedStyle(document.body).backgroundColor")
    browser.look(1200, dark=True)
    browser.open(page)
    assert browser.run("getComputedStyle(document.body).backgroundColor") != paper
    browser.look(390)
    browser.open(page)
    assert browser.run("document.documentElement.scrollWidth") <= 390, "only tables scroll sideways"
    printed = browser.tell("Page.printToPDF")["data"]
    assert len(printed) > 20_000


def test_what_a_screen_reader_is_told(browser: Browser, page: Path) -> None:
    browser.look(1200)
    browser.open(page)
    nodes = browser.tell("Accessibility.getFullAXTree")["nodes"]
    told = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n.get("ignored")]
    roles = [role for role, _ in told]
    assert {"main", "navigation", "heading", "table", "columnheader", "rowheader"} <= set(roles)
    pictures = [name for role, name in told if role in ("image", "img", "graphics-document", "Image", "SvgRoot")]
    assert len(pictures) >= 8 and all(pictures), "every chart has a name"
    assert all(name for role, name in told if role in ("button", "searchbox", "combobox", "link", "region"))
