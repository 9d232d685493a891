"""The site's made pages: equations as mathematics, drawings from the edits, and a place for every page.

`make docs-site` builds the whole with mkdocs, which the quick tests do not need.
"""

import re
from pathlib import Path
from xml.etree import ElementTree

import drawing
import equations
import pages
import pytest
import yaml

from luthier.cli._main import verbs
from luthier.surgery import METHODS

ROOT = Path(__file__).resolve().parents[2]
EVERY = METHODS.names()
GENERATED = {
    "index.md",
    "examples.md",
    "cli.md",
    "strategies/index.md",
    "decisions/index.md",
    "contributing.md",
    "security.md",
    "changelog.md",
}


def test_an_equation_is_read_as_mathematics() -> None:
    html = equations.mathml(["y = x W^T + b_q <- alpha * 2          A: (rank, d_in)    a: drawn anew at every pass"])
    assert "<msup><mi>W</mi><mi>T</mi></msup>" in html and "<msub><mi>b</mi><mi>q</mi></msub>" in html
    assert "<mo>←</mo><mi>α</mi><mo>⊙</mo><mn>2</mn>" in html
    assert "<span>drawn anew at every pass</span>" in html, "words stay words"
    assert "<msub><mi>d</mi><mi>in</mi></msub>" in html.partition("where")[2]


@pytest.mark.parametrize("name", EVERY)
def test_the_page_of_a_method_has_an_equation_and_a_drawing_that_are_well_formed(name: str) -> None:
    page = pages.method_page(name)
    blocks = equations.blocks(METHODS.card(name).page)
    assert blocks
    for block in blocks:
        ElementTree.fromstring(f"<div>{equations.mathml(block)}</div>")
    svg = re.search(r"<svg.*?</svg>", page, re.DOTALL)
    assert svg is not None
    ElementTree.fromstring(svg[0])
    words = page.replace("\\", "")
    for setting in METHODS.card(name).settings:
        assert setting.meaning in words
    for heading in ("Claims", "Count", "Pitfalls"):
        assert f"**{heading}" in page
    assert METHODS.card(name).paper in page


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("lora", {"attn.q": {"attached"}, "attn.v": {"attached"}}),
        ("prompt_tuning", {"tokens": {"prepended"}}),
        ("prefix_tuning", {"keys": {"prepended"}}),
        ("lst", {"side": {"branch"}}),
        ("head_only", {"head": {"trained"}}),
    ],
)
def test_a_drawing_marks_what_the_edits_touch(name: str, parts: dict[str, set[str]]) -> None:
    _, anatomy = drawing.tiny_anatomy()
    assert drawing.marks(METHODS.get(name)(), anatomy) == parts


@pytest.mark.parametrize("name", [*pages.STRATEGIES.names(), *pages.WAYS.names()])
def test_the_page_of_a_strategy_has_its_paper_its_settings_and_well_formed_equations(name: str) -> None:
    shelf = pages.WAYS if name in pages.WAYS else pages.STRATEGIES
    card, page = shelf.card(name), pages.strategy_page(name).replace("\\", "")
    for block in equations.blocks(card.page):
        ElementTree.fromstring(f"<div>{equations.mathml(block)}</div>")
    assert card.paper in page and f"({name}.md)" in pages.strategies_index()
    assert all(f"| `{setting.name}` |" in page and setting.meaning in page for setting in card.settings)


def test_other_settings_give_another_drawing() -> None:
    _, anatomy = drawing.tiny_anatomy()
    lora = METHODS.get("lora")
    assert set(drawing.marks(lora(sites=("ffn.up",)), anatomy)) == {"ffn.up"}  # type: ignore[call-arg]
    assert drawing.svg("x", {"ffn.up": {"attached"}}) != drawing.svg("x", {"ffn.down": {"attached"}})


def test_the_navigation_names_pages_that_are_there_and_a_new_page_is_found() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    there = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")}
    assert pages.named_in(nav) <= there | GENERATED
    filled = {uri for family in pages.method_navigation() for uris in family.values() for uri in uris}
    assert pages.named_in(nav) | filled | {*pages.decisions()} | {*pages.not_in(nav)} | GENERATED == there | GENERATED
    assert pages.not_in([{"Start": ["index.md"]}]) and "quickstart.md" in pages.not_in([{"Start": ["index.md"]}])


def test_the_page_of_the_command_line_has_every_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")  # given back afterwards
    page = pages.command_line()
    for verb in verbs():
        assert f"## {verb}\n" in page and f"luthier {verb} " in page
    assert "--method" in page


def test_links_between_pages_lead_somewhere() -> None:
    dead = []
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", path.read_text(encoding="utf-8")):
            if not (path.parent / target).exists():
                dead.append(f"{path.relative_to(ROOT)}: {target}")
    assert not dead
