"""Every method at its defaults on one small set, beside what costs nothing.

    python -m experiments.methods                          all methods, three seeds: hours on one core
    python -m experiments.methods --seeds 1 --only lora    one method, one seed
    python -m experiments.methods --page                   docs/methods-table.md anew, from the results that are here

Every result is appended to `results.jsonl` as it comes, and none is made twice: delete its line to make it again.
"""
