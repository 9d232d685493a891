"""From a name to a model, its tokenizer and its fingerprint. Nothing that a file says is executed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from luthier.core import ModelError
from luthier.data.batches import Collator
from luthier.data.corrupted import corruption_of
from luthier.data.tasks import Task
from luthier.surgery import keyed
from luthier.workflow.model_files import Source, find_model, load_config, load_tokenizer, quiet

__all__ = [
    "Loaded",
    "Source",
    "collator_of",
    "find_model",
    "load_config",
    "load_model",
    "load_tokenizer",
    "quiet",
    "tokenizer_digest",
    "with_head",
]


@dataclass(frozen=True)
class Loaded:
    """A model ready for surgery."""

    model: Any
    tokenizer: Any
    source: Source


def with_head(config: Any, task: Task) -> Any:
    """The configuration with as many outputs as the task has; changed in place."""
    if task.n_outputs is not None:
        config.num_labels = task.n_outputs
        if task.labels:
            config.id2label = dict(enumerate(task.labels))
            config.label2id = {label: i for i, label in enumerate(task.labels)}
        if task.problem_type is not None:
            config.problem_type = task.problem_type
    return config


def empty_model(source: Source, task: Task) -> Any:
    """The model's structure on the meta device: for its anatomy and for counts, before any weight is read."""
    import transformers

    with quiet(), torch.device("meta"):
        return getattr(transformers, task.auto_class).from_config(with_head(load_config(source), task))


def load_model(
    source: Source, task: Task, *, dtype: torch.dtype, device: torch.device, seed: int, store: str | None = None
) -> tuple[Any, tuple[str, ...]]:
    """Load the weights, memory-mapped, with a new head for the task where one is needed.

    Args:
        store: a format in which the linear layers are held, such as nf4; None for floats of `dtype`.

    Returns:
        the model, and the names of the tensors that no weight file filled: they have to learn.

    Raises:
        ModelError: weights are missing or do not fit the configuration.
    """
    import transformers

    config, more = with_head(load_config(source), task), {}
    if store is not None:
        refuse_quantised_twice(source, config, store)
        from luthier.workflow.load_stored import StoreConfig, clean, keep_originals

        more = {"quantization_config": StoreConfig(store, dtype)}
    auto = getattr(transformers, task.auto_class)
    try:
        with quiet(), keyed(seed, "head"):
            model, report = auto.from_pretrained(
                source.path,
                config=config,
                dtype=dtype,
                **more,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=task.n_outputs is not None,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{source.name}: cannot be loaded for {task.name}: {str(error).splitlines()[0]}") from error
    if store is not None:
        clean(model)
        keep_originals(model, source.folder.weights, dict(source.folder.shapes))
    from luthier.anatomy import Anatomy

    heads = set(Anatomy.read(model).head_tensors)
    # A new head has no weights yet, and a pooler may be absent from a checkpoint of a bare encoder.
    absent = set(report["missing_keys"])
    for name, *shapes in report["mismatched_keys"]:
        if name not in heads:
            raise ModelError(
                f"{source.name}: cannot be loaded for {task.name}: {name} has the shape {list(shapes[0])} in its "
                f"weights, and {list(shapes[1])} by its configuration. Use the right model folder."
            )
        absent.add(name)  # a head for other labels: the task's own is new
    missing = [n for n in absent if n not in heads and "pooler" not in n]
    if task.name == "masked_lm":  # an encoder that was kept without its head of words, such as one for sentences
        missing = [n for n in missing if n.startswith(f"{model.base_model_prefix}.")]
    if missing:
        raise ModelError(
            f"{source.name}: {len(missing)} tensors of {type(model).__name__} are not in its weights, such as "
            f"{', '.join(sorted(missing)[:3])}. It would start from random numbers there; use the right model folder."
        )
    # A tensor that several places share is new once, under its first name.
    again = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    return model.to(device).eval(), tuple(sorted(absent - again))


def collator_of(task: Task, model: Any, tokenizer: Any, *, pad_id: int, pad_to: int, seed: int) -> Collator:
    """What lays rows of a task side by side for a model.

    Raises:
        ModelError: the tokenizer has nothing to put in the place of what the task takes out.
    """
    n_vocab = int(model.get_input_embeddings().weight.shape[0])
    start = getattr(model.config, "decoder_start_token_id", None)
    return Collator(
        pad_id=pad_id,
        pad_to=pad_to,
        decoder_ids=(int(start), task.gap) if task.asks == "both" and start is not None else (),
        decoder_start=start if task.decodes else None,
        corruption=corruption_of(task, tokenizer, n_vocab, seed),
    )


def refuse_quantised_twice(source: Source, config: Any, store: str) -> None:
    """Raises: ModelError, where the files hold codes of another kind already."""
    text = config.get_text_config()
    if getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None):
        raise ModelError(
            f"{source.name}: is quantised already, and cannot be held in {store} on top. Leave --store out, or load "
            "the model that it was made of."
        )


def tokenizer_digest(tokenizer: Any) -> str:
    summed = hashlib.sha256()
    for word, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        summed.update(f"{number}\t{word}\n".encode(errors="surrogatepass"))
    summed.update(repr(sorted(tokenizer.special_tokens_map.items())).encode())
    return summed.hexdigest()
