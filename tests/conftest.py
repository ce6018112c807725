"""What the tests share: a tiny random Qwen2 and word-level prompts, made in memory. No network, no weights."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test may look up a hub name

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

import grpo
from rearank import Agent

torch.set_num_threads(2)


def tiny_model(seed: int = 0, vocab: int = 97, layers: int = 2, end: int = 3, **changes) -> torch.nn.Module:
    """A Qwen2 with grouped-query attention (4 heads, 2 key-value heads); pad and end token are the same id, as in many models."""
    torch.manual_seed(seed)
    config = Qwen2Config(vocab_size=vocab, hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.15, eos_token_id=end, pad_token_id=end,
                         bos_token_id=None, **changes)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def toy() -> Agent:
    """The toy run's own model and tokenizer, untrained."""
    return grpo.toy_agent(seed=0)


def random_prompts(*lengths: int, seed: int = 0, vocab: int = 97) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in lengths]


def full_logps(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Log-probabilities of an answer's tokens by one plain forward pass of transformers over prompt and answer."""
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1:-1]
    return logits.float().log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
