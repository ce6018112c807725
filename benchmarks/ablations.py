"""The paper's experiments in miniature: the effect of each part of REARANK on the toy task, with intervals.

    python benchmarks/ablations.py               (three seeds, about 20 minutes on 2 cores)
    python benchmarks/ablations.py --quick       (at most 10 minutes: shorter training, wider intervals)
    python benchmarks/ablations.py --failures    (four runs with a fault and a healthy one: 20 minutes)

For each seed, one model is warm-started. Every experiment ("arm") continues from it for the same number of
GRPO steps. Direct SFT gets as many token passes as GRPO's sampling and update take together. The arms train
on windows of the same 20 queries, since the paper has few queries too (one arm: of 400). All arms are
evaluated on the same 200 held-out queries. The arm "never trained to reason" has its own warm start, with as
many steps and as many supervised tokens.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import dataclasses
import itertools
import multiprocessing
import os
import random
import re
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from tqdm import tqdm

from data import expand
from eval import bootstrap_interval
from grpo import TrainSettings, best_order_batches, grpo_loss, supervised, train
from model import Agent, sample
from prompts import encode_prompt
from rearank import Reranker
from reward import Score, ndcg, parse_ranking, score_response
from support.cli import command_line, run_main, setting
from support.run_folder import RunFolder
from support.streams import atomic_write
from toy import (EASY_SHARE, LESSON_PASSAGES, TOY, toy_agent, toy_answer, toy_lessons, toy_task,
                 toy_trace_statistics)

ARMS = {  # name: settings that differ from those of the arm "full"
    "full": {}, "reward: absolute": {"reward": "absolute"}, "reward: difference": {"reward": "difference"},
    "no filter": {"keep_draws": "all"}, "one draw a query": {"draws": 1}, "direct SFT": {},
    "400 queries, one draw each": {"draws": 1}, "never trained to reason": {}}
# The paper's results (Tables 3 and 4, figures 6 and 7, TREC-DL): the sign of (this row - the row it is
# compared with) in the paper, and its numbers in words. 0: no difference. None: the paper has no such row.
PAPER = {
    "reward: absolute": (-1, "70.9 against 72.0"), "reward: difference": (-1, "71.5 against 72.0"),
    "no filter": (-1, "71.3 against 72.0"), "direct SFT": (-1, "66.7 against 72.0"),
    "think left out": (-1, "68.2 against 72.0"), "one draw a query": (None, "no row"),
    "400 queries, one draw each": (None, "no row"), "never trained to reason": (None, "no row"),
    "two passes": (0, "no gain (fig. 7)"), "three passes": (0, "no gain (fig. 7)"),
    "length against quality": (0, "no correlation (fig. 6)"), "warm start": (-1, "65.5 against 72.0")}
CANNOT = ("reward: absolute", "reward: difference")  # inside a group, affine functions of "full"


@dataclasses.dataclass
class Settings:
    """Settings of the experiments."""

    seeds: list[int] = setting(lambda: [0, 1, 2], "Seeds of warm start, pool and sampling.", nargs="+",
                               type=int)
    steps: int = setting(60, "GRPO steps per arm.", minimum=1)
    sft_steps: int = setting(2600, "Steps of the warm start.", minimum=0)
    queries: int = setting(20, "Training queries.", minimum=1)
    eval_queries: int = setting(200, "Held-out queries.", minimum=8)
    workers: int = setting(2, "Processes, with one thread each.", minimum=1)
    quick: bool = setting(False, "25 steps after a warm start of 400, 100 held-out queries.")
    failures: bool = setting(False, "Only the runs with a fault, and a healthy one.")
    results: str = setting(str(Path(__file__).resolve().parents[1] / "notebooks" / "results"),
                           "The folder for the CSVs.")


def toy_settings(settings: Settings, seed: int, **changes) -> TrainSettings:
    """The toy run's settings, with fewer prompts per step and this benchmark's numbers of steps."""
    smaller = {"seed": seed, "steps": settings.steps, "sft_steps": settings.sft_steps, "prompts_per_step": 16,
               "decay": False, "samples_every": 10**6, "save_every": 10**6}
    return TrainSettings(**TOY | smaller | changes)


# ------------------------------------------------------------------------------------------------------------
# Training


def silent_lessons(agent: Agent, options: TrainSettings) -> Iterator[list[tuple[list[int], list[int]]]]:
    """`toy_lessons` with empty think blocks. Batches have more windows, to get as many answer tokens."""
    rng, tokenizer = random.Random(f"silent {options.seed}"), agent.tokenizer
    for step in itertools.count():
        size = 3 if step < EASY_SHARE * options.sft_steps else options.window
        batch, tokens, wanted = [], 0, None
        for c in toy_task(4 * LESSON_PASSAGES // size, size, seed=rng.randrange(2**40))[0]:
            spoken = toy_answer(c.query, c.texts, rng.random() < options.teacher_graded)
            silent = re.sub("<think>.*</think>", "<think> </think>", spoken)
            ids = tokenizer(silent)["input_ids"] + [agent.stop_ids[0]]
            wanted = wanted or LESSON_PASSAGES // size * len(tokenizer(spoken)["input_ids"])
            batch.append((encode_prompt(tokenizer, c.query, c.texts, options.prompt), ids))
            if (tokens := tokens + len(ids)) >= wanted:
                break
        yield batch


def warm_start(settings: Settings, seed: int, reason: bool) -> dict:
    """The weights of a warm-started toy model, with or without reasoning."""
    options, agent = toy_settings(settings, seed), toy_agent(seed)
    lessons = toy_lessons if reason else silent_lessons
    supervised(agent, lessons(agent, options), options.sft_steps, options.sft_lr, options)
    return agent.model.state_dict()


def pool(settings: Settings, options: TrainSettings, queries: int) -> list:
    """The training windows of an arm, expanded from this number of queries."""
    return expand(*toy_task(queries, 20, options.seed), options.draws, options.window, options.order,
                  options.keep_draws, options.min_ndcg, options.seed)


def logged_training(agent: Agent, windows: list, options: TrainSettings, **hooks) -> list[dict]:
    """Train by GRPO in a temporary run folder. Returns the rows of the log."""
    with tempfile.TemporaryDirectory() as out:
        options = dataclasses.replace(options, out=out)
        train(agent, windows, options, RunFolder(options), toy_trace_statistics, **hooks)
        with open(Path(out) / "log.csv", encoding="utf-8") as file:
            return list(csv.DictReader(file))


def direct_sft(settings: Settings, agent: Agent, windows: list, options: TrainSettings) -> Agent:
    """Train by the paper's direct SFT (supervised learning of the best order), with the compute of GRPO.

    Compute is counted in passes over tokens: sampling is one pass, an update is three. Of two learning rates,
    the one with the better NDCG@10 on further queries is used.
    """
    prompt = len(encode_prompt(agent.tokenizer, windows[0].query, windows[0].texts, options.prompt))
    spoken, order = 35, 2 * options.window + 2  # tokens of a rollout, and of an order without reasoning
    passes = 4 * options.prompts_per_step * (prompt + options.group_size * spoken)
    batch = round(passes / (3 * (prompt + order)))
    trained, best = None, -1.0
    for lr in (5e-4, 2e-3):  # chosen on queries that are used for nothing else
        tried = Agent(copy.deepcopy(agent.model), agent.tokenizer, agent.stop_ids)
        batches = best_order_batches(tried, windows, dataclasses.replace(options, prompts_per_step=batch))
        supervised(tried, batches, options.steps, lr, options)
        lists, labels = held_out(48, options.window, options.eval_seed + 2)
        score = statistics.fmean(rerank(tried, lists, labels)[0])
        if score > best:
            trained, best = tried, score
    return trained


# ------------------------------------------------------------------------------------------------------------
# Evaluation


def held_out(queries: int, passages: int, seed: int) -> tuple[list, list]:
    """Held-out lists of the toy task: [(query, texts)], and the labels of their texts."""
    candidates, qrels = toy_task(queries, passages, seed, held_out=True)
    return ([(c.query, c.texts) for c in candidates],
            [[qrels[c.qid][docid] for docid in c.docids] for c in candidates])


def rerank(agent: Agent, lists: list, labels: list, passes: int = 1,
           **options) -> tuple[list[float], list[int]]:
    """Rerank each list `passes` times. Returns NDCG@10 and the last answer's tokens, for each list."""
    reranker = Reranker(agent, "toy", window=6, stride=3, max_new_tokens=64, max_num_seqs=256, **options)
    for _ in range(passes):
        rankings = reranker.rank_many(lists)
        orders = [[result.index for result in ranking] for ranking in rankings]
        lists = [(query, [texts[i] for i in order]) for (query, texts), order in zip(lists, orders)]
        labels = [[row[i] for i in order] for row, order in zip(labels, orders)]
    return [ndcg(row) for row in labels], [ranking.windows[-1].tokens for ranking in rankings]


