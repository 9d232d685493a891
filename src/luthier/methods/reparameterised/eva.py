"""EVA: LoRA whose A starts at the directions in which what a layer reads varies most.

    y = x W^T + b + s x A^T B^T      A0: the leading rank principal components of x over rows      B0 = 0

The tuned model starts as the base model.

Paischer, Hauzenberger, Schmied, Alkin, Deisenroth, Hochreiter 2024, "One Initialization to Rule them All: Fine-tuning
via Explained Variance Adaptation", arXiv:2410.07170. Every place keeps the rank it was given; the paper hands ranks to
the places whose components explain more, which `rank` by place can say by hand. A row is read at a time, so padding is
not among what is read; the components are exact, of all tokens of the share `data` of the first epoch.

Count: sum over sites of rank * (d_in + d_out); the file holds the start too, twice that.
Claims: converges faster than LoRA, and ends higher.
Cost: a pass over `data` of the first epoch; meanwhile 8 d_in^2 bytes for whatever several places read alike, 134 MB at
a width of 4096, and their eigenvectors.
Measured: `python -m experiments.rates eva --seed 1`, 300 questions of trec6 that the table does not score: 0.84; it
stops early, after 246 steps. With `run.steps=408` 0.91, one run of each: the few rows it is stopped by may be why seeds
differ.
Pitfalls: too few tokens give components that are accidents of them; fewer than the rank are refused.
"""

from luthier.surgery import METHODS

METHODS.preset(
    "eva",
    of="lora",
    family="reparameterised",
    paper="arXiv:2410.07170",
    start="eva",
    looks_at_data=True,
)
