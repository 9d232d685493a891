"""OLoRA: LoRA that starts from the QR decomposition of the weight, with orthonormal columns in B.

    y = x W^T + b + s x (A^T B^T - A0^T B0^T)      B0 = Q[:, :r], A0 = R[:r] of W = Q R      s = alpha / rank

A starts at A0 and B at B0, so the tuned model starts as the base model.

Büyükakyüz 2024, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", arXiv:2406.01775, section 3. The
paper takes s B0 A0 out of the frozen weight; here the weight stays what it is and the start is kept beside.

Count: sum over sites of rank * (d_in + d_out); the file holds the start too, twice that.
Claims: converges faster than LoRA.
Pitfalls: the first columns of Q are no principal ones: which part of the weight is taken depends on the order of its
inputs; rates as for `pissa`.
Measured: `python -m experiments.rates olora --seed 1`, 300 questions of trec6 that the table does not score: 0.90, with
a rate of its own for a new head, which is ours.
"""

from luthier.surgery import METHODS

METHODS.preset(
    "olora",
    of="lora",
    family="reparameterised",
    paper="arXiv:2406.01775",
    start="qr",
    default_lr=2e-4,
    default_head_lr=5e-3,
    start_is_drawn=False,
)
