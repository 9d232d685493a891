"""A model whose linear layers are held in codes, and back: what is small, and what stays as it is.

Small are the projections of the layers that have a matrix of their own. Embeddings, norms, heads, biases, routers and
stacked experts stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, is_projection
from luthier.core import AnatomyError, ConfigError, near
from luthier.core.protocols import Model
from luthier.kernels import FORMATS, Format, StoredLinear
from luthier.surgery.edited_model import EditedModel
from luthier.surgery.install import check, edits_of
from luthier.surgery.method import Method
from luthier.surgery.tuning import Tuning

__all__ = ["decode_layers", "encode_layers", "form_of", "put_codes", "storable"]


def form_of(store: str) -> Format:
    """The format called `store`.

    Raises:
        ConfigError: there is none of that name.
    """
    if store not in FORMATS:
        raise ConfigError(f"store: {store!r} is none of {', '.join(FORMATS)}.{near(store, list(FORMATS))}")
    return FORMATS[store]


def storable(model: Model) -> tuple[str, ...]:
    """Paths of the layers that can be held in codes, read from the structure alone.

    Raises:
        AnatomyError: there is none, or they are quantised already.
    """
    anatomy = Anatomy.read(model)
    kept = set(anatomy.head_tensors) | set(anatomy.tied) | set(anatomy.tied.values())
    paths = dict.fromkeys(
        s.path
        for s in anatomy.all_sites
        if is_projection(s) and s.param == "weight" and s.expert is None and f"{s.path}.weight" not in kept
    )
    found = [path for path in paths if _is_float(model.get_submodule(path))]
    if not found:
        raise AnatomyError(
            f"{type(model).__name__}: no linear layer of it can be held in codes: there is none with a float matrix of "
            "its own. Load it without store."
        )
    return tuple(found)


def encode_layers(model: Model, store: str, *, remember: bool = False) -> Model:
    """Hold the linear layers of a model in memory in codes, one after the other, in place.

    >>> from transformers import BertConfig, BertModel
    >>> model = BertModel(BertConfig(
    ...     vocab_size=50, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64))
    >>> _ = encode_layers(model, "nf4")
    >>> model.encoder.layer[0].attention.self.query
    StoredLinear(64, 64, bias=True, Nf4)

    Args:
        store: nf4, int8, int4 or int2.
        remember: keep each float weight too, for starts that need it (loftq). For small models and for tests.

    Raises:
        ConfigError: no such format.
        AnatomyError: nothing of the model can be held so; its weights are not finite; or tunings stand on it.
    """
    form = form_of(store)
    _refuse_tunings(model)
    places = _places(model)
    for path in storable(model):
        layer: Any = model.get_submodule(path)
        weight, transposed = layer.weight.detach(), not isinstance(layer, nn.Linear)
        whole = weight.T if transposed else weight  # (d_out, d_in)
        made = _codes(layer, path, whole, form, weight.dtype)
        for parent, name in places[id(layer)]:
            parent._modules[name] = made
        if remember:
            made.original = _again(whole.clone())
    return model


def put_codes(model: Model, path: str, weight: Tensor, form: Format, dtype: torch.dtype) -> StoredLinear:
    """Put a layer of codes in the place of the one at `path`. weight: (d_out, d_in).

    Raises:
        AnatomyError: the weight is not finite.
    """
    old = model.get_submodule(path)
    made = _codes(old, path, weight, form, dtype)
    _replace(model, {id(old): made})
    return made


def _codes(old: Any, path: str, weight: Tensor, form: Format, dtype: torch.dtype) -> StoredLinear:
    """The layer of codes for the one at `path`. Raises: AnatomyError, as `put_codes`."""
    if not weight.is_meta and not torch.isfinite(weight).all():
        raise AnatomyError(f"{path}.weight holds NaN or infinity. Use an undamaged copy of the model.")
    made = StoredLinear(weight, old.bias, form, dtype, transposed=not isinstance(old, nn.Linear))
    made.train(old.training)
    return made


def decode_layers(model: Model) -> Model:
    """The same function with plain float layers, in place: what its codes stand for, in the type of the model.

    Raises:
        AnatomyError: tunings stand on it.
    """
    _refuse_tunings(model)
    made: dict[int, nn.Module] = {}
    for layer in model.modules():
        if isinstance(layer, StoredLinear):
            made[id(layer)] = _plain(layer)
    _replace(model, made)
    return model


def _plain(layer: StoredLinear) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    kind = Conv1D if layer.transposed else nn.Linear
    sizes = (layer.out_features, layer.in_features) if layer.transposed else (layer.in_features, layer.out_features)
    with torch.device("meta"):
        plain: Any = kind(*sizes)
    plain.weight = nn.Parameter(layer.weight.contiguous(), requires_grad=False)
    plain.bias = layer.bias
    plain.train(layer.training)
    return plain  # type: ignore[no-any-return]


def _places(model: Model) -> dict[int, list[tuple[nn.Module, str]]]:
    """Where each module stands: (parent, name in it), by its identity."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            found.setdefault(id(child), []).append((parent, name))
    return found


def _replace(model: Model, made: dict[int, nn.Module]) -> None:
    """Put modules in all places where the old ones stand, by the identity of the old."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in made:
                parent._modules[name] = made[id(child)]


def _is_float(layer: nn.Module) -> bool:
    """A plain linear layer, or GPT-2's, and not one of a class that stores its weight in a way of its own."""
    weight = layer._parameters.get("weight")
    known = type(layer) is nn.Linear or type(layer).__name__ == "Conv1D"
    return known and weight is not None and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _again(weight: Tensor) -> Callable[[], Tensor]:
    return lambda: weight


def _refuse_tunings(model: Model) -> None:
    names: Iterable[str] = [m.tuning_name for m in model.modules() if isinstance(m, Tuning)]
    if names:
        raise AnatomyError(f"the tuning {next(iter(names))!r} stands on the model. Detach it, or store the base first.")


def refuse_method(model: Model, method: Method) -> None:
    """Refuse a method that needs floats where this model, which may be without weights, has codes.

    Raises:
        AnatomyError: it trains or replaces a weight that is in codes.
    """
    edited = EditedModel(model)
    check(edited, edits_of(method, edited, 0, train_head=False), method)
