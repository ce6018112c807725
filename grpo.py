"""GRPO for REARANK, in plain PyTorch: sample, reward, advantage, loss, step (figure 3 of arXiv 2505.20046).

    python grpo.py                                       the toy run: no download, minutes on a CPU (toy.py)
    python grpo.py --model Qwen/Qwen2.5-7B               the paper's run, on a GPU
    python grpo.py --help                                all options

From top to bottom: advantage and loss (equations 3 and 4); one step; the training loop; supervised learning;
the settings; the toy run; the run on a real model.

The paper gives no beta, learning rate and temperature. Ours are the defaults of VeRL, the framework that its
authors use: 0.001 (with the k3 estimator), 1e-6 and 1.0. docs/paper.md lists where we depart from the paper.
Every sampled token is trained on, the end token included. Letters in shape comments: B prompts in a step,
G rollouts (sampled answers) per prompt, R = some of the B x G answers, T answer tokens.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import toy
from data import judged_labels, training_instances
from model import (Agent, Completion, Microbatch, answer_losses, load_agent, load_config, microbatches,
                   padded, sample, token_mask)
from prompts import answer_start, encode_prompt, fit_context, fit_prompt, load_prompt
from rearank import Reranker
from reward import Score, ndcg, parse_ranking, score_response
from support import distributed
from support.cli import InputError, command_line, refuse, run_main, setting
from support.device import memory_advice, peak_mib, pick_device
from support.distributed import gather, my_share, on_all_ranks, say
from support.files import Candidates, Instance, read_held_out
from support.lora import add_lora
from support.memory import plan
from support.optimizer import MasterAdamW, learning_rate
from support.run_folder import Phase, RunFolder, earlier_config, holds_run
from support.training_log import progress

# ------------------------------------------------------------------------------------------------------------
# Advantage and loss


def group_advantages(rewards: Tensor) -> Tensor:
    """Each reward compared with its own group: (r - mean) / std, (..., G) -> (..., G), float32. Section 3.3.

    The std divides by G - 1, as in VeRL. A group whose rewards are all equal (up to rounding) gets exact
    zeros: with only a tiny epsilon in the denominator, rounding errors of 0.7 would become advantages near 1.
    """
    rewards = rewards.float()
    all_equal = rewards.amax(-1, keepdim=True) - rewards.amin(-1, keepdim=True) <= 1e-6
    std = rewards.std(-1, keepdim=True, correction=min(1, rewards.shape[-1] - 1))
    return ((rewards - rewards.mean(-1, keepdim=True)) / std).masked_fill(all_equal, 0.0)


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Per-token estimate of KL(policy || reference) from the policy's own tokens: never negative, unbiased.

    With d = log reference - log policy it is exp(d) - 1 - d (Schulman's k3). Same shape as the inputs.
    """
    d = ref_logps.float() - logps.float()
    return torch.expm1(d) - d


def clipped_objective(ratio: Tensor, advantages: Tensor, clip: Sequence[float]) -> Tensor:
    """min(ratio A, clip(ratio, 1 - low, 1 + high) A) of each token: PPO's objective. [R, T] from [R, T], [R].

    An update gains nothing more by moving a token's ratio out of [1 - low, 1 + high].
    """
    low, high = clip
    A = advantages[:, None]
    return torch.minimum(ratio * A, ratio.clamp(1 - low, 1 + high) * A)


def grpo_loss(logps: Tensor, ref_logps: Tensor | None, advantages: Tensor, lengths: Tensor, beta: float,
              old_logps: Tensor | None = None, clip: Sequence[float] = (0.2, 0.2),
              all_lengths: Tensor | None = None) -> Tensor:
    """Equations 3 and 4, negated: the mean over answers of each answer's mean over tokens. A float32 scalar.

    logps, ref_logps [R, T] (ref_logps may be None at beta 0); advantages [R]; lengths: token counts [R] or a
    mask [R, T]; old_logps [R, T]: the policy's before the batch's first update (default: now). all_lengths
    [B x G]: R are a part of so many answers, and the result is their share of the mean over all.

    In the first update of a batch policy and old policy are equal: the ratio is 1, the clip has no effect,
    and only the gradient matters. So the loss is about 0 and says nothing about progress: watch the reward.
    """
    mask = lengths.bool() if lengths.dim() == 2 else token_mask(lengths, logps.shape[1])
    logps = logps.float()
    ratio = torch.exp(logps - (logps.detach() if old_logps is None else old_logps))
    objective = clipped_objective(ratio, advantages, clip)
    if beta:
        objective = objective - beta * k3(logps, ref_logps)
    per_answer = objective.masked_fill(~mask, 0.0).sum(1) / mask.sum(1).clamp(min=1)
    loss = -per_answer.mean()
    return loss if all_lengths is None else loss * len(logps) / len(all_lengths)


