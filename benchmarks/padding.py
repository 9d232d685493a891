"""What share of the tokens in batches is padding: `python benchmarks/padding.py`. Counted, not timed."""

import argparse
from typing import Any

import numpy as np

from luthier.data.batches import Batches, Collator
from luthier.data.order import Order
from luthier.runs.spec import BatchSpec, DataSpec, RunSpec
from luthier.workflow import prepare

WORK = (("minilm-l6", "trec6"), ("minilm-l6", "movie-snippets"), ("smollm2-135m", "chitchat"))


def share(examples: Any, size: int, tokens: int, grouped: bool, packed: bool = False) -> float:
    """Padding as a share of all tokens that one epoch computes."""
    order = Order(examples.lengths, size, 0, grouped)
    batches = Batches(examples, order, Collator(pad_id=0), tokens)
    return batches.padding(packed, steps=order.steps_per_epoch)


def main() -> None:
    """Print a table in Markdown."""
    told = argparse.ArgumentParser(description=__doc__)
    told.add_argument("--tokens", type=int, default=BatchSpec().tokens, help="padded tokens of a micro-batch, at most")
    tokens = told.parse_args().tokens
    print("| rows of | tokens: mean, median, longest | max_length | rows a step | padding | in random order | packed |")
    print("|---|---|---|---|---|---|---|")
    for model, data in WORK:
        prepared = prepare(RunSpec(model=f"sample:{model}", data=DataSpec(source=f"sample:{data}")))
        n = prepared.train.lengths
        lengths = f"{n.mean():.0f}, {np.median(n):.0f}, {n.max()}"
        for size in (16, 32):
            grouped, random = (share(prepared.train, size, tokens, g) for g in (True, False))
            line = f"| {data} | {lengths} | {prepared.max_length} | {size} | {grouped:.1%} | {random:.1%} |"
            packed = share(prepared.train, size, tokens, False, packed=True)
            print(f"{line} {packed:.1%} |", flush=True)


if __name__ == "__main__":
    main()
