"""The agent: prompts, sliding windows, the reranker, the command line."""

import dataclasses
import gzip
import json
from pathlib import Path

import pytest
import torch

import grpo
import rearank
from data import Candidates, InputError, Instance, read_run, write_candidates
from rearank import (Completion, Reranker, Settings, build_messages, encode_prompt, rerank_file,
                     sliding_window, window_bounds)
from reward import score_response
from toy import ToySettings, toy_task

# --- prompts


def test_the_rearank_prompt_is_the_papers_to_the_letter():
    turns = build_messages("a {b} c", ["one  two\nthree", "four"])
    first, *_, last = [m["content"] for m in turns if m["role"] == "user"]
    assert first == (
        "I will provide you with passages, each indicated by number identifier []. "
        "Rank the passages based on their relevance to the search query."
        "Search Query: a {b} c. \nRank the 2 passages above based on their relevance to the search query."
        "The passages should be listed in descending order using identifiers. "
        "The most relevant passages should be listed first. "
        "The output format should be <answer> [] > [] </answer>, e.g., <answer> [1] > [2] </answer>.")
    indent = "\n" + " " * 12
    assert last == (
        'Please rank these passages according to their relevance to the search query: "a {b} c"' + indent
        + "Follow these steps exactly:" + indent
        + "1. First, within <think> tags, analyze EACH passage individually:" + indent
        + "- Evaluate how well it addresses the query" + indent
        + "- Note specific relevant information or keywords\n" + indent
        + "2. Then, within <answer> tags, provide ONLY the final ranking in descending order of relevance "
        "using the format: [X] > [Y] > [Z]")


def test_a_conversation_receives_each_passage_in_turn():
    messages = build_messages("q", ["one  two\nthree", "x" * 500])
    assert [m["role"] for m in messages] == ["system"] + ["user", "assistant"] * 3 + ["user"]
    assert [m["content"] for m in messages[2:6]] == [
        "Okay, please provide the passages.", "[1] one two three", "Received passage [1].",
        "[2] " + "x" * 400]
    assert messages[0]["content"] == (
        "You are DeepRerank, an intelligent assistant that can rank passages based on their relevancy to the "
        "search query. You first thinks about the reasoning process in the mind and then provides the user "
        "with the answer.")


def test_the_rankgpt_prompt_asks_for_no_reasoning_and_cuts_at_300_characters():
    messages = build_messages("q", ["x" * 500], prompt="rankgpt")
    assert messages[0]["content"] == (
        "You are RankGPT, an intelligent assistant that can rank passages based on "
        "their relevancy to the query.")
    assert messages[1]["content"] == (
        "I will provide you with 1 passages, each indicated by number identifier []. \n"
        "Rank the passages based on their relevance to query: q.")
    assert messages[3]["content"] == "[1] " + "x" * 300
    assert messages[-1]["content"] == (
        "Search Query: q. \nRank the 1 passages above based on their relevance to the search query. "
        "The passages should be listed in descending order using identifiers. "
        "The most relevant passages should be listed first. "
        "The output format should be [] > [], e.g., [1] > [2]. "
        "Only response the ranking results, do not say any word or explain.")


def test_the_prompt_is_never_guessed():
    with pytest.raises(ValueError, match="unknown prompt"):
        build_messages("q", ["p"], prompt="Rearank-7B")


def test_a_long_query_is_cut_so_that_the_prompt_fits(toy):
    ids = encode_prompt(toy.tokenizer, "rain " * 1000, ["bread oven"] * 10, "toy", max_tokens=200)
    assert len(ids) <= 200
    with pytest.raises(InputError, match="smaller window"):
        encode_prompt(toy.tokenizer, "rain", ["bread"] * 100, "rearank", max_tokens=50)


def reasoning_template(toy) -> None:
    """A template as R1-type models have it: it opens <think> itself."""
    template = toy.tokenizer.chat_template
    toy.tokenizer.chat_template = template.replace("<|assistant|> ", "<|assistant|> <think> ")


