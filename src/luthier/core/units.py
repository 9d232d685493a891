"""Numbers and names as people read them. Bytes in powers of 1000, seconds as m:ss."""

from collections.abc import Sequence

__all__ = ["human_bytes", "human_count", "human_seconds", "listed", "several"]


def human_bytes(n: float) -> str:
    """
    >>> human_bytes(887), human_bytes(1_300_000), human_bytes(2_750_000_000)
    ('887 B', '1.3 MB', '2.75 GB')
    """
    for unit, size, digits in (("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 1)):
        if n >= size:
            return f"{n / size:.{digits}f} {unit}"
    return f"{n:.0f} B"


def human_count(n: float) -> str:
    """
    >>> human_count(73728), human_count(22_700_000)
    ('73.7 k', '22.7 M')
    """
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n:.0f}"


def human_seconds(s: float) -> str:
    """
    >>> human_seconds(3.21), human_seconds(75), human_seconds(4000)
    ('3.2 s', '1:15', '1:06:40')
    """
    if s < 60:
        return f"{s:.1f} s"
    minutes, seconds = divmod(round(s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def listed(names: Sequence[str]) -> str:
    """
    >>> listed(["lora"]), listed(["lora", "ia3", "full"])
    ('lora', 'lora, ia3 and full')
    """
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def several(n: int, word: str) -> str:
    """
    >>> several(1, "seed"), several(3, "seed")
    ('1 seed', '3 seeds')
    """
    return f"{n} {word}" if n == 1 else f"{n} {word}s"
