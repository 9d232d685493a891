"""P-tuning v2: trained keys and values before those of the text in every layer, and an ordinary task head.

    Attn(q, [P_k ; K], [P_v ; V])          P_k, P_v: (P, n_kv d_head) per attention

Prefix tuning without the network. Prefixes take attention from the text, so the model starts elsewhere than the base
model: even zeros take their share.

Liu et al. 2022, "P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales and Tasks",
arXiv:2110.07602, section 3. Prefixes start normal with deviation 0.02.

Count: 2 L P d (grouped heads: their width for d), all of it stored.
Claims: near full fine-tuning in understanding too, small models and tagging included, with 0.1 to 3 % of its numbers.
Pitfalls: the length is a matter of the task, short for easy classes and about 100 for tags; the authors' code hands
prefixes over as a cache, which shifts every word by P, and here no position moves, so their checkpoints do not fit.
"""

from luthier.surgery import METHODS

METHODS.preset(
    "p_tuning_v2", of="prefix_tuning", family="additive", paper="arXiv:2110.07602",
    mlp_width=0, dropout=0.1, default_lr=5e-3, tiny={"length": 3},
)  # fmt: skip
