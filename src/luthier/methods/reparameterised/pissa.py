"""PiSSA: LoRA that starts from the principal singular values and vectors of the weight.

    y = x W^T + b + s x (A^T B^T - A0^T B0^T)      s B0 A0 = U_r S_r V_r^T of W = U S V^T      s = alpha / rank

A starts at A0 and B at B0, so the tuned model starts as the base model.

Meng, Wang, Zhang 2024, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
arXiv:2404.02948, section 3. The paper takes s B0 A0 out of the frozen weight; here the weight stays what it is and the
start is kept beside, which is the same function, and a LoRA of rank 2r for every reader of LoRA's files. From a width
of 1024 on the vectors are found by random projections of 16 rounds, below by an exact decomposition.

Count: sum over sites of rank * (d_in + d_out); the file holds the start too, twice that.
Claims: learns faster than LoRA and ends lower, at the same size.
Measured: `python -m experiments.rates pissa`, 300 questions of trec6 that the table does not score: 0.87, 0.90 with
`--seed 1`, where `optim.lr=1e-3` for all gave 0.90 too. A new head learns at LoRA's rate: at 2e-4 it had hardly moved
when a run of luthier's own length ended, and the table's rows gave 0.67.
Pitfalls: rates as for LoRA, or lower: A and B are not small at the start; the scale is part of the start (divided by
it, so that any alpha starts at the base); a base that is held in codes stays the codes of the whole weight, where the
paper codes what is left of it; a base other than the one it was made on is refused when it is loaded.
"""

from luthier.surgery import METHODS

METHODS.preset(
    "pissa",
    of="lora",
    family="reparameterised",
    paper="arXiv:2404.02948",
    start="svd",
    default_lr=2e-4,
    default_head_lr=2e-3,
    start_is_drawn=False,
)
