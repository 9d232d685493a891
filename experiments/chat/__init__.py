"""Every method at its defaults on a chat model: what a few steps make of the perplexity of held-out turns.

    python -m experiments.chat                          all methods, one seed: hours on one core
    python -m experiments.chat --only lora --seeds 3    one method, three seeds
    python -m experiments.chat --page                   docs/chat-table.md anew, from the results that are here

Every result is appended to `results.jsonl` as it comes, and none is made twice: delete its line to make it again.
"""
