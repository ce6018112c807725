"""Decoding, a GRPO step and the largest group that fits, on a GPU.

The models have Qwen2.5's shapes and random weights in bfloat16.

    python benchmarks/bench_gpu.py        (0.5B, 1.5B and 7B; 2,200 prompt tokens, G = 32, 512 new tokens)
    python benchmarks/bench_gpu.py --sizes test --device cpu --prompt 60 --new 20 --group-size 4
                                          (tests the script in seconds, on any machine)

Decoding: tokens per second after the prompt is encoded, also as a share of the limit. The limit comes from
the bytes that a step must read (weights, the prompt's keys and values once, the answers' own) and the
bandwidth of a copy. transformers' generate(num_return_sequences=G) runs in turn with it, in generate's best
case: one group whose answers are all equally long.

Step: sampling and update, with their peak memory. If weights, gradients and moments exceed the card, the
optimizer's state is in host memory (7B: 114 GiB).

Fits: the largest group whose answers fit, for each length, found by trying.

If a command may run for a few minutes only, name one size and one part: --sizes 7B --parts step --repeats 2.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from bench_grpo import generate, update_by_ids
from grpo import TrainSettings
from model import Agent, DecodeBatch, read_tokens, sample
from support.cli import InputError, command_line, run_main, setting
from support.device import pick_device
from support.optimizer import MasterAdamW


def shape(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> dict:
    """Arguments of Qwen2Config for a model of this shape."""
    return dict(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        tie_word_embeddings=tied,
    )


SHAPES = {
    "0.5B": shape(896, 4864, 24, 14, 2, 151936, True),
    "1.5B": shape(1536, 8960, 28, 12, 2, 151936, True),
    "7B": shape(3584, 18944, 28, 28, 4, 152064, False),
    "test": shape(64, 128, 2, 4, 2, 500, False),
}


@dataclasses.dataclass
class Settings:
    """Settings of the benchmark."""

    sizes: list[str] = setting(lambda: ["0.5B", "1.5B", "7B"], "Shapes.", nargs="+", choices=tuple(SHAPES))
    parts: list[str] = setting(
        lambda: ["sample", "step", "fits"], "Parts to measure.", nargs="+", choices=("sample", "step", "fits")
    )
    prompt: int = setting(2200, "Prompt tokens.", minimum=1)
    new: int = setting(512, "New tokens per answer.", minimum=2)
    group_size: int = setting(32, "Answers per prompt.", minimum=2)
    prompts: int = setting(1, "Prompts per step.", minimum=1)
    repeats: int = setting(5, "Runs in turn; medians are reported.", minimum=1)
    microbatch_tokens: int = setting(8192, "Padded answer tokens per micro-batch of the update.", minimum=1)
    checkpointing: bool = setting(True, "Recompute activations in the update's backward pass.")
    offload: str = setting(
        "auto",
        "Optimizer state in host memory; auto: if the card cannot hold it.",
        choices=("auto", "yes", "no"),
    )
    lengths: list[int] = setting(
        lambda: [512, 1024, 2048], "Answer lengths to find the largest group for.", nargs="+", type=int
    )
    device: str = setting("auto", "cuda, cpu or auto.")
    json: bool = setting(False, "Print one JSON line per measure instead of the table.")


def build(size: str, device: torch.device) -> torch.nn.Module:
    """A model of this shape with random weights on the device. First frees the memory of an earlier model."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    torch.manual_seed(0)
    config = Qwen2Config(
        **SHAPES[size], max_position_embeddings=32768, pad_token_id=0, eos_token_id=0, bos_token_id=None
    )
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


class Measure:
    """Measures a `with` block: seconds, peak GPU memory over the baseline and in total (MiB; 0 on a CPU)."""

    def __enter__(self):
        self.base = 0
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()
        self.started = time.perf_counter()
        return self

    def __exit__(self, *_):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.started
        self.peak_mib = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
        self.mib = self.peak_mib - self.base / 2**20


def bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written together, of a plain copy of 1 GiB (64 MiB on a CPU)."""
    source = torch.empty(2**26 if device.type == "cpu" else 2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    with Measure() as measure:
        for _ in range(20):
            target.copy_(source)
    return 20 * 2 * len(source) / measure.seconds


def bytes_per_step(model, settings: Settings) -> float:
    """Bytes that a decoding step must read: weights, the prompt's cache, half of the answers' on average."""
    config, size = model.config, model.dtype.itemsize
    looked_up = 0 if config.tie_word_embeddings else model.get_input_embeddings().weight.numel()
    weights = sum(p.numel() for p in model.parameters()) - looked_up
    place = (
        2
        * config.num_hidden_layers
        * config.num_key_value_heads
        * config.hidden_size
        // config.num_attention_heads
    )
    return size * (weights + place * (settings.prompt + settings.group_size * settings.new / 2))


def bench_sample(size: str, settings: Settings, device: torch.device) -> list[dict]:
    """Measure decoding against generate. All answers have the full length."""
    model = build(size, device)
    prompt = torch.randint(
        1, model.config.vocab_size, (1, settings.prompt), generator=torch.Generator().manual_seed(0)
    )

    def ours(new: int) -> None:
        sample(model, prompt.tolist(), settings.group_size, new, 1.0, [], max_num_seqs=settings.group_size)

    def peer(new: int) -> None:
        generate(model, prompt.to(device), settings.group_size, new, min_new_tokens=new, eos_token_id=None)

    sides = {"ours": ours, "transformers.generate": peer}
    whole, first, mib = ({name: [] for name in sides} for _ in range(3))
    for repeat in range(-1, settings.repeats):  # the first round is a warm-up
        for name, side in sides.items():
            with Measure() as short:
                side(1)
            with Measure() as long:
                side(settings.new)
            if repeat >= 0:
                (
                    whole[name].append(long.seconds),
                    first[name].append(short.seconds),
                    mib[name].append(long.mib),
                )
    median = statistics.median
    decode = {
        name: (median(whole[name]) - median(first[name])) / (settings.new - 1) for name in sides
    }  # seconds per step
    limit = bytes_per_step(model, settings) / bandwidth(device)
    return [
        {
            "what": "sample",
            "size": size,
            "peer": peer,
            "ours_s": median(whole["ours"]),
            "peer_s": median(whole[peer]),
            "ratio": median(b / a for a, b in zip(whole["ours"], whole[peer])),
            "ours_mib": median(mib["ours"]),
            "peer_mib": median(mib[peer]),
            "repeats": settings.repeats,
            "prefill_s": median(first["ours"]),
            "tokens_per_s": settings.group_size / decode["ours"],
            "peer_tokens_per_s": settings.group_size / decode[peer],
            "share_of_limit": limit / decode["ours"],
            "peer_share_of_limit": limit / decode[peer],
        }
        for peer in list(sides)[1:]
    ]


def bench_step(size: str, settings: Settings, device: torch.device) -> list[dict]:
    """Measure steps without a reference model: sampling, then the update with master weights and moments.

    Returns medians over all steps but the first.
    """
    model = build(size, device)
    state = 16 * model.num_parameters()  # float32 gradient sums, masters and two moments
    too_large = device.type == "cuda" and state > 0.8 * torch.cuda.mem_get_info()[0]
    offload = settings.offload == "yes" or settings.offload == "auto" and too_large
    optimizer, agent = MasterAdamW(model.parameters(), offload=offload), Agent(model, None, [])
    options = TrainSettings(
        group_size=settings.group_size,
        beta=0.0,
        microbatch_tokens=settings.microbatch_tokens,
        checkpointing=settings.checkpointing,
    )
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(
        1, model.config.vocab_size, (settings.prompts, settings.prompt), generator=generator
    ).tolist()
    sampling, update = [], []
    for step in range(settings.repeats + 1):
        with Measure() as measure:
            groups = sample(
                model, prompts, settings.group_size, settings.new, 1.0, [], seed=step, max_num_seqs=128
            )
        sampling.append(measure)
        with Measure() as measure:
            update_by_ids(agent, None, optimizer, prompts, groups, options)
        update.append(measure)
    optimizer.remove_hooks()
    seconds = [statistics.median(m.seconds for m in part[1:]) for part in (sampling, update)]
    return [
        {
            "what": "step",
            "size": size,
            "peer": None,
            "ours_s": sum(seconds),
            "peer_s": None,
            "ratio": None,
            "ours_mib": max(m.mib for m in sampling + update),
            "peer_mib": None,
            "repeats": settings.repeats,
            "sample_s": seconds[0],
            "update_s": seconds[1],
            "peak_mib_in_all": max(m.peak_mib for m in sampling + update),
            "offload": offload,
        }
    ]


@torch.inference_mode()
def fits(model, settings: Settings, group_size: int, length: int) -> float | None:
    """Peak memory in GB (1e9, weights included) at the last step of `group_size` answers of `length` tokens.

    Counts the memory that the allocator held. None if it runs out of memory.
    """
    prompt = torch.randint(1, model.config.vocab_size, (1, settings.prompt)).tolist()
    try:
        with Measure():
            batch = DecodeBatch(model, prompt, group_size, range(group_size))
            batch.tokens, batch.length = batch.logits.argmax(-1), length - 1
            batch.cache = [x.new_zeros(*x.shape[:3], length, x.shape[4]) for x in batch.cache]
            read_tokens(model, [batch])
        return torch.cuda.max_memory_reserved() / 1e9 if torch.cuda.is_available() else 0.0
    except torch.OutOfMemoryError:
        return None


def bench_fits(size: str, settings: Settings, device: torch.device) -> list[dict]:
    """Find the largest group that fits in 80 GB and on this card, for each length, by doubling the group.

    Only sampling is tried, since micro-batches bound the memory of the update.
    """
    model, rows = build(size, device), []
    for length in settings.lengths:
        best = {"80": 0, "card": 0}
        group_size = settings.group_size
        while group_size <= 32 * settings.group_size:
            peak = fits(model, settings, group_size, length)
            if peak is None:
                break
            best["card"] = group_size
            if peak <= 80:
                best["80"] = group_size
            group_size *= 2
        rows.append(
            {
                "what": "fits",
                "size": size,
                "length": length,
                "group_in_80_gb": best["80"],
                "group_on_this_card": best["card"],
                "most_tried": 32 * settings.group_size,
            }
        )
    return rows


def line(row: dict) -> str:
    """One measure as a line of the table."""
    if row["what"] == "sample":
        return (
            f"sample {row['size']:5} {row['tokens_per_s']:8.0f} tokens/s, "
            f"{row['share_of_limit']:.0%} of the bandwidth limit, {row['ours_mib']:.0f} MiB; "
            f"{row['peer']} {row['peer_tokens_per_s']:.0f}, {row['peer_share_of_limit']:.0%}, "
            f"{row['peer_mib']:.0f} MiB; in all {row['ratio']:.1f} x faster"
        )
    if row["what"] == "step":
        where = ", optimizer in host memory" if row["offload"] else ""
        return (
            f"step   {row['size']:5} {row['ours_s']:.2f} s: "
            f"sampling {row['sample_s']:.2f}, update {row['update_s']:.2f}; "
            f"peak {row['peak_mib_in_all']:.0f} MiB with weights and state{where}"
        )
    return (
        f"fits   {row['size']:5} {row['length']} new tokens: group of {row['group_in_80_gb']} in 80 GB, "
        f"{row['group_on_this_card']} on this card (tried up to {row['most_tried']})"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the selected measurements and print them."""
    settings = command_line(Settings, argv, __doc__)
    device = pick_device(settings.device)
    if device.type != "cuda" and (device.type != "cpu" or set(settings.sizes) != {"test"}):
        raise InputError(
            "no GPU here: bench_gpu.py measures on CUDA; "
            "on a CPU use --sizes test --device cpu --prompt 60 --new 20 --group-size 4"
        )
    if not settings.json:
        card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        print(
            f"{card}, torch {torch.__version__}, {bandwidth(device) / 1e12:.2f} TB/s by a copy; "
            f"{settings.prompt} prompt tokens, G = {settings.group_size}, {settings.new} new tokens"
        )
    for size in settings.sizes:
        for part in settings.parts:
            for row in {"sample": bench_sample, "step": bench_step, "fits": bench_fits}[part](
                size, settings, device
            ):
                print(json.dumps(row) if settings.json else line(row), flush=True)
    return 0


if __name__ == "__main__":
    run_main(main)
