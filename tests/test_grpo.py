"""GRPO: advantages, loss, one step, validation, supervised learning, the command."""

import copy
import csv
import dataclasses
import itertools
import json
import math
import re
import statistics

import pytest
import torch
from conftest import (arguments, full_logps, one_window, quick, random_prompts, relative_error, tiny_model,
                      toy_settings)
from safetensors.torch import load_file

import grpo
from grpo import (Rollouts, batch_of, group_advantages, grpo_loss, k3, learning_rate, score_rollouts,
                  supervised, train)
from model import Agent, Completion, load_agent, microbatches, sample, token_mask
from prompts import encode_prompt
from rearank import Reranker
from reward import Score, ndcg
from support.cli import InputError
from support.files import write_instances
from support.optimizer import MasterAdamW
from support.prompt_file import read_prompt_file
from support.run_folder import RunFolder
from toy import toy_agent, toy_task


# --- advantages


def test_advantages_are_z_scores_inside_each_group():
    rewards = torch.tensor([[0.0, 1.0, 2.0, 3.0], [10.0, 10.0, 10.0, 14.0]])
    advantages = group_advantages(rewards)
    torch.testing.assert_close(advantages.mean(-1), torch.zeros(2))
    torch.testing.assert_close(advantages.std(-1), torch.ones(2))
    torch.testing.assert_close(advantages[1], torch.tensor([-0.5, -0.5, -0.5, 1.5]))


@pytest.mark.parametrize("value", [0.7, 0.1 + 0.2, 1e-3, -1.0])
def test_a_flat_group_gets_exact_zeros_and_not_its_rounding_error(value):
    assert not group_advantages(torch.full((3, 32), value)).any()
    nearly = torch.full((8,), value)
    nearly[3] = torch.nextafter(nearly[3], torch.tensor(9.0))
    assert not group_advantages(nearly).any()


def test_a_group_of_one_has_nothing_to_be_compared_with():
    assert group_advantages(torch.tensor([[3.0]])).tolist() == [[0.0]]


# --- loss


def test_k3_estimates_the_exact_kl_far_from_zero():
    generator = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(2, 6, generator=generator) * 1.5).log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum()
    assert exact > 0.5
    drawn = torch.multinomial(policy.exp(), 400_000, replacement=True, generator=generator)
    estimates = k3(policy[drawn], reference[drawn])
    assert (estimates >= 0).all()
    assert abs(estimates.mean() - exact) < 0.02 * exact
    assert abs(k3(reference[drawn], policy[drawn]).mean() - exact) > 0.1 * exact  # k3 is not symmetric


def test_the_penalty_pulls_the_policy_back_to_the_reference():
    logits = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True)
    reference = torch.tensor([[0.0, 0.0, 0.0]]).log_softmax(-1)
    policy = logits.log_softmax(-1)
    kl = (policy.exp() * (policy - reference)).sum()
    exact = torch.autograd.grad(kl, logits, retain_graph=True)[0]
    expected = torch.zeros_like(exact)  # the expectation over tokens drawn from the policy
    for a in range(3):
        token = slice(a, a + 1)
        loss = grpo_loss(policy[:, token], reference[:, token], torch.zeros(1), torch.tensor([1]), beta=1.0)
        expected += policy[0, a].exp().detach() * torch.autograd.grad(loss, logits, retain_graph=True)[0]
    assert (torch.sign(expected) == torch.sign(exact)).all() and expected.abs().sum() > 0  # with k1 it is 0


def test_every_answer_counts_alike_however_long_and_every_token_alike_inside_it():
    logps = torch.zeros(2, 4, requires_grad=True)
    loss = grpo_loss(logps, None, torch.tensor([1.0, -2.0]), torch.tensor([1, 4]), beta=0.0)
    loss.backward()
    wanted = torch.tensor([[-0.5, 0, 0, 0], [0.25, 0.25, 0.25, 0.25]])  # A / (2 outputs * |o|)
    torch.testing.assert_close(logps.grad, wanted)
    assert loss.item() == pytest.approx(0.5)  # minus the mean advantage


def test_lengths_and_a_mask_say_the_same():
    logps, ref, advantages = torch.randn(3, 5), torch.randn(3, 5), torch.randn(3)
    lengths = torch.tensor([2, 5, 1])
    by_mask = grpo_loss(logps, ref, advantages, token_mask(lengths, 5), 0.1)
    torch.testing.assert_close(grpo_loss(logps, ref, advantages, lengths, 0.1), by_mask)


def test_a_group_with_equal_rewards_has_no_gradient(model):
    answers = random_prompts(5, 6, 7, seed=3)
    advantages = group_advantages(torch.full((3,), 0.7))
    for batch in microbatches(model, random_prompts(9), answers):
        grpo_loss(batch.logps, None, advantages[batch.rows], batch.lengths, 0.0).backward()
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


# --- one step


def rollouts_of(prompts, answers) -> Rollouts:
    return Rollouts([], prompts, [Completion(a, True) for a in answers], [], [], 0.0, 1.0)


