"""Several ranks, which are processes that communicate over gloo, must give the results of one process."""

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import Qwen2Config

import grpo
from data import expand
from support.checkpoint import write_model
from support.files import write_instances
from toy import toy_agent, toy_task


ROOT = Path(__file__).resolve().parents[1]

# A script that forks the ranks of each run: importing torch in every rank would take a minute.
# argv: a folder, and the runs as JSON: [[name, ranks, settings, fault], ...]. A run writes FOLDER/NAME.
HARNESS = r"""
import csv, json, os, random, signal, socket, sys, time
sys.path[:0] = [ROOT, ROOT + "/tests"]
import torch, transformers.models.qwen2.modeling_qwen2
torch.set_num_threads(1)
import grpo, toy
from conftest import toy_settings
from data import expand
from reward import Score
from safetensors.torch import save_file
from support import distributed
from support.cli import run_main

def flat_for_train0(text, labels, ideal, scheme):
    return Score(0.5 if labels == instances[0].labels else len(text) / 100, 0, 0, 0, 0)

def rank_zero_is_not_finite(*arguments):
    # The gradient stays finite, so the other ranks notice it only if the ranks share their losses.
    added = 0 if distributed.rank() else torch.inf
    return grpo.grpo_loss(*arguments) + added

def run(settings, wrong):
    agent = toy.toy_agent(0)
    first, honest = [], grpo.MasterAdamW.step
    def step(self, lr, grad_clip, skip=False):
        if not first and hasattr(agent, "started"):
            for p in self.params:
                grad = self.grad_sums.get(p, p.grad)
                grad = torch.zeros_like(p) if grad is None else grad.clone()
                if distributed.world_size() > 1:
                    torch.distributed.all_reduce(grad)
                first.append(grad)
        if wrong == "dies" and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return honest(self, lr, grad_clip, skip)
    grpo.MasterAdamW.step = step
    honest_sample = grpo.sample
    def sample(*arguments, **options):  # the last prompt, on the last rank, gets the largest logp_diff
        groups = honest_sample(*arguments, **options)
        if distributed.rank() == distributed.world_size() - 1:
            groups[-1][0].logps[0] -= 0.5
        return groups
    grpo.sample = sample
    folder = grpo.RunFolder(settings)
    if settings.sft_steps:
        lesson = [([5, 6, 7], [8, 9]), ([7, 5], [4]), ([6] * 4, [3, 3, 3])]
        lessons = iter([lesson] * settings.sft_steps)
        grpo.supervised(agent, lessons, settings.sft_steps, 1e-3, settings, folder=folder)
    if settings.lora_rank:
        grpo.add_lora(agent.model, settings.lora_rank)
        torch.manual_seed(1)
        for name, p in agent.model.named_parameters():  # B starts at 0, and A then has no gradient
            if "lora_B" in name:
                torch.nn.init.normal_(p, 0, 0.1)
    agent.started = True
    hooks = {"flat": {"reward": flat_for_train0}, "nan": {"loss": rank_zero_is_not_finite}}.get(wrong, {})
    candidates, qrels = toy.toy_task(6, 20, 3)
    held_out = toy.toy_task(3, 6, 4, held_out=True)
    instances[:] = expand(candidates, qrels, 2, 6, keep="all")
    grpo.train(agent, instances, settings, folder, held_out=held_out, **hooks)
    if distributed.rank() == 0:
        save_file({str(i): g for i, g in enumerate(first)}, settings.out + "/first.safetensors")
    return 0

instances = []
for name, number, changes, wrong in json.loads(sys.argv[2]):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    few = {"prompts_per_step": 5, "group_size": 4, "steps": 3, "max_new_tokens": 10, "save_every": 1,
           "eval_every": 3, "sft_steps": 0, "reward": "normalized" if wrong == "flat" else "random"}
    settings = toy_settings(**few | {"out": f"{sys.argv[1]}/{name}"} | changes)
    pids = []
    for rank in range(number):
        if not (pid := os.fork()):
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(number),
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            log = open(f"{sys.argv[1]}/{name}.{rank}.log", "w")
            sys.stdout, sys.stderr = log, log
            sys.argv[0] = "grpo.py"
            try:
                run_main(lambda: distributed.on_all_ranks(lambda: run(settings, wrong), on_cards=False))
            except SystemExit as error:
                log.flush()
                os._exit(error.code if isinstance(error.code, int) else 1)
        pids.append(pid)
    started = time.time()
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    print(json.dumps([name, codes, time.time() - started]))
"""


