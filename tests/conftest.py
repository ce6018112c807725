"""What the tests share: a tiny random Qwen2 and word-level prompts, in memory. No network, no weights."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the import of transformers: no test may ask the hub

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import grpo
import toy as toy_task
from model import Agent
from support.files import Instance, write_candidates, write_instances, write_qrels

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(2)


def tiny_model(seed: int = 0, kind: str = "qwen2", **changes) -> torch.nn.Module:
    """Grouped-query attention (4 heads over 2); pad and end token are the same id, as in many models."""
    torch.manual_seed(seed)
    small = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
             "initializer_range": 0.15, "eos_token_id": 3, "pad_token_id": 3, "bos_token_id": None}
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**small | changes)).eval()


def toy_settings(**changes) -> grpo.TrainSettings:
    """The settings of the toy run, with these changes."""
    return grpo.TrainSettings(**toy_task.TOY | changes)


def quick(tmp_path: Path, **changes) -> grpo.TrainSettings:
    """Two steps of one prompt and eight short answers, each saved, in the run folder tmp_path / "run"."""
    few = {"prompts_per_step": 1, "group_size": 8, "steps": 2, "max_new_tokens": 12, "beta": 0.0,
           "save_every": 1, "out": str(tmp_path / "run")}
    return toy_settings(**few | changes)


def one_window() -> list[Instance]:
    texts = ["oak leaf forest oak", "storm flour loan leaf"]
    return [Instance("q", "rain bread coin", ["a", "b"], texts, [0, 3], [0, 3])]


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def toy() -> Agent:
    """The toy run's own model and tokenizer, untrained."""
    return toy_task.toy_agent(seed=0)


@pytest.fixture
def folder(toy, tmp_path) -> Path:
    """A model folder (the toy's, standing for a real one), candidates, judgements and instances."""
    toy.model.save_pretrained(tmp_path / "m")
    toy.tokenizer.save_pretrained(tmp_path / "m")
    candidates, qrels = toy_task.toy_task(3, 12, seed=1)
    write_candidates(tmp_path / "c.jsonl", candidates)
    write_qrels(tmp_path / "q.txt", qrels)
    write_instances(tmp_path / "i.jsonl", one_window())
    return tmp_path


def arguments(folder: Path, *more: str) -> list[str]:
    """What a short run of `python grpo.py --model` is called with; the files are the fixture's."""
    return ["--model", str(folder / "m"), "--out", str(folder / "o"), "--prompt", "toy", "--window", "5",
            "--group-size", "2", "--prompts-per-step", "2", "--steps", "1", "--max-new-tokens", "5",
            "--device", "cpu", *more]


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
