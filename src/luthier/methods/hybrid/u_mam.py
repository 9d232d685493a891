"""U-MAM: a MAM adapter of generous size, cut down to its most useful entries, which then train anew.

    Attn(q, [P_k ; K], [P_v ; V])          f(z) <- f(z) + s (ReLU(z W_d + b_d) W_u + b_u)          theta <- theta * M

It is `mam+saliency` with a prefix that no network makes. It starts elsewhere than the base, as MAM does: 64 keys of
noise take most of the attention of a short text, and numbers that train as they are need a larger rate to undo that
than the network of `mam` does.

Lawton et al. 2023, "Neural Architecture Search for Parameter-Efficient Fine-tuning of Large Pre-trained Language
Models", arXiv:2305.16597. The size before pruning is ours: 64 keys and values, and a width of 64.

Count: at first 2 l d L + (2 d r + r + d) L; then a quarter of it: 592,320 numbers of RoBERTa-base, 0.48 %.
Claims: better than a MAM adapter of the same number.
Pitfalls: as saliency: a step costs what the large one costs; only the file is small. At the rate of `mam`, 1e-4, it
answers nearly always the same class after 408 steps on 600 questions of trec6; written as its parts, `mam+saliency`, it
has that rate, so name another.
"""

from luthier.surgery import METHODS

METHODS.preset(
    "u_mam", of="mam+saliency", family="hybrid", paper="arXiv:2305.16597",
    default_lr=2e-3,
    **{"mam.mlp_width": 0, "mam.length": 64, "mam.width": 64},
)  # fmt: skip
