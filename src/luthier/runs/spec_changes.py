"""What may differ between the spec of a run and the one that it is resumed with. No torch here either."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from luthier.core import checked, plain
from luthier.runs.spec import RunSpec

__all__ = ["RESUME", "SAME_BITS", "Change", "ResumeRule", "changes", "leaves"]

ResumeRule = Literal["exact", "apply", "boundary"]

RESUME: dict[str, ResumeRule] = {
    # exact: the resumed run must say the same, or it would be another run
    "out": "exact",  # a folder is moved, not resumed into another one
    "model": "exact",
    "task": "exact",
    "method": "exact",
    "strategy": "exact",
    "settings": "exact",
    "also": "exact",
    "sources": "exact",
    "data.source": "exact",
    "data.test": "exact",
    "data.test_share": "exact",
    "data.split_seed": "exact",
    "data.fold": "exact",
    "data.delimiter": "exact",
    "data.encoding": "exact",
    "data.text": "exact",
    "data.pair": "exact",
    "data.label": "exact",
    "data.prompt": "exact",
    "data.context": "exact",
    "data.response": "exact",
    "data.messages": "exact",
    "data.chosen": "exact",
    "data.rejected": "exact",
    "data.tokens": "exact",
    "data.tags": "exact",
    "data.template": "exact",
    "data.words": "exact",
    "data.row_task": "exact",
    "data.loss_on": "exact",
    "max_length": "exact",
    "long": "exact",
    "seed": "exact",
    "precision": "exact",
    "store": "exact",  # another base
    "trunk_dropout": "exact",
    "eval.metric": "exact",  # the best score so far was of this metric
    "eval.best": "exact",  # these three decide which rows are learnt from, rows which are scored
    "eval.patience": "exact",
    "eval.share": "exact",
    "eval.thresholds": "exact",
    "eval.calibrate": "exact",
    "eval.rows": "exact",
    "eval.written": "exact",
    "eval.new_tokens": "exact",
    "eval.forgetting": "exact",
    "batch.pack": "exact",  # sums are of other pieces
    # boundary: the set of rows of each step follows from these, so they may change where an epoch begins
    "batch.size": "boundary",
    "batch.group_by_length": "boundary",
    # apply: may change, and holds from the next step on
    "data.strict": "apply",
    "data.accept_refused": "apply",
    "optim.name": "exact",  # its state is another
    "optim.lr": "apply",
    "optim.head_lr": "apply",
    "optim.schedule": "apply",
    "optim.warmup": "apply",
    "optim.betas": "apply",
    "optim.eps": "apply",
    "optim.weight_decay": "apply",
    "optim.clip": "apply",
    "epochs": "apply",
    "steps": "apply",
    "batch.tokens": "apply",
    "batch.accumulate": "apply",
    "batch.pad_to": "apply",
    "batch.workers": "apply",
    "eval.every": "apply",
    "checkpoint.every_steps": "apply",
    "checkpoint.every_seconds": "apply",
    "checkpoint.keep": "apply",
    "threads": "apply",
    "device": "apply",
    "gradient_checkpointing": "apply",
    "fast": "apply",
    "recheck": "apply",
    "force": "exact",  # asked before the first step alone
    "chosen": "exact",
}


SAME_BITS = frozenset({
    "batch.workers", "checkpoint.every_seconds", "checkpoint.every_steps", "checkpoint.keep",
    "data.accept_refused", "data.strict", "recheck",
})  # fmt: skip
"""Fields that a resumed run may change without changing one bit of what it computes."""


@checked
@dataclass(frozen=True, kw_only=True)
class Change:
    """One field that differs between the spec of a run and the spec it is resumed with."""

    field: str
    old: Any
    new: Any
    rule: ResumeRule

    def __str__(self) -> str:
        return f"{self.field}: {self.old!r} -> {self.new!r}"


def changes(old: RunSpec, new: RunSpec) -> list[Change]:
    """Every field in which two specs differ, with the rule that a resumed run follows for it."""
    before, after = leaves(old), leaves(new)
    return [
        Change(field=name, old=before[name], new=after[name], rule=RESUME.get(name, "exact"))
        for name in before
        if before[name] != after[name]
    ]


def leaves(spec: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> plain value of every field; `settings` is one leaf."""
    found: dict[str, Any] = {}
    for item in dataclasses.fields(spec):
        value = getattr(spec, item.name)
        if dataclasses.is_dataclass(value):
            found |= leaves(value, f"{prefix}{item.name}.")
        else:
            found[prefix + item.name] = plain(value)
    return found