def test_a_template_that_opens_think_leaves_it_in_the_response(monkeypatch, toy):
    reasoning_template(toy)
    asked = []

    def answers(model, prompts, *_, **__):
        asked.extend(toy.tokenizer.decode(p) for p in prompts)
        ids = toy.tokenizer("rain 1 </think> <answer> [2] > [1] </answer>")["input_ids"] + [1]
        return [[Completion(ids, True)] for _ in prompts]

    monkeypatch.setattr(rearank, "sample", answers)
    window = Reranker(toy, "toy").rank("rain", ["a", "b"]).windows[0]
    assert asked[0].endswith("<|assistant|> <think>") and asked[0].count("<think>") == 1
    assert window.response.startswith("<think> rain 1 </think>") and window.reasoning == "rain 1"
    assert score_response(window.response, [0, 3]).format1 == 1
    monkeypatch.setattr(grpo, "sample", answers)
    [text] = grpo.sample_rollouts(toy, [Instance("q", "rain", ["a", "b"], ["x", "y"], [0, 3], [0, 3])],
                                  ToySettings(group=1), 1).texts
    assert text == window.response  # what is rewarded is what is reranked by

    window = Reranker(toy, "toy", think=False).rank("rain", ["a", "b"]).windows[0]
    assert asked[-1].endswith("<|assistant|> <think> </think>") and asked[-1].count("<think>") == 1
    assert window.response.startswith("<think> </think>")


def test_a_template_without_system_turns_gets_them_in_the_first_user_turn(toy):
    toy.tokenizer.chat_template = ("{% if messages[0]['role'] == 'system' %}"
                                   "{{ raise_exception('no system') }}{% endif %}"
                                   + toy.tokenizer.chat_template)
    text = rearank.render_chat(toy.tokenizer, build_messages("q", ["one"]))
    assert text.startswith("You are DeepRerank") and "I will provide you with passages" in text
    toy.tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(InputError, match="chat template cannot write this chat: never"):
        rearank.render_chat(toy.tokenizer, build_messages("q", ["one"]))


def test_prompt_and_answer_fit_into_the_models_positions(toy, capsys):
    toy.model.config.max_position_embeddings = 60
    reranker = Reranker(toy, "toy", max_new_tokens=40)
    assert "the model has 60 positions: answers end at 30 tokens" in capsys.readouterr().err
    ranking = reranker.rank("rain " * 40, ["bread oven"] * 3)
    window = ranking.windows[0]
    assert window.prompt_tokens + window.tokens <= 60 and window.cut.prompt_cut
    assert not Reranker(toy, "toy", max_new_tokens=20).rank("rain", ["bread"] * 2).windows[0].cut.prompt_cut


def test_a_processor_with_bfloat16_reranks_in_it(toy, tmp_path, monkeypatch):
    toy.model.save_pretrained(tmp_path / "m")
    toy.tokenizer.save_pretrained(tmp_path / "m")
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(rearank, "has_native_bfloat16", lambda native=native: native)
        assert Reranker(str(tmp_path / "m"), "toy", max_new_tokens=9, device="cpu").agent.model.dtype == dtype
        fixed = Reranker(str(tmp_path / "m"), "toy", max_new_tokens=9, device="cpu", dtype="float32")
        assert fixed.agent.model.dtype == torch.float32


# --- windows


@pytest.mark.parametrize(("window", "step"), [(20, 10), (4, 2), (5, 5), (3, 1)])
def test_every_rank_is_in_a_window_and_neighbours_overlap_for_every_list_length(window, step):
    for n in range(130):
        bounds = window_bounds(n, window, step)
        assert [end for _, end in bounds] == list(range(n, n - step * len(bounds), -step))
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


@pytest.mark.parametrize(("window", "step"), [(4, 2), (5, 5), (20, 10), (3, 1)])
def test_good_passages_bubble_up_by_at_most_window_minus_step(window, step):
    items = list(range(50))  # the larger the better; the best stands last
    result = sliding_window(items, lambda w: sorted(range(len(w)), key=lambda i: -w[i]), window, step)
    assert sorted(result) == items
    assert result[:window - step] == sorted(items, reverse=True)[:window - step]


