"""One order out of several answers' orders of the same passages."""

from __future__ import annotations

from collections.abc import Sequence


def fuse(orders: Sequence[Sequence[int]], size: int) -> list[int]:
    """Reciprocal rank fusion: sort by the sum of 1 / (60 + rank), rank from 1. Ties keep their order."""
    scores = [sum(1 / (61 + order.index(i)) for order in orders) for i in range(size)]
    return sorted(range(size), key=lambda i: -round(scores[i], 12))


def pairs_won(votes: Sequence[tuple[list[int], int]], size: int) -> list[float]:
    """Of the pairs that it is in, the share that each of `size` passages wins (arXiv 2310.07712).

    A vote is an order and how many of it, the first ones, are named. A named passage wins over all behind it.
    """
    won = [0] * size
    for order, named in votes:
        for rank, i in enumerate(order[:named], 1):
            won[i] += size - rank
    return [wins / (len(votes) * (size - 1)) for wins in won]
