"""The run folder: runs that are killed, fill the disk, find a damaged save, or collapse.

Their results are compared byte for byte with those of an uninterrupted run.
"""

import csv
import dataclasses
import errno
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import one_window, quick

import grpo
from grpo import train
from model import load_agent
from support import run_folder
from support.checkpoint import write_model
from support.cli import InputError, run_main
from support.files import write_candidates, write_instances, write_qrels
from support.lora import add_lora
from support.optimizer import MasterAdamW
from support.run_folder import RunFolder
from support.training_log import TrainingLog
from toy import toy_agent, toy_task


ROOT = Path(__file__).resolve().parents[1]
SMALL = "--device cpu --prompt toy --group-size 4 --prompts-per-step 1 --max-new-tokens 6".split()
EVAL = ("eval_ndcg", "eval_low", "eval_high")
UNREPEATABLE = ("tokens_per_s", "seconds", "peak_mib")

# A script that forks a process per attempt: importing torch twenty times would take minutes.
# argv: the folder of model, data, held-out queries and runs; "yes" or "no": does the disk support links.
# The model is loaded once, and every process gets a copy of it.
HARNESS = r"""
import errno, itertools, os, random, shutil, signal, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, ROOT)
import torch
torch.set_num_threads(1)
import grpo, toy, transformers.models.qwen2.modeling_qwen2  # importing them takes a second
from model import load_agent, load_config

out, links = sys.argv[1:]
config, agent = load_config(out + "/model"), load_agent(out + "/model", "cpu")
grpo.load_config, grpo.load_agent = lambda *_: config, lambda *_: agent
CHANGES = [(os, name) for name in ("rename", "replace", "link", "symlink", "truncate", "rmdir", "mkdir")]
CHANGES.append((shutil, "copyfile"))

def refused(*_, **__):
    raise OSError(errno.EPERM, "this disk has no links")

def attempt(folder, copied=False):
    # Fork a process that resumes the run. With `copied` it copies the folder to renamed0, renamed1, ...
    # before every operation of CHANGES. Each copy is the folder that a kill at this moment would leave.
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    if links == "no":
        os.link = os.symlink = refused
    number = itertools.count()
    def watched(function):
        def call(*arguments, **options):
            if function.__name__ == "copyfile":  # as if half done
                Path(arguments[1]).write_bytes(Path(arguments[0]).read_bytes()[:100])
            if os.path.exists(folder):
                subprocess.run(["cp", "-a", folder, f"{out}/renamed{next(number)}"], check=True)
            return function(*arguments, **options)
        return call
    for module, name in CHANGES if copied else ():
        setattr(module, name, watched(getattr(module, name)))
    sys.stdout = sys.stderr = open(os.devnull, "w")
    code = 1
    try:
        code = grpo.main(["--model", out + "/model", "--data", out + "/data.jsonl", "--eval-data",
                          out + "/held.jsonl", "--eval-qrels", out + "/held.qrels", "--eval-every", "2",
                          "--out", folder, "--prompt", "toy", "--resume", "--device", "cpu", "--group-size",
                          "4", "--prompts-per-step", "1", "--sft-steps", "3", "--steps", "4",
                          "--max-new-tokens", "6", "--lr", "1e-3", "--sft-lr", "1e-3", "--save-every", "2",
                          "--samples-every", "2", "--keep", "2" if links == "yes" else "1"])
    finally:
        os._exit(code)

def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def check(folder, load=False):
    "checkpoint/ must equal one of the last two saves, best/ a validated one. Returns 0 if it is too early."
    names = [f"{phase}-{step:06d}" for phase, steps in (("sft", (2, 3)), ("grpo", (2, 4))) for step in steps]
    saves = [Path(folder, "saves", name) for name in names if Path(folder, "saves", name).exists()]
    if not saves or saves[-1].name == names[0]:
        return 0  # the very first save may not be in checkpoint/ yet
    expected = {"checkpoint": saves[-2:]}
    if saves[-1].name == names[3]:
        expected["best"] = saves
    for name, among in expected.items():
        for file in saves[-1].glob("checkpoint/*"):  # every file of a checkpoint
            copies = [save / "checkpoint" / file.name for save in among]
            shown = Path(folder, name, file.name).read_bytes()
            assert shown in [copy.read_bytes() for copy in copies if copy.exists()], file
        content = {file.name: file.read_bytes() for file in Path(folder, name).iterdir()}
        if load and content not in loaded:
            load_agent(f"{folder}/{name}", "cpu")
            loaded.append(content)
    return 1

loaded = []  # contents of folders that load_agent has read
assert ended(attempt(out + "/whole")) == 0 and check(out + "/whole", load=True)
started = time.time()
assert ended(attempt(out + "/again")) == 0
longest, killed, run, checked = time.time() - started, 0, 0, 0
while killed < 20:
    pid = attempt(f"{out}/killed{run}")
    time.sleep(random.uniform(0, 1.1 * longest))
    os.kill(pid, signal.SIGKILL)
    code = ended(pid)
    assert code in (0, -9)
    checked += check(f"{out}/killed{run}", load=True)
    killed += code < 0
    run += code == 0
assert ended(attempt(f"{out}/killed{run}")) == 0

assert ended(attempt(out + "/watched", copied=True)) == 0
names = len(list(Path(out).glob("renamed*")))
for n in range(names):
    checked += check(f"{out}/renamed{n}")
    assert ended(attempt(f"{out}/renamed{n}")) == 0
print(run + 1, names, checked)
"""


