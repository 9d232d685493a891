"""Linear probe: the model stays as it is, only the new task head trains.

    logits = head(features(x))          features are frozen; head trains

The features do not change, so they need no gradient. It is `head_only` by the name under which papers know it.

Feature-based transfer, a standard baseline beside full fine-tuning (Devlin et al. 2018, arXiv:1810.04805).

Count: 0 in the model; the head alone.
Claims: the floor that a method has to beat to be worth its cost.
Pitfalls: as head_only: small features want a large rate and many passes; a language model has no new head, so there is
nothing to train.
"""

from luthier.surgery import METHODS

METHODS.preset("linear_probe", of="head_only", family="partial", paper="arXiv:1810.04805", pooler=False)
