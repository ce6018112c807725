"""GRPO for REARANK, in plain PyTorch: sample, reward, advantage, loss, step (figure 3 of arXiv 2505.20046).

    python grpo.py                                       the toy run: no arguments, no download, minutes on a CPU
    python grpo.py --model Qwen/Qwen2.5-7B               the paper's run, on a GPU
    python grpo.py --help                                the toy's settings and defaults; with --model NAME the paper's

From top to bottom: advantage and loss (equations 3 and 4); log-probabilities with each prompt encoded once for its group;
the settings; the optimizer; one step; supervised learning; the run folder; the training loop; the toy run.

Where it departs from the paper and from VeRL, which the authors use (README.md lists all departures):
- A group whose rewards are all equal has advantage exactly 0 and is counted in the log. The std is the sample's.
- beta = 0.001 with the k3 estimator, lr = 1e-6, temperature 1.0: the paper does not state them; these are VeRL's defaults.
- The prompt is encoded once per group, in sampling and in the update; the gradient is that of the repeated prompt.

Letters in shape comments: B prompts (groups) in a step, G rollouts per prompt, T answer tokens, P prompt tokens, V vocabulary; inside
`AnswerMemory` and `answer_logps` B counts answers. Every sampled token, the end token included, is trained on.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import itertools
import json
import math
import random
import re
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from data import (TOY_CONCEPTS, TOY_GRADES, InputError, Instance, atomic_write, command_line, expand, read_candidates, read_instances,
                  read_qrels, read_run, run_main, setting, toy_answer, toy_task, training_pool, write_candidates, write_qrels, write_run)
from eval import bootstrap_interval, evaluate
from rearank import (PROMPTS, Agent, Completion, EncodedPrompts, Reranker, encode_prompt, encode_prompts, forward, load_agent, sample,
                     token_mask)
from reward import Score, ndcg, parse_ranking, score_response

# ---------------------------------------------------------------------------------------------------------------------
# The algorithm: advantage and loss


def group_advantages(rewards: Tensor) -> Tensor:
    """Each reward against its own group: (r - mean) / std, (..., G) -> (..., G), float32. Paper section 3.3.

    The std is the sample's (divides by G - 1), as in VeRL. A flat group, all rewards equal up to rounding, gets exact
    zeros: a tiny epsilon under the fraction would turn the rounding of 0.7 into advantages near 1.
    """
    rewards = rewards.float()
    centred = rewards - rewards.mean(-1, keepdim=True)
    flat = rewards.amax(-1, keepdim=True) - rewards.amin(-1, keepdim=True) <= 1e-6
    std = (centred.square().sum(-1, keepdim=True) / max(rewards.shape[-1] - 1, 1)).sqrt()
    return torch.where(flat, torch.zeros_like(centred), centred / std.where(~flat, torch.ones_like(std)))


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Per-token estimate of KL(policy || reference) from tokens the policy drew: never negative, its mean is the KL.

    With d = log reference - log policy it is exp(d) - 1 - d (Schulman's k3). Same shape as the inputs.
    """
    d = ref_logps.float() - logps.float()
    return torch.expm1(d) - d


def grpo_loss(logps: Tensor, ref_logps: Tensor | None, advantages: Tensor, lengths: Tensor, beta: float) -> Tensor:
    """Equations 3 and 4, negated: the mean over outputs of the mean over each output's tokens. A scalar, float32.

    logps, ref_logps [B, T] (ref_logps may be None at beta 0); advantages [B]; lengths: token counts [B] or a mask [B, T].
    Purely on-policy, so the ratio policy / stopgrad(policy) is 1 and only its gradient matters: the loss's value says
    nothing about progress (about 0 by construction). Watch the reward.
    """
    mask = lengths.bool() if lengths.dim() == 2 else token_mask(lengths, logps.shape[1])
    logps = logps.float()
    ratio = torch.exp(logps - logps.detach())
    objective = ratio * advantages[:, None]
    if beta:
        objective = objective - beta * k3(logps, ref_logps)
    per_output = objective.masked_fill(~mask, 0.0).sum(1) / mask.sum(1).clamp(min=1)
    return -per_output.mean()


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities of sampled answers, and their gradients, with each prompt encoded once for its whole group


class AnswerMemory:
    """Attention of B answers [B, T] over the prompt each belongs to (`owner` [B], ascending) and over themselves, causally."""

    def __init__(self, prompts: EncodedPrompts, owner: Tensor, width: int):
        self.prompts, self.owner, self.in_parts = prompts, owner, attends_in_parts(owner.device)
        if self.in_parts:
            ends = torch.searchsorted(owner, torch.arange(len(prompts.lengths) + 1)).tolist()
            self.parts = [(prompt, slice(start, end), length) for prompt, (start, end, length)
                          in enumerate(zip(ends, ends[1:], prompts.lengths.tolist())) if start < end]
        else:
            own = torch.ones(width, width, dtype=torch.bool, device=owner.device).tril().expand(len(owner), -1, -1)
            shared = token_mask(prompts.lengths, prompts.keys[0].shape[2])[owner][:, None].expand(-1, width, -1)
            self.mask = torch.cat([shared, own], -1)[:, None]  # [B, 1, T, P + T]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        prompt_keys, prompt_values, share = self.prompts.keys[layer], self.prompts.values[layer], query.shape[1] // key.shape[1]
        expand = lambda x: x.repeat_interleave(share, 1) if share > 1 else x  # noqa: E731  `share` query heads read one key-value head
        if self.in_parts:
            return AttentionInParts.apply(query, expand(key), expand(value), prompt_keys, prompt_values, self.parts, scaling)
        keys, values = (expand(torch.cat([shared[self.owner], own], 2)) for shared, own in ((prompt_keys, key), (prompt_values, value)))
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=self.mask, scale=scaling)  # over [B, H, P + T, D]


def attends_in_parts(device: torch.device) -> bool:
    """Whether the prompt's keys are read where they are. On a GPU they are copied to each answer and the public attention function
    is called: the parts are not yet written for CUDA's kernels, and against the products with a large model's weights the copy is small."""
    return device.type == "cpu"


