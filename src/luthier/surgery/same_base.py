"""Whether a saved tuning was made for the model at hand: its shape, which needs no weights, and its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from luthier.anatomy import Anatomy
from luthier.core import WrongBase
from luthier.surgery.edited_model import EditedModel
from luthier.surgery.tuning_files import base_digest, precision_of

__all__ = ["refuse_other_shape", "refuse_other_weights"]


def refuse_other_shape(
    anatomy: Anatomy, base: Mapping[str, Any], folder: Path | str, heads: Sequence[str] = ()
) -> None:
    """Raises: WrongBase, where the tuning in `folder` is of a model of another kind or size."""
    here = {
        "model_type": anatomy.model_type,
        "d": anatomy.d,
        "layers": anatomy.n_layers,
        "vocabulary": anatomy.vocab_size,
    }
    differs = [f"{k} {base.get(k)!r} here {v!r}" for k, v in here.items() if base.get(k) != v]
    differs += [f"its head {name!r} is not here" for name in heads if name not in anatomy.tensors]
    if differs:
        raise WrongBase(f"{folder}: made for another model: {'; '.join(differs)}. Load the base it was trained on.")


def refuse_other_weights(
    edited: EditedModel, base: Mapping[str, Any], folder: Path | str, *, trunk: bool = False
) -> None:
    """Raises: WrongBase, where the tuning in `folder` is of other weights; with `trunk`, of another trunk."""
    if trunk and "trunk_bf16" in base and base_digest(edited, trunk=True) == base["trunk_bf16"]:
        return
    found = base_digest(edited)
    if found == base.get("sha256_bf16"):
        return
    here, there = precision_of(edited), base.get("loaded_in")
    # Tunings of older versions state the first digest alone.
    if "sha256_fp16" in base and base_digest(edited, torch.float16) == base["sha256_fp16"]:
        return
    advice = "Load the base it was trained on."
    if here == "float16" and "sha256_fp16" not in base:
        advice += (
            " If this is that base: an older luthier saved this tuning, and knows no base in float16. Load the base in "
            "float32 once, load the tuning, save it again, and the new one is accepted in float16."
        )
    elif {here, there} == {"float16", "bfloat16"}:
        advice += (
            f" If this is that base: it was {there} when the tuning was saved and is {here} here, and the two round "
            f"differently. Load it in {there} or float32."
        )
    raise WrongBase(
        f"{folder}: made for {base.get('name') or base['model_type']} with weights "
        f"{str(base.get('sha256_bf16'))[:12]}; this model's are {found[:12]}. {advice}"
    )
