"""The log of a training run: a row per step, some whole rollouts, warnings when the policy collapses."""

from __future__ import annotations

import csv
import math
import os
import statistics
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from support.distributed import gather, rank, say

LOGS = ("log.csv", "samples.txt", "skipped.txt")  # a save records their lengths
COLUMNS = (
    "step", "reward", "ndcg", "ndcg_init", "ndcg_best", "eval_ndcg", "eval_low", "eval_high", "reward_std",
    "rank", "format1", "format2", "permutations", "unchanged", "zero_std_groups", "length", "hit_limit",
    "prompts_shortened", "kl", "entropy", "logp_diff", "logp_diff_max", "clipped", "grad_norm", "skipped",
    "lr", "loss", "tokens_per_s", "seconds", "peak_mib")
LINE = (
    "step {step:4d}  reward {reward:+.3f}  NDCG@10 {ndcg:.3f} (given {ndcg_init:.3f}, best {ndcg_best:.3f})  "
    "in-group std {reward_std:.2f}  whole orders {permutations:.0%}  rewards all equal {zero_std_groups:.0%}"
    "  length {length:.0f}  hit limit {hit_limit:.0%}  entropy {entropy:.2f}  {tokens_per_s:.0f} tok/s  "
    "{seconds:.1f} s")


def progress(done: int, steps: int, title: str) -> tqdm:
    """The numbers of the steps that are left, with a progress bar on rank 0."""
    return tqdm(range(done + 1, steps + 1), desc=title, initial=done, total=steps, unit="step",
                disable=rank() > 0)


class TrainingLog:
    """log.csv, samples.txt and skipped.txt (of skipped updates) in the run folder `path`.

    `rows` are those of log.csv. A resumed run passes the `lengths` of the files at its save: what was written
    after it is cut off. Every rank must make one; only rank 0 writes and prints.
    """

    def __init__(self, path: Path, settings, lengths: dict[str, int]):
        self.path, self.settings = path, settings
        if rank() == 0:
            for name, file in log_files(path).items():
                os.truncate(file, min(lengths.get(name, 0), file.stat().st_size))
        gather([])  # no rank reads before that
        log = path / "log.csv"
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        self.rows = [{name: float(value or "nan") for name, value in row.items()}
                     for row in csv.DictReader(lines)]
        self.warned: set[str] = set()
        for n in range(len(self.rows) + 1):  # a resumed run does not repeat a warning
            self.warned |= collapses(self.rows[:n])

    def add(self, row: dict[str, float], rollouts) -> None:
        """Write and print a step: its row, at times the best and the worst answer to its first prompt."""
        step, settings = row["step"], self.settings
        self.write_row(row)
        if (step - 1) % settings.samples_every == 0 or step == settings.steps:
            rewards = rollouts.rewards[0].tolist()
            by_reward = sorted(range(len(rewards)), key=rewards.__getitem__)
            say(self.write_samples("samples.txt", step, rollouts, [by_reward[-1], by_reward[0]]))
        if row["skipped"]:
            self.write_samples("skipped.txt", step, rollouts, range(len(rollouts.texts)))
        self.rows.append(row)
        for warning in sorted(collapses(self.rows) - self.warned):
            say(f"step {step}: WARNING, a collapse? Compared with the earlier steps {warning}.")
            self.warned.add(warning)

    def write_row(self, row: dict[str, float]) -> None:
        """Append a step to log.csv and print it, without the loss: on-policy it is about 0."""
        if rank() == 0:
            with open(self.path / "log.csv", "a", newline="", encoding="utf-8") as file:
                columns = dict.fromkeys([*COLUMNS, *row])  # each name once
                writer = csv.DictWriter(file, list(columns), lineterminator="\n")
                if not file.tell():
                    writer.writeheader()
                writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        line = LINE if math.isnan(row["kl"]) else LINE + "  kl {kl:.4f}"
        if "eval_ndcg" in row:
            line += "  held out {eval_ndcg:.3f} ({eval_low:.3f} to {eval_high:.3f})"
        if row["skipped"]:
            line += "  SKIPPED: loss {loss}, norm {grad_norm}; see skipped.txt"
        say(line.format(**row))

    def write_samples(self, name: str, step: int, rollouts, which: Iterable[int]) -> str:
        """Append the rollouts numbered `which` to the file `name`. Returns the new text."""
        new = ""
        for i in which:
            instance, score = rollouts.instances[i // self.settings.group_size], rollouts.scores[i]
            reward, tokens = float(rollouts.rewards.flatten()[i]), len(rollouts.completions[i].ids)
            new += (f"--- step {step}, query {instance.qid}: {instance.query}\n"
                    f"    labels of [1], [2], ...: {instance.labels}\n"
                    f"    reward {reward:+.3f}, NDCG@10 {score.ndcg:.3f}, "
                    f"format {score.format1:.0f} {score.format2:.0f}, {tokens} tokens\n"
                    f"{rollouts.texts[i]}\n\n")
        if rank() == 0:
            with open(self.path / name, "a", encoding="utf-8") as file:
                file.write(new)
        return new


def log_files(path: Path) -> dict[str, Path]:
    """The files of a log that exist, by name."""
    return {name: path / name for name in LOGS if (path / name).exists()}


def collapses(rows: list[dict[str, float]]) -> set[str]:
    """Signs of a collapse, in words: compares the last three rows' means with those of at least five before.

    Healthy runs of the toy stay far from these bounds; 30 times its learning rate crosses them.
    """
    rows = [row for row in rows if not row["skipped"]]
    if len(rows) < 8:
        return set()
    before, now = {}, {}
    for name in ("reward", "length", "entropy", "unchanged", "zero_std_groups"):
        for means, part in ((before, rows[:-3]), (now, rows[-3:])):
            known = [row[name] for row in part if not math.isnan(row[name])]  # a step may have no entropy
            means[name] = statistics.fmean(known) if known else math.nan
    signs = {"the reward is lower by 0.15": now["reward"] < before["reward"] - 0.15,
             "a quarter more of the orders is unchanged": now["unchanged"] > before["unchanged"] + 0.25,
             "the share of groups where all rewards are equal is higher by 0.5":
                 now["zero_std_groups"] > before["zero_std_groups"] + 0.5}
    for name in ("length", "entropy"):
        signs[f"the {name} is less than half"] = now[name] < before[name] / 2
        signs[f"the {name} is more than double"] = now[name] > before[name] * 2
    return {sign for sign, seen in signs.items() if seen}
