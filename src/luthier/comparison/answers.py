"""What one run answered on its held-out rows, as its folder holds it."""

import csv
import io
from dataclasses import dataclass, field
from pathlib import Path

from luthier.core import IntegrityError

__all__ = ["Answers", "answers_of"]


@dataclass(frozen=True)
class Answers:
    """Row by row: where it stands, its text, what was wanted, what was answered."""

    places: list[str]
    texts: list[str]
    wanted: list[str]
    said: list[str]
    sure: list[float] = field(default_factory=list)
    """how sure each answer is; empty where the run's task has no such number"""


def answers_of(run: Path | str) -> Answers:
    """Read `predictions.csv` of a finished run.

    Raises:
        IntegrityError: it is not there, or not whole.
    """
    path = Path(run) / "predictions.csv"
    try:
        lines = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline="")))
        place, wanted, said = (lines[0].index(name) for name in ("place", "wanted", "answer"))
        body = lines[1:]
        sure = lines[0].index("sure", said) if "sure" in lines[0][said:] else None
        return Answers(
            [line[place] for line in body], [" ".join(line[place + 1 : wanted]) for line in body],
            [line[wanted] for line in body], [line[said] for line in body],
            [] if sure is None else [float(line[sure]) for line in body],
        )  # fmt: skip
    except (OSError, ValueError, IndexError, csv.Error) as error:
        raise IntegrityError(f"{path}: cannot be read ({error}). Remove the folder {run} and train again.") from error
