"""support/fusion.py: several answers' orders of the same passages are combined into one order."""

import pytest
from conftest import words_in_order

from prompts import Shortened
from rearank import Reranker
from support.chat_replies import Answer
from support.fusion import fuse, pairs_won


def test_several_answers_are_fused_by_reciprocal_ranks(toy):
    assert fuse([[2, 0, 1], [2, 1, 0], [0, 2, 1]], 3) == [2, 0, 1]
    assert fuse([], 3) == [0, 1, 2] and fuse([[1, 0]], 2) == [1, 0]
    assert fuse([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0]], 3) == [0, 1, 2]  # a tie, also with rounding
    reranker = Reranker(toy, "toy", temperature=1.0, samples=3, max_new_tokens=20)
    window = reranker.rank("rain bread", ["oak", "storm"]).windows[0]
    assert len({text for text, *_ in window.samples}) == 3 and window.response == window.samples[0][0]
    with pytest.raises(ValueError, match="temperature above 0"):
        Reranker(toy, "toy", samples=3)


def test_shuffled_answers_are_ordered_by_the_pairs_that_they_win():
    assert pairs_won([([2, 0, 1], 3), ([2, 1, 0], 3)], 3) == [1 / 4, 1 / 4, 1.0]
    assert pairs_won([([3, 0, 1, 2], 1)], 4) == [0.0, 0.0, 0.0, 1.0]  # only passage 3 was named


def test_with_shuffle_each_answer_reads_another_order_and_the_pairs_decide(toy, monkeypatch):
    seen = []
    monkeypatch.setattr(Reranker, "_ask_model", words_in_order(seen))
    reranker = Reranker(toy, "toy", samples=4, shuffle=True)  # at temperature 0
    ranking = reranker.rank("rain", [*"dcbae"])
    [window] = ranking.windows
    shown = ["".join("dcbae"[p] for p in order) for order in window.shown]
    assert [(query, order) for query, order, _ in seen] == [("rain", order) for order in shown]
    assert shown[0] == "dcbae" and len({*shown}) == 4 and {samples for *_, samples in seen} == {1}
    assert "".join(result.text for result in ranking) == "abdce"  # d, c, e were not named
    assert window.shares == [1.0, 0.75, 0.0, 0.0, 0.0] and window.order == [3, 2, 0, 1, 4]
    assert [order[:2] for *_, order in window.samples] == [[3, 2]] * 4  # positions in the list
    assert window.tokens == 20 and window.prompt_tokens == 28
    [plain] = Reranker(toy, "toy", samples=4, temperature=1.0).rank("rain", [*"dcbae"]).windows
    assert plain.tokens == 20 and plain.prompt_tokens == 7  # one prompt for all
    again = reranker.rank("rain", [*"dcbae"]).windows[0].shown
    assert again == window.shown and reranker.rank("bread", [*"dcbae"]).windows[0].shown != again
    with pytest.raises(ValueError, match="samples of 2 or more"):
        Reranker(toy, "toy", shuffle=True)


def test_shuffled_answers_without_an_order_leave_the_window_as_it_is(toy, monkeypatch):
    monkeypatch.setattr(Reranker, "_ask_model", lambda self, asked, *_: [
        (Shortened(False, 0, 400), [Answer("nothing", 1, 1)]) for _ in asked])
    [window] = Reranker(toy, "toy", samples=3, shuffle=True).rank("rain", [*"cab"]).windows
    assert window.order == [0, 1, 2] and window.shares == [] and window.status == "malformed"
