"""Every format in which a finished run leaves, by name: what it is, and what writes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from luthier.core import ConfigError, UnknownName, near
from luthier.workflow.export import Exported

__all__ = ["FORMATS", "export"]


@dataclass(frozen=True)
class Format:
    """What a format is, in a few words, and the function that writes it: run, folder, accept."""

    what: str
    write: Callable[[Path, Path, bool], Exported]


def _peft(run: Path, folder: Path, accept: bool) -> Exported:
    from luthier.workflow.export import export_peft
    from luthier.workflow.prediction import Predictor

    return export_peft(Predictor(run), folder, accept=accept)


def _merged(run: Path, folder: Path, accept: bool) -> Exported:
    import json

    from luthier.core import build
    from luthier.workflow.certificate import FILE, Step
    from luthier.workflow.merged_folder import PIPELINES, merge
    from luthier.workflow.prediction import Predictor

    task = Predictor.task_of(run)
    out = merge(run, folder, accept=accept)
    told = json.loads((out / FILE).read_bytes())["steps"][0]
    pipeline = PIPELINES.get(task.name)
    reads = f"transformers.{task.auto_class}.from_pretrained({str(out)!r})"
    line = reads if pipeline is None or task.template else f"transformers.pipeline({pipeline!r}, model={str(out)!r})"
    return Exported(out, line, (), build(Step, told, FILE))


def _onnx(run: Path, folder: Path, accept: bool) -> Exported:
    from luthier.workflow.onnx_export import export_onnx

    return export_onnx(run, folder, accept=accept)


FORMATS = {
    "peft": Format("the tuning alone, as the peft library reads it", _peft),
    "merged": Format("a model folder of transformers, as luthier merge writes it", _merged),
    "onnx": Format("a classifier or an encoder as a graph for onnxruntime", _onnx),
}


def export(run: Path | str, folder: Path | str, *, to: str = "peft", accept: bool = False) -> Exported:
    """Write a finished run in a format that other programs read; what they compute of it is compared first.

    Args:
        to: a name of FORMATS.
        accept: write it although it is not the model that was trained; its certificate says so.

    Raises:
        UnknownName: no such format.
        ConfigError: no such run, one that is not finished, a folder that is there, or what a format cannot hold.
    """
    if to not in FORMATS:
        raise UnknownName(f"--to {to}: no such format.{near(to, list(FORMATS))} There are {', '.join(FORMATS)}.")
    if Path(folder).exists():  # said before the model is loaded
        raise ConfigError(f"{folder}: is there already. Name a folder that does not exist.")
    return FORMATS[to].write(Path(run), Path(folder), accept)
