"""A model's structure without its weights: from a folder, or from a bare config.json."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from luthier.core import AnatomyError, ConfigError, ModelError, near
from luthier.data.tasks import Task
from luthier.forecast import Skeleton
from luthier.surgery import encode_layers, keyed
from luthier.trust.model import check_config
from luthier.workflow.load_model import Source, find_model, load_config, quiet, with_head

__all__ = ["Outline", "outline_of"]

_CAUSAL, _SEQ2SEQ = "causal_lm", "seq2seq"


@dataclass(frozen=True)
class Outline:
    """What a configuration tells of a model.

    Attributes:
        stored: names of the tensors in its weight files; empty where there are none.
        halves: its numbers were stored in bf16.
        weights: whether there are weight files.
        source: the checked folder, where there is one with weights.
    """

    name: str
    config: Any
    halves: bool
    weights: bool = False
    stored: frozenset[str] = frozenset()
    source: Source | None = None
    _made: dict[Any, Skeleton] = field(default_factory=dict, repr=False)

    def task(self, asked: str = "auto", labels: int | None = None) -> Task:
        """The task that the model is made for, where no rows say it.

        Raises:
            ConfigError: `labels` of a task that has none.
        """
        name = _task_of(self.config) if asked == "auto" else asked
        task = Task(name=name)
        if task.of_words or task.weighs or name == "regression":
            if labels is not None:
                raise ConfigError(f"--labels {labels}: the task {name} has no labels. Leave it out.")
            return task
        n = labels if labels is not None else max(2, int(getattr(self.config, "num_labels", 2) or 2))
        return replace(task, labels=tuple(str(i) for i in range(n)))

    def skeleton(self, task: Task, dtype: torch.dtype, store: str | None = None) -> Skeleton:
        """The model with the task's head, on the meta device; made once for each way to hold its numbers.

        Args:
            store: codes that its linear layers are held in, such as nf4; None for floats of `dtype`.

        Raises:
            ModelError: the configuration makes no model.
            AnatomyError: it is no transformer that can be read, or nothing of it can be held so.
        """
        made = self._made.get((task, dtype, store))
        if made is None:
            model = self._empty(task, dtype)
            base = f"{model.base_model_prefix}."
            words = task.name == "masked_lm"  # whose head may be absent, as a pooler may
            may = (n for n, _ in model.named_parameters() if "pooler" in n or (words and not n.startswith(base)))
            fresh = tuple(n for n in may if not self._has(n))
            try:
                model = _held_in(model, store)
                made = Skeleton(model, halves=self.halves, fresh=fresh)
            except AnatomyError as error:
                raise AnatomyError(f"{self.name}: {error}") from error
            self._made[task, dtype, store] = made
        return made

    def small(self, task: Task, store: str | None = None) -> Callable[[Any, torch.dtype], Any]:
        """What makes a model with the task's head from a smaller configuration, with random numbers, held so."""
        import transformers

        def make(config: Any, dtype: torch.dtype) -> Any:
            with quiet(), keyed(0, "small"):
                auto = getattr(transformers, task.auto_class)
                return _held_in(auto.from_config(with_head(config, task), dtype=dtype), store)

        return make

    def _has(self, name: str) -> bool:
        """Whether the weight files hold a tensor; without such files they are taken to be whole."""
        # Old checkpoints call the numbers of a norm so; transformers reads them by their new names.
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        return not self.stored or any(f".{wanted}".endswith(f".{one}") for one in self.stored for wanted in (name, old))

    def _empty(self, task: Task, dtype: torch.dtype) -> Any:
        import transformers
        from transformers.initialization import no_init_weights

        try:
            with quiet(), torch.device("meta"), no_init_weights():
                config = with_head(self.config, task)
                model = getattr(transformers, task.auto_class).from_config(config, dtype=dtype)
                model.tie_weights()  # left out with the drawing of numbers
                return model
        except (ValueError, RuntimeError, TypeError, AttributeError, ZeroDivisionError, AssertionError) as error:
            raise ModelError(
                f"{self.name}: no model for {task.name} can be made of its configuration "
                f"({str(error).splitlines()[0] if str(error) else type(error).__name__}). Correct config.json, or name "
                "another task: --task causal_lm."
            ) from error


def _held_in(model: Any, store: str | None) -> Any:
    """The model with its linear layers in codes, where a run holds them so; methods may ask for the floats again."""
    return model if store is None else encode_layers(model, store, remember=True)


def outline_of(name: str) -> Outline:
    """Read what a model's configuration says; weights are not needed.

    Args:
        name: a folder, sample:NAME, a hub name, or a config.json.

    Raises:
        ModelError, Refused: no such model, or one that cannot or must not be used.
    """
    path = Path(name).expanduser()
    if path.is_file() and path.suffix.lower() != ".json":
        raise ModelError(f"{name}: is no config.json. Name one, or a model folder; a file of rows goes to --data.")
    if path.is_file():
        return _bare(name, path)
    if path.is_dir() and (path / "config.json").is_file() and not any(path.glob("*.safetensors")):
        return _bare(name, path / "config.json")
    if path.suffix == ".json" and not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ModelError(
            f"{name}: there is no such file.{near(path.name, beside)} Name a config.json or a model folder."
        )
    source = find_model(name)
    kinds = set(source.folder.dtypes.values())
    config = _of_floats(name, load_config(source))
    return Outline(name, config, kinds == {"BF16"}, True, frozenset(source.folder.shapes), source)


def _of_floats(name: str, config: Any) -> Any:
    """The configuration. Raises: ModelError, where its weights are in somebody else's codes."""
    told = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    if told:
        kind = told.get("quant_method") if isinstance(told, dict) else getattr(told, "quant_method", None)
        raise ModelError(
            f"{name}: its weights are quantised by {kind or 'another library'}, and bytes of such codes are in no "
            "count. Name the model that it was made of, with --store nf4 or int8 for a base in luthier's own codes."
        )
    return config


def _bare(name: str, path: Path) -> Outline:
    from transformers import CONFIG_MAPPING

    values = check_config(path)
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        hint = near(kind, list(CONFIG_MAPPING)) if isinstance(kind, str) else ""
        raise ModelError(
            f"{path}: model_type is {kind!r}, which this transformers does not know.{hint} Give the config.json of a "
            "model of transformers."
        )
    try:
        with quiet():
            config = CONFIG_MAPPING[kind].from_dict(dict(values))
    except Exception as error:  # whatever a configuration's own checks raise: they are many libraries' classes
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{path}: transformers refuses it ({said[0]}). Correct the file.") from error
    _of_floats(str(path), config)
    stored = str(values.get("dtype") or values.get("torch_dtype") or "")
    return Outline(name, config, stored.endswith("bfloat16"))


def _task_of(config: Any) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    if getattr(config, "is_encoder_decoder", False):
        return _SEQ2SEQ
    named = str(next(iter(getattr(config, "architectures", None) or []), ""))
    if "TokenClassification" in named:
        return "token_classification"
    if "SequenceClassification" in named:
        return "classification"
    return _CAUSAL if config.model_type in CAUSAL and config.model_type not in MASKED else "classification"
