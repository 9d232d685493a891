"""From a name to a machine: a model of ours, a finished run, or one behind an endpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luthier.asking.local import Local
from luthier.core import ConfigError, ModelError, build
from luthier.data.chat import ChatTemplate
from luthier.data.infer_task import kind_of_model
from luthier.data.stop_tokens import stop_ids
from luthier.data.tasks import Task
from luthier.data.tokenizer import choose_pad, position_limit
from luthier.training.answers import positions_for_rows
from luthier.training.precision import choose_device, choose_precision
from luthier.workflow.load_model import find_model, load_config, load_model, load_tokenizer
from luthier.workflow.prediction import Predictor

__all__ = ["config_of", "open_model"]

WRITERS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")


def is_run(name: str) -> bool:
    """Whether a name is the folder of a run."""
    return (Path(name) / "run.json").is_file()


def config_of(name: str) -> Any:
    """The configuration of a model or of a run's base, refused where it writes no text.

    Raises:
        ModelError: it is an encoder.
        ConfigError: the run learnt no texts.
    """
    if is_run(name):
        predictor = Predictor(name)
        if predictor.task.auto_class not in WRITERS:
            raise ConfigError(
                f"{name}: this run learnt {predictor.task.name.replace('_', ' ')} by a head of its own and goes on "
                "from no prompt. Score it with luthier evaluate, or ask a run that learnt causal_lm or seq2seq."
            )
        return predictor.tuned.model.config
    config = load_config(find_model(name))
    if kind_of_model(config) == "encoder":
        raise ModelError(
            f"{name}: {config.model_type} is an encoder, which goes on from no prompt. Ask a decoder or an "
            "encoder-decoder, such as sample:smollm2-135m, or train this one: luthier train."
        )
    return config


def open_model(
    name: str, *, device: str = "auto", precision: str = "auto", share: bool = True, raw: bool = False
) -> Local:
    """Load a model, or a finished run, as a machine.

    A decoder with a chat template, or a run that learnt by one, reads each prompt as one turn of the user.

    Args:
        raw: prompts are read as they are.

    Raises:
        ModelError, ConfigError: it writes no text, or cannot be loaded.
    """
    config = config_of(name)
    if is_run(name):
        predictor = Predictor(name)
        writer, stored = predictor.generator, predictor.contract["template"]
        return Local(
            predictor.tuned.model, predictor.tokenizer, name=name, device=predictor.device,
            precision=predictor.precision, both=writer.both, limit=positions_for_rows(predictor.tuned),
            pad_id=writer.pad_id, stop=writer.stop, within=predictor.answering, share=share,
            template=None if raw or stored is None or writer.both else build(ChatTemplate, stored, "template"),
        )  # fmt: skip
    where, source = choose_device(device), find_model(name)
    arithmetic = choose_precision(precision, where)
    both = kind_of_model(config) == "both"
    task = Task(name="seq2seq" if both else "causal_lm")
    tokenizer = load_tokenizer(source)
    model, _ = load_model(source, task, dtype=arithmetic.dtype, device=where, seed=0)
    pad = choose_pad(tokenizer, int(model.get_input_embeddings().weight.shape[0]))
    return Local(
        model, tokenizer, name=name, device=where, precision=arithmetic, both=both, limit=position_limit(config),
        pad_id=pad.id, stop=stop_ids(None, tokenizer, model), share=share,
        template=None if raw or both or not tokenizer.chat_template else ChatTemplate.of(tokenizer),
    )  # fmt: skip
