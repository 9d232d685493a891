"""Several tunings on one base: train one after another, switch between them, and serve a batch with one for each row.

The base is in memory once. Which tunings act and which learn are separate facts: `activate` and `train_only`.
"""

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from luthier import Tuned, attach
from luthier.samples import model_path

torch.manual_seed(0)
folder = model_path("minilm-l6")
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
TEXTS = ["what a fine day", "a dull film", "please pay at once", "see you at noon"]
TASKS = {"mood": [1, 0, 0, 1], "duty": [0, 0, 1, 1]}  # two readings of the same four texts
batch = tokenizer(TEXTS, padding=True, return_tensors="pt")

tuned: Tuned
for name, labels in TASKS.items():
    tuned = attach(model, "lora", name=name, rank=4)
    # Both hold the classifier, so the newer one acts and the older one sleeps.
    tuned.activate(name)
    tuned.train_only(name)
    optimiser = torch.optim.AdamW(tuned.trained().values(), lr=5e-3)
    model.train()
    for _ in range(15):
        model(**batch, labels=torch.tensor(labels)).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
print(tuned)

model.eval()
with torch.no_grad():
    for name, labels in TASKS.items():
        tuned.activate(name)
        assert model(**batch).logits.argmax(-1).tolist() == labels, f"{name} has not learnt its four texts"

# One pass, another tuning for each row; None is the base.
with tuned.serving(), tuned.rows(["mood", "duty", "duty", None]):
    mixed = model(**batch).logits
with torch.no_grad():
    tuned.activate("duty")
    torch.testing.assert_close(mixed[1:3], model(**batch).logits[1:3], rtol=1e-4, atol=1e-4)
print("rows of one batch, each with its own tuning:", mixed.argmax(-1).tolist())
