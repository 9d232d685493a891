"""Your own training loop: luthier edits the model, everything else is plain PyTorch.

`attach` freezes the base and adds the method. `tuned.trained()` names what learns. `tuned.save` writes it, `load` puts
it on a fresh base, and refuses a base that it was not made for.
"""

import tempfile

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from luthier import attach, load
from luthier.methods.reparameterised.lora import LoRA
from luthier.samples import load_sample, model_path

torch.manual_seed(0)
folder = model_path("minilm-l6")
rows = [row for row in load_sample("trec6").train if row["label"] in ("HUM", "NUM")][:320]
labels = sorted({row["label"] for row in rows})
tokenizer = AutoTokenizer.from_pretrained(folder)


def base() -> torch.nn.Module:
    torch.manual_seed(1)  # the new classifier is drawn; the tuning holds the trained one
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(labels))


model = base()
tuned = attach(model, LoRA(rank=8))
optimiser = torch.optim.AdamW(tuned.trained().values(), lr=5e-3)

model.train()
for step in range(20):
    some = rows[step * 16 : (step + 1) * 16]
    batch = tokenizer([row["text"] for row in some], padding=True, return_tensors="pt")
    loss = model(**batch, labels=torch.tensor([labels.index(row["label"]) for row in some])).loss
    loss.backward()
    optimiser.step()
    optimiser.zero_grad()
    if step % 5 == 0:
        print(f"step {step}: loss {loss.item():.2f}")

model.eval()
question = tokenizer(["Who wrote Moby Dick?"], return_tensors="pt")
with torch.no_grad():
    expected = model(**question).logits

where = f"{tempfile.mkdtemp()}/tuning"
tuned.save(where)
fresh = base()
load(fresh, where)
with torch.no_grad():
    assert torch.equal(fresh(**question).logits, expected), "a loaded tuning answers as the saved one did"
print("loaded on a fresh base: the same logits; it says", labels[int(expected.argmax())])
