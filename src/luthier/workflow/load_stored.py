"""Loading a base into codes tensor by tensor: the model in full precision never stands in memory whole.

transformers reads each tensor, hands it to a quantiser, and lets it go. Ours puts a layer of codes in the place of the
empty one. Codes are made of the file's numbers in fp32, so they are the same whatever the rest is loaded in.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from luthier.core import ModelError
from luthier.kernels import Format, StoredLinear
from luthier.surgery.storage import form_of, put_codes, storable

__all__ = ["StoreConfig", "clean", "keep_originals"]

_NAME = "luthier_store"


class StoreConfig:
    """What transformers is handed as its quantisation config: our format, and where the model's tensors end up."""

    quant_method = _NAME

    def __init__(self, store: str, dtype: torch.dtype) -> None:
        self.form: Format = form_of(store)
        self.dtype = dtype
        self.paths: tuple[str, ...] = ()
        AUTO_QUANTIZER_MAPPING.setdefault(_NAME, _Quantizer)

    def to_dict(self) -> dict[str, Any]:
        """What transformers writes of it where it lists a configuration."""
        return {"quant_method": self.quant_method, "store": self.form.name}


class _Quantizer(HfQuantizer):  # type: ignore[misc]  # untyped there
    """transformers' side: which tensors it must hand over, and what becomes of them."""

    quantization_config: StoreConfig

    def preprocess_model(self, model: Any, dtype: Any = None, **kwargs: Any) -> None:
        self.quantization_config.paths = storable(model)
        # They come in fp32, whatever the others come in.
        wide = {re.escape(f"{path}.weight") + "$" for path in self.quantization_config.paths}
        model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), *wide}

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        path, _, name = param_name.rpartition(".")
        return name == "weight" and path in self.quantization_config.paths

    def get_quantize_ops(self) -> _Encode:
        return _Encode(self.quantization_config)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class _Encode(ConversionOps):  # type: ignore[misc]  # untyped there
    def __init__(self, config: StoreConfig) -> None:
        self.config = config

    def convert(
        self, input_dict: dict[str, Any], *args: Any, model: Any = None, missing_keys: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Take each weight over; nothing is left for transformers to set."""
        for name, value in input_dict.items():
            weight: Tensor = value[0] if isinstance(value, list) else value
            path = name.rpartition(".")[0]
            old = model.get_submodule(path)
            turned = weight if isinstance(old, nn.Linear) else weight.T  # (d_out, d_in)
            if tuple(weight.shape) != tuple(old.weight.shape):
                raise ModelError(f"{name}: the file holds {tuple(weight.shape)}, the model {tuple(old.weight.shape)}.")
            made = put_codes(model, path, turned, self.config.form, self.config.dtype)
            made._is_hf_initialized = True  # type: ignore[assignment]  # its numbers are there
            if missing_keys is not None:
                missing_keys.discard(name)
        return {}


def clean(model: Any) -> None:
    """Take off what transformers leaves on a model that it thinks quantised: it would refuse to cast or save it."""
    model.__dict__.pop("hf_quantizer", None)
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            config.__dict__.pop("quantization_config", None)
            config.__dict__.pop("_is_quantized", None)


def keep_originals(model: Any, files: tuple[Path, ...], shapes: dict[str, tuple[int, ...]]) -> None:
    """Let each layer of codes read its float weight again, where one tensor of the files is plainly it.

    A checkpoint may name its tensors with another beginning than the model; what is read must give the same codes.
    """
    places: dict[str, Path] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            places |= dict.fromkeys(opened.keys(), file)
    for path, layer in model.named_modules():
        if isinstance(layer, StoredLinear):
            name = _its_name(f"{path}.weight", layer.stored_shape, shapes)
            if name is not None:
                layer.original = _reader(layer, name, places[name])


def _its_name(wanted: str, shape: tuple[int, ...], shapes: dict[str, tuple[int, ...]]) -> str | None:
    if wanted in shapes:
        return wanted
    of_size = [n for n, s in shapes.items() if tuple(s) == shape]
    fits = [n for n in of_size if n.endswith(f".{wanted}") or wanted.endswith(f".{n}")]
    return max(fits, key=len, default=None)


def _reader(layer: StoredLinear, name: str, file: Path) -> Callable[[], Tensor]:
    def read() -> Tensor:
        with safe_open(file, framework="pt") as opened:
            whole: Tensor = opened.get_tensor(name).float()
        weight = whole.T.contiguous() if layer.transposed else whole
        codes = layer.form.encode(weight)["codes"]
        if not torch.equal(codes, layer.get_buffer("codes").cpu()):
            raise ModelError(f"{file}: {name} is no longer what the base was made of. Restore that model.")
        return weight

    return read
