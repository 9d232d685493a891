"""rsLoRA: LoRA whose update is scaled by the root of the rank, so that a larger rank does not learn more slowly.

    y = x W^T + b + (alpha / sqrt(rank)) dropout(x) A^T B^T          A: (rank, d_in)    B: (d_out, rank)

B starts at zero, so the tuned model starts as the base model.

Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv:2312.03732, section 3. At
these defaults the scale is 2, which is LoRA's at rank 8; the paper fixes no alpha.

Count: as LoRA, sum over sites of rank * (d_in + d_out).
Claims: the size of the branch's output and of its gradient does not depend on the rank, where LoRA's falls as
1/sqrt(rank); ranks above 8 are worth their cost.
Pitfalls: an alpha that suits LoRA is sqrt(rank) times too strong here; whoever loads it has to know the kind of scaling
(a saved tuning states it).
"""

from luthier.surgery import METHODS

METHODS.preset(
    "rslora", of="lora", family="reparameterised", paper="arXiv:2312.03732", scaling="root", rank=64, default_lr=2e-3
)
