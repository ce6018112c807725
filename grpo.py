"""GRPO for REARANK, in plain PyTorch: sample, reward, advantage, loss, step (figure 3 of arXiv 2505.20046).

    python grpo.py                                       the toy run: no download, minutes on a CPU (toy.py)
    python grpo.py --model Qwen/Qwen2.5-7B               the paper's run, on a GPU
    python grpo.py --help                                the toy's settings; with --model NAME the paper's

From top to bottom: advantage and loss (equations 3 and 4); one step; the training loop; supervised learning;
settings; the optimizer; the run folder; the command line.

Where it departs from the paper and from VeRL, which the authors use (README.md lists all departures):
- A group whose rewards are all equal has advantage exactly 0 and is counted in the log. Std: the sample's.
- beta = 0.001 with the k3 estimator, lr = 1e-6, temperature 1.0 are VeRL's defaults: the paper does not say.
- A prompt is encoded once for its group, in sampling and in the update; the gradient is the same.

Letters in shape comments: B prompts (groups) in a step, G rollouts of a prompt, T answer tokens. Every
sampled token is trained on, the end token included.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
import math
import random
import shutil
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from data import InputError, Instance, atomic_write, command_line, run_main, setting, training_instances
from model import Agent, Completion, load_agent, microbatches, sample, token_mask
from rearank import PROMPTS, encode_prompt
from reward import Score, ndcg, parse_ranking, score_response

# ------------------------------------------------------------------------------------------------------------
# Advantage and loss


def group_advantages(rewards: Tensor) -> Tensor:
    """Each reward against its own group: (r - mean) / std, (..., G) -> (..., G), float32. Paper section 3.3.

    The std is the sample's (divides by G - 1), as in VeRL. A flat group, all rewards equal up to rounding,
    gets exact zeros: a tiny epsilon under the fraction would turn the rounding of 0.7 into advantages near 1.
    """
    rewards = rewards.float()
    centred = rewards - rewards.mean(-1, keepdim=True)
    flat = rewards.amax(-1, keepdim=True) - rewards.amin(-1, keepdim=True) <= 1e-6
    std = (centred.square().sum(-1, keepdim=True) / max(rewards.shape[-1] - 1, 1)).sqrt()
    return torch.where(flat, torch.zeros_like(centred), centred / std.where(~flat, torch.ones_like(std)))


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Per-token estimate of KL(policy || reference) from tokens the policy drew: never negative, its mean is
    the KL.

    With d = log reference - log policy it is exp(d) - 1 - d (Schulman's k3). Same shape as the inputs.
    """
    d = ref_logps.float() - logps.float()
    return torch.expm1(d) - d


