"""Does the size of the model or the size of the tuning decide: three encoders, five ways, six sets, seeds one to three.

    python -m experiments.size_lora                      what is missing, all of it: see the page for the hours
    python -m experiments.size_lora --minutes 20         starts no run later than so
    python -m experiments.size_lora --only minilm-l3     one model; may be repeated
    python -m experiments.size_lora --page               docs/size-lora.md anew, from the results that are here

Seeds come one after another, and within a seed the small models first, so a part of it is a table too. Every result is
appended to `results.jsonl` as it comes, and none is made twice: delete its line to make it again. Stop it at any time;
a run that was not finished is made again.
"""
