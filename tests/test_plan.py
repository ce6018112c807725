"""The plan of memory against counting: updates of real shapes, run on tensors that have shapes but no memory,
and the toy's, run for real. (tests/test_real_model.py: a real model's, as the system counts it.)"""

import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Qwen2Config

import model as model_module
from support.optimizer import MasterAdamW
from grpo import TrainSettings
from support.memory import memory_rows
from model import microbatches
from support.memory import count_parameters

SHAPES = {  # hidden, MLP, layers, heads, key-value heads, vocabulary, tied: Qwen2.5's
    "0.5B": (896, 4864, 24, 14, 2, 151936, True), "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False)}


class Peak(TorchDispatchMode):
    """Bytes of live storages, and the most there ever were."""

    def __init__(self):
        super().__init__()
        self.seen, self.live, self.peak = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.seen:
                storage = x.untyped_storage()
                self.seen.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        return out

    def gone(self, key, size):
        self.seen.discard(key)
        self.live -= size


class FusedRMSNorm(torch.autograd.Function):
    """What a card's kernel keeps; a CPU build computes it in pieces, each of which it keeps."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


@pytest.mark.parametrize("shape, checkpointing", [("0.5B", True), ("7B", False)])
def test_the_plan_of_an_update_is_within_15_percent_of_its_counted_peak(monkeypatch, shape, checkpointing):
    hidden, inner, layers, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    config = Qwen2Config(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=tied)
    monkeypatch.setattr(model_module, "rms_norm", lambda module, x: FusedRMSNorm.apply(x, module.weight))
    P, T, G = 2200, 512, 16  # two micro-batches: the second finds the gradients of the first
    settings = TrainSettings(beta=0.0, offload=True, checkpointing=checkpointing, group_size=G, max_num_seqs=G,
                        microbatch_tokens=8 * T, prompt_batch_tokens=P, max_prompt_tokens=P, max_new_tokens=T)
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        optimizer = MasterAdamW.__new__(MasterAdamW)  # its sums of gradients alone: the rest is in the host
        optimizer.grad_sums = {}
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(optimizer._accumulate)
        with Peak() as peak:
            for batch in microbatches(model, [[1] * P], [[1] * T] * G, microbatch_tokens=8 * T, prompt_batch_tokens=P,
                                      checkpointing=checkpointing):
                batch.logps.sum().backward()
    table = memory_rows(config, parameters(config), settings, 2)
    planned = sum(update for _, update, _ in table.values())
    assert planned == pytest.approx(peak.peak, rel=0.15)


def cpu_corrections(config, settings, layers):
    """What a CPU needs beside the plan, which is a card's: it keeps each rms_norm's input and output, of the
    layers that are not computed again, and its chunks of logits are smaller."""
    tokens = settings.prompt_tokens + settings.microbatch_tokens
    logits = 10 * (min(2**27, settings.microbatch_tokens * config.vocab_size) - 2**23)
    return 2 * config.hidden_size * 4 * tokens * layers - max(0, logits)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_plan_is_within_15_percent_of_what_the_toys_update_holds(toy, checkpointing):
    """Counted by storages: of so small a model the process's peak says more about the C library's slack."""
    P, T, G = 110, 64, 64
    settings = TrainSettings(beta=0.0, checkpointing=checkpointing, group_size=G, max_num_seqs=G, microbatch_tokens=2048,
                        prompt_batch_tokens=P, max_prompt_tokens=P, max_new_tokens=T)
    config = toy.model.config
    for _ in range(2):  # the first leaves gradients, as an earlier micro-batch does
        with Peak() as peak:
            for batch in microbatches(toy.model, [[1] * P], [[1] * T] * G, microbatch_tokens=2048,
                                      prompt_batch_tokens=P, checkpointing=checkpointing):
                batch.logps.sum().backward()
    table = memory_rows(config, parameters(config), settings, 4)
    planned = sum(update for what, (_, update, _) in table.items() if what != "masters and moments")
    planned += cpu_corrections(config, settings, 1 if checkpointing else config.num_hidden_layers)
    assert planned == pytest.approx(peak.peak, rel=0.15)
