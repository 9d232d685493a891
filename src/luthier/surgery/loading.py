"""Attaching a saved tuning to its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from luthier.anatomy import Anatomy
from luthier.core import UnknownName, WrongBase, near
from luthier.core.protocols import Model
from luthier.core.shelves import VARIABLE
from luthier.surgery import compose
from luthier.surgery.method import METHODS
from luthier.surgery.tuned import Tuned, attach, check_loaded
from luthier.surgery.tuning_files import base_digest, precision_of, read_tuning, restore, vouched, weights_digest
from luthier.trust import safetensors as trusted_tensors

__all__ = ["load"]


def load(model: Model, folder: Path | str, *, name: str = "default", trainable: bool = False) -> Tuned:
    """Attach a saved tuning to its base, in eval mode and frozen; with `trainable`, ready to learn on.

    >>> import copy, tempfile
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> model = BertForSequenceClassification(BertConfig(
    ...     vocab_size=50, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20))
    >>> fresh, folder = copy.deepcopy(model), tempfile.mkdtemp() + "/tuning"
    >>> digest = attach(model, "ia3").save(folder)
    >>> print(load(fresh, folder).status()[0]["method"])
    ia3

    Raises:
        UnknownName: it was made with a method that is on no shelf here.
        WrongBase: the tuning was made for another model.
        Refused, IntegrityError: the files are not what they claim to be.
    """
    check_loaded(model, "load")
    facts = read_tuning(folder)
    base = facts["base"]
    heads = [str(k).removeprefix("head/") for k in facts.get("head", ())]
    _same_shape(model, base, heads, folder)
    _known_here(facts["method"], Path(folder) / "tuning.json")
    with vouched(Path(folder) / "tuning.json"):
        method = compose.method(facts["method"], facts["settings"])
    before = Tuned.of(model)
    active = [] if before is None else [t.tuning_name for t in before.tunings.values() if t.active]
    tuned = attach(model, method, name=name, train_head=bool(heads), new_tensors=heads)
    try:
        _same_weights(tuned, base, folder)
        expect = {n: tuple(s) for n, s in facts["tensors"].items()}
        digest = weights_digest(Path(folder))
        with vouched(Path(folder) / "tuning.safetensors"):
            tensors = trusted_tensors.read(Path(folder) / "tuning.safetensors", expect=expect, digest=digest)
        restore(tuned.tuning(name), tensors, str(folder))
    except BaseException:
        tuned.remove(name)
        tuned.activate(*active)
        if not tuned.tunings:
            tuned.detach()
        raise
    if not trainable:
        tuned.train_only(*[t.tuning_name for t in tuned.tunings.values() if t.trainable and t.tuning_name != name])
    model.eval()
    tuned.edited.refresh()
    return tuned


def _same_shape(model: Model, base: dict[str, Any], heads: list[str], folder: Path | str) -> None:
    tuned = Tuned.of(model)
    anatomy = tuned.anatomy if tuned is not None else Anatomy.read(model)
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


def _same_weights(tuned: Tuned, base: dict[str, Any], folder: Path | str) -> None:
    found = base_digest(tuned.edited)
    if found == base.get("sha256_bf16"):
        return
    here, there = precision_of(tuned.edited), base.get("loaded_in")
    # Tunings of older versions state the first digest alone.
    if "sha256_fp16" in base and base_digest(tuned.edited, torch.float16) == base["sha256_fp16"]:
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


def _known_here(words: str, where: Path) -> None:
    """A method that is on no shelf here may be its owner's: that is no damage of the file."""
    strange = [name for name in words.split("+") if name.isidentifier() and name not in METHODS.names()]
    if strange:
        raise UnknownName(
            f"{where}: made with the method {strange[0]!r}, which is on no shelf here. If it is your own, name its "
            f"folder in {VARIABLE} or install its package.{near(strange[0], METHODS.names())}"
        )
