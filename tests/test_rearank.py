"""The agent: sliding windows, the reranker, a run on disk that can be resumed, the command line."""

import dataclasses
import gzip
import io
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import ANY

import pytest
import torch

import rearank
from model import Completion
from prompts import Shortened
from rearank import Reranker, RerankSettings, rerank_file, sliding_window, top_down, window_bounds
from support.chat_replies import Answer
from support.cli import InputError, command_line
from support.files import Candidates, read_run, write_candidates
from support.fusion import fuse, pairs_won
from support.prompt_file import read_prompt_file
from support.rerank_run import FREE_TO_CHANGE
from toy import toy_agent, toy_task

ROOT = Path(__file__).resolve().parents[1]


# --- windows


@pytest.mark.parametrize(("window", "stride"), [(20, 10), (4, 2), (5, 5), (3, 1)])
def test_every_rank_is_in_a_window_and_neighbours_overlap_for_every_list_length(window, stride):
    for n in range(130):
        bounds = window_bounds(n, window, stride)
        assert [end for _, end in bounds] == list(range(n, n - stride * len(bounds), -stride))
        assert all(start == max(0, end - window) for start, end in bounds)
        assert set().union(*(range(*b) for b in bounds)) == (set(range(n)) if n > 1 else set())
        # Rank 0 is reached once, at last.
        assert n < 2 or [start for start, _ in bounds].index(0) == len(bounds) - 1


def test_the_papers_setting_makes_nine_windows():
    assert [start for start, _ in window_bounds(100)] == [80, 70, 60, 50, 40, 30, 20, 10, 0]


def test_the_windows_ranked_are_the_windows_counted():
    for n in range(60):
        seen = []
        sliding_window(list(range(n)),
                       lambda items: seen.append((items[0], items[-1] + 1)) or range(len(items)))
        assert seen == window_bounds(n)


@pytest.mark.parametrize(("window", "stride"), [(4, 2), (5, 5), (20, 10), (3, 1)])
def test_good_passages_bubble_up_by_at_most_window_minus_stride(window, stride):
    items = list(range(50))  # the larger the better; the best stands last
    result = sliding_window(items, lambda w: sorted(range(len(w)), key=lambda i: -w[i]), window, stride)
    assert sorted(result) == items
    assert result[:window - stride] == sorted(items, reverse=True)[:window - stride]


def test_a_stride_that_would_skip_items_is_refused():
    for window, stride in ((10, 11), (10, 0), (10, -1)):
        with pytest.raises(ValueError, match="0 < stride <= window"):
            sliding_window([1, 2, 3], lambda w: [0, 1, 2], window, stride)
    with pytest.raises(ValueError, match="permutation"):
        sliding_window([1, 2, 3], lambda w: [0, 0, 1])


def perfect(seen=None):
    """A ranker of numbers, the smaller the better. `seen` gets each window."""
    def rank_window(items):
        if seen is not None:
            seen.append(list(items))
        return sorted(range(len(items)), key=items.__getitem__)
    return rank_window


