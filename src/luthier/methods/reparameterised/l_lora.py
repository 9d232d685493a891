"""L-LoRA: LoRA to first order around its start, so that what several tunings learned can be added up.

    dW = (alpha / rank) ((B - B0) A0 + B0 (A - A0))            A: (rank, d_in)    B: (d_out, rank)

    scope=layer    y = x (W + dW)^T + b      each module replaced by its own linearisation
    scope=model    h(x) = h0(x) + the derivative of h0 along the dW of all sites      h0: the base's last hidden states

B starts at zero, so the tuned model starts as the base model, and the term of A's movement is zero for ever: A stays as
drawn. By layer that is the function of `lora_fa`. With `start=svd`, `minor` or `qr` both start in the weight, and
`train_a=true` lets both move.

Tang et al. 2023, "Parameter Efficient Multi-task Model Fusion with Partial Linearization", arXiv:2310.04742, section 4:
the paper's linearisation is that of the model, the released code's that of each module. By `model` the last hidden
states are affine in what trains, and so are logits that are one matrix times them; a head reads the sum, whatever it
makes of it, and is not linearised itself.

Count: sum over sites of rank * d_out; the paper counts A's rank * d_in too, which never move.
Claims: tunings of several tasks add up with less interference, since each is affine in what it learned.
Use it when: several tunings of one base are to be added up. Use scope=layer where they must merge into the weights.
Not when: one task is all there is: `lora` can leave its tangent space, and costs less than scope=model.
Pitfalls: sums of tunings make sense from one start only: give all of them the same seed. scope=model carries a
derivative beside every state, with torch's plain attention and without activation checkpointing: about twice the time
of a step, of which `luthier plan` counts little; it has no form in the weights nor in peft's files, stands beside no
other method, and takes one text, so no encoder-decoder.
"""

from luthier.surgery import METHODS

METHODS.preset(
    "l_lora",
    of="lora",
    family="reparameterised",
    paper="arXiv:2310.04742",
    train_a=False,
    scope="layer",
    rank=16,
    alpha=32.0,
)