def grpo_loss(logps: Tensor, ref_logps: Tensor | None, advantages: Tensor, lengths: Tensor,
              beta: float) -> Tensor:
    """Equations 3 and 4, negated: the mean over outputs of the mean over each output's tokens. A scalar,
    float32.

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
              settings: Settings, step: int) -> tuple[dict[str, float], Rollouts]:
    """Sample, reward, advantage, loss, step: one update on B instances. Returns the row of the log and the
    rollouts."""
    started = time.perf_counter()
    rollouts = sample_rollouts(agent, instances, settings, step)
    rewards = rollout_rewards(rollouts, settings, step)  # [B, G]
    advantages = group_advantages(rewards)  # [B, G]
    update = update_policy(agent, reference, optimizer, rollouts, advantages, lr, settings)
    if not math.isfinite(update["loss"]) or not math.isfinite(update["grad_norm"]):
        raise SystemExit(f"step {step}: loss {update['loss']}, gradient norm {update['grad_norm']}: not "
                         "finite. The weights are as before this step. Lower --lr, or look at the newest "
                         "rollouts in samples.txt.")
    row = {"step": step, **rollout_statistics(rollouts, rewards), **update, "lr": lr}
    row |= {"seconds": time.perf_counter() - started, "peak_mib": peak_mib(agent.model.device)}
    return row, rollouts


@dataclasses.dataclass
class Rollouts:
    """What one step sampled: B instances and prompts; completions, texts and scores flat, B groups of G in a
    row."""

    instances: list[Instance]
    prompts: list[list[int]]
    completions: list[Completion]
    texts: list[str]
    scores: list[Score]
    seconds: float


def sample_rollouts(agent: Agent, instances: list[Instance], settings: Settings, step: int) -> Rollouts:
    """Sample G answers to each of B instances' prompts from the present policy, and score them (eqs. 5 and
    6)."""
    started, G = time.perf_counter(), settings.group
    prompts = [encode_prompt(agent.tokenizer, x.query, x.texts, settings.prompt, settings.max_prompt_tokens)
               for x in instances]
    with tqdm(total=len(prompts) * G, desc=f"step {step} sampling", unit="answer", leave=False) as bar:
        groups = sample(agent.model, prompts, G, settings.max_new_tokens, settings.temperature,
                        agent.stop_ids, settings.seed * 1_000_003 + step, settings.max_rows, bar.update)
    completions = [c for group in groups for c in group]
    texts = [agent.decode(c) for c in completions]
    scheme = "normalized" if settings.reward == "random" else settings.reward
    scores = [score_response(text, instances[i // G].labels, instances[i // G].ideal, scheme)
              for i, text in enumerate(texts)]
    return Rollouts(instances, prompts, completions, texts, scores, time.perf_counter() - started)


def rollout_rewards(rollouts: Rollouts, settings: Settings, step: int) -> Tensor:
    """The rewards [B, G]; with --reward random, a control, numbers that have nothing to do with the
    answers."""
    shape = len(rollouts.instances), settings.group
    if settings.reward == "random":
        return torch.rand(shape, generator=torch.Generator().manual_seed(settings.seed * 7919 + step))
    return torch.tensor([score.reward for score in rollouts.scores]).view(shape)


def update_policy(agent: Agent, reference, optimizer: MasterAdamW, rollouts: Rollouts, advantages: Tensor,
                  lr: float, settings: Settings) -> dict[str, float]:
    """One update by advantages [B, G]. Returns loss, kl and entropy (means over tokens), and grad_norm."""
    prompts, answers, (B, G) = rollouts.prompts, [c.ids for c in rollouts.completions], advantages.shape
    sizes = {name: getattr(settings, name) for name in ("temperature", "answer_tokens", "prompt_tokens",
                                                        "checkpointing")}
    # Without a penalty a flat group has no gradient at all, so it costs nothing.
    live = [g for g in range(B) if reference is not None or advantages[g].any()]
    ref_logps = None if reference is None else reference_logps(reference, prompts, answers, sizes)
    advantages, totals = advantages.flatten().to(agent.model.device), Counter()
    for batch in microbatches(agent.model, prompts, answers, live, **sizes):
        (rows, width), logps = batch.logps.shape, batch.logps
        ref = logps.detach() if ref_logps is None else ref_logps[batch.rows, :width]
        loss = grpo_loss(logps, ref, advantages[batch.rows], batch.lengths, settings.beta)
        loss = loss * rows / (B * G)  # a mean over all outputs, however they are cut into micro-batches
        loss.backward()
        kl = k3(logps.detach(), ref).sum()  # 0 at padding, where both are 0
        totals.update(loss=loss.item(), kl=kl.item(), entropy=batch.entropy.sum().item(),
                      tokens=batch.lengths.sum().item())
    tokens = max(totals["tokens"], 1)
    return {"loss": totals["loss"], "kl": totals["kl"] / tokens, "entropy": totals["entropy"] / tokens,
            "grad_norm": optimizer.step(lr, settings.grad_clip) if live else 0.0}


@torch.no_grad()
def reference_logps(reference, prompts: list[list[int]], answers: list[list[int]], sizes: dict) -> Tensor:
    """Log-probabilities of all answers' tokens under the frozen reference, [B G, T] (0 at padding)."""
    logps = torch.zeros(len(answers), max(map(len, answers)), device=reference.device)
    for batch in microbatches(reference, prompts, answers, **sizes):
        logps[batch.rows, :batch.logps.shape[1]] = batch.logps
    return logps


