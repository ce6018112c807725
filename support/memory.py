"""What a run takes in memory, and which options make it fit."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os

import torch
from transformers import AutoModelForCausalLM

from support import distributed
from support.cli import InputError
from support.device import free_memory
from support.lora import add_lora

GiB = 2**30


def count_parameters(config, lora_rank: int = 0) -> int:
    """The number of trained weights, all or LoRA's, of a model of this configuration, without making them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        if lora_rank:
            add_lora(model, lora_rank)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def memory_rows(c, N: int, s, size: int, lora: int = 0) -> dict[str, tuple[float, float, float]]:
    """{what: bytes (on a card while sampling, in the update; in the host)} for a model of configuration `c`.

    N weights of `size` bytes; `lora` more in float32, which then alone are trained. `s`: grpo.py's settings.
    Prompts and answers are taken at their greatest length. Each of several cards has all gradients until the
    step, and a slice of masters and moments, which rank 0 gathers to save them. (A CPU keeps more: it does
    not fuse rms_norm.)
    """
    cards, P, T, trained = max(1, s.gpus), s.max_prompt_tokens, s.max_new_tokens, lora or N
    rows = min(s.max_num_seqs, -(-s.prompts_per_step // cards) * s.group_size)
    H, K, layers, hidden = c.num_attention_heads, c.num_key_value_heads, c.num_hidden_layers, c.hidden_size
    D = getattr(c, "head_dim", None) or hidden // H
    prompt_tokens, answer_tokens = max(P, s.prompt_batch_tokens), max(T, s.microbatch_tokens)
    cache = 2 * layers * K * D * size  # a token's keys and values
    layer = size * (4 * hidden + 3 * H * D + 2 * K * D + 4 * c.intermediate_size)  # kept per token
    kept = (prompt_tokens + answer_tokens) * layers * (size * hidden if s.checkpointing else layer)
    again = layer * answer_tokens if s.checkpointing else 0  # one layer's, computed again
    weights, reference = N * size + 4 * lora, (4 * lora or N * size) * bool(s.beta or s.log_kl)
    copies = s.offload or cards > 1 or size < 4 and not lora  # else weights are their own masters
    state, offload = trained * (12 if copies else 8) / cards, bool(s.offload)
    written = (rows * T + -(-rows // s.group_size) * P) * cache
    scores = (10 if size < 4 else 8) * H * answer_tokens * max(P, T)
    # The gradient of the logits is summed into the LM head's: for a moment three tensors of its size exist.
    logits = 10 * min(2**27, answer_tokens * c.vocab_size) + 3 * c.vocab_size * hidden * size * (not lora)
    return {
        "weights": (weights, weights, 0),
        "reference model": (reference, reference, 0),
        "gradients in float32": (0, 4 * trained, 0),
        "masters and moments": (state * (not offload), state * (not offload),
                                cards * state * offload + 12 * trained * (cards > 1)),
        "keys and values": (written, 2 * prompt_tokens * cache, 0),
        "activations": (0, kept + again, 0),
        "scores or logits": (max(8 * rows * H * P, 12 * rows * c.vocab_size), max(scores, logits), 0)}


def plan(config, settings, device: torch.device) -> tuple[object, str]:
    """(settings with the open ones chosen so that training fits, the plan as text).

    Options that are None or 0 are open; those set by hand stay. The faster choice comes before the leaner.
    The memory is what is free, or --memory GiB of another machine's card. InputError where nothing fits.
    """
    card, host = free_memory(device), free_memory(torch.device("cpu"))
    half = settings.dtype == "bfloat16" or settings.dtype == "auto" and device.type != "cpu"
    if settings.memory:  # of another machine, whose host we do not know
        card, host, half = settings.memory * GiB, math.inf, settings.dtype != "float32"
    # A CPU has one memory for everything, as a Mac has. The ranks on this machine share it.
    shared = device.type != "cuda" and not settings.memory
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if shared else 1
    card, host = map(min, zip(*distributed.gather([(card, host)])))  # the least of all ranks
    ways = {"offload": (False, True), "checkpointing": (False, True), "microbatch_tokens": (8192, 4096, 2048),
            "max_num_seqs": (512, 256, 128, 64, 32)}
    for name in ways:
        value = getattr(settings, name)
        if value or value is False:  # 0 and None are open, False is not
            ways[name] = (value,)
    if shared:
        ways["offload"] = (False,)  # there is no second memory to move anything to
    N, size = count_parameters(config), 2 if half else 4
    lora = count_parameters(config, settings.lora_rank) if settings.lora_rank else 0
    for values in itertools.product(*ways.values()):
        chosen = dataclasses.replace(settings, **dict(zip(ways, values)))
        table = memory_rows(config, N, chosen, size, lora)
        sampling, update, in_host = (sum(column) for column in zip(*table.values()))
        needed = local * max(sampling, update) + in_host * shared  # of the memory that the weights are in
        fits = needed <= 0.95 * card and (shared or in_host <= host)  # the rest is the allocator's
        if fits:
            break
    lines = [f"{'GiB':24} sampling   update     host"]
    for name, row in (table | {"together": (sampling, update, in_host)}).items():
        lines.append(f"{name:24}" + "".join(f"{x / GiB:9.1f}" for x in row))
    if shared:
        there = f"{card / GiB:.1f} GiB of memory"
        takes = f"{needed / GiB:.1f} GiB of memory" + f" for {local} processes" * (local > 1)
    else:
        there = f"{card / GiB:.0f} GiB" + f" on each of {chosen.gpus} cards" * (chosen.gpus > 1)
        takes = f"{needed / GiB:.0f} GiB on the card and {in_host / GiB:.0f} in the host"
        if host < math.inf:  # infinite: another machine's
            there += f" and {host / GiB:.0f} in the host"
    save = N * size + 12 * (lora or N)
    lines.append(f"{there} are free; a save writes {save / GiB:.1f}. Chosen: {as_flags(ways, values)}")
    if not fits:
        raise InputError(f"training needs at least {takes}, and {there} are free: use a smaller model, "
                         f"{'' if settings.lora_rank else '--lora-rank 16, '}--beta 0 (no reference) or "
                         "a shorter --max-new-tokens")
    return chosen, "\n".join(lines)


def as_flags(names, values) -> str:
    """Options as they are typed: --offload --no-checkpointing --max-num-seqs 512."""
    flags = []
    for name, value in zip(names, values):
        flag = name.replace("_", "-")
        if value is True or value is False:
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags.append(f"--{flag} {value}")
    return " ".join(flags)
