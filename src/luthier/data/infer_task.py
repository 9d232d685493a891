"""Which task a run learns: asked for, or read from the columns, the labels and the model."""

from collections.abc import Callable
from typing import Any, Literal

from luthier.core import DataError, ModelError, UnknownName, near
from luthier.data.columns import Columns
from luthier.data.known_config import KnownConfig
from luthier.data.label_cells import labels_are_measures, refuse_unknown
from luthier.data.label_tasks import classification, regression
from luthier.data.rows import Table
from luthier.data.tag_tasks import token_classification, words_and_tags
from luthier.data.tasks import Task
from luthier.runs.spec import TASKS

__all__ = ["Kind", "infer_task", "kind_of_model"]

Kind = Literal["encoder", "decoder", "both"]


def kind_of_model(config: Any) -> Kind:
    """What a model is: an encoder reads both ways, a decoder writes, and some have a part for each."""
    if isinstance(config, KnownConfig):
        return config.kind
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if getattr(config, "is_encoder_decoder", False):
        return "both"
    masked = getattr(config, "model_type", "") in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return "encoder" if masked and not getattr(config, "is_decoder", False) else "decoder"


def infer_task(
    train: Table, test: Table | None, columns: Columns, asked: str = "auto", model_config: Any = None
) -> Task:
    """Decide the task from the columns, the type of the labels and the model, and check that it can be learnt.

    Args:
        asked: one of `TASKS`; anything but "auto" is taken, if the data allow it.
        model_config: of transformers; tells encoders, decoders and encoder-decoders apart. `None` skips that check.

    Raises:
        UnknownName: no task is called `asked`.
        DataError: labels that cannot be learnt: one class only, labels in test that train lacks, no numbers where
            numbers are needed.
        ModelError: a model that has no head for the task.
    """
    if asked not in TASKS:
        raise UnknownName(f"No task is called {asked!r}.{near(asked, TASKS)} There are {', '.join(TASKS)}.")
    name = asked
    both = bool(getattr(model_config, "is_encoder_decoder", False))
    if asked == "auto":
        if columns.shape == "labelled":
            name = "regression" if labels_are_measures(train, columns) else "classification"
        elif columns.shape == "tagged":
            name = "token_classification"
        elif columns.shape == "preferred":
            name = "preference"
        elif columns.shape == "answered":
            name = "seq2seq" if both else "causal_lm"
        else:
            name = "causal_lm"
    if model_config is not None:
        _refuse_model(name, model_config)
    makers: dict[str, Callable[[Table, Columns], Task]] = {
        "classification": classification,
        "regression": regression,
        "token_classification": token_classification,
    }
    task = makers[name](train, columns) if name in makers else Task(name=name)
    if test is not None:
        _check_test(task, test, columns)
    return task


def _refuse_model(name: str, model_config: Any) -> None:
    reads = kind_of_model(model_config)
    both = reads == "both"
    kind = getattr(model_config, "model_type", type(model_config).__name__)
    if name == "seq2seq" and not both:
        raise ModelError(
            f"task seq2seq needs an encoder-decoder such as T5 or BART; {kind!r} is none."
            " Use --task causal_lm with a decoder, or another model."
        )
    if name == "span_corruption" and not both:
        raise ModelError(
            f"task span_corruption needs an encoder-decoder such as T5; {kind!r} is none. Use --task masked_lm with an "
            "encoder, or --task causal_lm with a decoder."
        )
    if name == "masked_lm" and reads != "encoder":
        other = "span_corruption, as T5 learnt it," if both else "causal_lm"
        raise ModelError(
            f"task masked_lm needs an encoder such as BERT; {kind!r} is none. Use --task {other} or another model."
        )
    if name in ("preference", "judged", "reward", "prompts") and reads != "decoder":
        raise ModelError(f"task {name} needs a decoder such as Llama or GPT-2; {kind!r} is none. Use another model.")
    if name == "causal_lm" and both:
        raise ModelError(
            f"task causal_lm needs a decoder such as Llama or GPT-2; {kind!r} is an encoder-decoder."
            " Use --task seq2seq with prompt and response columns, or another model."
        )
    if name == "causal_lm" and reads == "encoder":
        raise ModelError(
            f"task causal_lm needs a decoder such as Llama or GPT-2; {kind!r} is an encoder: it sees the tokens it"
            " should predict. Give a column of labels (--label), or use a decoder."
        )


def _check_test(task: Task, test: Table, columns: Columns) -> None:
    missing = [c for c in columns.used().values() if c not in test.columns]
    if missing:
        raise DataError(
            f"{test.source}: no column {', '.join(map(repr, missing))}, which the training rows have. Its columns are"
            f" {', '.join(map(repr, test.columns))}. Both halves must name their columns alike."
        )
    if task.name == "token_classification":
        number = {name: i for i, name in enumerate(task.labels)}
        refuse_unknown(test, [words_and_tags(test, i, columns)[1] or [] for i in range(len(test))], number)
    else:
        task.targets(test, columns)