def rollout_statistics(rollouts: Rollouts, rewards: Tensor) -> dict[str, float]:
    """What the log says about one step's rollouts and their rewards [B, G]; shares are between 0 and 1."""
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
            "flat_groups": float((group_advantages(rewards) == 0).all(1).float().mean()),
            **{name: statistics.fmean(values) for name, values in columns.items()},
            "tokens_per_s": tokens / rollouts.seconds}


def peak_mib(device: torch.device) -> float:
    """Most memory used so far: of the GPU that the model is on, else of this process (0 where one cannot
    ask)."""
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
          measure: Callable[[Rollouts], dict] | None = None) -> None:
    """GRPO for settings.steps steps. `measure` adds columns to the log. Ctrl-C saves checkpoint and state
    first."""
    if not instances:
        raise InputError("no training instance is left: check that candidates and judgements share query "
                         "ids, or loosen --keep and --min-ndcg")
    frozen = settings.beta > 0 or settings.log_kl
    reference = copy.deepcopy(agent.model).requires_grad_(False) if frozen else None
    optimizer = MasterAdamW(list(agent.model.parameters()), settings.weight_decay, settings.offload)
    done = folder.load_state(optimizer) if settings.resume else 0
    saved = done if settings.resume else -1  # a checkpoint that an earlier run left in the folder is not ours
    try:
        steps = range(done + 1, settings.steps + 1)
        for step in tqdm(steps, desc="GRPO", initial=done, total=settings.steps, unit="step"):
            lr = learning_rate(step, settings.steps, settings.lr, settings.warmup, settings.decay)
            batch = batch_of(instances, step, settings)
            row, rollouts = grpo_step(agent, reference, optimizer, batch, lr, settings, step)
            done = step
            folder.log(row | (measure(rollouts) if measure else {}))
            if (step - 1) % settings.samples_every == 0 or step == settings.steps:
                folder.write_samples(step, rollouts, settings.group)
            if step % settings.save_every == 0:
                folder.save(agent, optimizer, step)
                saved = step
    finally:
        if saved < done:
            folder.save(agent, optimizer, done)
        optimizer.release()


