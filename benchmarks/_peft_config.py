"""peft's configuration of a method at our defaults, from the file that we write for it; in a process of its own.

    python -m benchmarks._peft_config METHOD MODEL TASK SETTINGS FOLDER

A peer reads the file: what the writing holds in memory is then no part of the peer's peak.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["config"]

ROOT = Path(__file__).parent.parent


def config(method: str, model: str, task: str, settings: dict[str, Any]) -> Any:
    """The configuration, ready for `peft.get_peft_model`."""
    import peft

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks._peft_config", method, model, task, json.dumps(settings), folder]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{method} for peft: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        found = peft.PeftConfig.from_pretrained(folder)
    found.inference_mode = False
    found.task_type = task
    if getattr(found, "init_lora_weights", None) is False:
        found.init_lora_weights = True  # the file says that its numbers are there; here they are not
    return found


def main() -> None:
    method, model, task, settings, folder = sys.argv[1:]
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from benchmarks._work import MODELS
    from luthier import samples
    from luthier.surgery import attach, to_peft

    kind = AutoModelForCausalLM if task == "CAUSAL_LM" else AutoModelForSequenceClassification
    base = kind.from_pretrained(samples.model_path(MODELS[model]), **({"num_labels": 6} if task == "SEQ_CLS" else {}))
    to_peft(attach(base, method, **json.loads(settings)), Path(folder), task_type=task)


if __name__ == "__main__":
    main()
