"""Which arithmetic this hardware does fast, and how a forward pass is put into it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

from luthier.core import ConfigError

__all__ = ["Precision", "choose_device", "choose_precision"]


@dataclass(frozen=True)
class Precision:
    """The type of the forward pass, and why it was taken. Trained numbers are fp32 whatever it is."""

    name: Literal["bf16", "fp32", "fp16"]
    because: str

    @property
    def dtype(self) -> torch.dtype:
        """The torch type."""
        return {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}[self.name]

    def autocast(self, device: torch.device) -> AbstractContextManager[None]:
        """The context in which the model is called."""
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(device.type, dtype=self.dtype)

    def sentence(self) -> str:
        """For the log."""
        return f"precision: {self.name} ({self.because}); trained numbers in fp32"


def choose_device(asked: str) -> torch.device:
    """The device called `asked`, or the best there is for "auto".

    Raises:
        ConfigError: there is no such device.
    """
    if asked == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("cpu")
    kind = asked.partition(":")[0]
    if kind not in ("cpu", "cuda", "mps", "xpu", "hpu"):
        hint = " Did you mean 'cuda'?" if kind == "gpu" else ""
        raise ConfigError(f"device {asked!r}: there is none of that name.{hint} Use auto, cpu, cuda, cuda:1 or mps.")
    try:
        device = torch.device(asked)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device {asked!r} cannot be used here: {str(error).splitlines()[0]}. Use auto or cpu."
        ) from error
    return device


def choose_precision(asked: str, device: torch.device) -> Precision:
    """The precision called `asked`, or for "auto" the one the hardware multiplies fast.

    Raises:
        ConfigError: the device cannot do it.
    """
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
        reason = "this GPU multiplies bf16 fast" if fast else "this GPU has no fast bf16"
    elif device.type == "cpu":
        instructions = [
            word
            for word, test in (("AMX", "_is_amx_tile_supported"), ("AVX512-BF16", "_is_avx512_bf16_supported"))
            if getattr(torch.cpu, test, lambda: False)()
        ]
        fast = bool(instructions)
        reason = f"this CPU multiplies bf16 fast: {', '.join(instructions)}" if fast else "this CPU has no fast bf16"
    else:
        fast, reason = False, f"{device.type} is only trusted with fp32"
    if asked == "auto":
        return Precision("bf16" if fast else "fp32", reason)
    if asked == "fp16" and device.type != "cuda":
        raise ConfigError(
            f"precision fp16 needs a GPU; {device.type} has none of it that pays. Use bf16, fp32 or auto."
        )
    return Precision(asked, "as asked")  # type: ignore[arg-type]  # the spec allows these three names only
