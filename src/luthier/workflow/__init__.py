"""From a spec to a record: what is prepared, built, trained, finished, resumed and asked.

preparation      everything that can be refused is refused there: nothing has been written yet
build            the method's edits on the model, and the loop around it
start            `train` and `resume`: a run, or a recipe of several
run              one run, from its beginning or on from where it stopped
recipes          runs one after another, each made from what came out of those before
cross_validation k runs on folds, and one on all rows
resume_checks    what may differ between a run and its resumption
resume_proof     a run that is stopped and resumed, against one that was not
finish           the tuning is saved, read back, compared, and scored
prediction       answers of a finished run
evaluate_run     its scores on other rows
merged_folder    a finished run as a plain model folder
conversation     turns with a run that remember one another
import_peft      an adapter of the peft library as a tuning
generation       text that it writes
export           a finished run as files that peft reads
formats          every format in which a run leaves, by name
onnx_export      a graph of ONNX; onnx_reader computes it
gguf_export      a file for llama.cpp; gguf_layout and gguf_vocabulary say how it stands there, gguf_reader computes it
gguf_adapter     a LoRA for llama.cpp
vllm_export      a LoRA for vLLM, within its limits
as_lora          a LoRA in the place of a run's tuning
look_at_rows     rows as the model will see them, before anything is trained
reference        what the trained model computed of a few rows when training ended
fresh            one way out of a run's folder, in a process of its own
certificate      what was found there, beside the reference
certify_run      all ways, one after another
speaker          a run, its base or a model that is asked
kept_rows        what a recipe was told, kept
safety_audit     what a tuning did to refusals, before and after
load_model       a model and its tokenizer, from a folder, a sample or the hub
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier.workflow.certify_run import certify
    from luthier.workflow.cross_validation import cross_validate
    from luthier.workflow.evaluate_run import Evaluation, evaluate
    from luthier.workflow.finish import Result
    from luthier.workflow.merged_folder import merge
    from luthier.workflow.prediction import Predictor, predict
    from luthier.workflow.preparation import Prepared, prepare
    from luthier.workflow.resume_proof import verify_resume
    from luthier.workflow.start import resume, train

__all__ = [
    "Evaluation",
    "Predictor",
    "Prepared",
    "Result",
    "certify",
    "cross_validate",
    "evaluate",
    "merge",
    "predict",
    "prepare",
    "resume",
    "train",
    "verify_resume",
]

# Resolved on first use: what looks at rows alone loads no torch.
_HOMES = {
    "certify": "luthier.workflow.certify_run",
    "cross_validate": "luthier.workflow.cross_validation",
    "Evaluation": "luthier.workflow.evaluate_run",
    "evaluate": "luthier.workflow.evaluate_run",
    "Result": "luthier.workflow.finish",
    "merge": "luthier.workflow.merged_folder",
    "Predictor": "luthier.workflow.prediction",
    "predict": "luthier.workflow.prediction",
    "Prepared": "luthier.workflow.preparation",
    "prepare": "luthier.workflow.preparation",
    "verify_resume": "luthier.workflow.resume_proof",
    "resume": "luthier.workflow.start",
    "train": "luthier.workflow.start",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'luthier.workflow' has no attribute {name!r}")