# ------------------------------------------------------------------------------------------------------------
# One step: figure 3 of the paper


@dataclasses.dataclass
class Rollouts:
    """What one step sampled: B instances and prompts; G answers per prompt, one prompt after the other."""

    instances: list[Instance]
    prompts: list[list[int]]
    completions: list[Completion]
    texts: list[str]
    scores: list[Score]
    prompts_shortened: float  # share of the prompts that had to be shortened to fit
    seconds: float
    rewards: Tensor | None = None  # [B, G]


def grpo_step(agent: Agent, reference, optimizer: MasterAdamW, instances: list[Instance], lr: float,
              settings: TrainSettings, step: int, reward: Callable[..., Score] = score_response,
              advantage: Callable[[Rollouts], Tensor] | None = None,
              loss: Callable[..., Tensor] = grpo_loss) -> tuple[dict[str, float], Rollouts]:
    """Sample a batch and update the policy on it. Returns the log's row and the rollouts.

    `reference` is the frozen starting model, or None where no KL is needed. Another `reward` or `loss` is
    called as `score_response` or `grpo_loss` is; `advantage` gets the rollouts and returns [B, G]. An update
    whose loss or gradient is not finite is skipped, and ends the step.
    """
    started = time.perf_counter()
    # Sample: G answers to each of B prompts.
    rollouts = sample_rollouts(agent, instances, settings, step)
    # Reward: the gain in NDCG@10, and the format (equations 5 and 6).
    rollouts.rewards = score_rollouts(rollouts, settings, step, reward)  # [B, G]
    # Advantage: each answer compared with its own group.
    advantages = advantage(rollouts) if advantage else group_advantages(rollouts.rewards)  # [B, G]
    row, kept_logps = {}, {}
    for _ in range(settings.updates):
        # Loss: equations 3 and 4, one micro-batch after the other.
        sums = []
        for batch in policy_microbatches(agent, reference, rollouts, advantages, settings, kept_logps):
            value = loss(batch.logps, batch.ref_logps, batch.advantages, batch.lengths, settings.beta,
                         batch.old_logps, settings.clip, batch.all_lengths)
            value.backward()
            sums.append(batch_sums(batch, value, settings.clip))
        # Step: clip the gradient, then AdamW.
        (means, tokens), norm = step_means(sums, reference is not None), 0.0
        finite = math.isfinite(means["loss"]) and math.isfinite(means["logp_diff_max"])
        if tokens:  # else all groups' rewards were equal: nothing to learn
            norm = optimizer.step(lr, settings.grad_clip, skip=not finite)
        row = row or means  # of the first update, where the policy is the one that sampled
        row |= {"clipped": means["clipped"], "grad_norm": norm}  # of the last one
        row["skipped"] = int(not (finite and math.isfinite(norm)))
        if row["skipped"]:
            break
    row |= rollout_statistics(rollouts, advantages)
    row |= {"step": step, "lr": lr, "seconds": time.perf_counter() - started}
    return row | {"peak_mib": max(gather([peak_mib(agent.model.device)]))}, rollouts


