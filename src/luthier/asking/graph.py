"""Operations over thoughts, in the order of a plan: what `got` does. Each operation puts its requests together.

A thought is lines of text with the numbers of the thoughts it was made from, so the graph has no circle; mending is a
chain of at most so many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from luthier.asking.requests import Request, Write
from luthier.asking.thoughts import Steps, Thinking, grown, valued
from luthier.core import ConfigError, near

__all__ = ["Prompts", "Thought", "checked_plan", "through"]

OPERATIONS = {"split": 2, "generate": 1, "step": 1, "aggregate": 0, "refine": 1, "keep": 1}
"""Each with its number where none stands beside it; 0 for all"""
MOST = 100


@dataclass(frozen=True)
class Thought:
    """Lines of text, and what they were made from."""

    lines: tuple[str, ...]
    parents: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The words of each operation."""

    split: str
    generate: str
    aggregate: str
    refine: str


def checked_plan(plan: str, who: str) -> list[tuple[str, int]]:
    """Operations with their numbers.

    >>> checked_plan("generate 3; keep 1; aggregate", "got")
    [('generate', 3), ('keep', 1), ('aggregate', 0)]

    Raises:
        ConfigError: an operation that is none, or a number that cannot be.
    """
    found = []
    for part in (part.strip() for part in plan.split(";")):
        name, _, number = part.partition(" ")
        if name not in OPERATIONS:
            raise ConfigError(
                f"{who}.plan {plan!r}: {name!r} is no operation.{near(name, list(OPERATIONS))} There are "
                f"{', '.join(OPERATIONS)}, with semicolons between."
            )
        if number.strip() and not (number.strip().isdigit() and 1 <= int(number) <= MOST):
            raise ConfigError(f"{who}.plan: {part!r} has no number from 1 to {MOST}. Write {name} 3, say.")
        found.append((name, int(number) if number.strip() else OPERATIONS[name]))
    return found


def through(plan: Sequence[tuple[str, int]], of: Steps, words: Prompts) -> Thinking:
    """The lines of the best thought at the end of a plan, and facts: volume, latency, thoughts."""
    every = [Thought(())]
    now = [0]
    for name, number in plan:
        made: list[Thought] = []
        if name == "step":
            made = yield from _stepped(every, now, replace(of, k=number))
        elif name == "keep":
            now = yield from _kept(every, now, of, number)
            continue
        elif name == "refine":
            made = yield from _refined(every, now, of, words, number)
        elif name == "aggregate":
            size = number or len(now)
            groups = [now[i : i + size] for i in range(0, len(now), size)]
            asked: list[Request] = [
                _written(of, words.aggregate, 1, thoughts="\n".join(every[i].text for i in group)) for group in groups
            ]
            replies = yield asked
            made = [
                Thought((reply[0].text.strip(),), tuple(group)) for group, reply in zip(groups, replies, strict=True)
            ]
        else:
            made = yield from _parted(every, now, of, words, name, number)
        start = len(every)
        every += made
        now = list(range(start, len(every)))
    if len(now) > 1:
        now = yield from _kept(every, now, of, 1)
    best = now[0]
    facts = {"thoughts": len(every) - 1, "volume": len(_behind(every, best)), "latency": _latency(every, best)}
    return every[best].lines, facts


def _written(of: Steps, words: str, n: int, **fields: str) -> Write:
    text = words.replace("{question}", of.question).replace("{n}", str(n))
    for name, value in fields.items():
        text = text.replace(f"{{{name}}}", value)
    drawn = of.temperature if n > 1 and "{n}" not in words else 0.0
    return Write(
        prompt=text, n=1 if "{n}" in words else n, temperature=drawn, max_tokens=of.chain.max_tokens, stop=("\n\n",)
    )


def _parted(every: Sequence[Thought], now: Sequence[int], of: Steps, words: Prompts, name: str, n: int) -> Thinking:
    """Parts, one a line; or solutions. Of a split fewer lines may come than were asked for."""
    text = words.split if name == "split" else words.generate
    replies = yield [_written(of, text, n, thought=every[i].text or of.question) for i in now]
    found = []
    for i, reply in zip(now, replies, strict=True):
        pieces = reply[0].text.strip().split("\n")[:n] if name == "split" else [one.text.strip() for one in reply]
        found += [Thought((piece.strip(),), (i,)) for piece in pieces if piece.strip() or name != "split"]
    return found or [Thought((of.question,), (now[0],))]  # nothing was split: the whole is the one part


def _stepped(every: Sequence[Thought], now: Sequence[int], of: Steps) -> Thinking:
    states = [every[i].lines for i in now]
    found = yield from grown(of, states)
    homes = {lines: next(i for i in now if lines[: len(every[i].lines)] == every[i].lines) for lines in found}
    return [Thought(lines, (homes[lines],)) for lines in found]


def _kept(every: Sequence[Thought], now: Sequence[int], of: Steps, n: int) -> Thinking:
    """The best n by verdicts; nothing is asked where there are no more."""
    if len(now) <= n:
        return list(now)
    worths = yield from valued(of, [every[i].lines for i in now])
    order = sorted(range(len(now)), key=lambda at: -worths[at])[:n]
    return [now[at] for at in order]


def _refined(every: list[Thought], now: Sequence[int], of: Steps, words: Prompts, times: int) -> Thinking:
    """Each thought mended until it stays as it is; the steps between stand in the graph."""
    at = list(now)
    going = set(range(len(at)))
    for _ in range(times):
        if not going:
            break
        order = sorted(going)
        replies = yield [_written(of, words.refine, 1, thought=every[at[i]].text) for i in order]
        for i, reply in zip(order, replies, strict=True):
            new = reply[0].text.strip()
            if new in ("", every[at[i]].text):
                going.discard(i)
                continue
            every.append(Thought((new,), (at[i],)))
            at[i] = len(every) - 1
    return [replace(every[i], parents=(i,)) for i in at]


def _behind(every: Sequence[Thought], number: int) -> set[int]:
    """The thoughts from which a path leads to this one; the empty one that stands at the start is none."""
    found: set[int] = set()
    waiting = list(every[number].parents)
    while waiting:
        one = waiting.pop()
        if one and one not in found:
            found.add(one)
            waiting += every[one].parents
    return found


def _latency(every: Sequence[Thought], number: int) -> int:
    return 1 + max((_latency(every, one) for one in every[number].parents if one), default=0) if number else 0
