"""benchmarks/calls.py: its counts and scores, with a policy that knows the toy's labels."""

import json
import sys
from pathlib import Path

import pytest

import rearank
from prompts import Shortened
from support.chat_replies import Answer
from toy import toy_answer, toy_task

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import calls


@pytest.fixture
def knowing(monkeypatch):
    """Replace the model by a teacher that sorts every window by its labels. An answer counts four tokens."""
    def answers(self, asked, seeds, samples, progress):
        return [(Shortened(False, 0, 400), [Answer(toy_answer(query, texts, True), 4, 10, True)] * samples)
                for query, texts in asked]
    monkeypatch.setattr(rearank.Reranker, "_ask_model", answers)


def a_task(agent, size):
    return calls.Task("task", *toy_task(3, size, seed=1), agent, {"prompt": "toy", "window": 6, "stride": 3})


def test_calls_and_rounds_are_those_of_each_way_and_differences_are_paired(knowing, toy):
    rows = {row["arm"]: row for row in calls.compare(a_task(toy, 9))}
    counted = {arm: (row["calls"], row["rounds"], row["prompt_tokens"], row["new_tokens"])
               for arm, row in rows.items() if arm != "top-down"}
    assert counted == {  # three lists of nine passages, two windows per list
        "first stage": (0, 0, 0, 0), "top window only": (3, 3, 30, 12), "sliding": (6, 6, 60, 24),
        "two passes": (12, 12, 120, 48), "three samples": (18, 6, 60, 72),
        "three shuffled": (18, 6, 180, 72)}
    mean = {arm: row["ndcg"][0] for arm, row in rows.items()}
    assert mean["first stage"] < mean["top window only"] < mean["sliding"] < mean["two passes"]
    assert rows["sliding"]["difference"] == [0, 0, 0]
    for arm, row in rows.items():
        assert row["difference"][0] == pytest.approx(mean[arm] - mean["sliding"], abs=2e-4)
        assert row["ndcg"][1] <= mean[arm] <= row["ndcg"][2]


def test_the_parts_of_a_top_down_round_are_one_round(knowing, toy):
    """The lists are in ideal order. After the first window, a part has the pivot and five more passages."""
    task = a_task(toy, 26)
    for c in task.lists:
        places = sorted(range(26), key=lambda i: -task.qrels[c.qid][c.docids[i]])
        c.docids, c.texts = [c.docids[i] for i in places], [c.texts[i] for i in places]
    row, scores = calls.measure(task, "top-down")
    assert (row["calls"], row["rounds"], row["changed"]) == (15, 6, 0) and scores == [1, 1, 1]


def test_the_command_prints_a_line_per_arm_of_the_toys_lists_and_of_real_ones(knowing, folder, capsys):
    options = ["--model", f"{folder}/m", "--toy-queries", "2", "--real", f"{folder}/m", "--prompt", "toy",
               "--input", f"{folder}/c.jsonl", "--qrels", f"{folder}/q.txt"]
    assert calls.main([*options, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["arm"] for row in rows] == [*calls.ARMS] * 3
    assert [row["queries"] for row in rows[::7]] == [2, 1, 3]
    assert {row["temperature"] for row in rows if "three" in row["arm"]} == {0.7}
    assert calls.main(options) == 0
    assert capsys.readouterr().out.count("three shuffled") == 3


@pytest.mark.parametrize("options, words", [
    (["--model", "nowhere"], "nowhere: no such folder; train the toy"),
    (["--window", "5"], "--window has no effect without --real"),
    (["--real", "M", "--input", "c.jsonl"], "expected --input and --qrels together")])
def test_what_cannot_be_measured_is_refused_in_one_line(monkeypatch, folder, options, words):
    monkeypatch.delenv("REARANK_TEST_MODEL", raising=False)
    with pytest.raises(calls.InputError, match=words):
        calls.main(["--model", f"{folder}/m", *options])
