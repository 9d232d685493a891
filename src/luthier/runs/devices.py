"""How much memory there is to fit into: this machine's, or that of a device by name or size."""

from __future__ import annotations

import contextlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from luthier.core import UnknownName, human_bytes, near

__all__ = ["NAMED", "Device", "device_of", "may_have_gpu"]

# Bytes as their makers name them. A driver keeps some of it: what fits narrowly may not fit.
NAMED = {
    "a100-40gb": 40e9, "a100-80gb": 80e9, "h100-80gb": 80e9, "h200-141gb": 141e9, "l4-24gb": 24e9, "l40s-48gb": 48e9,
    "rtx3090-24gb": 24e9, "rtx4090-24gb": 24e9, "t4-16gb": 16e9, "v100-32gb": 32e9,
}  # fmt: skip
# Operations of products in a second (half precision, no sparsity), at most, as the makers' data sheets have them. No
# run reaches them, so they are a floor under its time and nothing more.
PEAKS = {
    "a100-40gb": 312e12, "a100-80gb": 312e12, "h100-80gb": 990e12, "h200-141gb": 990e12, "l4-24gb": 121e12,
    "l40s-48gb": 362e12, "rtx3090-24gb": 142e12, "rtx4090-24gb": 331e12, "t4-16gb": 65e12, "v100-32gb": 125e12,
}  # fmt: skip
_WITHOUT_BF16 = ("t4", "v100")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(gb|gib|mb|mib)", re.IGNORECASE)
_UNITS = {"gb": 1e9, "gib": 2**30, "mb": 1e6, "mib": 2**20}


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a run has to fit into.

    Attributes:
        kind: cpu or cuda.
        memory: bytes that a run may take.
        here: it is this machine, so its speed can be measured.
        bf16: it multiplies bf16 fast.
        said: in words.
        peak: operations of products in a second, at the very most; None where nothing is known.
    """

    name: str
    kind: str
    memory: int
    here: bool
    bf16: bool
    said: str
    peak: float | None = None


def device_of(asked: str) -> Device:
    """The device called `asked`: this, a size such as 24GB (of a GPU with bf16), or a name such as h100-80gb.

    >>> device_of("24GB").memory
    24000000000

    Raises:
        UnknownName: none is called so.
    """
    word = asked.strip().lower()
    if word == "this":
        return _this()
    size = _SIZE.fullmatch(word)
    if size is not None and float(size[1]) > 0:
        memory = int(float(size[1]) * _UNITS[size[2].lower()])
        return Device(
            name=asked, kind="cuda", memory=memory, here=False, bf16=True, said=f"a GPU with {human_bytes(memory)}"
        )
    if word in NAMED:
        memory, bf16 = int(NAMED[word]), not word.startswith(_WITHOUT_BF16)
        return Device(
            name=word, kind="cuda", memory=memory, here=False, bf16=bf16, said=f"{word}, {human_bytes(memory)}",
            peak=PEAKS[word],
        )  # fmt: skip
    raise UnknownName(
        f"--device {asked!r}: no device is called so.{near(word, list(NAMED))} Write this, a size such as 24GB, or one "
        f"of {', '.join(NAMED)}."
    )


def may_have_gpu() -> bool:
    """Whether it takes torch to say if there is a GPU: on Linux without any of its drivers' files there is none."""
    drivers = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd", "/dev/nvmap", "/proc/driver/nvidia")
    return not sys.platform.startswith("linux") or any(Path(path).exists() for path in drivers)


def _this() -> Device:
    gpu = _gpu() if may_have_gpu() else None
    if gpu is not None:
        return gpu
    free = min(int(psutil.virtual_memory().available), _left_of_group())
    return Device(
        name="this", kind="cpu", memory=free, here=True, bf16=False,
        said=f"this machine's processor, {human_bytes(free)} free now",
    )  # fmt: skip


def _gpu() -> Device | None:
    import torch  # seconds, which a plan that is read from its cache does not take

    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        return Device(
            name="this", kind="cuda", memory=int(free), here=True, bf16=torch.cuda.is_bf16_supported(),
            said=f"this machine's {name}, {human_bytes(free)} free now",
        )  # fmt: skip
    return None


def _left_of_group(group: Path = Path("/sys/fs/cgroup")) -> int:
    """What the control group of this process leaves it, where it has a limit."""
    with contextlib.suppress(OSError, ValueError):
        limit = int((group / "memory.max").read_text())  # "max" where there is none
        used = int((group / "memory.current").read_text())
        # Pages of files that were read are counted as used, and given up when memory is wanted.
        facts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return limit - used + int(facts.get("active_file", 0)) + int(facts.get("inactive_file", 0))
    return 2**62