def length_against_quality(agent: Agent, seed: int, queries: int = 50, samples: int = 20) -> list[float]:
    """Spearman's correlation of length and NDCG@10 over a query's answers at temperature 0.6, per query."""
    lists, labels = held_out(queries, 6, seed)
    drawn = [rerank(agent, lists, labels, temperature=0.6, seed=draw) for draw in range(samples)]
    scores, tokens = (np.array(x).T for x in zip(*drawn))  # [queries, samples]
    ranks = [np.array([[(row < x).sum() + (row == x).sum() / 2 for x in row] for row in rows])
             for rows in (scores, tokens)]
    return [float(np.corrcoef(a, b)[0, 1]) for a, b in zip(*ranks) if a.std() > 0 and b.std() > 0]


def follows_swapped_grades(agent: Agent, seed: int) -> dict[str, float]:
    """Test if answers follow the reasoning: swap the best and the worst grade in <think>, then sample.

    Returns the shares of answers that order the two passages by the grades in <think>: {"as written":
    without the swap, "swapped": with it}.
    """
    lists, labels = held_out(200, 6, seed)
    asked = []
    for query, texts in lists:
        grades = [int(g) for g in re.findall(r"(\d) (?=\[|</think>)", toy_answer(query, texts, True))]
        if max(grades) > min(grades):
            asked.append((query, texts, grades.index(max(grades)), grades.index(min(grades))))
    shares = {}
    for name in ("as written", "swapped"):
        prompts = []
        for query, texts, best, worst in asked:
            parts = re.findall(r"\[\d+\](?: [a-z]+)* \d", toy_answer(query, texts, True))
            if name == "swapped":
                a, b = parts[best], parts[worst]
                parts[best], parts[worst] = a[:-1] + b[-1], b[:-1] + a[-1]
            prompts.append(encode_prompt(agent.tokenizer, query, texts, "toy",
                                         start=f"<think> {' '.join(parts)} </think>"))
        answers = sample(agent.model, prompts, 1, 32, 0.0, agent.stop_ids)
        orders = [parse_ranking(agent.decode(answer), 6).order for [answer] in answers]
        above = [order.index(best) < order.index(worst) for order, (_, _, best, worst) in zip(orders, asked)]
        shares[name] = statistics.fmean(up == (name == "as written") for up in above)
    return shares


