"""Our training loop against trl.GRPOTrainer: reward per step on the toy task, three seeds.

    python benchmarks/bench_learning.py              (about 15 minutes on 2 cores; writes learning_curves.csv
                                                      and .png beside this file)
    python benchmarks/bench_learning.py --plot-only  (draws and compares the curves of the existing CSV)

For each seed, the toy model is warm-started once. Both loops start from these weights, with the same pool of
windows, reward, prompts per step, group size, learning rate (constant), AdamW, clipping, temperature and
number of steps. Three things differ: the random numbers of sampling, the order of the pool, and the 1e-4
that TRL adds to the std of an advantage. (Our loop does not add it. A group whose rewards are all equal gets
exact zeros.)
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import logging
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm

from bench_grpo import TRL
from grpo import TrainSettings, batch_of, grpo_step, supervised
from model import Agent, Completion
from plot_toy import smooth
from prompts import build_messages
from reward import score_response
from support.cli import command_line, run_main, setting
from support.files import Instance
from support.optimizer import MasterAdamW
from support.streams import atomic_write
from toy import TOY, toy_agent, toy_data, toy_lessons

COLUMNS = ("loop", "seed", "step", "reward", "ndcg", "seconds")


@dataclasses.dataclass
class Settings:
    """Settings of the comparison."""

    seeds: list[int] = setting(
        lambda: [0, 1, 2], "Seeds: of the warm start, the pool and the sampling.", nargs="+", type=int
    )
    steps: int = setting(100, "GRPO steps.", minimum=1)
    prompts_per_step: int = setting(16, "Prompts per step.", minimum=1)
    group_size: int = setting(16, "Rollouts per prompt.", minimum=2)
    lr: float = setting(5e-4, "Learning rate, constant.")
    sft_steps: int = setting(2200, "Supervised steps of the warm start.", minimum=0)
    threads: int = setting(1, "Threads for torch.")
    csv: str = setting(
        str(Path(__file__).with_name("learning_curves.csv")), "The curves. The plot is written beside it."
    )
    plot_only: bool = setting(False, "Only draw and compare the curves in --csv.")


def toy_settings(settings: Settings, seed: int) -> TrainSettings:
    """The toy run's settings with the changes of this comparison."""
    names = ("steps", "prompts_per_step", "group_size", "lr", "sft_steps")
    changes = {name: getattr(settings, name) for name in names}
    changes |= {"seed": seed, "warmup": 0, "decay": False, "beta": 0.0}
    return TrainSettings(**TOY | changes)


def warm_start(options: TrainSettings) -> tuple[Agent, list[Instance]]:
    """The toy run's warm-started agent and its pool of windows."""
    agent = toy_agent(options.seed)
    title = f"warm start, seed {options.seed}"
    supervised(agent, toy_lessons(agent, options), options.sft_steps, options.sft_lr, options, title)
    instances, _ = toy_data(options)
    return agent, instances


def our_curve(agent: Agent, instances: list[Instance], options: TrainSettings) -> list[dict]:
    """Train by our loop. Returns one row per step."""
    optimizer, rows = MasterAdamW(agent.model.parameters()), []
    for step in tqdm(range(1, options.steps + 1), desc=f"ours, seed {options.seed}"):
        batch = batch_of(instances, step, options)
        row, _ = grpo_step(agent, None, optimizer, batch, options.lr, options, step)
        rows.append(
            {
                "loop": "ours",
                "seed": options.seed,
                **{k: row[k] for k in ("step", "reward", "ndcg", "seconds")},
            }
        )
    return rows