def state_of(run: Path) -> Path:
    """The optimizer's file in the newest save of GRPO."""
    return max(run.glob("saves/grpo-*")) / "state/optimizer.safetensors"


def largest_difference(a: Path, b: Path, only: str = "") -> float:
    a, b = load_file(a), load_file(b)
    assert a.keys() == b.keys() and any(only in name for name in a)
    return max(float((a[name] - b[name]).abs().max()) for name in a if only in name)


CASES = {
    "plain": [{"beta": 0.0}, "", (1, 2, 3)],
    "reference, two updates": [{"beta": 0.1, "lr": 1e-3, "updates": 2}, "", (1, 3)],
    "fewer prompts than ranks": [{"prompts_per_step": 2, "steps": 2}, "", (1, 3)],
    "a rank with flat groups only": [{"prompts_per_step": 2}, "flat", (1, 2)],
    "lora": [{"lora_rank": 3, "beta": 0.1}, "", (1, 2)],
    "sft": [{"sft_steps": 2}, "", (1, 2)],
}


def ranks(folder: Path) -> list[str]:
    """The command of the process that makes all runs, one after the other."""
    runs = [
        (f"{name} {n}", n, changes, wrong)
        for name, (changes, wrong, numbers) in CASES.items()
        for n in numbers
    ]
    runs += [
        ("long", 1, {"decay": False, "steps": 4}, ""),
        ("3 to 2", 3, {"decay": False, "steps": 2}, ""),
        ("3 to 2", 2, {"decay": False, "steps": 4, "resume": True}, ""),
        ("nan", 2, {"prompts_per_step": 2, "steps": 1, "lr": 1e-2}, "nan"),
        ("dead", 3, {}, "dies"),
    ]
    return [sys.executable, "-c", f"ROOT = {str(ROOT)!r}\n{HARNESS}", str(folder), json.dumps(runs)]


@pytest.fixture
def ran(beside) -> Path:
    """The folder of all runs. All must have succeeded, except "dead": its exit codes go to dead.json."""
    assert beside.returncode == 0, beside.stderr
    for name, codes, seconds in map(json.loads, beside.stdout.splitlines()):
        if name == "dead":
            (beside.folder / "dead.json").write_text(json.dumps([codes, seconds]))
        else:
            assert not any(codes), (beside.folder / f"{name}.0.log").read_text()
    return beside.folder


@pytest.mark.beside(command=ranks)
@pytest.mark.parametrize(
    "case, number", [(case, n) for case, (*_, numbers) in CASES.items() for n in numbers[1:]]
)
def test_the_result_does_not_depend_on_the_number_of_ranks(ran, case, number):
    one, several = ran / f"{case} 1", ran / f"{case} {number}"
    assert largest_difference(one / "first.safetensors", several / "first.safetensors") < 1e-5  # gradients
    assert largest_difference(state_of(one), state_of(several), "master") < 5e-5
    assert (one / "samples.txt").read_text() == (several / "samples.txt").read_text()
    logs = [
        [line.split(",") for line in (run / "log.csv").read_text().splitlines()] for run in (one, several)
    ]
    for name in ("reward", "ndcg", "eval_ndcg", "entropy", "kl", "grad_norm", "length", "zero_std_groups",
                 "lr", "loss", "logp_diff", "logp_diff_max"):
        column = logs[0][0].index(name)
        a, b = ([float(row[column] or "nan") for row in log[1:]] for log in logs)
        assert a == pytest.approx(b, rel=1e-3, abs=2e-5, nan_ok=True) and len(a) >= 2, name


