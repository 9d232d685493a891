"""What may be said of runs in words, before any table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from luthier.core import human_bytes, human_count, human_seconds, listed, several
from luthier.report.read import Run

__all__ = ["of_folds", "of_one", "of_several"]


def of_one(run: Run) -> tuple[str, ...]:
    """The findings of a single run; the first is the headline."""
    if run.record is None:
        return (f"This run has no result: {run.state}{f' ({run.why})' if run.why else ''}.",)
    record, quality = run.record, run.quality or {}
    lines = list(quality.get("warnings", ()))
    if "score" in quality:
        said = (
            f"{quality['metric'].replace('_', ' ')} {quality['score']:.3f} ({quality['low']:.3f} to "
            f"{quality['high']:.3f}) on {quality['rows']} held-out rows"
        )
        beside = []
        if quality.get("baseline") is not None:
            beside.append(f"always answering {quality['baseline_answer']!r} has {quality['baseline']:.3f}")
        if quality.get("by_words") is not None:
            beside.append(f"counted words (TF-IDF) with logistic regression have {quality['by_words']:.3f}")
        lines.insert(0, f"{said}; {' and '.join(beside)}." if beside else f"{said}.")
    elif record.scores:
        shown = listed([f"{name.replace('_', ' ')} {value:.4g}" for name, value in record.scores.items()])
        lines.insert(0, f"On the held-out rows: {shown}.")
    else:
        lines.insert(0, "No rows were held out, so nothing says how good this run is.")
    peak = f", with a peak of {human_bytes(record.peak_bytes)}" if record.peak_bytes else ""
    lines.append(
        f"It trained {human_count(record.trained)} numbers beside the head in {human_seconds(record.seconds)}{peak}; "
        f"{human_bytes(record.stored)} are stored."
    )
    error = quality.get("calibration_error")
    if isinstance(error, float):
        at, then = quality.get("temperature"), quality.get("calibrated_calibration_error")
        fitted = f", and {then:.3f} at the fitted temperature {at:.2f}" if at is not None and then is not None else ""
        lines.append(f"Certainty and accuracy are {error:.3f} apart on average{fitted}.")
    if not record.bit_exact:
        lines.append(f"It was resumed, and not to the bit: {'; '.join(record.because)}.")
    if run.why:
        lines.append(f"Its answers cannot be read: {run.why}")
    return tuple(lines)


def of_several(runs: Sequence[Run]) -> tuple[str, ...]:
    """The findings of runs that were not judged against each other."""
    whole = [run for run in runs if run.record is not None]
    lines = []
    if len(whole) > 1:
        lines.append(
            "These runs are listed, not compared: they did not all answer the same held-out rows with one label each, "
            "or not with the same seeds. `luthier compare` does both."
        )
    for run in runs:
        if run.record is None:
            lines.append(f"{run.name} has no result: {run.state}{f' ({run.why})' if run.why else ''}.")
    lines.append(f"{several(len(whole), 'run')} of {len(runs)} {'has' if len(whole) == 1 else 'have'} a result.")
    return tuple(lines)


def of_folds(told: Mapping[str, Any], wrong: str = "") -> tuple[str, ...]:
    """The findings of a cross-validation.

    Args:
        told: what cv.json holds; wrong: why that cannot be read.
    """
    mean, folds, scores = told.get("mean"), told.get("folds"), told.get("scores")
    if not isinstance(mean, dict) or not isinstance(scores, list) or not mean:
        return (f"This cross-validation has no result yet{f' ({wrong})' if wrong else ''}: `luthier resume` goes on.",)
    first = next(iter(mean))
    each = [float(score[first]) for score in scores if first in score]
    return (
        f"{first.replace('_', ' ')} {mean[first]:.3f} on average over {folds} folds, from {min(each):.3f} to "
        f"{max(each):.3f}; each row was scored once, by a run that had not learnt it.",
        "The run on all rows is the one to use. No row is left to score it on: expect of it the mean above.",
    )
