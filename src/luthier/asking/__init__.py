"""Asking a model without training it. From a row to an answer, in reading order:

requests     what a way may ask for, and what it says in the end
way          what a way of asking is: a function of one query that gives out requests and returns an answer
ways/        one file for each: shots (labels are scored), reasoning (text is written)
desk         what a way is handed: the rows that may be shown, words of labels, the template, how long a prompt is
shots        which rows are shown beside a query, and how many of them fit
finals       the answer at the end of a text
chains       reasoning that is written out, and votes over several
programs     programs that a model writes, run in a jail of `trust`
thoughts     one step of a search, and what it is worth
engine       requests of many queries, gathered and put to a machine
machine      what answers requests, and what it costs; local: a model of ours; endpoint: one behind HTTP
ask          rows, ways and seeds: who is right how often, and what may be said of it
"""

from luthier.asking.ask import Asked, AskSpec, ask
from luthier.asking.way import WAYS, Way

__all__ = ["WAYS", "AskSpec", "Asked", "Way", "ask"]
