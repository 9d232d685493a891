"""A run's tuning for vLLM, as peft's files; its limits are checked before.

The limits are those of vLLM 0.22.1, read in its documentation of `vllm.config.lora` and in `vllm/lora/peft_helper.py`
(November 2026); vLLM itself was not run here. It takes one rank and one scale for all layers, without a word where a
file has a pattern of them, so that this is looked at most closely.
"""

from __future__ import annotations

import json
from pathlib import Path

from luthier.core import CannotMerge, ConfigError
from luthier.surgery import compose
from luthier.surgery.low_rank import LowRank
from luthier.workflow.as_lora import lora_of_run
from luthier.workflow.export import Exported, export_peft
from luthier.workflow.prediction import Predictor

__all__ = ["VERSION", "check", "export_vllm"]

VERSION = "0.22.1"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank takes; 16 where it is left out
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj")


def export_vllm(path: Path | str, folder: Path | str, *, rank: int | None = None, accept: bool = False) -> Exported:
    """Write a run's tuning as vLLM loads a LoRA beside its base.

    Args:
        rank: of a LoRA that is near the tuning, where that is none itself.

    Raises:
        ConfigError: no such run, one that is not finished, or a task that writes no text.
        CannotMerge: something that vLLM refuses, or would ignore without a word; says what to do.
        IntegrityError: read back by peft, it is not the model that was trained.
    """
    path = Path(path)
    task, spec = Predictor.task_of(path), Predictor.spec_of(path)
    if task.name not in ("causal_lm", "preference", "judged") or task.template:
        raise ConfigError(
            f"{path}: is of task {task.name}; a LoRA beside a base in vLLM writes text, and its files hold no head "
            "(modules_to_save). Nearest is --to merged, which vLLM serves as a model of its own."
        )
    method = compose.method(spec.method, dict(spec.settings))
    low: LowRank | None = None
    notes: tuple[str, ...] = ()
    shares: dict[str, float] | None = None
    if rank is not None:
        found = lora_of_run(path, rank)
        predictor, low, notes, shares = found.predictor, found.low, found.notes, found.shares
    elif method.is_a("lora"):
        predictor = Predictor(path)
    else:
        why = "vLLM does not do DoRA" if method.is_a("dora") else "vLLM loads LoRA and nothing else of peft's"
        raise CannotMerge(
            f"{path}: {why}, and this is {spec.method}. Nearest is a LoRA of a given rank, its loss measured: "
            "--as lora --rank 16; or the same answers: --to merged."
        )
    written = export_peft(predictor, folder, accept=accept, low=low, look=check)
    facts = json.loads((written.path / "adapter_config.json").read_bytes())
    most = next(n for n in RANKS if n >= facts["r"])
    base, name = facts["base_model_name_or_path"], written.path.name
    serve = f"vllm serve {base} --enable-lora --max-lora-rank {most} --lora-modules {name}={written.path}"
    said = [f"within the limits of vLLM {VERSION}, which was not run here; peft read it back"]
    if (written.path / "chat_template.jinja").exists():
        where = written.path / "chat_template.jinja"
        said += [f"vLLM takes the base's template; for the one of training: --chat-template {where}"]
    if Path(base).name == "base":
        said += ["BASE in that line is the folder of the base's own weights: base/ here only points at them"]
        serve = serve.replace(base, "BASE", 1)
    return Exported(written.path, serve, (*notes, *said, *written.notes), written.step, shares)


def check(folder: Path) -> None:
    """Refuse files that vLLM refuses, or of which it would ignore a part.

    Raises:
        CannotMerge: with what to do.
    """
    facts = json.loads((folder / "adapter_config.json").read_bytes())
    instead = "Write one LoRA of one rank: --as lora --rank N; or --to merged."
    if facts.get("peft_type") != "LORA" or facts.get("use_dora"):
        raise CannotMerge(f"vLLM loads LoRA without DoRA. {instead}")
    if facts["r"] > RANKS[-1]:
        raise CannotMerge(f"rank {facts['r']}: vLLM takes at most {RANKS[-1]} (--max-lora-rank). {instead}")
    for name in ("rank_pattern", "alpha_pattern"):
        if facts.get(name):
            raise CannotMerge(f"{name} is {facts[name]}: vLLM takes one for all layers, and ignores it. {instead}")
    if facts.get("modules_to_save"):
        raise CannotMerge(
            f"{', '.join(facts['modules_to_save'])} is trained whole, which vLLM refuses. Write --to merged."
        )
    if facts.get("bias", "none") != "none":
        raise CannotMerge(f"bias is {facts['bias']!r}, which vLLM refuses. Write --to merged.")
    other = sorted({path.rpartition(".")[2] for path in facts["target_modules"]} - set(LAYERS))
    if other:
        raise CannotMerge(
            f"{', '.join(other)} is tuned; of a decoder's blocks vLLM is known here to load {', '.join(LAYERS)}. "
            "Write --to merged."
        )
