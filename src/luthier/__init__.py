"""Fine-tune any transformer with any method, and know beforehand what it costs.

>>> import luthier
>>> len(luthier.__version__.split("."))
3
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from luthier.__version__ import __version__

if TYPE_CHECKING:
    from luthier.anatomy import Anatomy
    from luthier.runs.spec import DataSpec, RunSpec
    from luthier.surgery import METHODS, Tuned, attach, load
    from luthier.training import STRATEGIES
    from luthier.training.trainer_callback import HooksCallback
    from luthier.workflow import certify, evaluate, merge, predict, resume, train

__all__ = [
    "METHODS",
    "STRATEGIES",
    "Anatomy",
    "DataSpec",
    "HooksCallback",
    "RunSpec",
    "Tuned",
    "__version__",
    "attach",
    "certify",
    "evaluate",
    "load",
    "merge",
    "predict",
    "resume",
    "train",
]

# Resolved on first use: torch and transformers take seconds to import, and `luthier methods` needs neither.
_HOMES = {
    "METHODS": "luthier.surgery",
    "STRATEGIES": "luthier.training",
    "Anatomy": "luthier.anatomy",
    "HooksCallback": "luthier.training.trainer_callback",
    "Tuned": "luthier.surgery",
    "attach": "luthier.surgery",
    "load": "luthier.surgery",
    "DataSpec": "luthier.runs.spec",
    "RunSpec": "luthier.runs.spec",
    "certify": "luthier.workflow",
    "evaluate": "luthier.workflow",
    "merge": "luthier.workflow",
    "predict": "luthier.workflow",
    "resume": "luthier.workflow",
    "train": "luthier.workflow",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'luthier' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
