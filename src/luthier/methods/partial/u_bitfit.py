"""U-BitFit: BitFit, cut down to its most useful entries, which then train anew.

    b = b_0 + v * delta      v in {0, 1} for each entry of each bias

It is `bitfit+pruned` with single entries kept. Nothing changes before the first step.

Lawton et al. 2023, "Neural Architecture Search for Parameter-Efficient Fine-tuning of Large Pre-trained Language
Models", arXiv:2305.16597. The budget is ours.

Count: all biases at first, then floor(share * as many): 10,137 of the 101,376 in BERT-base's blocks.
Claims: about as good as BitFit at a tenth of its numbers.
Pitfalls: as pruned: nothing can be ranked before it has trained; the head stays dense and goes on as it is.
"""

from luthier.surgery import METHODS

METHODS.preset(
    "u_bitfit", of="bitfit+pruned", family="partial", paper="arXiv:2305.16597",
    **{"pruned.unit": "entry"},
)  # fmt: skip
