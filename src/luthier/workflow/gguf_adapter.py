"""A run's tuning for llama.cpp: a LoRA in a GGUF file, beside a base that its user has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luthier.__version__ import __version__
from luthier.core import CannotMerge
from luthier.runs import durable
from luthier.surgery.low_rank import told_of
from luthier.workflow.as_lora import lora_of_run
from luthier.workflow.certificate import FILE as CERTIFICATE
from luthier.workflow.certificate import called, certify_folder
from luthier.workflow.export import Exported, write_tokenizer
from luthier.workflow.gguf_export import for_llama_cpp
from luthier.workflow.gguf_layout import layout_of
from luthier.workflow.gguf_reader import ADAPTER

__all__ = ["export_gguf_adapter"]


def export_gguf_adapter(
    path: Path | str, folder: Path | str, *, rank: int | None = None, accept: bool = False, check: bool = True
) -> Exported:
    """Write a run's tuning as a LoRA that llama.cpp adds to its base.

    Args:
        rank: of a LoRA that is near it; None for one that is it, which lora has and whatever is exactly low-rank.
        accept: write it although it is not the model that was trained; its certificate says so.
        check: off, nothing is read back.

    Raises:
        ConfigError, UsageError: see `for_llama_cpp`.
        CannotMerge: no LoRA is it, or a place that llama.cpp knows no LoRA of.
        IntegrityError: read back, it is not the model that was trained.
    """
    import gguf

    path, target = Path(path), Path(folder).absolute()
    for_llama_cpp(path, target, "gguf-adapter")
    found = lora_of_run(path, rank)
    predictor, tuned = found.predictor, found.predictor.tuned
    model: Any = tuned.model
    layout = layout_of(model)
    places = {site.key: site for site in tuned.anatomy.all_sites}
    held: dict[str, Any] = {key: module for key, module in tuned.tuning().modules_by_key().items() if key in places}
    if strange := [key for key in held if places[key].kind in ("embed", "head")]:
        raise CannotMerge(f"{strange[0]}: llama.cpp's adapters are written for the blocks here. Nearest is --to gguf.")
    method = told_of(predictor.spec.method, found.low)
    step = None
    with durable.folder(target) as draft:
        writer = gguf.GGUFWriter(str(draft.path / ADAPTER), layout.arch)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(target.name)
        writer.add_description(f"{called(predictor.spec.model)} tuned with {method} by luthier {__version__}")
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        # llama.cpp scales by alpha over the rank of each B, so that one alpha cannot serve several ranks: it is in B.
        alpha = float(max(len(module.a) for module in held.values()))
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for key, module in sorted(held.items()):
            name = f"{places[key].path}.weight"
            b = layout.to_file(name, module.b.detach().float() * (module.scale * module.b.shape[1] / alpha))
            stem = layout.name(name)
            writer.add_tensor(f"{stem}.lora_a", module.a.detach().float().contiguous().numpy())
            writer.add_tensor(f"{stem}.lora_b", b.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        write_tokenizer(predictor, draft.path)
        model.generation_config.save_pretrained(draft.path)
        base = called(predictor.spec.model)
        draft.write_bytes("README.md", _card(target.name, base, method, layout.arch, predictor.length_said).encode())
        notes = (
            *found.notes,
            f"llama.cpp adds it to a GGUF of {base}, of any type; merged into one file: --to gguf",
        )
        low, shares = found.low, found.shares
        del found, predictor, tuned, model, held, writer, module
        if check:
            certificate = certify_folder(
                path, "gguf_adapter", draft.path, halves=False, in_unit=True, accept=accept, shown=target,
                rough=not low.exact,
            )  # fmt: skip
            draft.write_json(CERTIFICATE, certificate.to_plain())
            step = certificate.steps[0]
        draft.share()
    line = f'llama_cpp.Llama("BASE.gguf", lora_path={str(target / ADAPTER)!r})'
    return Exported(target, line, notes, step, shares)


def _card(name: str, base: str, method: str, arch: str, length: str) -> str:
    said = [
        "---", "library_name: gguf", "---", "", f"# {name}", "",
        f"A tuning of `{base}` with {method} by luthier {__version__}, as an adapter for llama.cpp "
        f"(architecture {arch}). BASE.gguf is a file of that base:", "",
        "```console", f"$ llama-cli -m BASE.gguf --lora {name}/{ADAPTER}", "```", "",
        f"The template of training, where there is one, is in {name}/chat_template.jinja: hand it over with "
        "--chat-template-file if the base's file has another.", length,
    ]  # fmt: skip
    return "\n".join(said) + "\n"
