"""The only reader of foreign bytes: weights, configurations, templates, archives, data rows.

Everything else takes what these modules have verified. Nothing here runs code that a file names (`programs`
runs what a model wrote, where the user says so, in a jailed child process), nothing reads pickle (but `convert`, in
such a process), and nothing falls back to a weaker reader. Importing it imports no torch.
"""

from luthier.trust import (
    archive,
    config,
    convert,
    gguf,
    jail,
    model,
    programs,
    row_files,
    safetensors,
    scan,
    template,
    text,
)
from luthier.trust._limits import Limits

__all__ = [
    "Limits",
    "archive",
    "config",
    "convert",
    "gguf",
    "jail",
    "model",
    "programs",
    "row_files",
    "safetensors",
    "scan",
    "template",
    "text",
]
