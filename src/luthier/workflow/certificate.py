"""What was compared with the trained model, by how much it differs, and whether that is rounding.

A step passes where its logits lie as near to the trained model's as rounding allows, its rows are the same token ids,
what it writes greedily is the same, and it is not the base. What is allowed, as a share of the logits' size:

    1e-5    numbers in fp32 that are computed in another order: merged, exported, another kernel
    2e-2    weights or arithmetic in bf16 or fp16, of 8 and 11 bits

and never more than a quarter of what the tuning changes: then nobody could tell it from a part of the tuning.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.__version__ import __version__
from luthier.core import IntegrityError, LuthierError, plain
from luthier.runs import RunFolder
from luthier.runs.spec import RunSpec
from luthier.surgery import tuning_files
from luthier.workflow.fresh import Answer, Asked, ask
from luthier.workflow.reference import Reference, Seen, read_reference

__all__ = [
    "FAILED",
    "FILE",
    "NOT_DONE",
    "PASSED",
    "Certificate",
    "Expected",
    "Step",
    "called",
    "certificate_of",
    "certify_folder",
    "compared",
    "expected_of",
    "rms_between",
    "step_of",
]

FILE = "certificate.json"
ROUNDING, ROUNDING_IN_HALVES = 1e-5, 2e-2
OF_THE_EFFECT = 0.25
PASSED, FAILED, NOT_DONE = "passed", "failed", "not done"
READERS = {
    "merged": "transformers",
    "exported": "peft",
    "onnx": "onnxruntime",
    "gguf": "transformers",
    "gguf_adapter": "luthier",
}
"""step of a folder that was written -> what reads it back"""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One way in which the tuning goes on, beside the model that was trained.

    Attributes:
        status: passed, failed, or not done.
        reason: why it failed or was not done; what it was read by, where it passed.
        gap: the largest difference of a logit.
        off: the differences' root mean square.
        tolerance: of `off`.
        from_base: how far the step's logits lie from the base's, as `off`.
        kl: divergence of its answers from the trained ones, in nats a position; None for numbers.
        likeliest: share of positions with the same likeliest answer; None for numbers.
        greedy: share of greedily written tokens that are the same; None where nothing is written.
        same_bits: every logit is the same number.
    """

    name: str
    status: str
    reason: str = ""
    gap: float | None = None
    off: float | None = None
    tolerance: float | None = None
    from_base: float | None = None
    kl: float | None = None
    likeliest: float | None = None
    greedy: float | None = None
    same_bits: bool | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Expected:
    """The trained model's outputs of all rows, and its base's."""

    trained: Seen
    base: tuple[Tensor, ...] = field(repr=False)

    def in_unit(self, scale: float, center: float) -> Expected:
        """The same where a folder answers a regression in the unit of its rows."""
        if (scale, center) == (1.0, 0.0):
            return self
        trained, base = (tuple(t * scale + center for t in given) for given in (self.trained.logits, self.base))
        return Expected(replace(self.trained, logits=trained), base)


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """All steps of a run, with what they were compared on and by."""

    run: str
    model: str
    method: str
    tuning: str
    rows: int
    prompts: int
    steps: tuple[Step, ...]
    accepted: bool = False
    luthier: str = __version__
    versions: dict[str, str] = field(default_factory=dict)
    date: str = ""

    @property
    def passed(self) -> bool:
        """No step failed, and one was done."""
        return not self.failed and any(step.status == PASSED for step in self.steps)

    @property
    def failed(self) -> tuple[Step, ...]:
        """The steps that failed."""
        return tuple(step for step in self.steps if step.status == FAILED)

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return {"format": 1, "passed": self.passed, **plain(self)}


def certificate_of(
    run: Path, spec: RunSpec, rows: int, prompts: int, steps: Sequence[Step], *, accepted: bool = False
) -> Certificate:
    """The steps with what they are of, by which programs, and when."""
    import transformers

    programs = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return Certificate(
        run=run.name, model=called(spec.model), method=spec.method, tuning=tuning_files.weights_digest(run / "tuning"),
        rows=rows, prompts=prompts, steps=tuple(steps), accepted=accepted, versions=programs,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )  # fmt: skip


