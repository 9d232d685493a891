"""The same work by `peft` and the framework's `Trainer`, as users run it and tuned.

Tuned means: bf16 arithmetic, rows of like length together, and either attention implementation; each is a contestant
of its own, so that the page can take the fastest of them.
"""

import logging
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from torch.utils.data import Sampler
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.models.bert import modeling_bert
from transformers.models.llama import modeling_llama

from benchmarks._peft_config import config
from benchmarks._work import MODELS, blocks, measured, model_folder, now, rows
from luthier import samples
from luthier.data.order import Order

__all__ = ["FixedOrder", "adapter", "decoder", "encoder"]

_IMPORTED = (modeling_bert, modeling_llama)  # at the top on both sides: imports are no part of either's time

SITES = {
    "bert": {"q": "query", "k": "key", "v": "value", "down": r".*layer\.\d+\.output\.dense"},
    "mpnet": {"q": "q", "k": "k", "v": "v", "down": r".*layer\.\d+\.output\.dense"},
    "llama": {"q": "q_proj", "k": "k_proj", "v": "v_proj", "down": r".*\.down_proj"},
}


def adapter(method: str, model: Any, task: str, total_steps: int) -> Any:
    """peft's configuration of a method at the places, ranks and lengths that are luthier's defaults."""
    at = SITES[model.config.model_type]
    qv = [at["q"], at["v"]]
    if method in ("lora", "dora"):
        return peft.LoraConfig(
            task_type=task, r=8, lora_alpha=16, target_modules=qv, lora_dropout=0.0, use_dora=method == "dora"
        )
    if method == "adalora":
        return peft.AdaLoraConfig(
            task_type=task,
            init_r=12,
            target_r=8,
            lora_alpha=16,
            target_modules=qv,
            orth_reg_weight=0.1,
            total_step=total_steps,
            tinit=max(1, total_steps // 10),
            tfinal=max(1, total_steps * 4 // 10),
            deltaT=10,
        )
    if method == "ia3":
        every = rf"(.*\.({at['k']}|{at['v']})|{at['down']})"
        return peft.IA3Config(task_type=task, target_modules=every, feedforward_modules=at["down"])
    if method == "prefix_tuning":
        return peft.PrefixTuningConfig(
            task_type=task, num_virtual_tokens=20, prefix_projection=True, encoder_hidden_size=512
        )
    if method == "prompt_tuning":
        return peft.PromptTuningConfig(task_type=task, num_virtual_tokens=20)
    raise ValueError(f"no peer for the method {method!r}")


def _tuned(
    base: Any, method: str, model: str, task: str, steps: int, settings: dict[str, Any] | None, **how: Any
) -> Any:
    """The model with peft's adapter: by `adapter`, or with `settings` by the file that luthier writes."""
    if method == "full":
        return base
    by_hand = settings is None or method == "adalora"  # its schedule is in no file
    wanted = adapter(method, base, task, steps) if by_hand else config(method, model, task, settings or {})
    return peft.get_peft_model(base, wanted, **how)


class FixedOrder(Sampler[int]):
    """Rows in an order that is given, one list for all steps."""

    def __init__(self, order: list[int]) -> None:
        self.order = order

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)


class _Marks(TrainerCallback):
    def __init__(self, allocate: Any) -> None:
        self.marks: list[float] = []
        self.allocate = allocate

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.marks:
            self.marks.append(now())

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.allocate is not None:  # AdaLoRA's pruning wants the gradients
            self.allocate(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.marks.append(now())


class _Timed(Trainer):
    """The Trainer, keeping each step's loss and size, and taking an order where one is given."""

    order: list[int] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[torch.Tensor] = []
        self.sizes: list[tuple[int, int]] = []

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return FixedOrder(self.order) if self.order is not None else super()._get_train_sampler(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        mask = inputs["attention_mask"]
        self.sizes.append((len(mask), int(mask.sum())))
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.losses.append((loss[0] if isinstance(loss, tuple) else loss).detach())
        return loss


def _arguments(folder: str, **more: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder, use_cpu=not torch.cuda.is_available(), report_to=[], disable_tqdm=True, **more
    )


def _go(trainer: _Timed, model: Any, folder: str, start: float, skip: int) -> dict[str, Any]:
    allocate = getattr(getattr(model, "base_model", None), "update_and_allocate", None)
    marks = _Marks(allocate)
    trainer.add_callback(marks)
    trainer.train()
    model.save_pretrained(f"{folder}/adapter")
    seconds = time.perf_counter() - start
    losses = [float(x) for x in trainer.losses]
    n_rows = sum(n for n, _ in trainer.sizes)
    n_tokens = sum(n for _, n in trainer.sizes)
    return {
        **measured(marks.marks, trainer.sizes, min(skip, len(losses) - 1)),
        "rows_per_second": n_rows / seconds,
        "tokens_per_second": n_tokens / seconds,
        "total_seconds": seconds,
        "steps": len(losses),
        "last_loss": float(np.mean(losses[-10:])),
        "losses": losses,
        "trained_numbers": sum(p.numel() for n, p in model.named_parameters() if p.requires_grad),
    }


def _quiet() -> None:
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)


class _Rows(torch.utils.data.Dataset[dict[str, Any]]):
    def __init__(self, items: list[dict[str, Any]]) -> None:
        self.items = items
        self.column_names = list(items[0])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)


def _same_rows(lengths: list[int], batch: int, seed: int, steps: int) -> list[int]:
    """luthier's rows of the first steps of an epoch.

    The Trainer's own grouping begins with the longest rows, so a part of its epoch has longer rows than a part of ours.
    The one step of an epoch that is smaller is left out: it would move the limits of all that follow.
    """
    order = Order(np.asarray(lengths, dtype=np.int64), batch, seed, True)
    all_steps = [order.rows(0, s) for s in range(order.steps_per_epoch)]
    return [int(i) for rows in [r for r in all_steps if len(r) == batch][:steps] for i in rows]


def encoder(
    sample: str = "trec6",
    model: str = "encoder",
    method: str = "lora",
    steps: int | None = None,
    seed: int = 0,
    batch: int = 32,
    test: bool = False,
    lr: float = 2e-3,
    bf16: bool = False,
    group: bool = False,
    attention: str | None = None,
    pad_to: int | None = None,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """From rows to a trained and saved adapter; with `steps`, only so many of the first epoch.

    Args:
        bf16: autocast. group: rows of like length together, in luthier's order where less than an epoch is run.
        attention: "eager" or "sdpa"; None, the library's choice.
        pad_to: pad every row to this length, as many tutorials do; None, to the longest of its batch.
        settings: of luthier's method, whose file for peft gives the adapter; None, by `adapter`.
    """
    _quiet()
    start = time.perf_counter()
    transformers.set_seed(seed)
    folder_of = samples.model_path(MODELS[model])
    tokenizer = AutoTokenizer.from_pretrained(folder_of)

    def read(half: str) -> _Rows:
        some = rows(sample, half)
        padding = {"padding": "max_length", "max_length": pad_to} if pad_to else {}
        coded = tokenizer([r["text"] for r in some], truncation=True, **padding)
        return _Rows([{**{n: coded[n][i] for n in coded}, "labels": number[r["label"]]} for i, r in enumerate(some)])

    number = {name: i for i, name in enumerate(sorted({r["label"] for r in rows(sample)}))}
    train = read("train")
    base = AutoModelForSequenceClassification.from_pretrained(
        folder_of,
        num_labels=len(number),
        dtype=torch.float32,
        **({"attn_implementation": attention} if attention else {}),
    )
    total = steps or -(-len(train) // batch)
    tuned = _tuned(base, method, model, "SEQ_CLS", total, settings)
    with tempfile.TemporaryDirectory() as folder:
        arguments = _arguments(
            folder,
            per_device_train_batch_size=batch,
            learning_rate=lr,
            seed=seed,
            bf16=bf16,
            train_sampling_strategy="group_by_length" if group else "random",
            **({"max_steps": steps} if steps else {"num_train_epochs": 1}),
        )
        trainer = _Timed(
            model=tuned, args=arguments, train_dataset=train, data_collator=DataCollatorWithPadding(tokenizer)
        )
        if group and steps is not None and steps < len(train) // batch:
            trainer.order = _same_rows([len(r["input_ids"]) for r in train.items], batch, seed, steps)
        found = _go(trainer, tuned, folder, start, skip=3)
        if test:
            held_out = read("test")
            out = trainer.predict(held_out)
            # Its own labels: prediction puts rows of like length together too, so their order is not that of the file.
            right = np.argmax(out.predictions, -1) == np.asarray(out.label_ids)
            found["accuracy"] = float(right.mean())
    return found


def decoder(
    model: str = "decoder",
    method: str = "lora",
    batch: int = 8,
    length: int = 256,
    supervised: float = 1.0,
    steps: int = 6,
    weights: str = "fp32",
    bf16: bool = False,
    attention: str | None = None,
    liger: bool = False,
    lr: float = 2e-3,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """`steps` steps of `batch` rows of `length` random tokens, the last share of them supervised.

    Args:
        weights: "fp32" or "bf16", how the base is held. bf16: autocast.
        liger: with the fused kernels of the package liger-kernel.
        settings: as for `encoder`.
    """
    _quiet()
    transformers.set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        folder_of = model_folder(model, Path(folder) / "model")
        n_vocab = len(AutoTokenizer.from_pretrained(folder_of))
        ids, labels = blocks(steps * batch, length, n_vocab, supervised)
        items = [
            {"input_ids": i, "attention_mask": [1] * length, "labels": one}
            for i, one in zip(ids.tolist(), labels.tolist(), strict=True)
        ]
        start = time.perf_counter()
        base = AutoModelForCausalLM.from_pretrained(
            folder_of,
            dtype=torch.bfloat16 if weights == "bf16" else torch.float32,
            **({"attn_implementation": attention} if attention else {}),
        )
        # The adapter's own type is the library's choice: fp32 beside bf16 weights under autocast, bf16 without.
        own_type = weights == "fp32" or bf16
        tuned = _tuned(base, method, model, "CAUSAL_LM", steps, settings, autocast_adapter_dtype=own_type)
        arguments = _arguments(
            folder,
            per_device_train_batch_size=batch,
            learning_rate=lr,
            bf16=bf16,
            max_steps=steps,
            seed=0,
            use_liger_kernel=liger,
        )
        trainer = _Timed(model=tuned, args=arguments, train_dataset=_Rows(items), data_collator=default_data_collator)
        return _go(trainer, tuned, folder, start, skip=1)
