"""How many numbers every method trains at its defaults, on the shapes that surveys tabulate.

    python -m experiments.parameters            docs/parameter-table.md anew: a minute of one core
    python -m experiments.parameters --only lora --only "lora:rank=64:sites=*"    prints these, writes nothing

Counts alone, by `luthier plan` on the configurations in `shapes/`: no weights are read, nothing is trained, so there is
nothing to keep. The configurations are our own small files: the sizes of the models and nothing else.
"""
