"""What `luthier ask` reads and shows: ways with their settings, prompts, standings."""

from collections.abc import Sequence
from typing import Any

from luthier.cli._output import screen
from luthier.cli._shelf import STRATEGIES, WAYS
from luthier.core import ConfigError, UnknownName, UsageError, human_seconds, near
from luthier.core.config import read_word, replace_word

__all__ = ["named_ways", "show_prompts", "show_standings"]


def named_ways(words: Sequence[str], assignments: Sequence[str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name as it was given -> the way and its settings.

    >>> named_ways(["icl,icl:k=0"], ["k=4"])
    {'icl': ('icl', {'k': 4}), 'icl:k=0': ('icl', {'k': 0})}

    Raises:
        UnknownName: no such way, or a setting that none of them has.
        UsageError: no way is named, or one twice.
    """
    names = [name for name in (part.strip() for word in words for part in word.split(",")) if name]
    if not names:
        raise UsageError(
            "ask: no way of asking. Name one: --strategy icl. `luthier strategies --family asking` lists them."
        )
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for name in names:
        way, *parts = name.split(":")
        if way not in WAYS and way in STRATEGIES:
            raise UnknownName(
                f"--strategy {way}: is a way of learning, for luthier train. Ways of asking are "
                f"{', '.join(WAYS.names())}."
            )
        WAYS.card(way)
        if name in found:
            raise UsageError(f"--strategy: {name} is named twice. Name it once, or with settings: {way}:NAME=VALUE.")
        if wrong := next((part for part in parts if not all(part.partition("="))), None):
            raise ConfigError(
                f"--strategy {name}: {wrong!r} is no setting. Write NAME=VALUE after each colon: icl:k=4."
            )
        found[name] = (way, {part.partition("=")[0]: read_word(part.partition("=")[2]) for part in parts})
    for assignment in assignments:
        _put(found, *replace_word(assignment))
    return found


def _put(found: dict[str, tuple[str, dict[str, Any]]], name: str, value: Any) -> None:
    """A setting of one way, as icl.k, or of all that have it."""
    owner, _, setting = name.rpartition(".")
    known = {way: [s.name for s in WAYS.card(way).settings] for way, _ in found.values()}
    if owner and owner not in known:
        raise UnknownName(
            f"--set {name}: {owner!r} is none of the ways named here.{near(owner, list(known))} They are "
            f"{', '.join(known)}."
        )
    having = [way for way in known if setting in known[way] and owner in ("", way)]
    if not having:
        every = sorted({s for names in known.values() for s in names})
        raise UnknownName(
            f"--set {name}: {owner or ' and '.join(known)} has no setting {setting!r}.{near(setting, every)} There are "
            f"{', '.join(every)}."
        )
    for way, settings in found.values():
        if way in having:
            settings.setdefault(setting, value)  # what stands behind its own name goes before


def show_prompts(asked: Any, count: int) -> None:
    """Whole prompts of the first rows, and what was answered."""
    for run in asked.runs:
        if run.seed != asked.standings.seeds[0]:
            continue
        for one in run.told[:count]:
            wanted = asked.wanted[one.query.number]
            screen().headline(f"--- {run.name}, {one.query.place}: answered {one.answer.said!r}, wanted {wanted!r}")
            for number, prompt in enumerate(dict.fromkeys(one.prompts)):
                screen().show(f"[request {number + 1}]")
                screen().show(prompt)
            for text in one.written:
                screen().show(f"[written] {text}")
            screen().show()


def show_standings(found: Any) -> None:
    """Findings in words, then the table."""
    to = screen()
    to.show()
    for number, line in enumerate(found.findings):
        (to.headline if number == 0 else to.show)(line)
    to.show()
    rows = [
        (
            s.name, f"{s.score:.3f}", f"{s.low:.3f}..{s.high:.3f}", f"{s.above_guess[0]:+.3f}",
            f"{s.above_guess[1]:+.3f}..{s.above_guess[2]:+.3f}",
        )
        for s in found.standings
    ]  # fmt: skip
    rows.append((f"always {found.guess[:20]!r}", f"{found.guess_score:.3f}", "", "", ""))
    to.table(("way", found.metric, "95 %", "gain", "95 %"), rows)
    to.show("gain: over always giving the commonest answer of the rows that may be shown.\n")
    costs = [
        (s.name, str(s.requests), str(s.read), str(s.computed), str(s.written), human_seconds(s.seconds))
        for s in found.standings
    ]
    head = ("way", "requests", "read", "computed", "written", "time")
    to.table(head, costs, right=head[1:])
    to.show("read, computed, written: tokens. What prompts share is computed once.")