def write_small_run(folder: Path) -> None:
    """Write a model folder and a file of instances for `grpo.py --model`."""
    write_model(toy_agent(0), folder / "model")
    other = dataclasses.replace(one_window()[0], qid="r", texts=["rain bread", "bee hive honey"],
                                labels=[2, 0])
    write_instances(folder / "data.jsonl", [*one_window(), other])


@pytest.fixture
def small_run(tmp_path) -> list[str]:
    write_small_run(tmp_path)
    return [str(tmp_path / "model"), str(tmp_path / "data.jsonl")]


def newest(run: Path) -> Path:
    """The folder of GRPO's newest save."""
    return max(run.glob("saves/grpo-*"))


def contents(run: Path) -> dict:
    """A run's reproducible results: weights, optimizer moments, samples, and the log without its times."""
    shown = [run / name / "model.safetensors" for name in ("checkpoint", "best")]
    files = [run / "samples.txt", *shown, newest(run) / "checkpoint/model.safetensors",
             newest(run) / "state/optimizer.safetensors"]
    found = {str(file.relative_to(run)): file.read_bytes() for file in files if file.exists()}
    with open(run / "log.csv") as file:
        found["log"] = [
            {k: v for k, v in row.items() if k not in UNREPEATABLE} for row in csv.DictReader(file)
        ]
    state = json.loads((newest(run) / "state/state.json").read_text())
    del state["log.csv"]  # its size varies with the digits of times
    return found | {"state": state}


def everything(path: Path) -> dict:
    """{path: (link target or content, time of change)} of everything below a folder."""
    found = {}
    for file in sorted(path.rglob("*")):
        content = os.readlink(file) if file.is_symlink() else file.read_bytes() if file.is_file() else None
        found[str(file.relative_to(path))] = content, file.lstat().st_mtime_ns
    return found


def kill_runs(folder: Path, links: str) -> list[str]:
    write_small_run(folder)
    candidates, qrels = toy_task(2, 5, seed=3, held_out=True)
    write_candidates(folder / "held.jsonl", candidates)
    write_qrels(folder / "held.qrels", qrels)
    return [sys.executable, "-c", f"ROOT = {str(ROOT)!r}\n{HARNESS}", str(folder), links]