@pytest.mark.parametrize("window", [2, 3, 4, 7, 20, 30])
def test_top_down_puts_the_best_first_for_every_length_and_reads_every_rank(window):
    k = min(10, window // 2)
    for n in [*range(60), 100, 137]:
        for seed in ("best first", "worst first", 0, 1):
            items = list(range(n))
            if seed == "worst first":
                items.reverse()
            elif seed != "best first":
                random.Random(seed).shuffle(items)
            given, seen = list(items), []
            result = top_down(items, perfect(seen), window)
            assert items == given and sorted(result) == list(range(n))
            assert result[:k] == list(range(min(k, n)))
            assert set().union(*seen) == (set(items) if n > 1 else set())
            assert all(2 <= len(present) <= window for present in seen)
            assert len(seen) == 1 or n > window or n < 2


def test_top_down_of_100_in_ideal_order_are_six_calls_in_two_rounds():
    seen = []
    assert top_down(list(range(100)), perfect(seen)) == list(range(100))
    assert [len(present) for present in seen] == [20, 20, 20, 20, 20, 5]
    assert all(present[0] == 9 for present in seen[1:])  # the pivot, the tenth of the first window


def test_top_down_with_a_policy_that_answers_nothing_moves_nothing():
    seen = []
    assert top_down("abcdefghijk", lambda w: seen.append(w) or [*range(len(w))], 4) == [*"abcdefghijk"]
    assert ["".join(w) for w in seen] == ["abcd", "befg", "bhij", "bk"]


def test_top_down_keeps_the_order_of_what_is_not_among_the_first():
    """12 is ranked above the pivot 2: the candidates are 1, 2 and 12."""
    seen, better = [], [12, 1, 2, 3, 4, 5, 6, 7, 8]
    found = top_down([1, 2, 3, 4, 8, 12, 7, 6, 5], lambda w: seen.append(list(w)) or sorted(
        range(len(w)), key=lambda i: better.index(w[i])), 4)
    assert seen == [[1, 2, 3, 4], [2, 8, 12, 7], [2, 6, 5], [1, 2, 12]]
    assert found == [12, 1, 2, 3, 4, 7, 8, 5, 6]


def test_top_down_refuses_a_window_of_one_and_what_is_no_permutation():
    with pytest.raises(ValueError, match="at least 2"):
        top_down([1, 2], perfect(), 1)
    with pytest.raises(ValueError, match="permutation"):
        top_down([1, 2, 3], lambda w: [0, 0, 1])


def test_the_input_list_is_left_alone():
    items = [3, 1, 2]
    assert sliding_window(items, lambda w: [2, 1, 0]) == [2, 1, 3] and items == [3, 1, 2]


# --- the reranker


def test_documents_may_be_dicts_and_come_back_untouched(toy):
    documents = [{"text": "rain", "title": "Storm", "id": 7}, "oak", {"text": "bread", "title": None}]
    ranking = Reranker(toy, "toy", max_new_tokens=8).rank("rain", documents)
    assert sorted(r.index for r in ranking) == [0, 1, 2]
    for result in ranking:
        assert result.document is documents[result.index]
    assert {r.index: r.text for r in ranking} == {0: "Storm rain", 1: "oak", 2: "bread"}
    assert Reranker(toy, "toy").rank("rain", []) == []


@pytest.mark.parametrize("query, documents, options, words", [
    (None, ["a"], {}, "query: expected a string"), ("q", "one string", {}, "documents: expected a list"),
    ("q", b"bytes", {}, "documents: expected a list"), ("q", 7, {}, "documents: expected a list"),
    ("q", None, {}, "documents: expected a list"),
    ("q", ["a", None], {}, r"documents\[1\]: expected a string"),
    ("q", [b"a"], {}, r"documents\[0\]"), ("q", [{"body": "a"}], {}, r'a dict with "text"'),
    ("q", [3.5], {}, r"documents\[0\]"), ("q", ["a"], {"top_k": -1}, "top_k: expected a number from 0"),
    ("q", ["a"], {"top_k": "all"}, "top_k")])
def test_what_is_no_list_of_texts_is_refused_before_the_model_runs(monkeypatch, toy, query, documents,
                                                                   options, words):
    monkeypatch.setattr(rearank, "sample", lambda *a, **k: pytest.fail("the model was asked"))
    with pytest.raises((TypeError, ValueError), match=words):
        Reranker(toy, "toy").rank(query, documents, **options)


def test_results_carry_their_place_in_the_input_and_their_text(toy):
    ranking = Reranker(toy, "toy", max_new_tokens=8).rank("rain bread", ["a", "b", "c"], top_k=2)
    assert [r.rank for r in ranking] == [1, 2] and all("abc"[r.index] == r.text for r in ranking)
    assert ranking.windows[0].status in ("ok", "repaired", "untagged", "truncated", "malformed", "empty")


def test_windows_of_many_queries_answer_as_each_query_alone(toy):
    lists = [(c.query, c.texts) for c in toy_task(3, 13, seed=4)[0]] + [("rain", ["bread"]), ("rain", [])]
    reranker = Reranker(toy, "toy", window=6, stride=3, max_new_tokens=12)
    together = list(reranker.rank_many(lists))
    alone = [[r.index for r in reranker.rank(*one)] for one in lists]
    assert [[r.index for r in t] for t in together] == alone
    assert [len(t.windows) for t in together] == [4, 4, 4, 0, 0]


def reversing(monkeypatch, toy) -> None:
    """A model that turns every window around."""
    def answers(model, prompts, *_, **__):
        sizes = [toy.tokenizer.decode(p).count("[") for p in prompts]  # a toy prompt numbers its passages
        orders = [" > ".join(f"[{i}]" for i in range(n, 0, -1)) for n in sizes]
        encoded = [toy.tokenizer(f"<answer> {order} </answer>")["input_ids"] + [1] for order in orders]
        return [[Completion(ids, True)] for ids in encoded]
    monkeypatch.setattr(rearank, "sample", answers)


def test_each_window_sees_what_the_window_before_it_has_done(monkeypatch, toy):
    reversing(monkeypatch, toy)
    ranking = Reranker(toy, "toy", window=4, stride=2).rank("rain", ["bread"] * 7)
    wanted = sliding_window(list(range(7)), lambda items: list(range(len(items)))[::-1], 4, 2)
    assert [r.index for r in ranking] == wanted
    assert [w.positions for w in ranking.windows] == [[3, 4, 5, 6], [1, 2, 6, 5], [0, 5, 6]]


def test_random_numbers_depend_on_seed_query_and_window_and_not_on_the_count_of_calls(toy):
    def responses(seed):
        reranker = Reranker(toy, "toy", temperature=1.0, max_new_tokens=20, seed=seed, window=2, stride=1)
        return [window.response for query in ("rain bread", "oak goal", "rain bread")
                for window in reranker.rank(query, ["oak", "oak", "oak"]).windows]
    first = responses(0)
    assert first[:2] == first[4:] and len(set(first + responses(1))) == 8
    assert first == responses(0)


def test_a_prompt_or_windows_that_make_no_sense_are_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match="unknown prompt"):
        Reranker("nowhere", prompt="Rearank-7B")
    with pytest.raises(ValueError, match="0 < stride <= window"):
        Reranker("nowhere", window=10, stride=11)


def test_a_processor_with_bfloat16_reranks_in_it(toy, tmp_path, monkeypatch):
    toy.model.save_pretrained(tmp_path / "m")
    toy.tokenizer.save_pretrained(tmp_path / "m")
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(rearank, "has_native_bfloat16", lambda native=native: native)
        assert Reranker(str(tmp_path / "m"), "toy", max_new_tokens=9, device="cpu").agent.model.dtype == dtype
        fixed = Reranker(str(tmp_path / "m"), "toy", max_new_tokens=9, device="cpu", dtype="float32")
        assert fixed.agent.model.dtype == torch.float32


def answering(monkeypatch, toy, answer: str) -> None:
    ids = toy.tokenizer(answer)["input_ids"] + [1]
    monkeypatch.setattr(rearank, "sample",
                        lambda model, prompts, *_, **__: [[Completion(ids, True)] for _ in prompts])


def test_the_order_of_the_run_is_the_models(monkeypatch, toy):
    answering(monkeypatch, toy, "<think> [1] rain 1 </think> <answer> [3] > [1] > [2] </answer>")
    ranking = Reranker(toy, "toy").rank("rain", ["a", "b", "c"])
    assert [r.index for r in ranking] == [2, 0, 1]
    assert ranking.windows[0].status == "ok" and ranking.windows[0].reasoning == "[1] rain 1"


