"""Compose two methods on one model, look at what trains, and take everything off again.

`lora+prefix_tuning` adds thin matrices beside the projections and learned keys and values before those of the text.
Where two methods cannot stand together, `attach` says why and changes nothing.
"""

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from luthier import attach
from luthier.core import CompositionError
from luthier.samples import model_path

folder = model_path("minilm-l6")
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).eval()
batch = tokenizer(["a long walk", "rain"], padding=True, return_tensors="pt")
with torch.no_grad():
    before = model(**batch).logits

tuned = attach(model, "lora+prefix_tuning", **{"lora.rank": 4, "prefix_tuning.length": 5})
print(tuned)
print("head and method train", f"{tuned.n_trained(head=True):,} numbers; the method alone {tuned.n_trained():,}")

# The model kept its class: call it, train it, hand it to a pipeline as before.
with torch.no_grad():
    assert not torch.equal(model(**batch).logits, before), "the prefix acts from the start"

try:
    tuned.add("full", name="second")
except CompositionError as refusal:
    print("refused:", refusal)

assert tuned.detach() is model
with torch.no_grad():
    assert torch.equal(model(**batch).logits, before), "taken off, the model is what it was, bit for bit"
print("taken off: the same logits as before, bit for bit")
