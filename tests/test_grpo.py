"""GRPO: advantages, loss, one step, the optimizer, the training loop and its run folder."""

import copy
import csv
import dataclasses
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2Config
from conftest import full_logps, random_prompts, relative_error, tiny_model

import grpo
from data import InputError, Instance, write_candidates, write_instances, write_qrels
from grpo import (MasterAdamW, Rollouts, RunFolder, batch_of, group_advantages, grpo_loss, k3, learning_rate,
                  supervised, token_mask, train, update_policy)
from model import Agent, Completion, load_agent, microbatches, sample
from rearank import Reranker, encode_prompt
from reward import Score, ndcg
from toy import ToySettings, toy_agent, toy_task

ROOT = Path(__file__).resolve().parents[1]

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
    assert abs(k3(reference[drawn], policy[drawn]).mean() - exact) > 0.1 * exact  # swapped: another quantity


def test_the_penalty_pulls_the_policy_back_to_the_reference():
    logits = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True)
    reference = torch.tensor([[0.0, 0.0, 0.0]]).log_softmax(-1)
    policy = logits.log_softmax(-1)
    kl = (policy.exp() * (policy - reference)).sum()
    exact = torch.autograd.grad(kl, logits, retain_graph=True)[0]
    expected = torch.zeros_like(exact)  # the expectation over tokens that the policy draws
    for a in range(3):
        token = slice(a, a + 1)
        loss = grpo_loss(policy[:, token], reference[:, token], torch.zeros(1), torch.tensor([1]), beta=1.0)
        expected += policy[0, a].exp().detach() * torch.autograd.grad(loss, logits, retain_graph=True)[0]
    assert (torch.sign(expected) == torch.sign(exact)).all() and expected.abs().sum() > 0  # k1 would give 0


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


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_an_update_is_the_same_however_it_is_cut_into_micro_batches(beta):
    (rollouts, rewards), results = three_groups(), []
    for answer_tokens in (1, 20, 10**6):
        model = tiny_model()
        settings = ToySettings(beta=beta, answer_tokens=answer_tokens)
        reference = tiny_model(seed=1) if beta else None
        optimizer = MasterAdamW(list(model.parameters()))
        results.append(update_policy(Agent(model, None, []), reference, optimizer, rollouts,
                                     group_advantages(rewards), 1e-3, settings))
    for name in ("grad_norm", "kl", "entropy", "loss"):
        wanted = pytest.approx(results[2][name], rel=1e-4, abs=1e-6, nan_ok=True)
        assert results[0][name] == wanted == results[1][name]
    assert results[0]["grad_norm"] > 0.01
    assert results[0]["kl"] > 0 if beta else math.isnan(results[0]["kl"])  # no reference: unknown, not 0


