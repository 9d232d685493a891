"""How the learning rate moves: a pure function of the step, so a resumed run needs no state of it."""

import math

__all__ = ["factor"]


def factor(schedule: str, step: int, total: int, warmup: float) -> float:
    """What the peak rate is multiplied with at `step` (1 to `total`): up linearly, then as `schedule` says.

    >>> [round(factor("linear", s, 10, 0.2), 2) for s in (1, 2, 6, 10)]
    [0.5, 1.0, 0.56, 0.11]
    """
    rising = max(1, round(warmup * total)) if warmup > 0 else 0
    if step <= rising:
        return step / rising
    if schedule == "constant":
        return 1.0
    # The last step still moves: the share falls to 1/n of its way, not to zero.
    left = (total - step + 1) / (total - rising + 1)
    return left if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))
