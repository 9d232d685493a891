"""Large-Sparse: a sequential adapter five times as wide, of which a fifth is kept.

    y + W_u f(W_d y + b_d) + b_u      W_d, W_u of width 320, with 80 % of their entries held at zero

It starts near the base model, as the sequential adapter does.

He, Ding, Dong, Zhang, Tao 2022, "SparseAdapter: An Easy Approach for Improving the Parameter-Efficiency of Adapters",
arXiv:2210.04284, section 3.3. It is `sequential_adapter+sparse_adapter` with the width that gives the count of a dense
adapter of width 64.

Count: of the matrices as many as a dense adapter of width 64 has; biases of width 320, and the norms.
Claims: better than the dense adapter of the same count.
Pitfalls: a step costs what the wide adapter costs: only the count and the file are those of the narrow one.
"""

from luthier.surgery import METHODS

METHODS.preset(
    "large_sparse", of="sequential_adapter+sparse_adapter", family="unified", paper="arXiv:2210.04284",
    **{"sequential_adapter.width": 320},
)  # fmt: skip
