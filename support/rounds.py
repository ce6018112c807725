"""Rank windows of many lists at once. Which windows, a generator of rounds decides for each list.

It yields the windows of one round, which do not depend on each other, is sent their orders (0-based
positions, best first), and returns the whole new list.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Sequence

Rounds = Generator[list[list], list[list[int]], list]


def run_rounds(lists: Sequence[Rounds], rank_windows: Callable[[int, list], list[list[int]]]) -> list[list]:
    """Rank many lists at once, round by round. Returns the new lists.

    `rank_windows` gets the round's number and its windows (list, number within the list's round, items), and
    returns their orders. ValueError unless each is a permutation.
    """
    results: list[list] = [[] for _ in lists]
    orders = dict.fromkeys(range(len(lists)))  # of each unfinished list's last round
    for turn in itertools.count():
        asked = []
        for i, answered in orders.items():
            try:
                asked += [(i, part, window) for part, window in enumerate(lists[i].send(answered))]
            except StopIteration as end:
                results[i] = end.value
        if not asked:
            return results
        orders = {i: [] for i, *_ in asked}
        for (i, _, window), order in zip(asked, rank_windows(turn, asked)):
            if sorted(order) != list(range(len(window))):
                raise ValueError(f"expected a permutation of {len(window)} positions, got {order}")
            orders[i].append(order)


def one_by_one(rounds: Rounds, rank_window: Callable[[list], list[int]]) -> list:
    """Rank one list, one window after the other."""
    [ranked] = run_rounds([rounds], lambda _, asked: [rank_window(window) for *_, window in asked])
    return ranked