def test_a_step_that_would_skip_items_is_refused():
    for window, step in ((10, 11), (10, 0), (10, -1)):
        with pytest.raises(ValueError, match="0 < step <= window"):
            sliding_window([1, 2, 3], lambda w: [0, 1, 2], window, step)
    with pytest.raises(ValueError, match="permutation"):
        sliding_window([1, 2, 3], lambda w: [0, 0, 1])


def test_the_input_list_is_left_alone():
    items = [3, 1, 2]
    assert sliding_window(items, lambda w: [2, 1, 0]) == [2, 1, 3] and items == [3, 1, 2]


# --- the reranker


def test_windows_of_many_queries_answer_as_each_query_alone(toy):
    lists = [(c.query, c.texts) for c in toy_task(3, 13, seed=4)[0]] + [("rain", ["bread"]), ("rain", [])]
    reranker = Reranker(toy, "toy", window=6, step=3, max_new_tokens=12)
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
    ranking = Reranker(toy, "toy", window=4, step=2).rank("rain", ["bread"] * 7)
    wanted = sliding_window(list(range(7)), lambda items: list(range(len(items)))[::-1], 4, 2)
    assert [r.index for r in ranking] == wanted
    assert [w.positions for w in ranking.windows] == [[3, 4, 5, 6], [1, 2, 6, 5], [0, 5, 6]]


def test_results_carry_their_place_in_the_input_and_their_text(toy):
    ranking = Reranker(toy, "toy", max_new_tokens=8).rank("rain bread", ["a", "b", "c"], top_k=2)
    assert [r.rank for r in ranking] == [1, 2] and all("abc"[r.index] == r.text for r in ranking)
    assert ranking.windows[0].status in ("ok", "repaired", "untagged", "truncated", "malformed", "empty")


def test_random_numbers_depend_on_seed_query_and_window_and_not_on_the_count_of_calls(toy):
    def responses(seed):
        reranker = Reranker(toy, "toy", temperature=1.0, max_new_tokens=20, seed=seed, window=2, step=1)
        return [window.response for query in ("rain bread", "oak goal", "rain bread")
                for window in reranker.rank(query, ["oak", "oak", "oak"]).windows]
    first = responses(0)
    assert first[:2] == first[4:] and len(set(first + responses(1))) == 8
    assert first == responses(0)


def test_a_prompt_or_windows_that_make_no_sense_are_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match="unknown prompt"):
        Reranker("nowhere", prompt="Rearank-7B")
    with pytest.raises(ValueError, match="0 < step <= window"):
        Reranker("nowhere", window=10, step=11)


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


# --- files


def test_a_run_file_keeps_the_models_order_and_a_trace_of_each_window(monkeypatch, toy, tmp_path):
    answering(monkeypatch, toy, "<answer> [2] > [1] > [3] </answer>")
    query = Candidates("q1", "rain", ["d1", "d2", "d3", "d4"], ["a", "b", "c", "d"], [4.0, 4.0, 4.0, 1.0])
    write_candidates(tmp_path / "c.jsonl", [query])
    settings = Settings(input=str(tmp_path / "c.jsonl"), output=str(tmp_path / "r.trec"), prompt="toy",
                        top_k=3)
    counts = rerank_file(settings, toy)
    run = read_run(tmp_path / "r.trec")["q1"]
    assert sorted(run, key=run.get, reverse=True) == ["d2", "d1", "d3", "d4"]
    assert len(set(run.values())) == 4  # no tie can undo it
    record, trace = [json.loads(line) for line in (tmp_path / "r.trec.jsonl").read_text().splitlines()]
    assert (record["docids"], record["texts"]) == (["d1", "d2", "d3", "d4"], ["a", "b", "c", "d"])
    assert record["order"] == ["d2", "d1", "d3", "d4"] and record["query"] == "rain"
    assert trace["order"] == ["d2", "d1", "d3"] and trace["docids"] == ["d1", "d2", "d3"]
    assert trace["status"] == "ok"
    assert (counts["calls"], counts["ok"], counts["queries"], counts["unchanged"]) == (1, 1, 1, 0)


