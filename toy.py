"""The toy task: REARANK in miniature, which `python grpo.py` runs without data, downloads or a GPU.

    python grpo.py --seed 0 --out runs/toy               warm start, control, GRPO, exam: minutes on a CPU

A passage's label is how many of the query's three concepts it covers, in words that may differ from the
query's. A teacher grades every passage in <think>, but only some of its orders use the grades: that much a
supervised warm start can teach, which stands for an instruct model. GRPO with the paper's reward learns to
order by them; more of the same supervision, the control, does not.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import random
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

import grpo
from data import (Candidates, InputError, atomic_write, command_line, expand, read_run,
                  setting, write_candidates, write_qrels, write_run)
from eval import bootstrap_interval, evaluate
from eval import main as eval_main
from grpo import Rollouts, RunFolder, ranks, supervised, train
from model import Agent, add_lora, pick_device
from rearank import Reranker, encode_prompt
from reward import parse_ranking

# ------------------------------------------------------------------------------------------------------------
# The task

CONCEPTS = tuple(tuple(words.split()) for words in (  # each can be said in three words
    "rain storm cloud", "bread flour oven", "violin chord melody", "engine piston fuel", "forest oak leaf",
    "ocean tide reef", "planet orbit comet", "doctor fever pill", "goal referee stadium",
    "novel poem chapter", "coin bank loan", "bee honey hive"))
GRADES = ("0", "1", "2", "3")


def toy_combinations(held_out: bool) -> list[tuple[int, ...]]:
    """The triples of concepts that queries are made of; every fifth of the 220 is held out."""
    triples = list(itertools.combinations(range(len(CONCEPTS)), 3))
    random.Random(0).shuffle(triples)
    return triples[:len(triples) // 5] if held_out else triples[len(triples) // 5:]


def toy_task(queries: int, passages: int, seed: int,
             held_out: bool = False) -> tuple[list[Candidates], dict[str, dict[str, int]]]:
    """Synthetic first-stage lists and their judgements: `queries` lists of `passages` passages of four words.

    Of eight passages two cover none of the query's concepts, four cover one, one two and one all three. The
    first stage sees the label through noise wider than its scale, so its order is mediocre.
    """
    rng, combinations = random.Random(f"toy {seed} {held_out}"), toy_combinations(held_out)
    candidates, qrels = [], {}
    for number in range(queries):
        concepts, qid = rng.choice(combinations), f"{'test' if held_out else 'train'}{number}"
        others = [c for c in range(len(CONCEPTS)) if c not in concepts]
        found = []
        for i in range(passages):
            label = rng.choices((0, 1, 2, 3), weights=(2, 4, 1, 1))[0]
            covered = rng.sample(concepts, label) + rng.choices(others, k=4 - label)
            rng.shuffle(covered)
            text = " ".join(rng.choice(CONCEPTS[c]) for c in covered)
            found.append((label + rng.gauss(0, 5), f"{qid}-p{i}", text, label))
        found.sort(reverse=True)
        query = " ".join(rng.choice(CONCEPTS[c]) for c in concepts)
        scores, docids, texts, labels = map(list, zip(*found))
        candidates.append(Candidates(qid, query, docids, texts, scores))
        qrels[qid] = dict(zip(docids, labels))
    return candidates, qrels


# ------------------------------------------------------------------------------------------------------------
# The teacher


def toy_keywords(query: str, text: str) -> list[str]:
    """The words of `text` that express one of the query's concepts; their number is the passage's label."""
    wanted = {concept for concept in CONCEPTS for word in query.split() if word in concept}
    return [word for word in text.split() if any(word in concept for concept in wanted)]


def toy_answer(query: str, texts: Sequence[str], graded: bool) -> str:
    """The teacher's answer: in <think> each passage's keywords and grade, how many they are; then an order.

    By grade where `graded`; else it knows only relevant before irrelevant (ties stay in place).
    """
    keywords = [toy_keywords(query, text) for text in texts]
    known = [len(words) if graded else min(len(words), 1) for words in keywords]
    order = sorted(range(len(texts)), key=lambda i: -known[i])
    thoughts = [" ".join([f"[{i}]", *words, GRADES[len(words)]]) for i, words in enumerate(keywords, 1)]
    answer = " > ".join(f"[{i + 1}]" for i in order)
    return f"<think> {' '.join(thoughts)} </think> <answer> {answer} </answer>"


def toy_lessons(agent: Agent, settings: ToySettings,
                curriculum: bool = True) -> Iterator[list[tuple[list[int], list[int]]]]:
    """The warm start's batches of (prompt ids, answer ids), with 384 passages each.

    Windows have settings.window passages, with `curriculum` 3 for the first 40 % of the steps. A share
    settings.teacher_graded of the orders uses the grades.
    """
    rng, end, tokenizer = random.Random(f"lessons {settings.seed}"), [agent.stop_ids[0]], agent.tokenizer
    for step in itertools.count():
        size = 3 if curriculum and step < 0.4 * settings.sft_steps else settings.window
        candidates, _ = toy_task(384 // size, size, seed=rng.randrange(2**40))
        graded = [rng.random() < settings.teacher_graded for _ in candidates]
        yield [(encode_prompt(tokenizer, c.query, c.texts, settings.prompt),
                tokenizer(toy_answer(c.query, c.texts, by_grade))["input_ids"] + end)
               for c, by_grade in zip(candidates, graded)]


# ------------------------------------------------------------------------------------------------------------
# The model


def toy_agent(seed: int, device: torch.device | str = "cpu") -> Agent:
    """A random Qwen2 of about 130,000 parameters with a word-level tokenizer, made in memory."""
    words = ["<|pad|>", "<|end|>", "<|assistant|>", "<think>", "</think>", "<answer>", "</answer>", ">",
             *GRADES, *(f"[{i}]" for i in range(1, 21)), *(word for concept in CONCEPTS for word in concept)]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|pad|>"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>",
                                        clean_up_tokenization_spaces=False)
    tokenizer.chat_template = ("{% for message in messages %}{{ message['content'] }} <|end|> {% endfor %}"
                               "{% if add_generation_prompt %}<|assistant|> {% endif %}")
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, initializer_range=0.1,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        bos_token_id=None, pad_token_id=0, eos_token_id=1)
    return Agent(AutoModelForCausalLM.from_config(config).eval().to(device), tokenizer, [1])


def toy_trace_statistics(rollouts: Rollouts) -> dict[str, float]:
    """Shares of passages whose grade in <think> is right, and of answers that are ordered by their grades.

    Nothing in the reward asks for either: an order may improve while the grades beside it drift.
    """
    right, agree = [], []
    group = len(rollouts.texts) // len(rollouts.instances)
    for i, text in enumerate(rollouts.texts):
        labels = rollouts.instances[i // group].labels
        stated = dict(re.findall(r"\[(\d+)\](?: [a-z]+)* (\d)", text.partition("</think>")[0]))
        grades = [int(stated.get(str(n), -1)) for n in range(1, len(labels) + 1)]
        right += [grade == label for grade, label in zip(grades, labels)]
        ordered = [grades[n] for n in parse_ranking(text, len(labels)).order]
        agree.append(ordered == sorted(grades, reverse=True))
    return {"grades_right": statistics.fmean(right), "answer_follows_grades": statistics.fmean(agree)}


# ------------------------------------------------------------------------------------------------------------
# The exam


class ToyExam:
    """Held-out queries, reranked by each model, written as TREC files and evaluated from them."""

    def __init__(self, settings: ToySettings, folder: Path):
        self.settings, self.folder = settings, folder
        n, size, seed = settings.eval_queries, settings.window, settings.eval_seed
        self.tasks = {"window": toy_task(n, size, seed, held_out=True),
                      "long": toy_task(n // 4, 4 * size, seed + 1, held_out=True)}
        self.scores = {kind: {} for kind in self.tasks}  # NDCG@10 of each query, by list and model
        for kind, (candidates, qrels) in self.tasks.items() if ranks()[0] == 0 else ():
            write_candidates(folder / f"{kind}.jsonl", candidates)
            write_qrels(folder / f"{kind}.qrels", qrels)

    def evaluate(self, name: str, agent: Agent | None, kinds: Sequence[str] = ("window", "long"),
                 think: bool = True) -> None:
        """Rerank lists of these kinds by `agent` (None: leave them), write the runs and evaluate them. (The
        first rank does; the others have the same models and wait where they next meet it.)"""
        for kind in kinds if ranks()[0] == 0 else ():
            (candidates, qrels), run = self.tasks[kind], self.folder / f"{kind}.{name}.trec"
            orders = [range(len(c.docids)) for c in candidates]
            if agent:
                size = self.settings.window
                reranker = Reranker(agent, self.settings.prompt, size, size // 2, think, max_rows=256,
                                    max_new_tokens=self.settings.max_new_tokens)
                rankings = reranker.rank_many([(c.query, c.texts) for c in candidates])
                orders = [[result.index for result in ranking] for ranking in rankings]
            ranked = [(c.qid, [c.docids[i] for i in order]) for c, order in zip(candidates, orders)]
            write_run(run, dict(ranked), name)
            scores = evaluate(qrels, read_run(run), ["ndcg_cut.10"])
            self.scores[kind][name] = [scores[c.qid]["ndcg_cut_10"] for c in candidates]

    def summary(self) -> dict:
        """Means of NDCG@10, and the paired gains of GRPO with 95 % intervals: what summary.json holds."""
        window, long = self.scores["window"], self.scores["long"]
        summary = {"queries": len(window["grpo"])} | {name: statistics.fmean(window[name]) for name in window}
        summary["sliding_window"] = {name: statistics.fmean(long[name]) for name in long}
        for name, over in (("gain", "warm_start"), ("gain_over_doubled", "warm_start_doubled")):
            interval = bootstrap_interval([a - b for a, b in zip(window["grpo"], window[over])])
            summary[name] = dict(zip(("mean", "low", "high"), interval))
        return summary


# ------------------------------------------------------------------------------------------------------------
# The run


@dataclasses.dataclass
class ToySettings(grpo.Settings):
    """Settings of `python grpo.py` without a model: the same run in miniature, on synthetic data."""

    out: str = setting("runs/toy", "The run folder: config, log, samples, checkpoint, runs, summary.")
    prompts_per_step: int = setting(32, "Prompts (windows) in a step.", least=1)
    group: int = setting(16, "Rollouts sampled for each prompt.", least=2)
    steps: int = setting(100, "GRPO steps: one update each, purely on-policy.", least=0)
    sft_steps: int = setting(850, "Steps of the warm start, which stands for an instruct model.", least=0)
    sft_lr: float = setting(6e-3, "Learning rate of the warm start.", least=0)
    teacher_graded: float = setting(0.25, "Share of the teacher's orders that use its grades.")
    lr: float = setting(5e-4, "Learning rate.", least=0)
    beta: float = setting(0.0, "Weight of the KL penalty to the frozen starting model.", least=0)
    decay: bool = setting(True, "Let the learning rate fall linearly to a tenth over the run.")
    prompt: str = setting("toy", "The prompt to train with.", choices=("toy",))
    window: int = setting(6, "Passages drawn for a training instance.", least=2)
    draws: int = setting(20, "Draws a query in the initial state expansion.", least=1)
    max_new_tokens: int = setting(64, "Longest rollout.", least=1)
    max_rows: int = setting(512, "Rollouts written at a time.", least=1)
    answer_tokens: int = setting(16384, "Rollout tokens in a micro-batch: memory, not the result.", least=1)
    checkpointing: bool | None = setting(False, "Recompute activations in the backward pass.")
    offload: bool | None = setting(False, "AdamW's masters and moments in host memory.")
    device: str = setting("cpu", "cuda, mps, cpu or auto.")
    eval_queries: int = setting(200, "Held-out queries in the closing table.", least=4)
    eval_seed: int = setting(2505, "Seed of the held-out queries.")


def toy_run(settings: ToySettings) -> int:
    """Warm start, control, GRPO, exam. Writes summary.json and prints eval.py's tables."""
    started, steps, lr = time.time(), settings.sft_steps, settings.sft_lr
    folder = RunFolder(settings)
    agent = toy_agent(settings.seed, pick_device(settings.device))
    exam = ToyExam(settings, folder.path)
    print(f"toy run, seed {settings.seed}: {agent.model.num_parameters():,} parameters, no downloads")
    exam.evaluate("first_stage", None)
    supervised(agent, toy_lessons(agent, settings), steps, lr, settings, "warm start", folder, "warm_start")
    exam.evaluate("warm_start", agent)
    doubled = Agent(copy.deepcopy(agent.model), agent.tokenizer, agent.stop_ids)
    again = toy_lessons(doubled, dataclasses.replace(settings, seed=settings.seed + 10**6), curriculum=False)
    supervised(doubled, again, steps, lr, settings, "control: the warm start again", folder, "control")
    exam.evaluate("warm_start_doubled", doubled, ["window"])
    instances = expand(*toy_task(200, 20, settings.seed), settings.draws, settings.window, settings.order,
                       settings.keep_draws, settings.min_ndcg, settings.seed)
    held_out = toy_task(48, settings.window, settings.eval_seed + 2, held_out=True)  # not the exam's queries
    if settings.lora_rank:
        add_lora(agent.model, settings.lora_rank, settings.seed)
    train(agent, instances, settings, folder, toy_trace_statistics, held_out)
    exam.evaluate("grpo", agent)
    exam.evaluate("grpo_without_think", agent, ["window"], think=False)
    if ranks()[0]:
        return 0
    seconds = round(time.time() - started, 1)
    with atomic_write(folder.path / "summary.json") as file:
        json.dump({"seed": settings.seed, "seconds": seconds} | exam.summary(), file, indent=2)
    out = folder.path
    for kind, scores in exam.scores.items():  # the warm start first: the others are compared with it
        runs = [f"{out}/{kind}.{name}.trec" for name in dict.fromkeys(["warm_start", *scores])]
        arguments = [f"{out}/{kind}.qrels", *runs, "-m", "ndcg_cut.10"]
        print("\n$ python eval.py", *arguments, flush=True)
        eval_main(arguments)
    print(f"{seconds:.0f} s. Next, what it thinks about the longer lists:\n  python rearank.py --model "
          f"{out}/checkpoint --prompt toy --window {settings.window} --step {settings.window // 2} "
          f"--max-new-tokens {settings.max_new_tokens} --input {out}/long.jsonl --output {out}/again.trec")
    return 0


def main(argv: list[str] | None = None) -> int:
    """The toy run as the command line says. (`python grpo.py` calls it.)"""
    settings = command_line(ToySettings, argv, grpo.__doc__, "grpo.py")
    if settings.data != ["auto"] or any((settings.qrels, settings.eval_data, settings.plan, settings.gpus,
                                         settings.memory)):
        raise InputError("--data, --qrels, --eval-data, --plan, --gpus and --memory need --model; the toy "
                         "makes its own data")
    if settings.window > 20 or settings.dtype == "bfloat16":
        raise InputError("the toy's words end at [20] and its weights are float32: expected --window <= 20")
    return grpo.on_all_ranks(toy_run, settings)
