"""The assignment problem: each row a column of its own, at the least total cost.

Shortest augmenting paths with potentials (Jonker and Volgenant 1987, "A Shortest Augmenting Path Algorithm for Dense
and Sparse Linear Assignment Problems"), O(n³). Between uniform weights of n points each it is exact optimal transport.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["assignment"]


def assignment(cost: NDArray[Any]) -> NDArray[np.int64]:
    """The column of each row. cost: (n, n) -> (n,).

    >>> assignment(np.array([[4.0, 1.0, 3.0], [2.0, 0.0, 5.0], [3.0, 2.0, 2.0]])).tolist()
    [1, 0, 2]
    """
    n = len(cost)
    of_row, of_column = np.zeros(n + 1), np.zeros(n + 1)  # potentials; row and column 0 stand for none
    row_at = np.zeros(n + 1, dtype=np.int64)  # which row has each column
    for row in range(1, n + 1):
        row_at[0], column = row, 0
        least, came_from = np.full(n + 1, np.inf), np.zeros(n + 1, dtype=np.int64)
        done = np.zeros(n + 1, dtype=bool)
        while row_at[column] != 0:
            done[column] = True
            here = row_at[column]
            reduced = cost[here - 1] - of_row[here] - of_column[1:]
            better = ~done[1:] & (reduced < least[1:])
            least[1:][better], came_from[1:][better] = reduced[better], column
            following = 1 + int(np.argmin(np.where(done[1:], np.inf, least[1:])))
            step = least[following]
            of_row[row_at[done]] += step
            of_column[done] -= step
            least[~done] -= step
            column = following
        while column:  # the path is turned round: each column on it goes to the row before
            column_before = came_from[column]
            row_at[column] = row_at[column_before]
            column = column_before
    found = np.zeros(n, dtype=np.int64)
    found[row_at[1:] - 1] = np.arange(n)
    return found
