"""What luthier's defaults reach on real sets, beside baselines that cost next to nothing.

    python -m experiments.defaults                 all of it: an hour or two on one core
    python -m experiments.defaults --only trec6    one set
    python -m experiments.defaults --page          the page anew, from the results that are here

Every result is appended to `results.jsonl` as it comes, and none is made twice.
"""
