"""benchmarks/successors.py: advantages and losses on small tensors, against values computed by hand."""

import csv
import functools
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import successors
from grpo import Rollouts, grpo_loss
from reward import Score
from successors import (Watched, dapo_loss, dr_grpo_advantages, dr_grpo_loss, gdpo_advantages, gspo_loss,
                        rloo_advantages)

LIMIT = 3  # --max-new-tokens of these tests
LOSSES = {"GRPO": grpo_loss, "Dr. GRPO": functools.partial(dr_grpo_loss, limit=LIMIT),
          "DAPO": functools.partial(dapo_loss, limit=LIMIT), "GSPO": gspo_loss}
LENGTHS = torch.tensor([2, 3, 1, 1])
A = torch.tensor([1.0, -2.0, 0.5, 0.0])


def rollouts_of(rewards, scores=()):
    return Rollouts([], [], [], [], list(scores), 0.0, 0.0, torch.tensor(rewards))


def call(loss, logps, old, clip=(0.2, 0.2), rows=slice(None), beta=0.0, ref=None):
    """The value of a loss on the answers `rows` of the four answers defined above."""
    ref = None if ref is None else ref[rows]
    return loss(logps[rows], ref, A[rows], LENGTHS[rows], beta, old[rows], clip, LENGTHS)


def ratios(*rows):
    """(logps, old logps) with these ratios exp(logps - old logps)."""
    logps = torch.log(torch.tensor(rows))
    return logps.requires_grad_(), torch.zeros_like(logps)


ONES = ((1.0, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1))
# Ratios after some updates. The values at padding must not change any loss.
MOVED = ((2.0, 0.5, 99), (0.5, 0.5, 0.5), (1.25, 99, 99), (1, 99, 99))


# --- advantages


def test_dr_grpo_subtracts_the_mean_and_does_not_divide():
    advantages = dr_grpo_advantages(rollouts_of([[1.0, 0.0, 0.5], [0.2, 0.2, 0.5]]))
    assert torch.allclose(advantages, torch.tensor([[0.5, -0.5, 0.0], [-0.1, -0.1, 0.2]]))


def test_equal_rewards_get_exact_zeros():
    rewards = torch.tensor([[0.1] * 7])
    assert (rewards - rewards.mean()).any()  # the plain formula gives a rounding error
    assert not dr_grpo_advantages(rollouts_of([[0.1] * 7])).any()
    assert not gdpo_advantages(rollouts_of([[0.1] * 7], [Score(0.1, 0.1, 0.1, 0.1, 0.1)] * 7)).any()


def test_rloo_is_dr_grpo_times_a_constant():
    rewards = [[1.0, 0.0, 0.5], [0.2, 0.2, 0.5]]
    rloo = rloo_advantages(torch.tensor(rewards))
    assert torch.allclose(rloo, torch.tensor([[0.75, -0.75, 0.0], [-0.15, -0.15, 0.3]]))
    assert torch.allclose(rloo, 3 / 2 * dr_grpo_advantages(rollouts_of(rewards)))


def test_gdpo_normalises_each_part_in_its_group_and_their_weighted_sum_over_the_batch():
    # Two unequal values are normalised to +h and -h, independent of their distance.
    h = 0.5 ** 0.5
    scores = [Score(0, rank, format1, format2, 0) for rank, format1, format2 in
              ((0.9, 1, 0), (0.8, 1, 1),  # rank +h -h, format2 -h +h
               (0.3, 1, 1), (0.3, 0, 1))]  # format1 +h -h
    total = torch.tensor([[0.7 * h, -0.7 * h], [0.1 * h, -0.1 * h]])
    advantages = gdpo_advantages(rollouts_of([[0.0, 0], [0, 0]], scores))
    assert torch.allclose(advantages, (total - total.mean()) / total.std())


# --- losses


@pytest.mark.parametrize("name, expected", [
    ("GRPO", -(1 - 2 + 0.5 + 0) / 4),
    ("Dr. GRPO", -(2 * 1 - 3 * 2 + 1 * 0.5) / (LIMIT * 4)),  # divides by a constant, not by each length
    ("DAPO", -(2 * 1 + 1 * 0.5) / (2 + 1 + 1)),  # the answer of LIMIT tokens is left out
    ("GSPO", -(1 - 2 + 0.5 + 0) / 4)])
def test_a_loss_where_the_ratio_is_one(name, expected):
    assert call(LOSSES[name], *ratios(*ONES)).item() == pytest.approx(expected)


@pytest.mark.parametrize("name, expected", [
    # Clip 0.2, 0.28. A > 0: at most 1.28. A < 0: at least 0.8.
    ("Dr. GRPO", -((1.28 + 0.5) * 1 + 3 * 0.8 * -2 + 1.25 * 0.5) / (LIMIT * 4)),
    ("DAPO", -((1.28 + 0.5) * 1 + 1.25 * 0.5) / 4),
    # The first answer's two ratios, 2 and 0.5, have the geometric mean 1.
    ("GSPO", -(1 * 1 + 0.8 * -2 + 1.25 * 0.5) / 4)])
