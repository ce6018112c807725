"""Several ways to spend a model's answers on a list, with their cost and their NDCG@10.

    python grpo.py --seed 0 --out runs/toy                  (first: trains the toy)
    python benchmarks/calls.py                              (toy lists of 24 and of 100 passages)
    python benchmarks/calls.py --real MODEL                 (and the first of DL19's lists)

Each way ("arm") reranks the same lists with the same model. A call is one answer. Windows that do not depend
on one another form one round. The table has sums over queries. Seconds are those of all queries together,
since their windows share batches. Three answers per window are sampled at temperature 0.7. The other arms
are greedy.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from eval import bootstrap_interval, evaluate
from model import Agent, load_agent
from rearank import Reranker
from support.cli import InputError, command_line, refuse, run_main, setting
from support.download import download
from support.files import Candidates, read_candidates, read_qrels, trec_id
from toy import TOY, toy_task

ARMS = {  # name: options of the reranker. "first stage" reranks nothing, "top window only" one window.
    "first stage": {}, "top window only": {}, "sliding": {}, "two passes": {"passes": 2},
    "top-down": {"algorithm": "top-down"}, "three samples": {"samples": 3, "temperature": 0.7},
    "three shuffled": {"samples": 3, "temperature": 0.7, "shuffle": True}}
SHARED = ["prompt", "window", "passage_chars", "max_new_tokens"]  # settings of all arms on real text


@dataclasses.dataclass
class Settings:
    """Settings of the benchmark."""

    json: bool = setting(False, "One JSON line per arm instead of the tables.")
    model: str = setting("runs/toy/checkpoint", "The trained toy.", group="toy")
    toy_queries: int = setting(100, "Held-out lists of 24 passages. Half as many have 100.", minimum=2)
    real: str = setting(lambda: os.environ.get("REARANK_TEST_MODEL", ""),
                        "A model folder or hub name, or set REARANK_TEST_MODEL.", group="real text")
    input: str = setting("", "Candidates, with --qrels (default: DL19's).")
    qrels: str = setting("", "Their judgements.")
    prompt: str = setting("rankgpt", "The prompt, as for rearank.py.")
    queries: int = setting(8, "Use this many queries with judgements.", minimum=2)
    top_k: int = setting(20, "Use this many candidates per query.", minimum=10)
    window: int = setting(10, "Passages in a window. It slides by half of that.", minimum=2)
    passage_chars: int = setting(200, "Characters per passage in the prompt.", minimum=1)
    max_new_tokens: int = setting(64, "Most tokens per answer.", minimum=1)


@dataclasses.dataclass
class Task:
    """Lists with judgements, the model that reranks them, and the options that all arms share."""

    name: str
    lists: list[Candidates]
    qrels: dict[str, dict[str, int]]
    agent: Agent
    options: dict


def load_tasks(settings: Settings) -> list[Task]:
    """The toy's lists and, with --real, real ones. InputError if something is missing."""
    if not Path(settings.model).is_dir():
        raise InputError(f"{settings.model}: no such folder; train the toy by `python grpo.py --seed 0 --out "
                         "runs/toy`, or pass its checkpoint as --model FOLDER")
    toy, window = load_agent(settings.model, "cpu", "float32"), TOY["window"]
    shared = {"prompt": TOY["prompt"], "window": window, "stride": window // 2,
              "max_new_tokens": TOY["max_new_tokens"], "max_num_seqs": 256}
    tasks = []
    for size, queries in ((24, settings.toy_queries), (100, (settings.toy_queries + 1) // 2)):
        task = toy_task(queries, size, seed=size, held_out=True)
        tasks.append(Task(f"toy, lists of {size}", *task, toy, shared))
    if settings.real:
        if bool(settings.input) != bool(settings.qrels):
            raise InputError("expected --input and --qrels together")
        candidates, judgements = (settings.input, settings.qrels) if settings.input else download("dl19")
        qrels = read_qrels(judgements)
        lists = [c for c in read_candidates(candidates) if c.qid in qrels][:settings.queries]
        if not lists:
            raise InputError(f"{judgements}: no query in common with {candidates}")
        for c in lists:
            c.docids, c.texts = c.docids[:settings.top_k], c.texts[:settings.top_k]
        options = {name: getattr(settings, name) for name in SHARED} | {"stride": settings.window // 2}
        name = f"{Path(settings.real).name} on real text, lists of {settings.top_k}"
        tasks.append(Task(name, lists, qrels, Reranker(settings.real).agent, options))
    return tasks


def measure(task: Task, arm: str) -> tuple[dict, list[float]]:
    """Run one arm. Returns its cost as a row, and NDCG@10 per query."""
    options = task.options | ARMS[arm]
    ranks = {"first stage": 0, "top window only": task.options["window"]}.get(arm)  # None: all
    started = time.perf_counter()
    rankings = Reranker(task.agent, **options).rank_many([(c.query, c.texts[:ranks]) for c in task.lists])
    seconds = time.perf_counter() - started
    run = {}
    for c, ranking in zip(task.lists, rankings):
        order = [c.docids[result.index] for result in ranking] + c.docids[len(ranking):]
        run[c.qid] = {trec_id(docid): -rank for rank, docid in enumerate(order)}
    scores = evaluate(task.qrels, run, ["ndcg_cut.10"])
    windows = [window for ranking in rankings for window in ranking.windows]
    row = {"data": task.name, "arm": arm, "queries": len(task.lists),
           "temperature": options.get("temperature", 0.0),
           "calls": sum(len(w.samples) or 1 for w in windows), "rounds": sum(w.part == 0 for w in windows),
           "prompt_tokens": sum(w.prompt_tokens for w in windows),
           "new_tokens": sum(w.tokens for w in windows), "seconds": round(seconds, 2),
           "windows": len(windows), "changed": sum(w.order != w.positions for w in windows)}
    return row, [scores[c.qid]["ndcg_cut_10"] for c in task.lists]


def compare(task: Task) -> list[dict]:
    """A row per arm: its cost, NDCG@10 and the paired difference from sliding as [mean, low, high]."""
    measured = {arm: measure(task, arm) for arm in tqdm(ARMS, desc=task.name, unit="arm")}
    _, sliding = measured["sliding"]
    rows = []
    for row, scores in measured.values():
        differences = [one - other for one, other in zip(scores, sliding)]
        for name, values in (("ndcg", scores), ("difference", differences)):
            row[name] = [round(value, 4) for value in bootstrap_interval(values)]
        rows.append(row)
    return rows


def print_table(rows: list[dict]) -> None:
    """Print the rows of one task as a table."""
    print(f"\n{rows[0]['data']}, {rows[0]['queries']} queries")
    print("arm              calls  rounds  read tokens  new tokens  seconds  windows changed"
          "  NDCG@10  95 % interval     - sliding  95 % interval")
    for row in rows:
        changed = f"{row['changed']} of {row['windows']}"
        print(f"{row['arm']:15s} {row['calls']:6d} {row['rounds']:7d} {row['prompt_tokens']:12,d} "
              f"{row['new_tokens']:11,d} {row['seconds']:8.1f} {changed:>16s} "
              "{:8.3f}  ({:.3f} to {:.3f})".format(*row["ndcg"])
              + "  {:+9.3f}  ({:+.3f} to {:+.3f})".format(*row["difference"]))


def main(argv: list[str] | None = None) -> int:
    """Measure all arms on each task and print a table, or JSON lines."""
    settings = command_line(Settings, argv, __doc__)
    if not settings.real:
        refuse(settings, ["input", "qrels", "queries", "top_k", *SHARED], "has no effect without --real")
    for task in load_tasks(settings):
        rows = compare(task)
        if settings.json:
            print("\n".join(map(json.dumps, rows)), flush=True)
        else:
            print_table(rows)
    return 0


if __name__ == "__main__":
    run_main(main)
