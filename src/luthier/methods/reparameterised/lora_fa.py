"""LoRA-FA: LoRA whose A stays as it was drawn, so that what a layer reads need not be kept for the backward pass.

    y = x W^T + b + (alpha / rank) dropout(x) A^T B^T          A: (rank, d_in), frozen    B: (d_out, rank)

B starts at zero, so the tuned model starts as the base model.

Zhang L. et al. 2023, "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning",
arXiv:2308.03303, section 3. A is stored with the tuning. The correction of B's gradient of the paper's second version
is not built.

Count: sum over sites of rank * d_out; A is as large as LoRA's and frozen.
Claims: LoRA's quality with less memory: of each site only rank numbers a token are kept for the backward pass, and the
optimiser holds B's moments alone.
Pitfalls: the update moves inside the row space of a random A, so a small rank costs more than with LoRA; two of them
share no subspace unless they share the seed.
"""

from luthier.surgery import METHODS

METHODS.preset("lora_fa", of="lora", family="reparameterised", paper="arXiv:2308.03303", train_a=False)
