"""Classify the rows of a CSV file: train, read the score, ask.

A row has a text and a label. Columns with usual names (`text`, `label`, ...) are found by themselves and said; others
are named: `DataSpec(source=..., text="question", label="kind")`. Rows to score with are held out by themselves.
"""

import csv
import tempfile
from pathlib import Path

from luthier import DataSpec, RunSpec, predict, train
from luthier.samples import load_sample

home = Path(tempfile.mkdtemp())

# A file as you would have one: questions, and whether a person or a number is asked for.
with (home / "questions.csv").open("w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file)
    writer.writerow(["question", "kind"])
    rows = [row for row in load_sample("trec6").train if row["label"] in ("HUM", "NUM")][:300]
    writer.writerows([row["text"], row["label"]] for row in rows)

spec = RunSpec(
    model="sample:minilm-l6",
    data=DataSpec(source=str(home / "questions.csv"), text="question", label="kind"),
    method="lora",
    epochs=4,
    out=str(home / "run"),
)
result = train(spec)
print(f"accuracy on held-out rows: {result.scores['accuracy']:.2f}, trained numbers: {result.n_params:,}")

questions = ["How tall is the Eiffel tower?", "Who wrote Moby Dick?"]
for question, answer in zip(questions, predict(result.path, texts=questions), strict=True):
    label = answer["label"]
    print(f"{question}  {label} ({answer['probabilities'][label]:.0%})")
