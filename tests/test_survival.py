"""Runs that survive: killed at any instant, out of disk, with a save that cannot be read, with a gradient
that is not finite, collapsing. What they end with is compared with an unbroken run, byte for byte."""

import csv
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import grpo
from support.cli import InputError
from support.files import write_instances
from support.run_folder import RunFolder, collapses
from grpo import train
from model import load_agent
from test_grpo import one_window, quick
from toy import toy_agent

ROOT = Path(__file__).resolve().parents[1]
SMALL = "--device cpu --prompt toy --group-size 4 --prompts-per-step 1 --max-new-tokens 6".split()
UNREPEATABLE = ("tokens_per_s", "seconds", "peak_mib")

# Forks a process for each attempt: importing torch twenty times would take minutes.
# argv: model, data, out.
HARNESS = r"""
import json, os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, ROOT)
import torch
torch.set_num_threads(1)
import grpo

model, data, out = sys.argv[1:]
import toy, transformers.models.qwen2.modeling_qwen2  # else each fork imports them: 1 second

def attempt(folder, kill_at=None):
    "A process that goes on with the run; with kill_at it kills itself before that many changes of a name."
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    seen = [0]
    def deadly(function):
        def call(*arguments, **options):
            if seen[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            seen[0] += 1
            return function(*arguments, **options)
        return call
    for name in ("rename", "replace", "symlink", "truncate", "rmdir"):
        setattr(os, name, deadly(getattr(os, name)))
    sys.stdout = sys.stderr = open(os.devnull, "w")
    code = 1
    try:
        code = grpo.main(["--model", model, "--data", data, "--out", folder, "--prompt", "toy", "--resume",
                          "--device", "cpu", "--group-size", "4", "--prompts-per-step", "1", "--sft-steps", "3",
                          "--steps", "4", "--max-new-tokens", "6", "--lr", "1e-3", "--sft-lr", "1e-3",
                          "--save-every", "2", "--samples-every", "2"])
    finally:
        os._exit(code)

def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

started = time.time()
assert ended(attempt(out + "/whole")) == 0
longest, killed, run = time.time() - started, 0, 0
while killed < 20:
    pid = attempt(f"{out}/killed{run}")
    time.sleep(random.uniform(0, 1.1 * longest))
    os.kill(pid, signal.SIGKILL)
    code = ended(pid)
    assert code in (0, -9)
    killed += code < 0
    run += code == 0
assert ended(attempt(f"{out}/killed{run}")) == 0

names, code = 0, -9
while code < 0:
    code = ended(attempt(f"{out}/renamed{names}", names))
    assert code in (0, -9)
    folder = Path(f"{out}/renamed{names}")
    if len(list(folder.glob("saves/*-*"))) > 1:  # one save at least was finished: its links are never away
        step = json.loads((folder / "state/state.json").read_text())["step"]
        checkpoint = (folder / "checkpoint/model.safetensors").resolve(strict=True)
        assert checkpoint.parents[1].name.endswith(f"-{step:06d}")
    if code:
        assert ended(attempt(str(folder))) == 0
    names += 1
print(run + 1, names)
"""


@pytest.fixture
def small_run(tmp_path) -> list[str]:
    """A model folder and a file of instances: what `grpo.py --model` needs."""
    agent = toy_agent(0)
    write_model(agent, tmp_path / "model")
    other = dataclasses.replace(one_window()[0], qid="r", texts=["rain bread", "bee hive honey"], labels=[2, 0])
    write_instances(tmp_path / "data.jsonl", [*one_window(), other])
    return [str(tmp_path / "model"), str(tmp_path / "data.jsonl")]


def contents(run: Path) -> dict:
    """All that a run leaves which must be the same: weights, moments, samples, the log without its times."""
    files = ("samples.txt", "checkpoint/model.safetensors", "state/optimizer.safetensors", "state/state.json")
    found = {name: (run / name).read_bytes() for name in files}
    with open(run / "log.csv") as file:
        found["log"] = [
            {k: v for k, v in row.items() if k not in UNREPEATABLE} for row in csv.DictReader(file)
        ]
    state = json.loads(found["state/state.json"])
    found["state/state.json"] = (
        state["step"],
        state["best"],
        state["samples.txt"],
    )  # a time has more digits or less
    return found