def three_groups():
    prompts, answers = random_prompts(14, 30, 8), random_prompts(3, 9, 1, 6, 12, 5, 2, 8, 10, seed=1)
    return rollouts_of(prompts, answers), torch.tensor([[0.0, 1.0, 0.5], [1.0, 0.0, 0.0], [0.7, 0.7, 0.7]])


def update(monkeypatch, model, reference, optimizer, rollouts, rewards, lr, settings) -> dict:
    """Run `grpo_step` with given rollouts and rewards instead of sampling. Returns the log's row."""
    monkeypatch.setattr(grpo, "sample_rollouts", lambda *_: rollouts)
    monkeypatch.setattr(grpo, "score_rollouts", lambda *_: rewards)
    monkeypatch.setattr(grpo, "rollout_statistics", lambda *_: {})
    row, got = grpo.grpo_step(Agent(model, None, []), reference, optimizer, [], lr, settings, 1)
    assert got is rollouts and torch.equal(got.rewards, rewards)
    return row


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_an_update_is_the_same_however_it_is_cut_into_micro_batches(monkeypatch, beta):
    (rollouts, rewards), results = three_groups(), []
    for microbatch_tokens in (1, 20, 10**6):
        model = tiny_model()
        settings = toy_settings(beta=beta, microbatch_tokens=microbatch_tokens)
        reference = tiny_model(seed=1) if beta else None
        optimizer = MasterAdamW(list(model.parameters()))
        results.append(update(monkeypatch, model, reference, optimizer, rollouts, rewards, 1e-3, settings))
    for name in ("grad_norm", "kl", "entropy", "loss"):
        wanted = pytest.approx(results[2][name], rel=1e-4, abs=1e-6, nan_ok=True)
        assert results[0][name] == wanted == results[1][name]
    assert results[0]["grad_norm"] > 0.01
    assert results[0]["kl"] > 0 if beta else math.isnan(results[0]["kl"])  # without a reference: NaN


