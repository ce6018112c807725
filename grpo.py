"""GRPO for REARANK, in plain PyTorch: sample, reward, advantage, loss, step (figure 3 of arXiv 2505.20046).

    python grpo.py                                       the toy run: no download, minutes on a CPU (toy.py)
    python grpo.py --model Qwen/Qwen2.5-7B               the paper's run, on a GPU
    python grpo.py --help                                the toy's settings; with --model NAME the paper's

From top to bottom: advantage and loss (equations 3 and 4); one step; the training loop; supervised learning;
settings; the optimizer; several ranks; the run folder; the plan of memory; the command line.

beta = 0.001 with the k3 estimator, lr = 1e-6 and temperature 1.0 are defaults of VeRL, which the authors use:
the paper does not say. README.md lists where we depart from both. Every sampled token is trained on, the end
token included. Letters in shape comments: B prompts (groups) in a step, G rollouts of each, T answer tokens.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import datetime
import functools
import itertools
import json
import math
import os
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from data import (Candidates, InputError, Instance, atomic_write, command_line, judged_labels,
                  read_candidates, read_qrels, run_main, setting, training_instances)
from model import (Agent, Completion, add_lora, free_memory, load_agent, load_config, merged_state,
                   microbatches, out_of_memory, padded, parameters, pick_device, sample, save_adapter,
                   token_mask)
from rearank import PROMPTS, Reranker, answer_start, encode_prompt, fit_context, fit_prompt
from reward import Score, ndcg, parse_ranking, score_response

# ------------------------------------------------------------------------------------------------------------
# Advantage and loss


def group_advantages(rewards: Tensor) -> Tensor:
    """Each reward against its own group: (r - mean) / std, (..., G) -> (..., G), float32. Paper section 3.3.

    The std is the sample's (divides by G - 1), as in VeRL. A flat group, all rewards equal up to rounding,
    gets exact zeros: a tiny epsilon under the fraction would turn the rounding of 0.7 into advantages near 1.
    """
    rewards = rewards.float()
    flat = rewards.amax(-1, keepdim=True) - rewards.amin(-1, keepdim=True) <= 1e-6
    std = rewards.std(-1, keepdim=True, correction=min(1, rewards.shape[-1] - 1))
    return ((rewards - rewards.mean(-1, keepdim=True)) / std).masked_fill(flat, 0.0)


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Per-token estimate of KL(policy || reference) from the policy's own tokens: never negative, unbiased.

    With d = log reference - log policy it is exp(d) - 1 - d (Schulman's k3). Same shape as the inputs.
    """
    d = ref_logps.float() - logps.float()
    return torch.expm1(d) - d


def grpo_loss(logps: Tensor, ref_logps: Tensor | None, advantages: Tensor, lengths: Tensor,
              beta: float) -> Tensor:
    """Equations 3 and 4, negated: the mean over outputs of each output's mean over tokens. A float32 scalar.

    logps, ref_logps [R, T] (ref_logps may be None at beta 0); advantages [R]; lengths: token counts [R] or a
    mask [R, T]. Purely on-policy, so the ratio policy / stopgrad(policy) is 1 and only its gradient matters:
    the loss's value says nothing about progress (about 0 by construction). Watch the reward.
    """
    mask = lengths.bool() if lengths.dim() == 2 else token_mask(lengths, logps.shape[1])
    logps = logps.float()
    ratio = torch.exp(logps - logps.detach())
    objective = ratio * advantages[:, None]
    if beta:
        objective = objective - beta * k3(logps, ref_logps)
    per_output = objective.masked_fill(~mask, 0.0).sum(1) / mask.sum(1).clamp(min=1)
    return -per_output.mean()


# ------------------------------------------------------------------------------------------------------------
# One step: figure 3 of the paper


def grpo_step(agent: Agent, reference, optimizer: MasterAdamW, instances: list[Instance], lr: float,
              settings: Settings, step: int, reward: Callable[..., Score] = score_response,
              loss: Callable[..., Tensor] = grpo_loss) -> tuple[dict[str, float], Rollouts]:
    """One update: sample, reward, advantage, loss, step. Returns the log's row and the rollouts.

    Another reward or loss is called as `score_response` or `grpo_loss` is.
    """
    started = time.perf_counter()
    rollouts = sample_rollouts(agent, instances, settings, step, reward)
    rollouts.rewards = rewards = rollout_rewards(rollouts, settings, step)  # [B, G]
    advantages = group_advantages(rewards)  # [B, G]
    update = update_policy(agent, reference, optimizer, rollouts, advantages, lr, settings, loss)
    row = {"step": step, **rollout_statistics(rollouts, rewards, advantages), **update, "lr": lr}
    peaks = gather([peak_mib(agent.model.device)])
    return row | {"seconds": time.perf_counter() - started, "peak_mib": max(peaks)}, rollouts


@dataclasses.dataclass
class Rollouts:
    """What one step sampled: B instances and prompts; the rest flat, a prompt's G completions in a row."""

    instances: list[Instance]
    prompts: list[list[int]]
    completions: list[Completion]
    texts: list[str]
    scores: list[Score]
    prompts_cut: float  # share of the prompts that had to be cut to fit
    seconds: float
    rewards: Tensor | None = None  # [B, G]


