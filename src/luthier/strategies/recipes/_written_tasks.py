"""Tasks that a model writes itself: its prompts, what is read in its answers, and what is thrown away and why."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Instance", "SeedTask", "asks_for_inputs", "asks_for_labelled", "asks_for_tasks", "asks_whether_labels",
           "complaint", "contradicted", "instances_in", "labelled_in", "rouge_l", "tasks_in", "unlike"]  # fmt: skip

BLOCKED = ("image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps", "draw", "plot")
"""Words of tasks that a text cannot answer, and "go to"."""


@dataclass(frozen=True)
class SeedTask:
    """A task with one instance; `labels` says whether its answers are a few fixed ones, or None where nobody did."""

    instruction: str
    input: str
    output: str
    place: str
    labels: bool | None = None


@dataclass(frozen=True)
class Instance:
    """An input, which may be empty, and its answer."""

    input: str
    output: str
    label: str = field(default="", compare=False)


def rouge_l(one: str, other: str) -> float:
    """F of the longest common run of words, gaps allowed, in small letters (Lin 2004).

    >>> round(rouge_l("list five red things", "list two red things"), 3)
    0.75
    """
    a, b = (re.findall(r"[a-z0-9]+", text.lower()) for text in (one, other))
    if not a or not b:
        return 0.0
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for j, with_ in enumerate(b, 1):
            before, row[j] = row[j], before + 1 if word == with_ else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(a) + len(b))


def unlike(text: str, pool: Sequence[str], most: float) -> str | None:
    """The text of the pool that is too much alike, or None."""
    return next((other for other in pool if rouge_l(text, other) > most), None)


def complaint(instruction: str) -> str | None:
    """Why an instruction is thrown away whatever else there is, or None."""
    words = instruction.split()
    found = re.findall(r"[a-z]+", instruction.lower())
    blocked = next((word for word in found if word in BLOCKED), "go to" if "go to" in instruction.lower() else None)
    if not 4 <= len(words) <= 150:
        return f"{len(words)} words, not 4 to 150"
    if blocked:
        return f"holds {blocked!r}: a text cannot do it"
    if not instruction[0].isascii() or not instruction[0].isalnum():
        return "does not begin with a letter or a number of ASCII"
    return "asks for a program" if instruction.lower().startswith("write a program") else None


def asks_for_tasks(shown: Sequence[str]) -> str:
    """A list that goes on."""
    lines = [f"{n}. {' '.join(one.split())}" for n, one in enumerate(shown, 1)]
    return "\n".join(["Come up with a series of tasks:", *lines, f"{len(shown) + 1}."])


def tasks_in(answer: str, first: int) -> list[str]:
    """The tasks of a list that goes on with number `first`."""
    found = re.split(r"\n\s*\d+\s*\.", "\n" + f"{first}." + answer)
    return [" ".join(one.split()) for one in found if one.strip()]


def asks_whether_labels(instruction: str, seeds: Sequence[SeedTask]) -> str:
    """Are the answers a few fixed ones?"""
    known = [seed for seed in seeds if seed.labels is not None]
    lines = [f"Task: {s.instruction}\nIs it classification? {'Yes' if s.labels else 'No'}" for s in known]
    begun = f"Task: {instruction}\nIs it classification?"
    return "\n\n".join(["Can the task be seen as classification with few labels?", *lines, begun])


def asks_for_inputs(instruction: str, seeds: Sequence[SeedTask]) -> str:
    """Examples of a task, the input first."""
    lines = [f"Task: {s.instruction}\nInput: {s.input or 'none'}\nOutput: {s.output}" for s in seeds]
    return "\n\n".join(["Give an example of each task.", *lines, f"Task: {instruction}\nInput:"])


def asks_for_labelled(instruction: str, seeds: Sequence[SeedTask]) -> str:
    """Examples of a task, the label first, so that each label has one."""
    lines = [f"Task: {s.instruction}\nLabel: {s.output}\nInput: {s.input or 'none'}" for s in seeds]
    return "\n\n".join(["Give an input for each label of the task.", *lines, f"Task: {instruction}\nLabel:"])


def instances_in(answer: str) -> list[Instance]:
    """Pairs of input and output in an answer that goes on behind "Input:"."""
    found = []
    for piece in re.split(r"(?:^|\n)\s*Input:", "\nInput:" + answer)[1:]:
        both = re.split(r"\n\s*Output:", piece, maxsplit=1)
        if len(both) == 2 and both[1].strip():
            given = both[0].strip()
            found.append(Instance("" if given.lower() == "none" else given, both[1].strip()))
    return found


def labelled_in(answer: str) -> list[Instance]:
    """Pairs of label and input in an answer that goes on behind "Label:"; as many of each label."""
    of: dict[str, list[Instance]] = {}
    for piece in re.split(r"(?:^|\n)\s*Label:", "\nLabel:" + answer)[1:]:
        both = re.split(r"\n\s*Input:", piece, maxsplit=1)
        label = both[0].strip()
        if len(both) == 2 and label and both[1].strip():
            own = of.setdefault(label, [])
            one = Instance(both[1].strip(), label, label)
            own += [one] if one not in own else []
    least = min(map(len, of.values()), default=0)
    return [one for own in of.values() for one in own[:least]]


def contradicted(instances: Sequence[Instance]) -> set[str]:
    """Inputs that stand with more than one answer."""
    seen: dict[str, str] = {}
    return {one.input for one in instances if seen.setdefault(one.input, one.output) != one.output}
