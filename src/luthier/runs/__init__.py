"""What happened, kept so that it lasts: the run folder, checkpoints, the event log, records.

All that must last is written by `runs.durable`; nothing here reads or writes pickle.
"""

from luthier.runs.checkpoint import (
    Checkpoint,
    bytes_of,
    checkpoints,
    gate_finite,
    load_newest,
    load_step,
    preflight,
    prune,
    save_checkpoint,
)
from luthier.runs.environment import differences, environment
from luthier.runs.journal import Journal, Replay
from luthier.runs.manifest import Verified, read_verified
from luthier.runs.peak_memory import peak_bytes, reset_peak, resident_bytes
from luthier.runs.record import Record
from luthier.runs.store import RunFolder

__all__ = [
    "Checkpoint",
    "Journal",
    "Record",
    "Replay",
    "RunFolder",
    "Verified",
    "bytes_of",
    "checkpoints",
    "differences",
    "environment",
    "gate_finite",
    "load_newest",
    "load_step",
    "peak_bytes",
    "preflight",
    "prune",
    "read_verified",
    "reset_peak",
    "resident_bytes",
    "save_checkpoint",
]
