"""The reward of REARANK (arXiv 2505.20046): from a model's text to an order, from the order to a number.

    text --parse_ranking--> order --ndcg--> NDCG@10 --score_response--> reward
    reward = 0.8 r_rank + 0.1 r_format1 + 0.1 r_format2   (eq. 6)

There is one parser, for training, inference and statistics. It never raises, and its time is linear in the
length of the text: a model in training may write 2,048 tokens of `<answer><answer>...`.

The parser is lenient: a user with a zero-shot model wants an order out of almost any text. The reward is
strict: it only reads a complete `<answer>...</answer>` after the reasoning. The policy learns to write
whatever the reward accepts.

Where we depart from the paper or from the authors' code:
- If no order can gain, eq. 5 divides by zero. Here an answer that loses nothing then earns 1 (the authors
  give 0).
- r_rank is never below -1. In an almost ideal window eq. 5 can fall below -200, and one bad sample would
  decide its whole group.
- r_format1 requires exactly one think and one answer block, with nothing around them. r_format2 requires
  every passage to be named once. The authors search for the patterns anywhere. There `[3]` alone is enough,
  because passages that are not named keep their order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

SCHEMES = ("normalized", "absolute", "difference")

# Each pattern is a run of characters or a short word, so that none can backtrack far.
INTEGER = re.compile(r"[0-9]+")
# A text that consists only of these is a list.
LIST_PARTS = re.compile(r"[0-9\[\](){}><=,;\s]+|(?ai:passage|document|doc|id)")
BRACKETS = re.compile(r"\[([^\[\]]*)\]")
WELL_FORMED = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)
# A list's number ("2. [4] says ...") is no sentence by itself. No sentence ends before a small letter (e.g.).
SENTENCE = re.compile(r"(?:\s*\d{1,3}[.)]\s)?.+?(?:[.!?][\"')]*\s+(?![a-z\s])|[。！？]|\n\s*|\Z)", re.S)
FULL_LIST = re.compile(r"\s*\[[0-9]{1,9}\](?:\s*>\s*\[[0-9]{1,9}\])*\s*")


@dataclass(frozen=True)
class Ranking:
    """What a response says about a window of n passages, and how it was read.

    `order`: 0-based, a permutation of range(n), best first.
    `status`: "ok" (every id once), "repaired" (ids dropped or added), "untagged" (no answer tags),
    "truncated" (cut off before the end), "malformed" (names no passage), "empty" (no text).
    """

    order: list[int]
    status: str
    named: int = field(default=0, repr=False, compare=False)  # so many of `order`, the first ones, are named


@dataclass(frozen=True)
class Score:
    """The reward of one response and its parts (eq. 6): reward = 0.8 rank + 0.1 format1 + 0.1 format2.
    `ndcg`: NDCG@10 of the new order."""

    reward: float
    rank: float
    format1: float
    format2: float
    ndcg: float


def parse_ranking(response: str | None, num_passages: int) -> Ranking:
    """The order that a response asks for. Never raises; linear in the length of the text.

    1. Not a string, or blank: the present order, "empty".
    2. The last complete `<answer>...</answer>` after the reasoning counts, or an earlier one if it names no
       passage.
    3. Without one, the text after an `<answer>` that was left open, without a number at its very end, which
       may be incomplete: "truncated".
    4. Otherwise the text after the reasoning: "untagged". If the reasoning never ends: the present order,
       "truncated".
    5. In a text that is only a list, every integer is an id; in prose, only those in square brackets.
    6. Ids that do not exist or came before are dropped. Passages not named follow in their present order.
    7. "ok": a complete block with every id once and no other. "malformed": no passage is named.

    >>> parse_ranking("<think> [2] fits best. </think> <answer> [2] > [3] > [1] </answer>", 3)
    Ranking(order=[1, 2, 0], status='ok')
    >>> parse_ranking("<answer> [3] > [3] > [7] </answer>", 3)
    Ranking(order=[2, 0, 1], status='repaired')
    >>> parse_ranking("<answer> [2] > [1", 12).order[:3]
    [1, 0, 2]
    >>> parse_ranking("In 1984 nobody knew. I prefer [3].", 3)
    Ranking(order=[2, 0, 1], status='untagged')
    """
    ids, status, _ = _read(response, num_passages)
    named = len(set(ids).intersection(range(1, num_passages + 1)))
    return Ranking(_order(ids, num_passages), status, named)


def _order(ids: list[int], n: int) -> list[int]:
    """Rule 6: from 1-based ids to a permutation of range(n). The first mention counts."""
    return list(dict.fromkeys([i - 1 for i in ids if 0 < i <= n] + list(range(n))))


def sentences(text: str) -> list[tuple[str, list[int]]]:
    """Cut a text into sentences: (sentence, the passages that it names in square brackets).

    >>> sentences("[3, 5] fit, e.g. in [13]. In 1984 [3.1] did not")
    [('[3, 5] fit, e.g. in [13]. ', [3, 5, 13]), ('In 1984 [3.1] did not', [])]
    """
    return [(sentence, _named(sentence, prose=True)) for sentence in SENTENCE.findall(text)]


def _named(text: str, prose: bool = False) -> list[int]:
    """Rule 5: the ids in `text`, a list or prose with brackets, in its order. Some may be out of range.

    >>> _named("3 > Doc 1; [02]"), _named("best of 2: [3, 1], not [3.1] or [-2]")
    ([3, 1, 2], [3, 1])
    """
    if prose or LIST_PARTS.sub("", text):  # not only a list
        text = " ".join(inside for inside in BRACKETS.findall(text) if not LIST_PARTS.sub("", inside))
    # int() raises for 5,000 digits.
    return [int(digits) for digits in INTEGER.findall(text) if len(digits) <= 9]


def _read(response: str | None, n: int) -> tuple[list[int], str, str | None]:
    """Rules 1-4 and 7: ids, status, and the answer block (None if the reward must not read it)."""
    if not isinstance(response, str) or not response.strip():
        return [], "empty", None
    # 2. Look after the first </think>, last block first: that finds a block after the last </think>, if there
    # is one. Going back from <answer> to <answer> pairs each closing tag with its nearest opening one.
    start = response.find("</think>") + len("</think>") if "</think>" in response else 0
    end, complete = len(response), False
    while (opened := response.rfind("<answer>", start, end)) >= 0:
        piece, end = response[opened + len("<answer>"):end], opened
        if "</answer>" in piece:
            complete = True
            # With a second </answer> in it the block is prose; up to the first one it may be a list.
            for block in (piece.rpartition("</answer>")[0], piece.partition("</answer>")[0]):
                ids = _named(block)
                if any(0 < i <= n for i in ids):
                    status = "ok" if sorted(ids) == list(range(1, n + 1)) else "repaired"
                    return ids, status, _readable_block(response, block, opened)
    ids, status = ([], "malformed") if complete else _read_without_block(response, n)
    return ids, status, None


def _readable_block(response: str, block: str, position: int) -> str | None:
    """`block`, unless a <think> is open at its `position`: the reward reads no answer in the reasoning."""
    opened, closed = response.rfind("<think>", 0, position), response.rfind("</think>", 0, position)
    return block if opened <= closed else None


def _read_without_block(response: str, n: int) -> tuple[list[int], str]:
    """Rules 3 and 4: ids and status without a complete answer block. The reward does not read these.

    The reasoning may mention <answer>. An answer without tags that follows the reasoning is still found.
    """
    tail = response[response.rfind("</think>") + len("</think>"):] if "</think>" in response else response
    ids = _named(tail)
    untagged = "<answer>" not in tail and any(0 < i <= n for i in ids)
    opened = response.rfind("<answer>")
    if opened >= 0 and "</answer>" not in response[opened:] and not untagged:
        # "[1" may be the beginning of "[12]".
        return _named(response[opened + len("<answer>"):].rstrip("0123456789")), "truncated"
    if "<think>" in tail:
        return [], "truncated"
    return (ids, "untagged") if untagged else ([], "malformed")


def ndcg(labels: Sequence[int], k: int = 10, ideal: Sequence[int] | None = None) -> float:
    """NDCG@k: DCG@k / IDCG@k, with DCG@k = sum over ranks i = 1..k of label_i / log2(i + 1).

    `labels`: the graded labels in ranked order. `ideal`: those of all judged passages of the query (default:
    `labels`), in any order; the denominator is the DCG of the k largest. The label itself is the gain, as in
    trec_eval's ndcg_cut, negative ones count as 0. In [0, 1]; 0 if nothing is relevant.

    >>> ndcg([3, 0, 1])                  # (3/1 + 0/1.585 + 1/2) / (3/1 + 1/1.585 + 0/2)
    0.9639404333166532
    >>> ndcg([3, 0, 1], ideal=[3, 3, 1, 0, 0])
    0.649014791936513
    """
    best = dcg(sorted(labels if ideal is None else ideal, reverse=True), k)
    return dcg(labels, k) / best if best else 0.0


def dcg(labels: Sequence[int], k: int = 10) -> float:
    """NDCG@k's numerator: a label counts in full at rank 1, half at rank 3, 0.29 at rank 10, not below k."""
    return float(sum(max(0, label) / math.log2(i + 2) for i, label in enumerate(labels[:k])))


