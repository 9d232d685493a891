"""How sure a share is: the 95 % interval that the house shows beside one."""

import math

__all__ = ["share_interval"]


def share_interval(hits: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n rows (Wilson's score interval).

    >>> [round(v, 3) for v in share_interval(45, 50)]
    [0.786, 0.957]
    """
    z = 1.959963984540054
    share, spread = hits / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)
