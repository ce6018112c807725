"""Sliding windows and top-down partitioning, the reranker, and its command line."""

import dataclasses
import gzip
import io
import json
import os
import random
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import answering, file_options, perfect, reversing, settings_of

import rearank
from model import Completion
from rearank import Reranker, RerankSettings, rerank_file, sliding_window, top_down, window_bounds
from support.cli import InputError, command_line, run_main
from support.files import read_run, write_candidates
from toy import toy_task

ROOT = Path(__file__).resolve().parents[1]


# --- windows


@pytest.mark.parametrize(("window", "stride"), [(20, 10), (4, 2), (5, 5), (3, 1)])
def test_every_rank_is_in_a_window_and_neighbours_overlap_for_every_list_length(window, stride):
    for n in range(130):
        bounds = window_bounds(n, window, stride)
        assert [end for _, end in bounds] == list(range(n, n - stride * len(bounds), -stride))
        assert all(start == max(0, end - window) for start, end in bounds)
        assert set().union(*(range(*b) for b in bounds)) == (set(range(n)) if n > 1 else set())
        # Rank 0 is in one window only, the last.
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
    items = list(range(50))  # larger is better; the best comes last
    result = sliding_window(items, lambda w: sorted(range(len(w)), key=lambda i: -w[i]), window, stride)
    assert sorted(result) == items
    assert result[:window - stride] == sorted(items, reverse=True)[:window - stride]


def test_a_stride_that_would_skip_items_is_refused():
    for window, stride in ((10, 11), (10, 0), (10, -1)):
        with pytest.raises(ValueError, match="0 < stride <= window"):
            sliding_window([1, 2, 3], lambda w: [0, 1, 2], window, stride)
    with pytest.raises(ValueError, match="permutation"):
        sliding_window([1, 2, 3], lambda w: [0, 0, 1])


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
    assert all(present[0] == 9 for present in seen[1:])  # the pivot: rank 10 of the first window


def test_top_down_with_a_policy_that_answers_nothing_moves_nothing():
    seen = []
    assert top_down("abcdefghijk", lambda w: seen.append(w) or [*range(len(w))], 4) == [*"abcdefghijk"]
    assert ["".join(w) for w in seen] == ["abcd", "befg", "bhij", "bk"]


def test_top_down_keeps_the_order_of_what_is_not_among_the_first():
    """Item 12 is ranked above the pivot 2, so the candidates are 1, 2 and 12."""
    seen, better = [], [12, 1, 2, 3, 4, 5, 6, 7, 8]
    found = top_down([1, 2, 3, 4, 8, 12, 7, 6, 5], lambda w: seen.append(list(w)) or sorted(
        range(len(w)), key=lambda i: better.index(w[i])), 4)
    assert seen == [[1, 2, 3, 4], [2, 8, 12, 7], [2, 6, 5], [1, 2, 12]]
    assert found == [12, 1, 2, 3, 4, 7, 8, 5, 6]


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
    monkeypatch.chdir(tmp_path)  # c.jsonl and lines.txt do not exist here
    for name in ("load_agent", "Server", "read_candidates", "read_text"):
        monkeypatch.setattr(rearank, name, lambda *_: pytest.fail("too late"))
    with pytest.raises(InputError) as refusal:
        rearank.main([*mode, *option.split()])
    assert str(refusal.value) == f"{option.split()[0]} has no effect {reason}"
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("mode, options", [
    (WITH_QUERY, "--explain --format json --top-k 5 --device cpu --dtype float32"),
    (WITH_INPUT, "--stats s.json --resume --tag mine --limit 3 --max-num-seqs 9 --max-prompt-tokens 9"),
    (WITH_INPUT, "--algorithm top-down --window 6"),
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
    rerank_file(settings_of(tmp_path, output="folder/r"), toy)  # an existing run is not changed
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
    rearank.main([*options, "--stats", "/dev/fd/1"])  # here a file, which must not be truncated
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
    rearank.main([*command, "--top-k", "1", "--format", "json"])  # all lines are printed
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
        for documents in (str(tmp_path / name), "-"):  # sys.stdin's own decoder accepts only ASCII
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given), "ascii"))
            assert rearank.main([*command, documents]) == 0
            printed.append(capsys.readouterr().out)
        assert printed[0] == printed[1]
        rows = sorted((row["line"], row["text"]) for row in json.loads(printed[0]))
        assert rows == [(1, "an oak"), (3, "Größe\u2028\fstorm"), (4, "bread")]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("a\nb".encode("utf-16")), "ascii"))
    with pytest.raises(InputError, match="^standard input: looks like UTF-16"):
        rearank.main([*command, "-"])
    monkeypatch.setattr("sys.stdin", None)  # standard input is closed
    assert rearank.main([*command, "-"]) == 0 and capsys.readouterr().out == "[]\n"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_byte_that_is_not_utf8_on_standard_input_is_one_line(monkeypatch, capfd, encoding):
    given = io.TextIOWrapper(io.BytesIO(b"an oak\n\n\xffbread"), encoding, "strict")
    monkeypatch.setattr(sys, "stdin", given)
    monkeypatch.setattr(sys, "argv", ["rearank.py", "--model", "m", "--query", "q", "-"])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        run_main(rearank.main)
    said = "rearank.py: standard input:3: expected UTF-8 text, found the byte 0xff\n"
    assert end.value.code == 2 and capfd.readouterr() == ("", said)


def test_a_window_smaller_than_the_default_stride_needs_a_stride(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="--window 6: expected a --stride of at most that beside it"):
        rearank.main(["--model", "m", "--input", "c.jsonl", "--output", "r", "--window", "6"])
    with pytest.raises(ValueError, match="passes belong to the sliding window"):
        Reranker("nowhere", algorithm="top-down", passes=2)
