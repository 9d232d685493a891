"""Ship a tuning: as the small folder it is, for the peft library, or merged into a plain model.

Merging is computed in fp32, cast once, and compared with what the attached tuning says on a batch of yours.
"""

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from luthier import DataSpec, RunSpec, load, train
from luthier.samples import model_path
from luthier.surgery import to_peft

home, folder = Path(tempfile.mkdtemp()), model_path("minilm-l6")
spec = RunSpec(model=str(folder), data=DataSpec(source="sample:trec6"), method="lora", steps=20, out=str(home / "run"))
result = train(spec)
names = sorted(p.name for p in (home / "run" / "tuning").iterdir())
print(f"the tuning is a folder of {result.stored_bytes / 1e3:.0f} kB: {names}")

# For the peft library (`luthier export RUN FOLDER` does it from the command line).
to_peft(result.tuned, home / "peft")
print("for peft:", sorted(p.name for p in (home / "peft").iterdir()))

# Merged: a plain model of transformers, without a trace of ours.
tokenizer = AutoTokenizer.from_pretrained(folder)
batch = tokenizer(["How tall is the Eiffel tower?", "Who wrote Moby Dick?"], padding=True, return_tensors="pt")
model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=6)
tuned = load(model, home / "run/tuning")
with torch.no_grad():
    attached = model(**batch).logits
plain = tuned.merge(check=batch)
plain.save_pretrained(home / "merged")
tokenizer.save_pretrained(home / "merged")

again = AutoModelForSequenceClassification.from_pretrained(home / "merged").eval()
with torch.no_grad():
    difference = (again(**batch).logits - attached).abs().max().item()
assert difference < 1e-4
print(f"merged, saved and loaded by transformers alone: logits differ by {difference:.1e} at most")
