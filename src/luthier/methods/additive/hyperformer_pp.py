"""HyperFormer++: HyperFormer with one network for all layers and both positions, which is told the position too.

    I = LN(MLP([z_task ; e_layer ; e_position]))          one set of networks writes every adapter from I

Karimi Mahabadi et al. 2021, "Parameter-efficient Multi-task Fine-tuning for Transformers via Shared Hypernetworks",
arXiv:2106.04489, section 2.4.

Count: per stack, (3 e q + q) + (q t + t) + 2 t + (t + 1) (2 d r + r + 3 d) + L e + 2 e; e for each task; the norms of
the blocks. A layer more costs e numbers.
Claims: T5-base on eight tasks with 0.29 % of its numbers a task.
Use it when: several tasks train together and a new one should cost a vector.
Not when: there is one task: an adapter of its own is smaller and faster.
Pitfalls: hyperformer's.
"""

from luthier.surgery import METHODS

METHODS.preset("hyperformer_pp", of="hyperformer", family="additive", paper="arXiv:2106.04489", share="all")
