"""Every method at its defaults on three small sets, beside what costs nothing.

    python -m experiments.methods                          all methods, three seeds of trec6: hours on one core
    python -m experiments.methods --seeds 1 --only lora    one method, one seed
    python -m experiments.methods --set sms-spam           on another set: trec6, sms-spam or movie-snippets
    python -m experiments.methods --page                   docs/methods-table.md anew, from the results that are here

Every result is appended to `results.jsonl` as it comes, and none is made twice: delete its line to make it again.
"""
