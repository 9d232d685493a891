"""The one loop, what it learns from, and what comes out of it."""

from luthier.training.finish import Result
from luthier.training.loop import Listener
from luthier.training.predictor import Predictor, predict
from luthier.training.prepared import Prepared, prepare
from luthier.training.proof import verify_resume
from luthier.training.run import resume, train
from luthier.training.spec import BatchSpec, CheckpointSpec, DataSpec, EvalSpec, OptimSpec, RunSpec

__all__ = [
    "BatchSpec",
    "CheckpointSpec",
    "DataSpec",
    "EvalSpec",
    "Listener",
    "OptimSpec",
    "Predictor",
    "Prepared",
    "Result",
    "RunSpec",
    "predict",
    "prepare",
    "resume",
    "train",
    "verify_resume",
]
