"""CorDA: LoRA that starts from the part of the weight that matters for what the layer reads.

    y = x W^T + b + s x (A^T B^T - A0^T B0^T)      s B0 A0 = U_r S_r V_r^T C^-1 of W C = U S V^T      C = mean of x^T x

A starts at A0 and B at B0, so the tuned model starts as the base model.

Yang, Li, Zhou, Song, Wu, Nie, Ghanem 2024, "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models
for Task-Aware Parameter-Efficient Fine-tuning", arXiv:2406.05223. Rows are the task's own, so the leading part is
taken (the paper's instruction-previewed mode); the mode that keeps knowledge takes the last part for rows of another
kind, and is not built. As the peft library does, each row is divided by its largest entry, and a hundredth of the mean
variance is added to each. The frozen weight stays what it is, and the start is kept beside.

Count: sum over sites of rank * (d_in + d_out); the file holds the start too, twice that.
Claims: better than LoRA and PiSSA on the task that was looked at.
Cost: a pass over `data` of the first epoch, and one SVD a place; meanwhile 8 d_in^2 bytes for whatever several places
read alike, 134 MB at a width of 4096.
Measured: `python -m experiments.rates corda --seed 1`, 300 questions of trec6 that the table does not score: 0.90, with
a rate of its own for a new head, which is ours.
Pitfalls: rates as for `pissa`; rows of another task start it in the wrong place.
"""

from luthier.surgery import METHODS

METHODS.preset(
    "corda",
    of="lora",
    family="reparameterised",
    paper="arXiv:2406.05223",
    start="corda",
    default_lr=2e-4,
    default_head_lr=5e-3,
    start_is_drawn=False,
    looks_at_data=True,
)