def sample_rollouts(agent: Agent, instances: list[Instance], settings: TrainSettings, step: int) -> Rollouts:
    """Sample G answers to each instance's prompt. Each rank samples for its share; all get all answers."""
    started, G, tokenizer = time.perf_counter(), settings.group_size, agent.tokenizer
    fitted = [fit_prompt(tokenizer, x.query, x.texts, settings.prompt, settings.max_prompt_tokens)
              for x in instances]
    prompts = [ids for ids, _ in fitted]
    mine = my_share(len(prompts))
    with tqdm(total=len(mine) * G, desc=f"step {step} sampling", unit="answer", leave=False,
              disable=distributed.rank() > 0) as bar:
        groups = sample(
            agent.model, prompts[mine.start:mine.stop], group_size=G, max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature, stop_ids=agent.stop_ids,
            seed=settings.seed * 1_000_003 + step, max_num_seqs=settings.max_num_seqs, progress=bar.update,
            first=mine.start)
    completions = [completion for group in gather(groups) for completion in group]
    opened, _ = answer_start(tokenizer)  # a template may open <think> itself: it belongs to the response
    texts = [opened + agent.decode(completion) for completion in completions]
    shortened = statistics.fmean(how.prompt_shortened for _, how in fitted)
    return Rollouts(instances, prompts, completions, texts, [], shortened, time.perf_counter() - started)