class Watched(MasterAdamW):
    """An optimizer that keeps a copy of the gradients of its last step."""

    def step(self, *arguments, **options):
        self.given = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.params]
        return super().step(*arguments, **options)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_the_gradient_is_that_of_the_loss_over_all_answers_a_flat_group_among_them(monkeypatch, beta):
    """The expected gradient writes out equations 3 and 4: one forward pass per answer, a mean over B x G."""
    (rollouts, rewards), model, reference = three_groups(), tiny_model(), tiny_model(seed=1)
    optimizer = Watched(model.parameters())
    settings = toy_settings(beta=beta, microbatch_tokens=20)
    update(monkeypatch, model, reference if beta else None, optimizer, rollouts, rewards, 0.0, settings)
    objective = 0.0
    for i, completion in enumerate(rollouts.completions):
        group = rewards[i // 3]
        advantage = (group[i % 3] - group.mean()) / group.std() if group.std() > 1e-6 else 0.0
        logps = full_logps(model, rollouts.prompts[i // 3], completion.ids)
        with torch.no_grad():
            ref = full_logps(reference, rollouts.prompts[i // 3], completion.ids)
        kl = (ref - logps).exp() - 1 - (ref - logps)
        objective = objective + (logps.exp() / logps.exp().detach() * advantage - beta * kl).mean() / 9
    wanted = torch.autograd.grad(-objective, list(model.parameters()))
    assert relative_error(optimizer.given, wanted) < 1e-5


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_several_updates_are_those_of_ppo_written_out(monkeypatch, beta):
    """Each update uses all answers. Its ratios are against the policy before the first update."""
    (rollouts, rewards), model, reference = three_groups(), tiny_model(), tiny_model(seed=1)
    naive, lr = tiny_model(), 3e-3
    settings = toy_settings(beta=beta, microbatch_tokens=20, updates=3, clip=[0.1, 0.3], grad_clip=1e9)
    optimizer = MasterAdamW(model.parameters())
    row = update(monkeypatch, model, reference if beta else None, optimizer, rollouts, rewards, lr, settings)

    adamw, advantages = torch.optim.AdamW(naive.parameters(), lr, weight_decay=0.0), group_advantages(rewards)
    answers = [(rollouts.prompts[i // 3], c.ids) for i, c in enumerate(rollouts.completions)]
    with torch.no_grad():
        old, ref = ([full_logps(m, *answer) for answer in answers] for m in (naive, reference))
    for _ in range(3):
        objective, clipped, total = 0.0, 0, 0
        for i, answer in enumerate(answers):
            logps, A = full_logps(naive, *answer), advantages.flatten()[i]
            ratio = (logps - old[i]).exp()
            inside = torch.where(A > 0, ratio.clamp(max=1.3), ratio.clamp(min=0.9))
            kl = (ref[i] - logps).exp() - 1 - (ref[i] - logps)
            objective = objective + (inside * A - beta * kl).mean() / 9
            clipped += int(((inside != ratio) & (A != 0)).sum())
            total += len(logps) if beta or rewards[i // 3].std() else 0
        adamw.zero_grad()
        (-objective).backward()
        adamw.step()
    assert clipped > 3 and row["clipped"] == pytest.approx(clipped / total)
    assert relative_error([p.detach() for p in model.parameters()],
                          [p.detach() for p in naive.parameters()]) < 1e-3
    assert row["loss"] == pytest.approx(beta * row["kl"] if beta else 0.0, abs=0.05)  # first update's


def test_with_one_update_the_old_policy_and_the_clip_change_not_a_bit():
    torch.manual_seed(0)
    gradients = []
    for more in ((), (None, (0.2, 0.28)), ("own", (0.0, 0.0))):
        logps = torch.randn(5, 7, generator=torch.Generator().manual_seed(1), requires_grad=True)
        if more and more[0]:
            more = (logps.detach(), more[1])
        loss = grpo_loss(logps, torch.zeros(5, 7), torch.linspace(-1, 1, 5), torch.arange(3, 8), 0.1, *more)
        loss.backward()
        gradients.append(torch.cat([logps.grad.flatten(), loss.detach()[None]]))
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


def test_an_advantage_of_ones_own_and_a_loss_of_ones_own_get_what_they_need(toy, tmp_path):
    """A loss returns its micro-batch's part of a sum. `all_lengths` are the lengths in the whole batch."""
    settings, seen = quick(tmp_path, steps=1, updates=2, microbatch_tokens=20), []

    def advantage(rollouts):
        seen.append(rollouts.rewards.shape)
        return torch.arange(8.0)[None] - 3.5

    def loss(logps, ref_logps, advantages, lengths, beta, old_logps, clip, all_lengths):
        seen.append((advantages.tolist(), int(lengths.sum()), int(all_lengths.sum()), clip))
        return grpo_loss(logps, ref_logps, advantages, lengths, beta, old_logps, clip, all_lengths)

    train(toy, one_window(), settings, RunFolder(settings), advantage=advantage, loss=loss)
    shape, *parts = seen
    given = sorted(a for advantages, *_ in parts for a in advantages)
    assert shape == (1, 8) and given == [i // 2 - 3.5 for i in range(16)]
    assert {whole for *_, whole, _ in parts} == {sum(n for _, n, *_ in parts) // 2} and len(parts) > 2


def test_the_reference_reads_a_batch_once_however_many_updates_use_it(monkeypatch):
    (rollouts, rewards), visited, honest = three_groups(), [], grpo.microbatches
    monkeypatch.setattr(grpo, "microbatches",
                        lambda model, *rest: visited.append(model) or honest(model, *rest))
    model, reference = tiny_model(), tiny_model(seed=1)
    update(monkeypatch, model, reference, MasterAdamW(model.parameters()), rollouts, rewards, 1e-3,
           toy_settings(beta=0.1, updates=3))
    assert visited == [reference, model, model, model]


def test_where_all_rewards_are_equal_the_optimizer_does_not_step_on_its_momentum(monkeypatch):
    (rollouts, rewards), model = three_groups(), tiny_model()
    optimizer, settings = MasterAdamW(model.parameters()), toy_settings(beta=0.0)
    update(monkeypatch, model, None, optimizer, rollouts, rewards, 1e-3, settings)
    before = [p.detach().clone() for p in model.parameters()]
    row = update(monkeypatch, model, None, optimizer, rollouts, torch.ones(3, 3), 1e-3, settings)
    assert all(map(torch.equal, before, model.parameters())) and optimizer.updates == 1
    assert row["grad_norm"] == 0 and row["skipped"] == 0 and math.isnan(row["entropy"])


@pytest.mark.parametrize("loss_is_finite", [True, False])
def test_an_entropy_that_is_no_number_decides_nothing(monkeypatch, loss_is_finite):
    """Logits of -inf give such an entropy. The update is made, or skipped with its gradient cleared."""
    (rollouts, rewards), model, honest = three_groups(), tiny_model(), grpo.microbatches

    def poisoned(*arguments):
        for batch in honest(*arguments):
            batch.entropy = batch.entropy + float("nan")
            if not loss_is_finite:
                batch.logps = batch.logps * float("nan")
            yield batch

    monkeypatch.setattr(grpo, "microbatches", poisoned)
    before, optimizer = [p.detach().clone() for p in model.parameters()], MasterAdamW(model.parameters())
    row = update(monkeypatch, model, None, optimizer, rollouts, rewards, 1e-3, toy_settings(beta=0.0))
    assert math.isnan(row["entropy"]) and row["skipped"] == int(not loss_is_finite)
    assert all(map(torch.equal, before, model.parameters())) == (not loss_is_finite)
    assert all(p.grad is None for p in model.parameters())


def test_an_update_that_is_not_finite_is_the_last_of_its_step_and_is_reported(toy, tmp_path):
    settings, before = quick(tmp_path, reward="random", steps=1, updates=3), copy.deepcopy(toy.model)
    train(toy, one_window(), settings, RunFolder(settings), loss=nan_at(1))
    assert all(map(torch.equal, before.parameters(), toy.model.parameters()))
    [row] = csv.DictReader(open(tmp_path / "run/log.csv"))
    assert row["skipped"] == "1"


@pytest.mark.parametrize("typed, said", [
    ("--clip 0.2 0.3", "--clip has no effect without --updates 2 or more"),
    ("--updates 2 --clip -0.1 0.2", "expected LOW from 0 to 1"),
    ("--updates 2 --clip 0.2 nan", "HIGH from 0")])
def test_a_clip_that_clips_nothing_is_refused(typed, said):
    with pytest.raises(InputError, match=re.escape(said)):
        grpo.main(typed.split())


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_a_step_learns_at_the_temperature_that_it_sampled_at(monkeypatch, temperature, beta):
    """A known mistake: the temperature is applied in sampling, but not in the log-probabilities."""
    (rollouts, rewards), norms, kls = three_groups(), [], []
    for t in (temperature, "as logits"):
        model, reference = tiny_model(), tiny_model(seed=1)
        if t == "as logits":  # the same policy at temperature 1: head weights / t
            for m in (model, reference):
                m.lm_head.weight.data /= temperature
        settings = toy_settings(beta=beta, temperature=1.0 if t == "as logits" else t)
        optimizer = MasterAdamW([p for n, p in model.named_parameters() if n != "lm_head.weight"])
        row = update(monkeypatch, model, reference, optimizer, rollouts, rewards, 0.0, settings)
        norms.append(row["grad_norm"])
        kls.append(row["kl"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4) and kls[0] == pytest.approx(kls[1], rel=1e-4)


def test_a_flat_group_costs_nothing_without_a_penalty_and_keeps_its_penalty_with_one(monkeypatch):
    (rollouts, rewards), visited = three_groups(), []
    honest = grpo.microbatches

    def recorded(model, prompts, answers, groups, *sizes):
        visited.append(groups)
        return honest(model, prompts, answers, groups, *sizes)

    monkeypatch.setattr(grpo, "microbatches", recorded)
    for reference in (None, tiny_model(seed=1)):
        model = tiny_model()
        optimizer, settings = MasterAdamW(model.parameters()), toy_settings(beta=0.1 if reference else 0.0)
        update(monkeypatch, model, reference, optimizer, rollouts, rewards, 1e-3, settings)
    # Groups visited without a reference: by the update. With one: by the reference's pass and by the update.
    assert [[*groups] for groups in visited] == [[0, 1], [0, 1, 2], [0, 1, 2]]


def test_random_rewards_have_nothing_to_do_with_the_answers_and_differ_from_step_to_step():
    def rewards(step, **changes):
        rollouts = Rollouts([one_window()[0]] * 2, [], [], ["x"] * 6, [], 0.0, 1.0)
        settings = toy_settings(group_size=3, **changes)
        found = score_rollouts(rollouts, settings, step, lambda *_: Score(0.5, 0, 0, 0, 0))
        assert rollouts.scores == [Score(0.5, 0, 0, 0, 0)] * 6
        return found

    first, second = (rewards(step, reward="random") for step in (1, 2))
    assert first.shape == (2, 3) and not torch.equal(first, second)
    assert torch.equal(first, rewards(1, reward="random"))
    assert not torch.equal(first, rewards(1, reward="random", seed=1))
    assert torch.equal(rewards(1), torch.full((2, 3), 0.5))


def test_the_log_describes_the_rollouts(toy, monkeypatch):
    """Two answers to a window with labels 0, 3: a better order, and a cut-off answer that keeps the order."""
    texts = ["<think> x </think> <answer> [2] > [1] </answer>", "<answer> [1] > [2] </answer>"]
    answers = [Completion([5] * 8, True), Completion([5] * 4, False)]
    monkeypatch.setattr(grpo, "sample", lambda *_, **options: [answers])
    monkeypatch.setattr(Agent, "decode", lambda self, completion: texts[len(completion.ids) == 4])
    settings = toy_settings(group_size=2)
    rollouts = grpo.sample_rollouts(toy, one_window(), settings, 1)
    rollouts.rewards = score_rollouts(rollouts, settings, 1)
    row = grpo.rollout_statistics(rollouts, group_advantages(rollouts.rewards))
    given = 3 / 1.584962500721156 / 3
    assert row["ndcg"] == pytest.approx((1 + given) / 2) and row["ndcg_best"] == 1
    assert row["ndcg_init"] == pytest.approx(given)
    wanted = {"permutations": 1.0, "unchanged": 0.5, "hit_limit": 0.5, "format1": 0.5, "format2": 1.0,
              "length": 6.0, "zero_std_groups": 0.0}
    assert {name: row[name] for name in wanted} == wanted
    assert row["reward"] == pytest.approx((1.0 + 0.1) / 2)


def test_rollouts_of_two_steps_differ_and_a_step_repeats_its_own(toy):
    settings = toy_settings(group_size=2)
    texts = [grpo.sample_rollouts(toy, one_window(), settings, step).texts for step in (1, 2, 1)]
    assert texts[0] != texts[1] and texts[0] == texts[2]


def test_the_log_says_how_far_the_sampler_is_from_the_trainer(toy, tmp_path, monkeypatch):
    """In float32 the difference is rounding only. A difference of 0.5 that the test adds is logged."""
    settings = quick(tmp_path, reward="random", steps=1)
    train(toy, one_window(), settings, RunFolder(settings))
    [row] = csv.DictReader(open(tmp_path / "run/log.csv"))
    assert 0 < float(row["logp_diff"]) <= float(row["logp_diff_max"]) < 1e-5
    honest = grpo.sample

    def shifted(*arguments, **options):
        groups = honest(*arguments, **options)
        groups[0][0].logps[0] -= 0.5
        return groups

    monkeypatch.setattr(grpo, "sample", shifted)
    again = quick(tmp_path, reward="random", steps=1, out=str(tmp_path / "b"))
    train(toy, one_window(), again, RunFolder(again))
    [row] = csv.DictReader(open(tmp_path / "b/log.csv"))
    assert float(row["logp_diff_max"]) == pytest.approx(0.5, abs=0.01)  # the policy moved before
    tokens = float(row["length"]) * 8
    assert float(row["logp_diff"]) == pytest.approx(0.5 / tokens, rel=0.1)


# --- updates that are not finite


def nan_at(*steps):
    """A loss that is NaN in these steps. Each step must have one micro-batch."""
    calls = []

    def loss(logps, *rest):
        calls.append(None)
        return logps.sum() * float("nan") if len(calls) in steps else grpo_loss(logps, *rest)

    return loss


def test_one_bad_gradient_skips_the_update_and_keeps_its_rollouts(toy, tmp_path, capsys):
    settings = quick(tmp_path, reward="random", steps=3)
    before = [p.detach().clone() for p in toy.model.parameters()]
    train(toy, one_window(), dataclasses.replace(settings, steps=1), RunFolder(settings), loss=nan_at(1))
    assert all(map(torch.equal, before, toy.model.parameters()))
    resumed = dataclasses.replace(settings, resume=True)
    train(toy, one_window(), resumed, RunFolder(resumed))
    assert not all(map(torch.equal, before, toy.model.parameters()))
    assert all(p.isfinite().all() for p in toy.model.parameters())
    log = list(csv.DictReader(open(tmp_path / "run/log.csv")))
    assert [row["skipped"] for row in log] == ["1", "0", "0"] and log[0]["loss"] == "nan"
    printed = capsys.readouterr().out
    assert "step    1  " in printed and "SKIPPED: loss nan" in printed
    skipped = (tmp_path / "run/skipped.txt").read_text()
    entries = re.findall(r"--- step (\d+), query q: .*\n.*\n    reward (\S+), .* (\d+) tokens\n", skipped)
    rewards = torch.rand((1, 8), generator=torch.Generator().manual_seed(1))[0].tolist()  # as --reward random
    assert [(step, reward) for step, reward, _ in entries] == [("1", f"{r:+.3f}") for r in rewards]
    assert all(0 < int(length) <= 12 for *_, length in entries)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_norm_that_is_not_finite_skips_too(toy, tmp_path, bad):
    """The loss is finite, but the gradient is not."""

    class Bad(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x.clone())
        backward = staticmethod(lambda ctx, grad: grad * bad)

    settings = quick(tmp_path, reward="random", steps=1)
    before = [p.detach().clone() for p in toy.model.parameters()]
    train(toy, one_window(), settings, RunFolder(settings),
          loss=lambda logps, *_: Bad.apply(logps).mean() * 0 + 1)
    [row] = csv.DictReader(open(tmp_path / "run/log.csv"))
    assert row["skipped"] == "1" and row["grad_norm"] == "nan" and row["loss"] == "1"
    assert all(map(torch.equal, before, toy.model.parameters()))


def test_a_loss_that_is_not_finite_skips_though_its_gradient_is(toy, tmp_path):
    settings = quick(tmp_path, reward="random", steps=1)
    before = [p.detach().clone() for p in toy.model.parameters()]
    train(toy, one_window(), settings, RunFolder(settings),
          loss=lambda logps, *_: logps.mean() + float("inf"))
    [row] = csv.DictReader(open(tmp_path / "run/log.csv"))
    assert (row["skipped"], row["loss"]) == ("1", "inf") and 0 < float(row["grad_norm"]) < float("inf")
    assert all(map(torch.equal, before, toy.model.parameters()))


def test_three_bad_gradients_in_a_row_stop_the_run_also_across_a_resume(toy, tmp_path):
    settings = quick(tmp_path, reward="random", steps=9)
    with pytest.raises(SystemExit, match="step 5: the third update in a row"):
        train(toy, one_window(), settings, RunFolder(settings), loss=nan_at(1, 3, 4, 5))
    again = quick(tmp_path, reward="random", steps=2, out=str(tmp_path / "b"))
    train(toy, one_window(), again, RunFolder(again), loss=nan_at(1, 2))
    again = dataclasses.replace(again, steps=9, resume=True)
    with pytest.raises(SystemExit, match="step 3: the third update in a row"):
        train(toy, one_window(), again, RunFolder(again), loss=nan_at(1))


def test_a_supervised_step_that_is_not_finite_is_skipped_and_the_third_stops_the_run(toy, monkeypatch):
    answer, honest, bad = ([5, 6], [7, 1]), grpo.answer_losses, iter([True, False, True, True, False])

    def poisoned(*arguments, **options):
        for total in honest(*arguments, **options):
            yield total * (float("nan") if next(bad) else 1.0)

    monkeypatch.setattr(grpo, "answer_losses", poisoned)
    settings = grpo.TrainSettings(microbatch_tokens=64, checkpointing=False)
    grpo.supervised(toy, iter([[answer]] * 5), 5, 1e-3, settings)
    assert all(p.isfinite().all() for p in toy.model.parameters())
    bad = iter([True] * 3)
    with pytest.raises(SystemExit, match="sft, step 3: the third in a row"):
        grpo.supervised(toy, iter([[answer]] * 5), 5, 1e-3, settings)


# --- training


def test_a_tiny_model_learns_what_is_rewarded(toy, tmp_path):
    """The reward is the share of the word "storm". GRPO makes the policy write it more often."""
    def share(text, *_):
        return Score(text.split().count("storm") / max(1, len(text.split())), 0.0, 0.0, 0.0, 0.0)
    settings = quick(tmp_path, prompts_per_step=2, group_size=16, steps=40, lr=3e-3, save_every=1000)
    train(toy, one_window() * 2, settings, RunFolder(settings), reward=share)
    log = list(csv.DictReader(open(tmp_path / "run/log.csv")))
    assert float(log[0]["reward"]) < 0.1 < 0.5 < float(log[-1]["reward"])
    wanted = toy.tokenizer.convert_tokens_to_ids("storm")
    prompt = encode_prompt(toy.tokenizer, "x", ["y"], "toy")
    assert wanted in sample(toy.model, [prompt], 1, 5, 0.0, [])[0][0].ids


def test_the_sampled_ids_are_trained_on_and_not_the_text_encoded_again(toy, tmp_path, monkeypatch):
    # The text of these ids is encoded as other ids, since <|pad|> also stands for unknown words.
    odd = [7, 0, 9, 1]
    def always_odd(model, prompts, group_size, **_):
        return [[Completion(odd, True)] * group_size] * len(prompts)

    monkeypatch.setattr(grpo, "sample", always_odd)
    seen, honest = [], grpo.microbatches

    def recorded(model, prompts, answers, *more, **sizes):
        seen.append(answers)
        return honest(model, prompts, answers, *more, **sizes)

    monkeypatch.setattr(grpo, "microbatches", recorded)
    settings = quick(tmp_path, reward="random")
    train(toy, one_window(), settings, RunFolder(settings))
    assert all(answers == [odd] * 8 for answers in seen) and seen


def test_the_kl_is_measured_without_a_penalty_where_it_is_asked_for(tmp_path):
    logs = []
    for name, changes in {"off": {}, "on": {"log_kl": True}}.items():
        settings = quick(tmp_path, reward="random", lr=1e-2, warmup=0, out=str(tmp_path / name), **changes)
        agent = toy_agent(0)
        train(agent, one_window(), settings, RunFolder(settings))
        logs.append([float(row["kl"]) for row in csv.DictReader(open(tmp_path / name / "log.csv"))])
    assert all(map(math.isnan, logs[0]))  # unknown, not 0
    assert abs(logs[1][0]) < 1e-6 < 1e-3 < logs[1][1]  # the first step's policy is the reference
    weights = [load_file(tmp_path / name / "checkpoint/model.safetensors") for name in ("off", "on")]
    for name, weight in weights[0].items():  # measuring the KL changes no weight
        torch.testing.assert_close(weight, weights[1][name], atol=1e-6, rtol=0)


def test_batches_walk_through_all_instances_before_any_comes_again():
    instances, settings = list(range(10)), toy_settings(prompts_per_step=4)
    drawn = [x for step in range(1, 6) for x in batch_of(instances, step, settings)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == instances and drawn[:10] != drawn[10:]


def test_the_learning_rate_warms_up_and_decays_to_a_tenth():
    assert [learning_rate(s, 100, 1.0, 4, False) for s in (1, 2, 4, 100)] == [0.25, 0.5, 1.0, 1.0]
    assert learning_rate(100, 100, 1.0, 4, True) == pytest.approx(0.1)
    assert learning_rate(52, 100, 1.0, 4, True) == pytest.approx(0.55)


# --- validation


def test_validation_is_the_ndcg_of_greedy_reranking(toy):
    candidates, qrels = toy_task(6, 8, 0, held_out=True)
    for judged in qrels.values():
        judged["a relevant one that the list lacks"] = 3  # counts in the ideal
    settings = toy_settings(window=5, max_new_tokens=9)
    row = grpo.validate(toy, candidates, qrels, settings)
    reranker, scores = Reranker(toy, "toy", window=5, stride=5, max_new_tokens=9), []
    for c in candidates:
        order = [result.index for result in reranker.rank(c.query, c.texts[:5])] + [5, 6, 7]
        scores.append(ndcg([qrels[c.qid][c.docids[i]] for i in order], ideal=list(qrels[c.qid].values())))
    assert row["eval_ndcg"] == pytest.approx(statistics.fmean(scores))
    half = 1.96 * statistics.stdev(scores) / 6**0.5
    assert row["eval_high"] - row["eval_ndcg"] == pytest.approx(half) == row["eval_ndcg"] - row["eval_low"]


def test_queries_that_are_trained_on_cannot_be_held_out(folder):
    held = ["--eval-data", str(folder / "c.jsonl"), "--eval-qrels", str(folder / "q.txt")]
    trained = ["--data", str(folder / "c.jsonl"), "--qrels", str(folder / "q.txt")]
    with pytest.raises(InputError, match="query train0 is trained on"):
        grpo.main(arguments(folder, *trained, *held))
    with pytest.raises(InputError, match="expected --eval-qrels"):
        grpo.main(arguments(folder, "--data", str(folder / "i.jsonl"), *held[:2]))
    assert grpo.main(arguments(folder, "--data", str(folder / "i.jsonl"), *held)) == 0
    assert float(next(csv.DictReader(open(folder / "o/log.csv")))["eval_ndcg"]) > 0


# --- supervised learning


def test_supervision_teaches_a_tiny_model_an_answer(toy):
    prompt = encode_prompt(toy.tokenizer, "rain", ["oak"], "toy")
    answer = toy.tokenizer("<answer> [1] </answer>")["input_ids"] + [1]
    supervised(toy, itertools.repeat([(prompt, answer)]), 30, 1e-2, toy_settings())
    assert sample(toy.model, [prompt], 1, 9, 0.0, [1])[0][0] == Completion(answer, True)


def test_the_supervised_loss_is_the_mean_over_all_answer_tokens(toy):
    batch = [([5, 6, 7], [8, 9]), ([7, 5], [4, 4, 4, 4, 2])]
    with torch.no_grad():
        wanted = -torch.cat([full_logps(toy.model, *pair) for pair in batch]).mean()
    loss = supervised(toy, iter([batch]), 1, 0.0, toy_settings(microbatch_tokens=5))  # two micro-batches
    assert loss == pytest.approx(float(wanted), rel=1e-5)


def test_direct_sft_shows_the_best_order(toy):
    settings = toy_settings(prompts_per_step=1)
    [(prompt, answer)] = next(grpo.best_order_batches(toy, one_window(), settings))
    assert toy.tokenizer.decode(answer) == "<answer> [2] > [1] </answer> <|end|>"
    assert prompt == encode_prompt(toy.tokenizer, "rain bread coin", one_window()[0].texts, "toy")


# --- the command


def test_a_model_folder_trains_on_candidate_files(folder):
    data = ["--data", str(folder / "c.jsonl"), "--qrels", str(folder / "q.txt")]
    assert grpo.main(arguments(folder, *data, "--sft-steps", "1", "--checkpointing")) == 0
    [row] = csv.DictReader(open(folder / "o/log.csv"))
    assert row["step"] == "1" and float(row["kl"]) == pytest.approx(0, abs=1e-6)  # equals the reference
    with pytest.raises(InputError, match="--resume"):
        grpo.main(arguments(folder, *data))  # an earlier run is not overwritten
    config = json.loads((folder / "o/config.json").read_text())
    assert config["data"] == [data[1]] and len(config["trained_on"]["sha256"]) == 64


def test_a_run_is_trained_and_resumed_with_the_content_of_its_prompt_file(folder, monkeypatch):
    template = "method: singleturn_listwise\nprefix: '{query} '\nbody: '[{rank}] {candidate} '\n"
    path, moved = folder / "p.yaml", folder / "moved.yaml"
    path.write_text(template)
    command = arguments(folder, "--data", str(folder / "i.jsonl"), "--prompt", str(path))
    seen, fit_prompt = [], grpo.fit_prompt

    def recorded(*arguments):
        seen.append(fit_prompt(*arguments))
        return seen[-1]

    monkeypatch.setattr(grpo, "fit_prompt", recorded)
    assert grpo.main(command) == 0
    shown = load_agent(str(folder / "m"), "cpu").tokenizer.decode(seen[0][0])
    assert shown == "rain bread coin [1] oak leaf forest oak [2] storm flour loan leaf <|end|> <|assistant|>"
    path.rename(moved)
    assert grpo.main([*command, "--resume", "--steps", "2", "--prompt", str(moved)]) == 0
    moved.write_text(template + "suffix: rain\n")
    read_prompt_file.cache_clear()  # as in a new process
    with pytest.raises(InputError, match="begun with --prompt 'file with SHA-256 .*moved.yaml is another"):
        grpo.main([*command, "--resume", "--steps", "3", "--prompt", str(moved)])


def test_a_resumed_run_keeps_to_its_data(folder):
    assert grpo.main(arguments(folder, "--data", str(folder / "i.jsonl"))) == 0
    assert grpo.main(arguments(folder, "--resume", "--steps", "2")) == 0  # without --data: the run's own
    assert len((folder / "o/log.csv").read_text().splitlines()) == 3
    write_instances(folder / "i.jsonl", one_window() * 2)
    with pytest.raises(InputError, match="--resume: .* was trained on other data"):
        grpo.main(arguments(folder, "--resume", "--steps", "3"))


def test_a_resumed_run_keeps_to_the_data_that_auto_stood_for(folder, monkeypatch):
    asked = []

    def chosen(data, qrels, **_):
        asked.append(data)
        return one_window(), {"data": ["dl21"], "queries": 1}

    monkeypatch.setattr(grpo, "training_instances", chosen)
    assert grpo.main(arguments(folder)) == 0
    assert grpo.main(arguments(folder, "--resume", "--steps", "2")) == 0
    assert asked == [["auto"], ["dl21"]]


def test_a_resumed_run_keeps_the_supervised_model_as_its_reference(folder, monkeypatch):
    """The reference is the model that GRPO started from. --sft-steps has moved it away from --model."""
    weights, honest = [], grpo.policy_microbatches

    def recorded(agent, reference, *more):
        weights.append([p.clone() for p in reference.parameters()])
        return honest(agent, reference, *more)

    monkeypatch.setattr(grpo, "policy_microbatches", recorded)
    data = ["--data", str(folder / "i.jsonl"), "--sft-steps", "1", "--sft-lr", "1e-2"]
    assert grpo.main(arguments(folder, *data)) == 0
    assert grpo.main(arguments(folder, *data, "--resume", "--steps", "2")) == 0
    before = load_agent(str(folder / "m"), "cpu").model
    assert all(map(torch.equal, *weights)) and not all(map(torch.equal, weights[0], before.parameters()))


@pytest.mark.parametrize("typed, reason", [
    ("--data x", "needs --model"), ("--qrels x", "needs --model"), ("--eval-data x", "needs --model"),
    ("--eval-qrels x", "needs --model"), ("--plan", "needs --model"), ("--gpus 2", "needs --model"),
    ("--memory 79", "needs --model"), ("--prompt toy", "needs --model"),
    ("--window 21", "end at .20."), ("--dtype bfloat16", "weights are float32"),
    ("--model M --teacher-graded 0.5", "belongs to the toy run"),
    ("--model M --eval-queries 9", "belongs to the toy run"),
    ("--model=M --eval-seed 9", "belongs to the toy run"),
    ("--model M --qrels x", "expected --data with the candidates"),
    ("--model M --eval-qrels x", "has no effect without --eval-data"),
    ("--model M --eval-every 5", "has no effect without --eval-data"),
    ("--model M --memory 79", "has no effect without --plan"),
    ("--model M --gpus 2", "has no effect without --plan"),
    ("--model M --sft-lr 1e-3", "has no effect without --sft-steps")])
def test_an_option_without_effect_is_refused_before_anything_is_done(monkeypatch, tmp_path, typed, reason):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=reason) as fault:
        grpo.main(typed.split())
    assert "\n" not in str(fault.value) and not list(tmp_path.iterdir())
    options = [word for word in typed.split() if word.startswith("--") and "--model" not in word]
    assert options[0] in str(fault.value)


@pytest.mark.parametrize("typed, run", [
    ("--eval-queries 9 --sft-lr 1e-3 --seed 3", "toy_run"),
    ("--model M --plan --memory 79 --gpus 2", "train_model"),
    ("--model M --sft-steps 2 --sft-lr 1e-3", "train_model"),
    ("--model=M --eval-data x --eval-qrels y --eval-every 5", "train_model")])
def test_an_option_with_an_effect_is_accepted_and_the_defaults_are_the_modes(monkeypatch, typed, run):
    seen = []
    monkeypatch.setattr(grpo, run, lambda settings: seen.append(settings) or 0)
    assert grpo.main(typed.split()) == 0
    toys = toy_settings()
    assert (seen[0].out, seen[0].prompt) == ((toys.out, "toy") if run == "toy_run" else
                                             ("runs/rearank", "rearank"))


def test_a_run_that_cannot_begin_leaves_no_folder_in_the_way(folder):
    data = ["--data", str(folder / "i.jsonl")]
    with pytest.raises(InputError, match="smaller window"):
        grpo.main(arguments(folder, *data, "--max-prompt-tokens", "5"))
    with pytest.raises(InputError, match="expected --data"):
        grpo.main(arguments(folder, "--qrels", str(folder / "q.txt")))
    assert not (folder / "o").exists() and grpo.main(arguments(folder, *data)) == 0


def test_faults_of_the_data_show_before_the_weights_are_loaded(folder, monkeypatch):
    monkeypatch.setattr(grpo, "load_agent", lambda *_: pytest.fail("loaded before the data were read"))
    with pytest.raises(InputError, match="expected a file, auto"):
        grpo.main(arguments(folder, "--data", str(folder / "missing.jsonl")))
    with pytest.raises(InputError, match="expected --eval-qrels"):
        grpo.main(arguments(folder, "--data", str(folder / "i.jsonl"),
                            "--eval-data", str(folder / "c.jsonl")))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_step_without_enough_memory_says_what_to_lower(folder, monkeypatch, error):
    def too_much(*_, **__):
        raise error

    monkeypatch.setattr(grpo, "grpo_step", too_much)
    with pytest.raises(InputError, match="too little memory for a step: lower --microbatch-tokens"):
        grpo.main(arguments(folder, "--data", str(folder / "i.jsonl")))