class AttentionInParts(torch.autograd.Function):
    """Attention over a prompt's keys and an answer's own, each part by itself: one product a prompt for all its answers.

    Of each part we keep the output and the logarithm of its softmax's normaliser (lse). The whole output is the mean of the
    parts', weighted by exp(lse of the part - lse of the whole). Backward, a part's attention weights are exp(scores - lse of
    the whole); so its own backward pass, given the output and lse of the whole, yields just its share of the gradient.
    """

    # torch's fused kernels, by their inner names: the public function does not hand out the normaliser.
    run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    run_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    @staticmethod
    def forward(ctx, query, key, value, prompt_keys, prompt_values, parts, scaling):
        """query, key, value [B, H, T, D]; prompt_keys, prompt_values [S, K, P, D]; parts: (prompt, its rows, its length), ...; returns
        [B, H, T, D]."""
        ctx.parts, ctx.scaling, K = parts, scaling, prompt_keys.shape[1]
        own, own_lse = AttentionInParts.run(query, key, value, 0.0, True, scale=scaling)
        out, lse = torch.empty_like(own), torch.empty_like(own_lse)  # of the prompt's part, then of the whole
        for prompt, rows, length in parts:
            where = slice(prompt, prompt + 1), slice(None), slice(length)
            part, part_lse = AttentionInParts.run(to_one_row(query[rows], K), prompt_keys[where], prompt_values[where], scale=scaling)
            out[rows], lse[rows] = from_one_row(part, query[rows]), from_one_row(part_lse[..., None], query[rows])[..., 0]
        out = torch.lerp(out, own, torch.sigmoid(own_lse - lse)[..., None].to(out.dtype))
        ctx.save_for_backward(query, key, value, prompt_keys, prompt_values, out, torch.logaddexp(lse, own_lse))
        return out

    @staticmethod
    def backward(ctx, grad):
        """grad [B, H, T, D] -> gradients of query, key, value, prompt_keys and prompt_values."""
        query, key, value, prompt_keys, prompt_values, out, lse = ctx.saved_tensors
        grad, K = grad.contiguous(), prompt_keys.shape[1]
        query_grad, key_grad, value_grad = AttentionInParts.run_backward(grad, query, key, value, out, lse, 0.0, True, scale=ctx.scaling)
        keys_grad, values_grad = torch.zeros_like(prompt_keys), torch.zeros_like(prompt_values)
        for prompt, rows, length in ctx.parts:
            where = slice(prompt, prompt + 1), slice(None), slice(length)
            part_grad, part_query, part_out, part_lse = (to_one_row(x[rows], K) for x in (grad, query, out, lse[..., None]))
            part, keys_grad[where], values_grad[where] = AttentionInParts.run_backward(
                part_grad, part_query, prompt_keys[where], prompt_values[where], part_out, part_lse[..., 0], 0.0, False, scale=ctx.scaling)
            query_grad[rows] += from_one_row(part, query[rows])
        return query_grad, key_grad, value_grad, keys_grad, values_grad, None, None


def to_one_row(x: Tensor, heads: int) -> Tensor:
    """[b, H, T, e] -> [1, K, H / K * b * T, e]: all that reads one key-value head, in one row."""
    return x.unflatten(1, (heads, -1)).permute(1, 2, 0, 3, 4).reshape(1, heads, -1, x.shape[-1])


