"""MiCA: LoRA whose B is held at the weight's smallest left singular vectors; A alone learns.

    y = x W^T + b + s x A^T B^T      B = U[:, -r:] of W = U S V^T, frozen      A starts at zero

The tuned model starts as the base model.

"Minor Component Adaptation", arXiv:2604.01694, as the peft library has it.

Count: sum over sites of rank * d_in; B is as large as LoRA's and frozen, and is stored.
Claims: what the base knows is overwritten less, since updates lie where its weights do little.
Pitfalls: the update cannot leave those directions; two runs on one base share B, two bases do not.
"""

from luthier.surgery import METHODS

METHODS.preset(
    "mica",
    of="lora",
    family="reparameterised",
    paper="arXiv:2604.01694",
    start="mica",
    train_b=False,
    start_is_drawn=False,
)