def test_without_thinking_the_model_continues_an_empty_think_block(monkeypatch, toy):
    asked = []
    def answers(model, prompts, *_, **__):
        asked.extend(prompts)
        ids = toy.tokenizer("<answer> [2] > [1] </answer>")["input_ids"] + [1]
        return [[Completion(ids, True)] for _ in prompts]
    monkeypatch.setattr(rearank, "sample", answers)
    window = Reranker(toy, "toy", think=False).rank("rain", ["a", "b"]).windows[0]
    assert toy.tokenizer.decode(asked[0]).endswith("<think> </think>")
    assert window.response.startswith("<think> </think>") and window.status == "ok" and window.order == [1, 0]


def test_several_answers_are_fused_by_reciprocal_ranks(toy):
    assert fuse([[2, 0, 1], [2, 1, 0], [0, 2, 1]], 3) == [2, 0, 1]
    assert fuse([], 3) == [0, 1, 2] and fuse([[1, 0]], 2) == [1, 0]
    assert fuse([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0]], 3) == [0, 1, 2]  # a tie, but for rounding
    reranker = Reranker(toy, "toy", temperature=1.0, samples=3, max_new_tokens=20)
    window = reranker.rank("rain bread", ["oak", "storm"]).windows[0]
    assert len({text for text, *_ in window.samples}) == 3 and window.response == window.samples[0][0]
    with pytest.raises(ValueError, match="temperature above 0"):
        Reranker(toy, "toy", samples=3)


def test_shuffled_answers_are_ordered_by_the_pairs_that_they_win():
    assert pairs_won([([2, 0, 1], 3), ([2, 1, 0], 3)], 3) == [1 / 4, 1 / 4, 1.0]
    assert pairs_won([([3, 0, 1, 2], 1)], 4) == [0.0, 0.0, 0.0, 1.0]  # nothing is known of the other three


def words_in_order(seen=None):
    """Stands for the model: names the two passages that begin with the smallest letters, best first."""
    def ask(self, asked, seeds, samples, progress):
        replies = []
        for query, passages in asked:
            if seen is not None:
                seen.append((query, "".join(passages), samples))
            best = sorted(range(len(passages)), key=lambda i: passages[i])[:2]
            text = "<answer> " + " > ".join(f"[{i + 1}]" for i in best) + " </answer>"
            replies.append((Shortened(False, 0, 400), [Answer(text, 5, 7)] * samples))
        return replies
    return ask


def test_with_shuffle_each_answer_reads_another_order_and_the_pairs_decide(toy, monkeypatch):
    seen = []
    monkeypatch.setattr(Reranker, "_ask_model", words_in_order(seen))
    reranker = Reranker(toy, "toy", samples=4, shuffle=True)  # at temperature 0
    ranking = reranker.rank("rain", [*"dcbae"])
    [window] = ranking.windows
    shown = ["".join("dcbae"[p] for p in order) for order in window.shown]
    assert [(query, order) for query, order, _ in seen] == [("rain", order) for order in shown]
    assert shown[0] == "dcbae" and len({*shown}) == 4 and {samples for *_, samples in seen} == {1}
    assert "".join(result.text for result in ranking) == "abdce"  # d, c, e: not named, in their order
    assert window.shares == [1.0, 0.75, 0.0, 0.0, 0.0] and window.order == [3, 2, 0, 1, 4]
    assert [order[:2] for *_, order in window.samples] == [[3, 2]] * 4  # the positions in the list
    assert window.tokens == 20 and window.prompt_tokens == 28
    again = reranker.rank("rain", [*"dcbae"]).windows[0].shown
    assert again == window.shown and reranker.rank("bread", [*"dcbae"]).windows[0].shown != again
    with pytest.raises(ValueError, match="samples of 2 or more"):
        Reranker(toy, "toy", shuffle=True)


def test_shuffled_answers_without_an_order_leave_the_window_as_it_is(toy, monkeypatch):
    monkeypatch.setattr(Reranker, "_ask_model", lambda self, asked, *_: [
        (Shortened(False, 0, 400), [Answer("nothing", 1, 1)]) for _ in asked])
    [window] = Reranker(toy, "toy", samples=3, shuffle=True).rank("rain", [*"cab"]).windows
    assert window.order == [0, 1, 2] and window.shares == [] and window.status == "malformed"


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
    assert seeds == [top]  # of the first window, as without rounds


def test_a_run_top_down_and_shuffled_is_written_counted_and_resumed(toy, tmp_path, capsys):
    write_candidates(tmp_path / "c.jsonl", toy_task(2, 9, seed=0)[0])
    settings = settings_of(tmp_path, max_num_seqs=1, window=4, algorithm="top-down", shuffle=True, samples=2)
    counts = rerank_file(settings, toy)
    whole = (tmp_path / "r.jsonl").read_bytes()
    rows = [row for row in map(json.loads, whole.splitlines()) if "texts" not in row]
    assert [row["part"] for row in rows] == [0, 0, 1] * 2  # the untrained toy answers nothing
    assert counts["rounds"] == 4 and counts["calls"] == 12
    assert any(sample["docids"] != row["docids"] for row in rows for sample in row["samples"][1:])
    assert all(row["samples"][0]["docids"] == row["docids"] and "shares" in row for row in rows)
    (tmp_path / "r.jsonl").write_bytes(b"".join(whole.splitlines(True)[:6]))
    assert rerank_file(dataclasses.replace(settings, resume=True), toy) == counts | {"seconds": ANY}
    assert (tmp_path / "r.jsonl").read_bytes() == whole


def test_without_the_new_options_the_rows_have_no_new_fields(toy, tmp_path):
    write_candidates(tmp_path / "c.jsonl", toy_task(1, 4, seed=0)[0])
    rerank_file(settings_of(tmp_path, temperature=1.0, samples=2), toy)
    row = json.loads((tmp_path / "r.jsonl").read_text().splitlines()[1])
    assert not {"part", "shares"} & row.keys() and {*row["samples"][0]} == {"response", "status", "order"}


