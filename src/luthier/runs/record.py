"""What happened in one run, in one object that goes to record.json and comes back equal."""

import json
from dataclasses import dataclass, field
from typing import Any

from luthier.core import IntegrityError, LuthierError, build, plain

__all__ = ["Record"]


@dataclass(frozen=True, kw_only=True)
class Record:
    """The summary of a run. Plain values only, so that any program can read it.

    Attributes:
        spec: the resolved specification.
        environment: from `environment()`.
        scores: name -> score; empty where nothing was measured.
        seconds: time spent, all attempts together; of earlier ones their training, and nothing of one that was killed.
        peak_bytes: the largest memory the process (or the device) held; None where it could not be measured.
        memory: bytes by part, each counted at its own highest; "other" is what of the peak they do not explain.
        forecast: what was said before the first step of the same parts, in bytes, and of packed copies of weights,
            which "other" holds; and the widest micro-batch: rows and tokens. `luthier plan --check` compares it with
            what was measured.
        timing: of a step on average, the first left out: seconds, rows, padded tokens, how wide micro-batches were and
            how many; seconds of loading; and, of runs of a second and more, how fast the machine was then: operations
            of products, bytes and calls in a second.
        trained, stored: how many numbers were trained, and how many bytes the result takes on the disk.
        status: "finished", "stopped", "diverged", ...
        bit_exact, because: whether a resume continued to the bit, and if not, why not.
    """

    spec: dict[str, Any]
    environment: dict[str, Any]
    scores: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    peak_bytes: int | None = None
    memory: dict[str, int] = field(default_factory=dict)
    forecast: dict[str, int] = field(default_factory=dict)
    timing: dict[str, float] = field(default_factory=dict)
    trained: int = 0
    stored: int = 0
    status: str = "finished"
    bit_exact: bool = True
    because: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values for record.json."""
        values: dict[str, Any] = plain(self)
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any] | str | bytes) -> "Record":
        """The inverse of `to_json`; also reads the file's text.

        Raises:
            IntegrityError: it is no record.
        """
        try:
            content = json.loads(values) if isinstance(values, str | bytes) else values
            return build(cls, content, "record.json")
        except (ValueError, TypeError, AttributeError, LuthierError) as error:
            raise IntegrityError(f"record.json: is no record of a run ({error}). Restore it from a copy.") from error
