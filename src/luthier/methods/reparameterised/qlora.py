"""QLoRA: LoRA at every projection, over a base that is held in 4 bits.

    y = x W^T + b + (alpha / rank) dropout(x) A^T B^T      W = c NF4[codes], decoded for each product and not kept

A run of it holds the base as `--store nf4` where it names nothing else; A and B are fp32. The gradient goes through the
decoded weight to what lies below, and no gradient of the codes exists.

Dettmers, Pagnoni, Holtzman, Zettlemoyer 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv:2305.14314,
section 3. Here the second quantisation of block constants has even steps, where the authors' library has a table;
the error is the same to three digits. The paged optimiser is left out: it moves state between GPU and host. Dropout is
0, where the paper has 0.1 for its smaller models.

Count: as LoRA, sum over sites of rank * (d_in + d_out); 4.127 bits for a number of the base's projections.
Claims: the quality of LoRA over a base in 16 bits, with a base of a quarter of the bytes.
Measured: docs/stored-bases.md has numbers of SmolLM2-135M, by `python benchmarks/stored_bases.py`.
Use it when: the base does not fit otherwise.
Not when: it fits in bf16: each pass decodes each weight, which takes time.
Pitfalls: over a small model 4 bits cost more than over a large one; merged into the float weights that the codes were
made of, the tuning acts otherwise than it was trained, so `luthier merge` merges into what the codes stand for.
"""

from luthier.surgery import METHODS

METHODS.preset(
    "qlora",
    of="lora",
    family="reparameterised",
    paper="arXiv:2305.14314",
    sites=("*",),
    rank=64,
    default_lr=2e-4,
    store="nf4",
)
