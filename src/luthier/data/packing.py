"""Short rows one behind the other in lines, in place of padding.

    rows of 9, 5, 4, 3 tokens   ->   lines of 9:   [9]   [5 4]   [3 . . . . . .]

A line is as wide as the longest row of its step, so that no row is cut and attention costs no more than it must. Rows
are put in by best fit, longest first. Which rows make a step is not decided here: a step of 16 rows stays these rows.

Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv:2404.10830, section 3 (best-fit packing).
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["best_fit", "cut", "cut_packed", "laid_in_lines", "padded_tokens", "positions_in_lines", "width_of"]

Lines = list[list[int]]


def width_of(lengths: NDArray[np.int64], pad_to: int = 1) -> int:
    """The width of lines for rows of these lengths."""
    return max(1, -(-int(lengths.max(initial=0)) // pad_to) * pad_to)


def best_fit(lengths: NDArray[np.int64], width: int) -> Lines:
    """Which rows stand in which line: each in the line that it leaves the least room in, longest first.

    >>> best_fit(np.array([3, 9, 4, 5]), 9)
    [[1], [3, 2], [0]]

    The rows of the first lines, whatever their number, make these lines without the others too: so a micro-batch is
    packed alone as it was among all rows of its step.
    """
    lines: Lines = []
    room: list[tuple[int, int]] = []  # (tokens left, line), ascending
    for row in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[row])
        at = bisect.bisect_left(room, (length, -1))
        if at == len(room):
            lines.append([])
            left, line = width, len(lines) - 1
        else:
            left, line = room.pop(at)
        lines[line].append(row)
        bisect.insort(room, (left - length, line))
    return lines


def cut_packed(
    rows: NDArray[np.int64], lengths: NDArray[np.int64], tokens: int, most: int, pad_to: int = 1
) -> list[NDArray[np.int64]]:
    """Cut the rows of a step into micro-batches whose lines hold no more than `tokens` tokens, padding counted.

    A row that is longer stands alone; no micro-batch has more than `most` rows.
    """
    by_length = rows[np.argsort(-lengths[rows], kind="stable")]
    parts = -(-len(rows) // max(1, most))
    pieces: list[NDArray[np.int64]] = []
    for part in (by_length[k::parts] for k in range(parts)):  # long and short ones in each
        left = part
        while len(left):
            width = width_of(lengths[left[:1]], pad_to)
            lines = best_fit(lengths[left], width)
            taken = [row for line in lines[: max(1, tokens // width)] for row in line]
            pieces.append(left[taken])
            left = np.delete(left, taken)
    return pieces


def laid_in_lines(
    flat: NDArray[Any], starts: NDArray[np.int64], lengths: NDArray[np.int64], lines: Lines, width: int, fill: int
) -> NDArray[np.int64]:
    """Pieces of a flat array one behind the other: (lines, width), filled up."""
    values = np.full((len(lines), width), fill, dtype=np.int64)
    for line, rows in zip(values, lines, strict=True):
        at = 0
        for row in rows:
            n = int(lengths[row])
            line[at : at + n] = flat[starts[row] : starts[row] + n]
            at += n
    return values


def positions_in_lines(lengths: NDArray[np.int64], lines: Lines, width: int) -> NDArray[np.int64]:
    """Positions that begin anew with each row: (lines, width). What fills a line up goes on with the last row's."""
    positions = np.tile(np.arange(width, dtype=np.int64), (len(lines), 1))
    for line, rows in zip(positions, lines, strict=True):
        at = 0
        for row in rows:
            line[at:] = np.arange(width - at)
            at += int(lengths[row])
    return positions


def padded_tokens(pieces: Sequence[NDArray[np.int64]], lengths: NDArray[np.int64], pad_to: int, packed: bool) -> int:
    """Tokens that the micro-batches of a step hold, padding counted."""
    total = 0
    for piece in pieces:
        width = width_of(lengths[piece], pad_to)
        total += width * (len(best_fit(lengths[piece], width)) if packed else len(piece))
    return total


def cut(
    rows: NDArray[np.int64], lengths: NDArray[np.int64], tokens: int, most: int, pad_to: int = 1
) -> list[NDArray[np.int64]]:
    """Sort rows by length, longest first, and cut them so that no piece has more than `tokens` padded tokens.

    A row that is longer than the budget stands alone; no piece has more than `most` rows.
    """
    by_length = rows[np.argsort(-lengths[rows], kind="stable")]
    pieces: list[NDArray[np.int64]] = []
    start = 0
    while start < len(by_length):
        width = -(-int(lengths[by_length[start]]) // pad_to) * pad_to
        count = min(max(1, tokens // max(width, 1)), most)
        pieces.append(by_length[start : start + count])
        start += count
    return pieces