def called(model: str) -> str:
    """A model's name for those who are given a folder: of one on this disk the last part, which tells no place."""
    return model if model.startswith("sample:") or not Path(model).exists() else Path(model).name


def step_of(
    name: str, asked: Asked, expected: Expected, *, halves: bool = False, beside: str = "", rough: bool = False,
    do: Callable[[Asked], Answer] = ask,
) -> tuple[Step, Answer | None]:  # fmt: skip
    """Do a step and compare what it finds; a step that breaks has failed.

    Args:
        halves: weights or arithmetic are in 16 bits.
        beside: what is said of the step besides, where it passes.
        rough: see `compared`.
        do: carries the step out.
    """
    started = time.monotonic()
    try:
        answer = do(asked)
    except LuthierError as error:
        return Step(name=name, status=FAILED, reason=str(error), seconds=time.monotonic() - started), None
    seconds = time.monotonic() - started
    step = compared(name, expected, answer.kept.plus(answer.asked), halves=halves, rough=rough)
    if step.status == PASSED and "by" in answer.facts:
        step = replace(step, reason=f"read by {answer.facts['by']}{beside}")
    return replace(step, seconds=seconds), answer


def compared(name: str, expected: Expected, found: Seen, *, halves: bool = False, rough: bool = False) -> Step:
    """One step's outputs beside the trained model's.

    Args:
        rough: what was written is meant to be near the tuning and not the same: it may lose a quarter of what the
            tuning changes, and what it writes may be other words.
    """
    trained = expected.trained
    if found.ids != trained.ids:
        wrong = sum(a != b for a, b in zip(found.ids, trained.ids, strict=False)) or abs(
            len(found.ids) - len(trained.ids)
        )
        return Step(
            name=name, status=FAILED,
            reason=f"{wrong} of {len(trained.ids)} rows are read as other token ids: its tokenizer or template is "
            "another than in training",
        )  # fmt: skip
    if [t.shape for t in found.logits] != [t.shape for t in trained.logits] or not trained.logits:
        return Step(name=name, status=FAILED, reason="its outputs have another shape than the trained model's")
    wanted, got = (torch.cat([t.flatten() for t in given]) for given in (trained.logits, found.logits))
    if not torch.isfinite(got).all():
        return Step(name=name, status=FAILED, reason="its outputs are not finite")
    off, size = _rms(got - wanted), _rms(wanted)
    tolerance = (ROUNDING_IN_HALVES if halves else ROUNDING) * size
    effect = from_base = None
    if expected.base:
        base = torch.cat([t.flatten() for t in expected.base])
        effect, from_base = _rms(wanted - base), _rms(got - base)
        tolerance = OF_THE_EFFECT * effect if rough else min(tolerance, OF_THE_EFFECT * effect)
    greedy, told = _greedy(trained, found, 2 * tolerance)
    kl, likeliest = _as_answers(trained.logits, found.logits)
    reason = ""
    if from_base is not None and (from_base == 0 or from_base < 0.5 * off):
        reason = "it computes what the base computes: the tuning is lost"
    elif off > tolerance:
        of = "" if effect is None else f", of {effect:.2g} that the tuning changes"
        reason = f"its logits are off by {off:.2g}{of}; {tolerance:.2g} is allowed"
    elif told and not rough:
        reason = told
    return Step(
        name=name, status=FAILED if reason else PASSED, reason=reason, gap=float((got - wanted).abs().max()), off=off,
        tolerance=tolerance, from_base=from_base, kl=kl, likeliest=likeliest, greedy=greedy,
        same_bits=bool(torch.equal(got, wanted)),
    )  # fmt: skip