def from_one_row(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of `to_one_row`: [1, K, H / K * b * T, e] -> [b, H, T, e], sizes as in `like`."""
    b, H, T, _ = like.shape
    return x.reshape(H, b, T, -1).transpose(0, 1)


def project_logps(hidden: Tensor, head: torch.nn.Module, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """[N, hidden] -> log-probability of each target and entropy, both [N] in float32. The entropy has no gradient."""
    logits = head(hidden).float()
    if temperature != 1.0:
        logits = logits / temperature
    normaliser = logits.logsumexp(-1)
    logps = logits.gather(-1, targets[:, None])[:, 0] - normaliser
    with torch.no_grad():
        probs = (logits - normaliser[:, None]).exp_()
        entropy = normaliser - (probs * logits).sum(-1)
    return logps, entropy


def answer_logps(model, prompts: EncodedPrompts, owner: Tensor, answers: Sequence[Sequence[int]], temperature: float = 1.0,
                 checkpointing: bool = False, chunk_elements: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of B answers given their prompts, one forward pass over the answers alone.

    `owner` [B] says which of the S encoded prompts each answer belongs to. Returns logps [B, T], entropy [B, T] (zero at
    padding) and lengths [B]. Hidden states meet the vocabulary only where there is a token, a chunk at a time, and a
    chunk's logits are computed again in the backward pass: [B, T, V] never exists.
    """
    device = owner.device
    lengths = torch.tensor([len(a) for a in answers], device=device)
    T = max(len(a) for a in answers)
    ids = torch.tensor([list(a) + [0] * (T - len(a)) for a in answers], device=device)  # [B, T]
    hidden = prompts.last_hidden[owner][:, None]  # [B, 1, hidden]: predicts the first token
    if T > 1:
        positions = prompts.lengths[owner][:, None] + torch.arange(T - 1, device=device)
        memory = AnswerMemory(prompts, owner, T - 1)
        hidden = torch.cat([hidden, forward(model, ids[:, :-1], positions, memory.attend, None, checkpointing)], 1)  # [B, T, hidden]
    mask = token_mask(lengths, T)
    flat, targets = hidden[mask], ids[mask]  # [N, hidden], [N]
    size = max(1, (chunk_elements or (2**23 if device.type == "cpu" else 2**27)) // model.lm_head.weight.shape[0])
    parts = []
    for h, t in zip(flat.split(size), targets.split(size)):
        again = len(flat) > size and torch.is_grad_enabled()
        parts.append(checkpoint(project_logps, h, model.lm_head, t, temperature, use_reentrant=False) if again
                     else project_logps(h, model.lm_head, t, temperature))
    logps, entropy = (torch.cat(p) for p in zip(*parts))
    spread = lambda x: torch.zeros(mask.shape, device=device).masked_scatter(mask, x)  # noqa: E731
    return spread(logps), spread(entropy), lengths


@dataclasses.dataclass
class Microbatch:
    """Some answers of some groups: `rows` [b] index the flat list of all answers; logps and entropy [b, T]; lengths [b]."""

    rows: Tensor
    logps: Tensor
    entropy: Tensor
    lengths: Tensor


def chunks_of_groups(prompts: Sequence[Sequence[int]], prompt_tokens: int) -> Iterator[range]:
    """Neighbouring groups whose padded prompts make at most `prompt_tokens` tokens (one group at least)."""
    start = 0
    while start < len(prompts):
        end, longest = start + 1, len(prompts[start])
        while end < len(prompts) and max(longest, len(prompts[end])) * (end + 1 - start) <= prompt_tokens:
            longest, end = max(longest, len(prompts[end])), end + 1
        yield range(start, end)
        start = end


def through_groups(model, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]],
                   visit: Callable[[Microbatch], Tensor | None], learn: bool, answer_tokens: int = 8192, prompt_tokens: int = 8192,
                   temperature: float = 1.0, checkpointing: bool = False) -> None:
    """Show `visit` the log-probabilities of all answers, a micro-batch at a time; with `learn`, add the gradient of the sum of the
    losses it returns to the model's parameters.

    `answers` is flat: len(prompts) groups of equal size, one after the other. Each prompt is encoded once, with its graph.
    Its keys, values and last hidden state are then cut off as leaves; micro-batches of at most `answer_tokens` padded
    tokens read the leaves and add up gradients in them; one backward pass carries the sums through the prompt. So
    the micro-batch size changes the memory and not the result (in float32; in bfloat16 the leaves' sums are rounded).
    """
    device, G = model.get_input_embeddings().weight.device, len(answers) // max(1, len(prompts))
    with torch.set_grad_enabled(learn):
        for groups in chunks_of_groups(prompts, prompt_tokens):
            encoded = encode_prompts(model, [prompts[g] for g in groups], checkpointing)
            outputs = [*encoded.keys, *encoded.values, encoded.last_hidden]
            leaves = [x.detach().requires_grad_(learn) for x in outputs]
            layers = len(encoded.keys)
            cut = EncodedPrompts(leaves[:layers], leaves[layers:-1], encoded.lengths, leaves[-1])
            # Answers of like length share a micro-batch, which leaves little padding.
            rows = sorted((g * G + i for g in groups for i in range(G)), key=lambda r: -len(answers[r]))
            while rows:
                count = max(1, answer_tokens // len(answers[rows[0]]))
                if not attends_in_parts(device):  # each answer then has a copy of its prompt's keys and values
                    count = max(1, min(count, 8 * answer_tokens // (len(answers[rows[0]]) + encoded.keys[0].shape[2])))
                now, rows = sorted(rows[:count]), rows[count:]
                owner = torch.tensor([r // G - groups.start for r in now], device=device)
                logps, entropy, lengths = answer_logps(model, cut, owner, [answers[r] for r in now], temperature, checkpointing)
                loss = visit(Microbatch(torch.tensor(now, device=device), logps, entropy, lengths))
                if learn:
                    loss.backward()
            if learn:
                reached = [(x, leaf.grad) for x, leaf in zip(outputs, leaves) if leaf.grad is not None]
                torch.autograd.backward([x for x, _ in reached], [grad for _, grad in reached])


# ---------------------------------------------------------------------------------------------------------------------
# Settings


@dataclasses.dataclass
class Settings:
    """Settings of `python grpo.py --model ...`: the paper's run."""

    model: str = setting("", "A model folder or hub name to train, e.g. Qwen/Qwen2.5-7B; without it, the toy run.")
    data: list[str] = setting(list, "Training instances (data.py expand) or candidate files; default: MS MARCO v2, downloaded.", nargs="+")
    qrels: list[str] = setting(list, "Judgements for candidate files given as --data.", nargs="+")
    out: str = setting("runs/rearank", "The run folder: config, log, samples, checkpoint.")
    seed: int = setting(0, "Seed of everything random.")
    prompts_per_step: int = setting(128, "Prompts (windows) in a step.", least=1)
    group: int = setting(32, "Rollouts sampled for each prompt.", least=2)
    steps: int = setting(160, "GRPO steps: one update each, purely on-policy.", least=0)
    sft_steps: int = setting(0, "Supervised steps on the best orders before GRPO (with --steps 0: the paper's direct SFT row).", least=0)
    sft_lr: float = setting(1e-5, "Learning rate of the supervised steps.", least=0)
    lr: float = setting(1e-6, "Learning rate.", least=0)
    warmup: int = setting(5, "Steps of linear warm-up.", least=0)
    decay: bool = setting(False, "Let the learning rate fall linearly to a tenth over the run.")
    beta: float = setting(0.001, "Weight of the KL penalty to the frozen starting model; 0 needs no reference model.", least=0)
    log_kl: bool = setting(False, "Measure the KL to the starting model at --beta 0 too.")
    temperature: float = setting(1.0, "Sampling temperature of the rollouts.", least=0.01)
    grad_clip: float = setting(1.0, "Largest norm of the gradient.")
    weight_decay: float = setting(0.0, "AdamW's weight decay.")
    reward: str = setting("normalized", "The ranking reward (Table 3); random is a control that must teach nothing.",
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
    answer_tokens: int = setting(8192, "Padded rollout tokens in a micro-batch: changes memory, not the result.", least=1)
    prompt_tokens: int = setting(8192, "Prompt tokens encoded together in the update.", least=1)
    checkpointing: bool = setting(False, "Recompute activations in the backward pass: less memory, a third slower.")
    cuda_graphs: bool = setting(True, "On CUDA, decode by captured graphs instead of launching each kernel from Python.")
    offload: bool = setting(False, "Keep AdamW's moments and float32 master weights in host memory.")
    samples_every: int = setting(10, "Write two whole rollouts every so many steps.", least=1)
    save_every: int = setting(10, "Write the checkpoint every so many steps.", least=1)
    resume: bool = setting(False, "Go on from the checkpoint in --out.")
    device: str = setting("auto", "cuda, mps, cpu or auto.")
    dtype: str = setting("auto", "Precision of the weights; auto: float32 on a CPU, bfloat16 elsewhere (master weights stay float32).",
                         choices=("auto", "float32", "bfloat16"))


@dataclasses.dataclass
class ToySettings(Settings):
    """Settings of `python grpo.py` without a model: the same run in miniature, on synthetic data, on a CPU."""

    out: str = setting("runs/toy", "The run folder: config, log, samples, checkpoint, runs, summary.")
    prompts_per_step: int = setting(32, "Prompts (windows) in a step.", least=1)
    group: int = setting(16, "Rollouts sampled for each prompt.", least=2)
    steps: int = setting(100, "GRPO steps: one update each, purely on-policy.", least=0)
    sft_steps: int = setting(700, "Supervised steps of the warm start, which stands for an instruct model.", least=0)
    sft_lr: float = setting(6e-3, "Learning rate of the warm start.", least=0)
    teacher_graded: float = setting(0.25, "Share of the teacher's orders that use its grades; the others put relevant before irrelevant.")
    lr: float = setting(5e-4, "Learning rate.", least=0)
    beta: float = setting(0.0, "Weight of the KL penalty to the frozen starting model; 0 needs no reference model.", least=0)
    decay: bool = setting(True, "Let the learning rate fall linearly to a tenth over the run.")
    prompt: str = setting("toy", "The prompt to train with.", choices=tuple(PROMPTS))
    window: int = setting(6, "Passages drawn for a training instance.", least=2)
    draws: int = setting(20, "Draws a query in the initial state expansion.", least=1)
    max_new_tokens: int = setting(64, "Longest rollout.", least=1)
    max_rows: int = setting(512, "Rollouts written at a time.", least=1)
    answer_tokens: int = setting(16384, "Padded rollout tokens in a micro-batch: changes memory, not the result.", least=1)
    eval_queries: int = setting(200, "Held-out queries in the closing table.", least=4)
    eval_seed: int = setting(2505, "Seed of the held-out queries.")


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer


class MasterAdamW:
    """AdamW over float32 master copies of the weights, whatever precision the model computes in.

    In bfloat16 an update of 1e-6 is smaller than the spacing of the weights and would round to nothing; here it adds up
    in the master. Gradients are added up in float32 too, on the model's device: a hook takes each as soon as backward has
    made it (`release` ends that). With `offload`, master weights and moments live in host memory and the step runs there.
    float32 weights on their own device are their own masters.
    """

    def __init__(self, params: Sequence[torch.nn.Parameter], weight_decay: float = 0.0, offload: bool = False,
                 betas: tuple[float, float] = (0.9, 0.999)):
        self.params = [p for p in params if p.requires_grad]
        place = lambda p: torch.device("cpu") if offload else p.device  # noqa: E731
        self.own = [p.dtype == torch.float32 and place(p) == p.device for p in self.params]
        self.masters = [p if own else torch.nn.Parameter(p.detach().to(place(p), torch.float32, copy=True))
                        for p, own in zip(self.params, self.own)]
        self.sums: dict[torch.nn.Parameter, Tensor] = {}
        self.hooks = [p.register_post_accumulate_grad_hook(self._take) for p, own in zip(self.params, self.own) if not own]
        self.adam = torch.optim.AdamW(self.masters, lr=0.0, weight_decay=weight_decay, betas=betas, fused=True)

    def _take(self, param: torch.nn.Parameter) -> None:
        grad, param.grad = param.grad.float(), None
        self.sums[param] = self.sums[param].add_(grad) if param in self.sums else grad

    def release(self) -> None:
        """Leave the model to another optimizer."""
        for hook in self.hooks:
            hook.remove()

    @torch.no_grad()
    def step(self, lr: float, grad_clip: float) -> float:
        """One update at rate `lr`; clears the gradients and returns their norm from before clipping."""
        for param, master in zip(self.params, self.masters):
            if param in self.sums:
                master.grad = self.sums.pop(param).to(master.device)
        norm = float(torch.nn.utils.clip_grad_norm_(self.masters, grad_clip))
        if math.isfinite(norm):
            self.adam.param_groups[0]["lr"] = lr
            self.adam.step()
            for param, master, own in zip(self.params, self.masters, self.own):
                if not own:
                    param.copy_(master)
        self.adam.zero_grad()
        return norm

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as named tensors: moments, counts of steps, and the float32 weights."""
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


# ---------------------------------------------------------------------------------------------------------------------
# One step: figure 3 of the paper


@dataclasses.dataclass
class Rollouts:
    """What one step sampled, all lists flat over B * G answers, group after group."""

    instances: list[Instance]
    prompts: list[list[int]]
    completions: list[Completion]
    texts: list[str]
    scores: list[Score]
    seconds: float


def sample_rollouts(agent: Agent, instances: list[Instance], settings: Settings, step: int) -> Rollouts:
    """Sample a group of answers to each instance's prompt from the current policy, and score them (B prompts, G each)."""
    started = time.perf_counter()
    prompts = [encode_prompt(agent.tokenizer, x.query, x.texts, settings.prompt, settings.max_prompt_tokens) for x in instances]
    with tqdm(total=len(prompts) * settings.group, desc=f"step {step} sampling", unit="answer", leave=False) as bar:
        groups = sample(agent.model, prompts, settings.group, settings.max_new_tokens, settings.temperature, agent.stop_ids,
                        seed=settings.seed * 1_000_003 + step, max_rows=settings.max_rows, progress=bar.update,
                        cuda_graphs=settings.cuda_graphs)
    completions = [c for group in groups for c in group]
    texts = [agent.decode(c) for c in completions]
    scheme = "normalized" if settings.reward == "random" else settings.reward
    scores = [score_response(text, instances[i // settings.group].labels, instances[i // settings.group].ideal, scheme)
              for i, text in enumerate(texts)]
    return Rollouts(instances, prompts, completions, texts, scores, time.perf_counter() - started)


def update_policy(agent: Agent, reference, optimizer: MasterAdamW, rollouts: Rollouts, rewards: Tensor, lr: float,
                  settings: Settings) -> dict[str, float]:
    """One GRPO update from rewards [B, G]. Returns kl, entropy (means over tokens), loss, grad_norm."""
    B, G = rewards.shape
    advantages = group_advantages(rewards)  # [B, G]
    answers = [c.ids for c in rollouts.completions]
    road = dict(answer_tokens=settings.answer_tokens, prompt_tokens=settings.prompt_tokens, temperature=settings.temperature,
                checkpointing=settings.checkpointing)
    ref_logps = torch.zeros(B * G, max(map(len, answers)), device=rewards.device)
    if reference is not None:
        def remember(batch: Microbatch) -> None:
            ref_logps[batch.rows, :batch.logps.shape[1]] = batch.logps
        through_groups(reference, rollouts.prompts, answers, remember, learn=False, **road)
    # Without a penalty a flat group has no gradient at all, so it costs nothing.
    live = [g for g in range(B) if reference is not None or advantages[g].any()]
    live_rows = torch.tensor([g * G + i for g in live for i in range(G)], dtype=torch.long, device=rewards.device)
    advantages, totals = advantages.flatten(), Counter()

    def loss_of(batch: Microbatch) -> Tensor:
        rows, width = live_rows[batch.rows], batch.logps.shape[1]
        loss = grpo_loss(batch.logps, ref_logps[rows, :width], advantages[rows], batch.lengths, settings.beta)
        loss = loss * len(rows) / (B * G)  # the mean over all B * G outputs, however they are cut into micro-batches
        with torch.no_grad():
            mask = token_mask(batch.lengths, width)
            penalty = k3(batch.logps, ref_logps[rows, :width])[mask].sum() if reference is not None else 0.0
            totals.update(loss=float(loss.detach()), kl=float(penalty), entropy=float(batch.entropy.sum()), tokens=int(mask.sum()))
        return loss

    through_groups(agent.model, [rollouts.prompts[g] for g in live], [answers[r] for r in live_rows.tolist()], loss_of, learn=True, **road)
    tokens = max(totals["tokens"], 1)
    grad_norm = optimizer.step(lr, settings.grad_clip) if live else 0.0
    return {"loss": totals["loss"], "kl": totals["kl"] / tokens, "entropy": totals["entropy"] / tokens, "grad_norm": grad_norm}


def grpo_step(agent: Agent, reference, optimizer: MasterAdamW, instances: list[Instance], lr: float, settings: Settings,
              step: int) -> tuple[dict[str, float], Rollouts]:
    """Sample, reward, advantage, loss, step. Returns the row of the log and the rollouts."""
    started = time.perf_counter()
    rollouts = sample_rollouts(agent, instances, settings, step)
    rewards = torch.tensor([s.reward for s in rollouts.scores], device=agent.model.device).view(len(instances), settings.group)
    if settings.reward == "random":
        rewards = torch.rand(rewards.shape, generator=torch.Generator().manual_seed(settings.seed * 7919 + step)).to(rewards)
    update = update_policy(agent, reference, optimizer, rollouts, rewards, lr, settings)
    if not math.isfinite(update["loss"]) or not math.isfinite(update["grad_norm"]):
        raise SystemExit(f"step {step}: loss {update['loss']}, gradient norm {update['grad_norm']}: not finite. "
                         "Weights after a gradient that is not finite are left as they were. Lower --lr, or look at the newest rollouts "
                         "in samples.txt.")
    row = {"step": step, **rollout_statistics(rollouts, rewards), **update, "lr": lr, "seconds": time.perf_counter() - started}
    row["peak_mib"] = peak_mib()
    return row, rollouts


def rollout_statistics(rollouts: Rollouts, rewards: Tensor) -> dict[str, float]:
    """What the log says about one step's rollouts; shares are between 0 and 1."""
    scores, completions, (B, G) = rollouts.scores, rollouts.completions, rewards.shape
    mean = lambda values: sum(values) / max(len(values), 1)  # noqa: E731
    sizes = [len(rollouts.instances[i // G].labels) for i in range(B * G)]
    rankings = [parse_ranking(text, n) for text, n in zip(rollouts.texts, sizes)]
    tokens = sum(len(c.ids) for c in completions)
    return {
        "reward": float(rewards.mean()), "reward_std": float(rewards.std(1).mean()) if G > 1 else 0.0,
        "ndcg": mean([s.ndcg for s in scores]), "ndcg_init": mean([ndcg(x.labels, ideal=x.ideal) for x in rollouts.instances]),
        "ndcg_best": mean([ndcg(sorted(x.labels, reverse=True), ideal=x.ideal) for x in rollouts.instances]),
        "rank": mean([s.rank for s in scores]), "format1": mean([s.format1 for s in scores]), "format2": mean([s.format2 for s in scores]),
        "permutations": mean([r.status == "ok" for r in rankings]),
        "identity": mean([r.order == list(range(n)) for r, n in zip(rankings, sizes)]),
        "flat_groups": float((group_advantages(rewards) == 0).all(1).float().mean()),
        "length": tokens / len(completions), "cut": mean([not c.finished for c in completions]),
        "tokens_per_s": tokens / rollouts.seconds,
    }


def peak_mib() -> float:
    """Most memory used so far: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def learning_rate(step: int, steps: int, peak: float, warmup: int, decay: bool) -> float:
    """Linear warm-up over `warmup` steps, then constant, or falling linearly to a tenth of `peak`. Steps count from 1."""
    fall = 1.0 - 0.9 * max(0, step - warmup) / max(1, steps - warmup) if decay else 1.0
    return peak * min(1.0, step / max(1, warmup)) * fall


# ---------------------------------------------------------------------------------------------------------------------
# Supervised learning: the toy's warm start and the paper's "direct SFT" row are this one function


def supervised(agent: Agent, batches: Iterator[list[tuple[list[int], list[int]]]], steps: int, lr: float, settings: Settings,
               title: str = "supervised") -> float:
    """`steps` AdamW steps of cross-entropy (mean over all answer tokens) on batches of (prompt ids, answer ids). Returns the last loss."""
    optimizer = MasterAdamW(list(agent.model.parameters()), settings.weight_decay, settings.offload, betas=(0.9, 0.95))
    loss = 0.0
    with tqdm(range(1, steps + 1), desc=title, unit="step") as bar:
        for step in bar:
            prompts, answers = zip(*next(batches))
            tokens, loss = sum(map(len, answers)), 0.0

            def loss_of(batch: Microbatch) -> Tensor:
                nonlocal loss
                part = -batch.logps.sum() / tokens
                loss += float(part.detach())
                return part

            through_groups(agent.model, prompts, answers, loss_of, True, settings.answer_tokens, settings.prompt_tokens,
                           checkpointing=settings.checkpointing)
            optimizer.step(learning_rate(step, steps, lr, max(1, steps // 20), decay=True), settings.grad_clip)
            if not math.isfinite(loss):
                raise SystemExit(f"{title}, step {step}: the loss is {loss}; lower --sft-lr")
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    optimizer.release()
    return loss


# ---------------------------------------------------------------------------------------------------------------------
# The run folder


COLUMNS = ("step", "reward", "ndcg", "ndcg_init", "ndcg_best", "reward_std", "rank", "format1", "format2", "permutations", "identity",
           "flat_groups", "length", "cut", "kl", "entropy", "grad_norm", "lr", "loss", "tokens_per_s", "seconds", "peak_mib")


class RunFolder:
    """config.json, log.csv, samples.txt, checkpoint/ (the model, as from_pretrained loads it) and state/ (what --resume needs)."""

    def __init__(self, settings: Settings):
        self.path, self.settings = Path(settings.out), settings
        if settings.resume and not all((self.path / "state" / name).is_file() for name in ("state.json", "optimizer.safetensors")):
            raise InputError(f"--resume: {self.path} holds no state/ to go on from; run without --resume")
        self.path.mkdir(parents=True, exist_ok=True)
        if not settings.resume:
            for old in ("log.csv", "samples.txt", "summary.json"):
                (self.path / old).unlink(missing_ok=True)
            shutil.rmtree(self.path / "state", ignore_errors=True)
        with atomic_write(self.path / "config.json") as file:
            json.dump(dataclasses.asdict(settings), file, indent=2)

    def log(self, row: dict[str, float]) -> None:
        """Append one step to log.csv and print it: reward and NDCG first, the loss not at all (it is about 0 by construction)."""
        path, new = self.path / "log.csv", not (self.path / "log.csv").exists()
        with open(path, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*COLUMNS, *(k for k in row if k not in COLUMNS)])
            if new:
                writer.writeheader()
            writer.writerow({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()})
        tqdm.write("step {step:4d}  reward {reward:+.3f}  NDCG@10 {ndcg:.3f} (given {ndcg_init:.3f}, best {ndcg_best:.3f})  "
                   "in-group std {reward_std:.2f}  full {permutations:.0%}  flat {flat_groups:.0%}  length {length:.0f}  "
                   "cut {cut:.0%}  kl {kl:.4f}  entropy {entropy:.2f}  {tokens_per_s:.0f} tok/s  {seconds:.1f} s".format(**row))

    def write_samples(self, step: int, rollouts: Rollouts, group: int) -> None:
        """Append two whole rollouts of the step's first prompt, the best and the worst rewarded, to samples.txt, and print them."""
        first = sorted(range(group), key=lambda i: rollouts.scores[i].reward)
        instance, parts = rollouts.instances[0], []
        for i in (first[-1], first[0]):
            score = rollouts.scores[i]
            parts.append(f"--- step {step}, query {instance.qid}: {instance.query}\n    labels of [1], [2], ...: {instance.labels}\n"
                         f"    reward {score.reward:+.3f}, NDCG@10 {score.ndcg:.3f}, format {score.format1:.0f} {score.format2:.0f}\n"
                         f"{rollouts.texts[i]}\n")
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
            (part / "state.json").write_text(json.dumps({"step": step}))
            replace_folder(part, self.path / "state")

    def load_state(self, optimizer: MasterAdamW) -> int:
        """Restore the optimizer; returns the number of steps done."""
        step = json.loads((self.path / "state" / "state.json").read_text())["step"]
        optimizer.load_state(load_file(self.path / "state" / "optimizer.safetensors"))
        keep_log_rows(self.path / "log.csv", step)
        return step


def replace_folder(new: Path, old: Path) -> None:
    """Put folder `new` in the place of `old`; between the two renames the old one is whole under the name `.old`."""
    trash = old.with_name(f".{old.name}.old")
    shutil.rmtree(trash, ignore_errors=True)
    if old.exists():
        old.rename(trash)
    new.rename(old)
    shutil.rmtree(trash, ignore_errors=True)


def keep_log_rows(path: Path, step: int) -> None:
    """Drop the rows of log.csv after `step`: a run that goes on writes them anew."""
    if path.exists():
        head, *rows = path.read_text().splitlines()
        with atomic_write(path) as file:
            file.write("\n".join([head, *(r for r in rows if int(r.split(",")[0]) <= step)]) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Training


def batch_of(instances: list[Instance], step: int, settings: Settings) -> list[Instance]:
    """The instances of step 1, 2, ...: a new shuffle each time the pool is used up. A function of the seed and the step alone,
    so a resumed run goes on as the unbroken one would have."""
    B, order = settings.prompts_per_step, []
    for epoch in range((step - 1) * B // len(instances), (step * B - 1) // len(instances) + 1):
        epoch_order = list(range(len(instances)))
        random.Random(f"{settings.seed} {epoch}").shuffle(epoch_order)
        order += epoch_order
    first = (step - 1) * B % len(instances)
    return [instances[i] for i in order[first:first + B]]


def train(agent: Agent, instances: list[Instance], settings: Settings, folder: RunFolder,
          measure: Callable[[Rollouts], dict] | None = None) -> None:
    """GRPO for settings.steps steps. `measure` adds columns to the log. Ctrl-C saves the checkpoint and the state before it leaves."""
    if not instances:
        raise InputError("no training instance is left: check that candidates and judgements share query ids, or loosen --keep and "
                         "--min-ndcg")
    needs_reference = settings.beta > 0 or settings.log_kl
    reference = copy.deepcopy(agent.model).requires_grad_(False) if needs_reference else None
    optimizer = MasterAdamW(list(agent.model.parameters()), settings.weight_decay, settings.offload)
    done = folder.load_state(optimizer) if settings.resume else 0
    saved = done if settings.resume else -1  # a checkpoint an earlier run left in the folder is not ours
    try:
        for step in tqdm(range(done + 1, settings.steps + 1), desc="GRPO", unit="step", initial=done, total=settings.steps):
            lr = learning_rate(step, settings.steps, settings.lr, settings.warmup, settings.decay)
            row, rollouts = grpo_step(agent, reference, optimizer, batch_of(instances, step, settings), lr, settings, step)
            done = step
            folder.log(row | (measure(rollouts) if measure else {}))
            if step % settings.samples_every == 1 or step == settings.steps or settings.samples_every == 1:
                folder.write_samples(step, rollouts, settings.group)
            if step % settings.save_every == 0:
                folder.save(agent, optimizer, step)
                saved = step
    finally:
        if saved < done:
            folder.save(agent, optimizer, done)
        optimizer.release()


def best_order_batches(agent: Agent, instances: list[Instance], settings: Settings) -> Iterator[list[tuple[list[int], list[int]]]]:
    """The paper's direct SFT: prompts with their best possible order as the answer, no reasoning."""
    step, end = 0, [agent.tokenizer.eos_token_id]
    while True:
        step += 1
        batch = []
        for x in batch_of(instances, step, settings):
            order = sorted(range(len(x.labels)), key=lambda i: -x.labels[i])
            answer = f"<answer> {' > '.join(f'[{i + 1}]' for i in order)} </answer>"
            prompt = encode_prompt(agent.tokenizer, x.query, x.texts, settings.prompt, settings.max_prompt_tokens)
            batch.append((prompt, agent.tokenizer(answer, add_special_tokens=False)["input_ids"] + end))
        yield batch


def training_instances(settings: Settings) -> list[Instance]:
    """What --data and --qrels say, or the paper's pool; candidate files go through initial state expansion."""
    if settings.data and not settings.qrels:
        return [x for path in settings.data for x in read_instances(path)]
    if settings.data:
        candidates = [c for path in settings.data for c in read_candidates(path)]
        qrels = {qid: labels for path in settings.qrels for qid, labels in read_qrels(path).items()}
    else:
        candidates, qrels = training_pool()
    return expand(candidates, qrels, settings.draws, settings.window, settings.order, settings.keep, settings.min_ndcg, settings.seed)


def check_training_memory(model, settings: Settings) -> None:
    """InputError, before hours of sampling, where weights, gradients, moments and reference alone exceed the GPU's memory."""
    if model.device.type != "cuda":
        return
    count, size = model.num_parameters(), model.dtype.itemsize
    needed = count * (size + 4 + (size if settings.beta or settings.log_kl else 0) + (0 if settings.offload else 12))
    free = torch.cuda.mem_get_info(model.device)[0] + count * size
    if needed > free:
        raise InputError(f"training needs {needed / 2**30:.0f} GiB before any activation and the GPU has {free / 2**30:.0f}: pass --offload"
                         + (" and --beta 0" if settings.offload and settings.beta else "")
                         + " (and --checkpointing), or use a smaller model")


def train_model(settings: Settings) -> int:
    """The paper's run on a real model."""
    agent = load_agent(settings.model, settings.device, settings.dtype)
    instances = training_instances(settings)
    print(f"{len(instances)} training instances of {len({x.qid for x in instances})} queries; "
          f"{settings.prompts_per_step} prompts x {settings.group} rollouts a step, {settings.steps} steps")
    if (Path(settings.out) / "state").exists() and not settings.resume:
        raise InputError(f"{settings.out} holds an earlier run: pass --resume to go on with it, or another --out")
    if settings.resume and settings.sft_steps:
        raise InputError("--resume goes on with GRPO only: to start it from a supervised checkpoint, pass that as --model, without "
                         "--sft-steps")
    check_training_memory(agent.model, settings)
    folder = RunFolder(settings)
    if settings.sft_steps:
        try:
            supervised(agent, best_order_batches(agent, instances, settings), settings.sft_steps, settings.sft_lr, settings)
        finally:
            folder.save(agent, None, 0)
    try:
        train(agent, instances, settings, folder)
    except torch.OutOfMemoryError:
        raise InputError("too little GPU memory for a step: lower --answer-tokens, --prompt-tokens or --max-rows, or pass --checkpointing "
                         "and --offload") from None
    print(f"{folder.path}/checkpoint is the trained model; rerank with it:\n  python rearank.py --model {folder.path}/checkpoint "
          f"--prompt {settings.prompt} --input CANDIDATES --output RUN")
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# The toy run


def toy_agent(seed: int) -> Agent:
    """A random Qwen2 of about 130,000 parameters and a word-level tokenizer with a chat template, both made in memory."""
    words = ["<|pad|>", "<|end|>", "<|assistant|>", "<think>", "</think>", "<answer>", "</answer>", ">", *TOY_GRADES,
             *(f"[{i}]" for i in range(1, 21)), *(word for concept in TOY_CONCEPTS for word in concept)]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|pad|>"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>", clean_up_tokenization_spaces=False)
    tokenizer.chat_template = ("{% for message in messages %}{{ message['content'] }} <|end|> {% endfor %}"
                               "{% if add_generation_prompt %}<|assistant|> {% endif %}")
    torch.manual_seed(seed)
    config = Qwen2Config(vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
                         num_key_value_heads=4, max_position_embeddings=512, rope_parameters={"rope_type": "default", "rope_theta": 100.0},
                         initializer_range=0.1, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    return Agent(model, tokenizer, [1])


def toy_lessons(agent: Agent, settings: ToySettings, curriculum: bool = True) -> Iterator[list[tuple[list[int], list[int]]]]:
    """The warm start's lessons: windows of settings.window passages, with `curriculum` of 3 for the first 40 % of the steps; as many
    passages in each batch.

    The teacher grades every passage rightly, but only some of its orders (settings.teacher_graded) use the grades; the others merely put
    relevant before irrelevant. That is what reinforcement can add to: more of these lessons cannot.
    """
    rng, end = random.Random(f"lessons {settings.seed}"), [agent.tokenizer.eos_token_id]
    for step in itertools.count():
        size = 3 if curriculum and step < 0.4 * settings.sft_steps else settings.window
        candidates, _ = toy_task(384 // size, size, seed=rng.randrange(2**40))
        answers = [toy_answer(c.query, c.texts, graded=rng.random() < settings.teacher_graded) for c in candidates]
        yield [(encode_prompt(agent.tokenizer, c.query, c.texts, settings.prompt), agent.tokenizer(answer)["input_ids"] + end)
               for c, answer in zip(candidates, answers)]


def toy_trace_statistics(rollouts: Rollouts) -> dict[str, float]:
    """How often the grades in <think> are right, and how often the answer is ordered by them. Shares of all passages and answers.

    Nothing in the reward asks for either: an order may improve while the grades beside it drift.
    """
    right = agree = graded = 0
    group = len(rollouts.texts) // len(rollouts.instances)
    for i, text in enumerate(rollouts.texts):
        labels = rollouts.instances[i // group].labels
        stated = dict(re.findall(r"\[(\d+)\](?: [a-z]+)* (\d)", text.partition("</think>")[0]))
        grades = [int(stated.get(str(n), -1)) for n in range(1, len(labels) + 1)]
        right += sum(grade == label for grade, label in zip(grades, labels))
        graded += len(labels)
        ordered = [grades[n] for n in parse_ranking(text, len(labels)).order]
        agree += ordered == sorted(grades, reverse=True)
    return {"grades_right": right / graded, "answer_follows_grades": agree / len(rollouts.texts)}


class ToyExam:
    """The closing table: held-out queries, reranked by each model, written as TREC files and scored by eval.py from those files."""

    def __init__(self, settings: ToySettings, folder: Path):
        self.settings, self.folder = settings, folder
        self.lists = {"window": toy_task(settings.eval_queries, settings.window, settings.eval_seed, held_out=True),
                      "long": toy_task(settings.eval_queries // 4, 4 * settings.window, settings.eval_seed + 1, held_out=True)}
        for name, (candidates, qrels) in self.lists.items():
            write_candidates(folder / f"{name}.jsonl", candidates)
            write_qrels(folder / f"{name}.qrels", qrels)
            write_run(folder / f"{name}.first_stage.trec", {c.qid: c.docids for c in candidates}, "first_stage")

    def take(self, agent: Agent | None, name: str, lists: str = "window", think: bool = True) -> list[float]:
        """NDCG@10 of each held-out query after reranking by `agent` (None: the first stage), in the candidates' order."""
        run, (candidates, _) = self.folder / f"{lists}.{name}.trec", self.lists[lists]
        if agent:
            reranker = Reranker(agent, self.settings.prompt, self.settings.window, self.settings.window // 2, think,
                                max_new_tokens=self.settings.max_new_tokens, max_rows=256)
            rankings = reranker.rank_many([(c.query, c.texts) for c in candidates])
            write_run(run, {c.qid: [c.docids[r.index] for r in ranking] for c, ranking in zip(candidates, rankings)}, name)
        scores = evaluate(read_qrels(self.folder / f"{lists}.qrels"), read_run(run), ["ndcg_cut.10"])
        return [scores[c.qid]["ndcg_cut_10"] for c in candidates]


def toy_run(settings: ToySettings) -> int:
    """Warm start, control, GRPO, exam: the whole project in a few minutes on a CPU. Writes summary.json."""
    started, folder = time.time(), RunFolder(settings)
    agent, exam = toy_agent(settings.seed), ToyExam(settings, folder.path)
    print(f"toy run, seed {settings.seed}: {agent.model.num_parameters():,} parameters, windows of {settings.window} passages, "
          "no downloads")
    supervised(agent, toy_lessons(agent, settings), settings.sft_steps, settings.sft_lr, settings, "warm start")
    taken = {"first_stage": exam.take(None, "first_stage"), "warm_start": exam.take(agent, "warm_start")}
    long = {"first_stage": exam.take(None, "first_stage", "long"), "warm_start": exam.take(agent, "warm_start", "long")}
    doubled = Agent(copy.deepcopy(agent.model), agent.tokenizer, agent.stop_ids)
    lessons = toy_lessons(doubled, dataclasses.replace(settings, seed=settings.seed + 10**6), curriculum=False)
    supervised(doubled, lessons, settings.sft_steps, settings.sft_lr, settings, "control: the warm start again")
    taken["warm_start_doubled"] = exam.take(doubled, "warm_start_doubled")

    candidates, qrels = toy_task(200, 20, settings.seed)
    instances = expand(candidates, qrels, settings.draws, settings.window, settings.order, settings.keep, settings.min_ndcg, settings.seed)
    train(agent, instances, settings, folder, toy_trace_statistics)
    taken["grpo"], taken["grpo_without_think"] = exam.take(agent, "grpo"), exam.take(agent, "grpo_without_think", think=False)
    long["grpo"] = exam.take(agent, "grpo", "long")
    summary = toy_summary(settings, taken, long, time.time() - started)
    with atomic_write(folder.path / "summary.json") as file:
        json.dump(summary, file, indent=2)
    print(toy_table(taken, long, summary, settings))
    return 0


def toy_summary(settings: ToySettings, taken: dict[str, list[float]], long: dict[str, list[float]], seconds: float) -> dict:
    """summary.json: means of NDCG@10 on the held-out queries, and the paired gains of GRPO with 95 % intervals."""
    def gain(over: str) -> dict[str, float]:
        return dict(zip(("mean", "low", "high"), bootstrap_interval([a - b for a, b in zip(taken["grpo"], taken[over])])))

    mean = lambda values: sum(values) / len(values)  # noqa: E731
    return {"seed": settings.seed, "seconds": round(seconds, 1), "queries": len(taken["grpo"]),
            **{name: mean(values) for name, values in taken.items()},
            "sliding_window": {name: mean(values) for name, values in long.items()},
            "gain": gain("warm_start"), "gain_over_doubled": gain("warm_start_doubled")}


def toy_table(taken: dict[str, list[float]], long: dict[str, list[float]], summary: dict, settings: ToySettings) -> str:
    """The closing table and what to run next, as text."""
    folder, slide = settings.out, f"--window {settings.window} --step {settings.window // 2}"
    titles = {"first_stage": "first stage", "warm_start": "warm start", "warm_start_doubled": "control: warm start twice as long",
              "grpo": "after GRPO", "grpo_without_think": "after GRPO, think left out"}
    lines = ["", f"NDCG@10 on {summary['queries']} held-out queries{'':13}mean   95 % interval     gain over the warm start"]
    for name, values in taken.items():
        mean, low, high = bootstrap_interval(values)
        gain = bootstrap_interval([a - b for a, b in zip(values, taken["warm_start"])])
        lines.append(f"  {titles[name]:40} {mean:.3f}   {low:.3f} - {high:.3f}     "
                     + ("" if name == "warm_start" else "{:+.3f}  ({:+.3f} to {:+.3f})".format(*gain)))
    lines.append(f"{len(next(iter(long.values())))} longer lists through the sliding window")
    lines += [f"  {titles[name]:40} {{:.3f}}   {{:.3f}} - {{:.3f}}".format(*bootstrap_interval(values)) for name, values in long.items()]
    return "\n".join(lines + [
        f"{summary['seconds']:.0f} s. Everything is in {folder}/: log.csv, samples.txt, checkpoint/, TREC runs, summary.json. Next:",
        f"  python rearank.py --model {folder}/checkpoint --prompt toy {slide} --max-new-tokens {settings.max_new_tokens} "
        f"--input {folder}/long.jsonl --output {folder}/again.trec",
        f"  python eval.py {folder}/long.qrels {folder}/long.first_stage.trec {folder}/again.trec"])


def main(argv: list[str] | None = None) -> int:
    """Train the model that --model names, or run the toy."""
    argv = sys.argv[1:] if argv is None else argv
    real = any(a == "--model" or a.startswith("--model=") for a in argv)
    settings = command_line(Settings if real else ToySettings, argv, __doc__)
    if not real and (settings.data or settings.qrels):
        raise InputError("--data and --qrels need --model; without it the toy run makes its own data")
    return train_model(settings) if real else toy_run(settings)


if __name__ == "__main__":
    run_main(main)
