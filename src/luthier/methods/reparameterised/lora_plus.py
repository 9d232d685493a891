"""LoRA+: LoRA whose B learns sixteen times faster than its A.

    y = x W^T + b + (alpha / rank) dropout(x) A^T B^T          rate of A: lr    rate of B: 16 lr

B starts at zero, so the tuned model starts as the base model. The run's learning rate is that of A.

Hayou, Ghosh, Yu 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv:2402.12354, sections 3 and 4. The
ratio is the one that the paper suggests; what is best depends on the task and is at least 1.

Count: as LoRA, sum over sites of rank * (d_in + d_out).
Claims: learns faster than LoRA at the same cost, most where the task is far from what the model knows.
Pitfalls: a rate that suits LoRA is far too large for B here, so the default is a tenth of it (our choice); the schedule
has to keep the ratio, as it does here: it multiplies both.
"""

from luthier.surgery import METHODS

METHODS.preset("lora_plus", of="lora", family="reparameterised", paper="arXiv:2402.12354", b_rate=16.0, default_lr=2e-4)