def test_a_run_that_is_killed_ends_as_the_unbroken_one(small_run, tmp_path):
    """SIGKILL at twenty random moments, and once before every change of a name; inside --sft-steps too."""
    script = f"ROOT = {str(ROOT)!r}\n{HARNESS}"
    done = subprocess.run(
        [sys.executable, "-c", script, *small_run, str(tmp_path)],
        text=True,
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    killed, renamed = map(int, done.stdout.split())
    whole = contents(tmp_path / "whole")
    assert len(whole["log"]) == 4 and renamed > 15
    for run in [f"killed{n}" for n in range(killed)] + [f"renamed{n}" for n in range(renamed)]:
        assert contents(tmp_path / run) == whole, run


def saved_steps(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "saves").iterdir())


def test_a_save_that_cannot_be_read_is_named_and_the_one_before_it_used(tmp_path, capsys):
    """Cut short, as a machine that loses power leaves it; the run still ends as the unbroken one."""
    for name in ("whole", "cut"):
        settings = quick(tmp_path, steps=6, save_every=2, reward="random", out=str(tmp_path / name))
        train(toy_agent(0), one_window(), settings, RunFolder(settings))
    assert saved_steps(tmp_path / "cut") == ["grpo-000004", "grpo-000006"]  # --keep 2
    for file in ("optimizer.safetensors", "state.json"):
        path = tmp_path / "cut/saves/grpo-000006/state" / file
        path.write_bytes(path.read_bytes()[:-5])
        resumed = dataclasses.replace(settings, resume=True)
        train(toy_agent(0), one_window(), resumed, RunFolder(resumed))
        said = capsys.readouterr().err
        assert "saves/grpo-000006 cannot be read" in said and said.count("cannot be read") == 1
        assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_save_is_not_deleted_for_a_later_one_that_cannot_be_read(tmp_path):
    settings = quick(tmp_path, steps=6, save_every=3, reward="random")
    train(toy_agent(0), one_window(), settings, RunFolder(settings))
    path = tmp_path / "run/state/optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    again = dataclasses.replace(settings, resume=True, steps=5, save_every=1, keep=1)
    train(toy_agent(0), one_window(), again, RunFolder(again))
    assert (tmp_path / "run/latest").resolve().name == "grpo-000005"
    assert (tmp_path / "run/checkpoint/model.safetensors").exists()


@pytest.mark.parametrize("file", ["state/state.json", "checkpoint/model.safetensors"])
def test_a_save_that_is_damaged_anywhere_is_not_used(toy, tmp_path, capsys, file):
    settings = quick(tmp_path, steps=2, reward="random")
    train(toy, one_window(), settings, RunFolder(settings))
    (tmp_path / "run/saves/grpo-000002" / file).write_text("{}")
    resumed = dataclasses.replace(settings, resume=True)
    train(toy, one_window(), resumed, RunFolder(resumed))
    said = capsys.readouterr()
    assert "saves/grpo-000002 cannot be read" in said.err and "going on from " in said.out
    load_agent(str(tmp_path / "run/checkpoint"), "cpu")
    for n in (1, 2):
        (tmp_path / f"run/saves/grpo-00000{n}" / file).write_text("{}")
    log = (tmp_path / "run/log.csv").read_text()
    with pytest.raises(InputError, match="--resume: none of .*/saves/grpo-. can be read"):
        train(toy, one_window(), resumed, RunFolder(resumed))
    assert (tmp_path / "run/log.csv").read_text() == log  # nothing of it is lost


def test_another_process_that_trains_in_the_folder_is_not_joined(tmp_path):
    settings = quick(tmp_path)
    claimed = RunFolder(settings)
    code = (f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]; import grpo, toy\n"
            f"try: grpo.RunFolder(toy_settings(out={settings.out!r}))\n"
            "except grpo.InputError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{claimed.path}: another process is training there\n"


def test_resuming_where_nothing_has_been_saved_starts_from_the_beginning_and_says_so(toy, tmp_path, capsys):
    settings = quick(tmp_path, resume=True)
    train(toy, one_window(), settings, RunFolder(settings))
    assert f"nothing has been saved in {tmp_path / 'run'} yet" in capsys.readouterr().out
    assert len((tmp_path / "run/log.csv").read_text().splitlines()) == 3
    RunFolder(settings)
    assert "nothing has been saved" not in capsys.readouterr().out


