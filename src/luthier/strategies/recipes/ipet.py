"""pet in three generations: what some of the runs are surest of, the others learn next.

    generations = 3        the rows to learn grow `growth` times with each; see pet

Paper: arXiv:2001.07676 (iPET), section 3.3.

Cost: three times the runs of pet, on more rows each time.
Claims: better than pet, most where labels are fewest.
Pitfalls: those of pet. What the first generation gets wrong and is sure of, the next ones learn.
"""

from luthier.training.strategy import STRATEGIES

STRATEGIES.preset("ipet", of="pet", family="recipes", paper="arXiv:2001.07676", generations=3)