def sample_rollouts(agent: Agent, instances: list[Instance], settings: Settings, step: int,
                    reward: Callable[..., Score] = score_response) -> Rollouts:
    """Sample G answers to each of B instances' prompts and score them (equations 5 and 6).

    Of several ranks each samples its share of the prompts, and all get all answers.
    """
    started, G, tokenizer = time.perf_counter(), settings.group, agent.tokenizer
    fitted = [fit_prompt(tokenizer, x.query, x.texts, settings.prompt, settings.max_prompt_tokens)
              for x in instances]
    prompts, mine = [ids for ids, _ in fitted], my_share(len(fitted))
    with tqdm(total=len(mine) * G, desc=f"step {step} sampling", unit="answer", leave=False) as bar:
        groups = sample(agent.model, prompts[mine.start:mine.stop], G, settings.max_new_tokens,
                        settings.temperature, agent.stop_ids, settings.seed * 1_000_003 + step,
                        settings.max_rows, bar.update, mine.start)
    completions = [c for group in gather(groups) for c in group]
    opened, _ = answer_start(tokenizer)  # the response begins with what the template has opened
    texts = [opened + agent.decode(c) for c in completions]
    scheme = "normalized" if settings.reward == "random" else settings.reward
    scores = [reward(text, instances[i // G].labels, instances[i // G].ideal, scheme)
              for i, text in enumerate(texts)]
    cut = statistics.fmean(cut.prompt_cut for _, cut in fitted)
    return Rollouts(instances, prompts, completions, texts, scores, cut, time.perf_counter() - started)


def rollout_rewards(rollouts: Rollouts, settings: Settings, step: int) -> Tensor:
    """The rewards [B, G]; for the control --reward random, numbers that ignore the answers."""
    shape = len(rollouts.instances), settings.group
    if settings.reward == "random":
        return torch.rand(shape, generator=torch.Generator().manual_seed(settings.seed * 7919 + step))
    return torch.tensor([score.reward for score in rollouts.scores]).view(shape)


def update_policy(agent: Agent, reference, optimizer: MasterAdamW, rollouts: Rollouts, advantages: Tensor,
                  lr: float, settings: Settings, loss: Callable[..., Tensor] = grpo_loss) -> dict[str, float]:
    """One update by advantages [B, G]. Returns loss, grad_norm, whether the update was skipped since one of
    them is not finite, and per token kl, entropy and how far the log-probabilities are from the sampler's.

    Without a reference kl is nan, and flat groups, which have no gradient at all, are not visited. A rank
    visits its share of the groups; what is returned is of all.
    """
    prompts, (B, G), device = rollouts.prompts, advantages.shape, agent.model.device
    answers = [c.ids for c in rollouts.completions]
    sampled = padded([c.logps or [0.0] * len(c.ids) for c in rollouts.completions], device)  # [B G, T]
    names, mine = ("temperature", "answer_tokens", "prompt_tokens", "checkpointing"), my_share(B)
    options = {name: getattr(settings, name) for name in names}
    live = [g for g in mine if reference is not None or advantages[g].any()]
    ref_logps = None if reference is None else reference_logps(reference, prompts, answers, mine, options)
    advantages = advantages.flatten().to(device)
    sums, most = torch.zeros(5, device=device), torch.zeros((), device=device)
    for batch in microbatches(agent.model, prompts, answers, live, **options):
        (count, width), logps = batch.logps.shape, batch.logps
        ref = logps.detach() if ref_logps is None else ref_logps[batch.rows, :width]
        value = loss(logps, ref, advantages[batch.rows], batch.lengths, settings.beta)
        value = value * count / (B * G)  # a mean over all outputs, however they are cut into micro-batches
        value.backward()
        kl = k3(logps.detach(), ref)  # 0 at padding, where both are 0
        apart = (logps.detach() - sampled[batch.rows, :width]).abs()
        sums += torch.stack([x.detach().sum() for x in (value, kl, batch.entropy, apart, batch.lengths)])
        most = torch.maximum(most, apart.max())
    *columns, mosts = zip(*gather([(*sums.tolist(), len(live), most.item())]))  # a row from each rank
    loss_sum, kl, entropy, apart, tokens, alive = map(sum, columns)
    tokens, finite = tokens or math.nan, math.isfinite(loss_sum) and bool(sampled.isfinite().all())
    norm = optimizer.step(lr, settings.grad_clip, skip=not finite) if alive else 0.0
    return {"loss": loss_sum, "kl": math.nan if reference is None else kl / tokens,
            "entropy": entropy / tokens, "logp_diff": apart / tokens, "logp_diff_max": max(mosts),
            "grad_norm": norm, "skipped": int(not (finite and math.isfinite(norm)))}


@torch.no_grad()
def reference_logps(reference, prompts: list[list[int]], answers: list[list[int]], groups: Sequence[int],
                    options: dict) -> Tensor:
    """Log-probabilities of these groups' tokens under the frozen reference, [B G, T] (0 elsewhere)."""
    logps = torch.zeros(len(answers), max(map(len, answers)), device=reference.device)
    for batch in microbatches(reference, prompts, answers, groups, **options):
        logps[batch.rows, :batch.logps.shape[1]] = batch.logps
    return logps


def rollout_statistics(rollouts: Rollouts, rewards: Tensor, advantages: Tensor) -> dict[str, float]:
    """What the log says of one step's rollouts, their rewards and advantages [B, G]; shares in [0, 1]."""
    instances, scores, completions = rollouts.instances, rollouts.scores, rollouts.completions
    sizes = [len(x.labels) for x in instances for _ in range(rewards.shape[1])]
    rankings = [parse_ranking(text, n) for text, n in zip(rollouts.texts, sizes)]
    tokens = sum(len(c.ids) for c in completions)
    columns = {
        "ndcg": [s.ndcg for s in scores], "ndcg_init": [ndcg(x.labels, ideal=x.ideal) for x in instances],
        "ndcg_best": [ndcg(sorted(x.labels, reverse=True), ideal=x.ideal) for x in instances],
        "rank": [s.rank for s in scores], "format1": [s.format1 for s in scores],
        "format2": [s.format2 for s in scores], "permutations": [r.status == "ok" for r in rankings],
        "identity": [r.order == list(range(n)) for r, n in zip(rankings, sizes)],
        "length": [len(c.ids) for c in completions], "cut": [not c.finished for c in completions]}
    return {"reward": float(rewards.mean()), "reward_std": float(rewards.std(1).mean()),
            "flat_groups": float((advantages == 0).all(1).float().mean()),
            **{name: statistics.fmean(values) for name, values in columns.items()},
            "prompts_cut": rollouts.prompts_cut, "tokens_per_s": tokens / rollouts.seconds}


def peak_mib(device: torch.device) -> float:
    """Most memory used so far: of a GPU if the model is on one, else of this process (on Windows 0)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# ------------------------------------------------------------------------------------------------------------
# The training loop


def train(agent: Agent, instances: list[Instance], settings: Settings, folder: RunFolder,
          measure: Callable[[Rollouts], dict] | None = None, held_out: tuple | None = None, **hooks) -> None:
    """GRPO up to step settings.steps. `measure` adds columns to the log. Ctrl-C saves first (one rank only).

    `held_out` (candidates, qrels): every settings.eval_every steps they are reranked, and the best policy is
    kept in best/. `hooks`: `grpo_step`'s reward and loss. SystemExit after three skipped updates in a row.
    """
    if not instances:
        raise InputError("no training instance is left: loosen --keep-draws and --min-ndcg")
    reference = None
    if settings.beta or settings.log_kl:  # frozen weights, all but LoRA's, are there once for both
        frozen = {id(p): p for p in agent.model.parameters() if not p.requires_grad}
        reference = copy.deepcopy(agent.model, frozen).requires_grad_(False)
    optimizer = MasterAdamW(agent.model.parameters(), settings.weight_decay, settings.offload)
    state = folder.load(optimizer, "grpo")
    done, best, rows = state["step"], (state["best"], state["best_step"]), folder.rewind(state)
    warned = set().union(*(collapses(rows[:n]) for n in range(len(rows) + 1)))  # each once in a run
    saved = done or -1  # a run of no steps is saved too
    try:
        steps = range(done + 1, settings.steps + 1)
        for step in tqdm(steps, desc="GRPO", initial=done, total=settings.steps, unit="step"):
            lr = learning_rate(step, settings.steps, settings.lr, settings.warmup, settings.decay)
            batch = batch_of(instances, step, settings)
            row, rollouts = grpo_step(agent, reference, optimizer, batch, lr, settings, step, **hooks)
            optimizer.moved = True  # so is the folder now, until the step is complete
            if held_out and (step % settings.eval_every == 0 or step == settings.steps):
                row |= validate(agent, *held_out, settings)
                best = max(best, (row["eval_ndcg"], step), key=lambda pair: pair[0])  # the first of equals
            folder.log(row | (measure(rollouts) if measure else {}))
            if (step - 1) % settings.samples_every == 0 or step == settings.steps:  # of the first prompt
                worst, *_, top = sorted(range(settings.group), key=rollouts.rewards[0].tolist().__getitem__)
                tqdm.write(folder.write_samples("samples.txt", step, rollouts, (top, worst)))
            if row["skipped"]:
                folder.write_samples("skipped.txt", step, rollouts, range(len(rollouts.texts)))
            done, optimizer.moved = step, False  # all that a save of this step holds is there
            rows.append(row)
            watch(rows, warned)
            if step % settings.save_every == 0 or step == best[1]:
                folder.save(agent, optimizer, "grpo", step, *best)
                saved = step
        if saved < done:
            folder.save(agent, optimizer, "grpo", done, *best)
    except BaseException as error:  # Ctrl-C, say; several ranks cannot agree to save when one of them stops
        if saved < done and not optimizer.moved and ranks()[1] == 1 and not isinstance(error, OSError):
            folder.save(agent, optimizer, "grpo", done, *best)
            print(f"step {done} is saved; go on with --resume", file=sys.stderr)
        raise
    finally:
        optimizer.release()


def watch(rows: list[dict[str, float]], warned: set[str]) -> None:
    """Say what has collapsed by the newest of the log's rows and is not yet in `warned`, which gets it.
    SystemExit where it is the third in a row whose update was skipped."""
    step = rows[-1]["step"]
    for warning in sorted(collapses(rows) - warned):
        tqdm.write(f"step {step}: WARNING, a collapse? Compared with the earlier steps {warning}.")
        warned.add(warning)
    if [row["skipped"] for row in rows[-3:]] == [1, 1, 1]:
        raise SystemExit(f"step {step}: the third update in a row that is not finite; lower --lr, or look at "
                         "the rollouts in the run folder's skipped.txt")


def collapses(rows: list[dict[str, float]]) -> set[str]:
    """What has collapsed, in words: the mean of the log's last three rows against that of at least five
    earlier ones. (Healthy runs of the toy come nowhere near these bounds; 30 x its learning rate does.)"""
    rows = [row for row in rows if not row["skipped"]]
    if len(rows) < 8:
        return set()
    before, now = {}, {}
    for name in ("reward", "length", "entropy", "identity", "flat_groups"):
        for means, part in (before, rows[:-3]), (now, rows[-3:]):
            known = [row[name] for row in part if not math.isnan(row[name])]  # flat groups have no entropy
            means[name] = statistics.fmean(known) if known else math.nan
    found = {"the reward is lower by 0.15": now["reward"] < before["reward"] - 0.15,
             "a quarter more of the orders is unchanged": now["identity"] > before["identity"] + 0.25,
             "half of the groups more are flat": now["flat_groups"] > before["flat_groups"] + 0.5}
    for name in ("length", "entropy"):
        found[f"the {name} is less than half"] = now[name] < before[name] / 2
        found[f"the {name} is more than double"] = now[name] > before[name] * 2
    return {what for what, is_so in found.items() if is_so}


def validate(agent: Agent, candidates: list[Candidates], qrels: dict, settings: Settings) -> dict[str, float]:
    """Greedy reranking of each list's first window: the mean NDCG@10 and its 95 % interval.

    The interval is the normal one, 1.96 standard errors over the queries. Each rank reranks its share.
    """
    mine = my_share(len(candidates))
    candidates = candidates[mine.start:mine.stop]
    lists = [(c.query, c.texts[:settings.window]) for c in candidates]
    limits = {name: getattr(settings, name) for name in ("max_new_tokens", "max_prompt_tokens", "max_rows")}
    reranker = Reranker(agent, settings.prompt, settings.window, settings.window, **limits)
    scores = []
    for c, ranking in zip(candidates, reranker.rank_many(lists)):
        order = [result.index for result in ranking] + list(range(len(ranking), len(c.docids)))
        labels = judged_labels(c, qrels[c.qid])
        scores.append(ndcg([labels[i] for i in order], ideal=list(qrels[c.qid].values())))
    scores = gather(scores)
    mean, error = statistics.fmean(scores), statistics.stdev(scores) / math.sqrt(len(scores))
    return {"eval_ndcg": mean, "eval_low": mean - 1.96 * error, "eval_high": mean + 1.96 * error}


def batch_of(instances: list[Instance], step: int, settings: Settings) -> list[Instance]:
    """The instances of step 1, 2, ...: a new shuffle each time the pool is used up. A function of the seed
    and the step alone, so that a resumed run goes on as the unbroken one would have."""
    B, n, pool = settings.prompts_per_step, len(instances), []
    for epoch in range((step - 1) * B // n, (step * B - 1) // n + 1):
        shuffled = list(instances)
        random.Random(f"{settings.seed} {epoch}").shuffle(shuffled)
        pool += shuffled
    return pool[(step - 1) * B % n:][:B]


def learning_rate(step: int, steps: int, peak: float, warmup: int, decay: bool) -> float:
    """Linear warm-up, then constant or, with `decay`, falling linearly to a tenth. Steps count from 1."""
    fall = 1.0 - 0.9 * max(0, step - warmup) / max(1, steps - warmup) if decay else 1.0
    return peak * min(1.0, step / max(1, warmup)) * fall


# ------------------------------------------------------------------------------------------------------------
# Supervised learning: the toy's warm start and the paper's "direct SFT" row are this one function


def supervised(agent: Agent, batches: Iterator[list[tuple[list[int], list[int]]]], steps: int, lr: float,
               settings: Settings, title: str = "supervised", folder: RunFolder | None = None,
               phase: str = "sft") -> float:
    """`steps` AdamW steps of cross-entropy on batches of (prompt ids, answer ids), a mean over answer tokens.

    Returns the last loss. With a run folder it is saved and resumed there as this phase. A step whose loss or
    gradient is not finite is skipped; SystemExit after three in a row.
    """
    total, bad, weights = math.nan, 0, agent.model.parameters()
    optimizer = MasterAdamW(weights, settings.weight_decay, settings.offload, betas=(0.9, 0.95))
    done = folder.load(optimizer, phase)["step"] if folder else 0
    batches = itertools.islice(batches, done, None)
    with tqdm(range(done + 1, steps + 1), desc=title, initial=done, total=steps, unit="step") as bar:
        for step in bar:
            prompts, answers = zip(*next(batches))
            tokens, total, mine = sum(map(len, answers)), 0.0, my_share(len(prompts))
            for batch in microbatches(agent.model, prompts, answers, mine, 1.0, settings.answer_tokens,
                                      settings.prompt_tokens, settings.checkpointing):
                loss = -batch.logps.sum() / tokens
                loss.backward()
                total += loss.item()
            total = sum(gather([total]))
            norm = optimizer.step(learning_rate(step, steps, lr, steps // 20, decay=True), settings.grad_clip,
                                  skip=not math.isfinite(total))
            bad = 0 if math.isfinite(total) and math.isfinite(norm) else bad + 1
            if bad == 3:
                raise SystemExit(f"{title}, step {step}: the third in a row that is not finite; lower "
                                 "--sft-lr")
            bar.set_postfix(loss=f"{total:.3f}", refresh=False)
            if folder and (step % settings.save_every == 0 or step == steps):
                folder.save(agent, optimizer, phase, step)
    optimizer.release()
    return total


def best_order_batches(agent: Agent, instances: list[Instance],
                       settings: Settings) -> Iterator[list[tuple[list[int], list[int]]]]:
    """The paper's direct SFT: prompts with their best possible order as the answer, no reasoning."""
    for step in itertools.count(1):
        batch = []
        for x in batch_of(instances, step, settings):
            order = sorted(range(len(x.labels)), key=lambda i: -x.labels[i])
            answer = f"<answer> {' > '.join(f'[{i + 1}]' for i in order)} </answer>"
            ids = agent.tokenizer(answer, add_special_tokens=False)["input_ids"]
            prompt = encode_prompt(agent.tokenizer, x.query, x.texts, settings.prompt,
                                   settings.max_prompt_tokens)
            batch.append((prompt, [*ids, agent.end_id]))
        yield batch


# ------------------------------------------------------------------------------------------------------------
# Settings


@dataclasses.dataclass
class Settings:
    """Settings of `python grpo.py --model ...`: the paper's run."""

    model: str = setting("", "A model folder or hub name, e.g. Qwen/Qwen2.5-7B; without it, the toy run.")
    data: list[str] = setting(lambda: ["auto"], "Data sets by name (python data.py download), files of "
                              "instances or, with --qrels, of candidates. auto: rearank_12k if it has been "
                              "downloaded, else dl21 and dl22.", nargs="+")
    qrels: list[str] = setting(list, "Judgements for files of candidates given as --data.", nargs="+")
    out: str = setting("runs/rearank", "The run folder: config, log, samples, checkpoint.")
    seed: int = setting(0, "Seed of everything random.")
    prompts_per_step: int = setting(128, "Prompts (windows) in a step.", least=1)
    group: int = setting(32, "Rollouts sampled for each prompt.", least=2)
    steps: int = setting(160, "GRPO steps: one update each, purely on-policy.", least=0)
    sft_steps: int = setting(0, "Supervised steps on best orders, before GRPO.", least=0)
    sft_lr: float = setting(1e-5, "Learning rate of the supervised steps.", least=0)
    lr: float = setting(1e-6, "Learning rate.", least=0)
    warmup: int = setting(5, "Steps of linear warm-up.", least=0)
    decay: bool = setting(False, "Let the learning rate fall linearly to a tenth over the run.")
    beta: float = setting(0.001, "Weight of the KL penalty to the frozen starting model.", least=0)
    log_kl: bool = setting(False, "Measure the KL to the starting model at --beta 0 too.")
    temperature: float = setting(1.0, "Sampling temperature of the rollouts.", least=0.01)
    grad_clip: float = setting(1.0, "Largest norm of the gradient.", least=1e-6)
    weight_decay: float = setting(0.0, "AdamW's weight decay.")
    reward: str = setting("normalized", "The ranking reward (Table 3); random is a control: no learning.",
                          choices=("normalized", "absolute", "difference", "random"))
    prompt: str = setting("rearank", "The prompt to train with.", choices=tuple(PROMPTS))
    window: int = setting(20, "Passages drawn for a training instance.", least=2)
    draws: int = setting(100, "Draws a query in the initial state expansion.", least=1)
    order: str = setting("retrieval", "Initial order of a draw.", choices=("retrieval", "shuffled"))
    keep_draws: str = setting("initial", "Which draws are kept: by initial NDCG@10, by best possible, all.",
                              choices=("initial", "best", "all"))
    min_ndcg: float = setting(0.1, "The least NDCG@10 of a draw that is kept.")
    max_new_tokens: int = setting(2048, "Longest rollout.", least=1)
    max_prompt_tokens: int = setting(4096, "Longer prompts are made to fit.", least=1)
    max_rows: int = setting(0, "Rollouts written at a time; 0: as many as fit.", least=0)
    answer_tokens: int = setting(0, "Rollout tokens in a micro-batch; 0: as many as fit.", least=0)
    prompt_tokens: int = setting(8192, "Prompt tokens encoded together in the update.", least=1)
    checkpointing: bool | None = setting(None, "Recompute activations going backward (default: if need be).")
    offload: bool | None = setting(None, "AdamW's masters and moments in host memory (default: if need be).")
    plan: bool = setting(False, "Print what training would take and choose, and stop.")
    memory: float = setting(0.0, "GiB that --plan takes for free on a card; 0: what is.", least=0)
    gpus: int = setting(0, "Cards that --plan is for; 0: as many as torchrun has started processes.", least=0)
    eval_data: str = setting("", "Held-out candidates, whose first windows are reranked. The best of many "
                             "policies looks better there than it is: compare it on others.")
    eval_qrels: str = setting("", "Their judgements.")
    eval_every: int = setting(10, "Validate every so many steps; the best policy is kept in best/.", least=1)
    samples_every: int = setting(10, "Write two whole rollouts every so many steps.", least=1)
    save_every: int = setting(10, "Save every so many steps.", least=1)
    keep: int = setting(2, "How many saves are kept, of the supervised steps and of GRPO.", least=1)
    resume: bool = setting(False, "Go on from the newest save in --out, if there is one.")
    lora_rank: int = setting(0, "Train LoRA matrices of this rank instead of all weights (try ten times the "
                             "--lr).", least=0)
    device: str = setting("auto", "cuda, mps, cpu or auto.")
    dtype: str = setting("auto", "Precision of the weights; auto: float32 on a CPU, else bfloat16 "
                         "(master weights are float32).", choices=("auto", "float32", "bfloat16"))


# ------------------------------------------------------------------------------------------------------------
# The optimizer


class MasterAdamW:
    """AdamW over float32 master copies of the weights, whatever precision the model computes in.

    In bfloat16 an update of 1e-6 is smaller than the spacing of the weights and would round to nothing; here
    it adds up in the master. Gradients are added up in float32 too, on the model's device: a hook takes each
    as soon as backward has made it (`release` ends that). With `offload`, masters and moments live in host
    memory, where one gradient at a time follows them. float32 weights are their own masters where they are.

    On several ranks this is ZeRO-2 (arXiv 1910.02054): each has the weights whole, to sample with, and
    masters and moments of its slice of every weight. Not FSDP2: it would have to put the weights together for
    every token sampled, works by hooks that `forward` goes past, and hangs where ranks have unequal numbers
    of micro-batches. ZeroRedundancyOptimizer keeps no float32 masters.
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], weight_decay: float = 0.0, offload: bool = False,
                 betas: tuple[float, float] = (0.9, 0.999)):
        self.params = [p for p in params if p.requires_grad]
        self.masters, self.moved = [], False  # weights are `moved` by `step`, until the caller has noted it
        for p in self.params:
            place = torch.device("cpu") if offload else p.device
            own = p.dtype == torch.float32 and place == p.device and ranks()[1] == 1
            copied = None if own else my_slice(p.detach()).to(place, torch.float32, copy=True)
            self.masters.append(p if own else torch.nn.Parameter(copied))
        self.sums: dict[torch.nn.Parameter, Tensor] = {}
        self.hooks = [p.register_post_accumulate_grad_hook(self._take)
                      for p, master in zip(self.params, self.masters) if p is not master]
        self.adams = [torch.optim.AdamW([master], 0.0, betas, weight_decay=weight_decay, fused=True)
                      for master in self.masters]  # one for each, so that each can step by itself

    def _take(self, param: torch.nn.Parameter) -> None:
        grad, param.grad = param.grad.float(), None
        self.sums[param] = self.sums[param].add_(grad) if param in self.sums else grad

    def release(self) -> None:
        """Leave the model to another optimizer."""
        for hook in self.hooks:
            hook.remove()

    @torch.no_grad()
    def step(self, lr: float, grad_clip: float, skip: bool = False) -> float:
        """One update at rate `lr`, of the sum of all ranks' gradients, which must all come here; clears the
        gradients and returns their norm from before clipping. With `skip`, or a norm that is not finite, the
        weights stay as they are.
        """
        grads = []
        for param in self.params:  # on a rank that has no gradient it is zero
            if (grad := self.sums.pop(param, param.grad)) is None:
                grad = torch.zeros_like(param, dtype=torch.float32)
            grads.append(sum_of_slices(grad))
        norm = math.sqrt(sum(gather([float(torch.nn.utils.get_total_norm(grads)) ** 2])))
        self.moved = True
        for param, master, adam, grad in zip(self.params, self.masters, self.adams, grads):
            if math.isfinite(norm) and not skip:
                master.grad = grad.mul_(min(1.0, grad_clip / (norm + 1e-6))).to(master.device)
                adam.param_groups[0]["lr"] = lr
                adam.step()
                if param is not master:
                    param.copy_(from_slices(master.to(param.dtype), param))
            param.grad = master.grad = None
        return norm

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as named tensors: moments, counts of steps, float32 weights. The
        same for any number of ranks, which must all come here; only the first gets it."""
        named = {}
        for i, (param, master, adam) in enumerate(zip(self.params, self.masters, self.adams)):
            for name, value in {"master": master.detach(), **adam.state[master]}.items():
                value = from_slices(value, param) if value.dim() else value  # a count of steps has none
                if ranks()[0] == 0:
                    named[f"{name}.{i}"] = value.contiguous() if ranks()[1] == 1 else value.cpu()
        return named

    @torch.no_grad()
    def load_state(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """The inverse of `state`, one tensor after the other."""
        for name, value in named:
            key, _, index = name.rpartition(".")
            param, master, adam = (x[int(index)] for x in (self.params, self.masters, self.adams))
            if key == "master":
                master.copy_(my_slice(value))
                param.copy_(value)
            else:
                value = my_slice(value) if value.dim() else value
                adam.state[master][key] = value.to(master.device, copy=ranks()[1] > 1)


# ------------------------------------------------------------------------------------------------------------
# Several ranks, a card each (torchrun). With one, each of these gives back what it gets.


def on_all_ranks(run: Callable[[Settings], int], settings: Settings) -> int:
    """run(settings) on each of the processes that torchrun has started, if any.

    Only the first one prints results. A fault that all of them meet is printed once, by the first to meet it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return run(settings)
    store, rank, number = next(dist.rendezvous("env://"))
    try:
        return join_and_run(run, settings, store, rank, number)
    except InputError as error:
        if store.add(f"fault: {error}", 1) > 1:
            raise SystemExit(2) from None
        raise


def join_and_run(run: Callable[[Settings], int], settings: Settings, store: dist.Store, rank: int,
                 number: int) -> int:
    """Join the other ranks, then run(settings). InputError where another rank has ended."""
    on_cards = pick_device(settings.device).type == "cuda"
    if on_cards:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    patience = datetime.timedelta(hours=2)  # while the first rank saves, or another writes longer answers
    dist.init_process_group("nccl" if on_cards else "gloo", timeout=patience, store=store, rank=rank,
                            world_size=number)
    if rank:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)
    try:
        return run(settings)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):  # gloo's is a plain one
            raise
        raise InputError(f"rank {rank}: another rank has ended, which stops the run; go on from "
                         "the newest save with --resume") from None
    finally:
        dist.destroy_process_group()


def ranks() -> tuple[int, int]:
    """(this process's rank, their number)."""
    joined = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)


def my_share(n: int) -> range:
    """Which of n prompts are this rank's."""
    rank, number = ranks()
    return range(n * rank // number, n * (rank + 1) // number)


def gather(items: list) -> list:
    """All ranks' items, in the ranks' order, on every rank."""
    parts = [items] * ranks()[1]
    if len(parts) > 1:
        dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def slices(x: Tensor) -> Tensor:
    """[...] -> [ranks, n]: a slice for each, zeros behind the last."""
    return F.pad(x.reshape(-1), (0, -x.numel() % ranks()[1])).view(ranks()[1], -1)


def my_slice(x: Tensor) -> Tensor:
    """[...] -> [n], this rank's slice. (The only rank's: x as it is.)"""
    return x if ranks()[1] == 1 else slices(x)[ranks()[0]]


def sum_of_slices(x: Tensor) -> Tensor:
    """[...] -> [n], this rank's slice of the sum over ranks."""
    if ranks()[1] == 1:
        return x
    parts, collective = slices(x), getattr(dist, "reduce_scatter_single", None)
    mine = torch.empty_like(parts[0])
    (collective or dist.reduce_scatter_tensor)(mine, parts.flatten())  # torch 2.11's name
    return mine


def from_slices(mine: Tensor, like: Tensor) -> Tensor:
    """The inverse of `my_slice`: all ranks' slices [n] as one tensor, of `like`'s shape, on its device."""
    if ranks()[1] == 1:
        return mine
    whole = mine.new_empty(mine.numel() * ranks()[1], device=like.device)
    (getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor)(whole, mine.to(like.device))
    return whole[:like.numel()].view_as(like)


# ------------------------------------------------------------------------------------------------------------
# The run folder


LOGS = ("log.csv", "samples.txt", "skipped.txt")  # what grows; a save notes how long they are
COLUMNS = (
    "step", "reward", "ndcg", "ndcg_init", "ndcg_best", "eval_ndcg", "eval_low", "eval_high", "reward_std",
    "rank", "format1", "format2", "permutations", "identity", "flat_groups", "length", "cut", "prompts_cut",
    "kl", "entropy", "logp_diff", "logp_diff_max", "grad_norm", "skipped", "lr", "loss", "tokens_per_s",
    "seconds", "peak_mib")
LINE = (
    "step {step:4d}  reward {reward:+.3f}  NDCG@10 {ndcg:.3f} (given {ndcg_init:.3f}, best {ndcg_best:.3f})  "
    "in-group std {reward_std:.2f}  full {permutations:.0%}  flat {flat_groups:.0%}  length {length:.0f}  "
    "cut {cut:.0%}  entropy {entropy:.2f}  {tokens_per_s:.0f} tok/s  {seconds:.1f} s")


class RunFolder:
    """config.json, log.csv, samples.txt and saves/PHASE-STEP/, each of which gets its name when it is whole.

    The link `latest`, replaced in one instant, names the newest; checkpoint (as from_pretrained loads it),
    state (for --resume) and adapter (LoRA's) are links through it, and so always of one step; best is a link
    to the best save's checkpoint. `trained_on` says what `training_instances` chose; a run that is resumed
    must have the same, else InputError. An earlier run is moved aside. Only the first rank writes.
    """

    def __init__(self, settings: Settings, trained_on: dict | None = None):
        self.path, self.settings, self.writes = Path(settings.out), settings, ranks()[0] == 0
        earlier = self.earlier_config(settings)
        if earlier and trained_on and earlier.get("trained_on") not in (None, trained_on):
            raise InputError(f"--resume: {self.path} was trained on other data, {earlier['trained_on']}; "
                             f"these are {trained_on}")
        if self.writes:
            if settings.resume and not earlier:
                print(f"--resume: nothing has been saved in {self.path} yet: starting from the beginning")
            self.lock()
            if not earlier and self.holds_run(self.path):
                aside = next(a for n in itertools.count(1) if not (a := Path(f"{self.path}.{n}")).exists())
                self.path.rename(aside)
                print(f"{self.path} held an earlier run, which is now {aside}")
                self.lock()
            for link in ("checkpoint", "state", *["adapter"] * bool(settings.lora_rank)):
                self.point(link, f"latest/{link}")
            with atomic_write(self.path / "config.json") as file:
                json.dump(dataclasses.asdict(settings) | {"trained_on": trained_on}, file, indent=2)
        gather([])  # no rank looks into the folder before it is ready

    def lock(self) -> None:
        """Make the folder and claim it. InputError where another process trains in it."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.claim = open(self.path / ".lock", "w")
        try:
            import fcntl

            fcntl.lockf(self.claim, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go of when the process ends
        except BlockingIOError:
            raise InputError(f"{self.path}: another process is training there") from None
        except (ImportError, OSError):  # Windows; a file system without locks
            pass

    @staticmethod
    def holds_run(path: Path) -> bool:
        """Whether a run has left something in this folder."""
        begun = (path / "log.csv").exists() or (path / "saves").exists()
        return begun and (path / "config.json").exists()

    @staticmethod
    def earlier_config(settings: Settings) -> dict:
        """config.json of the run to resume; {} without --resume or a save. InputError for another run's."""
        path = Path(settings.out)
        if not settings.resume or not any(path.glob("saves/*-[0-9]*")):
            return {}
        try:
            earlier = json.loads((path / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"--resume: {path}/config.json cannot be read ({error})") from None
        for name in ("model seed prompts_per_step group reward prompt window draws order keep_draws min_ndcg "
                     "sft_steps sft_lr lora_rank teacher_graded eval_queries eval_seed").split():
            if earlier.get(name) != getattr(settings, name, None):  # the last three are the toy's
                flag = name.replace("_", "-")
                raise InputError(f"--resume: {path} was begun with --{flag} {earlier.get(name)!r}")
        return earlier

    def log(self, row: dict[str, float]) -> None:
        """Append one step to log.csv and print it, without the loss: on-policy it is about 0."""
        if not self.writes:
            return
        with open(self.path / "log.csv", "a", newline="", encoding="utf-8") as file:
            columns = [*COLUMNS, *(name for name in row if name not in COLUMNS)]
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            if not file.tell():
                writer.writeheader()
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        line = LINE if math.isnan(row["kl"]) else LINE + "  kl {kl:.4f}"
        if "eval_ndcg" in row:
            line += "  held out {eval_ndcg:.3f} ({eval_low:.3f} to {eval_high:.3f})"
        if row["skipped"]:
            line += "  SKIPPED: loss {loss}, norm {grad_norm}; see skipped.txt"
        tqdm.write(line.format(**row))

    def write_samples(self, name: str, step: int, rollouts: Rollouts, which: Iterable[int]) -> str:
        """Append these of a step's rollouts to the file `name`. Returns what is new."""
        new = ""
        for i in which:
            instance, score = rollouts.instances[i // self.settings.group], rollouts.scores[i]
            reward, tokens = float(rollouts.rewards.flatten()[i]), len(rollouts.completions[i].ids)
            new += (f"--- step {step}, query {instance.qid}: {instance.query}\n"
                    f"    labels of [1], [2], ...: {instance.labels}\n"
                    f"    reward {reward:+.3f}, NDCG@10 {score.ndcg:.3f}, "
                    f"format {score.format1:.0f} {score.format2:.0f}, {tokens} tokens\n"
                    f"{rollouts.texts[i]}\n\n")
        if self.writes:
            with open(self.path / name, "a", encoding="utf-8") as file:
                file.write(new)
        return new

    def save(self, agent: Agent, optimizer: MasterAdamW, phase: str, step: int, best: float = -1.0,
             best_step: int = 0) -> None:
        """Write a save, then let `latest` name it, then delete the phase's saves that are too old.

        `best` is the best validation so far. OSError where it cannot be written, SystemExit where the weights
        are not finite: what was saved before stays.
        """
        if not all(p.isfinite().all() for p in agent.model.parameters()):
            raise SystemExit(f"{phase}, step {step}: weights are not finite, and are not saved; lower the "
                             "learning rate and go on from the save before with --resume")
        tensors = optimizer.state()
        if not self.writes:
            return
        part, save = (self.path / "saves" / name for name in (".part", f"{phase}-{step:06d}"))
        state = {"step": step, "best": best, "best_step": best_step}
        state |= {file.name: file.stat().st_size for name in LOGS if (file := self.path / name).exists()}
        for unfinished in (part, save):  # of a run that was killed while it saved
            shutil.rmtree(unfinished, ignore_errors=True)
        try:
            (part / "state").mkdir(parents=True)
            write_model(agent, part / "checkpoint")
            save_adapter(agent.model, part / "adapter", self.settings.model)
            save_file(tensors, part / "state/optimizer.safetensors")
            (part / "state/state.json").write_text(json.dumps(state), encoding="utf-8")
            os.umask(umask := os.umask(0))  # the only way to ask for it
            for file in part.glob("*/*"):  # safetensors writes its files for their owner alone
                file.chmod(0o666 & ~umask)
            part.rename(save)
        except (OSError, SafetensorError) as error:
            raise OSError(f"{save} cannot be written ({error}); what was saved before is as it was: go on "
                          "from it with --resume") from None
        finally:
            shutil.rmtree(part, ignore_errors=True)
        if best_step:
            self.point("best", f"saves/grpo-{best_step:06d}/checkpoint")
        self.point("latest", f"saves/{save.name}")
        # Later ones could not be read: they are written again in their turn.
        for old in [old for old in self.saves(phase) if old <= save][:-self.settings.keep]:
            if old.name != f"grpo-{best_step:06d}":
                shutil.rmtree(old)

    def saves(self, phase: str) -> list[Path]:
        """The saves of a phase, the newest last."""
        return sorted(self.path.glob(f"saves/{phase}-" + "[0-9]" * 6))

    def point(self, link: str, target: str) -> None:
        """Let a link lead to `target`, in one instant."""
        new = self.path / f".{link}.link"
        new.unlink(missing_ok=True)
        new.symlink_to(target)
        os.replace(new, self.path / link)

    def load(self, optimizer: MasterAdamW, phase: str) -> dict:
        """Read the phase's newest readable save into the optimizer. Returns its state.json, else step 0.

        InputError where there are saves but none is readable, or the ranks do not see the same.
        """
        state, saves = {"step": 0, "best": -1.0, "best_step": 0}, self.saves(phase)
        for save in reversed(saves):
            try:
                found = json.loads((save / "state/state.json").read_text(encoding="utf-8"))
                found = {name: found[name] for name in state} | found  # KeyError where one is missing
                for part in save.glob("checkpoint/*.safetensors"):
                    with safe_open(part, "pt"):  # which sees whether it is whole
                        pass
                with safe_open(save / "state/optimizer.safetensors", "pt") as file:
                    optimizer.load_state((name, file.get_tensor(name)) for name in file.keys())
                print(f"--resume: going on from {save}")
                state = found
                break
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                print(f"--resume: {save} cannot be read ({error})", file=sys.stderr)
        else:
            if saves:
                raise InputError(f"--resume: none of {self.path}/saves/{phase}-* can be read")
        if len(set(gather([state["step"]]))) > 1:
            raise InputError(f"--resume: the ranks do not read the same save in {self.path}")
        return state

    def rewind(self, state: dict) -> list[dict[str, float]]:
        """Bring the folder back to what it was when this state was saved. Returns the rows of its log."""
        if self.writes:
            if state["step"]:
                self.point("latest", f"saves/grpo-{state['step']:06d}")  # killed before it did?
            for file in (self.path / name for name in LOGS if (self.path / name).exists()):
                os.truncate(file, min(state.get(file.name, 0), file.stat().st_size))
        gather([])  # no rank reads before that
        log = self.path / "log.csv"
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        return [{name: float(value or "nan") for name, value in row.items()} for row in csv.DictReader(lines)]


def write_model(agent: Agent, folder: Path) -> None:
    """Write model and tokenizer as others read them, LoRA added to the weights.

    transformers 4, and engines built on it, look for RoPE's base and the precision under their older
    names (and take 10,000 for a base they do not find), and do not know the tokenizer class of
    transformers 5.
    """
    disable_progress_bar()  # of transformers' writing: it would break up our own
    agent.model.save_pretrained(folder, state_dict=merged_state(agent.model))
    enable_progress_bar()
    agent.tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {}
    config |= {"rope_theta": rope.get("rope_theta", 10_000.0), "torch_dtype": config.get("dtype")}
    # A config may have said "tied" beside a head of its own, which other loaders would then drop.
    config["tie_word_embeddings"] = agent.model.lm_head.weight is agent.model.get_input_embeddings().weight
    config.pop("auto_map", None)  # names code in the model's folder, which we have neither run nor copied
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("auto_map", None)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------
# The plan of memory


def memory_rows(c, N: int, s: Settings, size: int,
                lora: int = 0) -> dict[str, tuple[float, float, float]]:
    """{what: bytes (on a card while sampling, in the update; in the host)}, for N weights of `size` bytes and
    `lora` ones in float32 beside them, which then alone are trained.

    Of config `c`, with prompts and answers of the greatest length. Logits' gradient is added up in the head's
    weights, of which there are three for a moment. (A CPU does not fuse rms_norm: it keeps more.) Of several
    cards each has whole gradients until the step, and a slice of masters and moments, which the first gathers
    to save them.
    """
    cards, P, T, trained = max(1, s.gpus), s.max_prompt_tokens, s.max_new_tokens, lora or N
    rows = min(s.max_rows, -(-s.prompts_per_step // cards) * s.group)
    H, K, layers, hidden = c.num_attention_heads, c.num_key_value_heads, c.num_hidden_layers, c.hidden_size
    D = getattr(c, "head_dim", None) or hidden // H
    prompt_tokens, answer_tokens = max(P, s.prompt_tokens), max(T, s.answer_tokens)
    cache = 2 * layers * K * D * size  # a token's keys and values
    layer = size * (4 * hidden + 3 * H * D + 2 * K * D + 4 * c.intermediate_size)  # kept for a token
    kept = (prompt_tokens + answer_tokens) * layers * (size * hidden if s.checkpointing else layer)
    again = layer * answer_tokens if s.checkpointing else 0  # one layer's, computed again
    weights, reference = N * size + 4 * lora, (4 * lora or N * size) * bool(s.beta or s.log_kl)
    copies = s.offload or cards > 1 or size < 4 and not lora  # else weights are their own masters
    state, offload = trained * (12 if copies else 8) / cards, bool(s.offload)
    written = (rows * T + -(-rows // s.group) * P) * cache
    scores = (10 if size < 4 else 8) * H * answer_tokens * max(P, T)
    logits = 10 * min(2**27, answer_tokens * c.vocab_size) + 3 * c.vocab_size * hidden * size * (not lora)
    return {
        "weights": (weights, weights, 0),
        "reference model": (reference, reference, 0),
        "gradients in float32": (0, 4 * trained, 0),
        "masters and moments": (state * (not offload), state * (not offload),
                                cards * state * offload + 12 * trained * (cards > 1)),
        "keys and values": (written, 2 * prompt_tokens * cache, 0),
        "activations": (0, kept + again, 0),
        "scores or logits": (max(8 * rows * H * P, 12 * rows * c.vocab_size), max(scores, logits), 0)}


def planned(settings: Settings) -> tuple[Settings, str]:
    """The settings, made to fit the model's positions, those left open (None or 0) chosen so that training
    fits into the free memory (or --memory); and the plan as text. The faster before the leaner; what is set
    by hand stays. InputError where nothing fits.
    """
    device, (config, _) = pick_device(settings.device), load_config(settings.model)
    card, host = free_memory(device), free_memory(torch.device("cpu"))
    half = settings.dtype == "bfloat16" or settings.dtype == "auto" and device.type != "cpu"
    if settings.memory:  # of another machine, whose host we do not know
        card, host, half = settings.memory * 2**30, math.inf, settings.dtype != "float32"
    # A CPU has one memory for all that runs on it; so has a Mac. The ranks on this machine share it.
    shared = device.type != "cuda" and not settings.memory
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if shared else 1
    card, host = map(min, zip(*gather([(card, host)])))  # the least of all ranks
    P, T = fit_context(config, settings.max_prompt_tokens, settings.max_new_tokens)
    settings = dataclasses.replace(settings, max_prompt_tokens=P, max_new_tokens=T,
                                   gpus=settings.gpus if settings.plan and settings.gpus else ranks()[1])
    ways = {"offload": (False, True), "checkpointing": (False, True), "answer_tokens": (8192, 4096, 2048),
            "max_rows": (512, 256, 128, 64, 32)}
    for name in ways:
        if (value := getattr(settings, name)) or value is False:  # 0 is open, False is not
            ways[name] = (value,)
    if shared:
        ways["offload"] = (False,)  # there is no second memory to move anything to
    N, size = parameters(config), 2 if half else 4
    lora = parameters(config, settings.lora_rank) if settings.lora_rank else 0
    for values in itertools.product(*ways.values()):
        chosen = dataclasses.replace(settings, **dict(zip(ways, values)))
        table = memory_rows(config, N, chosen, size, lora)
        *on_card, in_host = (sum(column) for column in zip(*table.values()))
        needed = local * max(on_card) + in_host * shared  # of the memory that the weights are in
        if fits := needed <= 0.95 * card and (shared or in_host <= host):  # the rest is the allocator's
            break
    lines = [f"{'GiB':24} sampling   update     host"]
    for name, row in (table | {"together": (*on_card, in_host)}).items():
        lines.append(f"{name:24}" + "".join(f"{x / 2**30:9.1f}" for x in row))
    flags = []
    for name, value in zip(ways, values):
        flag = name.replace("_", "-")
        flags.append(f"--{flag} {value}" if type(value) is int else f"--{flag}" if value else f"--no-{flag}")
    GiB = 2**30
    if shared:
        there = f"{card / GiB:.1f} GiB of memory"
        takes = f"{needed / GiB:.1f} GiB of memory" + f" for {local} processes" * (local > 1)
    else:
        there = f"{card / GiB:.0f} GiB" + f" on each of {chosen.gpus} cards" * (chosen.gpus > 1)
        takes = f"{needed / GiB:.0f} GiB on the card and {in_host / GiB:.0f} in the host"
        if host < math.inf:  # infinite: another machine's
            there += f" and {host / GiB:.0f} in the host"
    save = N * size + 12 * (lora or N)
    lines.append(f"{there} are free; a save writes {save / GiB:.1f}. Chosen: {' '.join(flags)}")
    if not fits:
        raise InputError(f"training needs at least {takes}, and {there} are free: use a smaller model, "
                         f"{'' if settings.lora_rank else '--lora-rank 16, '}--beta 0 (no reference) or "
                         "a shorter --max-new-tokens")
    return chosen, "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------
# Command line


def read_held_out(settings: Settings, trained_on: set[str]) -> tuple[list[Candidates], dict]:
    """(candidates, qrels) of --eval-data, those with judgements. InputError for one that is trained on."""
    qrels = read_qrels(settings.eval_qrels) if settings.eval_qrels else {}
    candidates = [c for c in read_candidates(settings.eval_data) if c.qid in qrels]
    if len(candidates) < 2:
        raise InputError("--eval-data: expected --eval-qrels with judgements of at least two of its queries")
    if both := sorted(trained_on & {c.qid for c in candidates}):
        raise InputError(f"--eval-data: query {both[0]} is trained on; a held-out query must not be")
    return candidates, qrels


def train_model(settings: Settings) -> int:
    """The paper's run on a real model."""
    if earlier := RunFolder.earlier_config(settings):
        if settings.data == ["auto"]:
            settings.data, settings.qrels = earlier["data"], earlier["qrels"]
    elif not settings.plan and not settings.resume and RunFolder.holds_run(Path(settings.out)):
        raise InputError(f"{settings.out} holds an earlier run: pass --resume to go on, or another --out")
    if settings.qrels and settings.data == ["auto"]:
        raise InputError("--qrels: expected --data with the candidates that they judge")
    settings, plan = planned(settings)
    print(plan)
    if settings.plan:
        return 0
    instances, chosen = training_instances(
        settings.data, settings.qrels, draws=settings.draws, size=settings.window, order=settings.order,
        keep=settings.keep_draws, min_ndcg=settings.min_ndcg, seed=settings.seed)
    settings.data = chosen["data"]  # what auto stood for: --resume keeps to it
    held_out = read_held_out(settings, {x.qid for x in instances}) if settings.eval_data else None
    agent = load_agent(settings.model, settings.device, settings.dtype)  # after the data, soon at fault
    print(f"{len(instances)} training instances of {chosen['queries']} queries; {settings.prompts_per_step} "
          f"prompts x {settings.group} rollouts a step, {settings.steps} steps")
    longest = max(instances, key=lambda x: len(x.texts))  # does a prompt fit? asked before the folder is made
    encode_prompt(agent.tokenizer, longest.query, longest.texts, settings.prompt, settings.max_prompt_tokens)
    folder = RunFolder(settings, chosen)
    try:
        if settings.lora_rank:
            add_lora(agent.model, settings.lora_rank, settings.seed)
        if settings.sft_steps:
            batches = best_order_batches(agent, instances, settings)
            supervised(agent, batches, settings.sft_steps, settings.sft_lr, settings, folder=folder)
        train(agent, instances, settings, folder, held_out=held_out)
    except (RuntimeError, MemoryError) as error:  # torch's own is a RuntimeError
        if not out_of_memory(error):
            raise
        raise InputError("too little memory for a step: lower --answer-tokens, --prompt-tokens or --max-rows "
                         "or pass --checkpointing and --offload") from None
    print(f"{folder.path}/checkpoint is the trained model; rerank with it:\n  python rearank.py --model "
          f"{folder.path}/checkpoint --prompt {settings.prompt} --input CANDIDATES --output RUN")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Train the model that --model names, or hand over to the toy run."""
    argv = sys.argv[1:] if argv is None else argv
    if any(a == "--model" or a.startswith("--model=") for a in argv):
        return on_all_ranks(train_model, command_line(Settings, argv, __doc__))
    import toy  # here, since toy.py is built on this file

    return toy.main(argv)


if __name__ == "__main__":
    run_main(main)
