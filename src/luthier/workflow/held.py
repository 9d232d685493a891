"""How a run holds its base: checked against method and precision before a weight is read."""

from __future__ import annotations

from typing import Any

import torch

from luthier.core import AnatomyError, ConfigError, human_count
from luthier.runs.spec import RunSpec
from luthier.surgery import Method
from luthier.surgery.storage import encode_layers, refuse_method, storable
from luthier.training.precision import Precision

__all__ = ["check_store", "held_in", "refuse_floats", "store_of"]


def store_of(store: str | None, method: Method) -> str | None:
    """How a run holds its base: as it says, and else as its method wants it."""
    return store or next((part.store for part in method.parts() if part.store is not None), None)


def held_in(store: str | None, precision: Precision, trained: int, numbers: int) -> torch.dtype:
    """The float type of the base: of all of it, or of what is not in codes.

    Args:
        trained: of its `numbers`. Where most of the model trains, its weights are the fp32 masters; elsewhere the
            frozen base is stored small.

    Raises:
        ConfigError: bf16 weights under another arithmetic.
    """
    if store == "bf16" and precision.name != "bf16":
        raise ConfigError(
            f"store = bf16 under precision = {precision.name}: rows and weights would be of two types. Use "
            f"store = fp32, or precision = bf16."
        )
    otherwise = torch.float32 if trained > numbers // 2 else precision.dtype
    return {"bf16": torch.bfloat16, "fp32": torch.float32}.get(store or "", otherwise)


def refuse_floats(spec: RunSpec, method: Method) -> None:
    """Raises: ConfigError, where the method is made for codes and the run wants floats."""
    wanting = [part.name for part in method.parts() if part.store is not None]
    if wanting and spec.store is not None and spec.codes is None:
        raise ConfigError(
            f"store = {spec.store}: {wanting[0]} is made for a base in codes, and in floats there is nothing that "
            "it would make up for. Use --store nf4, int8, int4 or int2, or the method lora."
        )


def check_store(spec: RunSpec, method: Method, empty: Any) -> str | None:
    """Refuse what cannot train over a base held so; what there is to say of it.

    Args:
        empty: the model on the meta device; its layers are of codes afterwards, where the run wants them.

    Raises:
        ConfigError: the method is made for codes, and the run wants floats.
        AnatomyError: the method trains or replaces what is in codes, or the model has nothing that can be.
    """
    refuse_floats(spec, method)
    if spec.codes is None:
        return None
    paths = storable(empty)
    numbers = sum(empty.get_submodule(path).weight.numel() for path in paths)
    encode_layers(empty, spec.codes)
    try:
        refuse_method(empty, method)
    except AnatomyError as error:
        raise AnatomyError(f"store = {spec.codes}: {error}") from None
    return (
        f"base: {len(paths)} linear layers ({human_count(numbers)} numbers) are held as {spec.codes}; embeddings, "
        "norms and heads stay"
    )