class Watched(MasterAdamW):
    """Keeps the gradients that the update asks it to apply."""

    def step(self, *arguments, **options):
        self.given = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.params]
        return super().step(*arguments, **options)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_the_gradient_is_that_of_the_loss_over_all_answers_a_flat_group_among_them(beta):
    """Equations 3 and 4 written out: one forward pass for each answer, a mean over all B x G of them."""
    (rollouts, rewards), model, reference = three_groups(), tiny_model(), tiny_model(seed=1)
    optimizer = Watched(model.parameters())
    settings = ToySettings(beta=beta, answer_tokens=20)
    update_policy(Agent(model, None, []), reference if beta else None, optimizer, rollouts,
                  group_advantages(rewards), 0.0, settings)
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


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_a_step_learns_at_the_temperature_that_it_sampled_at(temperature, beta):
    """STYLE's known mistake: applied in sampling, not in the log-probabilities of policy and reference."""
    (rollouts, rewards), norms, kls = three_groups(), [], []
    for t in (temperature, "as logits"):
        model, reference = tiny_model(), tiny_model(seed=1)
        if t == "as logits":  # dividing the weights of the head by t is the same policy at temperature 1
            for m in (model, reference):
                m.lm_head.weight.data /= temperature
        settings = ToySettings(beta=beta, temperature=1.0 if t == "as logits" else t)
        optimizer = MasterAdamW([p for n, p in model.named_parameters() if n != "lm_head.weight"])
        row = update_policy(Agent(model, None, []), reference, optimizer, rollouts,
                            group_advantages(rewards), 0.0, settings)
        norms.append(row["grad_norm"])
        kls.append(row["kl"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4) and kls[0] == pytest.approx(kls[1], rel=1e-4)


def test_a_flat_group_costs_nothing_without_a_penalty_and_keeps_its_penalty_with_one(monkeypatch):
    (rollouts, rewards), visited = three_groups(), []
    honest = grpo.microbatches

    def recorded(model, prompts, answers, groups=None, **sizes):
        visited.append(groups)
        return honest(model, prompts, answers, groups, **sizes)

    monkeypatch.setattr(grpo, "microbatches", recorded)
    for reference in (None, tiny_model(seed=1)):
        model = tiny_model()
        update_policy(Agent(model, None, []), reference, MasterAdamW(list(model.parameters())), rollouts,
                      group_advantages(rewards), 1e-3, ToySettings(beta=0.1 if reference else 0.0))
    # The update; the reference's pass and the update.
    assert [[*groups] for groups in visited] == [[0, 1], [0, 1, 2], [0, 1, 2]]


def one_window() -> list[Instance]:
    texts = ["oak leaf forest oak", "storm flour loan leaf"]
    return [Instance("q", "rain bread coin", ["a", "b"], texts, [0, 3], [0, 3])]


def quick(tmp_path, **changes) -> ToySettings:
    few = {"prompts_per_step": 1, "group": 8, "steps": 2, "max_new_tokens": 12, "beta": 0.0, "save_every": 1,
           "out": str(tmp_path / "run")}
    return ToySettings(**few | changes)


def test_random_rewards_have_nothing_to_do_with_the_answers_and_differ_from_step_to_step():
    rollouts = Rollouts([one_window()[0]] * 2, [], [], [], [Score(0.5, 0, 0, 0, 0)] * 6, 0.0, 1.0)
    settings = ToySettings(reward="random", group=3)
    first, second = (grpo.rollout_rewards(rollouts, settings, step) for step in (1, 2))
    assert first.shape == (2, 3) and not torch.equal(first, second)
    assert torch.equal(first, grpo.rollout_rewards(rollouts, settings, 1))
    assert torch.equal(grpo.rollout_rewards(rollouts, ToySettings(group=3), 1), torch.full((2, 3), 0.5))


def test_the_log_describes_the_rollouts(toy, monkeypatch):
    """Two answers to a window with labels 0, 3: the better order, and the order as it was, cut off."""
    texts = ["<think> x </think> <answer> [2] > [1] </answer>", "<answer> [1] > [2] </answer>"]
    monkeypatch.setattr(grpo, "sample", lambda *_: [[Completion([5] * 8, True), Completion([5] * 4, False)]])
    monkeypatch.setattr(Agent, "decode", lambda self, completion: texts[len(completion.ids) == 4])
    settings = ToySettings(group=2)
    rollouts = grpo.sample_rollouts(toy, one_window(), settings, 1)
    rewards = grpo.rollout_rewards(rollouts, settings, 1)
    row = grpo.rollout_statistics(rollouts, rewards, group_advantages(rewards))
    given = 3 / 1.584962500721156 / 3
    assert row["ndcg"] == pytest.approx((1 + given) / 2) and row["ndcg_best"] == 1
    assert row["ndcg_init"] == pytest.approx(given)
    wanted = {"permutations": 1.0, "identity": 0.5, "cut": 0.5, "format1": 0.5, "format2": 1.0, "length": 6.0,
              "flat_groups": 0.0}
    assert {name: row[name] for name in wanted} == wanted
    assert row["reward"] == pytest.approx((1.0 + 0.1) / 2)


def test_rollouts_of_two_steps_differ_and_a_step_repeats_its_own(toy):
    texts = [grpo.sample_rollouts(toy, one_window(), ToySettings(group=2), step).texts for step in (1, 2, 1)]
    assert texts[0] != texts[1] and texts[0] == texts[2]


# --- the optimizer


def test_bfloat16_weights_move_by_updates_smaller_than_their_spacing():
    weight = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    optimizer = MasterAdamW([weight])
    # AdamW moves each weight by lr: 600 times 1e-5 is 0.006, the spacing below 1 is 0.004.
    for _ in range(600):
        weight.float().sum().backward()
        optimizer.step(1e-5, 1e9)
    torch.testing.assert_close(weight.float(), torch.full((1000,), 1 - 0.006), atol=0.004, rtol=0)
    assert (weight < 1).all()


def test_gradients_of_bfloat16_weights_are_added_up_in_float32():
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = MasterAdamW([weight])
    (weight * 256).sum().backward()
    for _ in range(100):
        (weight * 0.5).sum().backward()  # in bfloat16 256 + 0.5 is 256
    assert weight.grad is None and optimizer.sums[weight].item() == 306


def test_a_second_optimizer_can_take_over_the_model():
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    MasterAdamW([weight]).release()
    second = MasterAdamW([weight])
    (weight * 2).sum().backward()
    assert second.sums[weight].item() == 2 and second.step(1e-3, 1e9) == 2


def test_float32_training_is_torchs_adamw_with_the_gradient_clipped(model):
    other = copy.deepcopy(model)
    ours = MasterAdamW(list(model.parameters()), weight_decay=0.01)
    theirs = torch.optim.AdamW(other.parameters(), lr=1e-3, weight_decay=0.01)
    for step in range(3):
        for m in (model, other):
            m(torch.tensor(random_prompts(9))).logits.square().mean().mul(10**step).backward()
        norm = torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        assert ours.step(1e-3, 0.5) == pytest.approx(float(norm), rel=1e-5)  # the norm before the clipping
        theirs.step()
        theirs.zero_grad()
    for a, b in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_the_learning_rate_warms_up_and_decays_to_a_tenth():
    assert [learning_rate(s, 100, 1.0, 4, False) for s in (1, 2, 4, 100)] == [0.25, 0.5, 1.0, 1.0]
    assert learning_rate(100, 100, 1.0, 4, True) == pytest.approx(0.1)
    assert learning_rate(52, 100, 1.0, 4, True) == pytest.approx(0.55)


# --- training


def test_a_tiny_model_learns_what_is_rewarded(toy, tmp_path):
    """Reward a token: the policy writes it more often. This is the whole of GRPO, without the ranking."""
    def share(text, *_):
        return Score(text.split().count("storm") / max(1, len(text.split())), 0.0, 0.0, 0.0, 0.0)
    settings = quick(tmp_path, prompts_per_step=2, group=16, steps=40, lr=3e-3, save_every=1000)
    train(toy, one_window() * 2, settings, RunFolder(settings), reward=share)
    log = list(csv.DictReader(open(tmp_path / "run/log.csv")))
    assert float(log[0]["reward"]) < 0.1 < 0.5 < float(log[-1]["reward"])
    wanted = toy.tokenizer.convert_tokens_to_ids("storm")
    prompt = encode_prompt(toy.tokenizer, "x", ["y"], "toy")
    assert wanted in sample(toy.model, [prompt], 1, 5, 0.0, [])[0][0].ids


def test_supervision_teaches_a_tiny_model_an_answer(toy):
    prompt = encode_prompt(toy.tokenizer, "rain", ["oak"], "toy")
    answer = toy.tokenizer("<answer> [1] </answer>")["input_ids"] + [1]
    supervised(toy, itertools.repeat([(prompt, answer)]), 30, 1e-2, ToySettings())
    assert sample(toy.model, [prompt], 1, 9, 0.0, [1])[0][0] == Completion(answer, True)


def test_direct_sft_shows_the_best_order(toy):
    settings = ToySettings(prompts_per_step=1)
    [(prompt, answer)] = next(grpo.best_order_batches(toy, one_window(), settings))
    assert toy.tokenizer.decode(answer) == "<answer> [2] > [1] </answer> <|end|>"
    assert prompt == encode_prompt(toy.tokenizer, "rain bread coin", one_window()[0].texts, "toy")


def test_the_sampled_ids_are_trained_on_and_not_the_text_encoded_again(toy, tmp_path, monkeypatch):
    # Decodes to a text whose encoding is other ids: <|pad|> stands for every unknown word too.
    odd = [7, 0, 9, 1]
    monkeypatch.setattr(grpo, "sample",
                        lambda model, prompts, group, *_: [[Completion(odd, True)] * group] * len(prompts))
    seen, honest = [], grpo.microbatches

    def recorded(model, prompts, answers, *more, **sizes):
        seen.append(answers)
        return honest(model, prompts, answers, *more, **sizes)

    monkeypatch.setattr(grpo, "microbatches", recorded)
    settings = quick(tmp_path, reward="random")
    train(toy, one_window(), settings, RunFolder(settings))
    assert all(answers == [odd] * 8 for answers in seen) and seen


def test_a_resumed_run_ends_as_the_unbroken_one(tmp_path):
    instances = one_window() * 3

    def run(folder, steps, resume=False):
        settings = quick(tmp_path, reward="random", steps=steps, resume=resume, decay=False)
        settings.out, agent = str(tmp_path / folder), toy_agent(0)
        train(agent, instances, settings, RunFolder(settings))
        return agent.model

    whole = run("a", 4)
    run("b", 2)
    again = run("b", 4, resume=True)  # from the starting model: the state holds the trained weights
    for a, b in zip(whole.parameters(), again.parameters()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert [r["step"] for r in csv.DictReader(open(tmp_path / "b/log.csv"))] == ["1", "2", "3", "4"]


def test_bfloat16_masters_survive_a_resume(tmp_path):
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    first = MasterAdamW([weight])
    weight.float().sum().backward()
    first.step(1e-4, 1.0)
    second = MasterAdamW([torch.nn.Parameter(weight.detach().clone())])
    second.load_state(first.state().items())
    torch.testing.assert_close(second.masters[0], first.masters[0], rtol=0, atol=0)


def test_ctrl_c_leaves_a_checkpoint_and_a_log(toy, tmp_path, monkeypatch):
    honest = grpo.grpo_step
    def interrupted(*arguments, **hooks):
        if arguments[-1] == 2:
            raise KeyboardInterrupt
        return honest(*arguments, **hooks)
    monkeypatch.setattr(grpo, "grpo_step", interrupted)
    settings = quick(tmp_path, steps=9, save_every=100)
    with pytest.raises(KeyboardInterrupt):
        train(toy, one_window(), settings, RunFolder(settings))
    assert json.loads((tmp_path / "run/state/state.json").read_text())["step"] == 1
    assert len((tmp_path / "run/log.csv").read_text().splitlines()) == 2
    load_agent(str(tmp_path / "run/checkpoint"), "cpu")


GUARDED = {"model": "other", "seed": 1, "prompts_per_step": 2, "group": 4, "reward": "absolute",
           "prompt": "rearank", "window": 7, "draws": 3, "order": "shuffled", "keep_draws": "all",
           "min_ndcg": 0.2, "sft_steps": 1, "sft_lr": 1e-9, "lora_rank": 2, "teacher_graded": 0.5,
           "eval_queries": 9, "eval_seed": 3}


@pytest.mark.parametrize("name", list(GUARDED))
def test_a_run_is_not_resumed_with_a_setting_that_makes_it_another_run(toy, tmp_path, name):
    settings = quick(tmp_path)
    train(toy, one_window(), settings, RunFolder(settings))
    with pytest.raises(InputError, match=f"--resume: .* was begun with --{name.replace('_', '-')} "):
        RunFolder(dataclasses.replace(settings, resume=True, **{name: GUARDED[name]}))


def test_the_kl_is_measured_without_a_penalty_where_it_is_asked_for(tmp_path):
    logs = []
    for name, changes in {"off": {}, "on": {"log_kl": True}}.items():
        settings = quick(tmp_path, reward="random", lr=1e-2, warmup=0, out=str(tmp_path / name), **changes)
        agent = toy_agent(0)
        train(agent, one_window(), settings, RunFolder(settings))
        logs.append([float(row["kl"]) for row in csv.DictReader(open(tmp_path / name / "log.csv"))])
    assert all(map(math.isnan, logs[0]))  # unknown, which is not 0
    assert abs(logs[1][0]) < 1e-6 < 1e-3 < logs[1][1]  # the first step's policy is the reference
    weights = [load_file(tmp_path / name / "checkpoint/model.safetensors") for name in ("off", "on")]
    for name, weight in weights[0].items():  # measuring it changes nothing
        torch.testing.assert_close(weight, weights[1][name], atol=1e-6, rtol=0)


def test_small_numbers_survive_in_the_log(tmp_path):
    folder = RunFolder(quick(tmp_path))
    row = dict.fromkeys(grpo.COLUMNS, 0.0) | {"step": 1, "lr": 2e-7, "kl": 3.25e-9}
    folder.log(row)
    folder.log(row | {"step": 2})
    content = (tmp_path / "run/log.csv").read_bytes()
    assert content.count(b"2e-07") == 2 and b"3.25e-09" in content and b"\r" not in content


def test_batches_walk_through_all_instances_before_any_comes_again():
    instances, settings = list(range(10)), ToySettings(prompts_per_step=4)
    drawn = [x for step in range(1, 6) for x in batch_of(instances, step, settings)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == instances and drawn[:10] != drawn[10:]


# --- checkpoints that others read


def test_a_checkpoint_has_the_names_that_older_readers_look_for(toy, tmp_path):
    """transformers 4 takes 10,000 for a rope_theta that it does not find at the top level."""
    settings, umask = quick(tmp_path), os.umask(0o022)
    try:
        RunFolder(settings).save(toy, MasterAdamW(list(toy.model.parameters())), "grpo", 1)
    finally:
        os.umask(umask)
    config = json.loads((tmp_path / "run/checkpoint/config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100.0
    assert config["torch_dtype"] == "float32"
    tokenizer = json.loads((tmp_path / "run/checkpoint/tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    files = [f for name in ("checkpoint", "state") for f in (tmp_path / "run" / name).iterdir()]
    assert {oct(f.stat().st_mode & 0o777) for f in files} == {"0o644"} and len(files) > 4
    again = load_agent(str(tmp_path / "run/checkpoint"), "cpu")
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(again.model(ids).logits, toy.model(ids).logits)
    text = "rain [1] > <answer>"
    assert again.tokenizer(text)["input_ids"] == toy.tokenizer(text)["input_ids"]


def test_scaled_position_embeddings_are_written_for_older_readers_too(tmp_path, toy):
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
    model = tiny_model(kind="llama", rope_parameters=rope)
    grpo.write_model(Agent(model, toy.tokenizer, [1]), tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["rope_theta"] == 500.0 and config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    again, ids = load_agent(str(tmp_path / "model"), "cpu"), torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(again.model(ids).logits, model(ids).logits)


# --- validation


def test_the_best_policy_on_held_out_queries_is_kept_and_logged(toy, tmp_path, monkeypatch):
    scores = iter([0.5, 0.7, 0.6])
    monkeypatch.setattr(grpo, "validate", lambda *_: dict.fromkeys(grpo.COLUMNS[5:8], next(scores)))
    settings = quick(tmp_path, steps=6, eval_every=2, save_every=100, keep=1)
    train(toy, one_window(), settings, RunFolder(settings), held_out=toy_task(2, 3, 0, held_out=True))
    log = list(csv.DictReader(open(tmp_path / "run/log.csv")))
    assert [row["eval_ndcg"] for row in log] == ["", "0.5", "", "0.7", "", "0.6"]
    assert sorted(p.name for p in (tmp_path / "run/saves").iterdir()) == ["grpo-000004", "grpo-000006"]
    assert (tmp_path / "run/best").resolve() == (tmp_path / "run/saves/grpo-000004/checkpoint").resolve()
    load_agent(str(tmp_path / "run/best"), "cpu")
    state = json.loads((tmp_path / "run/state/state.json").read_text())
    assert (state["step"], state["best"], state["best_step"]) == (6, 0.7, 4)


def test_the_best_policy_survives_a_worse_validation_after_a_resume(toy, tmp_path, monkeypatch):
    scores = iter([0.7, 0.6, 0.65])
    monkeypatch.setattr(grpo, "validate", lambda *_: dict.fromkeys(grpo.COLUMNS[5:8], next(scores)))
    held_out = toy_task(2, 3, 0, held_out=True)
    settings = quick(tmp_path, steps=2, eval_every=2, save_every=1, keep=1, reward="random")
    train(toy, one_window(), settings, RunFolder(settings), held_out=held_out)
    best = (tmp_path / "run/best/model.safetensors").read_bytes()
    resumed = dataclasses.replace(settings, steps=6, resume=True)
    train(toy, one_window(), resumed, RunFolder(resumed), held_out=held_out)
    assert (tmp_path / "run/best/model.safetensors").read_bytes() == best
    assert (tmp_path / "run/checkpoint/model.safetensors").read_bytes() != best
    state = json.loads((tmp_path / "run/state/state.json").read_text())
    assert (state["step"], state["best"], state["best_step"]) == (6, 0.7, 2)


def test_validation_is_the_ndcg_of_greedy_reranking(toy):
    candidates, qrels = toy_task(6, 8, 0, held_out=True)
    settings = ToySettings(window=5, max_new_tokens=9)
    row = grpo.validate(toy, candidates, qrels, settings)
    reranker, scores = Reranker(toy, "toy", 5, 5, max_new_tokens=9), []
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


# --- the plan of memory

SEVEN_B = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064,
           "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False}


@pytest.fixture(scope="module")
def seven_b(tmp_path_factory) -> str:
    """A folder with nothing but the config.json of a 7B."""
    folder = tmp_path_factory.mktemp("7b")
    Qwen2Config(**SEVEN_B, max_position_embeddings=32768).save_pretrained(folder)
    return str(folder)


def planned(capsys, folder: str, *more: str) -> str:
    assert grpo.main(["--model", folder, "--plan", *more]) == 0
    return capsys.readouterr().out


def test_a_7b_fits_one_80_gb_card_by_itself_and_a_larger_card_is_used(capsys, seven_b):
    small, large = (planned(capsys, seven_b, "--memory", gib) for gib in ("79", "141"))
    assert "--offload --checkpointing" in small and "--no-checkpointing" in large
    host = float(re.search(r"together .* (\S+)", small).group(1))
    assert 80 < host < 120  # of 128 GiB
    assert "weights                      14.2     14.2" in small and "a save writes 99.3" in small


def test_flags_set_by_hand_are_obeyed_and_what_cannot_fit_is_refused_with_what_would(capsys, seven_b):
    by_hand = planned(capsys, seven_b, "--memory", "141", "--offload", "--checkpointing", "--max-rows", "48")
    assert "--offload --checkpointing" in by_hand and "--max-rows 48" in by_hand
    with pytest.raises(InputError, match="training needs at least .* GiB on the card .* --beta 0"):
        grpo.main(["--model", seven_b, "--plan", "--memory", "40"])
    with pytest.raises(InputError, match="training needs"):
        grpo.main(["--model", seven_b, "--plan", "--memory", "79", "--no-offload"])


# --- the command


@pytest.fixture
def folder(toy, tmp_path) -> Path:
    """A model folder (the toy's, standing for a real one), candidates, judgements and instances."""
    toy.model.save_pretrained(tmp_path / "m")
    toy.tokenizer.save_pretrained(tmp_path / "m")
    candidates, qrels = toy_task(3, 12, seed=1)
    write_candidates(tmp_path / "c.jsonl", candidates)
    write_qrels(tmp_path / "q.txt", qrels)
    write_instances(tmp_path / "i.jsonl", one_window())
    return tmp_path


def arguments(folder: Path, *more: str) -> list[str]:
    return ["--model", str(folder / "m"), "--out", str(folder / "o"), "--prompt", "toy", "--window", "5",
            "--group", "2", "--prompts-per-step", "2", "--steps", "1", "--max-new-tokens", "5",
            "--device", "cpu", *more]


def test_a_model_folder_trains_on_candidate_files(folder):
    data = ["--data", str(folder / "c.jsonl"), "--qrels", str(folder / "q.txt")]
    assert grpo.main(arguments(folder, *data, "--sft-steps", "1", "--checkpointing")) == 0
    [row] = csv.DictReader(open(folder / "o/log.csv"))
    assert row["step"] == "1" and float(row["kl"]) == pytest.approx(0, abs=1e-6)  # still the reference
    with pytest.raises(InputError, match="--resume"):
        grpo.main(arguments(folder, *data))  # an earlier run is never overwritten without being asked
    config = json.loads((folder / "o/config.json").read_text())
    assert config["data"] == [data[1]] and len(config["trained_on"]["sha256"]) == 64


def test_a_resumed_run_keeps_to_its_data(folder):
    assert grpo.main(arguments(folder, "--data", str(folder / "i.jsonl"))) == 0
    assert grpo.main(arguments(folder, "--resume", "--steps", "2")) == 0  # --data auto: as it began
    assert len((folder / "o/log.csv").read_text().splitlines()) == 3
    write_instances(folder / "i.jsonl", one_window() * 2)
    with pytest.raises(InputError, match="--resume: .* was trained on other data"):
        grpo.main(arguments(folder, "--resume", "--steps", "3"))


def test_a_resumed_run_keeps_the_supervised_model_as_its_reference(folder, monkeypatch):
    """The penalty is to the model that GRPO started from, which --sft-steps has moved away from --model."""
    weights, honest = [], grpo.reference_logps
    monkeypatch.setattr(grpo, "reference_logps", lambda reference, *more: weights.append(
        [p.clone() for p in reference.parameters()]) or honest(reference, *more))
    data = ["--data", str(folder / "i.jsonl"), "--sft-steps", "1", "--sft-lr", "1e-2"]
    assert grpo.main(arguments(folder, *data)) == 0
    assert grpo.main(arguments(folder, *data, "--resume", "--steps", "2")) == 0
    before = load_agent(str(folder / "m"), "cpu").model
    assert all(map(torch.equal, *weights)) and not all(map(torch.equal, weights[0], before.parameters()))


@pytest.mark.parametrize("flag", ["--data", "--qrels", "--eval-data", "--plan"])
def test_what_only_a_real_model_can_do_is_refused_without_one(flag):
    with pytest.raises(InputError, match="need --model"):
        grpo.main([flag] if flag == "--plan" else [flag, "x"])


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
    with pytest.raises(InputError, match="too little memory for a step: lower --answer-tokens"):
        grpo.main(arguments(folder, "--data", str(folder / "i.jsonl")))


def test_the_scripts_start_where_there_is_no_resource_module():
    """Windows has none; nothing runs on import anywhere."""
    code = ("import sys; sys.modules['resource'] = None; import grpo, toy, torch; "
            "print(grpo.peak_mib(torch.device('cpu')))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "0.0\n"
