"""Keyed randomness: a draw is named by (seed, stream, numbers), never by how many draws came before it.

Two processes that ask for the same name get the same draw, so a resumed run needs numbers, not generator states.
"""

import hashlib

__all__ = ["key"]


def key(*name: int | str) -> int:
    """A 63-bit seed for the draw called `name`.

    >>> key(0, "dropout", 12, 0) == key(0, "dropout", 12, 0) != key(0, "dropout", 12, 1)
    True
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in name)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
