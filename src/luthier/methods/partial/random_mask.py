"""Random mask: a random set of the model's entries may move and nothing else; a control for scored masks.

    theta = theta_0 + M * delta      M: a random `share` of the entries, fixed before training

Nothing changes before the first step. No data is looked at; the seed of the run names the entries.

A baseline of the papers on sparse masks: Sung, Nair, Raffel 2021, "Training Neural Networks with Fixed Sparse Masks",
arXiv:2111.09839, compares its masks with such ones.

Count: floor(share * numbers below the head).
Claims: none. A scored mask has to beat it at the same share.
Cost: gradients and moments are those of full fine-tuning; only the saved file is small.
Pitfalls: most numbers of a small encoder are word embeddings, so most of the entries are rows that few texts read; set
over=blocks for a control of a method that masks the blocks alone.
"""

from luthier.surgery import METHODS

METHODS.preset("random_mask", of="magnitude_mask", family="partial", paper="arXiv:2111.09839", score="random")
