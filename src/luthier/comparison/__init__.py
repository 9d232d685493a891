"""Methods against each other: the same rows and seeds for all, and only what these can show.

run          `compare`: runs what is missing, reads what all answered, and judges
parts        the rows: one held-out half, or folds
cells        one run for each method and seed, in a folder that its spec names
one_run      what the process of one of them does
tuning       the learning rate of each method, chosen on rows of the training half
rates        what was tried and found there
search       the ways to choose: a grid, halving, Optuna
race         methods, sizes and rates within a budget
front        configurations of autopeft of which none is better at its size, and what to try next
front_search the same as runs; surrogate: what it guesses of those that were not tried
worker       who works at cells; engines: how many and where
table        the table as a file, the same bytes however the runs went
verdict      who is best, who ties, what cannot be told, at what cost
statistics   intervals, exact tests, corrections
baselines    what needs no model
sizes        how large each method may be within a budget of trained numbers
scores       scores of weighted rows
answers      what one run answered, row by row
"""

from luthier.comparison.answers import Answers, answers_of
from luthier.comparison.cells import Entrant, entrant_of
from luthier.comparison.front_search import Front
from luthier.comparison.race import Budget, budget_of
from luthier.comparison.run import compare
from luthier.comparison.statistics import flips, mcnemar, resample
from luthier.comparison.verdict import Comparison, Costs, Standing
from luthier.data.near_copies import clusters

__all__ = [
    "Answers",
    "Budget",
    "Comparison",
    "Costs",
    "Entrant",
    "Front",
    "Standing",
    "answers_of",
    "budget_of",
    "clusters",
    "compare",
    "entrant_of",
    "flips",
    "mcnemar",
    "resample",
]
