"""The machine while it is measured: what it is, how busy it is, and what this process holds. No torch here."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

__all__ = [
    "LIBRARIES",
    "busy_share",
    "environment",
    "gpus",
    "held_bytes",
    "idle_complaint",
    "peak_bytes",
    "reset_peak",
]

LIBRARIES = ("luthier", "torch", "transformers", "peft", "accelerate", "safetensors", "numpy")

# A machine of which others use more than this gives times that cannot be compared with an idle one's.
BUSY_SHARE = 0.10


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no line {name}; memory is measured on Linux only")


def peak_bytes() -> int:
    """The most memory this process has held, interpreter and libraries included (VmHWM)."""
    return _status("VmHWM")


def held_bytes() -> int:
    """What this process holds now (VmRSS)."""
    return _status("VmRSS")


def reset_peak() -> None:
    """Let `peak_bytes` start again from what is held now (Linux 4.0)."""
    Path("/proc/self/clear_refs").write_text("5")


def busy_share(seconds: float = 1.0) -> float:
    """Share of all processors that somebody used while this process slept."""

    def times() -> tuple[int, int]:
        words = [int(w) for w in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return sum(words), words[3] + words[4]  # all, and idle with waiting for disks

    all_before, idle_before = times()
    time.sleep(seconds)
    all_after, idle_after = times()
    return 1.0 - (idle_after - idle_before) / max(1, all_after - all_before)


def idle_complaint(share: float) -> str | None:
    """Why times taken now could not be trusted, or None."""
    if share <= BUSY_SHARE:
        return None
    load = os.getloadavg()
    return (
        f"other processes use {share:.0%} of this machine (load {load[0]:.1f}, {load[1]:.1f}, {load[2]:.1f});"
        f" times are only worth something below {BUSY_SHARE:.0%}. Wait, or say --busy: the results are then marked."
    )


def gpus() -> list[str]:
    """Names of the NVIDIA GPUs of this machine, as their driver tells them."""
    if shutil.which("nvidia-smi") is None:
        return []
    told = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    return told.stdout.splitlines() if told.returncode == 0 else []


def environment(threads: int | None) -> dict[str, Any]:
    """Plain values that stand beside every result. No names of users or hosts."""
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = "not installed"
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    flags = Path("/proc/cpuinfo").read_text(errors="replace")
    return {
        "python": platform.python_version(),
        **versions,
        "cpu": cpu,
        "cpus": len(os.sched_getaffinity(0)),
        "threads": threads or "as torch chooses",
        **({"gpus": found} if (found := gpus()) else {}),
        "instructions": [w for w in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {w}" in flags],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "platform": f"{platform.system()} {platform.machine()}",
        "load_at_start": [round(x, 2) for x in os.getloadavg()],
    }
