"""The methods' pages as Markdown files: each made from its file's docstring, card and fields, never written by hand."""

from pathlib import Path

from luthier.cli.methods import SHELF, facts
from luthier.core import Card
from luthier.trust.text import for_markdown

__all__ = ["as_markdown", "index", "write_pages"]

NOTE = "Made by `make docs` from the method's own file; edit that."


def as_markdown(card: Card) -> str:
    """One method's page. The text keeps its own line breaks, so it stands in a code block."""
    known = facts(card)
    share = known["share_on_minilm_l6"]
    lines = [
        f"# {card.name}",
        "",
        f"{card.family} · {card.paper} · "
        f"{'merges into the weights' if card.mergeable else 'stays beside the weights'} · "
        f"{'starts as the base model' if card.starts_at_base else 'starts elsewhere than the base model'}"
        + (f" · trains {share:.2%} of minilm-l6" if share is not None else ""),
        "",
        "```text",
        card.page,
        "```",
        "",
        f"Peak learning rate where none is given: {known['default_lr']:g}",
        "",
    ]
    if card.settings:
        lines += ["| setting | type | default | meaning |", "| --- | --- | --- | --- |"]
        lines += [
            f"| `{s.name}` | `{s.type.replace('|', chr(92) + '|')}` | `{s.default}` | {for_markdown(s.meaning)} |"
            for s in card.settings
        ]
        lines.append("")
    return "\n".join([*lines, f"<!-- {NOTE} -->", ""])


def index(cards: list[Card]) -> str:
    """The list of all pages."""
    lines = ["# Methods", "", "| name | family | paper | merges | identity |", "| --- | --- | --- | --- | --- |"]
    for card in sorted(cards, key=lambda c: (c.family, c.name)):
        merges, identity = ("yes" if fact else "no" for fact in (card.mergeable, card.starts_at_base))
        lines.append(f"| [{card.name}]({card.name}.md) | {card.family} | {card.paper} | {merges} | {identity} |")
    return "\n".join([*lines, "", f"<!-- {NOTE} -->", ""])


def write_pages(folder: str | Path) -> int:
    """Write README.md and one page per method; pages of methods that are gone are removed. Returns their number."""
    home = Path(folder)
    home.mkdir(parents=True, exist_ok=True)
    cards = SHELF.cards()
    for old in home.glob("*.md"):
        if NOTE in old.read_text(encoding="utf-8"):
            old.unlink()
    for card in cards:
        (home / f"{card.name}.md").write_text(as_markdown(card), encoding="utf-8")
    (home / "README.md").write_text(index(cards), encoding="utf-8")
    return len(cards)
