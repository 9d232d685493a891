"""Before speed: both sides start from the same numbers, see the same rows in the same order, and lose alike.

luthier trains; its rows of each step, its initial tensors, its schedule and its clip go to peft and the Trainer,
without dropout. The losses of every step are then compared.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

from benchmarks import _ours, _peers
from benchmarks._work import MODELS, rows, write_rows
from luthier import samples
from luthier.data.order import Order
from luthier.runs.spec import BatchSpec, DataSpec, OptimSpec, RunSpec
from luthier.surgery import attach
from luthier.training.schedule import factor
from luthier.workflow import prepare, train
from luthier.workflow.load_model import load_model

__all__ = ["encoder"]


def encoder(sample: str = "trec6", steps: int = 20, precision: str = "fp32", lr: float = 2e-3) -> dict[str, Any]:
    """Largest difference of the losses of `steps` steps, absolute and as a share of the loss."""
    with tempfile.TemporaryDirectory() as folder:
        some = rows(sample)
        spec = RunSpec(
            model=f"sample:{MODELS['encoder']}",
            data=DataSpec(
                source=str(write_rows(Path(folder) / "rows.jsonl", some)), text="text", label="label", test_share=0.0
            ),
            steps=steps,
            precision=precision,  # type: ignore[arg-type]
            optim=OptimSpec(lr=lr, weight_decay=0.0),
            batch=BatchSpec(size=32, tokens=1_000_000),
            out=str(Path(folder) / "run"),
        )
        prepared = prepare(spec)
        assert len(prepared.train) == len(some), "a row was refused, so the orders would not agree"
        marks = _ours.Marks()
        train(spec, listener=marks, prepared=prepared)
        order = Order(prepared.train.lengths, 32, spec.seed, True)
        indices = [int(i) for s in range(steps) for i in order.rows(*order.at(s))]

        model, fresh = load_model(
            prepared.source, prepared.task, dtype=torch.float32, device=prepared.device, seed=spec.seed
        )
        tuned = attach(model, prepared.method, seed=spec.seed, new_tensors=fresh)
        start = {n: p.detach().clone() for n, p in tuned.trained().items()}
        losses = _peer(start, some, list(prepared.task.labels), indices, spec, steps, folder, precision == "bf16")
    ours = np.asarray(marks.losses)
    theirs = np.asarray(losses)
    apart = np.abs(ours - theirs)
    return {
        "steps": steps,
        "largest_difference": float(apart.max()),
        "largest_share": float((apart / np.abs(theirs)).max()),
        "last_loss": float(ours[-5:].mean()),
        "last_loss_peft": float(theirs[-5:].mean()),
        "losses": ours.tolist(),
        "losses_peft": theirs.tolist(),
    }


def _peer(
    start: dict[str, torch.Tensor],
    some: list[dict[str, Any]],
    labels: list[str],
    indices: list[int],
    spec: RunSpec,
    steps: int,
    folder: str,
    bf16: bool,
) -> list[float]:
    set_seed(0)
    folder_of = samples.model_path(MODELS["encoder"])
    tokenizer = AutoTokenizer.from_pretrained(folder_of)
    base = AutoModelForSequenceClassification.from_pretrained(
        folder_of,
        num_labels=len(labels),
        dtype=torch.float32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = peft.get_peft_model(base, _peers.adapter("lora", base, "SEQ_CLS", steps))
    taken = _copy(start, model)
    assert taken == set(start), f"tensors without a place in peft's model: {sorted(set(start) - taken)}"
    for name, parameter in model.named_parameters():
        # What luthier trains beside LoRA and the head (a pooler that no checkpoint fills) trains here too.
        parameter.requires_grad_(_key(name) in start)
    coded = tokenizer([r["text"] for r in some], truncation=True)
    items = [{**{n: coded[n][i] for n in coded}, "labels": labels.index(r["label"])} for i, r in enumerate(some)]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=spec.optim.lr or 0.0, betas=spec.optim.betas, eps=spec.optim.eps, weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: factor(spec.optim.schedule, s + 1, steps, spec.optim.warmup)
    )
    arguments = _peers._arguments(
        folder, per_device_train_batch_size=32, max_steps=steps, max_grad_norm=spec.optim.clip, bf16=bf16
    )
    trainer = _peers._Timed(
        model=model,
        args=arguments,
        train_dataset=_peers._Rows(items),
        data_collator=DataCollatorWithPadding(tokenizer),
        optimizers=(optimizer, schedule),
    )
    trainer.order = indices
    trainer.train()
    return [float(x) for x in trainer.losses]


def _key(name: str) -> str:
    """luthier's name of a tensor of peft's model, or the name itself where it has none."""
    plain = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "").replace(".base_layer", "")
    for theirs, ours in ((".lora_A.default.weight", "a"), (".lora_B.default.weight", "b")):
        if plain.endswith(theirs):
            layer = int(plain.split(".layer.")[1].split(".")[0])
            which = {"query": "q", "value": "v"}[plain.removesuffix(theirs).rsplit(".", 1)[1]]
            return f"attn.{which}@{layer}.{ours}"
    return f"head/{plain}"


def _copy(start: dict[str, torch.Tensor], model: Any) -> set[str]:
    taken = set()
    for name, parameter in model.named_parameters():
        if ".original_module." not in name and (key := _key(name)) in start:
            parameter.data.copy_(start[key])
            taken.add(key)
    return taken
