"""GRPO against its successors on the toy task. Each successor is a function of at most ten lines.

    python benchmarks/successors.py                  (three seeds, 25 minutes on one thread)
    python benchmarks/successors.py --seeds 0 --steps 5 --sft-steps 400        (a short try: 2 minutes)

Dr. GRPO, DAPO, GDPO and GSPO change only the advantage or the loss, so each is passed to `grpo.train` as the
hook `advantage` or `loss`. For each seed, one model is warm-started, and every method continues from a copy
of it, with the same windows, settings and learning rate. All are evaluated on the same held-out queries. The
script also checks some equalities on one batch of answers. Letters as in grpo.py: B prompts, G answers per
prompt, R = some of the B x G answers, T answer tokens.

`train` calls a loss once per micro-batch and adds up the gradients. So each loss below returns the
micro-batch's part of a sum, and divides by a number that comes from the whole batch (`all_lengths`, the
token counts of all B x G answers). A mean per micro-batch would depend on how the batch is cut.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from ablations import direction, held_out, logged_training, paired, quietly, rerank, write_csv
from grpo import (Rollouts, TrainSettings, batch_of, clipped_objective, group_advantages, grpo_loss, k3,
                  policy_microbatches, sample_rollouts, score_rollouts, supervised)
from model import Agent, token_mask
from support.cli import command_line, run_main, setting
from support.optimizer import MasterAdamW
from toy import TOY, toy_agent, toy_data, toy_lessons

# ------------------------------------------------------------------------------------------------------------
# Advantages: of the rollouts, [B, G]


def dr_grpo_advantages(rollouts: Rollouts) -> Tensor:
    """Dr. GRPO (arXiv 2503.20783, figure 1): A_i = r_i - mean(r), without GRPO's division by the std.

    Division by the std gives a prompt with nearly equal rewards the same weight as all others.
    """
    rewards = rollouts.rewards
    flat = group_advantages(rewards) == 0  # exact zeros if rewards are equal up to rounding
    return (rewards - rewards.mean(1, keepdim=True)).masked_fill(flat, 0.0)


def rloo_advantages(rewards: Tensor) -> Tensor:
    """RLOO (arXiv 2402.14740): r_i minus the mean of the group's other rewards. [B, G] -> [B, G].

    It is G / (G - 1) times Dr. GRPO's advantage. AdamW ignores a constant factor, so RLOO needs no run.
    """
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return rewards - others


PARTS = {"rank": 0.8, "format1": 0.1, "format2": 0.1}  # equation 6: the reward's parts and their weights


def gdpo_advantages(rollouts: Rollouts) -> Tensor:
    """GDPO (arXiv 2601.05242): A = sum over the reward's parts k of w_k (r_k - mean(r_k)) / std(r_k), where
    mean and std are the group's; then A is divided by its std over the whole batch.

    In GRPO the part that varies most sets the std of the sum, and the others hardly count. Here each part
    counts by its weight. (The paper also subtracts A's mean over the batch. It is 0, as in each group.)
    """
    total = torch.zeros_like(rollouts.rewards)  # [B, G]
    for name, weight in PARTS.items():
        part = torch.tensor([getattr(score, name) for score in rollouts.scores]).view_as(total)
        total += weight * group_advantages(part)
    return total / total.std().clamp(min=1e-6)  # if all answers are equal: 0


# ------------------------------------------------------------------------------------------------------------
# Losses: called like `grpo.grpo_loss`, with a part of the batch


def objectives(logps: Tensor, ref_logps: Tensor, advantages: Tensor, lengths: Tensor, beta: float,
               old_logps: Tensor, clip: Sequence[float]) -> Tensor:
    """Each token's clipped objective minus its KL penalty, as in GRPO; 0 at padding. [R, T]"""
    ratio = torch.exp(logps - old_logps)
    objective = clipped_objective(ratio, advantages, clip)
    if beta:
        objective = objective - beta * k3(logps, ref_logps)
    return objective.masked_fill(~token_mask(lengths, logps.shape[1]), 0.0)


def dr_grpo_loss(logps, ref_logps, advantages, lengths, beta, old_logps, clip, all_lengths,
                 limit: int) -> Tensor:
    """Dr. GRPO (arXiv 2503.20783, figure 1): -1/(B G) sum over answers of (sum over tokens) / limit.

    GRPO divides by each answer's own length instead, so that a long wrong answer costs less per token than a
    short one, and wrong answers grow longer. `limit` is a constant: --max-new-tokens.
    """
    objective = objectives(logps, ref_logps, advantages, lengths, beta, old_logps, clip)
    return -objective.sum() / (limit * len(all_lengths))


def dapo_loss(logps, ref_logps, advantages, lengths, beta, old_logps, clip, all_lengths,
              limit: int) -> Tensor:
    """DAPO (arXiv 2503.14476): -(sum over all tokens of the batch) / (their number), so that long answers
    weigh more. Answers of `limit` (--max-new-tokens) tokens were cut off, and their reward says little: they
    count neither in the sum nor in the number ("overlong filtering").

    (DAPO's clip-higher is `--clip 0.2 0.28`. Its dynamic sampling and its length reward are not implemented.)
    """
    objective = objectives(logps, ref_logps, advantages, lengths, beta, old_logps, clip)
    tokens = all_lengths[all_lengths < limit].sum().clamp(min=1)
    return -objective[lengths < limit].sum() / tokens


def gspo_loss(logps, ref_logps, advantages, lengths, beta, old_logps, clip, all_lengths) -> Tensor:
    """GSPO (arXiv 2507.18071): -1/(B G) sum over answers of min(s A, clip(s) A), where s is the answer's
    ratio: exp of the mean over its tokens of (log-probability - old log-probability).

    All tokens of an answer are clipped together. The KL penalty is GRPO's.
    """
    mask = token_mask(lengths, logps.shape[1])
    s = torch.exp(((logps - old_logps) * mask).sum(1, keepdim=True) / lengths[:, None])  # [R, 1]
    objective = clipped_objective(s, advantages, clip).sum(1)  # [R]
    if beta:
        objective = objective - beta * (k3(logps, ref_logps) * mask).sum(1) / lengths
    return -objective.sum() / len(all_lengths)


# ------------------------------------------------------------------------------------------------------------
# Equalities


def gradient(agent: Agent, rollouts: Rollouts, advantages: Tensor, options: TrainSettings,
             loss: Callable[..., Tensor], kept: dict) -> Tensor:
    """The gradient of a loss over all answers, as one vector."""
    agent.model.zero_grad()
    for batch in policy_microbatches(agent, None, rollouts, advantages, options, kept):
        loss(batch.logps, batch.ref_logps, batch.advantages, batch.lengths, options.beta, batch.old_logps,
             options.clip, batch.all_lengths).backward()
    return torch.cat([p.grad.flatten() for p in agent.model.parameters() if p.grad is not None])


def checks(agent: Agent, instances: list, options: TrainSettings) -> list[dict]:
    """Check equalities on one batch of answers. Returns rows {"check", "value", "why"}.

    "value" is the largest difference over the largest value. Gradients are compared in the batch's first
    update, and in its second update, where they must differ.
    """
    rollouts = sample_rollouts(agent, instances, options, step=1)
    rollouts.rewards = score_rollouts(rollouts, options, step=1)
    G = options.group_size
    scaled = G / (G - 1) * dr_grpo_advantages(rollouts)
    apart = (rloo_advantages(rollouts.rewards) - scaled).abs().max() / scaled.abs().max()
    rows = [{"check": "RLOO's advantage and G/(G-1) times Dr. GRPO's", "value": float(apart),
             "why": "r - (sum - r) / (G - 1) = G/(G-1) (r - mean)"}]
    higher, A = dataclasses.replace(options, clip=[0.2, 0.28]), group_advantages(rollouts.rewards)
    moved, kept = Agent(copy.deepcopy(agent.model), agent.tokenizer, agent.stop_ids), {}
    optimizer = MasterAdamW(moved.model.parameters())
    for update in ("first", "second"):
        base = gradient(moved, rollouts, A, options, grpo_loss, kept)
        others = {"clip-higher": gradient(moved, rollouts, A, higher, grpo_loss, kept),
                  "GSPO": gradient(moved, rollouts, A, options, gspo_loss, kept),
                  "DAPO": gradient(moved, rollouts, A, options,
                                   functools.partial(dapo_loss, limit=options.max_new_tokens), kept)}
        why = {"clip-higher": "the ratio is 1, inside both bounds",
               "GSPO": "the ratios are 1: s A has the gradient A times the tokens' mean, as GRPO's loss",
               "DAPO": "a token's weight does not depend on its answer's length"}
        if update == "second":
            why = dict.fromkeys(why, "the ratios are not 1 any more")
        for name, other in others.items():
            apart = (other - base).abs().max() / base.abs().max()
            rows.append({"check": f"gradient of {name} and of GRPO, {update} update", "value": float(apart),
                         "why": why[name]})
        gradient(moved, rollouts, A, options, grpo_loss, kept)
        optimizer.step(options.lr, options.grad_clip)
    return rows


# ------------------------------------------------------------------------------------------------------------
# The comparison


@dataclasses.dataclass
class Settings:
    """Settings of the comparison. All others are those of the toy run."""

    seeds: list[int] = setting(lambda: [0, 1, 2], "Seeds of warm start, windows and sampling.", nargs="+",
                               type=int)
    steps: int = setting(25, "GRPO steps of each run.", minimum=1)
    sft_steps: int = setting(TOY["sft_steps"], "Steps of the warm start.", minimum=0)
    eval_queries: int = setting(400, "Held-out queries.", minimum=8)
    results: str = setting(str(Path(__file__).resolve().parents[1] / "notebooks" / "results"),
                           "The folder for the CSVs.")
    json: bool = setting(False, "Print one JSON line per row instead of the table.")


def arms(limit: int) -> dict[str, tuple[str, dict, dict]]:
    """All arms: {name: (the arm it is compared with, settings, hooks)}. `limit` is --max-new-tokens."""
    dr_grpo = {"advantage": dr_grpo_advantages, "loss": functools.partial(dr_grpo_loss, limit=limit)}
    four, higher, narrow = {"updates": 4}, {"clip": [0.2, 0.28]}, {"clip": [3e-4, 4e-4]}
    return {
        "GRPO": ("warm start", {}, {}),
        "Dr. GRPO": ("GRPO", {}, dr_grpo),
        "DAPO": ("GRPO", {}, {"loss": functools.partial(dapo_loss, limit=limit)}),
        "GDPO": ("GRPO", {}, {"advantage": gdpo_advantages}),
        "GRPO, 4 updates": ("GRPO", four, {}),
        "clip-higher, 4 updates": ("GRPO, 4 updates", four | higher, {}),
        "GSPO, 4 updates": ("GRPO, 4 updates", four, {"loss": gspo_loss}),
        "GSPO's own clip, 4 updates": ("GRPO, 4 updates", four | narrow, {"loss": gspo_loss})}


class Watched:
    """A loss that also counts the tokens of answers with an advantage, and those that get no gradient.

    The log's column `clipped` goes by the ratios of single tokens, but GSPO clips whole answers.
    """

    def __init__(self, loss: Callable[..., Tensor]):
        self.loss, self.tokens, self.stopped = loss, 0, 0

    def __call__(self, logps: Tensor, ref_logps: Tensor, advantages: Tensor, lengths: Tensor, *rest):
        value = self.loss(logps, ref_logps, advantages, lengths, *rest)
        [slope] = torch.autograd.grad(value, logps, retain_graph=True)
        counted = token_mask(lengths, logps.shape[1]) & (advantages != 0)[:, None]
        self.tokens += int(counted.sum())
        self.stopped += int((counted & (slope == 0)).sum())
        return value


def run_seed(settings: Settings, seed: int, results: dict[str, list[dict]]) -> list[dict]:
    """Warm-start one model, train each arm from a copy of it, and evaluate all on the held-out queries.

    Adds {"ndcg": one value per query, "stopped": share, "seconds"} to each arm's results. Returns the rows of
    `checks`.
    """
    smaller = {"seed": seed, "steps": settings.steps, "sft_steps": settings.sft_steps,
               "samples_every": 10**6, "save_every": 10**6}
    options, start = TrainSettings(**TOY | smaller), toy_agent(seed)
    quietly(supervised, start, toy_lessons(start, options), options.sft_steps, options.sft_lr, options)
    windows, _ = toy_data(options)
    lists, labels = held_out(settings.eval_queries, options.window, options.eval_seed)
    ndcg = quietly(rerank, start, lists, labels)[0]
    results.setdefault("warm start", []).append({"ndcg": ndcg})
    for name, (_, changes, hooks) in arms(options.max_new_tokens).items():
        agent = Agent(copy.deepcopy(start.model), start.tokenizer, start.stop_ids)
        watched = Watched(hooks.get("loss", grpo_loss))
        training = functools.partial(logged_training, **hooks | {"loss": watched})
        log = quietly(training, agent, windows, dataclasses.replace(options, **changes))
        ndcg = quietly(rerank, agent, lists, labels)[0]
        seconds = sum(float(row["seconds"]) for row in log)
        print(f"seed {seed}, {name}: NDCG@10 {statistics.fmean(ndcg):.3f}, {seconds:.0f} s", file=sys.stderr)
        results.setdefault(name, []).append(
            {"ndcg": ndcg, "stopped": watched.stopped / max(1, watched.tokens), "seconds": seconds})
    return quietly(checks, start, batch_of(windows, 1, options), options)


def table(results: dict[str, list[dict]], limit: int) -> list[dict]:
    """One row per arm. Which differences are seen: `ablations.direction`."""
    rows, ndcg = [], {name: [run["ndcg"] for run in runs] for name, runs in results.items()}
    verdicts = {1: "higher", 0: "no difference seen", -1: "lower"}
    for name, (versus, _, _) in arms(limit).items():
        (gain, gain_low, gain_high), _ = paired(ndcg[name], ndcg["warm start"])
        (difference, low, high), seeds = paired(ndcg[name], ndcg[versus])
        verdict = verdicts[direction(difference, low, high, seeds)]
        rows.append({
            "method": name, "gain": gain, "gain_low": gain_low, "gain_high": gain_high, "versus": versus,
            "difference": difference, "low": low, "high": high, "seeds": " ".join(f"{x:+.3f}" for x in seeds),
            "verdict": verdict, "stopped": statistics.fmean(x["stopped"] for x in results[name]),
            "seconds": statistics.fmean(x["seconds"] for x in results[name])})
    return rows


def main(argv: list[str] | None = None) -> int:
    """Check the equalities, train and evaluate all arms, print both and write them as CSVs."""
    settings = command_line(Settings, argv, __doc__)
    folder = Path(settings.results)
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    results, checked, rows = {}, [], []
    for seed in settings.seeds:
        found = run_seed(settings, seed, results)
        checked = checked or found  # those of the first seed
        rows = table(results, TOY["max_new_tokens"])
        # Written after each seed, so that an interrupted run leaves the results of its finished seeds.
        write_csv(folder / "successors.csv", rows, list(rows[0]))
        write_csv(folder / "successors_checks.csv", checked, list(checked[0]))
    for row in checked + rows if settings.json else ():
        print(json.dumps(row))
    if settings.json:
        return 0
    start = statistics.fmean(statistics.fmean(x["ndcg"]) for x in results["warm start"])
    print(f"warm start: NDCG@10 {start:.3f} on {settings.eval_queries} held-out queries")
    for row in checked:
        print("{check}: difference {value:.1e} of the largest value ({why})".format(**row))
    for row in rows:
        print("{method:26} gain {gain:+.3f} ({gain_low:+.3f} to {gain_high:+.3f})  against {versus}: "
              "{difference:+.3f} ({low:+.3f} to {high:+.3f}), seeds {seeds}: {verdict}; without gradient "
              "{stopped:.1%}, {seconds:.0f} s".format(**row))
    return 0


if __name__ == "__main__":
    run_main(main)
