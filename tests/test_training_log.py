"""The log of a training run: its rows and samples, also after a resume, and warnings about a collapse."""

import dataclasses
import re

import pytest
import torch
from conftest import one_window, quick

from grpo import train
from support import training_log
from support.run_folder import RunFolder
from support.training_log import COLUMNS, TrainingLog, collapses


def test_what_a_killed_run_has_logged_after_its_last_save_is_cut(toy, tmp_path):
    run, settings = tmp_path / "run", quick(tmp_path, reward="random")
    train(toy, one_window(), settings, RunFolder(settings))
    before = {name: (run / name).read_bytes() for name in ("log.csv", "samples.txt")}
    for name in (*before, "skipped.txt"):  # skipped.txt did not exist before
        with open(run / name, "a") as file:
            file.write("left by a step that is not in the save\n")
    again = dataclasses.replace(settings, resume=True)
    train(toy, one_window(), again, RunFolder(again))
    assert {name: (run / name).read_bytes() for name in before} == before
    assert (run / "skipped.txt").read_bytes() == b""


def test_the_samples_are_the_best_and_the_worst_answer_to_the_first_prompt(toy, tmp_path):
    settings = quick(tmp_path, reward="random", steps=1, prompts_per_step=2)
    other = dataclasses.replace(one_window()[0], qid="other")
    train(toy, [*one_window(), other], settings, RunFolder(settings))
    rewards = torch.rand((2, 8), generator=torch.Generator().manual_seed(1))[0]  # as --reward random
    found = re.findall(r"    reward (\S+), ", (tmp_path / "run/samples.txt").read_text())
    assert found == [f"{rewards.max():+.3f}", f"{rewards.min():+.3f}"]


def test_small_numbers_survive_in_the_log(tmp_path):
    log = TrainingLog(tmp_path, quick(tmp_path), {})
    row = dict.fromkeys(COLUMNS, 0.0) | {"step": 1, "lr": 2e-7, "kl": 3.25e-9}
    log.write_row(row)
    log.write_row(row | {"step": 2})
    content = (tmp_path / "log.csv").read_bytes()
    assert content.count(b"2e-07") == 2 and b"3.25e-09" in content and b"\r" not in content


def rows(**changes) -> list[dict]:
    """Rows of a log. A column is given as a list of values, or as one value for all rows."""
    base = {"reward": 0.5, "length": 30.0, "entropy": 0.2, "unchanged": 0.1, "zero_std_groups": 0.2,
            "skipped": 0}
    steps = max([len(v) for v in changes.values() if isinstance(v, list)], default=20)
    columns = {name: value if isinstance(value, list) else [value] * steps
               for name, value in (base | changes).items()}
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


@pytest.mark.parametrize("column, healthy, broken, said", [
    ("reward", 0.4, 0.3, "the reward is lower"), ("unchanged", 0.3, 0.4, "orders is unchanged"),
    ("zero_std_groups", 0.6, 0.8, "all rewards are equal"),
    ("length", 16.0, 14.0, "length is less than half"), ("length", 59.0, 61.0, "length is more than double"),
    ("entropy", 0.11, 0.09, "entropy is less than half"),
    ("entropy", 0.39, 0.41, "entropy is more than double")])
def test_a_collapse_is_named(column, healthy, broken, said):
    usual = rows()[0][column]
    assert not collapses(rows(**{column: [usual] * 10 + [healthy] * 3}))
    [found] = collapses(rows(**{column: [usual] * 10 + [broken] * 3}))
    assert said in found
    assert not collapses(rows(**{column: [usual] * 4 + [broken] * 3}))  # too few rows to decide
    assert not collapses(rows(**{column: [usual] * 10 + [broken] * 3, "skipped": [0] * 10 + [1] * 3}))
    flat = {"entropy": [float("nan")] + ([0.2] * 12 if column != "entropy" else [usual] * 9 + [broken] * 3)}
    assert collapses(rows(**{column: [usual] * 10 + [broken] * 3} | flat)) == {found}


def test_a_warning_comes_once_also_across_a_resume(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training_log, "collapses",
                        lambda rows: {"the reward is lower"} if len(rows) in (2, 3, 5) else set())
    settings = quick(tmp_path, steps=4)
    train(toy, one_window(), settings, RunFolder(settings))
    warning = "WARNING, a collapse? Compared with the earlier steps the reward is lower."
    assert capsys.readouterr().out.count(warning) == 1
    resumed = dataclasses.replace(settings, steps=6, resume=True)
    train(toy, one_window(), resumed, RunFolder(resumed))
    assert "WARNING" not in capsys.readouterr().out
