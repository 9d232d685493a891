"""What of an answer is less sure than was asked for."""

from __future__ import annotations

from typing import Any

from luthier.core import ConfigError
from luthier.data.tasks import Task

__all__ = ["check_unsure", "unsure_of"]


def check_unsure(least: float, task: Task) -> None:
    """Refuse what is no probability, and tasks whose answers have none.

    Raises:
        ConfigError: names the value, or the task.
    """
    if not 0 < least <= 1:
        raise ConfigError(f"unsure: got {least!r}; it is a probability, above 0 and at most 1, such as 0.6.")
    if not task.labels:
        what = "numbers" if task.name == "regression" else "text"
        raise ConfigError(
            f"unsure: this run answers in {what}, which has no probability. Leave it out; runs that answer with "
            "labels or tags take it."
        )


def unsure_of(answer: dict[str, Any], least: float) -> Any:
    """Whether the label is less sure than `least`; which labels are, of several; the numbers of the words, of tags.

    How sure an answer is, is its own probability: of a label that is not given, that it is rightly not given.
    """
    if "tags" in answer:
        return [i for i, share in enumerate(answer["sure"]) if share is not None and share < least]
    label, shares = answer["label"], answer["probabilities"]
    if isinstance(label, list):
        return [name for name, share in shares.items() if (share if name in label else 1 - share) < least]
    return bool(shares[label] < least)
