"""Every format in which a finished run leaves, by name: what it is, and what writes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from luthier.core import ConfigError, UnknownName, near, plain
from luthier.core.places import refuse_taken
from luthier.workflow.export import Exported

__all__ = ["FORMATS", "Wanted", "export"]


@dataclass(frozen=True)
class Format:
    """What a format is, in a few words, the function that writes it, and the options that it takes besides."""

    what: str
    write: Callable[[Path, Path, Wanted], Exported]
    takes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """How something is to be written.

    Attributes:
        accept: although it is not the model that was trained.
        dtype: of the weights; None, as the format has it.
        rank: write a LoRA of this rank that is near the tuning; None, the tuning itself.
    """

    accept: bool = False
    dtype: str | None = None
    rank: int | None = None


def _peft(run: Path, folder: Path, wanted: Wanted) -> Exported:
    from luthier.workflow.export import export_peft
    from luthier.workflow.prediction import Predictor

    if wanted.rank is None:
        return export_peft(Predictor(run), folder, accept=wanted.accept)
    from luthier.workflow.as_lora import lora_of_run

    found = lora_of_run(run, wanted.rank)
    written = export_peft(found.predictor, folder, accept=wanted.accept, low=found.low)
    return replace(written, notes=(*found.notes, *written.notes), shares=found.shares)


def _merged(run: Path, folder: Path, wanted: Wanted) -> Exported:
    import json

    from luthier.core import build
    from luthier.workflow.certificate import FILE, Step
    from luthier.workflow.merged_folder import PIPELINES, merge
    from luthier.workflow.prediction import Predictor

    task = Predictor.task_of(run)
    out = merge(run, folder, dtype=wanted.dtype or "auto", accept=wanted.accept)  # type: ignore[arg-type]
    told = json.loads((out / FILE).read_bytes())["steps"][0]
    pipeline = PIPELINES.get(task.name)
    reads = f"transformers.{task.auto_class}.from_pretrained({str(out)!r})"
    line = reads if pipeline is None or task.template else f"transformers.pipeline({pipeline!r}, model={str(out)!r})"
    return Exported(out, line, (), build(Step, told, FILE))


def _onnx(run: Path, folder: Path, wanted: Wanted) -> Exported:
    from luthier.workflow.onnx_export import export_onnx

    return export_onnx(run, folder, accept=wanted.accept)


def _gguf(run: Path, folder: Path, wanted: Wanted) -> Exported:
    from luthier.workflow.gguf_export import export_gguf

    return export_gguf(run, folder, dtype=wanted.dtype or "f16", accept=wanted.accept)


def _gguf_adapter(run: Path, folder: Path, wanted: Wanted) -> Exported:
    from luthier.workflow.gguf_adapter import export_gguf_adapter

    return export_gguf_adapter(run, folder, rank=wanted.rank, accept=wanted.accept)


def _vllm(run: Path, folder: Path, wanted: Wanted) -> Exported:
    from luthier.workflow.vllm_export import export_vllm

    return export_vllm(run, folder, rank=wanted.rank, accept=wanted.accept)


def _lycoris(run: Path, folder: Path, wanted: Wanted) -> Exported:
    from luthier.workflow.lycoris import export_lycoris

    return export_lycoris(run, folder)


FORMATS = {
    "peft": Format("the tuning alone, as the peft library reads it", _peft, ("rank",)),
    "merged": Format("a model folder of transformers, as luthier merge writes it", _merged, ("dtype",)),
    "onnx": Format("a classifier or an encoder as a graph for onnxruntime", _onnx),
    "gguf": Format("the merged model as one file for llama.cpp", _gguf, ("dtype",)),
    "gguf-adapter": Format("the tuning alone, as a LoRA for llama.cpp", _gguf_adapter, ("rank",)),
    "lycoris": Format("the tuning alone, lokr or loha, as a file of LyCORIS", _lycoris),
    "vllm": Format("the tuning alone, as a LoRA for vLLM", _vllm, ("rank",)),
}


def export(run: Path | str, folder: Path | str, *, to: str = "peft", **wanted: Any) -> Exported:
    """Write a finished run in a format that other programs read; what they compute of it is compared first.

    Args:
        to: a name of FORMATS.
        wanted: see `Wanted`.

    Raises:
        UnknownName: no such format.
        ConfigError: no such run, one that is not finished, a folder that is there, or what a format cannot hold.
    """
    if to not in FORMATS:
        raise UnknownName(f"--to {to}: no such format.{near(to, list(FORMATS))} There are {', '.join(FORMATS)}.")
    asked = Wanted(**wanted)
    if asked.rank is not None and asked.rank < 1:
        raise ConfigError(f"--rank {asked.rank}: must be 1 or more.")
    for name, value in plain(asked).items():
        if name != "accept" and value is not None and name not in FORMATS[to].takes:
            takers = ", ".join(other for other in FORMATS if name in FORMATS[other].takes)
            raise ConfigError(f"--{name} {value}: --to {to} takes none; {takers} do. Leave it out.")
    refuse_taken(Path(folder), deep=True)  # said before the model is loaded
    return FORMATS[to].write(Path(run), Path(folder), asked)
