"""AdamW's update of many tensors in one call.

    p <- p - lr · decay · (p - rest)
    m <- β1 m + (1 - β1) g          v <- β2 v + (1 - β2) g²
    p <- p - lr · (m / (1 - β1ᵗ)) / (√(v / (1 - β2ᵗ)) + eps)

Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization", arXiv:1711.05101, algorithm 2.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from luthier.core.fast_paths import fast

__all__ = ["adamw"]

# One pass over memory and no temporary as large as the model; private, so its absence is no error.
_FUSED = getattr(torch, "_fused_adamw_", None)


@torch.no_grad()
def adamw(
    values: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    *,
    count: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float = 0.0,
    rest: float = 0.0,
) -> None:
    """Update `values` and their moments in place.

    Args:
        values, gradients, first, second: as many each, of equal shapes.
        count: updates of these tensors, this one included.
        decay: per unit of learning rate; it pulls to `rest`.
    """
    if decay and rest:
        torch._foreach_mul_(list(values), 1 - lr * decay)
        torch._foreach_add_(list(values), lr * decay * rest)
        decay = 0.0
    if fast() and _FUSED is not None and _can_fuse(values, gradients, first, second):
        step = torch.tensor(float(count), device=values[0].device)
        _FUSED(
            list(values),
            [g.contiguous() for g in gradients],
            list(first),
            list(second),
            [],
            [step] * len(values),
            lr=lr,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )
        # It moves them and does not say so: whoever keeps something computed from a tensor looks at its version.
        torch.autograd.graph.increment_version([*values, *first, *second])
        return
    if decay:
        torch._foreach_mul_(list(values), 1 - lr * decay)
    torch._foreach_lerp_(list(first), list(gradients), 1 - betas[0])
    torch._foreach_mul_(list(second), betas[1])
    torch._foreach_addcmul_(list(second), list(gradients), list(gradients), 1 - betas[1])
    denominator = torch._foreach_sqrt(list(second))
    torch._foreach_div_(denominator, (1 - betas[1] ** count) ** 0.5)
    torch._foreach_add_(denominator, eps)
    torch._foreach_addcdiv_(list(values), list(first), denominator, -lr / (1 - betas[0] ** count))


def _can_fuse(*groups: Sequence[Tensor]) -> bool:
    """The fused function walks memory by address, so all must lie alike; what it does not check is checked here."""
    values, gradients, *moments = groups
    device = values[0].device
    return device.type in ("cpu", "cuda") and all(
        v.is_contiguous()
        and all(t.dtype == v.dtype and t.device == device for t in (v, g, *state))
        and all(m.is_contiguous() for m in state)
        for v, g, *state in zip(values, gradients, *moments, strict=True)
    )