# ------------------------------------------------------------------------------------------------------------
# Training runs with a fault


def loose_reward(response: str, labels: Sequence[int], ideal=None, scheme: str = "normalized") -> Score:
    """Equation 6 with a loose format2: any number in brackets in the answer earns it, such as [3] alone."""
    score = score_response(response, labels, ideal, scheme)
    format2 = float(bool(re.search(r"<answer>.*\[\d+\].*</answer>", response)))
    return dataclasses.replace(score, format2=format2, reward=score.reward + 0.1 * (format2 - score.format2))


def position_reward(response: str, labels: Sequence[int], ideal=None, scheme: str = "normalized") -> Score:
    """Equation 6 where scores stay with positions: sorting by score restores the old order, the gain is 0."""
    score = score_response(response, labels, ideal, scheme)
    return dataclasses.replace(score, rank=0.0, reward=0.1 * score.format1 + 0.1 * score.format2)


def wrong_sign_loss(logps, ref_logps, advantages, lengths, beta, *rest):
    """Equation 3 with + beta KL instead of - beta KL, which drives the policy away from the reference."""
    return grpo_loss(logps, ref_logps, advantages, lengths, -beta, *rest)


FAILURES = {  # name: (settings, hooks)
    "healthy": ({"log_kl": True}, {}),
    "loose format reward": ({"log_kl": True}, {"reward": loose_reward}),
    "scores stay with positions": ({"log_kl": True}, {"reward": position_reward}),
    "30 x the learning rate": ({"log_kl": True, "lr": 30 * TOY["lr"]}, {}),
    "KL penalty of the wrong sign": ({"beta": 0.1}, {"loss": wrong_sign_loss})}