def score_rollouts(rollouts: Rollouts, settings: TrainSettings, step: int,
                   reward: Callable[..., Score] = score_response) -> Tensor:
    """Fill in `rollouts.scores`. Returns the rewards [B, G]; for --reward random, random numbers."""
    scheme = "normalized" if settings.reward == "random" else settings.reward
    for i, text in enumerate(rollouts.texts):
        instance = rollouts.instances[i // settings.group_size]
        rollouts.scores.append(reward(text, instance.labels, instance.ideal, scheme))
    shape = len(rollouts.instances), settings.group_size
    if settings.reward == "random":
        return torch.rand(shape, generator=torch.Generator().manual_seed(settings.seed * 7919 + step))
    return torch.tensor([score.reward for score in rollouts.scores]).view(shape)


@dataclasses.dataclass
class PolicyBatch(Microbatch):
    """A micro-batch of R answers under the policy, with what the loss needs. Zero at padding."""

    old_logps: Tensor  # [R, T] of the policy before the batch's first update
    ref_logps: Tensor  # [R, T] of the reference; without one, the policy's own
    sampled_logps: Tensor  # [R, T] as the sampler recorded them
    advantages: Tensor  # [R]
    all_lengths: Tensor  # [B x G] of all answers: what a loss divides by


def policy_microbatches(agent: Agent, reference, rollouts: Rollouts, advantages: Tensor,
                        settings: TrainSettings,
                        kept: dict[str, Tensor] | None = None) -> Iterator[PolicyBatch]:
    """This rank's answers, in micro-batches. After the last one of a prompt, this generator sends the
    gradients on through the prompt (see `model.microbatches`).

    Without a reference, groups whose advantages [B, G] are all 0 have no gradient and are not visited. A
    dict that is passed as `kept` to all updates of a step keeps "old" and "ref": the log-probabilities
    [B x G, T] of the policy in the first update, and of the reference.
    """
    kept = {} if kept is None else kept
    device, prompts = agent.model.device, rollouts.prompts
    answers = [completion.ids for completion in rollouts.completions]
    sampled = padded([c.logps or [0.0] * len(c.ids) for c in rollouts.completions], device)  # [B x G, T]
    options = (settings.temperature, settings.microbatch_tokens, settings.prompt_batch_tokens,
               settings.checkpointing)
    groups = my_share(len(prompts))
    if reference is None:
        groups = [g for g in groups if advantages[g].any()]
    elif "ref" not in kept:
        kept["ref"] = torch.zeros_like(sampled)
        with torch.no_grad():
            for batch in microbatches(reference, prompts, answers, groups, *options):
                kept["ref"][batch.rows, :batch.logps.shape[1]] = batch.logps
    first_update = "old" not in kept
    if first_update:
        kept["old"] = torch.zeros_like(sampled)
    advantages = advantages.flatten().to(device)
    all_lengths = torch.tensor([len(answer) for answer in answers], device=device)
    for batch in microbatches(agent.model, prompts, answers, groups, *options):
        here = batch.rows, slice(batch.logps.shape[1])
        if first_update:
            kept["old"][here] = batch.logps.detach()
        old = kept["old"][here]
        ref = old if reference is None else kept["ref"][here]
        yield PolicyBatch(**vars(batch), old_logps=old, ref_logps=ref, sampled_logps=sampled[here],
                          advantages=advantages[batch.rows], all_lengths=all_lengths)


def batch_sums(batch: PolicyBatch, loss: Tensor, clip: Sequence[float]) -> Tensor:
    """What `step_means` needs of a micro-batch, [7]. (A tensor, so that a GPU is not waited for.)"""
    logps, A = batch.logps.detach(), batch.advantages[:, None]
    difference, ratio = (logps - batch.sampled_logps).abs(), torch.exp(logps - batch.old_logps)
    clipped = clipped_objective(ratio, batch.advantages, clip) < ratio * A
    columns = loss.detach(), k3(logps, batch.ref_logps), batch.entropy, difference, clipped, batch.lengths
    return torch.stack([*(x.sum().float() for x in columns), difference.max()])


def step_means(sums: list[Tensor], kl_is_known: bool) -> tuple[dict[str, float], float]:
    """(The log's columns: the loss, and means over the tokens: kl, entropy, distance from the sampler's
    logps, share that is clipped; the number of tokens.)

    Over the micro-batches of all ranks, each of which must call this. What was not measured is NaN.
    """
    every = torch.tensor(gather([x.tolist() for x in sums]) or [[0.0] * 7], dtype=torch.float64)
    loss, kl, entropy, difference, clipped, tokens, _ = every.sum(0).tolist()
    n = tokens or math.nan
    return {"loss": loss, "kl": kl / n if kl_is_known else math.nan, "entropy": entropy / n,
            "logp_diff": difference / n, "logp_diff_max": every[:, -1].max().item(),
            "clipped": clipped / n}, tokens


def rollout_statistics(rollouts: Rollouts, advantages: Tensor) -> dict[str, float]:
    """The log's columns about a step's rollouts and their advantages [B, G]; shares are in [0, 1]."""
    instances, scores, completions = rollouts.instances, rollouts.scores, rollouts.completions
    G = advantages.shape[1]
    unchanged, whole = [], []
    for i, text in enumerate(rollouts.texts):
        n = len(instances[i // G].labels)
        ranking = parse_ranking(text, n)
        unchanged.append(ranking.order == list(range(n)))
        whole.append(ranking.status == "ok")
    columns = {
        "ndcg": [s.ndcg for s in scores], "ndcg_init": [ndcg(x.labels, ideal=x.ideal) for x in instances],
        "ndcg_best": [ndcg(sorted(x.labels, reverse=True), ideal=x.ideal) for x in instances],
        "rank": [s.rank for s in scores], "format1": [s.format1 for s in scores],
        "format2": [s.format2 for s in scores], "permutations": whole, "unchanged": unchanged,
        "length": [len(c.ids) for c in completions], "hit_limit": [not c.finished for c in completions]}
    row = {name: statistics.fmean(values) for name, values in columns.items()}
    row["reward"] = float(rollouts.rewards.mean())
    row["reward_std"] = float(rollouts.rewards.std(1).mean())
    row["zero_std_groups"] = float((advantages == 0).all(1).float().mean())
    row["prompts_shortened"] = rollouts.prompts_shortened
    row["tokens_per_s"] = sum(len(c.ids) for c in completions) / rollouts.seconds
    return row


# ------------------------------------------------------------------------------------------------------------
# The training loop


def train(agent: Agent, instances: list[Instance], settings: TrainSettings, folder: RunFolder,
          measure: Callable[[Rollouts], dict] | None = None, held_out: tuple | None = None, **hooks) -> None:
    """GRPO up to step `settings.steps`, in a run folder that is resumed.

    `measure` adds columns to the log. `held_out` (candidates, qrels): every settings.eval_every steps they
    are reranked, and best/ keeps the best policy. `hooks`: another `reward` or `loss` for `grpo_step`.
    SystemExit after three skipped updates in a row.
    """
    if not instances:
        raise InputError("no training instance is left: loosen --keep-draws and --min-ndcg")
    reference = frozen_copy(agent.model) if settings.beta or settings.log_kl else None
    optimizer = MasterAdamW(agent.model.parameters(), settings.weight_decay, settings.offload)
    with Phase(folder, "grpo", agent, optimizer) as phase:
        for step in progress(phase.step, settings.steps, "GRPO"):
            batch = batch_of(instances, step, settings)
            lr = learning_rate(step, settings.steps, settings.lr, settings.warmup, settings.decay)
            row, rollouts = grpo_step(agent, reference, optimizer, batch, lr, settings, step, **hooks)
            if measure:
                row |= measure(rollouts)
            if held_out and (step % settings.eval_every == 0 or step == settings.steps):
                row |= validate(agent, *held_out, settings)
            phase.log(row, rollouts)
            phase.save_if_due()


def frozen_copy(model):
    """A copy of the model that is not trained. Weights that are frozen already (LoRA's base) are shared."""
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, frozen).requires_grad_(False)


def batch_of(instances: list[Instance], step: int, settings: TrainSettings) -> list[Instance]:
    """The instances of step 1, 2, ...: a new shuffle each time all have been used.

    They depend on the seed and the step alone, so that a resumed run goes on as the unbroken one. With 10
    instances and 4 per step, step 3 has the last two of the first shuffle and two of the second.
    """
    B, n, pool = settings.prompts_per_step, len(instances), []
    for epoch in range((step - 1) * B // n, (step * B - 1) // n + 1):
        shuffled = list(instances)
        random.Random(f"{settings.seed} {epoch}").shuffle(shuffled)
        pool += shuffled
    return pool[(step - 1) * B % n:][:B]


def validate(agent: Agent, candidates: list[Candidates], qrels: dict,
             settings: TrainSettings) -> dict[str, float]:
    """Greedy reranking of each list's first window: the mean NDCG@10 and its 95 % interval.

    The interval is the normal one, 1.96 standard errors over the queries. Each rank reranks its share.
    """
    candidates = [candidates[i] for i in my_share(len(candidates))]
    lists = [(c.query, c.texts[:settings.window]) for c in candidates]
    reranker = Reranker(agent, settings.prompt, window=settings.window, stride=settings.window,
                        max_new_tokens=settings.max_new_tokens, max_num_seqs=settings.max_num_seqs,
                        max_prompt_tokens=settings.max_prompt_tokens)
    scores = []
    for c, ranking in zip(candidates, reranker.rank_many(lists)):
        order = [result.index for result in ranking] + list(range(len(ranking), len(c.docids)))
        labels = judged_labels(c, qrels[c.qid])
        scores.append(ndcg([labels[i] for i in order], ideal=list(qrels[c.qid].values())))
    scores = gather(scores)
    mean, error = statistics.fmean(scores), statistics.stdev(scores) / math.sqrt(len(scores))
    return {"eval_ndcg": mean, "eval_low": mean - 1.96 * error, "eval_high": mean + 1.96 * error}


# ------------------------------------------------------------------------------------------------------------
# Supervised learning: the toy's warm start, and the paper's "direct SFT" row of Table 3


def supervised(agent: Agent, batches: Iterator[list[tuple[list[int], list[int]]]], steps: int, lr: float,
               settings: TrainSettings, name: str = "sft", folder: RunFolder | None = None) -> float:
    """`steps` AdamW steps of cross-entropy on batches of (prompt ids, answer ids), a mean over answer tokens.

    Returns the last loss. With a run folder it is saved and resumed there under `name`. A step whose loss or
    gradient is not finite is skipped; SystemExit after three in a row.
    """
    loss, bad = math.nan, 0
    weights = agent.model.parameters()
    optimizer = MasterAdamW(weights, settings.weight_decay, settings.offload, betas=(0.9, 0.95))
    with Phase(folder, name, agent, optimizer) as phase:
        batches = itertools.islice(batches, phase.step, None)
        for step in (bar := progress(phase.step, steps, name)):
            prompts, answers = zip(*next(batches))
            tokens, loss = sum(map(len, answers)), 0.0
            mine = my_share(len(prompts))
            for total in answer_losses(agent.model, [prompts[i] for i in mine], [answers[i] for i in mine],
                                       settings.prompt_batch_tokens, settings.checkpointing):
                (total / tokens).backward()
                loss += total.item() / tokens
            loss = sum(gather([loss]))
            rate = learning_rate(step, steps, lr, steps // 20, decay=True)
            norm = optimizer.step(rate, settings.grad_clip, skip=not math.isfinite(loss))
            bad = 0 if math.isfinite(loss) and math.isfinite(norm) else bad + 1
            if bad == 3:
                raise SystemExit(f"{name}, step {step}: the third in a row is not finite; lower --sft-lr")
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            phase.complete(step)
            phase.save_if_due()
    return loss


def best_order_batches(agent: Agent, instances: list[Instance],
                       settings: TrainSettings) -> Iterator[list[tuple[list[int], list[int]]]]:
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
class TrainSettings:
    """Settings of `python grpo.py`. The defaults are the paper's run; toy.TOY has those of the toy run."""

    model: str = setting("", "A model folder or hub name, e.g. Qwen/Qwen2.5-7B; without it, the toy run.",
                         group="input and output")
    data: list[str] = setting(lambda: ["auto"], "Data sets by name (python data.py download), files of "
                              "instances or, with --qrels, of candidates. auto: rearank_12k if it has been "
                              "downloaded, else dl21 and dl22.", nargs="+")
    qrels: list[str] = setting(list, "Judgements for files of candidates given as --data.", nargs="+")
    out: str = setting("runs/rearank", "The run folder: config, log, samples, checkpoint.")
    resume: bool = setting(False, "Go on from the newest save in --out, if there is one.")
    eval_data: str = setting("", "Held-out candidates, whose first windows are reranked. They select best/, "
                             "so report its score on other data.")
    eval_qrels: str = setting("", "Judgements of --eval-data.")

    prompt: str = setting("rearank", "The prompt to train with: rearank, rankgpt, toy or a template "
                          "of rank_llm, FILE.yaml.", group="model")
    lora_rank: int = setting(0, "Train LoRA matrices of this rank instead of all weights (try ten times the "
                             "--lr).", minimum=0)
    device: str = setting("auto", "cuda, mps, cpu or auto.")
    dtype: str = setting("auto", "Precision of the weights; auto: float32 on a CPU, else bfloat16 "
                         "(master weights are float32).", choices=("auto", "float32", "bfloat16"))

    steps: int = setting(160, "GRPO steps.", minimum=0, group="algorithm")
    prompts_per_step: int = setting(128, "Prompts (windows) per step.", minimum=1)
    group_size: int = setting(32, "Rollouts sampled for each prompt: GRPO's G.", minimum=2)
    lr: float = setting(1e-6, "Learning rate.", minimum=0)
    warmup: int = setting(5, "Steps of linear warm-up.", minimum=0)
    decay: bool = setting(False, "Let the learning rate fall linearly to a tenth over the run.")
    beta: float = setting(0.001, "Weight of the KL penalty to the frozen starting model.", minimum=0)
    log_kl: bool = setting(False, "Measure the KL to the starting model at --beta 0 too.")
    temperature: float = setting(1.0, "Sampling temperature of the rollouts.", minimum=0.01)
    max_new_tokens: int = setting(2048, "Longest rollout.", minimum=1)
    max_prompt_tokens: int = setting(4096, "Longer prompts are shortened to fit.", minimum=1)
    reward: str = setting("normalized", "The ranking reward (Table 3); random is a control: no learning.",
                          choices=("normalized", "absolute", "difference", "random"))
    updates: int = setting(1, "Updates per batch of rollouts; from the second on, --clip has an effect.",
                           minimum=1)
    clip: list[float] = setting(lambda: [0.2, 0.2], "Bounds of a token's ratio: 1 - LOW and 1 + HIGH.",
                                nargs=2, type=float, metavar=("LOW", "HIGH"))
    grad_clip: float = setting(1.0, "Largest norm of the gradient.", minimum=1e-6)
    weight_decay: float = setting(0.0, "AdamW's weight decay.")
    sft_steps: int = setting(0, "Supervised steps on best orders, before GRPO.", minimum=0)
    sft_lr: float = setting(1e-5, "Learning rate of the supervised steps.", minimum=0)
    seed: int = setting(0, "Seed of everything random.")

    window: int = setting(20, "Passages drawn for a training instance.", minimum=2, group="training data")
    draws: int = setting(100, "Draws per query in the initial state expansion.", minimum=1)
    order: str = setting("retrieval", "Initial order of a draw.", choices=("retrieval", "shuffled"))
    keep_draws: str = setting("initial", "Which draws are kept: by initial NDCG@10, by best possible, all.",
                              choices=("initial", "best", "all"))
    min_ndcg: float = setting(0.1, "The least NDCG@10 of a draw that is kept.")

    plan: bool = setting(False, "Print what training would take and choose, and stop.", group="memory")
    memory: float = setting(0.0, "Free GiB on a card that --plan assumes; 0: what is free.", minimum=0)
    gpus: int = setting(0, "Cards that --plan assumes; 0: one per process of torchrun.", minimum=0)
    max_num_seqs: int = setting(0, "Rollouts sampled at a time; 0: as many as fit.", minimum=0)
    microbatch_tokens: int = setting(0, "Rollout tokens in a micro-batch; 0: as many as fit.", minimum=0)
    prompt_batch_tokens: int = setting(8192, "Prompt tokens encoded together in the update.", minimum=1)
    checkpointing: bool | None = setting(None, "Recompute activations going backward (default: if needed).")
    offload: bool | None = setting(None, "AdamW's masters and moments in host memory (default: if needed).")

    eval_every: int = setting(10, "Validate every so many steps.", minimum=1, group="run")
    samples_every: int = setting(10, "Write two whole rollouts every so many steps.", minimum=1)
    save_every: int = setting(10, "Save every so many steps.", minimum=1)
    keep: int = setting(2, "How many saves are kept, of the supervised steps and of GRPO.", minimum=1)

    teacher_graded: float = setting(0.25, "Share of teacher's orders that use its grades.", group="toy run")
    control: bool = setting(False, "Also train the warm start twice as long, to compare with GRPO.")
    eval_queries: int = setting(200, "Held-out queries in the closing table.", minimum=4)
    eval_seed: int = setting(2505, "Seed of the held-out queries.")


# ------------------------------------------------------------------------------------------------------------
# The toy run


def toy_run(settings: TrainSettings) -> int:
    """Warm start, control, GRPO, exam. Writes summary.json and prints eval.py's tables."""
    started, steps, lr = time.time(), settings.sft_steps, settings.sft_lr
    folder = RunFolder(settings)
    agent = toy.toy_agent(settings.seed, pick_device(settings.device))
    exam = toy.ToyExam(settings, folder.path)
    say(f"toy run, seed {settings.seed}: {agent.model.num_parameters():,} parameters, no downloads")
    exam.evaluate("first_stage", None)
    lessons = toy.toy_lessons(agent, settings)
    supervised(agent, lessons, steps, lr, settings, "warm_start", folder)
    exam.evaluate("warm_start", agent)
    if settings.control:
        doubled = Agent(copy.deepcopy(agent.model), agent.tokenizer, agent.stop_ids)
        others = dataclasses.replace(settings, seed=settings.seed + 10**6)
        lessons = toy.toy_lessons(doubled, others, curriculum=False)
        supervised(doubled, lessons, steps, lr, settings, "control, the warm start again")
        exam.evaluate("warm_start_doubled", doubled, ["window"])
    instances, held_out = toy.toy_data(settings)
    if settings.lora_rank:
        add_lora(agent.model, settings.lora_rank, settings.seed)
    train(agent, instances, settings, folder, toy.toy_trace_statistics, held_out)
    exam.evaluate("grpo", agent)
    exam.evaluate("grpo_without_think", agent, ["window"], think=False)
    exam.finish(time.time() - started)
    return 0


# ------------------------------------------------------------------------------------------------------------
# The run on a real model


def train_model(settings: TrainSettings) -> int:
    """The paper's run: plan, data, model, then supervised steps if asked for, then GRPO."""
    load_prompt(settings.prompt)  # faults in it are found before anything else is done
    earlier = earlier_config(settings)
    if earlier and settings.data == ["auto"]:
        settings.data, settings.qrels = earlier["data"], earlier["qrels"]
    if not earlier and not settings.plan and not settings.resume and holds_run(Path(settings.out)):
        raise InputError(f"{settings.out} holds an earlier run: pass --resume to go on, or another --out")
    config, _ = load_config(settings.model)
    gpus = settings.gpus if settings.plan and settings.gpus else distributed.world_size()
    P, T = fit_context(config, settings.max_prompt_tokens, settings.max_new_tokens)
    settings = dataclasses.replace(settings, gpus=gpus, max_prompt_tokens=P, max_new_tokens=T)
    settings, table = plan(config, settings, pick_device(settings.device))
    say(table)
    if settings.plan:
        return 0
    instances, chosen = training_instances(
        settings.data, settings.qrels, draws=settings.draws, size=settings.window, order=settings.order,
        keep=settings.keep_draws, min_ndcg=settings.min_ndcg, seed=settings.seed)
    settings.data = chosen["data"]  # what auto stood for: --resume keeps to it
    held_out = None
    if settings.eval_data:
        held_out = read_held_out(settings.eval_data, settings.eval_qrels, {x.qid for x in instances})
    agent = load_agent(settings.model, settings.device, settings.dtype)  # last: it is slow
    say(f"{len(instances)} training instances of {chosen['queries']} queries; {settings.prompts_per_step} "
        f"prompts x {settings.group_size} rollouts per step, {settings.steps} steps")
    longest = max(instances, key=lambda x: len(x.texts))  # if this prompt does not fit, no folder is made
    encode_prompt(agent.tokenizer, longest.query, longest.texts, settings.prompt, settings.max_prompt_tokens)
    folder = RunFolder(settings, chosen)
    with memory_advice("for a step: lower --microbatch-tokens, --prompt-batch-tokens or --max-num-seqs, or "
                       "pass --checkpointing and --offload"):
        if settings.lora_rank:
            add_lora(agent.model, settings.lora_rank, settings.seed)
        if settings.sft_steps:
            batches = best_order_batches(agent, instances, settings)
            supervised(agent, batches, settings.sft_steps, settings.sft_lr, settings, "sft", folder)
        train(agent, instances, settings, folder, held_out=held_out)
    window = f" --window {settings.window} --stride {(settings.window + 1) // 2}"
    say(f"{folder.path}/checkpoint is the trained model; rerank with it:\n  python rearank.py --model "
        f"{folder.path}/checkpoint --prompt {settings.prompt}{window} --max-new-tokens "
        f"{settings.max_new_tokens} --input CANDIDATES --output RUN")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Train the model that --model names; without it, do the toy run."""
    argv = sys.argv[1:] if argv is None else argv
    is_toy = not any(a == "--model" or a.startswith("--model=") for a in argv)
    settings = command_line(TrainSettings, argv, __doc__, defaults=toy.TOY if is_toy else None)
    no_effect = (
        (is_toy, "data qrels eval_data eval_qrels plan memory gpus prompt", "needs --model"),
        (not is_toy, "teacher_graded control eval_queries eval_seed", "belongs to the toy run (no --model)"),
        (not is_toy and not settings.eval_data, "eval_qrels eval_every", "has no effect without --eval-data"),
        (not settings.plan, "memory gpus", "has no effect without --plan"),
        (not settings.sft_steps, "sft_lr", "has no effect without --sft-steps"),
        (settings.updates == 1, "clip", "has no effect without --updates 2 or more"))
    for applies, names, reason in no_effect:
        if applies:
            refuse(settings, names.split(), reason)
    if is_toy and (settings.window > 20 or settings.dtype == "bfloat16"):
        raise InputError("the toy's words end at [20] and its weights are float32: --window 21 or more and "
                         "--dtype bfloat16 need --model")
    if not 0 <= settings.clip[0] <= 1 or not settings.clip[1] >= 0:
        raise InputError(f"--clip: expected LOW from 0 to 1 and HIGH from 0, found {settings.clip}")
    if settings.qrels and settings.data == ["auto"]:
        raise InputError("--qrels: expected --data with the candidates that they judge")
    run = toy_run if is_toy else train_model
    return on_all_ranks(lambda: run(settings), pick_device(settings.device).type == "cuda")


if __name__ == "__main__":
    run_main(main)