def test_a_loss_where_the_ratio_is_clipped(name, expected):
    assert call(LOSSES[name], *ratios(*MOVED), (0.2, 0.28)).item() == pytest.approx(expected)


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_add_up_to_the_whole_batch_and_padding_gets_no_gradient(name):
    beta, ref = 0.1, torch.full((4, 3), -0.3)
    whole, old = ratios(*MOVED)
    call(LOSSES[name], whole, old, beta=beta, ref=ref).backward()
    parts, _ = ratios(*MOVED)
    for rows in (slice(0, 1), slice(1, 4)):
        call(LOSSES[name], parts, old, rows=rows, beta=beta, ref=ref).backward()
    assert torch.allclose(parts.grad, whole.grad, atol=1e-7) and whole.grad.any()
    assert not whole.grad[torch.arange(3) >= LENGTHS[:, None]].any()


@pytest.mark.parametrize("name", ("Dr. GRPO", "DAPO", "GSPO"))
def test_the_kl_penalty_is_weighted_as_the_objective_is(name):
    k3 = torch.expm1(torch.tensor(-0.3)) + 0.3  # KL estimate per token
    tokens = {"Dr. GRPO": 7 / (3 * 4), "DAPO": 4 / 4, "GSPO": 1}[name]
    logps, old = ratios(*ONES)
    ref = torch.full((4, 3), -0.3)
    penalty = call(LOSSES[name], logps, old, beta=0.1, ref=ref) - call(LOSSES[name], logps, old)
    assert penalty.item() == pytest.approx(0.1 * k3.item() * tokens, rel=1e-4)


@pytest.mark.parametrize("loss, clip", [(grpo_loss, (0.2, 0.28)), (gspo_loss, (0.2, 0.2))],
                         ids=("clip-higher", "GSPO"))
def test_at_one_update_clip_higher_and_gspo_have_grpos_gradient_and_later_another(loss, clip):
    for values, equal in ((ONES, True), (MOVED, False)):
        ours, old = ratios(*values)
        theirs, _ = ratios(*values)
        call(loss, ours, old, clip).backward()
        call(grpo_loss, theirs, old).backward()
        assert torch.allclose(ours.grad, theirs.grad) == equal


def test_watching_a_loss_changes_nothing_and_counts_the_tokens_that_the_clip_stops():
    logps, old = ratios(*MOVED)
    watched = Watched(grpo_loss)
    assert call(watched, logps, old) == call(grpo_loss, logps, old)
    # Answers with an advantage have 6 tokens. The clip stops ratio 2 (A > 0), three of 0.5 (A < 0), and 1.25.
    assert (watched.tokens, watched.stopped) == (6, 5)


# --- the comparison


def test_a_difference_is_seen_only_if_its_interval_and_all_seeds_agree():
    one = {"ndcg": [0.5] * 9, "stopped": 0.1, "seconds": 2}
    results = {name: [one] * 2 for name in successors.arms(LIMIT)}
    results["warm start"] = [{"ndcg": [0.4] * 9}] * 2
    results["DAPO"] = [dict(one, ndcg=[x] * 9) for x in (0.3, 0.8)]  # the seeds disagree
    results["GDPO"] = [dict(one, ndcg=[x] * 9) for x in (0.3, 0.4)]
    results["Dr. GRPO"] = [dict(one, ndcg=[0.9] + [0.5] * 8)] * 2  # only one of nine queries gained
    rows = {row["method"]: row for row in successors.table(results, LIMIT)}
    assert rows["GRPO"]["gain"] == pytest.approx(0.1) and rows["GRPO"]["verdict"] == "higher"
    assert rows["DAPO"]["low"] > 0 and rows["DAPO"]["verdict"] == "no difference seen"
    assert rows["Dr. GRPO"]["difference"] > 0 and rows["Dr. GRPO"]["verdict"] == "no difference seen"
    assert rows["GDPO"]["difference"] == pytest.approx(-0.15) and rows["GDPO"]["verdict"] == "lower"
    assert rows["GSPO, 4 updates"]["versus"] == "GRPO, 4 updates"


@pytest.mark.slow
def test_the_command_trains_all_arms_and_writes_what_the_notebook_reads(monkeypatch, tmp_path, capsys):
    small = {"prompts_per_step": 2, "group_size": 4, "max_new_tokens": 8, "reward": "random"}
    monkeypatch.setattr(successors, "TOY", successors.TOY | small)
    options = "--seeds 0 --steps 1 --sft-steps 1 --eval-queries 8 --json --results"
    assert successors.main([*options.split(), str(tmp_path)]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    written = []
    for name in ("successors_checks.csv", "successors.csv"):
        with open(tmp_path / name, encoding="utf-8") as file:
            written += list(csv.DictReader(file))
    assert [list(row) for row in written] == [list(row) for row in printed]
    assert [row["method"] for row in printed[7:]] == list(successors.arms(8))
    first = {row["check"]: row["value"] for row in printed[:4]}
    assert first["gradient of clip-higher and of GRPO, first update"] == 0
    assert first["gradient of GSPO and of GRPO, first update"] < 1e-5
    assert first["RLOO's advantage and G/(G-1) times Dr. GRPO's"] < 1e-5
    assert all(row["value"] > 1e-5 for row in printed[4:7] if "clip-higher" not in row["check"])
