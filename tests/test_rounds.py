"""Many lists are ranked in shared batches, round by round. Each gets the order that it would get alone."""

import pytest
from conftest import perfect, words_in_order

from rearank import Reranker, sliding_window, top_down
from toy import toy_task


def test_top_down_refuses_a_window_of_one_and_what_is_no_permutation():
    with pytest.raises(ValueError, match="at least 2"):
        top_down([1, 2], perfect(), 1)
    with pytest.raises(ValueError, match="permutation"):
        top_down([1, 2, 3], lambda w: [0, 0, 1])


def test_the_input_list_is_left_alone():
    items = [3, 1, 2]
    assert sliding_window(items, lambda w: [2, 1, 0]) == [2, 1, 3] and items == [3, 1, 2]


def test_windows_of_many_queries_answer_as_each_query_alone(toy):
    lists = [(c.query, c.texts) for c in toy_task(3, 13, seed=4)[0]] + [("rain", ["bread"]), ("rain", [])]
    reranker = Reranker(toy, "toy", window=6, stride=3, max_new_tokens=12)
    together = list(reranker.rank_many(lists))
    alone = [[r.index for r in reranker.rank(*one)] for one in lists]
    assert [[r.index for r in t] for t in together] == alone
    assert [len(t.windows) for t in together] == [4, 4, 4, 0, 0]


@pytest.mark.parametrize("options", [{"algorithm": "top-down"}, {"passes": 2}, {}])
def test_lists_that_share_batches_are_ranked_as_each_by_itself(toy, monkeypatch, options):
    seen, texts = [], [["kbcdefghija", "abcdef", "ba", "z", ""], []]
    monkeypatch.setattr(Reranker, "_ask_model", words_in_order(seen))
    reranker = Reranker(toy, "toy", window=4, stride=2, **options)
    together = reranker.rank_many([(f"q{n}", [*text]) for n, text in enumerate(texts[0])])
    calls = sorted(seen)
    seen.clear()
    alone = [reranker.rank(f"q{n}", [*text]) for n, text in enumerate(texts[0])]
    assert [[r.index for r in found] for found in together] == [[r.index for r in found] for found in alone]
    assert sorted(seen) == calls and len(calls) == sum(len(found.windows) for found in together)
    whole = reranker.rank("q0", [*texts[0][0]])
    rank_window = lambda w: [*sorted(range(len(w)), key=w.__getitem__)[:2], *[  # noqa: E731
        i for i in range(len(w)) if i not in sorted(range(len(w)), key=w.__getitem__)[:2]]]
    if options.get("algorithm"):
        wanted = top_down([*texts[0][0]], rank_window, 4)
    else:
        wanted = [*texts[0][0]]
        for _ in range(options.get("passes", 1)):
            wanted = sliding_window(wanted, rank_window, 4, 2)
    assert [result.text for result in whole] == wanted


def test_the_windows_of_a_round_have_random_numbers_of_their_own(toy, monkeypatch):
    seeds = []

    def ask(self, asked, of_windows, samples, progress):
        seeds.append(of_windows)
        return words_in_order()(self, asked, of_windows, samples, progress)

    monkeypatch.setattr(Reranker, "_ask_model", ask)
    Reranker(toy, "toy", window=4, algorithm="top-down").rank("rain", [*"abcdefghij"])
    assert [len(of_windows) for of_windows in seeds] == [1, 2] and len({*sum(seeds, [])}) == 3
    top, seeds[:] = seeds[0], []
    Reranker(toy, "toy", window=4, stride=2).rank("rain", [*"abcd"])
    assert seeds == [top]  # the first window has the same seeds in both algorithms
    seeds[:] = []
    Reranker(toy, "toy", window=4, stride=2, samples=3, shuffle=True).rank("rain", [*"abcd"])
    assert len({*seeds[0]}) == 3 and seeds[0][0] == top[0]  # one seed per answer
