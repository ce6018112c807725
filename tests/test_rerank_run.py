"""A reranking run on disk: its files, and interrupted runs, which resume and end with the same bytes."""

import dataclasses
import gzip
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import ANY

import pytest
from conftest import answering, file_options, settings_of

import rearank
from model import Completion
from rearank import RerankSettings, rerank_file
from support.cli import InputError
from support.files import Candidates, read_run, write_candidates
from support.prompt_file import read_prompt_file
from support.rerank_run import FREE_TO_CHANGE
from toy import toy_agent, toy_task

ROOT = Path(__file__).resolve().parents[1]


def test_a_run_top_down_and_shuffled_is_written_counted_and_resumed(toy, tmp_path, capsys):
    write_candidates(tmp_path / "c.jsonl", toy_task(2, 9, seed=0)[0])
    settings = settings_of(tmp_path, max_num_seqs=1, window=4, algorithm="top-down", shuffle=True, samples=2)
    counts = rerank_file(settings, toy)
    whole = (tmp_path / "r.jsonl").read_bytes()
    rows = [row for row in map(json.loads, whole.splitlines()) if "texts" not in row]
    assert [row["part"] for row in rows] == [0, 0, 1] * 2  # the untrained toy names no order
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


def test_a_run_file_keeps_the_models_order_and_a_trace_of_each_window(monkeypatch, toy, tmp_path):
    answering(monkeypatch, toy, "<answer> [2] > [1] > [3] </answer>")
    query = Candidates("q1", "rain", ["d1", "d2", "d3", "d4"], ["a", "b", "c", "d"], [4.0, 4.0, 4.0, 1.0])
    write_candidates(tmp_path / "c.jsonl", [query])
    counts = rerank_file(settings_of(tmp_path, top_k=3), toy)
    run = read_run(tmp_path / "r")["q1"]
    assert sorted(run, key=run.get, reverse=True) == ["d2", "d1", "d3", "d4"]
    assert len(set(run.values())) == 4  # no ties, so the order is unique
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
    for output in ("c.jsonl", "c"):  # as the run, and as the trace beside it
        with pytest.raises(InputError, match="would overwrite the input"):
            rerank_file(settings_of(tmp_path, output=str(tmp_path / output)), toy)
    assert (tmp_path / "c.jsonl").read_bytes() == before


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


@pytest.mark.slow
def test_real_dl19_candidates_become_a_run(toy, tmp_path):
    source = Path(__file__).parent / "../../shared/data/dl19_eval_dev/retrieve_results_dl19_top100.jsonl.gz"
    if not source.exists():
        pytest.skip("no ../shared/data here")
    (tmp_path / "c.jsonl").write_bytes(b"".join(gzip.open(source).readlines()[:2]))
    assert rerank_file(settings_of(tmp_path), toy)["calls"] == 18
    assert all(len(docs) == 100 for docs in read_run(tmp_path / "r").values())


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
    rerank_file(settings, toy)  # a finished run may be overwritten
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


@pytest.mark.slow
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
    killed_after(14, "--resume")  # killed again, later
    with open(tmp_path / "killed.jsonl", "a") as file:
        file.write('{"qid": "tra')  # a kill can leave half a line
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
    assert (tmp_path / "r.jsonl").read_bytes() == again  # a smaller limit removes nothing


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
    read_prompt_file.cache_clear()  # as in a new process
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


def test_a_trial_does_not_overwrite_a_longer_run(tmp_path, toy):
    write_candidates(tmp_path / "c.jsonl", toy_task(3, 4, seed=0)[0])
    rerank_file(settings_of(tmp_path), toy)
    before = (tmp_path / "r.jsonl").read_bytes()
    with pytest.raises(InputError, match="holds 3 queries, and this run has 2: give another --output"):
        rerank_file(settings_of(tmp_path, limit=2), toy)
    assert (tmp_path / "r.jsonl").read_bytes() == before


def test_a_resumed_run_says_what_it_cannot_keep(tmp_path, toy, capsys):
    write_candidates(tmp_path / "c.jsonl", toy_task(5, 4, seed=0)[0])
    rerank_file(settings_of(tmp_path, max_num_seqs=2, limit=3), toy)
    rerank_file(settings_of(tmp_path, max_num_seqs=2, resume=True), toy)
    said = "--resume: keeps 2 of 3 finished queries (whole batches of --max-num-seqs 2)"
    assert said in capsys.readouterr().err
