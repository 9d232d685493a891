"""KronA-B with a residual: the Kronecker branch beside the feed-forward layer, and a learned share of its input.

    f(x) <- f(x) + s (A (x) B) x + s_res x      A: (a1, a2)    B: (b1, b2)    s_res: one number for each layer

B and s_res start at zero, so the tuned model starts as the base model.

Edalati et al. 2022, "KronA: Parameter Efficient Tuning with Kronecker Adapter", arXiv:2212.10650, section 3. Where
s_res starts is our choice.

Count: per layer a1 a2 + b1 b2 + 1.
Claims: better than `krona_b` for one more number in each layer.
Pitfalls: as `krona_b`; s_res decays like every trained number, towards no residual.
"""

from luthier.surgery import METHODS

METHODS.preset("krona_b_res", of="krona_b", family="reparameterised", paper="arXiv:2212.10650", residual=True)
