"""`luthier methods`: the shelf, or one method's page. Reads files, imports none of them: no torch here."""

import json
from functools import lru_cache
from importlib.resources import files
from typing import Annotated, Any

import typer

from luthier.cli._options import AsJson
from luthier.cli._screen import screen
from luthier.core import Card, Catalogue, plain

__all__ = ["SHELF", "command", "facts", "shares"]

# The same files as luthier.surgery.METHODS lists, which would import torch; a test holds the two together.
SHELF: Catalogue[Any] = Catalogue("luthier.methods", "method")


def command(
    name: Annotated[str | None, typer.Argument(help="Print this method's page.", show_default=False)] = None,
    as_json: AsJson = False,
    refresh: Annotated[bool, typer.Option("--refresh", help="Count the shares anew and store them.")] = False,
    pages: Annotated[str | None, typer.Option(help="Write every method's page into this folder.")] = None,
) -> None:
    """List the methods, or print one method's page: idea, equation, settings, count, claims, pitfalls.

    Examples:

      luthier methods

      luthier methods lora

      luthier methods --json | jq '.methods[] | select(.mergeable) | .name'
    """
    if refresh:
        from luthier.cli._shares import count_shares, write_shares

        write_shares(count_shares())
        screen().say("shares.json: written")
        return
    if pages is not None:
        from luthier.cli._pages import write_pages

        written = write_pages(pages)
        screen().say(f"{pages}: {written} pages written")
        screen().result({"pages": written, "folder": pages})
        return
    if name is not None:
        card = SHELF.card(name)
        screen().result(facts(card))
        _show_page(card)
        return
    cards = SHELF.cards()
    screen().result({"methods": [facts(card) for card in cards]})
    _show_list(cards)


def facts(card: Card) -> dict[str, Any]:
    """A card as plain values for --json."""
    share = shares().get(card.name)
    return {
        "name": card.name,
        "family": card.family,
        "paper": card.paper,
        "title": card.title,
        "mergeable": card.mergeable,
        "identity": card.starts_at_base,
        "default_lr": card.facts.get("default_lr", 1e-3),
        "share_on_minilm_l6": share["share"] if share else None,
        "trained_on_minilm_l6": share["trained"] if share else None,
        "settings": [plain(setting) for setting in card.settings],
        "page": card.page,
    }


@lru_cache(maxsize=1)
def shares() -> dict[str, dict[str, Any]]:
    """Method -> numbers trained on minilm-l6 with a head of six classes, and their share; see `_shares.py`."""
    text = (files("luthier.methods") / "shares.json").read_text(encoding="utf-8")
    read: dict[str, dict[str, Any]] = json.loads(text)["methods"]
    return read


def _share(name: str) -> str:
    known = shares().get(name)
    return f"{known['share']:.2%}" if known else "?"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _show_list(cards: list[Card]) -> None:
    rows = [(c.name, c.family, c.paper, _yes(c.mergeable), _yes(c.starts_at_base), _share(c.name)) for c in cards]
    rows.sort(key=lambda row: (row[1], row[0]))
    screen().table(("name", "family", "paper", "merges", "identity", "share"), rows, right=("share",))
    screen().show(
        f"\n{len(cards)} methods. merges: into the weights, at no cost later. identity: starts as the\n"
        "base model. share: of minilm-l6's numbers trained, with a head of six classes.\n"
        "Next: `luthier methods lora` prints a page; `luthier train --help`."
    )


def _show_page(card: Card) -> None:
    show = screen().show
    show(f"{card.name} · {card.family} · {card.paper}\n")
    show(card.page)
    show(
        f"\nmerges into the weights: {_yes(card.mergeable)} · starts as the base model: {_yes(card.starts_at_base)} · "
        f"trains {_share(card.name)} of minilm-l6"
    )
    show(f"peak learning rate where none is given: {card.facts.get('default_lr', 1e-3):g}")
    if card.settings:
        show("\nSettings (--set name=value)")
        rows = [(s.name, s.type, s.default, s.meaning) for s in card.settings]
        screen().table(("name", "type", "default", "meaning"), rows)
    example = f" --set {card.settings[0].name}={_word(card.settings[0].default)}" if card.settings else ""
    show(f"\nTry: luthier train sample:minilm-l6 --data sample:trec6 --method {card.name}{example}")


def _word(default: str) -> str:
    """A default as one would write it after --set: `('attn.q', 'attn.v')` is `attn.q,attn.v`."""
    return default.strip("()").replace("'", "").replace('"', "").replace(", ", ",").rstrip(",").lower() or "''"
