"""What came out, on the screen: the score beside guessing, class by class, and what speaks against using it."""

from luthier.cli._output import YELLOW, Screen
from luthier.training.quality import Quality

__all__ = ["show_quality"]

MOST_CLASSES = 20
MOST_CONFUSED = 8


def show_quality(
    to: Screen, quality: Quality, *, rows: str = "held-out rows", answers: str = "predictions.csv",
    more: str = "quality.json",
) -> None:  # fmt: skip
    """Draw it; small confusion matrices too.

    Args:
        rows: what was scored.
        answers: where the answer to each row stands.
        more: where the classes stand that are not drawn.
    """
    said = f"{quality.metric} {quality.score:.3f} on {quality.rows} {rows} (95 % interval {quality.low:.3f} to "
    said += f"{quality.high:.3f})"
    if quality.baseline is not None:
        said += f"; always answering {quality.baseline_answer!r}: {quality.baseline:.3f}"
    if quality.by_words is not None:
        said += f"; counted words (TF-IDF): {quality.by_words:.3f}"
    to.headline("\n" + said)
    if quality.classes:
        to.show()
        shown = sorted(quality.classes, key=lambda c: -c.rows)[:MOST_CLASSES]
        to.table(
            ("class", "rows", "found", "precision", "F1", "learnt from"),
            [(c.name, c.rows, f"{c.recall:.2f}", f"{c.precision:.2f}", f"{c.f1:.2f}", c.learnt) for c in shown],
            right=("rows", "found", "precision", "F1", "learnt from"),
        )
        left = len(quality.classes) - len(shown)
        if left:
            to.show(f"and {left} smaller classes: {more}")
    if quality.classes and len(quality.classes) <= MOST_CONFUSED and quality.score < 1:
        to.show("\nrows of each class (down) by the answer (across):")
        names = [c.name for c in quality.classes]
        table = [(c.name, *counts) for c, counts in zip(quality.classes, quality.confusion, strict=True)]
        to.table(("", *names), table, right=tuple(names))
    if quality.calibration_error is not None:
        wrong = len(quality.sure_but_wrong)
        many = str(wrong) if wrong < 10 else "10 or more"
        sure = f"; {many} rows are wrong at 90 % or more ({answers})" if wrong else ""
        to.show(f"\nCertainty and accuracy are {quality.calibration_error:.3f} apart on average{sure}.")
    if quality.temperature is not None:
        to.show(
            f"At temperature {quality.temperature:.2f}, fitted on rows held out to select by, they are "
            f"{quality.calibrated_calibration_error:.3f} apart; negative log-likelihood {quality.calibrated_nll:.3f} "
            f"in place of {quality.nll:.3f}."
        )
    if quality.plain_nll is not None:
        to.show(
            f"The model alone, without the method's own way of answering: loss {quality.plain_nll:.4f} in place of "
            f"{quality.nll:.4f}, certainty and accuracy {quality.plain_calibration_error:.3f} apart."
        )
    for warning in quality.warnings:
        to.show(f"\n{warning}", style=YELLOW)
