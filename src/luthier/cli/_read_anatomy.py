"""The anatomy of a model folder as it is: with the head its configuration names, without reading a weight."""

from typing import Any

import torch
import transformers

from luthier.anatomy import Anatomy
from luthier.core import ModelError
from luthier.workflow.load_model import find_model, load_config, quiet

__all__ = ["read_anatomy"]


def read_anatomy(name: str) -> tuple[Anatomy, str]:
    """Anatomy and class of a model: a folder, `sample:NAME` or a hub name.

    Raises:
        ModelError, Refused: no such model, or one that cannot or must not be used.
        AnatomyError: it is no transformer that we can read.
    """
    config = load_config(find_model(name))
    named: Any = next(iter(getattr(config, "architectures", None) or []), None)
    cls = getattr(transformers, str(named), None)
    known = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    try:
        with quiet(), torch.device("meta"):
            model = cls(config) if known else transformers.AutoModel.from_config(config)  # type: ignore[misc]
    except (ValueError, RuntimeError, TypeError) as error:
        raise ModelError(
            f"{name}: no model can be made from its config.json ({str(error).splitlines()[0]}). Use an undamaged copy."
        ) from error
    return Anatomy.read(model), type(model).__name__
