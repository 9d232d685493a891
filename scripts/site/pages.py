"""Pages of the site that are made: one for each method, from its own file, and the list of decisions."""

import contextlib
import io
import os
import re
from html import escape
from pathlib import Path
from typing import Any

import drawing
import equations

from luthier.cli._main import main, verbs
from luthier.cli._shelf import SHELF, STRATEGIES, WAYS, facts, measured

__all__ = [
    "command_line",
    "decisions",
    "decisions_index",
    "method_navigation",
    "method_page",
    "named_in",
    "not_in",
    "sections",
]

ROOT = Path(__file__).resolve().parents[2]
HEADING = re.compile(r"^(Count|Claims|Cost|Starts|Pitfalls|Use it when|Not when): ?", re.MULTILINE)


def method_navigation() -> list[dict[str, Any]]:
    """Family -> its methods, in alphabetical order."""
    families: dict[str, list[str]] = {}
    for card in SHELF.cards():
        families.setdefault(card.family, []).append(f"methods/{card.name}.md")
    return [{family[0].upper() + family[1:]: sorted(found)} for family, found in sorted(families.items())]


def named_in(nav: Any) -> set[str]:
    """Every page that a navigation names."""
    if isinstance(nav, str):
        return {nav}
    return {uri for entry in (nav.values() if isinstance(nav, dict) else nav) for uri in named_in(entry)}


def not_in(nav: Any) -> list[str]:
    """Pages of docs/ that the navigation does not name and that are not filled in: a new page is found all the same."""
    folder = ROOT / "docs"
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*.md")}
    return sorted(uri for uri in there - named_in(nav) if not uri.startswith(("methods/", "decisions/")))


def sections(page: str) -> dict[str, str]:
    """A method's docstring in parts: "" is what stands before the first heading, equations left out."""
    parts = HEADING.split(page)
    found = {"": parts[0]}
    for heading, text in zip(parts[1::2], parts[2::2], strict=True):
        # What follows a blank line after a heading's paragraph is a paragraph of its own, and part of the text.
        body, _, rest = text.partition("\n\n")
        found[heading] = " ".join(body.split())
        found[""] += "\n\n" + rest if rest.strip() else ""
    return found


def method_page(name: str) -> str:
    """Equation, drawing, when and when not, the words of its file, settings."""
    card = SHELF.card(name)
    known, parts = facts(card), sections(card.page)
    share = known["share_on_minilm_l6"]
    prose = [p for p in re.split(r"\n\s*\n", parts[""]) if not p.startswith("    ")]
    title = " ".join(prose[0].split())
    lines = [f"# {name}", "", f"**{_text(title)}**", ""]
    lines += [
        '<div class="equations">',
        *(equations.mathml(block) for block in equations.blocks(card.page)),
        "</div>",
        "",
    ]
    lines += ['<figure class="drawing">', drawing.draw(name)]
    lines += [
        f"<figcaption>{escape(name)} at its defaults, on a block of an encoder: drawn from its edits.</figcaption>"
    ]
    lines += ["</figure>", ""]
    for kind, heading in (("tip", "Use it when"), ("warning", "Not when")):
        if heading in parts:
            lines += _box(kind, heading, parts[heading])
    lines += [
        "| family | merges into the weights | starts as the base model | trains of minilm-l6 | peak learning rate |",
        "| --- | --- | --- | --- | --- |",
        f"| {card.family} | {'yes' if card.mergeable else 'no'} | {'yes' if card.starts_at_base else 'no'} | "
        f"{'-' if share is None else f'{share:.2%}'} | {known['default_lr']:g} |",
        "",
    ]
    option = f"`luthier train MODEL --data FILE --method {name}`"
    return "\n".join([*lines, *_rest(card, prose, parts, option)])


