"""`luthier strategies`: the ways of learning and of asking, or one's page. Reads files, imports none: no torch here."""

import inspect
import shlex
from importlib import import_module
from itertools import groupby
from typing import Annotated, Any

import typer

from luthier.cli._output import screen
from luthier.cli._parts_of_runs import PARTS_OF_RUNS
from luthier.cli._shared_options import AsJson
from luthier.cli._shelf import STRATEGIES, WAYS, example_of, few_words, measured, of_families, settings_table
from luthier.core import Card, UnknownName, near, plain

__all__ = ["command"]

OWN = ("recipes", "asking")
"""Families whose members are no part of a step."""

VERBS = ("safety_audit",)
"""What others count among the strategies, and here is a verb: found by its name too."""


def complete_name(incomplete: str) -> list[str]:
    """Names of strategies."""
    known = (*STRATEGIES.names(), *WAYS.names(), *PARTS_OF_RUNS, *VERBS)
    return [name for name in known if name.startswith(incomplete)]


def command(
    name: Annotated[
        str | None, typer.Argument(help="Print this strategy's page.", show_default=False, autocompletion=complete_name)
    ] = None,
    family: Annotated[list[str] | None, typer.Option(help="Only of this family; may be given several times.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the strategies, or print one's page: how a model learns or is asked, where a method is what of it trains.

    Examples:

      luthier strategies

      luthier strategies llrd

      luthier train sample:minilm-l6 --data sample:trec6 --strategy llrd --decay 0.8
    """
    if name in PARTS_OF_RUNS:
        _show_part(name)
        return
    if name is not None and name not in STRATEGIES and (verb := name.replace("_", "-")) in verbs():
        _show_verb(verb)
        return
    if name is not None:
        card = (WAYS if name in WAYS else STRATEGIES).card(name)
        screen().result(facts(card))
        _show_page(card)
        return
    cards = _of(family or [])
    screen().result({"strategies": [facts(card) for card in sorted(cards, key=lambda card: card.name)]})
    rows: list[tuple[str, str]] = []
    for group, members in groupby(cards, key=lambda card: card.family):
        rows.append((f"{group}:", ""))
        rows += [(f"  {card.name}", f"{few_words(card)} ({card.paper})") for card in members]
    screen().table(("name", "what it is"), rows)
    screen().show(f"\nA part of every run, not named by --strategy: {', '.join(PARTS_OF_RUNS)}.")
    screen().show(f"A command of its own: {', '.join(VERBS)}.")
    screen().show(f"\n{len(cards)} strategies. Next: luthier strategies {cards[0].name}  (prints its page)")


def verbs() -> list[str]:
    """The names of all verbs."""
    from luthier.cli import _main

    return _main.verbs()


def _show_verb(verb: str) -> None:
    """What is named like a strategy and is a verb of its own: nothing is learnt there."""
    page = inspect.cleandoc(import_module(f"luthier.cli.{verb.replace('-', '_')}").command.__doc__ or "")
    screen().result({"name": verb, "kind": "verb", "page": page})
    screen().headline(f"{verb} · a command\n")
    screen().page(page)
    screen().show(f"\nTry: luthier {verb} --help")


def _of(families: list[str]) -> list[Card]:
    """The cards of these families, of learning and of asking, or of all."""
    cards = [card for shelf in (STRATEGIES, WAYS) for card in of_families(shelf, [])]
    known = sorted({card.family for card in cards})
    for name in families:
        if name not in known:
            raise UnknownName(
                f"--family {name!r}: no strategy is of it.{near(name, known)} There are {', '.join(known)}."
            )
    return [card for card in cards if not families or card.family in families]


def facts(card: Card) -> dict[str, Any]:
    """A card as plain values for --json.

    `passes`: forward and backward passes of a step; `forwards`: forward passes beside them; both at the defaults.
    """
    return {
        "name": card.name,
        "family": card.family,
        "paper": card.paper,
        "title": card.title,
        "kind": {"recipes": "recipe", "asking": "asking"}.get(card.family, "strategy"),
        "passes": None if card.family in OWN else 1.0 + _number(card, "extra_passes"),
        "forwards": None if card.family in OWN else _number(card, "extra_forwards"),
        "needs": {"rows": _words(card, "sets"), "models": _words(card, "roles"), "strategies": _words(card, "uses")},
        "settings": [plain(setting) for setting in card.settings],
        "page": card.page,
        "measured": measured("strategies").get(card.name, []),
    }


def _number(card: Card, fact: str) -> float:
    value = card.facts.get(fact, 0.0)
    return float(value) if isinstance(value, int | float) else 0.0


def _words(card: Card, fact: str) -> list[str]:
    value = card.facts.get(fact, ())
    return [str(word) for word in value] if isinstance(value, tuple | list) else []


def _needs(card: Card) -> str:
    """What must be given beside its name, as options; nothing where it needs nothing."""
    rows = ["NAME" if name == "*" else name for name in _words(card, "sets")]
    models = [f" --set {card.name}.{role}=RUN" for role in _words(card, "roles")]
    return "".join([*(f" --also {name}=FILE" for name in rows), *models])


def _show_part(name: str) -> None:
    part = PARTS_OF_RUNS[name]
    screen().result({"name": name, "kind": "part of every run", "paper": part.paper, "page": part.page})
    screen().headline(f"{name} · a part of every run · {part.paper}\n")
    screen().page(part.page)
    screen().show(f"\nTry: luthier {part.example}")


def _show_page(card: Card) -> None:
    screen().headline(f"{card.name} · {card.family} · {card.paper}\n")
    screen().page(card.page)
    for sentence in measured("strategies").get(card.name, []):
        screen().page(f"Measured: {sentence}")
    if card.settings:
        screen().show("\nSettings (--set NAME=VALUE, or an option of their own)")
        screen().table(*settings_table(card), whole=("name",))
    screen().show(f"\nTry: {tried(card)}")


def tried(card: Card) -> str:
    """A command that fits a strategy: its model and rows, its name, and what it needs. Words in capitals are yours."""
    ask = card.name in WAYS
    usual = ("sample:smollm2-135m" if ask else "sample:minilm-l6") + " --data sample:trec6"
    own = str(card.facts.get("example", ""))
    model, option, rows, *more = (own or usual).split(" ", 3)
    needs = "".join([_needs(card), *(f" {words}" for words in more)])
    if not own and not needs and (word := example_of(card)):
        needs = f" --set {shlex.quote(word)}"
    return f"luthier {'ask' if ask else 'train'} {model} {option} {rows} --strategy {card.name}{needs}"
