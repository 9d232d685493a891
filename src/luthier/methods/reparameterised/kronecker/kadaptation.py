"""KAdaptation: a sum of Kronecker products whose shared factors are themselves a column times a row.

    y = x W^T + b + s sum_k (u_k v_k^T (x) s_k t_k) x      u_k, v_k: (n,), shared

    s_k: (d_out / n, rank)    t_k: (rank, d_in / n)

Every t_k starts at zero, so the tuned model starts as the base model.

He X. et al. 2022, "Parameter-efficient Model Adaptation for Vision Transformers", arXiv:2203.16329, section 3. n is the
authors' code's. That code also has a bias and drops half of the update, and starts s_k and t_k at zero both, after
which neither can move; here s_k is drawn, and the value projections have factors of their own.

Count: 2 n^2 once, and sum over sites of rank (d_in + d_out).
Claims: adapts large vision models with fewer numbers than LoRA at equal or better accuracy.
Pitfalls: as `phm_delta`; n = 32 must divide every width.
"""

from luthier.surgery import METHODS

METHODS.preset(
    "kadaptation",
    of="phm_delta",
    family="reparameterised",
    paper="arXiv:2203.16329",
    slow="rank_one",
    n=32,
    tiny={"n": 4},
)