def strategy_page(name: str) -> str:
    """The same of a strategy, which has no place in a block: equation, words, settings."""
    asks = name in WAYS
    card = (WAYS if asks else STRATEGIES).card(name)
    parts = sections(card.page)
    prose = [p for p in re.split(r"\n\s*\n", parts[""]) if not p.startswith("    ")]
    lines = [f"# {name}", "", f"**{_text(' '.join(prose[0].split()))}**", "", '<div class="equations">']
    lines += [*(equations.mathml(block) for block in equations.blocks(card.page)), "</div>", ""]
    option = f"`luthier {'ask' if asks else 'train'} MODEL --data FILE --strategy {name}`"
    seen = [
        line for sentence in measured("strategies").get(name, []) for line in (f"**Measured.** {_text(sentence)}", "")
    ]
    return "\n".join([*lines, *seen, *_rest(card, prose, parts, option)])


def strategies_index() -> str:
    """The list of all strategies."""
    lines = [
        "# Strategies",
        "",
        "How a model learns or is asked, where a [method](../methods/README.md) is what of it trains.",
        "",
    ]
    lines += ["| name | family | paper | what it is |", "| --- | --- | --- | --- |"]
    for card in [*STRATEGIES.cards(), *WAYS.cards()]:
        lines.append(f"| [{card.name}]({card.name}.md) | {card.family} | {card.paper} | {_text(card.title)} |")
    return "\n".join([*lines, ""])


def _rest(card: Any, prose: list[str], parts: dict[str, str], option: str) -> list[str]:
    """The words of a file behind its first sentence, and its settings."""
    lines: list[str] = []
    for paragraph in prose[1:]:
        lines += [_text(" ".join(paragraph.split())), ""]
    for heading in ("Claims", "Count", "Cost", "Starts", "Pitfalls"):
        if heading in parts:
            claim = ", as its paper says" if heading == "Claims" else ""
            lines += [f"**{heading}{claim}.** {_text(parts[heading])}", ""]
    if card.settings:
        lines += ["## Settings", "", "| setting | type | default | meaning |", "| --- | --- | --- | --- |"]
        for s in card.settings:
            kind = s.type.replace("|", "\\|")
            lines.append(f"| `{s.name}` | `{kind}` | `{s.default}` | {_text(s.meaning)} |")
        lines.append("")
    return [*lines, option, ""]


def _box(kind: str, title: str, text: str) -> list[str]:
    return [f'!!! {kind} "{title}"', f"    {_text(text[:1].upper() + text[1:])}", ""]


def _text(words: str) -> str:
    """Words of a docstring as Markdown that shows them as they are: `code` stays code, nothing else is markup."""
    pieces = re.split(r"(`[^`]*`)", words)
    return "".join(p if p.startswith("`") else re.sub(r"([\\*_\[\]<>#|])", r"\\\1", p) for p in pieces)


def command_line() -> str:
    """What `--help` says of every verb."""
    os.environ["COLUMNS"] = "84"  # help is drawn as wide as the terminal, and a page has none
    lines = [
        "# Command line",
        "",
        "`luthier VERB --help`, of every verb. [Exit codes](exit-codes.md) are documented.",
        "",
    ]
    for verb in verbs():
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            main([verb, "--help"])
        if not said.getvalue().strip():
            raise RuntimeError(f"luthier {verb} --help says nothing on standard output")
        lines += [f"## {verb}", "", "```text", said.getvalue().strip("\n"), "```", ""]
    return "\n".join(lines)


def decisions() -> list[str]:
    """The files of docs/decisions, in their order."""
    return [f"decisions/{p.name}" for p in sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))]


def decisions_index() -> str:
    """One line for each decision."""
    lines = ["# Decisions", "", "Choices that others live with: half a page each. One is superseded, never edited.", ""]
    for uri in decisions():
        first = (ROOT / "docs" / uri).read_text(encoding="utf-8").split("\n", 1)[0]
        lines.append(f"- [{first.removeprefix('# ')}]({Path(uri).name})")
    return "\n".join([*lines, ""])
