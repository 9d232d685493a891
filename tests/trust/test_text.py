"""F57: text from models and rows is inert wherever it is shown."""
# a table of payloads

import csv
import io
import random
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from luthier.trust import text

PIECES = [
    *(
        "<script>alert(1)</script>",
        "javascript:alert(1)",
        "</textarea>",
        "</style>",
        "<img src=x onerror=alert(1)>",
        "'\"`",
    ),
    *(
        "\x1b[31m",
        "\x1b]8;;http://evil\x07",
        "\x9b31m",
        "\x08",
        "\r",
        "\n",
        "\t",
        "\u202e",
        "\u2066",
        "\u2028",
        "\x00",
        "\x7f",
    ),
    *(
        "=1+1",
        "+cmd|' /C calc'!A0",
        "-1+1",
        "@SUM(A1)",
        "%0A",
        "\t=1",
        " =1",
        "＝1",
        "[x](javascript:y)",
        "![i](http://e)",
    ),
    *(
        "<http://evil>",
        "http://evil.example",
        "www.evil.example",
        "a@evil.example",
        "| a | b |",
        "---",
        "# h",
        "> q",
        "* l",
    ),
    *(
        "1. l",
        "`c`",
        "```",
        "~~~",
        "&lt;",
        "&#60;script&#62;",
        "[^1]",
        "\\",
        "$x$",
        "<!--",
        "]]>",
        "\ud800",
        "é",
        "日本",
    ),
]


def payloads() -> list[str]:
    draw = random.Random(0)
    return PIECES + ["".join(draw.choices(PIECES, k=draw.randint(1, 5))) for _ in range(1000)]


class Walk(HTMLParser):
    """Collects the elements, attributes and text of a page."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(f"{tag} {attrs}")

    def handle_comment(self, data: str) -> None:
        self.tags.append("comment")

    def handle_decl(self, decl: str) -> None:
        self.tags.append("declaration")

    def handle_data(self, data: str) -> None:
        self.text += data


def walk(page: str) -> Walk:
    found = Walk()
    found.feed(page)
    found.close()
    return found


@pytest.mark.fault("F57", "inert")
def test_html_holds_no_element_but_its_own() -> None:
    for payload in payloads():
        safe = text.for_html(payload)
        found = walk(f"<p>{safe}</p>")
        assert found.tags == ["p []"], payload
        assert walk(f'<p title="{safe}"></p>').tags == [f"p [('title', {found.text!r})]"], payload


@pytest.mark.fault("F57", "inert")
def test_a_terminal_gets_no_control_character() -> None:
    for payload in payloads():
        assert text.for_terminal(payload).isprintable(), payload
        assert "\x1b" not in text.for_terminal(payload, keep_lines=True)


@pytest.mark.parametrize("dialect", ["commonmark", "js-default"])
def test_markdown_is_one_paragraph_of_text_and_nothing_else(dialect: str) -> None:
    reader = MarkdownIt(dialect)
    for payload in payloads():
        found = walk(reader.render(f"x{text.for_markdown(payload)}"))
        assert found.tags == ["p []"], (payload, text.for_markdown(payload))


def test_a_markdown_table_keeps_its_cells() -> None:
    reader = MarkdownIt("js-default")
    for payload in payloads():
        page = reader.render(f"| a | b |\n| --- | --- |\n| {text.for_markdown(payload)} | y |\n")
        found = walk(page)
        assert [t.split(" ")[0] for t in found.tags] == [
            "table",
            "thead",
            "tr",
            "th",
            "th",
            "tbody",
            "tr",
            "td",
            "td",
        ], payload


@pytest.mark.fault("F57", "inert")
def test_no_csv_cell_begins_a_formula() -> None:
    for payload in payloads():
        out = io.StringIO()
        csv.writer(out).writerow([text.for_csv(payload), "next"])
        (row,) = csv.reader(io.StringIO(out.getvalue(), newline=""))
        assert len(row) == 2
        first = row[0].lstrip()[:1]
        assert first not in set("=+-@|%＝＋－＠") or row[0].lstrip("+-").replace(".", "").isdigit(), payload


def test_honest_text_is_shown_as_it_is() -> None:
    assert text.for_terminal("naïve 日本 🙂") == "naïve 日本 🙂"
    assert text.for_html("a < b & c") == "a &lt; b &amp; c"
    assert (
        text.for_csv("-3.5") == "-3.5" and text.for_csv("1e-5") == "1e-5" and text.for_csv("hello, you") == "hello, you"
    )
    assert walk(MarkdownIt().render(text.for_markdown("2 * 3 <b> [x] _y_ 1.5"))).text.strip() == "2 * 3 <b> [x] _y_ 1.5"
