"""Count, and write the page. See the package for its options."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from luthier.comparison import entrant_of
from luthier.core.config import read_word
from luthier.forecast import device_of
from luthier.runs.spec import DataSpec, RunSpec
from luthier.surgery import METHODS
from luthier.workflow.outline import outline_of
from luthier.workflow.plan import Asked, Plan, plan

SHAPES = Path(__file__).parent / "shapes"
PAGE = Path(__file__).parents[2] / "docs" / "parameter-table.md"
MODELS = ("roberta-base", "roberta-large", "t5-base", "t5-large", "llama-7b", "llama-13b")
SPELT = ("lora:rank=64:sites=*",)
"""Beside the defaults: LoRA on all linear maps, as it is often counted."""
HEAD = """# Trained numbers by method and model

<!-- not run: it is in the source tree, not in the package -->
```sh
python -m experiments.parameters
```

writes this page: how many numbers each method trains at luthier's defaults, beside a new head, and what share of the
model that is. They are counted as `luthier plan` counts, from configurations alone (`experiments/parameters/shapes`),
and a test holds those counts to attached models, number by number. RoBERTa is a classifier of two classes here, T5
writes text from text, LLaMA text alone. A dash: the method refuses such a model as it stands; `luthier plan` says why.

Defaults of ours, not of a paper: where a paper has other ranks, sites or widths, its count is another.

"""


def main() -> None:
    words = argparse.ArgumentParser(prog="python -m experiments.parameters", description=__doc__)
    words.add_argument("--only", action="append", help="a method, with settings or without; may be repeated")
    asked = words.parse_args()
    text = table(asked.only or (*METHODS.ours(), *SPELT))
    if asked.only:
        print(text)
    else:
        PAGE.write_text(HEAD + text + "\n", "utf-8")


def table(names: Sequence[str], models: Sequence[str] = MODELS) -> str:
    """The table as Markdown."""
    found = {model: counted(model, names) for model in models}
    lines = [
        f"| method | {' | '.join(models)} |", f"| --- |{' --: |' * len(models)}",
        f"| the model itself | {' | '.join(f'{one.numbers:,}' for one in found.values())} |",
    ]  # fmt: skip
    for number, name in enumerate(names):
        cells = []
        for one in found.values():
            held = one.rows[number].held
            cells.append("-" if held is None else f"{held.trained:,} ({_share(held.trained / one.numbers)})")
        plain = name.partition(":")[0]
        link = f"[{name}](methods/{plain}.md)" if plain in METHODS.ours() else name
        lines.append(f"| {link} | {' | '.join(cells)} |")
    return "\n".join(lines)


def counted(model: str, names: Sequence[str]) -> Plan:
    """The counts of one model."""
    outline = outline_of(str(SHAPES / f"{model}.json"))
    entrants = [entrant_of(name, read_word) for name in names]
    asked = [Asked(one.name, one.method, one.settings) for one in entrants]
    spec = RunSpec(model=model, data=DataSpec(source="-"), precision="bf16")
    return plan(outline, spec, asked, device_of("h100-80gb"), outline.task(), grow=False)


def _share(share: float) -> str:
    percent = 100 * share
    digits = 0 if percent >= 100 else 1 if percent >= 10 else 2 if percent >= 1 else 3 if percent >= 0.1 else 5
    return f"{percent:.{digits}f} %"


if __name__ == "__main__":
    main()
