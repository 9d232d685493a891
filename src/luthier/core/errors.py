"""Everything we raise on purpose. A message says what was wrong, what would be right, and what to do next.

LuthierError                    exit code
├── UsageError                  2   the command or call itself cannot work
│   ├── UnknownName             2   no method, sample, task, setting of that name
│   └── ConfigError             2   a value that cannot work
├── BadInput                    3   something the user handed us cannot be used
│   ├── DataError               3   rows, columns, labels, encodings
│   ├── ModelError              3   a model folder or tokenizer that cannot be used
│   ├── AnatomyError            3   the model has no such site
│   ├── CompositionError        3   methods that cannot stand together
│   ├── CannotMerge             3   the method has no closed form
│   └── NothingTrains           3   the no-op guard: training would change nothing
├── IntegrityError              4   bytes that are not what they claim to be
│   ├── Refused                 4   foreign bytes that we will not read
│   └── WrongBase               4   a tuning that was made for another model
├── ResourceError               5   memory, disk, a lock held by another process
│   ├── DiskFull                5
│   └── Locked                  5
├── Diverged                    6   losses or gradients that stayed non-finite
├── NotPassed                   7   a gate that was asked for was not passed
├── WrongArithmetic             17  the same computation gave two results
└── Interrupted           130, 143  a signal; the run can be resumed
"""

from difflib import get_close_matches
from typing import ClassVar

__all__ = [
    "AnatomyError",
    "BadInput",
    "CannotMerge",
    "CompositionError",
    "ConfigError",
    "DataError",
    "DiskFull",
    "Diverged",
    "IntegrityError",
    "Interrupted",
    "Locked",
    "LuthierError",
    "ModelError",
    "NotPassed",
    "NothingTrains",
    "Refused",
    "ResourceError",
    "UnknownName",
    "UsageError",
    "WrongArithmetic",
    "WrongBase",
    "near",
]


class LuthierError(Exception):
    """The root of everything we raise on purpose; `exit_code` is what the command line ends with."""

    exit_code: ClassVar[int] = 1


class UsageError(LuthierError):
    """The command or call cannot work, whatever the data."""

    exit_code = 2


class UnknownName(UsageError):
    """No such method, sample, task or setting."""


class ConfigError(UsageError):
    """A value of the wrong type or outside its range."""


class BadInput(LuthierError):
    """Something the user handed us cannot be used."""

    exit_code = 3


class DataError(BadInput):
    """Rows, columns, labels or encodings that cannot be used; names file, line and field."""


class ModelError(BadInput):
    """A model folder or tokenizer that cannot be used."""


class AnatomyError(BadInput):
    """The model has no such site; lists what there is."""


class CompositionError(BadInput):
    """Methods that cannot stand together on one model."""


class CannotMerge(BadInput):
    """The method has no closed form in the weights."""


class NothingTrains(BadInput):
    """Training would change nothing; says which part is dead."""


class IntegrityError(LuthierError):
    """Bytes that are not what they claim to be."""

    exit_code = 4


class Refused(IntegrityError):
    """Foreign bytes that we will not read."""


class WrongBase(IntegrityError):
    """A tuning that was made for another model."""


class ResourceError(LuthierError):
    """Memory, disk, or a lock that another process holds."""

    exit_code = 5


class DiskFull(ResourceError):
    """A write did not fit."""


class Locked(ResourceError):
    """Another live process owns the run folder."""


class Diverged(LuthierError):
    """Losses or gradients stayed non-finite, or far from where they were."""

    exit_code = 6


class NotPassed(LuthierError):
    """What was measured is worse than the bound that was given."""

    exit_code = 7


class WrongArithmetic(LuthierError):
    """The same computation gave two results: the machine is not to be trusted."""

    exit_code = 17


class Interrupted(LuthierError):
    """A signal ended the run at a safe place; `exit_code` is 128 + the signal's number."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum  # type: ignore[misc]  # one per instance here: it depends on the signal


def near(name: str, known: list[str] | tuple[str, ...]) -> str:
    """Offer the nearest known names, as a sentence with a leading blank; empty when none is near.

    >>> near("lroa", ["lora", "dora", "ia3"])
    " Did you mean 'lora' or 'dora'?"
    """
    found = get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(n) for n in found)}?" if found else ""
