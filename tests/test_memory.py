"""support/memory.py: the planned memory of an update against the counted bytes of its tensors.

Real shapes run on tensors that have shapes but no memory. The toy runs on real tensors.
tests/test_real_model.py compares a real model's plan with the memory of its process.
"""

import re
import weakref
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Qwen2Config

import grpo
import model as model_module
from grpo import TrainSettings
from model import microbatches
from support import memory
from support.cli import InputError
from support.memory import count_parameters, memory_rows, plan
from support.optimizer import MasterAdamW

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {  # Qwen2.5: hidden, MLP, layers, heads, key-value heads, vocabulary, tied
    "0.5B": (896, 4864, 24, 14, 2, 151936, True), "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False)}


class Peak(TorchDispatchMode):
    """Counts the bytes of live tensor storages (`live`) and their maximum (`peak`)."""

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
    """Keeps the tensors that a GPU's fused RMSNorm kernel keeps for its backward pass: input and weight.

    A CPU build computes RMSNorm in several operations and keeps the result of each.
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


@pytest.mark.slow
@pytest.mark.parametrize("shape, checkpointing", [("0.5B", True), ("7B", False)])
def test_the_plan_of_an_update_is_within_15_percent_of_its_counted_peak(monkeypatch, shape, checkpointing):
    hidden, inner, layers, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    config = Qwen2Config(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=tied)
    monkeypatch.setattr(model_module, "rms_norm", lambda module, x: FusedRMSNorm.apply(x, module.weight))
    P, T, G = 2200, 512, 16  # two micro-batches: the first's gradients exist during the second
    settings = TrainSettings(beta=0.0, offload=True, checkpointing=checkpointing, group_size=G,
                             max_num_seqs=G, microbatch_tokens=8 * T, prompt_batch_tokens=P,
                             max_prompt_tokens=P, max_new_tokens=T)
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        optimizer = MasterAdamW.__new__(MasterAdamW)  # only its gradient sums: the rest is in host memory
        optimizer.grad_sums = {}
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(optimizer._accumulate)
        with Peak() as peak:
            for batch in microbatches(model, [[1] * P], [[1] * T] * G, microbatch_tokens=8 * T,
                                      prompt_batch_tokens=P, checkpointing=checkpointing):
                batch.logps.sum().backward()
    table = memory_rows(config, count_parameters(config), settings, 2)
    planned = sum(update for _, update, _ in table.values())
    assert planned == pytest.approx(peak.peak, rel=0.15)


def cpu_corrections(config, settings, layers):
    """Bytes that a CPU needs beyond the plan, which is made for a GPU.

    A CPU also keeps each rms_norm's input and output, in the layers that are not recomputed. Its chunks of
    logits are smaller.
    """
    tokens = settings.prompt_batch_tokens + settings.microbatch_tokens
    logits = 10 * (min(2**27, settings.microbatch_tokens * config.vocab_size) - 2**23)
    return 2 * config.hidden_size * 4 * tokens * layers - max(0, logits)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_plan_is_within_15_percent_of_what_the_toys_update_holds(toy, checkpointing):
    """Tensor storages are counted. A small model's process peak would depend on the C library's allocator."""
    P, T, G = 110, 64, 64
    settings = TrainSettings(beta=0.0, checkpointing=checkpointing, group_size=G, max_num_seqs=G,
                             microbatch_tokens=2048, prompt_batch_tokens=P, max_prompt_tokens=P,
                             max_new_tokens=T)
    config = toy.model.config
    for _ in range(2):  # the first pass leaves gradients, as a micro-batch does
        with Peak() as peak:
            for batch in microbatches(toy.model, [[1] * P], [[1] * T] * G, microbatch_tokens=2048,
                                      prompt_batch_tokens=P, checkpointing=checkpointing):
                batch.logps.sum().backward()
    table = memory_rows(config, count_parameters(config), settings, 4)
    planned = sum(update for what, (_, update, _) in table.items() if what != "masters and moments")
    planned += cpu_corrections(config, settings, 1 if checkpointing else config.num_hidden_layers)
    assert planned == pytest.approx(peak.peak, rel=0.15)


# --- the options that the plan chooses

SEVEN_B = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064,
           "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False}


@pytest.fixture(scope="module")
def seven_b(tmp_path_factory) -> str:
    """A folder that holds only the config.json of a 7B model."""
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
    assert 80 < host < 120  # must fit in 128 GiB
    assert "weights                      14.2     14.2" in small and "a save writes 99.3" in small


@pytest.mark.parametrize("gib", ["24", "48"])
def test_a_7b_fits_a_small_card_with_lora(capsys, seven_b, gib):
    out = planned(capsys, seven_b, "--memory", gib, "--lora-rank", "16")
    assert float(out.split("together")[1].split()[0]) < 0.95 * float(gib) and "--no-offload" in out
    assert "gradients in float32          0.0      0.2" in out  # of 40 million LoRA weights
    assert "weights                      14.3     14.3" in out  # including the LoRA weights


def test_the_plan_of_eight_cards_splits_what_the_optimizer_holds(capsys, seven_b):
    out = planned(capsys, seven_b, "--memory", "79", "--gpus", "8", "--beta", "0")
    assert "masters and moments          10.6     10.6" in out
    assert "gradients in float32          0.0     28.4" in out
    assert "79 GiB on each of 8 cards are free" in out and "--no-offload" in out
    assert TrainSettings().gpus == 0  # 0: as many as torchrun has started


def test_flags_set_by_hand_are_obeyed_and_what_cannot_fit_is_refused_with_what_would(capsys, seven_b):
    by_hand = planned(capsys, seven_b, "--memory", "141", "--offload", "--checkpointing", "--max-num-seqs",
                      "48")
    assert "--offload --checkpointing" in by_hand and "--max-num-seqs 48" in by_hand
    with pytest.raises(InputError, match="training needs at least .* GiB on the card .* --beta 0"):
        grpo.main(["--model", seven_b, "--plan", "--memory", "40"])
    with pytest.raises(InputError, match="training needs"):
        grpo.main(["--model", seven_b, "--plan", "--memory", "79", "--no-offload"])


def test_the_reference_counts_where_it_is_needed_and_the_precision_is_the_one_asked_for(capsys, seven_b):
    for more, gib in {("--beta", "0"): "0.0", ("--beta", "0", "--log-kl"): "14.2", (): "14.2"}.items():
        assert f"reference model{gib:>18}{gib:>9}" in planned(capsys, seven_b, "--memory", "141", *more)
    out = planned(capsys, seven_b, "--memory", "400", "--dtype", "float32", "--beta", "0")
    assert "weights                      28.4     28.4" in out


def test_what_is_moved_to_the_host_must_fit_there(seven_b, monkeypatch):
    config, card = Qwen2Config.from_pretrained(seven_b), torch.device("cuda")
    host = {"GiB": 128}
    monkeypatch.setattr(memory, "free_memory",
                        lambda device: memory.GiB * (79 if device.type == "cuda" else host["GiB"]))
    chosen, text = plan(config, TrainSettings(), card)
    assert chosen.offload is True and "79 GiB and 128 in the host are free" in text
    host["GiB"] = 60
    with pytest.raises(InputError, match="79 GiB and 60 in the host are free"):
        plan(config, TrainSettings(), card)


def test_a_cpu_has_no_second_memory_to_move_anything_to(toy):
    settings = TrainSettings(offload=True, max_new_tokens=8, max_prompt_tokens=504)
    assert plan(toy.model.config, settings, torch.device("cpu"))[0].offload is False


def test_processes_on_a_cpu_share_its_memory(toy, monkeypatch):
    """Each GPU has its own memory, but all processes on a CPU share the machine's memory."""
    config = toy.model.config
    settings = TrainSettings(max_new_tokens=8, max_num_seqs=32, microbatch_tokens=64, prompt_batch_tokens=512,
                             max_prompt_tokens=504, checkpointing=False)
    table = memory_rows(config, count_parameters(config), settings, 4)
    one = max(sum(row[0] for row in table.values()), sum(row[1] for row in table.values()))
    monkeypatch.setattr(memory, "free_memory", lambda device: 1.5 * one / 0.95)
    plan(config, settings, torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InputError, match="memory for 2 processes"):
        plan(config, settings, torch.device("cpu"))