def score_response(response: str | None, labels: Sequence[int], ideal: Sequence[int] | None = None,
                   scheme: str = "normalized") -> Score:
    """The reward of `response` to a window whose passages have `labels` in their present order (eqs. 5, 6).

    Only a complete answer block after a closed (or absent) think block is read. Without one, or if it names
    no passage, the window keeps its order. `ideal`: all judged labels of the query, for NDCG. `scheme`: see
    `rank_reward`; an unknown one is a ValueError.

    >>> score_response("<think> ... </think> <answer> [2] > [3] > [1] </answer>", [0, 3, 1])
    Score(reward=1.0, rank=1.0, format1=1.0, format2=1.0, ndcg=1.0)
    >>> score_response("[2] > [3] > [1]", [0, 3, 1]).reward
    0.0
    """
    ids, status, block = _read(response, len(labels))
    # The labels move with the passages. NDCG comes from the new order, never from first-stage scores, which
    # would stay with the positions.
    reranked = ndcg([labels[i] for i in _order([] if block is None else ids, len(labels))], ideal=ideal)
    best = ndcg(sorted(labels, reverse=True), ideal=ideal)
    rank = rank_reward(ndcg(labels, ideal=ideal), reranked, best, block is not None, scheme)
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    tags_once = isinstance(response, str) and all(response.count(tag) == 1 for tag in tags)
    format1 = float(tags_once and WELL_FORMED.fullmatch(response) is not None)
    format2 = float(block is not None and status == "ok" and FULL_LIST.fullmatch(block) is not None)
    return Score(0.8 * rank + 0.1 * format1 + 0.1 * format2, rank, format1, format2, reranked)


