"""L-LoRA, layer by layer: each LoRA module replaced by its own linearisation at its start.

    y = x W^T + b + (alpha / rank) dropout(x) A0^T B^T         A0: (rank, d_in), as drawn    B: (d_out, rank)

B starts at zero, so the tuned model starts as the base model.

Tang et al. 2023, "Parameter Efficient Multi-task Model Fusion with Partial Linearization", arXiv:2310.04742, section 4,
in the form of the released code, which linearises module by module. With B at zero the term of A's movement is zero for
ever: what is left is LoRA with A frozen, which is how it is computed here (the same function as `lora_fa`). The paper's
linearisation of the whole model is not built.

Count: sum over sites of rank * d_out; the paper counts A's rank * d_in too, which never move.
Claims: tunings of several tasks add up with less interference, since each is affine in what it learned.
Pitfalls: sums of tunings make sense from one start only: give all of them the same seed.
"""

from luthier.surgery import METHODS

METHODS.preset(
    "l_lora", of="lora", family="reparameterised", paper="arXiv:2310.04742", train_a=False, rank=16, alpha=32.0
)
