"""What the tests share: a tiny random Qwen2 and word-level prompts, in memory. No network, no weights."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the import of transformers: no test may ask the hub

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import toy as toy_task
from model import Agent

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(2)


def tiny_model(seed: int = 0, kind: str = "qwen2", **changes) -> torch.nn.Module:
    """Grouped-query attention (4 heads over 2); pad and end token are the same id, as in many models."""
    torch.manual_seed(seed)
    small = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
             "initializer_range": 0.15, "eos_token_id": 3, "pad_token_id": 3, "bos_token_id": None}
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**small | changes)).eval()


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def toy() -> Agent:
    """The toy run's own model and tokenizer, untrained."""
    return toy_task.toy_agent(seed=0)


def random_prompts(*lengths: int, seed: int = 0, vocab: int = 97) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in lengths]


def full_logps(model, prompt: list[int], answer: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities of an answer's tokens by one plain forward pass of transformers, prompt included."""
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1:-1].float() / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


def relative_error(got, wanted) -> float:
    """The largest over all tensors; both lists must be of one length."""
    return max(float((a.float() - b).norm() / b.norm().clamp(min=1e-12))
               for a, b in zip(got, wanted, strict=True))
