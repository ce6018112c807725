"""The toy task: its labels, its teacher and lessons, and a complete run of `python grpo.py`."""

import json
import sys
from pathlib import Path

import pytest
from conftest import toy_settings

import grpo
from eval import evaluate
from grpo import Rollouts
from model import Completion, load_agent
from support.files import Instance, read_qrels, read_run
from prompts import encode_prompt
from toy import (toy_answer, toy_combinations, toy_keywords, toy_lessons, toy_prompt, toy_task,
                 toy_trace_statistics)

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import plot_toy


def test_no_combination_of_concepts_is_both_trained_and_held_out():
    assert not set(toy_combinations(True)) & set(toy_combinations(False))
    assert len(toy_combinations(True)) > 40


def test_a_label_is_the_number_of_the_querys_concepts_that_a_passage_covers():
    candidates, qrels = toy_task(20, 12, seed=3)
    for c in candidates:
        assert [qrels[c.qid][d] for d in c.docids] == [len(toy_keywords(c.query, text)) for text in c.texts]
        assert c.scores == sorted(c.scores, reverse=True)


def test_the_teacher_is_right_about_grades_and_vague_about_order():
    texts = ["oak leaf forest oak", "storm leaf oak forest", "storm flour loan leaf"]
    assert toy_answer("rain bread coin", texts, graded=True) == (
        "<think> [1] 0 [2] storm 1 [3] storm flour loan 3 </think> <answer> [3] > [2] > [1] </answer>")
    assert toy_answer("rain bread coin", texts, graded=False).endswith("<answer> [2] > [3] > [1] </answer>")


def test_the_tokenizer_writes_and_reads_the_teachers_text(toy):
    text = toy_answer("rain bread coin", ["storm flour loan leaf"] * 2, graded=True)
    assert toy.tokenizer.decode(toy.tokenizer(text)["input_ids"]) == text


def test_the_lessons_prompts_are_those_that_the_reranker_will_use(toy):
    texts = ["oak leaf forest oak", "storm leaf oak forest"]
    ids = toy.tokenizer(toy_prompt("rain bread coin", texts))["input_ids"]
    assert ids == encode_prompt(toy.tokenizer, "rain bread coin", texts, "toy")
    assert next(toy_lessons(toy, toy_settings()))[0][1][-1] == toy.stop_ids[0]  # the end token


def test_lessons_begin_with_short_windows_and_the_share_of_graded_orders_is_as_set(toy):
    settings = toy_settings(sft_steps=11, teacher_graded=1.0)
    sizes = [len(batch) for batch, _ in zip(toy_lessons(toy, settings), range(5))]
    assert sizes == [32, 32, 16, 16, 16]  # 96 passages per batch; windows of 3 for 15 % of the steps, then 6
    graded, vague = (next(toy_lessons(toy, toy_settings(teacher_graded=share), curriculum=False))
                     for share in (1.0, 0.0))
    assert [prompt for prompt, _ in graded] == [prompt for prompt, _ in vague]
    assert 0.5 < sum(a != b for (_, a), (_, b) in zip(graded, vague)) / len(graded)


def test_the_trace_is_measured_against_the_labels_and_the_answer():
    instance = Instance("q", "rain", ["a", "b"], ["x", "y"], [0, 3], [0, 3])
    texts = ["<think> [1] 0 [2] rain storm cloud 3 </think> <answer> [2] > [1] </answer>",
             "<think> [1] rain 1 [2] 3 </think> <answer> [1] > [2] </answer>"]
    rollouts = Rollouts([instance], [[]], [Completion([], True)] * 2, texts, [], 0.0, 1.0)
    assert toy_trace_statistics(rollouts) == {"grades_right": 0.75, "answer_follows_grades": 0.5}


@pytest.mark.slow
def test_the_toy_run_goes_from_data_to_tables_of_its_own_trec_files(tmp_path, capsys):
    """A complete run, too short to learn anything, writes all its files, with the numbers of eval.py."""
    out = tmp_path / "run"
    few = {"sft-steps": 2, "steps": 2, "prompts-per-step": 2, "group-size": 4, "max-new-tokens": 6,
           "eval-queries": 8}
    options = [part for name, value in few.items() for part in (f"--{name}", str(value))]
    assert grpo.main(["--out", str(out), "--device", "cpu", "--control", *options]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) == {
        "seed", "seconds", "queries", "first_stage", "warm_start", "warm_start_doubled", "grpo",
        "grpo_without_think", "sliding_window", "gain", "gain_over_doubled"}
    assert set(summary["sliding_window"]) == {"first_stage", "warm_start", "grpo"} and summary["queries"] == 8
    assert set(summary["gain"]) == {"mean", "low", "high"}
    assert summary["gain"]["mean"] == pytest.approx(summary["grpo"] - summary["warm_start"])
    over_doubled = summary["grpo"] - summary["warm_start_doubled"]
    assert summary["gain_over_doubled"]["mean"] == pytest.approx(over_doubled)
    scores = evaluate(read_qrels(out / "window.qrels"), read_run(out / "window.grpo.trec"), ["ndcg_cut.10"])
    assert sum(s["ndcg_cut_10"] for s in scores.values()) / len(scores) == pytest.approx(summary["grpo"])
    assert len((out / "log.csv").read_text().splitlines()) == 3
    assert "labels of [1]" in (out / "samples.txt").read_text()
    assert {"config.json", "checkpoint", "saves", "long.jsonl"} <= {p.name for p in out.iterdir()}
    printed = capsys.readouterr().out
    assert f"{out}/long.grpo.trec" in printed and f"--input {out}/long.jsonl" in printed
    load_agent(str(out / "checkpoint"), "cpu")
    rows = plot_toy.read_log(str(out))  # the README's curve can be drawn from any toy run
    assert len(rows["ndcg"]) == len(rows["ndcg_best"]) == 2
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    # The earlier run is moved aside completely.
    assert grpo.main(["--out", str(out), *options, "--lora-rank", "2"]) == 0
    assert f"{out} held an earlier run, which is now {out}.1" in capsys.readouterr().out
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run.1").iterdir() if p.is_file()}
    load_agent(str(tmp_path / "run.1/checkpoint"), "cpu")