def trl_curve(agent: Agent, instances: list[Instance], options: TrainSettings) -> list[dict]:
    """Train by trl.GRPOTrainer. Returns one row per step, recorded by the reward function."""
    import trl
    from datasets import Dataset

    rows, started = [], [time.perf_counter()]

    def reward(completion_ids: list[list[int]], instance: list[int], **_) -> list[float]:
        texts = [agent.decode(Completion(ids, ids[-1] in agent.stop_ids)) for ids in completion_ids]
        scores = [
            score_response(text, instances[i].labels, instances[i].ideal) for text, i in zip(texts, instance)
        ]
        now = time.perf_counter()
        rows.append(
            {
                "loop": "trl",
                "seed": options.seed,
                "step": len(rows) + 1,
                "reward": statistics.fmean(s.reward for s in scores),
                "ndcg": statistics.fmean(s.ndcg for s in scores),
                "seconds": now - started[0],
            }
        )  # seconds since the previous step's reward
        started[0] = now
        return [s.reward for s in scores]

    chats = [build_messages(x.query, x.texts, options.prompt) for x in instances]
    prompts = [
        agent.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        for chat in chats
    ]
    batch = options.prompts_per_step * options.group_size
    config = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=batch,
        num_generations=options.group_size,
        max_completion_length=options.max_new_tokens,
        temperature=options.temperature,
        learning_rate=options.lr,
        max_grad_norm=options.grad_clip,
        weight_decay=0.0,
        scale_rewards="group",
        max_steps=options.steps,
        seed=options.seed,
        **TRL,
    )
    trainer = trl.GRPOTrainer(
        model=agent.model,
        reward_funcs=reward,
        args=config,
        processing_class=agent.tokenizer,
        train_dataset=Dataset.from_dict({"prompt": prompts, "instance": list(range(len(instances)))}),
    )
    trainer.train()
    return rows


def judge(rows: list[dict], tail: int = 10) -> str:
    """A report: reward in the last `tail` steps per loop and seed, and the loops' difference and overlap."""
    seeds = sorted({r["seed"] for r in rows})
    loops = {
        name: [[r for r in rows if (r["loop"], r["seed"]) == (name, seed)] for seed in seeds]
        for name in ("ours", "trl")
    }
    lines, ends = [], {}
    for name, curves in loops.items():
        ends[name] = [statistics.fmean(r["reward"] for r in curve[-tail:]) for curve in curves]
        seconds = statistics.median(r["seconds"] for curve in curves for r in curve)
        lines.append(
            f"{name:5} reward in the last {tail} steps, by seed: "
            + ", ".join(f"{x:.3f}" for x in ends[name])
            + f"   mean {statistics.fmean(ends[name]):.3f}   {seconds:.2f} s per step"
        )
    steps = min(len(curve) for curves in loops.values() for curve in curves)
    overlap = 0
    for step in range(steps):
        ours, trl = ([curve[step]["reward"] for curve in loops[name]] for name in ("ours", "trl"))
        overlap += min(ours) <= max(trl) and min(trl) <= max(ours)
    lines.append(
        f"the seeds' ranges overlap in {overlap} of {steps} steps; means of the last {tail} differ by "
        f"{statistics.fmean(ends['ours']) - statistics.fmean(ends['trl']):+.3f}, "
        f"the seeds of one loop by up to {max(max(e) - min(e) for e in ends.values()):.3f}"
    )
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    """Plot reward against steps (running mean of 5): a thin line per seed, a thick one for a loop's mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    seeds = sorted({r["seed"] for r in rows})
    for name, colour in (("ours", "tab:blue"), ("trl", "tab:orange")):
        curves = [
            smooth([r["reward"] for r in rows if (r["loop"], r["seed"]) == (name, seed)]) for seed in seeds
        ]
        for curve in curves:
            axes.plot(range(1, len(curve) + 1), curve, color=colour, alpha=0.35, linewidth=1)
        mean = [statistics.fmean(values) for values in zip(*curves)]
        axes.plot(
            range(1, len(mean) + 1),
            mean,
            color=colour,
            linewidth=2.5,
            label={"ours": "grpo.py", "trl": "trl.GRPOTrainer"}[name],
        )
    axes.set(
        xlabel="GRPO step",
        ylabel="reward (running mean of 5 steps)",
        title="The toy task: the same learning, three seeds each",
    )
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> int:
    """Run both loops from the same warm starts, write the curves and compare them."""
    settings = command_line(Settings, argv, __doc__)
    path = Path(settings.csv)
    if not settings.plot_only:
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)
        torch.set_num_threads(settings.threads)
        rows = []
        for seed in settings.seeds:
            options = toy_settings(settings, seed)
            agent, instances = warm_start(options)
            for curve in (our_curve, trl_curve):
                rows += curve(
                    Agent(copy.deepcopy(agent.model), agent.tokenizer, agent.stop_ids), instances, options
                )
                with atomic_write(path) as file:
                    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(
                        {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
                        for row in rows
                    )
    with open(path, encoding="utf-8") as file:
        rows = [{k: v if k == "loop" else float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    plot(rows, path.with_suffix(".png"))
    print(judge(rows))
    return 0


if __name__ == "__main__":
    run_main(main)
