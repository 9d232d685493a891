"""The rows of which single pages speak, written from samples into a folder, the same on every machine.

    python -m experiments.rows FOLDER

few.csv, held.csv          300 and 400 questions of trec6 (`luthier methods laplace_lora`)
train.jsonl, test.jsonl    1,200 and 300 pairs made of trec6's marked options (docs/howto/align.md)
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from luthier.samples.data import load_sample

KINDS = {
    "ABBR": "an abbreviation", "DESC": "a description", "ENTY": "a thing", "HUM": "a person", "LOC": "a place",
    "NUM": "a number",
}  # fmt: skip
WRONG_OF = ("DESC", "ENTY", "ABBR", "HUM", "NUM", "LOC")
"""The kinds in the order from which a wrong one is drawn."""


def main() -> None:
    words = argparse.ArgumentParser(prog="python -m experiments.rows", description=__doc__)
    words.add_argument("folder", type=Path)
    folder: Path = words.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    sample = load_sample("trec6")
    draw = random.Random(1)
    for name, rows, n in (("few", sample.train, 300), ("held", sample.test, 400)):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(["text", "label"])
            table.writerows([row["text"], row["label"]] for row in draw.sample(rows, n))
    for name, rows, n in (("train", sample.train, 1200), ("test", sample.test, 300)):
        lines = "".join(json.dumps(pair) + "\n" for pair in _pairs(rows[:n]))
        (folder / f"{name}.jsonl").write_text(lines, "utf-8")


def _pairs(rows: Iterable[dict[str, Any]]) -> Iterable[dict[str, str]]:
    """The right kind of answer before a wrong one, drawn by the row's number."""
    for number, row in enumerate(rows):
        wrong = random.Random(number).choice([kind for kind in WRONG_OF if kind != row["label"]])
        right, other = (f"It asks for {KINDS[kind]}." for kind in (row["label"], wrong))
        prompt = f"What kind of answer does this question ask for?\n\n{row['text']}"
        yield {"prompt": prompt, "chosen": right, "rejected": other}


if __name__ == "__main__":
    main()