def test_windows_left_as_they_were_are_counted(monkeypatch, toy, tmp_path):
    answering(monkeypatch, toy, "<answer> [1] > [2] > [3] </answer>")
    write_candidates(tmp_path / "c.jsonl", toy_task(3, 3, seed=0)[0])
    settings = Settings(input=str(tmp_path / "c.jsonl"), output=str(tmp_path / "r.trec"), prompt="toy")
    assert rerank_file(settings, toy)["unchanged"] == 3


def test_an_interrupted_run_keeps_the_finished_queries(monkeypatch, toy, tmp_path):
    write_candidates(tmp_path / "c.jsonl", toy_task(4, 3, seed=0)[0])
    calls = []

    def interrupted(model, prompts, *_, **__):
        calls.append(len(prompts))
        if len(calls) > 1:
            raise KeyboardInterrupt
        return [[Completion([1], True)] for _ in prompts]

    monkeypatch.setattr(rearank, "sample", interrupted)
    settings = Settings(input=str(tmp_path / "c.jsonl"), output=str(tmp_path / "r.trec"), prompt="toy",
                        max_rows=2)
    with pytest.raises(KeyboardInterrupt):
        rerank_file(settings, toy)
    assert list(read_run(tmp_path / "r.trec")) == ["train0", "train1"]


@pytest.mark.parametrize("changes", [{"tag": "my run"}, {"output": "."}])
def test_what_cannot_be_written_is_refused_before_the_work(toy, tmp_path, monkeypatch, changes):
    monkeypatch.setattr(rearank, "sample", lambda *a, **k: pytest.fail("the model was asked"))
    write_candidates(tmp_path / "c.jsonl", [Candidates("1", "q", ["a", "b"], ["a", "b"], [2.0, 1.0])])
    settings = Settings(input=str(tmp_path / "c.jsonl"), output=str(tmp_path / "run"), prompt="toy")
    with pytest.raises(InputError, match="expected"):
        rerank_file(dataclasses.replace(settings, **changes), toy)
    assert [p.name for p in tmp_path.iterdir()] == ["c.jsonl"]


def test_the_input_is_never_overwritten(toy, tmp_path):
    write_candidates(tmp_path / "c.jsonl", toy_task(2, 3, seed=0)[0])
    before = (tmp_path / "c.jsonl").read_bytes()
    for output in ("c.jsonl", "c"):  # the run itself, and the reasoning beside it
        settings = Settings(input=str(tmp_path / "c.jsonl"), output=str(tmp_path / output), prompt="toy")
        with pytest.raises(InputError, match="would overwrite the input"):
            rerank_file(settings, toy)
    assert (tmp_path / "c.jsonl").read_bytes() == before


def test_the_command_reranks_and_counts(toy, tmp_path, capsys):
    toy.model.save_pretrained(tmp_path / "m")
    toy.tokenizer.save_pretrained(tmp_path / "m")
    write_candidates(tmp_path / "c.jsonl", toy_task(2, 9, seed=0)[0])
    files = ["--input", str(tmp_path / "c.jsonl"), "--output", str(tmp_path / "r.trec")]
    options = ["--prompt", "toy", "--window", "6", "--step", "3", "--max-new-tokens", "5", "--device", "cpu"]
    assert rearank.main(["--model", str(tmp_path / "m"), *files, *options]) == 0
    assert "2 queries, 4 calls" in capsys.readouterr().out and len(read_run(tmp_path / "r.trec")) == 2
    with pytest.raises(InputError, match="expected 0 < step <= window"):
        rearank.main(["--model", "m", *files, "--window", "5", "--step", "6"])


def test_real_dl19_candidates_become_a_run(toy, tmp_path):
    source = Path(__file__).parent / "../../shared/data/dl19_eval_dev/retrieve_results_dl19_top100.jsonl.gz"
    if not source.exists():
        pytest.skip("no ../shared/data here")
    small = tmp_path / "small.jsonl"
    small.write_bytes(b"".join(gzip.open(source).readlines()[:2]))
    settings = Settings(input=str(small), output=str(tmp_path / "r.trec"), prompt="toy", max_new_tokens=4)
    assert rerank_file(settings, toy)["calls"] == 18
    assert all(len(docs) == 100 for docs in read_run(tmp_path / "r.trec").values())
