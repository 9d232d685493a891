"""`luthier methods`: the shelf, or one method's page. Reads files, imports none of them: no torch here."""

from itertools import groupby
from typing import Annotated

import typer

from luthier.cli import _shelf
from luthier.cli._output import screen
from luthier.cli._shared_options import AsJson
from luthier.cli._shelf import SHELF, example_of, facts, few_words, of_families, settings_table
from luthier.core import Card
from luthier.core.shelves import OURS

__all__ = ["command"]


def complete_name(incomplete: str) -> list[str]:
    """Names of methods."""
    return [name for name in SHELF.names() if name.startswith(incomplete)]


def command(
    name: Annotated[
        str | None, typer.Argument(help="Print this method's page.", show_default=False, autocompletion=complete_name)
    ] = None,
    family: Annotated[
        list[str] | None, typer.Option(help="Only methods of this family; may be given several times.")
    ] = None,
    mergeable: Annotated[
        bool | None, typer.Option(help="Only methods that merge into the weights, or only those that do not.")
    ] = None,
    as_json: AsJson = False,
    refresh: Annotated[bool, typer.Option("--refresh", help="Count the shares anew and store them.")] = False,
    pages: Annotated[str | None, typer.Option(help="Write every method's page into this folder.")] = None,
) -> None:
    """List the methods, or print one method's page: idea, equation, settings, count, claims, pitfalls.

    Examples:

      luthier methods

      luthier methods lora

      luthier methods --family additive --no-mergeable

      luthier methods --json | jq '.methods[] | select(.mergeable) | .name'
    """
    if refresh:
        from luthier.cli._parameter_shares import count_shares, write_shares

        write_shares(count_shares())
        screen().say("shares: written")
        return
    if pages is not None:
        written = _shelf.write_pages(pages)
        screen().say(f"{pages}: {written} pages written")
        screen().result({"pages": written, "folder": pages})
        return
    if name is not None:
        card = SHELF.card(name)
        screen().result(facts(card))
        _show_page(card)
        return
    cards = [c for c in of_families(SHELF, family or []) if mergeable in (None, c.mergeable)]
    screen().result({"methods": [facts(card) for card in sorted(cards, key=lambda card: card.name)]})
    _show_list(cards)


def _share(name: str) -> str:
    known = _shelf.shares().get(name)
    return f"{known['share']:.2%}" if known else "?"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _show_list(cards: list[Card]) -> None:
    rows: list[tuple[str, ...]] = []
    for family, members in groupby(cards, key=lambda card: card.family):
        rows.append((f"{family}:", "", "", ""))
        rows += [
            (f"  {card.name}", f"{few_words(card)} ({card.paper})", _yes(card.mergeable), _share(card.name))
            for card in members
        ]
    screen().table(("name", "what it is", "merges", "share"), rows, right=("share",))
    screen().show(
        f"\n{len(cards)} methods. merges: into the weights, at no cost later.\n"
        "share: of minilm-l6's numbers trained, with a head of six classes."
    )
    for card in cards:
        if card.origin != OURS:
            screen().show(f"{card.name} is from the {card.origin}.")
    screen().show("Next: luthier methods lora  (prints its page)")


def _show_page(card: Card) -> None:
    show = screen().show
    about = [card.name, card.family, card.paper]
    about += [f"a preset of {card.of}"] if card.of else []
    about += [f"from the {card.origin}"] if card.origin != OURS else []
    screen().headline(" · ".join(about) + "\n")
    screen().page(card.page)
    for sentence in _shelf.measured("methods").get(card.name, []):
        screen().page(f"Measured: {sentence}")
    show(
        f"\nmerges into the weights: {_yes(card.mergeable)} · starts as the base model: {_yes(card.starts_at_base)} · "
        f"trains {_share(card.name)} of minilm-l6"
    )
    show(_shelf.rates_of(card))
    if card.settings:
        show("\nSettings (--set NAME=VALUE, or an option of their own)")
        screen().table(*settings_table(card), whole=("name",))
    example = f" --set {word}" if (word := example_of(card)) else ""
    show(f"\nTry: luthier train sample:minilm-l6 --data sample:trec6 --method {card.name}{example}")
