"""LoRA-GA: LoRA that starts along the gradient of the weight, so that its first step is near that of full fine-tuning.

    y = x W^T + b + s x (A^T B^T - A0^T B0^T)      A0 = V_1..r^T, B0 = c U_r+1..2r S_r+1..2r of dL/dW = U S V^T

A starts at A0 and B at B0, so the tuned model starts as the base model.

Wang, Yu, Li 2024, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", arXiv:2407.05000. As the peft library
does by default: A has the first r directions and B the next, times their singular values, and c = d_out^(1/4) / 4. The
gradient is the mean over steps, taken in evaluation mode. The frozen weight stays what it is, and the start is beside.

Count: sum over sites of rank * (d_in + d_out); the file holds the start too, twice that.
Claims: converges as fast as full fine-tuning, and ends higher than LoRA.
Cost: a pass and its gradient over `data` of the first epoch, and one SVD a place; meanwhile 8 d_in d_out bytes a place.
Pitfalls: twice the rank has to fit the weight; a gradient of few rows is noise.
"""

from luthier.surgery import METHODS

METHODS.preset(
    "lora_ga",
    of="lora",
    family="reparameterised",
    paper="arXiv:2407.05000",
    start="lora_ga",
    default_lr=2e-4,
    start_is_drawn=False,
    looks_at_data=True,
)