def test_of_several_answers_one_that_hit_the_limit_is_noticed(toy, monkeypatch):
    ids = toy.tokenizer("<answer> [2] > [1] </answer>")["input_ids"]
    both = [Completion([*ids, 1], True), Completion(ids, False)]
    monkeypatch.setattr(rearank, "sample", lambda *_, **__: [both])
    [window] = Reranker(toy, "toy", temperature=1.0, samples=2).rank("rain", ["a", "b"]).windows
    assert not window.finished and window.tokens == 2 * len(ids) + 1


def test_memory_that_runs_out_is_one_line(toy, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ...")
    monkeypatch.setattr(rearank, "sample", full)
    with pytest.raises(InputError, match="lower --max-num-seqs"):
        Reranker(toy, "toy").rank("rain", ["a", "b"])


# --- a run on disk


def settings_of(folder: Path, **changes) -> RerankSettings:
    """Settings of a run over folder/c.jsonl into folder/r."""
    files = {"input": str(folder / "c.jsonl"), "output": str(folder / "r")}
    return RerankSettings(**{**files, "prompt": "toy", "max_new_tokens": 4, **changes})


def test_a_run_file_keeps_the_models_order_and_a_trace_of_each_window(monkeypatch, toy, tmp_path):
    answering(monkeypatch, toy, "<answer> [2] > [1] > [3] </answer>")
    query = Candidates("q1", "rain", ["d1", "d2", "d3", "d4"], ["a", "b", "c", "d"], [4.0, 4.0, 4.0, 1.0])
    write_candidates(tmp_path / "c.jsonl", [query])
    counts = rerank_file(settings_of(tmp_path, top_k=3), toy)
    run = read_run(tmp_path / "r")["q1"]
    assert sorted(run, key=run.get, reverse=True) == ["d2", "d1", "d3", "d4"]
    assert len(set(run.values())) == 4  # no tie can undo it
    record, trace = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert (record["docids"], record["texts"]) == (["d1", "d2", "d3", "d4"], ["a", "b", "c", "d"])
    assert record["order"] == ["d2", "d1", "d3", "d4"] and record["query"] == "rain"
    assert trace["order"] == ["d2", "d1", "d3"] and trace["docids"] == ["d1", "d2", "d3"]
    assert trace["status"] == "ok"
    assert (counts["calls"], counts["ok"], counts["queries"], counts["unchanged"]) == (1, 1, 1, 0)


def test_windows_left_as_they_were_are_counted(monkeypatch, toy, tmp_path):
    answering(monkeypatch, toy, "<answer> [1] > [2] > [3] </answer>")
    write_candidates(tmp_path / "c.jsonl", toy_task(3, 3, seed=0)[0])
    assert rerank_file(settings_of(tmp_path), toy)["unchanged"] == 3


def test_what_was_shortened_is_counted(toy, tmp_path):
    lists = [Candidates("1", "rain", ["a", "b", "c"], ["oak " * 30, "oak", "storm " * 20], [3.0, 2.0, 1.0])]
    write_candidates(tmp_path / "c.jsonl", lists)
    counts = rerank_file(settings_of(tmp_path, passage_chars=50), toy)
    assert (counts["passages"], counts["passages shortened"], counts["characters removed"]) == (3, 2, 69 + 69)
    assert (counts["prompts shortened"], counts["queries shortened"]) == (0, 0)
    assert rerank_file(settings_of(tmp_path, max_prompt_tokens=40), toy)["prompts shortened"] == 1


@pytest.mark.parametrize("changes", [{"tag": "my run"}, {"output": "."}])
def test_what_cannot_be_written_is_refused_before_the_work(toy, tmp_path, monkeypatch, changes):
    monkeypatch.setattr(rearank, "sample", lambda *a, **k: pytest.fail("the model was asked"))
    write_candidates(tmp_path / "c.jsonl", [Candidates("1", "q", ["a", "b"], ["a", "b"], [2.0, 1.0])])
    with pytest.raises(InputError, match="expected"):
        rerank_file(settings_of(tmp_path, **changes), toy)
    assert [p.name for p in tmp_path.iterdir()] == ["c.jsonl"]


def test_the_input_is_never_overwritten(toy, tmp_path):
    write_candidates(tmp_path / "c.jsonl", toy_task(2, 3, seed=0)[0])
    before = (tmp_path / "c.jsonl").read_bytes()
    for output in ("c.jsonl", "c"):  # the run itself, and the reasoning beside it
        with pytest.raises(InputError, match="would overwrite the input"):
            rerank_file(settings_of(tmp_path, output=str(tmp_path / output)), toy)
    assert (tmp_path / "c.jsonl").read_bytes() == before


def file_options(folder) -> list[str]:
    """Options for a short run over candidates below `folder`, all but --output."""
    write_candidates(folder / "c.jsonl", toy_task(4, 5, seed=0)[0])
    return ["--model", "m", "--prompt", "toy", "--max-new-tokens", "4", "--max-num-seqs", "2",
            "--device", "cpu", "--input", str(folder / "c.jsonl")]


def test_what_is_no_place_for_a_run_is_refused_before_any_work_and_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(rearank, "load_agent", lambda *_: pytest.fail("the model was loaded"))
    options, folder = file_options(tmp_path), tmp_path / "out"
    folder.mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "to pipe").symlink_to("pipe")
    (folder / "circle").symlink_to("circle")
    (folder / "a.jsonl").symlink_to("circle")
    (folder / "b.jsonl").mkdir()
    (folder / "same").symlink_to("same.jsonl")
    before = sorted(folder.iterdir())
    for name in ("pipe", "to pipe", "circle", "a", "b", "new folder/"):
        with pytest.raises(InputError, match="is a folder, a pipe or a device"):
            rearank.main([*options, "--output", f"{folder}/{name}"])
    with pytest.raises(InputError, match="would overwrite the input or another output"):
        rearank.main([*options, "--output", str(folder / "same")])
    for stats, words in ((folder / "r", "would overwrite"), (folder / "r.jsonl", "would overwrite"),
                         (tmp_path / "c.jsonl", "would overwrite"), (folder, "is a folder")):
        with pytest.raises(InputError, match=f"{stats}: {words}"):
            rearank.main([*options, "--output", str(folder / "r"), "--stats", str(stats)])
    for name in (folder, folder / "absent"):
        with pytest.raises(OSError, match=f"'{name}'"):
            rearank.main([*options[:-1], str(name), "--output", str(folder / "r")])
    assert sorted(folder.iterdir()) == before and (folder / "pipe").is_fifo()


