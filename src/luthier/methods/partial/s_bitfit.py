"""S-BitFit: BitFit, cut down to its most useful bias vectors, which then train anew.

    b = b_0 + v * delta      v in {0, 1} for each bias as a whole

It is `bitfit+pruned` with whole vectors kept. Nothing changes before the first step.

Lawton et al. 2023, "Neural Architecture Search for Parameter-Efficient Fine-tuning of Large Pre-trained Language
Models", arXiv:2305.16597. The budget is ours.

Count: all biases at first, then vectors of floor(share * as many) numbers at most.
Claims: about as good as BitFit at a tenth of its numbers, and whole vectors need no places.
Pitfalls: as pruned: changes of opposite worth cancel in a vector, as the paper's sum has it.
"""

from luthier.surgery import METHODS

METHODS.preset(
    "s_bitfit", of="bitfit+pruned", family="partial", paper="arXiv:2305.16597",
    **{"pruned.unit": "vector"},
)  # fmt: skip
