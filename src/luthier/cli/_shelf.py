"""The shelf of methods without torch: what is known of each, as plain values and as pages in Markdown.

Everything is read from the method's own file (docstring, card, fields); no page is written by hand.
"""

import json
import unicodedata
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from luthier.core import Card, Catalogue, Setting, UnknownName, near, plain
from luthier.trust.text import for_markdown

__all__ = [
    "SHELF",
    "STRATEGIES",
    "WAYS",
    "as_markdown",
    "example_of",
    "facts",
    "few_words",
    "index",
    "is_of_recipe",
    "measured",
    "of_families",
    "rates_of",
    "settings_table",
    "shares",
    "type_of",
    "write_pages",
]

# The same files as luthier.surgery.METHODS, luthier.training.STRATEGIES and luthier.asking.WAYS list, which would
# import torch; a test holds them together.
SHELF: Catalogue[Any] = Catalogue("luthier.methods", "method")
STRATEGIES: Catalogue[Any] = Catalogue("luthier.strategies", "strategy")
WAYS: Catalogue[Any] = Catalogue("luthier.asking.ways", "way", "strategies --family asking")

NOTE = "Made by `make docs` from the method's own file; edit that."


def facts(card: Card) -> dict[str, Any]:
    """A card as plain values for --json."""
    share = shares().get(card.name)
    return {
        "name": card.name,
        "family": card.family,
        "paper": card.paper,
        "title": card.title,
        "from": card.origin,
        "preset_of": card.of or None,
        "mergeable": card.mergeable,
        "identity": card.starts_at_base,
        "default_lr": card.facts.get("default_lr", 1e-3),
        "default_head_lr": card.facts.get("default_head_lr") or card.facts.get("default_lr", 1e-3),
        "share_on_minilm_l6": share["share"] if share else None,
        "trained_on_minilm_l6": share["trained"] if share else None,
        "settings": [plain(setting) for setting in card.settings],
        "page": card.page,
        "measured": measured("methods").get(card.name, []),
    }


def is_of_recipe(strategy: str | None) -> bool:
    """Whether a recipe stands among the names of a strategy."""
    words = [word.strip() for word in (strategy or "").split("+")]
    return any(word in STRATEGIES and STRATEGIES.card(word).family == "recipes" for word in words)


@lru_cache(maxsize=1)
def shares() -> dict[str, dict[str, Any]]:
    """Method -> numbers trained on minilm-l6 with a head of six classes, and their share (`_parameter_shares.py`)."""
    folder = files("luthier.methods") / "shares"
    found = {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir() if file.name.endswith(".json")}
    return {name.removesuffix(".json"): json.loads(text) for name, text in sorted(found.items())}


@lru_cache(maxsize=2)
def measured(shelf: str) -> dict[str, list[str]]:
    """Name -> what came out where it was tried, in sentences. `shelf`: methods or strategies.

    `python -m experiments.methods --page` and `python -m experiments.strategies --page` write them.
    """
    found: dict[str, list[str]] = json.loads((files(f"luthier.{shelf}") / "measured.json").read_text("utf-8"))
    return found


def rates_of(card: Card) -> str:
    """The rates of a method in a sentence."""
    known = facts(card)
    rate, of_head = known["default_lr"], known["default_head_lr"]
    return f"Peak learning rate where none is given: {rate:g}" + (
        "" if of_head == rate else f"; {of_head:g} for a new head"
    )


def few_words(card: Card) -> str:
    """The first sentence of a page, without its name where that is the one in the list."""
    head, colon, rest = card.title.partition(": ")
    words = rest if colon and _letters(head) == _letters(card.name) else card.title
    return words[:1].upper() + words[1:]


def _letters(name: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKC", name).lower() if c.isalnum())


def of_families(shelf: Catalogue[Any], families: list[str]) -> list[Card]:
    """The cards of these families, or of all, family by family.

    Raises:
        UnknownName: nothing on the shelf is of such a family.
    """
    cards = sorted(shelf.cards(), key=lambda card: (card.family, card.name))
    known = list(dict.fromkeys(card.family for card in cards))
    for name in families:
        if name not in known:
            raise UnknownName(
                f"--family {name!r}: no {shelf.word} is of it.{near(name, known)} There are {', '.join(known)}."
            )
    return [card for card in cards if not families or card.family in families]


def type_of(setting: Setting) -> str:
    """The type for a reader: a number that may differ from place to place says so."""
    return setting.type.replace(" | WholeBySite", ", or by place").replace(" | NumberBySite", ", or by place")


def settings_table(card: Card) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows of a table of the settings."""
    return ("name", "type", "default", "meaning"), [(s.name, type_of(s), s.default, s.meaning) for s in card.settings]


def example_of(card: Card) -> str:
    """`NAME=VALUE` of the first setting that has a value to show, as one would write it after --set; "" without one.

    `('attn.q', 'attn.v')` is written `attn.q,attn.v`.
    """
    for setting in card.settings:
        if "\\" in setting.default:
            continue  # a line break, which a shell would hand over as two characters
        word = setting.default.strip("()").replace("'", "").replace('"', "").replace(", ", ",").rstrip(",").lower()
        if word and word != "none":
            return f"{setting.name}={word}"
    return ""


def as_markdown(card: Card) -> str:
    """One method's page. The text keeps its own line breaks, so it stands in a code block."""
    known = facts(card)
    share = known["share_on_minilm_l6"]
    lines = [
        f"# {card.name}",
        "",
        f"{card.family} · {card.paper} · "
        + (f"a preset of {card.of} · " if card.of else "")
        + f"{'merges into the weights' if card.mergeable else 'stays beside the weights'} · "
        f"{'starts as the base model' if card.starts_at_base else 'starts elsewhere than the base model'}"
        + (f" · trains {share:.2%} of minilm-l6" if share is not None else ""),
        "",
        "```text",
        card.page,
        "```",
        "",
        rates_of(card),
        "",
    ]
    for sentence in known["measured"]:
        lines += [f"Measured: {sentence} [All methods](../methods-table.md)", ""]
    if card.settings:
        lines += ["| setting | type | default | meaning |", "| --- | --- | --- | --- |"]
        lines += [
            f"| `{s.name}` | `{type_of(s).replace('|', chr(92) + '|')}` | `{s.default}` | {for_markdown(s.meaning)} |"
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