def batch_of(instances: list[Instance], step: int, settings: Settings) -> list[Instance]:
    """The instances of step 1, 2, ...: a new shuffle each time the pool is used up. A function of the seed
    and the step alone, so that a resumed run goes on as the unbroken one would have."""
    B, order = settings.prompts_per_step, []
    for epoch in range((step - 1) * B // len(instances), (step * B - 1) // len(instances) + 1):
        epoch_order = list(range(len(instances)))
        random.Random(f"{settings.seed} {epoch}").shuffle(epoch_order)
        order += epoch_order
    first = (step - 1) * B % len(instances)
    return [instances[i] for i in order[first:first + B]]


def learning_rate(step: int, steps: int, peak: float, warmup: int, decay: bool) -> float:
    """Linear warm-up over `warmup` steps, then constant, or falling linearly to a tenth of `peak`. Steps from
    1."""
    fall = 1.0 - 0.9 * max(0, step - warmup) / max(1, steps - warmup) if decay else 1.0
    return peak * min(1.0, step / max(1, warmup)) * fall


# ------------------------------------------------------------------------------------------------------------
# Supervised learning: the toy's warm start and the paper's "direct SFT" row are this one function


def supervised(agent: Agent, batches: Iterator[list[tuple[list[int], list[int]]]], steps: int, lr: float,
               settings: Settings, title: str = "supervised") -> float:
    """`steps` AdamW steps of cross-entropy, a mean over all answer tokens, on batches of (prompt ids, answer
    ids).

    Returns the last loss. SystemExit where it is not finite.
    """
    parameters, total = list(agent.model.parameters()), 0.0
    optimizer = MasterAdamW(parameters, settings.weight_decay, settings.offload, betas=(0.9, 0.95))
    with tqdm(range(1, steps + 1), desc=title, unit="step") as bar:
        for step in bar:
            prompts, answers = zip(*next(batches))
            tokens, total = sum(map(len, answers)), 0.0
            for batch in microbatches(agent.model, prompts, answers, None, 1.0, settings.answer_tokens,
                                      settings.prompt_tokens, settings.checkpointing):
                loss = -batch.logps.sum() / tokens
                loss.backward()
                total += loss.item()
            optimizer.step(learning_rate(step, steps, lr, steps // 20, decay=True), settings.grad_clip)
            if not math.isfinite(total):
                raise SystemExit(f"{title}, step {step}: the loss is {total}; lower --sft-lr")
            bar.set_postfix(loss=f"{total:.3f}", refresh=False)
    optimizer.release()
    return total


def best_order_batches(agent: Agent, instances: list[Instance],
                       settings: Settings) -> Iterator[list[tuple[list[int], list[int]]]]:
    """The paper's direct SFT: prompts with their best possible order as the answer, no reasoning."""
    step, end = 0, [agent.tokenizer.eos_token_id]
    while True:
        step += 1
        batch = []
        for x in batch_of(instances, step, settings):
            order = sorted(range(len(x.labels)), key=lambda i: -x.labels[i])
            answer = f"<answer> {' > '.join(f'[{i + 1}]' for i in order)} </answer>"
            batch.append((encode_prompt(agent.tokenizer, x.query, x.texts, settings.prompt,
                                        settings.max_prompt_tokens),
                          agent.tokenizer(answer, add_special_tokens=False)["input_ids"] + end))
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
    grad_clip: float = setting(1.0, "Largest norm of the gradient.")
    weight_decay: float = setting(0.0, "AdamW's weight decay.")
    reward: str = setting("normalized", "The ranking reward (Table 3); random is a control: no learning.",
                          choices=("normalized", "absolute", "difference", "random"))
    prompt: str = setting("rearank", "The prompt to train with.", choices=tuple(PROMPTS))
    window: int = setting(20, "Passages drawn for a training instance.", least=2)
    draws: int = setting(100, "Draws a query in the initial state expansion.", least=1)
    order: str = setting("retrieval", "Initial order of a draw.", choices=("retrieval", "shuffled"))
    keep: str = setting("initial", "Which draws are kept: by initial NDCG@10, by best possible, or all.",
                        choices=("initial", "best", "all"))
    min_ndcg: float = setting(0.1, "The least NDCG@10 of a draw that is kept.")
    max_new_tokens: int = setting(2048, "Longest rollout.", least=1)
    max_prompt_tokens: int = setting(4096, "Longer prompts are made to fit.", least=1)
    max_rows: int = setting(128, "Rollouts written at a time.", least=1)
    answer_tokens: int = setting(8192, "Rollout tokens in a micro-batch: memory, not the result.", least=1)
    prompt_tokens: int = setting(8192, "Prompt tokens encoded together in the update.", least=1)
    checkpointing: bool = setting(False, "Recompute activations in the backward pass: less memory, slower.")
    offload: bool = setting(False, "Keep AdamW's moments and float32 master weights in host memory.")
    samples_every: int = setting(10, "Write two whole rollouts every so many steps.", least=1)
    save_every: int = setting(10, "Write the checkpoint every so many steps.", least=1)
    resume: bool = setting(False, "Go on from the checkpoint in --out.")
    device: str = setting("auto", "cuda, mps, cpu or auto.")
    dtype: str = setting("auto", "Precision of the weights; auto: float32 on a CPU, else bfloat16 "
                         "(master weights are float32).", choices=("auto", "float32", "bfloat16"))


# ------------------------------------------------------------------------------------------------------------
# The optimizer


class MasterAdamW:
    """AdamW over float32 master copies of the weights, whatever precision the model computes in.

    In bfloat16 an update of 1e-6 is smaller than the spacing of the weights and would round to nothing; here
    it adds up in the master. Gradients are added up in float32 too, on the model's device: a hook takes each
    as soon as backward has made it (`release` ends that). With `offload`, master weights and moments live in
    host memory and the step runs there. float32 weights on their own device are their own masters.
    """

    def __init__(self, params: Sequence[torch.nn.Parameter], weight_decay: float = 0.0, offload: bool = False,
                 betas: tuple[float, float] = (0.9, 0.999)):
        self.params = [p for p in params if p.requires_grad]
        self.masters = []
        for p in self.params:
            place = torch.device("cpu") if offload else p.device
            own = p.dtype == torch.float32 and place == p.device
            copied = None if own else p.detach().to(place, torch.float32, copy=True)
            self.masters.append(p if own else torch.nn.Parameter(copied))
        self.sums: dict[torch.nn.Parameter, Tensor] = {}
        self.hooks = [p.register_post_accumulate_grad_hook(self._take)
                      for p, master in zip(self.params, self.masters) if p is not master]
        self.adam = torch.optim.AdamW(self.masters, 0.0, betas, weight_decay=weight_decay, fused=True)

    def _take(self, param: torch.nn.Parameter) -> None:
        grad, param.grad = param.grad.float(), None
        self.sums[param] = self.sums[param].add_(grad) if param in self.sums else grad

    def release(self) -> None:
        """Leave the model to another optimizer."""
        for hook in self.hooks:
            hook.remove()

    @torch.no_grad()
    def step(self, lr: float, grad_clip: float) -> float:
        """One update at rate `lr`; clears the gradients and returns their norm from before clipping.

        A norm that is not finite changes nothing.
        """
        for param, master in zip(self.params, self.masters):
            if param in self.sums:
                master.grad = self.sums.pop(param).to(master.device)
        norm = float(torch.nn.utils.clip_grad_norm_(self.masters, grad_clip))
        if math.isfinite(norm):
            self.adam.param_groups[0]["lr"] = lr
            self.adam.step()
            for param, master in zip(self.params, self.masters):
                if param is not master:
                    param.copy_(master)
        self.adam.zero_grad()
        return norm

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as named tensors: moments, counts of steps, and the float32
        weights."""
        named = {f"{name}.{i}": value.contiguous() for i, master in enumerate(self.masters)
                 for name, value in self.adam.state[master].items()}
        return named | {f"master.{i}": master.detach() for i, master in enumerate(self.masters)}

    @torch.no_grad()
    def load_state(self, named: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        for name, value in named.items():
            key, _, index = name.rpartition(".")
            master = self.masters[int(index)]
            if key == "master":
                master.copy_(value)
                self.params[int(index)].copy_(value)
            else:
                self.adam.state[master][key] = value.to(master.device)


# ------------------------------------------------------------------------------------------------------------
# The run folder


COLUMNS = (
    "step", "reward", "ndcg", "ndcg_init", "ndcg_best", "reward_std", "rank", "format1", "format2",
    "permutations", "identity", "flat_groups", "length", "cut", "kl", "entropy", "grad_norm", "lr", "loss",
    "tokens_per_s", "seconds", "peak_mib")
LINE = (
    "step {step:4d}  reward {reward:+.3f}  NDCG@10 {ndcg:.3f} (given {ndcg_init:.3f}, best {ndcg_best:.3f})  "
    "in-group std {reward_std:.2f}  full {permutations:.0%}  flat {flat_groups:.0%}  length {length:.0f}  "
    "cut {cut:.0%}  kl {kl:.4f}  entropy {entropy:.2f}  {tokens_per_s:.0f} tok/s  {seconds:.1f} s")


class RunFolder:
    """config.json, log.csv, samples.txt, checkpoint/ (as from_pretrained loads it), state/ (what --resume
    needs).

    `trained_on` says what `training_instances` chose; a run that is resumed must have the same. InputError
    where there is nothing to resume, or where the data are others.
    """

    def __init__(self, settings: Settings, trained_on: dict | None = None):
        self.path = Path(settings.out)
        config = dataclasses.asdict(settings) | {"trained_on": trained_on}
        if settings.resume:
            earlier = self.earlier_config(settings)
            if trained_on and earlier.get("trained_on") not in (None, trained_on):
                raise InputError(f"--resume: {self.path} was trained on other data, {earlier['trained_on']}; "
                                 f"these are {trained_on}")
        self.path.mkdir(parents=True, exist_ok=True)
        if not settings.resume:
            for old in ("log.csv", "samples.txt", "summary.json"):
                (self.path / old).unlink(missing_ok=True)
            shutil.rmtree(self.path / "state", ignore_errors=True)
        with atomic_write(self.path / "config.json") as file:
            json.dump(config, file, indent=2)

    @staticmethod
    def earlier_config(settings: Settings) -> dict:
        """config.json of the run in settings.out. InputError unless there is all that --resume needs."""
        path = Path(settings.out)
        needed = "config.json", "state/state.json", "state/optimizer.safetensors"
        if not all((path / name).is_file() for name in needed):
            raise InputError(f"--resume: {path} holds no state/ to go on from; run without --resume")
        return json.loads((path / "config.json").read_text(encoding="utf-8"))

    def log(self, row: dict[str, float]) -> None:
        """Append one step to log.csv and print it: reward and NDCG first, the loss not at all (it is about
        0)."""
        path, new = self.path / "log.csv", not (self.path / "log.csv").exists()
        with open(path, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*COLUMNS, *(k for k in row if k not in COLUMNS)])
            if new:
                writer.writeheader()
            writer.writerow({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()})
        tqdm.write(LINE.format(**row))

    def write_samples(self, step: int, rollouts: Rollouts, group: int) -> None:
        """Append two rollouts of the step's first prompt, the best and the worst rewarded, to samples.txt;
        print them."""
        order = sorted(range(group), key=lambda i: rollouts.scores[i].reward)
        instance, parts = rollouts.instances[0], []
        for i in (order[-1], order[0]):
            score = rollouts.scores[i]
            parts.append(f"--- step {step}, query {instance.qid}: {instance.query}\n"
                         f"    labels of [1], [2], ...: {instance.labels}\n"
                         f"    reward {score.reward:+.3f}, NDCG@10 {score.ndcg:.3f}, "
                         f"format {score.format1:.0f} {score.format2:.0f}\n{rollouts.texts[i]}\n")
        with open(self.path / "samples.txt", "a", encoding="utf-8") as file:
            file.write("\n".join(parts) + "\n")
        tqdm.write("\n".join(parts))

    def save(self, agent: Agent, optimizer: MasterAdamW | None, step: int) -> None:
        """Write checkpoint/ and state/, each whole or not at all."""
        for part in self.path.glob(".*.part"):  # of a save that was interrupted
            shutil.rmtree(part)
        part = self.path / ".checkpoint.part"
        disable_progress_bar()  # of transformers' writing: it would break up our own
        agent.model.save_pretrained(part)
        enable_progress_bar()
        agent.tokenizer.save_pretrained(part)
        replace_folder(part, self.path / "checkpoint")
        if optimizer:
            part = self.path / ".state.part"
            part.mkdir()
            save_file(optimizer.state(), part / "optimizer.safetensors")
            (part / "state.json").write_text(json.dumps({"step": step}), encoding="utf-8")
            replace_folder(part, self.path / "state")

    def load_state(self, optimizer: MasterAdamW) -> int:
        """Restore the optimizer, drop the log's rows behind the saved step; returns the number of steps
        done."""
        step = json.loads((self.path / "state" / "state.json").read_text(encoding="utf-8"))["step"]
        optimizer.load_state(load_file(self.path / "state" / "optimizer.safetensors"))
        log = self.path / "log.csv"
        if log.exists():
            head, *rows = log.read_text(encoding="utf-8").splitlines(keepends=True)
            with atomic_write(log) as file:
                file.writelines([head, *(row for row in rows if int(row.split(",")[0]) <= step)])
        return step


def replace_folder(new: Path, old: Path) -> None:
    """Put folder `new` in the place of `old`; between the two renames the old one is whole under the name
    `.old`."""
    trash = old.with_name(f".{old.name}.old")
    shutil.rmtree(trash, ignore_errors=True)
    if old.exists():
        old.rename(trash)
    new.rename(old)
    shutil.rmtree(trash, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------
# Command line


def check_training_memory(model, settings: Settings) -> None:
    """InputError, before hours of sampling, where weights, gradients, moments and reference alone exceed a
    GPU."""
    if model.device.type != "cuda":
        return
    count, size = model.num_parameters(), model.dtype.itemsize
    reference = size if settings.beta or settings.log_kl else 0
    needed = count * (size + 4 + reference + (0 if settings.offload else 12))
    free = torch.cuda.mem_get_info(model.device)[0] + count * size
    if needed > free:
        raise InputError(f"training needs {needed / 2**30:.0f} GiB before any activation and the GPU has "
                         f"{free / 2**30:.0f}: pass --offload, --beta 0 or both, or use a smaller model")


def train_model(settings: Settings) -> int:
    """The paper's run on a real model."""
    if settings.resume:
        earlier = RunFolder.earlier_config(settings)
        if settings.data == ["auto"]:
            settings.data, settings.qrels = earlier["data"], earlier["qrels"]
        if settings.sft_steps:
            raise InputError("--resume goes on with GRPO only: to start it from a supervised checkpoint, "
                             "pass that as --model, without --sft-steps")
    elif (Path(settings.out) / "state").exists():
        raise InputError(f"{settings.out} holds an earlier run: pass --resume to go on, or another --out")
    agent = load_agent(settings.model, settings.device, settings.dtype)
    expansion = {name: getattr(settings, name) for name in ("draws", "order", "keep", "min_ndcg", "seed")}
    instances, chosen = training_instances(settings.data, settings.qrels, size=settings.window, **expansion)
    settings.data = chosen["data"]  # what auto stood for: --resume keeps to it
    print(f"{len(instances)} training instances of {chosen['queries']} queries; {settings.prompts_per_step} "
          f"prompts x {settings.group} rollouts a step, {settings.steps} steps")
    check_training_memory(agent.model, settings)
    folder = RunFolder(settings, chosen)
    if settings.sft_steps:
        try:
            batches = best_order_batches(agent, instances, settings)
            supervised(agent, batches, settings.sft_steps, settings.sft_lr, settings)
        finally:
            folder.save(agent, None, 0)
    try:
        train(agent, instances, settings, folder)
    except torch.OutOfMemoryError:
        raise InputError("too little GPU memory for a step: lower --answer-tokens, --prompt-tokens or "
                         "--max-rows, or pass --checkpointing and --offload") from None
    print(f"{folder.path}/checkpoint is the trained model; rerank with it:\n  python rearank.py --model "
          f"{folder.path}/checkpoint --prompt {settings.prompt} --input CANDIDATES --output RUN")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Train the model that --model names, or hand over to the toy run."""
    argv = sys.argv[1:] if argv is None else argv
    if any(a == "--model" or a.startswith("--model=") for a in argv):
        return train_model(command_line(Settings, argv, __doc__))
    import toy  # here, since toy.py is built on this file

    return toy.main(argv)


if __name__ == "__main__":
    run_main(main)
