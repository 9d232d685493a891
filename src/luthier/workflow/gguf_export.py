"""A finished run for llama.cpp: the merged model as one GGUF file."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from luthier.__version__ import __version__
from luthier.core import ConfigError, UsageError
from luthier.core.places import refuse_taken
from luthier.runs import durable
from luthier.workflow.certificate import FILE as CERTIFICATE
from luthier.workflow.certificate import called, certify_folder
from luthier.workflow.export import Exported
from luthier.workflow.gguf_layout import TYPES, describe, layout_of, layout_of_config, stored_as
from luthier.workflow.gguf_reader import MODEL
from luthier.workflow.gguf_vocabulary import write_vocabulary
from luthier.workflow.load_model import find_model, load_config
from luthier.workflow.merged_folder import merged_model
from luthier.workflow.prediction import Predictor

__all__ = ["export_gguf", "for_llama_cpp"]

FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}


def for_llama_cpp(path: Path, target: Path, to: str) -> Any:
    """What can be refused before a weight is read; the configuration of the run's model.

    Raises:
        ConfigError: no such run, one that is not finished, the folder is there, or a task that writes no text.
        UsageError: gguf is not installed.
        CannotMerge: an architecture that is not written here.
    """
    refuse_taken(target)
    if find_spec("gguf") is None:
        raise UsageError(f"--to {to}: needs gguf, which is not installed. pip install 'luthier[gguf]'.")
    task = Predictor.task_of(path)
    if task.name not in ("causal_lm", "preference", "judged") or task.template:
        raise ConfigError(
            f"{path}: is of task {task.name}; what llama.cpp reads here writes text. Nearest is "
            f"{'--to onnx' if task.labels else '--to merged'}."
        )
    config = load_config(find_model(Predictor.spec_of(path).model))
    layout_of_config(config, (config.architectures or ["?"])[0])
    return config


def export_gguf(
    path: Path | str, folder: Path | str, *, dtype: str = "f16", accept: bool = False, check: bool = True
) -> Exported:
    """Write a run's merged model as a file that llama.cpp reads, its vocabulary and template in it.

    Args:
        dtype: of the matrices: f32, f16, bf16 or q8_0. Vectors are in f32.
        accept: write it although it is not the model that was trained; its certificate says so.
        check: off, nothing is read back.

    Raises:
        ConfigError, UsageError: see `for_llama_cpp`; or no such type.
        CannotMerge: no weight can do what the method does, or llama.cpp reads no such model or vocabulary alike.
        IntegrityError: read back, it is not the model that was trained.
    """
    import gguf

    path, target = Path(path), Path(folder).absolute()
    if dtype not in TYPES:
        raise ConfigError(f"dtype: got {dtype!r}; a GGUF file is written in {', '.join(TYPES)}.")
    for_llama_cpp(path, target, "gguf")
    found = merged_model(path, dtype="fp32")
    model, predictor = found.model, found.predictor
    layout = layout_of(model)
    step = None
    with durable.folder(target) as draft:
        writer = gguf.GGUFWriter(str(draft.path / MODEL), layout.arch)
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(target.name)
        writer.add_description(
            f"{called(predictor.spec.model)} tuned with {predictor.spec.method} by luthier {__version__}"
        )
        writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[dtype]])
        if dtype == "q8_0":
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        describe(writer, model.config, layout)
        n_vocab = int(model.get_input_embeddings().weight.shape[0])
        write_vocabulary(writer, predictor.tokenizer, n_vocab, _stops(model))
        for name, value in sorted(_tensors(model).items()):
            array, kind = stored_as(layout.to_file(name, value), dtype)
            writer.add_tensor(layout.name(name), array, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        card = _card(target.name, predictor, dtype, layout.arch)
        draft.write_bytes("README.md", card.encode())
        otherwise = found.otherwise
        del found, model, writer
        if check:
            certificate = certify_folder(
                path, "gguf", draft.path, halves=dtype != "f32", in_unit=True, accept=accept, shown=target
            )
            draft.write_json(CERTIFICATE, certificate.to_plain())
            step = certificate.steps[0]
        draft.share()
    notes = [f"architecture {layout.arch}, matrices in {dtype}, vectors in f32"]
    if otherwise:
        notes += [f"it gives the plain outputs: what {' and '.join(otherwise)} makes of them is not in the file"]
    return Exported(target, f"llama_cpp.Llama({str(target / MODEL)!r})", tuple(notes), step)


def _tensors(model: Any) -> dict[str, Any]:
    """The model's tensors, each once: a tied head is its embedding."""
    return {name: value.detach() for name, value in model.named_parameters()}


def _stops(model: Any) -> list[int]:
    stop = model.generation_config.eos_token_id
    return [] if stop is None else [stop] if isinstance(stop, int) else list(stop)


def _card(name: str, predictor: Predictor, dtype: str, arch: str) -> str:
    chat = predictor.contract["template"] is not None
    asks = (
        ['out = model.create_chat_completion([{"role": "user", "content": "..."}], temperature=0)']
        if chat
        else ['out = model.create_completion("...", temperature=0)']
    )
    said = [
        "---", "library_name: gguf", "---", "", f"# {name}", "",
        f"`{called(predictor.spec.model)}` tuned with {predictor.spec.method} by luthier {__version__}, merged, as a "
        f"file for llama.cpp (architecture {arch}, matrices in {dtype}).", "",
        "```console", f"$ llama-cli -m {name}/{MODEL}{'' if chat else ' -no-cnv -p ...'}", "```", "",
        "```python", "import llama_cpp", "", f'model = llama_cpp.Llama("{name}/{MODEL}")', *asks, "print(out)", "```",
        "",
        "Vocabulary, stop tokens and chat template are in the file." if chat
        else "Vocabulary and stop tokens are in the file.",
        predictor.length_said,
    ]  # fmt: skip
    return "\n".join(said) + "\n"