def test_candidates_may_come_through_a_pipe_or_standard_input(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(rearank, "load_agent", lambda *_: toy)
    options = file_options(tmp_path)
    content = (tmp_path / "c.jsonl").read_bytes()
    os.mkfifo(tmp_path / "pipe")
    assert rearank.main([*options, "--output", str(tmp_path / "of file")]) == 0
    for name in ("pipe", "-"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), "ascii"))
        writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[content], daemon=True)
        if name == "pipe":
            writer.start()
        given = [*options[:-1], "-" if name == "-" else str(tmp_path / name)]
        assert rearank.main([*given, "--output", str(tmp_path / f"of {name}")]) == 0
        for end in ("", ".jsonl"):
            written = (tmp_path / f"of {name}{end}").read_bytes()
            assert written == (tmp_path / f"of file{end}").read_bytes()


def test_half_a_surrogate_pair_in_an_answer_stops_no_run(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(rearank, "load_agent", lambda *_: toy)
    monkeypatch.setattr(rearank.Agent, "decode", lambda self, completion: "<answer> [2] > \ud83d")
    assert rearank.main([*file_options(tmp_path), "--output", str(tmp_path / "r")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text("utf-8").splitlines()]
    assert rows[1]["response"] == "<answer> [2] > ?" and len(rows) == 8


def test_real_dl19_candidates_become_a_run(toy, tmp_path):
    source = Path(__file__).parent / "../../shared/data/dl19_eval_dev/retrieve_results_dl19_top100.jsonl.gz"
    if not source.exists():
        pytest.skip("no ../shared/data here")
    (tmp_path / "c.jsonl").write_bytes(b"".join(gzip.open(source).readlines()[:2]))
    assert rerank_file(settings_of(tmp_path), toy)["calls"] == 18
    assert all(len(docs) == 100 for docs in read_run(tmp_path / "r").values())


# --- a run that is interrupted


def test_an_interrupted_run_keeps_the_finished_queries(monkeypatch, toy, tmp_path):
    write_candidates(tmp_path / "c.jsonl", toy_task(4, 3, seed=0)[0])
    calls = []

    def interrupted(model, prompts, *_, **__):
        calls.append(len(prompts))
        if len(calls) > 1:
            raise KeyboardInterrupt
        return [[Completion([1], True)] for _ in prompts]

    monkeypatch.setattr(rearank, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rerank_file(settings_of(tmp_path, max_num_seqs=2), toy)
    assert list(read_run(tmp_path / "r")) == ["train0", "train1"]


def test_an_interrupted_run_is_not_overwritten_unasked(toy, tmp_path):
    write_candidates(tmp_path / "c.jsonl", toy_task(4, 3, seed=0)[0])
    settings = settings_of(tmp_path, max_num_seqs=2)
    rerank_file(settings, toy)
    rerank_file(settings, toy)  # one that was finished may be
    lines = (tmp_path / "r.jsonl").read_text().splitlines(True)
    (tmp_path / "r.jsonl").write_text("".join(lines[:4]))
    with pytest.raises(InputError, match="holds 2 of the 4 queries: pass --resume"):
        rerank_file(settings, toy)


def test_runs_are_written_and_resumed_through_links(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(rearank, "load_agent", lambda *_: toy)
    options, store = file_options(tmp_path), tmp_path / "store"
    links = [tmp_path / name for name in ("r", "r.jsonl", "s")]
    for link, target in zip(links, ("run", "trace", "stats")):
        link.symlink_to(store / target)
    files = ["--output", str(tmp_path / "r"), "--stats", str(tmp_path / "s")]
    answers, calls = rearank.sample, []

    def interrupted(*arguments, **more):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return answers(*arguments, **more)

    monkeypatch.setattr(rearank, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rearank.main([*options, *files])
    assert len(read_run(store / "run")) == 2 and (store / "trace").read_bytes().count(b'"texts": ') == 2
    monkeypatch.setattr(rearank, "sample", answers)
    assert rearank.main([*options, *files, "--resume"]) == 0
    assert rearank.main([*options, "--output", str(tmp_path / "whole")]) == 0
    assert (store / "run").read_bytes() == (tmp_path / "whole").read_bytes()
    assert (store / "trace").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert json.loads((store / "stats").read_text())["queries"] == 4
    assert all(link.is_symlink() for link in links) and len([*store.iterdir()]) == 3


SLOW = """
import sys, time
import rearank, toy
answers = rearank.sample
def slow(*arguments, **options):
    time.sleep(0.15)
    return answers(*arguments, **options)
rearank.sample = slow
rearank.load_agent = lambda *_: toy.toy_agent(0)
sys.exit(rearank.main(sys.argv[1:]))
"""


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path, monkeypatch):
    write_candidates(tmp_path / "c.jsonl", toy_task(8, 9, seed=0)[0])
    options = ["--model", "m", "--prompt", "toy", "--window", "6", "--stride", "3", "--max-new-tokens", "12",
               "--temperature", "1", "--max-num-seqs", "2", "--device", "cpu",
               "--input", str(tmp_path / "c.jsonl")]
    monkeypatch.setattr(rearank, "load_agent", lambda *_: toy_agent(0))

    def killed_after(lines, *more):
        trace, arguments = tmp_path / "killed.jsonl", [*options, "--output", str(tmp_path / "killed"), *more]
        process = subprocess.Popen([sys.executable, "-c", SLOW, *arguments], cwd=ROOT,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not trace.exists() or trace.read_text().count("\n") < lines:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()

    assert rearank.main([*options, "--output", str(tmp_path / "whole")]) == 0
    killed_after(5)
    killed_after(14, "--resume")  # and again, later
    with open(tmp_path / "killed.jsonl", "a") as file:
        file.write('{"qid": "tra')  # what a kill leaves of a line
    assert rearank.main([*options, "--output", str(tmp_path / "killed"), "--resume"]) == 0
    for end in ("", ".jsonl"):
        assert (tmp_path / f"killed{end}").read_bytes() == (tmp_path / f"whole{end}").read_bytes()
    with pytest.raises(InputError, match="was begun with --seed 0"):
        rearank.main([*options, "--output", str(tmp_path / "killed"), "--resume", "--seed", "1"])


def test_a_run_that_stopped_after_any_line_is_resumed_to_the_same_bytes(toy, tmp_path):
    write_candidates(tmp_path / "c.jsonl", toy_task(3, 5, seed=0)[0])
    settings, files = settings_of(tmp_path, max_num_seqs=1, window=3, stride=2), ("r", "r.jsonl")
    rerank_file(settings, toy)
    whole = [(tmp_path / name).read_bytes() for name in files]
    lines = whole[1].splitlines(True)
    assert len(lines) == 3 * (1 + 2)
    for kept in range(len(lines) + 1):
        (tmp_path / "r.jsonl").write_bytes(b"".join(lines[:kept]))
        rerank_file(dataclasses.replace(settings, resume=True), toy)
        assert [(tmp_path / name).read_bytes() for name in files] == whole, kept


def test_a_run_with_a_limit_is_continued_by_resume_without_it(tmp_path, toy):
    write_candidates(tmp_path / "c.jsonl", toy_task(4, 5, seed=0)[0])
    settings = settings_of(tmp_path, max_num_seqs=2, limit=2)
    assert rerank_file(settings, toy)["queries"] == 2
    first = (tmp_path / "r.jsonl").read_bytes()
    whole = dataclasses.replace(settings, limit=0)
    with pytest.raises(InputError, match="holds 2 of the 4 queries: pass --resume to go on"):
        rerank_file(whole, toy)
    assert rerank_file(dataclasses.replace(whole, resume=True), toy)["queries"] == 4
    assert (tmp_path / "r.jsonl").read_bytes().startswith(first) and len(read_run(tmp_path / "r")) == 4
    again = (tmp_path / "r.jsonl").read_bytes()
    rerank_file(dataclasses.replace(settings, limit=1, resume=True), toy)
    assert (tmp_path / "r.jsonl").read_bytes() == again  # a smaller limit takes nothing away


GUARDED = {"model": "other", "prompt": "rankgpt", "window": 7, "stride": 2, "think": False,
           "temperature": 0.5, "samples": 2, "passage_chars": 30, "max_new_tokens": 5,
           "max_prompt_tokens": 90, "max_num_seqs": 3, "seed": 1, "server": "http://127.0.0.1:9/v1",
           "dtype": "float32", "top_k": 3, "passes": 2, "algorithm": "top-down", "shuffle": True}


def test_every_setting_is_guarded_by_resume_or_cannot_change_an_answer():
    fields = {field.name for field in dataclasses.fields(RerankSettings)}
    assert fields == GUARDED.keys() | set(FREE_TO_CHANGE) | {"input"}


@pytest.mark.parametrize("name", list(GUARDED))
def test_a_run_is_not_resumed_with_another_setting_and_the_setting_is_named(tmp_path, toy, name):
    write_candidates(tmp_path / "c.jsonl", toy_task(1, 4, seed=0)[0])
    settings = settings_of(tmp_path, max_num_seqs=2)
    rerank_file(settings, toy)
    before = (tmp_path / "r.jsonl").read_bytes()
    other = dataclasses.replace(settings, resume=True, **{name: GUARDED[name]})
    was = re.escape(f"begun with --{name.replace('_', '-')} {getattr(settings, name)!r}")
    with pytest.raises(InputError, match=was):
        rerank_file(other, toy)
    assert (tmp_path / "r.jsonl").read_bytes() == before


def test_a_prompt_file_may_move_between_two_parts_of_a_run_but_not_change(tmp_path, toy):
    write_candidates(tmp_path / "c.jsonl", toy_task(2, 4, seed=0)[0])
    template = "method: singleturn_listwise\nprefix: '{query} '\nbody: '[{rank}] {candidate} '\n"
    first, moved = tmp_path / "first.yaml", tmp_path / "elsewhere" / "second.yaml"
    first.write_text(template)
    settings = settings_of(tmp_path, max_num_seqs=1, limit=1, prompt=str(first))
    rerank_file(settings, toy)
    before = (tmp_path / "r.jsonl").read_bytes()
    first.write_text(template.replace("{query}", "{query} rain"))
    read_prompt_file.cache_clear()  # a new process
    with pytest.raises(InputError, match=f"begun with --prompt 'file with SHA-256 .*'; {first} is another"):
        rerank_file(dataclasses.replace(settings, limit=0, resume=True), toy)
    assert (tmp_path / "r.jsonl").read_bytes() == before
    moved.parent.mkdir()
    moved.write_text(template)
    rerank_file(dataclasses.replace(settings, limit=0, resume=True, prompt=str(moved)), toy)
    assert (tmp_path / "r.jsonl").read_bytes().startswith(before) and len(read_run(tmp_path / "r")) == 2


def test_a_file_that_holds_parts_of_two_runs_is_not_resumed(tmp_path, toy):
    write_candidates(tmp_path / "c.jsonl", toy_task(2, 4, seed=0)[0])
    lines = {}
    for seed in (0, 1):
        rerank_file(settings_of(tmp_path, seed=seed, max_num_seqs=1), toy)
        lines[seed] = (tmp_path / "r.jsonl").read_bytes().splitlines(True)
    (tmp_path / "r.jsonl").write_bytes(b"".join(lines[0][:2] + lines[1][2:]))
    with pytest.raises(InputError, match="begun with --seed 1"):
        rerank_file(settings_of(tmp_path, max_num_seqs=1, resume=True), toy)


def test_a_run_is_not_resumed_with_another_input(tmp_path, toy):
    write_candidates(tmp_path / "c.jsonl", toy_task(1, 4, seed=0)[0])
    settings = settings_of(tmp_path)
    rerank_file(settings, toy)
    write_candidates(tmp_path / "c.jsonl", toy_task(1, 4, seed=1)[0])
    with pytest.raises(InputError, match="begun with another input"):
        rerank_file(dataclasses.replace(settings, resume=True), toy)


@pytest.mark.parametrize("content", [
    b"[1]\n", b"{}\n", b'{"qid": "q", "texts": [], "run": "0f"}\n', b"\xff\n"])
def test_resume_refuses_a_file_that_is_no_run_of_ours(tmp_path, toy, content):
    write_candidates(tmp_path / "c.jsonl", toy_task(2, 4, seed=0)[0])
    (tmp_path / "r.jsonl").write_bytes(content)
    settings = settings_of(tmp_path, resume=True)
    with pytest.raises(InputError, match="r.jsonl is not what rearank.py writes"):
        rerank_file(settings, toy)
    assert (tmp_path / "r.jsonl").read_bytes() == content


# --- the command


WITH_QUERY = ["--model", "m", "--query", "q", "lines.txt"]
WITH_INPUT = ["--model", "m", "--input", "c.jsonl", "--output", "r"]
WITH_SERVER = ["--server", "http://127.0.0.1:9/v1", *WITH_INPUT]
WITH_SERVE = ["--model", "m", "--serve", "8000"]
WITHOUT_EFFECT = [
    *[(WITH_QUERY, option, "with --query") for option in (
        "--input c.jsonl", "--output r", "--stats s.json", "--resume", "--tag mine", "--limit 3")],
    *[(WITH_INPUT, option, "without --query") for option in ("--explain", "--format text", "--format json")],
    *[(WITH_SERVER, option, "with --server") for option in (
        "--device cpu", "--dtype float32", "--max-num-seqs 32", "--max-prompt-tokens 9")],
    *[(WITH_INPUT, option, "without --server") for option in ("--concurrency 8", "--timeout 9")],
    *[(WITH_SERVE, option, "with --serve") for option in (
        "--input c.jsonl", "--output r", "--query q", "--top-k 5", "--limit 3", "--explain")],
    *[([*WITH_INPUT, "--algorithm", "top-down"], option, "with --algorithm top-down")
      for option in ("--stride 10", "--passes 2")],
    (WITH_INPUT, "--shuffle", "without --samples 2 or more"), (WITH_INPUT, "--host ::1", "without --serve")]


@pytest.mark.parametrize("mode, option, reason", WITHOUT_EFFECT)
def test_an_option_without_effect_is_refused_in_one_line_before_anything_is_done(tmp_path, monkeypatch, mode,
                                                                                option, reason):
    monkeypatch.chdir(tmp_path)  # where neither c.jsonl nor lines.txt is
    for name in ("load_agent", "Server", "read_candidates", "read_text"):
        monkeypatch.setattr(rearank, name, lambda *_: pytest.fail("too late"))
    with pytest.raises(InputError) as refusal:
        rearank.main([*mode, *option.split()])
    assert str(refusal.value) == f"{option.split()[0]} has no effect {reason}"
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("mode, options", [
    (WITH_QUERY, "--explain --format json --top-k 5 --device cpu --dtype float32"),
    (WITH_INPUT, "--stats s.json --resume --tag mine --limit 3 --max-num-seqs 9 --max-prompt-tokens 9"),
    (WITH_SERVER, "--stats s.json --resume --tag mine --concurrency 9 --timeout 9 --samples 2")])
def test_an_option_with_an_effect_is_taken(mode, options):
    rearank.check_options(command_line(RerankSettings, [*mode, *options.split()]))


def test_help_shows_first_what_is_read_and_written_and_last_memory_and_the_server(capsys):
    with pytest.raises(SystemExit) as left:
        rearank.main(["--help"])
    shown = capsys.readouterr().out
    assert left.value.code == 0 and "python rearank.py --model" in shown.partition("options:")[0]
    headings = re.findall(r"^(\w[\w ]*):$", shown.partition("options:")[2], re.M)
    assert headings == ["input and output", "model", "windows and answers", "server", "device",
                        "for other programs"]
    first = shown[shown.index("input and output:"):shown.index("model:\n")]
    for option in ("--input", "--output", "--query", "DOCUMENTS", "--resume"):
        assert re.search(rf"^  {option}[, ]", first, re.M)
    fields = {field.name.replace("_", "-") for field in dataclasses.fields(RerankSettings)} - {"documents"}
    assert fields <= {*re.findall(r"^  --([\w-]+)", shown, re.M)}


@pytest.mark.parametrize("options, words", [
    (["--model", "nowhere/at/all"], "no such model folder"),
    (["--model", "m"], "there is no config.json"),
    (["--model", "m", "--samples", "3"], "temperature above 0"),
    (["--model", "m", "--window", "5", "--stride", "6"], "0 < stride <= window"),
    (["--server", "http://127.0.0.1:9/v1"], "expected the address")])
def test_nothing_is_written_where_the_reranker_cannot_be_made(toy, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    write_candidates("c.jsonl", toy_task(2, 3, seed=0)[0])
    Path("m").mkdir()
    command = ["--input", "c.jsonl", "--output", "folder/r", "--stats", "folder/s", *options]
    with pytest.raises(InputError, match=words):
        rearank.main(command)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["c.jsonl", "m"]
    rerank_file(settings_of(tmp_path, output="folder/r"), toy)  # and a run that is there stays
    before = {path: path.read_bytes() for path in Path("folder").iterdir()}
    with pytest.raises(InputError, match=words):
        rearank.main(command)
    assert {path: path.read_bytes() for path in Path("folder").iterdir()} == before and len(before) == 2


def test_the_command_reranks_and_counts(toy, tmp_path, capsys):
    toy.model.save_pretrained(tmp_path / "m")
    toy.tokenizer.save_pretrained(tmp_path / "m")
    write_candidates(tmp_path / "c.jsonl", toy_task(2, 9, seed=0)[0])
    files = ["--input", str(tmp_path / "c.jsonl"), "--output", str(tmp_path / "r.trec")]
    options = ["--prompt", "toy", "--window", "6", "--stride", "3", "--max-new-tokens", "5"]
    options += ["--device", "cpu"]
    assert rearank.main(["--model", str(tmp_path / "m"), *files, *options]) == 0
    assert "2 queries, 4 calls" in capsys.readouterr().out and len(read_run(tmp_path / "r.trec")) == 2
    with pytest.raises(InputError, match="expected 0 < stride <= window"):
        rearank.main(["--model", "m", *files, "--window", "5", "--stride", "6"])


def test_counts_go_straight_into_pipes_and_into_our_own_output(toy, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(rearank, "load_agent", lambda *_: toy)
    options = [*file_options(tmp_path), "--output", str(tmp_path / "r")]
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    rearank.main([*options, "--stats", str(tmp_path / "pipe")])
    assert json.loads(os.read(reader, 9999))["queries"] == 4 and (tmp_path / "pipe").is_fifo()
    os.close(reader)
    capfd.readouterr()
    rearank.main([*options, "--stats", "/dev/fd/1"])  # here a file, which is not to be cut or replaced
    printed = capfd.readouterr().out
    assert printed.startswith("4 queries, ") and json.loads(printed[printed.index("{"):])["queries"] == 4


def test_lines_of_text_are_ranked_and_printed_with_what_is_said_of_them(toy, tmp_path, capsys, monkeypatch):
    said = "<think> [1] says oak. [2] says rain. </think> <answer> [2] > [1] </answer>"
    monkeypatch.setattr(rearank, "load_agent", lambda *a: toy)
    monkeypatch.setattr(rearank, "sample", lambda *a, **k: [[rearank.Completion([5], False)]])
    monkeypatch.setattr(rearank.Agent, "decode", lambda self, completion: said)
    (tmp_path / "lines.txt").write_text("an oak\n\nthe rain\n")
    command = ["--model", "m", "--prompt", "toy", "--query", "rain", str(tmp_path / "lines.txt")]
    assert rearank.main(command) == 0
    assert capsys.readouterr().out.splitlines() == ["  1. [3] the rain", "  2. [1] an oak"]
    rearank.main([*command, "--explain"])
    assert "  1. [3] the rain\n     [2] says rain.\n" in capsys.readouterr().out
    rearank.main([*command, "--format", "json"])
    assert [row["line"] for row in json.loads(capsys.readouterr().out)] == [3, 1]
    rearank.main([*command, "--top-k", "1", "--format", "json"])  # the lines behind the first are kept
    assert [row["line"] for row in json.loads(capsys.readouterr().out)] == [1, 3]
    for missing, word in ((["--query", "q"], "DOCUMENTS"), (["--input", "x"], "--output"), ([], "--input")):
        with pytest.raises(InputError, match=word):
            rearank.main(["--model", "m", *missing])


def test_standard_input_is_read_as_a_file_is(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rearank, "load_agent", lambda *a: toy)
    command = ["--model", "m", "--prompt", "toy", "--query", "rain", "--max-new-tokens", "4"]
    command += ["--format", "json"]
    content = "\ufeffan oak\r\n\r\nGröße\u2028\fstorm\rbread\n".encode()
    for name, given in (("plain", content), ("packed", gzip.compress(content))):
        (tmp_path / name).write_bytes(given)
        printed = []
        for documents in (str(tmp_path / name), "-"):  # the stream's own decoder knows only ASCII
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given), "ascii"))
            assert rearank.main([*command, documents]) == 0
            printed.append(capsys.readouterr().out)
        assert printed[0] == printed[1]
        rows = sorted((row["line"], row["text"]) for row in json.loads(printed[0]))
        assert rows == [(1, "an oak"), (3, "Größe\u2028\fstorm"), (4, "bread")]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("a\nb".encode("utf-16")), "ascii"))
    with pytest.raises(InputError, match="^standard input: looks like UTF-16"):
        rearank.main([*command, "-"])
    monkeypatch.setattr("sys.stdin", None)  # closed
    assert rearank.main([*command, "-"]) == 0 and capsys.readouterr().out == "[]\n"


def test_a_byte_that_is_not_utf8_on_standard_input_is_one_line():
    command = [sys.executable, "rearank.py", "--model", "m", "--query", "q", "-"]
    for encoding in ("utf-8:strict", "ascii:strict"):
        environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": encoding}
        result = subprocess.run(command, input=b"an oak\n\n\xffbread", capture_output=True, cwd=ROOT,
                                env=environment, check=False)
        said = b"rearank.py: standard input:3: expected UTF-8 text, found the byte 0xff\n"
        assert (result.returncode, result.stdout, result.stderr) == (2, b"", said)
