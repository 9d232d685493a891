"""What a run's exact bits depend on besides its spec: versions, threads, device. No names of users, no variables."""

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

from luthier.__version__ import __version__

__all__ = ["differences", "environment"]

LIBRARIES = ("torch", "transformers", "safetensors", "numpy")


def environment(device: str = "cpu") -> dict[str, Any]:
    """Plain values for environment.json.

    Args:
        device: where the run computes, such as "cpu" or "cuda:0".
    """
    found: dict[str, Any] = {"luthier": __version__, "python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library] = "not installed"
    found["threads"] = _threads()
    found["cpus"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found["cpu"] = _cpu_name()
    found["device"] = device
    found["device_name"] = _device_name(device)
    found["platform"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    return found


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What has changed, one sentence each, such as "torch 2.12.0 -> 2.13.0".

    Args:
        old, new: from `environment()`, or any two sets of fingerprints; nested ones are compared field by field.
    """
    found: list[str] = []
    for name in [*old, *(n for n in new if n not in old)]:
        was, now = old.get(name, "nothing"), new.get(name, "nothing")
        if isinstance(was, dict) and isinstance(now, dict):
            found += [f"{name}.{line}" for line in differences(was, now)]
        elif was != now:
            found.append(f"{name} {was} -> {now}")
    return found


def _threads() -> int:
    torch = sys.modules.get("torch")  # not imported for this: without torch nothing computes yet
    return int(torch.get_num_threads()) if torch is not None else 0


def _device_name(device: str) -> str:
    torch = sys.modules.get("torch")
    if torch is not None and device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    return _cpu_name()


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