@pytest.mark.beside(command=ranks)
def test_what_three_ranks_have_saved_two_go_on_with(ran):
    assert largest_difference(state_of(ran / "3 to 2"), state_of(ran / "long"), "master") < 5e-5
    assert len((ran / "3 to 2/log.csv").read_text().splitlines()) == 5


@pytest.mark.beside(command=ranks)
def test_only_the_first_rank_writes_and_prints(ran):
    assert "step    1 " in (ran / "plain 2.0.log").read_text() and not (ran / "plain 2.1.log").read_text()


@pytest.mark.beside(command=ranks)
def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_by_all(ran):
    log = (ran / "nan/log.csv").read_text().splitlines()
    assert dict(zip(log[0].split(","), log[1].split(",")))["skipped"] == "1"
    masters = load_file(state_of(ran / "nan"))
    for i, p in enumerate(toy_agent(0).model.parameters()):
        assert (masters[f"master.{i}"] == p).all()


@pytest.mark.beside(command=ranks)
def test_a_rank_that_dies_ends_the_others_with_one_line(ran):
    codes, seconds = json.loads((ran / "dead.json").read_text())
    assert codes == [2, -9, 2] and seconds < 60
    for rank in (0, 2):
        last = (ran / f"dead.{rank}.log").read_text().strip().splitlines()[-1]
        assert last.startswith(f"grpo.py: rank {rank}: another rank has ended") and "--resume" in last


# --- the command under torchrun

TRAIN = ("--prompt toy --group-size 4 --prompts-per-step 3 --max-new-tokens 8 --lr 1e-3 --steps 3 "
         "--reward random --device cpu").split()


def torchrun(number: int, *arguments: str) -> list[str]:
    """`torchrun --nproc-per-node NUMBER grpo.py ARGUMENTS`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(number)]
    return [*command, str(ROOT / "grpo.py"), *arguments]


def of(folder: Path, name: str) -> list[str]:
    return ["--model", str(folder / "model"), "--data", str(folder / "data.jsonl"), "--out",
            str(folder / name), *TRAIN]


def three_ranks(folder: Path) -> list[str]:
    write_model(toy_agent(0), folder / "model")
    write_instances(folder / "data.jsonl", expand(*toy_task(6, 20, 3), 2, 6, keep="all"))
    return torchrun(3, *of(folder, "several"))


@pytest.mark.beside(command=three_ranks)
def test_torchrun_trains_a_model_on_a_cpu_to_the_weights_of_one_process(beside):
    assert beside.returncode == 0, beside.stderr
    assert grpo.main(of(beside.folder, "one")) == 0
    one, several, start = (load_file(beside.folder / path / "model.safetensors")
                           for path in ("one/checkpoint", "several/checkpoint", "model"))
    for name, weight in one.items():
        assert (weight - several[name]).abs().max() < 5e-5
    assert any((weight - start[name]).abs().max() > 1e-3 for name, weight in one.items())


def too_large(folder: Path) -> list[str]:
    config = Qwen2Config(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, vocab_size=152064)
    config.save_pretrained(folder / "70b")
    return torchrun(2, "--model", str(folder / "70b"), "--device", "cpu")


@pytest.mark.beside(command=too_large)
def test_a_refusal_is_printed_once_and_speaks_of_memory_on_a_cpu(beside):
    [line] = [line for line in beside.stderr.splitlines() if line.startswith("grpo.py: ")]
    assert beside.returncode and "GiB of memory for 2 processes" in line and "card" not in line
    assert "Traceback" not in beside.stderr.split("grpo.py FAILED")[0].split("torch/distributed")[0]
