"""An adapter of the peft library as a tuning of ours: the same numbers, bound to the base that they were read onto."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.core import BadInput, ConfigError, IntegrityError, NothingTrains
from luthier.core.places import refuse_taken
from luthier.surgery import from_peft, keyed
from luthier.surgery.compose import spell
from luthier.surgery.low_rank import as_lora, told_of
from luthier.surgery.merging import probe
from luthier.trust import config as trusted_config
from luthier.trust import safetensors
from luthier.workflow.load_model import find_model, quiet

__all__ = ["Imported", "base_of", "import_peft"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
ROUNDING = 1e-4  # of the logits' size: what the catalogue allows a file that passes between the libraries


@dataclass(frozen=True)
class Imported:
    """The tuning's folder, its method, its base, and how far peft's own logits lie from its; None without peft."""

    path: Path
    method: str
    model: str
    gap: float | None
    size: float
    notes: tuple[str, ...] = ()


def import_peft(adapter: Path | str, out: Path | str, *, model: str | None = None, rank: int | None = None) -> Imported:
    """Write what peft saved as a tuning that `luthier.load` reads.

    Where peft is installed, it computes the same ids from its own files, and the logits are compared.

    Args:
        adapter: a folder with adapter_config.json and adapter_model.safetensors.
        out: the folder to write; it must not exist.
        model: its base; left out, the one that the adapter names.
        rank: write a LoRA of this rank that is near the adapter, in its place.

    Raises:
        ConfigError: `out` is there, no base is named, or a setting that computes something that we do not.
        BadInput, Refused: a folder, base or file that cannot be used.
        IntegrityError: tensors are missing, of other shapes or not finite, or peft computes something else.
        NothingTrains: it computes what its base computes.
    """
    adapter, out = Path(adapter), Path(out)
    refuse_taken(out, deep=True)
    for name in (CONFIG, WEIGHTS):
        if not (adapter / name).is_file():
            raise BadInput(f"{adapter}: holds no {name}. Name a folder that peft saved, with safetensors weights.")
    facts = trusted_config.read_json(adapter / CONFIG)
    named = model or facts.get("base_model_name_or_path")
    if not named:
        raise ConfigError(f"{adapter / CONFIG}: names no base model. Name it: --model.")
    if (
        model is None
        and Path(str(named)).name == "base"
        and (Path(str(named)) / "model.safetensors.index.json").exists()
    ):
        raise ConfigError(f"{adapter}: its base/ only points at weights elsewhere. Name the base itself: --model.")
    source = find_model(str(named))
    base = _base(source.path, facts, adapter)
    tuned = from_peft(base, adapter)
    batch = _ids(base)
    found = probe(tuned.model, batch)
    with tuned.base_only():
        without = probe(tuned.model, batch)
    if torch.equal(found, without):
        raise NothingTrains(f"{adapter}: it computes what {named} computes alone; there is nothing to import.")
    size = float(found.square().mean().sqrt())
    method = spell(tuned.tuning().method)
    gap = None
    if find_spec("peft") is not None:
        gap = float((_by_peft(source.path, facts, adapter, batch) - found).abs().max())
        if not gap <= ROUNDING * max(size, 1e-6):
            raise IntegrityError(
                f"{adapter}: read as {method}, its logits are off by {gap:.2g} from peft's own, of {size:.2g}. It is "
                "not imported. Please report its adapter_config.json."
            )
    notes: tuple[str, ...] = ()
    if rank is not None:
        tuned, low = as_lora(tuned, rank)
        off = float((probe(tuned.model, batch) - found).square().mean().sqrt())
        effect = float((found - without).square().mean().sqrt())
        method = told_of(method, low)
        notes = (
            *low.notes,
            f"on a batch of ids its logits are off by {off:.2g}, of {effect:.2g} that the adapter changes",
        )
    tuned.save(out)
    return Imported(out, method, str(named), gap, size, notes)


def base_of(path: Path) -> Any:
    """The base in fp32, as the class that its configuration names."""
    return _base(path, {}, path)


def _base(path: Path, facts: Mapping[str, Any], adapter: Path) -> Any:
    """The base with as many outputs as the adapter's head has, in fp32."""
    import transformers

    kind = facts.get("task_type")
    if kind is not None and kind not in CLASSES:
        raise ConfigError(f"{adapter / CONFIG}: task_type {kind!r}; {', '.join(CLASSES)} can be read.")
    with quiet():
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        if kind is None:
            made = (config.architectures or [""])[0]
            auto: Any = getattr(transformers, made, None) or transformers.AutoModel
        else:
            auto = getattr(transformers, CLASSES[kind])
        if kind in ("SEQ_CLS", "TOKEN_CLS") and (n := _outputs(adapter)) is not None:
            config.num_labels = n
        with keyed(0, "head"):  # one that the adapter does not hold is drawn; peft's model draws the same
            model = auto.from_pretrained(path, config=config, dtype=torch.float32, local_files_only=True)
    return model.eval()


def _outputs(adapter: Path) -> int | None:
    """Rows of the last layer of the head that the adapter holds."""
    entries = safetensors.check_header(adapter / WEIGHTS).entries
    last = ("classifier.weight", "score.weight", "out_proj.weight")
    heads = [entry.shape[0] for name, entry in entries.items() if name.endswith(last)]
    return heads[-1] if heads else None


def _ids(model: Any) -> dict[str, Tensor]:
    n_vocab = int(model.get_input_embeddings().weight.shape[0])
    ids = torch.arange(24).reshape(2, 12) * max(1, n_vocab // 24) % n_vocab
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**batch, "decoder_input_ids": ids[:, :6]} if model.config.is_encoder_decoder else batch


def _by_peft(path: Path, facts: Mapping[str, Any], adapter: Path, batch: Mapping[str, Tensor]) -> Tensor:
    """Peft's own logits, of what stands at the ids: it gives those of its prompts too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft

        model = peft.PeftModel.from_pretrained(_base(path, facts, adapter), str(adapter)).eval()
        found = probe(model, batch)
    n = batch.get("decoder_input_ids", batch["input_ids"]).shape[1]
    return found if found.dim() < 3 else found[:, -n:]