def rank_reward(initial: float, reranked: float, best: float, readable: bool = True,
                scheme: str = "normalized") -> float:
    """r_rank from the NDCG@10 of a window as given, as reranked and at its best.

    "normalized" (eq. 5): the share of the possible gain, (reranked - initial) / (best - initial), at least
    -1. If nothing can be gained, 1 for an order that is still best, else what it lost. 0 for a response that
    was not `readable`, also where nothing can be gained: otherwise an empty answer would earn 1.
    "absolute": reranked. "difference": reranked - initial. (Table 3's alternatives.)

    >>> rank_reward(0.5, 0.7, 0.9), rank_reward(0.98, 0.5, 0.99), rank_reward(0.9, 0.9, 0.9)
    (0.4999999999999999, -1.0, 1.0)
    >>> rank_reward(0.9, 0.9, 0.9, readable=False)
    0.0
    """
    if scheme not in SCHEMES:
        raise ValueError(f"unknown reward scheme {scheme!r}: expected one of {', '.join(SCHEMES)}")
    if scheme == "absolute":
        return reranked
    if scheme == "difference":
        return reranked - initial
    if not readable:
        return 0.0
    if best <= initial:
        return 1.0 if reranked >= best else reranked - best
    return max(-1.0, (reranked - initial) / (best - initial))
