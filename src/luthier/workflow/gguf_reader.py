"""What a GGUF file answers, computed from the file alone: the steps "gguf" and "gguf adapter" of a certificate.

A model's file is read by transformers' own reader of GGUF, which puts the rows of q and k back by itself. Words, their
merges and the template are the file's. An adapter's file is added to the base here: nothing but llama.cpp reads one.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.core import IntegrityError, Refused
from luthier.trust import gguf as trusted_gguf
from luthier.workflow.fresh import Answer, Asked, base_of, look_plainly
from luthier.workflow.gguf_layout import layout_of
from luthier.workflow.gguf_vocabulary import stops_of, tokenizer_of
from luthier.workflow.load_model import quiet

__all__ = ["ADAPTER", "MODEL", "answer", "answer_of_adapter", "read_file"]

MODEL, ADAPTER = "model.gguf", "adapter.gguf"


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors, in fp32 and with the file's rows, of a file whose header has been checked.

    Raises:
        IntegrityError: the header claims what is not there.
    """
    import gguf

    try:
        trusted_gguf.check(path)
    except Refused as error:
        raise IntegrityError(str(error)) from None
    reader = gguf.GGUFReader(str(path))
    facts = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        entry.name: torch.tensor(gguf.quants.dequantize(entry.data, entry.tensor_type)).float()
        for entry in reader.tensors
    }
    return facts, tensors


def answer(asked: Asked) -> Answer:
    """A model's file, read by transformers."""
    import transformers

    folder = Path(asked.folder)
    facts, tensors = read_file(folder / MODEL)
    if strange := [name for name, value in tensors.items() if not torch.isfinite(value).all()]:
        raise IntegrityError(f"{strange[0]} is not finite")
    names = set(tensors)
    del tensors
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.AutoConfig.from_pretrained(folder, gguf_file=MODEL, local_files_only=True)
        # The reader takes biases that a model of the class has; that it has some stands in no field of the file.
        for setting, bias in (("attention_bias", "blk.0.attn_output.bias"), ("mlp_bias", "blk.0.ffn_gate.bias")):
            if hasattr(config, setting):
                setattr(config, setting, bias in names)
        # Nor does it take the width of a head for every family (not for qwen3), though the file says it.
        width = facts.get(f"{facts.get('general.architecture')}.attention.key_length")
        if width is not None and hasattr(config, "head_dim"):
            config.head_dim = int(width)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=MODEL, config=config, dtype=torch.float32, local_files_only=True
        )
    layout = layout_of(model)
    wanted = {layout.name(ours) for ours, _ in model.named_parameters()}
    if wanted != names:
        raise IntegrityError(f"its tensors are not those of its model: {', '.join(sorted(wanted ^ names)[:3])}")
    model.generation_config.eos_token_id = stops_of(facts) or None
    return Answer(
        *look_plainly(model.eval(), asked, tokenizer_of(facts)),
        facts={"by": f"transformers {transformers.__version__} from the file alone"},
    )


def answer_of_adapter(asked: Asked) -> Answer:
    """An adapter's file, added to the run's base."""
    import gguf
    import transformers

    folder = Path(asked.folder)
    facts, tensors = read_file(folder / ADAPTER)
    model, _ = base_of(asked)
    layout = layout_of(model)
    claimed = {name: facts.get(name) for name in ("general.type", "adapter.type", "general.architecture")}
    if list(claimed.values()) != ["adapter", "lora", layout.arch]:
        raise IntegrityError(f"it is no adapter of {layout.arch}: {claimed}")
    alpha = float(facts["adapter.lora.alpha"])
    with torch.no_grad():
        for ours, parameter in model.named_parameters():
            if not ours.endswith(".weight") or parameter.dim() != 2:
                continue
            stem = layout.name(ours)
            a, b = tensors.pop(f"{stem}.lora_a", None), tensors.pop(f"{stem}.lora_b", None)
            if (a is None) != (b is None):
                raise IntegrityError(f"{stem} has one half of its update")
            if a is not None and b is not None:
                # llama.cpp takes the rank from B, and alpha 0 for a scale of 1.
                scale = alpha / b.shape[1] if alpha else 1.0
                parameter.add_(layout.from_file(ours, b) @ a, alpha=scale)
    if tensors:
        raise IntegrityError(f"{', '.join(sorted(tensors)[:3])} have no place in the base")
    if (folder / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return Answer(*look_plainly(model, asked), facts={"by": f"gguf {_version(gguf)}, added to the base"})


def _version(package: Any) -> str:
    from importlib.metadata import version

    return version(package.__name__)
