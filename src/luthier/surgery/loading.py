"""Attaching a saved tuning to its base."""

from __future__ import annotations

from pathlib import Path

from luthier.anatomy import Anatomy
from luthier.core import UnknownName, near
from luthier.core.protocols import Model
from luthier.core.shelves import VARIABLE
from luthier.surgery import compose
from luthier.surgery.method import METHODS
from luthier.surgery.same_base import refuse_other_shape, refuse_other_weights
from luthier.surgery.tuned import Tuned, attach, check_loaded
from luthier.surgery.tuning_files import read_tuning, restore, vouched, weights_digest
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
    standing = Tuned.of(model)
    refuse_other_shape(standing.anatomy if standing is not None else Anatomy.read(model), base, folder, heads)
    _known_here(facts["method"], Path(folder) / "tuning.json")
    with vouched(Path(folder) / "tuning.json"):
        method = compose.method(facts["method"], facts["settings"])
    before = Tuned.of(model)
    active = [] if before is None else [t.tuning_name for t in before.tunings.values() if t.active]
    tuned = attach(model, method, name=name, train_head=bool(heads), new_tensors=heads)
    try:
        refuse_other_weights(tuned.edited, base, folder)
        expect = {n: tuple(s) for n, s in facts["tensors"].items()}
        digest = weights_digest(Path(folder))
        with vouched(Path(folder) / "tuning.safetensors"):
            tensors = trusted_tensors.read(Path(folder) / "tuning.safetensors", expect=expect, digest=digest)
        restore(tuned.tuning(name), tensors, str(folder))
        tuned.tuning(name).sources = [dict(source) for source in facts.get("sources", ())]
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


def _known_here(words: str, where: Path) -> None:
    """A method that is on no shelf here may be its owner's: that is no damage of the file."""
    strange = [name for name in words.split("+") if name.isidentifier() and name not in METHODS.names()]
    if strange:
        raise UnknownName(
            f"{where}: made with the method {strange[0]!r}, which is on no shelf here. If it is your own, name its "
            f"folder in {VARIABLE} or install its package.{near(strange[0], METHODS.names())}"
        )