@pytest.mark.beside(command=kill_runs)
@pytest.mark.parametrize("links", ["yes", "no"])
def test_a_run_that_is_killed_ends_as_the_unbroken_one(beside, links):
    """Kill a run at twenty random moments, and before every file operation (rename, link, ...), also in SFT.

    The disk has hard links, or no links at all. Kills before file operations are simulated: one run copies
    its folder before each operation, and each copy is resumed. Separate runs would take minutes.
    """
    assert beside.returncode == 0, beside.stderr
    killed, renamed, checked = map(int, beside.stdout.split())
    whole = contents(beside.folder / "whole")
    assert len(whole["log"]) == 4 and renamed > 60 and checked > 50
    weights = "checkpoint/model.safetensors"
    assert whole[weights] == whole[f"saves/grpo-000004/{weights}"]
    assert "best/model.safetensors" in whole
    for run in [f"killed{n}" for n in range(killed)] + [f"renamed{n}" for n in range(renamed)]:
        assert contents(beside.folder / run) == whole, run
        assert not [p for p in (beside.folder / run).rglob("*") if p.is_symlink() or p.suffix == ".new"]


# --- resuming


def test_a_resumed_run_ends_as_the_unbroken_one(tmp_path):
    instances = one_window() * 3

    def run(folder, steps, resume=False):
        settings = quick(tmp_path, reward="random", steps=steps, resume=resume, decay=False)
        settings.out, agent = str(tmp_path / folder), toy_agent(0)
        train(agent, instances, settings, RunFolder(settings))
        return agent.model

    whole = run("a", 4)
    run("b", 2)
    again = run("b", 4, resume=True)  # given the untrained model: the save has the weights
    for a, b in zip(whole.parameters(), again.parameters()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert [r["step"] for r in csv.DictReader(open(tmp_path / "b/log.csv"))] == ["1", "2", "3", "4"]


def test_ctrl_c_leaves_a_checkpoint_and_a_log(toy, tmp_path, monkeypatch):
    honest = grpo.grpo_step
    def interrupted(*arguments, **hooks):
        if arguments[-1] == 2:
            raise KeyboardInterrupt
        return honest(*arguments, **hooks)
    monkeypatch.setattr(grpo, "grpo_step", interrupted)
    settings = quick(tmp_path, steps=9, save_every=100)
    with pytest.raises(KeyboardInterrupt):
        train(toy, one_window(), settings, RunFolder(settings))
    assert json.loads((newest(tmp_path / "run") / "state/state.json").read_text())["step"] == 1
    assert len((tmp_path / "run/log.csv").read_text().splitlines()) == 2
    load_agent(str(tmp_path / "run/checkpoint"), "cpu")


def test_ctrl_c_between_the_update_and_its_log_saves_no_step_that_the_log_lacks(tmp_path, monkeypatch):
    settings = quick(tmp_path, steps=5, save_every=2, reward="random", out=str(tmp_path / "whole"))
    train(toy_agent(0), one_window(), settings, RunFolder(settings))

    def interrupted(*_):
        raise KeyboardInterrupt

    settings = dataclasses.replace(settings, out=str(tmp_path / "broken"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        honest = TrainingLog.add
        patch.setattr(TrainingLog, "add", lambda self, row, rollouts: interrupted() if row["step"] == 4
                      else honest(self, row, rollouts))
        train(toy_agent(0), one_window(), settings, RunFolder(settings))
    assert saved_steps(tmp_path / "broken") == ["grpo-000002"]  # not 4: its row is not in the log
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.AdamW, "step", interrupted)  # weights are partly updated
        resumed = dataclasses.replace(settings, resume=True)
        train(toy_agent(0), one_window(), resumed, RunFolder(resumed))
    train(toy_agent(0), one_window(), resumed, RunFolder(resumed))
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


TERMINATED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import grpo
honest = grpo.grpo_step
def step(*arguments, **hooks):
    if arguments[-1] == 3:  # SIGTERM arrives in the middle of the third step
        os.kill(os.getpid(), signal.SIGTERM)
    return honest(*arguments, **hooks)
grpo.grpo_step = step
grpo.run_main(lambda: grpo.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_job_that_is_told_to_stop_saves_first(small_run, tmp_path):
    options = ["--model", small_run[0], "--data", small_run[1], "--out", str(tmp_path / "run"), *SMALL]
    command = [sys.executable, "-c", TERMINATED.format(root=str(ROOT)), *options, "--steps", "9"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 130 and "step 2 is saved; go on with --resume" in done.stderr
    assert "Traceback" not in done.stderr and saved_steps(tmp_path / "run") == ["grpo-000002"]


GUARDED = {"model": "other", "seed": 1, "prompts_per_step": 2, "group_size": 4, "reward": "absolute",
           "prompt": "rearank", "window": 7, "draws": 3, "order": "shuffled", "keep_draws": "all",
           "min_ndcg": 0.2, "sft_steps": 1, "sft_lr": 1e-9, "lora_rank": 2, "teacher_graded": 0.5,
           "eval_queries": 9, "eval_seed": 3}


@pytest.mark.parametrize("name", list(GUARDED))
def test_a_run_is_not_resumed_with_a_setting_that_makes_it_another_run(toy, tmp_path, name):
    settings = quick(tmp_path)
    train(toy, one_window(), settings, RunFolder(settings))
    with pytest.raises(InputError, match=f"--resume: .* was begun with --{name.replace('_', '-')} "):
        RunFolder(dataclasses.replace(settings, resume=True, **{name: GUARDED[name]}))


def test_a_setting_that_may_change_at_a_resume_is_reported(toy, tmp_path, capsys):
    settings = quick(tmp_path, steps=1)
    train(toy, one_window(), settings, RunFolder(settings))
    assert "from here on" not in capsys.readouterr().out
    RunFolder(dataclasses.replace(settings, resume=True, updates=2, lr=1e-9))
    said = capsys.readouterr().out
    assert "--resume: --updates is 2 from here on, and was 1" in said and "--lr is 1e-09 from here on" in said


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
    seeds = [json.loads((tmp_path / name / "config.json").read_text())["seed"]
             for name in ("run.1", "run.2", "run")]
    assert seeds == [0, 1, 2] and load_agent(str(tmp_path / "run.1/checkpoint"), "cpu")


@pytest.mark.slow
def test_another_process_that_trains_in_the_folder_is_not_joined(tmp_path):
    settings = quick(tmp_path)
    claimed = RunFolder(settings)
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import grpo\n"
            f"try: grpo.RunFolder(grpo.TrainSettings(out={settings.out!r}))\n"
            "except grpo.InputError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{claimed.path}: another process is training there\n"


# --- saves


def saved_steps(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "saves").iterdir())


def test_a_save_that_cannot_be_read_is_named_and_the_one_before_it_used(tmp_path, capsys):
    """The save is cut short, as after a power failure. The run still ends like an uninterrupted one."""
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


def test_ranks_that_do_not_read_the_same_save_do_not_go_on(toy, tmp_path, monkeypatch):
    """This can happen if every rank has its own disk and one disk has lost the newest save."""
    settings = quick(tmp_path)
    train(toy, one_window(), settings, RunFolder(settings))
    again = RunFolder(dataclasses.replace(settings, resume=True))
    monkeypatch.setattr(run_folder, "gather", lambda steps: [*steps, 1])
    with pytest.raises(InputError, match="--resume: the ranks do not read the same save in "):
        again.load(MasterAdamW(toy.model.parameters()), "grpo")


def test_a_save_is_not_deleted_for_a_later_one_that_cannot_be_read(tmp_path):
    settings = quick(tmp_path, steps=6, save_every=3, reward="random")
    train(toy_agent(0), one_window(), settings, RunFolder(settings))
    path = tmp_path / "run/saves/grpo-000006/state/optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    again = dataclasses.replace(settings, resume=True, steps=5, save_every=1, keep=1)
    train(toy_agent(0), one_window(), again, RunFolder(again))
    assert saved_steps(tmp_path / "run") == ["grpo-000005", "grpo-000006"]
    shown, saved = (tmp_path / "run" / name / "model.safetensors"
                    for name in ("checkpoint", "saves/grpo-000005/checkpoint"))
    assert shown.read_bytes() == saved.read_bytes()


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
    assert (tmp_path / "run/log.csv").read_text() == log  # the log keeps all its rows


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_save_before_it_stays(small_run, tmp_path):
    """`ulimit -f` simulates the full disk: it limits the size of a file, in KiB."""
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


def test_a_ruined_policy_stops_the_run_and_is_never_saved(toy, tmp_path):
    """Weights can overflow in an update whose gradient was finite. The run must notice it before it saves."""
    settings = quick(tmp_path, reward="random", steps=20, save_every=2)
    train(toy, one_window(), dataclasses.replace(settings, steps=2), RunFolder(settings))
    with pytest.raises(SystemExit, match="not finite"):
        ruined = dataclasses.replace(settings, resume=True, lr=1e38, warmup=0, decay=False)
        train(toy, one_window(), ruined, RunFolder(ruined))
    assert len((tmp_path / "run/log.csv").read_text().splitlines()) < 9
    assert saved_steps(tmp_path / "run") == ["grpo-000002"]


def test_the_best_policy_on_held_out_queries_is_kept_and_logged(toy, tmp_path, monkeypatch):
    scores = iter([0.5, 0.7, 0.6])
    monkeypatch.setattr(grpo, "validate", lambda *_: dict.fromkeys(EVAL, next(scores)))
    settings = quick(tmp_path, steps=6, eval_every=2, save_every=100, keep=1)
    train(toy, one_window(), settings, RunFolder(settings), held_out=toy_task(2, 3, 0, held_out=True))
    log = list(csv.DictReader(open(tmp_path / "run/log.csv")))
    assert [row["eval_ndcg"] for row in log] == ["", "0.5", "", "0.7", "", "0.6"]
    assert sorted(p.name for p in (tmp_path / "run/saves").iterdir()) == ["grpo-000004", "grpo-000006"]
    for file in (tmp_path / "run/saves/grpo-000004/checkpoint").iterdir():
        assert os.path.samefile(file, tmp_path / "run/best" / file.name)
    load_agent(str(tmp_path / "run/best"), "cpu")
    state = json.loads((newest(tmp_path / "run") / "state/state.json").read_text())
    assert (state["step"], state["best"], state["best_step"]) == (6, 0.7, 4)


def test_the_best_policy_survives_a_worse_validation_after_a_resume(toy, tmp_path, monkeypatch):
    scores = iter([0.7, 0.6, 0.65])
    monkeypatch.setattr(grpo, "validate", lambda *_: dict.fromkeys(EVAL, next(scores)))
    held_out = toy_task(2, 3, 0, held_out=True)
    settings = quick(tmp_path, steps=2, eval_every=2, save_every=1, keep=1, reward="random")
    train(toy, one_window(), settings, RunFolder(settings), held_out=held_out)
    best = (tmp_path / "run/best/model.safetensors").read_bytes()
    resumed = dataclasses.replace(settings, steps=6, resume=True)
    train(toy, one_window(), resumed, RunFolder(resumed), held_out=held_out)
    assert (tmp_path / "run/best/model.safetensors").read_bytes() == best
    assert (tmp_path / "run/checkpoint/model.safetensors").read_bytes() != best
    state = json.loads((newest(tmp_path / "run") / "state/state.json").read_text())
    assert (state["step"], state["best"], state["best_step"]) == (6, 0.7, 2)


# --- the folders checkpoint/, adapter/ and best/


def test_what_is_shown_are_real_folders_of_hard_links_into_a_save_and_nothing_else_is_left(toy, tmp_path,
                                                                                          monkeypatch):
    # All validations give the same NDCG, so the first one stays the best.
    monkeypatch.setattr(grpo, "validate", lambda *_: dict.fromkeys(EVAL, 0.5))
    settings = quick(tmp_path, steps=3, eval_every=1, lora_rank=2, reward="random")
    add_lora(toy.model, 2)
    train(toy, one_window(), settings, RunFolder(settings), held_out=toy_task(2, 3, 0, held_out=True))
    run, shown = tmp_path / "run", {"checkpoint": "grpo-000003/checkpoint", "adapter": "grpo-000003/adapter",
                                    "best": "grpo-000001/checkpoint"}
    for name, save in shown.items():
        files = sorted((run / "saves" / save).iterdir())
        assert [p.name for p in sorted((run / name).iterdir())] == [p.name for p in files] and files
        assert all(os.path.samefile(file, run / name / file.name) for file in files)
    assert not [p for p in run.rglob("*") if p.is_symlink()]
    others = {".lock", "config.json", "log.csv", "samples.txt", "saves"}
    assert {p.name for p in run.iterdir()} == {*others, *shown}


def no_links(monkeypatch):
    def refused(*_, **__):
        raise OSError(errno.EPERM, "this disk has no links")

    monkeypatch.setattr(os, "link", refused)
    monkeypatch.setattr(os, "symlink", refused)


def test_without_links_a_run_trains_and_resumes_to_the_same_files(tmp_path, monkeypatch):
    held_out, scores = toy_task(2, 3, 0, held_out=True), {1: 0.5, 2: 0.7, 3: 0.6, 4: 0.65}

    def run(name, steps, resume=False):
        settings = quick(tmp_path, steps=steps, resume=resume, eval_every=1, samples_every=1, reward="random",
                         decay=False, lora_rank=2, out=str(tmp_path / name))
        agent, folder = toy_agent(0), RunFolder(settings)
        add_lora(agent.model, 2)
        step = iter(range(1 + 2 * resume, 5))
        monkeypatch.setattr(grpo, "validate", lambda *_: dict.fromkeys(EVAL, scores[next(step)]))
        train(agent, one_window(), settings, folder, held_out=held_out)

    run("linked", 4)
    no_links(monkeypatch)
    run("copied", 2)
    run("copied", 4, resume=True)
    assert contents(tmp_path / "copied") == contents(tmp_path / "linked")
    for name in ("checkpoint", "adapter", "best"):
        linked, copied = (sorted((tmp_path / run / name).iterdir()) for run in ("linked", "copied"))
        assert [p.name for p in linked] == [p.name for p in copied] and linked
        assert all(p.stat().st_nlink == 1 for p in copied)
        for a, b in zip(linked, copied):
            assert a.name == "adapter_config.json" or a.read_bytes() == b.read_bytes()


def test_a_refused_replace_is_a_warning_and_the_save_stands(toy, tmp_path, monkeypatch, capsys):
    """Windows does not replace a file that another program has open."""
    settings = quick(tmp_path, steps=1, reward="random")
    train(toy, one_window(), settings, RunFolder(settings))
    weights = tmp_path / "run/checkpoint/model.safetensors"
    before, honest = weights.read_bytes(), os.replace

    def refused(source, target):
        if Path(target) == weights:
            raise PermissionError(errno.EACCES, "it is open")
        honest(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refused)
        again = dataclasses.replace(settings, steps=3, resume=True)
        train(toy, one_window(), again, RunFolder(again))
    warnings = [line for line in capsys.readouterr().err.splitlines() if "could not be replaced" in line]
    assert len(warnings) == 3 and all(line.startswith(f"{weights} ") for line in warnings)  # resume, 2 saves
    assert saved_steps(tmp_path / "run") == ["grpo-000002", "grpo-000003"]
    assert weights.read_bytes() == before and not list((tmp_path / "run").glob(".*.new"))
    train(toy, one_window(), again, RunFolder(again))
    assert weights.read_bytes() == (newest(tmp_path / "run") / "checkpoint/model.safetensors").read_bytes()


def test_a_resume_shows_the_newest_phase_alone_and_only_after_it_was_read(toy, tmp_path):
    settings, run = quick(tmp_path, steps=2, reward="random"), tmp_path / "run"
    folder, lesson = RunFolder(settings), [([5, 6], [7, 1])]
    grpo.supervised(toy, iter([lesson] * 2), 2, 1e-3, settings, folder=folder)
    supervised = (run / "saves/sft-000002/checkpoint/model.safetensors").read_bytes()
    shown = run / "checkpoint/model.safetensors"
    assert shown.read_bytes() == supervised
    train(toy, one_window(), settings, folder)
    trained = shown.read_bytes()
    assert trained != supervised
    again = RunFolder(dataclasses.replace(settings, resume=True))
    with run_folder.Phase(again, "sft", toy, MasterAdamW(toy.model.parameters())) as phase:
        assert phase.step == 2 and shown.read_bytes() == trained
    shown.unlink()
    with run_folder.Phase(again, "grpo", toy, MasterAdamW(toy.model.parameters())):
        assert shown.read_bytes() == trained
    for save in run.glob("saves/grpo-*"):
        (save / "state/state.json").write_text("{}")
    shown.write_bytes(b"as it was")
    with pytest.raises(InputError, match="none of"):
        run_folder.Phase(again, "grpo", toy, MasterAdamW(toy.model.parameters()))
    assert shown.read_bytes() == b"as it was"


def test_a_resume_shows_the_best_save_too(toy, tmp_path, monkeypatch):
    """A run may be killed after it has saved its best policy and before best/ is updated."""
    monkeypatch.setattr(grpo, "validate", lambda *_: dict.fromkeys(EVAL, 0.5))
    settings, held_out = quick(tmp_path, steps=2, eval_every=2), toy_task(2, 3, 0, held_out=True)
    train(toy, one_window(), settings, RunFolder(settings), held_out=held_out)
    best = tmp_path / "run/best/model.safetensors"
    before = best.read_bytes()
    best.unlink()
    again = dataclasses.replace(settings, resume=True)
    train(toy, one_window(), again, RunFolder(again), held_out=held_out)
    assert best.read_bytes() == before


def old_layout(run: Path, link: bool, name: str) -> None:
    """Write a run in the layout of earlier versions: symbolic links, and another name for --group-size."""
    save = run / "saves/grpo-000002"
    for folder in ("checkpoint", "state"):
        (save / folder).mkdir(parents=True)
    (save / "state/state.json").write_text('{"step": 2, "best": -1.0, "best_step": 0}')
    (run / "log.csv").write_text("step,reward\n1,0.5\n2,0.5\n")
    settings = dataclasses.asdict(grpo.TrainSettings())
    settings[name] = settings.pop("group_size")
    (run / "config.json").write_text(json.dumps(settings))
    if link:
        (run / "latest").symlink_to("saves/grpo-000002")
        (run / "checkpoint").symlink_to("latest/checkpoint")


@pytest.mark.parametrize("model", [[], ["--model", "M"]])
@pytest.mark.parametrize("link, name", [(True, "group"), (True, "group_size"), (False, "group")])
def test_a_run_of_the_old_layout_is_not_resumed_and_not_touched(tmp_path, link, name, model):
    old_layout(tmp_path / "run", link, name)
    before = everything(tmp_path)
    with pytest.raises(InputError, match="--resume: .* was begun by an earlier version") as fault:
        grpo.main(["--resume", "--out", str(tmp_path / "run"), *model])
    assert "\n" not in str(fault.value) and everything(tmp_path) == before


def test_the_refusal_of_an_old_run_is_one_line_with_status_2(tmp_path, monkeypatch, capfd):
    old_layout(tmp_path / "run", True, "group")
    before = everything(tmp_path)
    monkeypatch.setattr(sys, "argv", ["grpo.py", "--resume", "--out", str(tmp_path / "run")])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        run_main(grpo.main)
    said = capfd.readouterr()
    assert end.value.code == 2 and len(said.err.splitlines()) == 1 and not said.out
    assert everything(tmp_path) == before
