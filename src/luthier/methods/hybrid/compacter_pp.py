"""Compacter++: Compacter behind the feed-forward layers alone.

    y + H_u f(H_d y + b_d) + b_u      H = sum_k A_k (x) (s_k t_k)      A_k: (n, n), one set for the whole model

The tuned model starts near the base model.

Karimi Mahabadi, Henderson, Ruder 2021, "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", arXiv:2106.04647,
section 4.

Count: n^3 + adapters * (2 r (d + width) + width + d), one adapter a layer; and all norms, 2 d each.
Claims: 0.047 % of T5-base trained, norms included.
Cost: as compacter, with one adapter a layer.
Pitfalls: as compacter; most of what trains are the norms, so without `norms` it is another method.
"""

from luthier.surgery import METHODS

METHODS.preset("compacter_pp", of="compacter", family="hybrid", paper="arXiv:2106.04647", sites=("ffn_out",))