# ------------------------------------------------------------------------------------------------------------
# Jobs and output files


def job(settings: Settings, seed: int, arm: str, weights: dict) -> tuple[list[dict], dict[str, list[float]]]:
    """Train and evaluate one arm. Returns its log, and {row of the table: one value per held-out query}."""
    agent = toy_agent(seed)
    agent.model.load_state_dict(weights)
    if arm in FAILURES:
        changes, hooks = FAILURES[arm]
        options = toy_settings(settings, seed, **changes)
        return logged_training(agent, pool(settings, options, settings.queries), options, **hooks), {}
    options = toy_settings(settings, seed, **ARMS[arm])
    windows = pool(settings, options, 400 if arm.startswith("400") else settings.queries)
    lists, labels = held_out(settings.eval_queries, options.window, options.eval_seed)
    values, log = {}, []
    if arm == "full":
        values["warm start"] = rerank(agent, lists, labels)[0]
        values |= {f"trace, warm start: {k}": [v] for k, v in
                   follows_swapped_grades(agent, options.eval_seed).items()}
    if arm == "direct SFT":
        agent = direct_sft(settings, agent, windows, options)
    else:
        log = logged_training(agent, windows, options)
    values[arm] = rerank(agent, lists, labels)[0]
    if arm == "full":
        values["think left out"] = rerank(agent, lists, labels, think=False)[0]
        values["length against quality"] = length_against_quality(agent, options.eval_seed)
        values |= {f"trace, full: {k}": [v] for k, v in
                   follows_swapped_grades(agent, options.eval_seed).items()}
        longer = held_out(settings.eval_queries, 4 * options.window, options.eval_seed + 1)
        for passes, name in enumerate(("one pass", "two passes", "three passes"), 1):
            values[name] = rerank(agent, *longer, passes)[0]
    return log, values


def start_worker() -> None:
    """Set up a worker process: one thread, and no progress bars, since the parent shows its own."""
    torch.set_num_threads(1)
    os.environ["TQDM_DISABLE"] = "1"


def quietly(function, *arguments):
    """Call a function, discard its output and return its result."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), \
            contextlib.redirect_stderr(nowhere):
        return function(*arguments)


def run_jobs(settings: Settings, arms: Sequence[str]) -> tuple[list[dict], dict[str, list[list[float]]]]:
    """Run all arms with all seeds. Returns the logs' rows and {row of the table: values [seed][query]}."""
    logs, values = [], {}
    starts = [True, False] if "never trained to reason" in arms else [True]
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(settings.workers, fresh, start_worker) as workers, \
            tqdm(total=len(settings.seeds) * (len(starts) + len(arms)), unit="job") as bar:
        weights = {(seed, reason): workers.submit(quietly, warm_start, settings, seed, reason)
                   for reason in starts for seed in settings.seeds}
        for future in weights.values():
            future.add_done_callback(lambda _: bar.update())
        jobs = {}
        for seed, arm in itertools.product(settings.seeds, arms):
            start = weights[seed, arm != "never trained to reason"].result()
            jobs[arm, seed] = workers.submit(quietly, job, settings, seed, arm, start)
            jobs[arm, seed].add_done_callback(lambda _: bar.update())
        for (arm, seed), future in jobs.items():
            log, judged = future.result()
            logs += [{"arm": arm, "seed": seed, **row} for row in log]
            for name, row in judged.items():
                values.setdefault(name, []).append(row)
    return logs, values


def paired(a: list[list[float]], b: list[list[float]]) -> tuple[tuple[float, float, float], list[float]]:
    """The difference a - b of values [seed][query]: (mean, low, high), and the mean of each seed.

    The interval is a bootstrap over queries of the mean over seeds.
    """
    differences = [[x - y for x, y in zip(*pair)] for pair in zip(a, b)]
    interval = bootstrap_interval([statistics.fmean(column) for column in zip(*differences)])
    return interval, [statistics.fmean(row) for row in differences]


