"""Properties of the code on a GPU, checked without one.

CUDA operations run on tensors that have a shape and a device but no memory. The sampler's reads are
counted for answers of the paper's size.
"""

import ctypes
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Qwen2Config

import model as model_module
from model import DecodeBatch, pick_tokens, read_tokens, sample

QWEN_7B = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 4, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064}  # four of the 28 equal layers
WAITING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class Operations(TorchDispatchMode):
    """Records every operation and its operands in `seen`."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        self.seen.append((func, operands))
        return func(*args, **(kwargs or {}))


def lend_cuda_a_guard() -> None:
    """Let a CPU build of torch use fake tensors on CUDA: register the meta device's guard for CUDA.

    A CPU build has no device guard for CUDA. The meta device's guard does nothing, and that is enough for
    fake tensors. Skips the test if the build hides its guards.
    """
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        guards = (ctypes.c_void_p * 22).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    except (OSError, ValueError):
        pytest.skip("this build of torch hides its device guards")
    cuda, meta = 1, 14  # c10/core/DeviceType.h
    if not guards[cuda]:
        guards[cuda] = guards[meta]


def fake_cuda_model(**sizes) -> torch.nn.Module:
    """A bfloat16 Qwen2 on CUDA whose parameters are fake tensors: they need no GPU.

    Call it outside FakeTensorMode.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen2Config(**sizes), dtype=torch.bfloat16).eval()
    with FakeTensorMode():
        for module in model.modules():
            for name, x in [*module._parameters.items()]:
                module._parameters[name] = x if x is None else torch.nn.Parameter(
                    torch.empty(x.shape, dtype=x.dtype, device="cuda"))
            for name, x in [*module._buffers.items()]:
                module._buffers[name] = torch.empty(x.shape, dtype=x.dtype, device="cuda")
    return model


@pytest.fixture(scope="module")
def decoding_step() -> list:
    """The operations of one decoding step of four layers of a 7B: two batches, prompts of unequal length."""
    lend_cuda_a_guard()
    model = fake_cuda_model(**QWEN_7B)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        batches = [DecodeBatch(model, [[1] * n for n in lengths], 4, range(4 * len(lengths)))
                   for lengths in ((2203, 2101), (2117,))]
        for batch in batches:
            drawn = torch.rand(len(batch.prompt_index), device="cuda")
            batch.tokens, _ = pick_tokens(batch.logits, 1.0, drawn)
        with Operations() as operations:
            read_tokens(model, batches)
            for batch in batches:
                pick_tokens(batch.logits, 1.0, torch.rand(len(batch.prompt_index), device="cuda"))
    return operations.seen


def test_a_decoding_step_on_cuda_never_waits_and_asks_nothing_of_the_cpu(decoding_step):
    assert len(decoding_step) > 4 * 100
    for function, operands in decoding_step:
        assert function not in WAITING
        assert all(x.is_cuda for x in operands), function


def test_every_bfloat16_product_of_a_decoding_step_has_aligned_operands(decoding_step):
    """Strides must be multiples of 8, because a GPU's fast kernels load 16 bytes at a time."""
    products = [operands for function, operands in decoding_step
                if str(function).split(".")[1] in ("mm", "addmm", "bmm")]
    assert len(products) > 4 * 7
    for operands in products:
        for x in operands:
            if x.dtype == torch.bfloat16 and x.dim() > 1:
                strides = [s for s, size in zip(x.stride(), x.shape) if size > 1 and s != 1]
                assert not any(s % 8 for s in strides), (x.shape, x.stride())


@pytest.mark.slow
def test_sampling_4096_answers_reads_little_more_than_the_rows_alive_need(monkeypatch):
    """`sample` without a model: 128 prompts x 32 answers with the paper's lengths (log-normal, mean 850).

    Every tenth step counts the places of keys and values that are read, and the scores that are computed.
    """
    rng, variance, counts, written = np.random.default_rng(0), np.log(1.25), Counter(), Counter()
    lengths = rng.lognormal(np.log(850) - variance / 2, variance ** 0.5, 4096).clip(1, 2048).astype(int)
    lengths[rng.random(4096) < 0.01] = 2048
    prompts = [[0] * int(n) for n in rng.normal(2100, 150, 128)]

    def encode(model, prompts):
        sizes = [len(p) for p in prompts]
        keys = [torch.zeros(len(sizes), 1, max(sizes), 1)]
        return model_module.EncodedPrompts(keys, keys, sizes, torch.zeros(len(sizes), 1))

    def pick(logits, temperature, answers):
        written.update(answers.tolist())
        tokens = torch.tensor([int(written[a] >= lengths[a]) for a in answers.tolist()])
        return tokens, torch.zeros(len(tokens))

    def count(model, batches):
        counts["steps"] += 1
        for c in batches if counts["steps"] % 10 == 0 else ():
            alive = [c.prompt_index[r] for r, a in enumerate(c.answers) if written[a] < lengths[a]]
            (S, _, P, _), sizes = c.keys[0].shape, c.prompt_lengths
            counts["read"] += len(c.answers) * c.cache_length + S * P
            counts["needed"] += len(alive) * (c.length + 1) + sum(sizes[p] for p in set(alive))
            counts["scores"] += c.slots.numel() * P
            counts["scores needed"] += sum(sizes[p] for p in alive)
        read_tokens(model, batches)

    for name, stand_in in (("encode_prompts", encode), ("pick_tokens", pick), ("read_tokens", count),
                           ("forward", lambda model, ids, *rest: torch.zeros(len(ids), 1, 1))):
        monkeypatch.setattr(model_module, name, stand_in)
    # At temperature 0, `sample` draws one number per answer. Here it is the answer's index.
    monkeypatch.setattr(torch, "rand", lambda total, *shape, generator: torch.arange(total)[:, None])
    nothing = types.SimpleNamespace(device=torch.device("cpu"), dtype=torch.bfloat16,
                                    lm_head=lambda hidden: torch.zeros(len(hidden), 1))
    answers = sample(nothing, prompts, 32, 2048, 0.0, stop_ids=[1], max_num_seqs=512)
    assert [len(a.ids) for group in answers for a in group] == lengths.tolist()
    assert counts["read"] < 1.15 * counts["needed"] and counts["scores"] < 1.5 * counts["scores needed"]
