"""Which architectures are accepted. For these, model.py's forward pass equals that of transformers."""

import pytest
import torch
from conftest import random_prompts, tiny_model
from test_model import plain_sample

import model as model_module
from model import Agent, check_architecture, sample
from support.cli import InputError


LINEAR = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}}
LLAMA3 = {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                              "high_freq_factor": 4.0, "original_max_position_embeddings": 256,
                              "rope_theta": 5e5}}


@pytest.mark.parametrize("changes", [
    {"kind": "qwen2"}, {"kind": "qwen3", "head_dim": 32}, {"kind": "llama"}, {"kind": "llama", **LINEAR},
    {"kind": "llama", **LLAMA3}, {"kind": "mistral", "sliding_window": None}])
def test_the_forward_pass_written_out_is_that_of_the_model(changes):
    model, (prompt,) = tiny_model(**changes), random_prompts(21)
    check_architecture(model.config)
    with torch.no_grad():
        # A random model has norms of 1 and biases of 0. Change them, so that errors in their use show.
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn(p.shape) * 0.1)
    uniforms = torch.rand(1, 15, generator=torch.Generator().manual_seed(0))
    wanted = plain_sample(model, prompt, uniforms[0], 1.0, [])
    assert sample(model, [prompt], 1, 15, 1.0, [], seed=0)[0][0].ids == wanted


@pytest.mark.parametrize("changes", [{"kind": "gemma", "head_dim": 16}, {"kind": "olmo2"}, {"kind": "phi3"},
                                     {"kind": "granite", "logits_scaling": 8.0}, {"kind": "smollm3"}])
def test_a_model_whose_forward_pass_is_another_is_refused_and_not_wrong(changes):
    with pytest.raises(InputError, match="only Qwen2, Qwen3, Llama and Mistral"):
        Agent(tiny_model(**changes), None, [])


def test_a_setting_that_changes_the_forward_pass_is_noticed_whatever_the_weights(model, monkeypatch):
    """The check does not read the weights, so their precision and their size make no difference."""
    check_architecture(model.to(torch.bfloat16).config)
    rotate = model_module.rotate
    monkeypatch.setattr(model_module, "rotate", lambda x, cos, sin: rotate(x, cos * 1.1, sin))
    with pytest.raises(InputError, match="changes the forward pass"):
        check_architecture(model.config)


def test_the_check_of_the_architecture_draws_no_random_numbers_of_ours(model):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    check_architecture(model.config)
    assert torch.equal(torch.rand(3), wanted)


def test_position_embeddings_that_change_with_the_length_are_refused():
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 256}
    for kind, more in (("dynamic", {}), ("longrope", factors)):
        rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4} | more
        with pytest.raises(InputError, match=f"{kind} position embeddings"):
            Agent(tiny_model(rope_parameters=rope), None, [])


def test_a_model_with_sliding_attention_is_refused():
    with pytest.raises(InputError, match="full attention"):
        Agent(tiny_model(use_sliding_window=True, sliding_window=16, max_window_layers=1), None, [])
