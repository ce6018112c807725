"""AdamW over float32 master weights, in one process. (Several ranks: tests/test_distributed.py.)"""

import copy

import pytest
import torch
from conftest import random_prompts

from support.optimizer import MasterAdamW


def test_bfloat16_weights_move_by_updates_smaller_than_their_spacing():
    weight = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    optimizer = MasterAdamW([weight])
    # AdamW moves each weight by lr per step: 600 times 1e-5 is 0.006. bfloat16's spacing below 1 is 0.004.
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
    assert weight.grad is None and optimizer.grad_sums[weight].item() == 306


def test_a_second_optimizer_can_take_over_the_model():
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    MasterAdamW([weight]).remove_hooks()
    second = MasterAdamW([weight])
    (weight * 2).sum().backward()
    assert second.grad_sums[weight].item() == 2 and second.step(1e-3, 1e9) == 2


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.95)])
def test_float32_training_is_torchs_adamw_with_the_gradient_clipped(model, betas):
    other = copy.deepcopy(model)
    ours = MasterAdamW(list(model.parameters()), weight_decay=0.1, betas=betas)
    theirs = torch.optim.AdamW(other.parameters(), lr=1e-3, weight_decay=0.1, betas=betas)
    for step in range(3):
        for m in (model, other):
            m(torch.tensor(random_prompts(9))).logits.square().mean().mul(10**step).backward()
        norm = torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        assert ours.step(1e-3, 0.5) == pytest.approx(float(norm), rel=1e-5)  # the norm before clipping
        theirs.step()
        theirs.zero_grad()
    for a, b in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_bfloat16_masters_survive_a_resume():
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    first = MasterAdamW([weight])
    weight.float().sum().backward()
    first.step(1e-4, 1.0)
    second = MasterAdamW([torch.nn.Parameter(weight.detach().clone())])
    second.load_state(first.state().items())
    torch.testing.assert_close(second.masters[0], first.masters[0], rtol=0, atol=0)