def rms_between(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Of the differences of all logits."""
    return _rms(torch.cat([(a - b).flatten() for a, b in zip(some, others, strict=True)]))


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def _as_answers(trained: Sequence[Tensor], found: Sequence[Tensor]) -> tuple[float | None, float | None]:
    """Divergence, in nats a position, and the share of positions with the same likeliest answer."""
    if trained[0].shape[-1] < 2:
        return None, None
    sums, same, n = 0.0, 0, 0
    for a, b in zip(trained, found, strict=True):
        p, q = (torch.log_softmax(t.double(), -1) for t in (a, b))
        sums += float((p.exp() * (p - q)).sum())
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
        n += a.numel() // a.shape[-1]
    return max(0.0, sums / n), same / n


def _greedy(trained: Seen, found: Seen, near: float) -> tuple[float | None, str]:
    """The share of written tokens that are the same, and what is wrong with the others.

    After a token that stood less than rounding above the next likely one, anything may follow.
    """
    if not trained.written:
        return None, ""
    if len(found.written) != len(trained.written):
        return 0.0, "it writes after other prompts than the trained model"
    same = total = 0
    wrong = ""
    for number, (a, b) in enumerate(zip(trained.written, found.written, strict=True), start=1):
        longest = max(len(a), len(b))
        same += sum(x == y for x, y in zip(a, b, strict=False))
        total += longest
        first = next((i for i in range(longest) if a[i : i + 1] != b[i : i + 1]), None)
        leads = trained.leads[number - 1]
        if first is not None and not wrong and not (first < min(len(a), len(b)) and leads[first] <= near):
            wrong = f"prompt {number}: token {first + 1} of what it writes is another than the trained model's"
    return (same / total if total else 1.0), wrong


# --- of a folder -----------------------------------------------------------------------------------------------------


def expected_of(
    run: Path,
    spec: RunSpec,
    kept: Reference,
    reloaded: Answer | None,
    *,
    prompts: Sequence[dict[str, Any]] = (),
    do: Callable[[Asked], Answer] = ask,
) -> Expected:
    """What merged and exported weights must give: the trained model's outputs, in fp32 on plain weights.

    They are those that were kept where the run trained so; else the run is looked at anew.

    Raises:
        LuthierError: the run cannot be loaded.
    """
    contract = tuning_files.read_tuning(run / "tuning")
    in_fp32 = contract["precision"] == "fp32" and contract["contract"].get("weights") == "fp32" and spec.codes is None
    if in_fp32 and (not prompts or reloaded is not None):
        if reloaded is None:
            return Expected(kept.trained, kept.base)
        more = () if reloaded.base_asked is None else reloaded.base_asked.logits
        return Expected(kept.trained.plus(reloaded.asked), kept.base + more)
    answer = do(Asked(step="in_fp32", run=str(run), prompts=prompts))
    assert answer.base is not None and answer.base_asked is not None
    return Expected(answer.kept.plus(answer.asked), answer.base.plus(answer.base_asked).logits)


def certify_folder(
    run: Path, step: str, folder: Path, *, halves: bool, in_unit: bool, accept: bool, shown: Path, beside: str = "",
    rough: bool = False, do: Callable[[Asked], Answer] = ask,
) -> Certificate:  # fmt: skip
    """Compare a folder that was just written with the trained model, in a fresh process.

    Args:
        step: one of READERS.
        in_unit: a regression's answers are in the unit of its rows there.
        accept: give the certificate though the step failed; it says so.
        beside: what is said of the step besides, where it passes.
        shown: what the folder will be called.
        rough: see `compared`.

    Raises:
        IntegrityError: the step failed.
    """
    spec = RunSpec.from_plain(RunFolder.open(run, write=False).spec, where=f"{run}/run.json")
    kept = read_reference(run)
    if kept is None:
        done = Step(name=step, status=NOT_DONE, reason="the run kept no rows to compare on: an older luthier made it")
        return certificate_of(run, spec, 0, 0, [done])
    task = tuning_files.read_tuning(run / "tuning")["task"]
    expected = expected_of(run, spec, kept, None, do=do)
    if in_unit and task["name"] == "regression":
        expected = expected.in_unit(float(task["scale"]), float(task["center"]))
    asked = Asked(step=step, run=str(run), folder=str(folder))
    done, _ = step_of(step, asked, expected, halves=halves, beside=beside, rough=rough, do=do)
    if done.status == FAILED and not accept:
        more = " A higher --rank is nearer." if rough else ""
        raise IntegrityError(
            f"{shown}: not written. Read back by {READERS[step]}, it is not the "
            f"model that was trained: {done.reason}.{more} --accept writes it all the same, and its {FILE} says so."
        )
    return certificate_of(run, spec, len(kept.rows), 0, [done], accepted=done.status == FAILED)
