"""Every strategy beside plain training with as many passes, on small real sets.

    python -m experiments.strategies                              all of it, three seeds: hours on one core
    python -m experiments.strategies --seeds 1 --only freelb      one strategy, one seed, and what it is compared with
    python -m experiments.strategies --page                       docs/strategies-table.md anew, from the results

Every result is appended to `results.jsonl` as it comes, and none is made twice: delete its line to make it again.
"""