def test_an_earlier_run_is_moved_aside_and_never_deleted(toy, tmp_path, capsys):
    for n in range(3):
        settings = quick(tmp_path, steps=1, seed=n)
        train(toy, one_window(), settings, RunFolder(settings))
    assert capsys.readouterr().out.count("held an earlier run, which is now") == 2
    seeds = [
        json.loads((tmp_path / name / "config.json").read_text())["seed"]
        for name in ("run.1", "run.2", "run")
    ]
    assert seeds == [0, 1, 2] and load_agent(str(tmp_path / "run.1/checkpoint"), "cpu")


def test_ctrl_c_between_the_update_and_its_log_saves_no_step_that_the_log_lacks(tmp_path, monkeypatch):
    settings = quick(tmp_path, steps=5, save_every=2, reward="random", out=str(tmp_path / "whole"))
    train(toy_agent(0), one_window(), settings, RunFolder(settings))

    def interrupted(*_):
        raise KeyboardInterrupt

    settings = dataclasses.replace(settings, out=str(tmp_path / "broken"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        honest = RunFolder.log
        patch.setattr(
            RunFolder, "log", lambda self, row: interrupted() if row["step"] == 4 else honest(self, row)
        )
        train(toy_agent(0), one_window(), settings, RunFolder(settings))
    assert json.loads((tmp_path / "broken/state/state.json").read_text())["step"] == 2  # weights were of 4
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.AdamW, "step", interrupted)  # some weights are of step 3, others not yet
        resumed = dataclasses.replace(settings, resume=True)
        train(toy_agent(0), one_window(), resumed, RunFolder(resumed))
    train(toy_agent(0), one_window(), resumed, RunFolder(resumed))
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def nan_at(*steps):
    """A loss that is not a number in these steps (of one micro-batch each)."""
    calls = []

    def loss(logps, reference, advantages, lengths, beta):
        calls.append(None)
        return (
            logps.sum() * float("nan")
            if len(calls) in steps
            else grpo.grpo_loss(logps, reference, advantages, lengths, beta)
        )

    return loss


def test_one_bad_gradient_skips_the_update_and_keeps_its_rollouts(toy, tmp_path, capsys):
    settings = quick(tmp_path, reward="random", steps=3)
    before = [p.detach().clone() for p in toy.model.parameters()]
    train(toy, one_window(), dataclasses.replace(settings, steps=1), RunFolder(settings), loss=nan_at(1))
    assert all(map(torch.equal, before, toy.model.parameters()))
    resumed = dataclasses.replace(settings, resume=True)
    train(toy, one_window(), resumed, RunFolder(resumed))
    assert not all(map(torch.equal, before, toy.model.parameters()))
    assert all(p.isfinite().all() for p in toy.model.parameters())
    log = list(csv.DictReader(open(tmp_path / "run/log.csv")))
    assert [row["skipped"] for row in log] == ["1", "0", "0"] and log[0]["loss"] == "nan"
    printed = capsys.readouterr().out
    assert "step    1  " in printed and "SKIPPED: loss nan" in printed
    skipped = (tmp_path / "run/skipped.txt").read_text()
    entries = re.findall(r"--- step (\d+), query q: .*\n.*\n    reward (\S+), .* (\d+) tokens\n", skipped)
    rewards = torch.rand((1, 8), generator=torch.Generator().manual_seed(1))[0].tolist()  # --reward random's
    assert [(step, reward) for step, reward, _ in entries] == [("1", f"{r:+.3f}") for r in rewards]
    assert all(0 < int(length) <= 12 for *_, length in entries)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_norm_that_is_not_finite_skips_too(toy, tmp_path, bad):
    """The loss is a number, a gradient is none."""

    class Bad(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x.clone())
        backward = staticmethod(lambda ctx, grad: grad * bad)

    settings = quick(tmp_path, reward="random", steps=1)
    before = [p.detach().clone() for p in toy.model.parameters()]
    train(
        toy,
        one_window(),
        settings,
        RunFolder(settings),
        loss=lambda logps, *_: Bad.apply(logps).mean() * 0 + 1,
    )
    [row] = csv.DictReader(open(tmp_path / "run/log.csv"))
    assert row["skipped"] == "1" and row["grad_norm"] == "nan" and row["loss"] == "1"
    assert all(map(torch.equal, before, toy.model.parameters()))


def test_a_loss_that_is_not_finite_skips_though_its_gradient_is(toy, tmp_path):
    settings = quick(tmp_path, reward="random", steps=1)
    before = [p.detach().clone() for p in toy.model.parameters()]
    train(toy, one_window(), settings, RunFolder(settings), loss=lambda logps, *_: logps.mean() + float("inf"))
    [row] = csv.DictReader(open(tmp_path / "run/log.csv"))
    assert (row["skipped"], row["loss"]) == ("1", "inf") and 0 < float(row["grad_norm"]) < float("inf")
    assert all(map(torch.equal, before, toy.model.parameters()))


def test_three_bad_gradients_in_a_row_stop_the_run_also_across_a_resume(toy, tmp_path):
    settings = quick(tmp_path, reward="random", steps=9)
    with pytest.raises(SystemExit, match="step 5: the third update in a row"):
        train(toy, one_window(), settings, RunFolder(settings), loss=nan_at(1, 3, 4, 5))
    again = quick(tmp_path, reward="random", steps=2, out=str(tmp_path / "b"))
    train(toy, one_window(), again, RunFolder(again), loss=nan_at(1, 2))
    again = dataclasses.replace(again, steps=9, resume=True)
    with pytest.raises(SystemExit, match="step 3: the third update in a row"):
        train(toy, one_window(), again, RunFolder(again), loss=nan_at(1))


def test_a_ruined_policy_stops_the_run_and_is_never_saved(toy, tmp_path):
    """Weights can overflow in an update whose gradient was finite. Then all answers are alike and flat."""
    settings = quick(tmp_path, reward="random", steps=20, save_every=2)
    train(toy, one_window(), dataclasses.replace(settings, steps=2), RunFolder(settings))
    with pytest.raises(SystemExit, match="not finite"):
        ruined = dataclasses.replace(settings, resume=True, lr=1e38, warmup=0, decay=False)
        train(toy, one_window(), ruined, RunFolder(ruined))
    assert len((tmp_path / "run/log.csv").read_text().splitlines()) < 9
    assert saved_steps(tmp_path / "run") == ["grpo-000002"]


def test_a_supervised_step_that_is_not_finite_is_skipped_and_the_third_stops_the_run(toy, monkeypatch):
    answer, honest, bad = ([5, 6], [7, 1]), grpo.microbatches, iter([True, False, True, True, False])

    def poisoned(*arguments, **options):
        for batch in honest(*arguments, **options):
            batch.logps = batch.logps * (float("nan") if next(bad) else 1.0)
            yield batch

    monkeypatch.setattr(grpo, "microbatches", poisoned)
    settings = grpo.TrainSettings(microbatch_tokens=64, checkpointing=False)
    grpo.supervised(toy, iter([[answer]] * 5), 5, 1e-3, settings)
    assert all(p.isfinite().all() for p in toy.model.parameters())
    bad = iter([True] * 3)
    with pytest.raises(SystemExit, match="supervised, step 3: the third in a row"):
        grpo.supervised(toy, iter([[answer]] * 5), 5, 1e-3, settings)


def test_a_full_disk_is_one_line_and_the_save_before_it_stays(small_run, tmp_path):
    """ulimit -f limits the size of a file, in KiB."""
    options = ["--model", small_run[0], "--data", small_run[1], "--out", str(tmp_path / "run"), *SMALL]
    assert grpo.main([*options, "--steps", "1"]) == 0
    before = contents(tmp_path / "run")
    command = shlex.join([sys.executable, str(ROOT / "grpo.py"), *options, "--steps", "2", "--resume"])
    done = subprocess.run(["bash", "-c", f"ulimit -f 900; {command}"], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"grpo.py: {tmp_path}/run/saves/grpo-000002 cannot be written")
    assert saved_steps(tmp_path / "run") == ["grpo-000001"]
    after, grown = contents(tmp_path / "run"), {"log", "samples.txt"}
    assert all(after[name] == before[name] for name in before.keys() - grown)


def rows(**changes) -> list[dict]:
    """A log's rows: columns are lists of values, or one value."""
    base = {"reward": 0.5, "length": 30.0, "entropy": 0.2, "unchanged": 0.1, "zero_std_groups": 0.2, "skipped": 0}
    steps = max([len(v) for v in changes.values() if isinstance(v, list)], default=20)
    columns = {
        name: value if isinstance(value, list) else [value] * steps
        for name, value in (base | changes).items()
    }
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


@pytest.mark.parametrize(
    "column, healthy, broken, said",
    [
        ("reward", 0.4, 0.3, "the reward is lower"),
        ("unchanged", 0.3, 0.4, "orders is unchanged"),
        ("zero_std_groups", 0.6, 0.8, "are flat"),
        ("length", 16.0, 14.0, "length is less than half"),
        ("length", 59.0, 61.0, "length is more than double"),
        ("entropy", 0.11, 0.09, "entropy is less than half"),
        ("entropy", 0.39, 0.41, "entropy is more than double"),
    ],
)
def test_a_collapse_is_named(column, healthy, broken, said):
    usual = rows()[0][column]
    assert not collapses(rows(**{column: [usual] * 10 + [healthy] * 3}))
    [found] = collapses(rows(**{column: [usual] * 10 + [broken] * 3}))
    assert said in found
    assert not collapses(rows(**{column: [usual] * 4 + [broken] * 3}))  # too early to say
    assert not collapses(rows(**{column: [usual] * 10 + [broken] * 3, "skipped": [0] * 10 + [1] * 3}))
    flat = {"entropy": [float("nan")] + ([0.2] * 12 if column != "entropy" else [usual] * 9 + [broken] * 3)}
    assert collapses(rows(**{column: [usual] * 10 + [broken] * 3} | flat)) == {found}


def test_a_warning_comes_once_also_across_a_resume(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        grpo, "collapses", lambda rows: {"the reward is lower"} if len(rows) in (2, 3, 5) else set()
    )
    settings = quick(tmp_path, steps=4)
    train(toy, one_window(), settings, RunFolder(settings))
    assert (
        capsys.readouterr().out.count(
            "WARNING, a collapse? Compared with the earlier steps the reward is lower."
        )
        == 1
    )
    resumed = dataclasses.replace(settings, steps=6, resume=True)
    train(toy, one_window(), resumed, RunFolder(resumed))
    assert "WARNING" not in capsys.readouterr().out


def test_the_log_says_how_far_the_sampler_is_from_the_trainer(toy, tmp_path, monkeypatch):
    """Zero but for rounding in float32; and what it says is what was put there."""
    settings = quick(tmp_path, reward="random", steps=1)
    train(toy, one_window(), settings, RunFolder(settings))
    [row] = csv.DictReader(open(tmp_path / "run/log.csv"))
    assert 0 < float(row["logp_diff"]) <= float(row["logp_diff_max"]) < 1e-5
    honest = grpo.sample

    def shifted(*arguments):
        groups = honest(*arguments)
        groups[0][0].logps[0] -= 0.5
        return groups

    monkeypatch.setattr(grpo, "sample", shifted)
    again = quick(tmp_path, reward="random", steps=1, out=str(tmp_path / "b"))
    train(toy, one_window(), again, RunFolder(again))
    [row] = csv.DictReader(open(tmp_path / "b/log.csv"))
    assert float(row["logp_diff_max"]) == pytest.approx(0.5, abs=0.01)  # the policy moved a little before
    tokens = float(row["length"]) * 8
    assert float(row["logp_diff"]) == pytest.approx(0.5 / tokens, rel=0.1)


TERMINATED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import grpo
honest = grpo.grpo_step
def step(*arguments, **hooks):
    if arguments[-1] == 3:  # the job is told to stop in the middle of its third step
        os.kill(os.getpid(), signal.SIGTERM)
    return honest(*arguments, **hooks)
grpo.grpo_step = step
grpo.run_main(lambda: grpo.main(sys.argv[1:]))
"""


def test_a_job_that_is_told_to_stop_saves_first(small_run, tmp_path):
    options = ["--model", small_run[0], "--data", small_run[1], "--out", str(tmp_path / "run"), *SMALL]
    command = [sys.executable, "-c", TERMINATED.format(root=str(ROOT)), *options, "--steps", "9"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 130 and "step 2 is saved; go on with --resume" in done.stderr
    assert "Traceback" not in done.stderr and saved_steps(tmp_path / "run") == ["grpo-000002"]
