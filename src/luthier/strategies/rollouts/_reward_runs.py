"""Rewards by a run that learnt them (`reward_model`), whose base may be the one that is in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from luthier.core import DataError
from luthier.data.columns import Columns
from luthier.data.encode_language import conversation_before, prompt_messages
from luthier.data.rows import Table
from luthier.surgery import Tuned

__all__ = ["Asked", "one_base", "rewards_by_run"]

_NOTHING = "…"  # what is shown in place of an empty answer


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One answer to one row.

    Attributes:
        row: of the table, as it was read. place: where it stands, such as `sums.csv:3`.
        right: what the row says is right, where it has a column for it.
    """

    prompt: str
    answer: str
    row: dict[str, Any]
    place: str
    right: str | None = None


def rewards_by_run(name: str, run: Any, asked: Sequence[Asked], columns: Columns) -> list[float]:
    """The numbers that a run gives prompts with answers, in its own columns, template and tokens."""
    theirs: Columns = run.columns
    assert theirs.chosen is not None, "a reward is learnt of pairs"
    rows: list[dict[str, Any]] = []
    for one in asked:
        table = Table([dict(one.row)], [one.place], name)
        if theirs.prompt is None or columns.prompt is None:
            messages = (
                prompt_messages(table, 0, columns, False) if columns.prompt else conversation_before(one.row, columns)
            )
            rows.append({theirs.chosen: [*messages, {"role": "assistant", "content": one.answer or _NOTHING}]})
            continue
        cells = {
            getattr(theirs, r): one.row.get(getattr(columns, r) or "")
            for r in ("prompt", "context", "system", "history")
        }
        rows.append({**{c: v for c, v in cells.items() if c is not None}, theirs.chosen: one.answer or _NOTHING})
    found = run.rows(Table(rows, [one.place for one in asked], name))
    for one, answer in zip(asked, found, strict=True):
        value = answer.get("value", math.nan)
        if "refused" in answer or not math.isfinite(value):
            why = answer.get("refused", f"is {value}, no finite number")
            raise DataError(
                f"reward {name}: of {one.place}, for the answer {one.answer[:80]!r}: {why}. Use shorter prompts or "
                "new_tokens, or another reward run."
            )
    return [float(answer["value"]) for answer in found]


def one_base(model: Any, tuned: Tuned) -> tuple[int, int]:
    """Let a model beside the policy use the policy's frozen numbers where they are the same, bit for bit.

    Returns:
        how many numbers it shares now, and how many are its own.
    """
    if any(part.trains_base for tuning in tuned.tunings.values() for part in tuning.method.parts()):
        return 0, sum(p.numel() for p in model.parameters())
    trained = {id(p) for p in tuned.trained().values()}
    # Names below the trunk: `model.layers...` of a language model are those of a classifier too.
    ours = {name: p for name, p in tuned.model.named_parameters() if id(p) not in trained}
    shared = own = 0
    for name, parameter in model.named_parameters():
        other = ours.get(name)
        alike = other is not None and other.dtype == parameter.dtype and other.device == parameter.device
        if other is not None and alike and torch.equal(other, parameter):
            parameter.data = other.data
            shared += parameter.numel()
        else:
            own += parameter.numel()
    return shared, own
