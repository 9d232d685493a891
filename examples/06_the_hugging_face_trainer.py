"""The Trainer of transformers on a tuned model: it trains the tuning, and its checkpoints hold no base weight.

The model keeps its class, so a trainer, a pipeline and `generate` take it as it is. The callback asks methods that have
to be asked during training, such as adalora for its budget; the others need none.
"""

import tempfile
from pathlib import Path

from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from luthier import HooksCallback, attach, load
from luthier.samples import load_sample, model_path

folder = model_path("minilm-l6")
rows = [row for row in load_sample("trec6").train if row["label"] in ("HUM", "NUM")][:320]
labels = sorted({row["label"] for row in rows})
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(labels))
tuned = attach(model, "adalora", rank=6, target_rank=4)

examples = [{**tokenizer(row["text"]), "labels": labels.index(row["label"])} for row in rows]
out = Path(tempfile.mkdtemp())
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        str(out),
        per_device_train_batch_size=16,
        max_steps=20,
        learning_rate=5e-3,
        logging_steps=5,
        save_steps=20,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    ),
    train_dataset=examples,
    processing_class=tokenizer,
    callbacks=[HooksCallback(tuned)],
)
trainer.train()

checkpoint = out / "checkpoint-20"
size = sum(p.stat().st_size for p in checkpoint.rglob("*") if p.is_file())
print(
    f"a checkpoint takes {size / 1e6:.1f} MB; the model alone {(folder / 'model.safetensors').stat().st_size / 1e6:.0f}"
)

fresh = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(labels))
print(load(fresh, checkpoint / "tunings" / "default"))