def direction(mean: float, low: float, high: float, per_seed: list[float]) -> int:
    """The sign of a difference that is seen: its interval leaves out 0, all seeds have its sign. Else 0."""
    seen = (low > 0 or high < 0) and len({x > 0 for x in per_seed}) == 1
    return (mean > 0) - (mean < 0) if seen else 0


def table(values: dict[str, list[list[float]]]) -> list[dict]:
    """One row per experiment: its mean, the paired difference with its interval, and the paper's result.

    `seeds` has the difference of each seed.
    """
    rows = []
    for name, (_, words) in PAPER.items():
        if name == "length against quality":
            per_seed = [statistics.fmean(row) for row in values[name]]
            interval = bootstrap_interval([x for row in values[name] for x in row])
            level = interval[0]
        else:
            base = "one pass" if name.endswith("passes") else "full"
            interval, per_seed = paired(values[name], values[base])
            level = statistics.fmean(statistics.fmean(row) for row in values[name])
        mean, low, high = interval
        rows.append({"experiment": name, "value": level, "difference": mean, "low": low, "high": high,
                     "seeds": " ".join(f"{x:+.3f}" for x in per_seed), "paper": words,
                     "verdict": verdict(name, direction(*interval, per_seed))})
    return rows


def verdict(name: str, seen: int) -> str:
    """The verdict on a row of the table. `seen` is the `direction` of its difference.

    A difference that was not seen may still exist, so it never counts as "reproduced".
    """
    sign, _ = PAPER[name]
    if name in CANNOT:
        return "not a test of it"
    if sign is None:
        return "no row in the paper"
    if seen == 0:
        return "no difference seen"
    if seen == sign:
        return "reproduced"
    return "the opposite" if seen == -sign else "not reproduced"


def write_csv(path: Path, rows: list[dict], columns: Sequence[str]) -> None:
    """Write rows as CSV, numbers with four significant digits."""
    with atomic_write(path) as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})


LOG = ("arm", "seed", "step", "reward", "ndcg", "reward_std", "rank", "format1", "format2", "permutations",
       "unchanged", "zero_std_groups", "length", "hit_limit", "kl", "entropy", "grad_norm", "grades_right",
       "answer_follows_grades")


def main(argv: list[str] | None = None) -> int:
    """Run the experiments, write the CSVs, print the table."""
    settings = command_line(Settings, argv, __doc__)
    if settings.quick:
        settings = dataclasses.replace(settings, steps=25, sft_steps=1200, eval_queries=100)
    folder = Path(settings.results)
    folder.mkdir(parents=True, exist_ok=True)
    logs, values = run_jobs(settings, list(FAILURES if settings.failures else ARMS))
    for row in logs:
        row.update({k: float(v) for k, v in row.items() if k in LOG[3:] and v})
    write_csv(folder / ("failures.csv" if settings.failures else "ablation_logs.csv"), logs, LOG)
    if settings.failures:
        for arm in FAILURES:
            last = [row for row in logs if row["arm"] == arm and int(row["step"]) > settings.steps - 10]
            means = {k: statistics.fmean(row[k] for row in last) for k in
                     ("reward", "ndcg", "permutations", "unchanged", "zero_std_groups", "length", "entropy",
                      "kl")}
            print(f"{arm:30}", "  ".join(f"{k} {v:.3f}" for k, v in means.items()))
        return 0
    rows = table(values)
    write_csv(folder / "ablations.csv", rows, list(rows[0]))
    traces = [{"model": name.split(", ")[1].split(":")[0], "grades": name.split(": ")[1], "seed": seed,
               "share": row[0]} for name in values if name.startswith("trace")
              for seed, row in zip(settings.seeds, values[name])]
    write_csv(folder / "traces.csv", traces, ("model", "grades", "seed", "share"))
    full, long = (statistics.fmean(map(statistics.fmean, values[name])) for name in ("full", "one pass"))
    print(f"full: NDCG@10 {full:.3f}; lists of 24, one pass: {long:.3f}. Differences from these:")
    for row in rows:
        print(f"{row['experiment']:28} {row['difference']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})  "
              f"seeds {row['seeds']}  paper: {row['paper']}: {row['verdict']}")
    for trace in traces:
        print("order follows the grades, {model}, grades {grades}, seed {seed}: {share:.2f}".format(**trace))
    return 0


if __name__ == "__main__":
    run_main(main)
