"""A finished run as a folder that other libraries read, with everything that an answer needs.

adapter_config.json, adapter_model.safetensors    the tuning, as peft reads it
tokenizer.json, ...                               the tokenizer, with the template and the padding of training
generation_config.json                            the tokens that end an answer
base/                                             where the base is a folder: its configuration with this run's labels
                                                  and stop tokens, and an index of where its weights lie; no weights
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from luthier.core import ConfigError, ResourceError
from luthier.core.places import refuse_taken
from luthier.runs import durable
from luthier.surgery import to_peft
from luthier.surgery.low_rank import LowRank, told_of
from luthier.trust import safetensors
from luthier.workflow.certificate import FILE as CERTIFICATE
from luthier.workflow.certificate import Step, certify_folder
from luthier.workflow.load_model import Source
from luthier.workflow.merged_folder import last_with_bias
from luthier.workflow.prediction import Predictor

__all__ = ["Exported", "export_peft", "write_tokenizer"]

TASK_TYPES = {
    "classification": ("SEQ_CLS", "AutoPeftModelForSequenceClassification"),
    "regression": ("SEQ_CLS", "AutoPeftModelForSequenceClassification"),
    "token_classification": ("TOKEN_CLS", "AutoPeftModelForTokenClassification"),
    "causal_lm": ("CAUSAL_LM", "AutoPeftModelForCausalLM"),
    "preference": ("CAUSAL_LM", "AutoPeftModelForCausalLM"),
    "judged": ("CAUSAL_LM", "AutoPeftModelForCausalLM"),
    "prompts": ("CAUSAL_LM", "AutoPeftModelForCausalLM"),
    "reward": ("SEQ_CLS", "AutoPeftModelForSequenceClassification"),
    "seq2seq": ("SEQ_2_SEQ_LM", "AutoPeftModelForSeq2SeqLM"),
    "span_corruption": ("SEQ_2_SEQ_LM", "AutoPeftModelForSeq2SeqLM"),
    "masked_lm": ("FEATURE_EXTRACTION", "AutoPeftModelForFeatureExtraction"),
}


@dataclass(frozen=True)
class Exported:
    """The folder, the one line of Python that reads it, what else is to be known, and the step of its certificate."""

    path: Path
    line: str
    notes: tuple[str, ...]
    step: Step | None = None
    shares: dict[str, float] | None = None
    """of a LoRA near a tuning: the share of energy that it keeps at each place"""


def export_peft(
    predictor: Predictor, folder: Path | str, *, accept: bool = False, check: bool = True, low: LowRank | None = None,
    look: Callable[[Path], None] = lambda folder: None,
) -> Exported:  # fmt: skip
    """Write a run's tuning so that one line of peft reads it.

    Where peft is installed, it reads the folder in a fresh process first, and what it computes is compared with what
    the run kept of the model that was trained; what came out is in the folder's certificate.json.

    Args:
        accept: write the folder although it is not the model that was trained; its certificate says so.
        check: off, nothing is read back.
        low: the predictor has a LoRA in the place of its tuning, and this is what became of that.
        look: sees the folder before it is read back, and may refuse it.

    Raises:
        IntegrityError: read back, it is not the model that was trained.
        ConfigError: the folder is there already.
        CannotMerge: the method has no form in peft's files.
        ResourceError: it cannot be written.
    """
    target = Path(folder)
    refuse_taken(target, deep=True)
    task, source = predictor.task, predictor.source
    if task.template:
        raise ConfigError(
            "this run asks for labels by a template, which a folder of peft cannot hold. Use luthier merge instead."
        )
    task_type, reader = TASK_TYPES[task.name]
    local = source.name.startswith("sample:") or Path(source.name).expanduser().is_dir()
    base = str(target.absolute() / "base") if local else source.name
    line, after_a_move = _lines(predictor, target, reader, local)
    try:
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".tmp-{target.name}-", dir=target.absolute().parent))
    except OSError as error:
        raise ResourceError(f"{target}: cannot be written ({error.strerror or error}). Name another folder.") from error
    in_unit = _into_unit(predictor)
    step = None
    try:
        whole = draft / target.name
        to_peft(predictor.tuned, whole, task_type=task_type, base=base, own=in_unit or (lambda name, value: value))
        write_tokenizer(predictor, whole)
        if local:
            _write_base(predictor, source, whole / "base")
        settings = getattr(predictor.tuned.model, "generation_config", None)
        if settings is not None:
            settings.save_pretrained(whole)
        (whole / "README.md").write_text(_card(predictor, target.name, line, after_a_move, local, low), "utf-8")
        look(whole)
        if check and find_spec("peft") is not None:
            found = certify_folder(
                predictor.path, "exported", whole, halves=False, in_unit=in_unit is not None, accept=accept,
                shown=target, rough=low is not None and not low.exact,
            )  # fmt: skip
            durable.write_json(whole / CERTIFICATE, found.to_plain())
            step = found.steps[0]
        _open_to_all(whole)
        whole.rename(target)
    except OSError as error:
        raise ResourceError(f"{target}: cannot be written ({error.strerror or error}). Name another folder.") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    notes = [] if find_spec("peft") else ["peft is not installed here, so it was not read back"]
    if (task.scale, task.center) != (1.0, 0.0) and in_unit is None:
        notes.append(f"its numbers times {task.scale:g} plus {task.center:g} are in the unit of the rows")
    if predictor.spec.codes is not None:
        notes.append(
            f"it was trained beside a base in {predictor.spec.codes} codes: on the float weights its answers are others"
        )
    if local:
        notes.append(
            f"its base is read from {source.path}, and it is read where it was written; README.md in it says how to "
            "read it after a move"
        )
    return Exported(target, line, tuple(notes), step)


def _lines(predictor: Predictor, target: Path, reader: str, local: bool) -> tuple[str, str]:
    """The line that reads the folder where it was written, and those that read it anywhere, beside a base anywhere."""
    task = predictor.task
    more = ""
    if task.labels:
        # A base of its own knows nothing of these labels.
        more = f", id2label={dict(enumerate(task.labels))!r}, label2id={ {n: i for i, n in enumerate(task.labels)}!r}"
    elif task.name == "regression":
        more = ", num_labels=1"
    line = f"peft.{reader}.from_pretrained({str(target)!r}{'' if local else more})"
    writes = task.name in ("causal_lm", "seq2seq")  # then the tokens that end an answer are told in the folder
    stops = f'base.generation_config = GenerationConfig.from_pretrained("{target.name}")'
    anywhere = [
        "import peft", f"from transformers import {task.auto_class}{', GenerationConfig' if writes else ''}", "",
        f'base = {task.auto_class}.from_pretrained("BASE"{more})',
        *([f"base.config.pad_token_id = {predictor.contract['pad']['id']}"] if task.labels else []),
        *([stops] if writes else []),
        f'model = peft.PeftModel.from_pretrained(base, "{target.name}").eval()',
    ]  # fmt: skip
    return line, "\n".join(anywhere)


def _card(predictor: Predictor, name: str, line: str, after_a_move: str, local: bool, low: LowRank | None) -> str:
    """What a reader of the folder needs to know."""
    task, base = predictor.task, predictor.tuned.model.config._name_or_path
    said = [
        "---", "library_name: peft", "---", "", f"# {name}", "",
        f"A tuning of `{predictor.spec.model}` with {told_of(predictor.spec.method, low)}, as peft reads it. The "
        "weights of the base are not in it.", "",
    ]  # fmt: skip
    if local:
        said += [
            f"Its base was the folder `{predictor.source.path}`. `base/` points at the files there, and "
            "`adapter_config.json` at `base/`, both by their whole paths: where nothing has moved, one line reads it.",
        ]
    else:
        said += [f"Its base is `{base or predictor.spec.model}`, which is fetched by this name."]
    said += [
        "", "```python", "import peft", "", f"model = {line}", "```", "",
        "After a move, or on another machine, name the base (`BASE`: its folder or its name on the hub):", "",
        "```python", after_a_move, "```", "",
    ]  # fmt: skip
    if task.labels:
        said += [f"Labels: {', '.join(task.labels)}."]
    said += [predictor.length_said]
    return "\n".join(said) + "\n"


def _into_unit(predictor: Predictor) -> Callable[[str, Tensor], Tensor] | None:
    """What the head's last layer is written as, so that a regression answers in the unit of the rows."""
    task = predictor.task
    model: Any = predictor.tuned.model
    path = last_with_bias(model) if task.name == "regression" else None
    if path is None:
        return None

    def own(name: str, value: Tensor) -> Tensor:
        if name == f"{path}.weight":
            return value.float() * task.scale
        return value.float() * task.scale + task.center if name == f"{path}.bias" else value

    return own


def write_tokenizer(predictor: Predictor, folder: Path) -> None:
    """The run's tokenizer, with the template of training."""
    tokenizer, stored = predictor.tokenizer, predictor.contract["template"]
    before = tokenizer.chat_template
    try:
        if stored is not None:
            tokenizer.chat_template = stored["text"]
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template = before


def _write_base(predictor: Predictor, source: Source, folder: Path) -> None:
    """The base's configuration, with labels and padding as in training, and an index that points at its weights."""
    import json

    folder.mkdir()
    model = predictor.tuned.model
    model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    where: dict[str, Any] = {}
    for path in source.folder.weights:
        where |= dict.fromkeys(safetensors.check_header(path).entries, str(Path(path).absolute()))
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1, sort_keys=True), "utf-8")


def _open_to_all(folder: Path) -> None:
    """Ordinary permissions: the folder is made to be given away."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
