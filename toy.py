"""The toy task: REARANK in miniature, which `python grpo.py` runs without data, downloads or a GPU.

    python grpo.py --seed 0 --out runs/toy               warm start, GRPO, exam: minutes on a CPU

A passage's label is the number of the query's three concepts that it covers, in words that may differ from
the query's. A teacher grades each passage correctly in <think>, but only a quarter of its orders use the
grades. The warm start imitates this teacher and plays the role of an instruct model. GRPO with the paper's
reward then learns to order by the grades. More of the same supervision (--control) does not.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from data import expand
from eval import bootstrap_interval, evaluate, main as eval_main
from model import Agent
from rearank import Reranker
from reward import parse_ranking
from support.distributed import rank, say
from support.files import Candidates, Instance, read_run, write_candidates, write_qrels, write_run
from support.streams import atomic_write

# What the toy run sets otherwise than the paper's run (grpo.TrainSettings).
TOY = {"out": "runs/toy", "prompt": "toy", "window": 6, "draws": 20, "prompts_per_step": 16, "group_size": 16,
       "steps": 80, "lr": 7e-4, "decay": True, "beta": 0.0, "sft_steps": 2600, "sft_lr": 6e-3,
       "save_every": 50, "max_new_tokens": 64, "max_num_seqs": 512, "microbatch_tokens": 16384,
       "checkpointing": False, "offload": False, "device": "cpu"}

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


def toy_data(settings) -> tuple[list[Instance], tuple]:
    """(training instances, held-out lists and judgements to validate on, which are not the exam's)."""
    instances = expand(*toy_task(200, 20, settings.seed), settings.draws, settings.window, settings.order,
                       settings.keep_draws, settings.min_ndcg, settings.seed)
    return instances, toy_task(48, settings.window, settings.eval_seed + 2, held_out=True)


# ------------------------------------------------------------------------------------------------------------
# The teacher


def toy_keywords(query: str, text: str) -> list[str]:
    """The words of `text` that express one of the query's concepts; their number is the passage's label."""
    wanted = {concept for concept in CONCEPTS for word in query.split() if word in concept}
    return [word for word in text.split() if any(word in concept for concept in wanted)]


def toy_answer(query: str, texts: Sequence[str], graded: bool) -> str:
    """The teacher's answer: each passage's keywords and grade (their number) in <think>, then an order.

    If `graded`, the order is by grade. Otherwise it only puts relevant passages before irrelevant ones, and
    ties stay in place.
    """
    keywords = [toy_keywords(query, text) for text in texts]
    known = [len(words) if graded else min(len(words), 1) for words in keywords]
    order = sorted(range(len(texts)), key=lambda i: -known[i])
    thoughts = [" ".join([f"[{i}]", *words, GRADES[len(words)]]) for i, words in enumerate(keywords, 1)]
    answer = " > ".join(f"[{i + 1}]" for i in order)
    return f"<think> {' '.join(thoughts)} </think> <answer> {answer} </answer>"


def toy_prompt(query: str, texts: Sequence[str]) -> str:
    """The chat that `encode_prompt` would write. (The toy's words need no escaping, which takes long.)"""
    turns = [query, *(f"[{i}] {text}" for i, text in enumerate(texts, 1)), query]
    return "".join(f"{turn} <|end|> " for turn in turns) + "<|assistant|>"


LESSON_PASSAGES = 96  # in each step of the warm start
EASY_SHARE = 0.15  # of the warm start's steps, which come first and have windows of 3 passages


def toy_lessons(agent: Agent, settings,
                curriculum: bool = True) -> Iterator[list[tuple[list[int], list[int]]]]:
    """The warm start's batches of (prompt ids, answer ids).

    Windows have settings.window passages; with `curriculum`, the first steps have 3. A share
    settings.teacher_graded of the orders uses the grades.
    """
    rng, tokenizer = random.Random(f"lessons {settings.seed}"), agent.tokenizer
    for step in itertools.count():
        size = 3 if curriculum and step < EASY_SHARE * settings.sft_steps else settings.window
        candidates, _ = toy_task(LESSON_PASSAGES // size, size, seed=rng.randrange(2**40))
        prompts = [toy_prompt(c.query, c.texts) for c in candidates]
        answers = [toy_answer(c.query, c.texts, rng.random() < settings.teacher_graded) + " <|end|>"
                   for c in candidates]
        yield list(zip(tokenizer(prompts)["input_ids"], tokenizer(answers)["input_ids"]))


# ------------------------------------------------------------------------------------------------------------
# The model


def toy_agent(seed: int, device: torch.device | str = "cpu") -> Agent:
    """A random Qwen2 of about 90,000 parameters with a word-level tokenizer, made in memory."""
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
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, initializer_range=0.1,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        bos_token_id=None, pad_token_id=0, eos_token_id=1)
    return Agent(AutoModelForCausalLM.from_config(config).eval().to(device), tokenizer, [1])


def toy_trace_statistics(rollouts) -> dict[str, float]:
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

    def __init__(self, settings, folder: Path):
        self.settings, self.folder = settings, folder
        n, size, seed = settings.eval_queries, settings.window, settings.eval_seed
        self.tasks = {"window": toy_task(n, size, seed, held_out=True),
                      "long": toy_task(n // 4, 4 * size, seed + 1, held_out=True)}
        self.scores = {kind: {} for kind in self.tasks}  # NDCG@10 of each query, by list and model
        if rank() == 0:
            for kind, (candidates, qrels) in self.tasks.items():
                write_candidates(folder / f"{kind}.jsonl", candidates)
                write_qrels(folder / f"{kind}.qrels", qrels)

    def evaluate(self, name: str, agent: Agent | None, kinds: Sequence[str] = ("window", "long"),
                 think: bool = True) -> None:
        """Rerank lists of these kinds by `agent` (None: leave them), write the runs and evaluate them.

        Only rank 0 does. The other ranks wait at the next collective.
        """
        if rank() > 0:
            return
        for kind in kinds:
            (candidates, qrels), run = self.tasks[kind], self.folder / f"{kind}.{name}.trec"
            orders = [range(len(c.docids)) for c in candidates]
            if agent:
                size = self.settings.window
                reranker = Reranker(agent, self.settings.prompt, think=think, window=size, stride=size // 2,
                                    max_num_seqs=256, max_new_tokens=self.settings.max_new_tokens)
                rankings = reranker.rank_many([(c.query, c.texts) for c in candidates])
                orders = [[result.index for result in ranking] for ranking in rankings]
            write_run(run, {c.qid: [c.docids[i] for i in o] for c, o in zip(candidates, orders)}, name)
            scores = evaluate(qrels, read_run(run), ["ndcg_cut.10"])
            self.scores[kind][name] = [scores[c.qid]["ndcg_cut_10"] for c in candidates]

    def summary(self) -> dict:
        """Means of NDCG@10, and the paired gains of GRPO with 95 % intervals: what summary.json holds."""
        window, long = self.scores["window"], self.scores["long"]
        summary = {"queries": len(window["grpo"])} | {name: statistics.fmean(window[name]) for name in window}
        summary["sliding_window"] = {name: statistics.fmean(long[name]) for name in long}
        for name, over in (("gain", "warm_start"), ("gain_over_doubled", "warm_start_doubled")):
            if over in window:  # only --control makes the second
                interval = bootstrap_interval([a - b for a, b in zip(window["grpo"], window[over])])
                summary[name] = dict(zip(("mean", "low", "high"), interval))
        return summary

    def finish(self, seconds: float) -> None:
        """Write summary.json, print eval.py's tables and what to try next. Only rank 0 does."""
        if rank() > 0:
            return
        out, settings = self.folder, self.settings
        summary = {"seed": settings.seed, "seconds": round(seconds, 1)} | self.summary()
        with atomic_write(out / "summary.json") as file:
            json.dump(summary, file, indent=2)
        for kind, scores in self.scores.items():  # the warm start first: the others are compared with it
            runs = [f"{out}/{kind}.{name}.trec" for name in dict.fromkeys(["warm_start", *scores])]
            arguments = [f"{out}/{kind}.qrels", *runs, "-m", "ndcg_cut.10"]
            say("\n$ python eval.py " + " ".join(arguments))
            eval_main(arguments)
        say(f"{seconds:.0f} s. Next, see what it thinks about the longer lists:\n  python rearank.py --model "
            f"{out}/checkpoint --prompt toy --window {settings.window} --stride {settings.window // 2} "
            f"--max-new-tokens {settings.max_new_tokens} --input {out}/long.jsonl --output {out}/again.trec")
