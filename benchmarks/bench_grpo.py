"""Sampling against transformers' generate, and a full GRPO step against trl.GRPOTrainer.

    python benchmarks/bench_grpo.py --size tiny    (about 3 minutes on 2 cores)
    python benchmarks/bench_grpo.py --size small   (about an hour on 2 cores)
    python benchmarks/bench_grpo.py --only tricks  (each trick against the code without it; --size small too)

Both sides run in turn in one process, with the same model, prompts, group size and reward (a function of the
ids, not of a text). TRL takes the whole group as one batch of `per_device_train_batch_size` (a smaller one
needs less memory and accumulates gradients). Ours takes micro-batches of 384 answer tokens.

Ratios are peer / ours, the median over pairs. Memory is the peak of a first call in a fresh process, over
the memory before the call; torch's own allocations are included. The limit is an estimate: the necessary
bytes and FLOPs over this machine's rates in a plain sum and a plain matrix product.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Qwen2Config

from grpo import (Rollouts, TrainSettings, batch_sums, group_advantages, grpo_loss, policy_microbatches,
                  step_means)
from model import Agent, encode_prompts, forward, microbatches, sample
from support.cli import command_line, run_main, setting
from support.optimizer import MasterAdamW
from toy import TOY


@dataclasses.dataclass
class Settings:
    """Settings of the benchmark."""

    size: str = setting("tiny", "Model and lengths.", choices=("tiny", "small"))
    repeats: int = setting(5, "Pairs of runs; medians are reported.", minimum=1)
    beta: list[float] = setting(lambda: [0.0, 0.04], "KL weights, one step each.", nargs="+", type=float)
    only: str = setting(
        "both",
        "The part to run; both: sample and step. tricks takes 2 minutes (small: 15).",
        choices=("both", "sample", "step", "tricks"),
    )
    threads: int = setting(1, "Threads of torch, for both sides.")
    side: str = setting(
        "", "For internal use: make the one call of this name and print its peak memory in MiB."
    )
    json: bool = setting(False, "Print one JSON line per measure instead of the table.")


@dataclasses.dataclass
class Size:
    """Model shape and lengths: prompts of `prompt` tokens, answers of up to `new` tokens.

    A group has `group_size` answers in sampling and `step_group_size` in a step.
    """

    config: dict
    prompt: int
    new: int
    prompts: int
    step_group_size: int
    group_size: int = 32
    step_prompts: int = 1


SIZES = {
    "tiny": Size(
        dict(
            vocab_size=512,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
        prompt=300,
        new=96,
        prompts=4,
        step_group_size=32,
    ),
    "small": Size(
        dict(
            vocab_size=32000,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=4,
            num_attention_heads=12,
            num_key_value_heads=4,
        ),
        prompt=1500,
        new=128,
        prompts=1,
        step_group_size=8,
    ),
}
END = 2
TRL = dict(  # options of trl.GRPOConfig in every comparison: the same algorithm, no logging, no saves
    beta=0.0,
    top_k=0,
    top_p=1.0,
    lr_scheduler_type="constant",
    loss_type="grpo",
    num_iterations=1,
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    report_to=[],
    save_strategy="no",
    logging_steps=10**6,
    disable_tqdm=True,
)


def build(size: Size) -> torch.nn.Module:
    """A random model. Its end token's probability makes answers about half as long as the limit."""
    torch.manual_seed(0)
    config = Qwen2Config(
        **size.config,
        max_position_embeddings=4096,
        initializer_range=0.02,
        pad_token_id=END,
        eos_token_id=END,
        bos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():  # logits near 0, except the end token's: its probability must be about 2 / limit
        model.lm_head.weight.mul_(0.1)
    chance = 2.0 / size.new
    model.end_bias = float(torch.log(torch.tensor(chance * size.config["vocab_size"] / (1 - chance))))
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(size.config["vocab_size"]), requires_grad=False)
    model.lm_head.bias.data[END] = model.end_bias
    return model


class Peak:
    """Peak resident memory over the baseline, in MiB. A thread reads it every 2 ms."""

    def __enter__(self):
        gc.collect()
        self.stop, self.peak, self.base = threading.Event(), 0, self.resident()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    @staticmethod
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def watch(self):
        while not self.stop.wait(0.002):
            self.peak = max(self.peak, self.resident())

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()
        self.mib = max(0, self.peak - self.base) / 2**20


def in_turn(
    settings: Settings, only: str, beta: float, ours, peer, names: tuple[str, str] = ("ours", "peer")
) -> dict:
    """Run both sides in turn after one warm-up each. Returns medians of the times and of the pairs' ratios.

    Memory is measured for a first call in a new process, since a process that has already run keeps its heap.
    With --side, this is that new process: it makes the one call of this name, prints its peak and exits.
    """
    if settings.side:
        sides = dict(zip(names, (ours, peer)))
        if settings.side not in sides:
            return {}
        with Peak() as peak:
            sides[settings.side]()
        print(peak.mib)
        sys.exit(0)
    command = [
        sys.executable,
        __file__,
        "--size",
        settings.size,
        "--only",
        only,
        "--beta",
        str(beta),
        "--threads",
        str(settings.threads),
    ]
    mib = [
        float(
            subprocess.run(
                [*command, "--side", side], capture_output=True, text=True, check=True
            ).stdout.split()[-1]
        )
        for side in names
    ]
    ours(), peer()
    pairs = []
    for _ in range(settings.repeats):
        times = []
        for call in (ours, peer):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        pairs.append(times)
    return {
        "ours_s": statistics.median(p[0] for p in pairs),
        "peer_s": statistics.median(p[1] for p in pairs),
        "ratio": statistics.median(p[1] / p[0] for p in pairs),
        "ours_mib": mib[0],
        "peer_mib": mib[1],
        "repeats": settings.repeats,
    }


def limit_seconds(
    size: Size, model: torch.nn.Module, prompts: int, answers: list[int], passes: int = 0
) -> float:
    """Lower bound in seconds: sampling answers of these lengths, and `passes` forward passes over all tokens.

    A backward pass counts as two forward passes. The bound is FLOPs over the measured rate of a matrix
    product. Decoding takes at least its bytes over the measured bandwidth.
    """
    a = torch.randn(1024, 1024)
    started = time.perf_counter()
    for _ in range(10):
        a @ a
    flops_per_s = 10 * 2 * 1024**3 / (time.perf_counter() - started)
    big = torch.ones(2**26)
    started = time.perf_counter()
    for _ in range(3):
        big.sum()
    bytes_per_s = 3 * 2**28 / (time.perf_counter() - started)

    config, count = model.config, lambda module: sum(p.numel() for p in module.parameters())
    layers, last = [count(layer) for layer in model.model.layers], model.model.layers[-1]
    decode_weights = sum(layers) + model.lm_head.weight.numel()
    # In a prompt's last layer, only keys and values are needed at every position.
    prompt_weights = sum(layers[:-1]) + count(last.self_attn.k_proj) + count(last.self_attn.v_proj)
    place = 4 * config.num_hidden_layers * config.hidden_size  # FLOPs of a token's attention to one position
    prompt_flops = prompts * size.prompt * (2 * prompt_weights + place * size.prompt / 2)
    answer_flops = sum(n * (2 * decode_weights + place * (size.prompt + n / 2)) for n in answers)
    head = config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * head * size.prompt * prompts
    decoding = max(answer_flops / flops_per_s, max(answers) * 4 * (decode_weights + cache) / bytes_per_s)
    return decoding + (prompt_flops + passes * (prompt_flops + answer_flops)) / flops_per_s


def generate(model, ids: torch.Tensor, group_size: int, new: int, **options) -> torch.Tensor:
    """transformers' generate: `group_size` answers of up to `new` tokens to each prompt of ids [B, P]."""
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new,
        num_return_sequences=group_size,
        **options,
    )


def bench_sample(size: Size, settings: Settings) -> list[dict]:
    """Measure `sample` against generate(num_return_sequences=G): one prompt per call, and all in one call."""
    model = build(size)
    prompts = torch.randint(
        3, size.config["vocab_size"], (size.prompts, size.prompt), generator=torch.Generator().manual_seed(0)
    )
    seen = {}

    def ours():
        answers = sample(
            model, prompts.tolist(), size.group_size, size.new, 1.0, [END], seed=0, max_num_seqs=64
        )
        lengths = [len(c.ids) for row in answers for c in row]
        seen["lengths"] = lengths

    def peer(ids):
        return generate(model, ids, size.group_size, size.new)

    peers = {"peer": ("generate, one by one", lambda: [peer(p[None]) for p in prompts])}
    if size.prompts > 1:
        peers["together"] = ("generate, all in one", lambda: peer(prompts))
    rows = [
        {
            "what": "sample",
            "size": settings.size,
            "peer": title,
            **in_turn(settings, "sample", 0.0, ours, call, ("ours", side)),
        }
        for side, (title, call) in peers.items()
    ]
    limit = limit_seconds(size, model, size.prompts, seen["lengths"])
    return [row | {"limit_s": limit} for row in rows]


def reward_of_ids(ids: list[int]) -> float:
    """A reward for speed tests: the share of odd ids. It only has to differ inside a group."""
    return sum(1 for i in ids if i % 2) / max(1, len(ids))


def update_by_ids(agent: Agent, reference, optimizer, prompts, groups, options) -> None:
    """The part of `grpo_step` after sampling, with the reward `reward_of_ids`: advantage, loss, AdamW."""
    completions = [c for group in groups for c in group]
    rewards = torch.tensor([reward_of_ids(c.ids) for c in completions]).view(len(prompts), options.group_size)
    rollouts = Rollouts([], prompts, completions, [], [], 0.0, 1.0)
    advantages, sums = group_advantages(rewards), []
    for batch in policy_microbatches(agent, reference, rollouts, advantages, options):
        loss = grpo_loss(batch.logps, batch.ref_logps, batch.advantages, batch.lengths, options.beta,
                         batch.old_logps, options.clip, batch.all_lengths)
        loss.backward()
        sums.append(batch_sums(batch, loss, options.clip))
    means, tokens = step_means(sums, reference is not None)
    if tokens:
        optimizer.step(1e-6, options.grad_clip, skip=not math.isfinite(means["loss"]))


def bench_step(size: Size, settings: Settings, beta: float) -> dict:
    """Measure a step (sample, reward, advantage, reference, loss, backward, AdamW) against TRL's."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(
        3, size.config["vocab_size"], (size.step_prompts, size.prompt), generator=generator
    ).tolist()
    mine, theirs = build(size), build(size)
    reference = build(size) if beta else None
    optimizer = MasterAdamW(mine.parameters())
    # Small micro-batches of answers of similar length need little padding and little memory.
    changes = {"group_size": size.step_group_size, "beta": beta, "microbatch_tokens": 384}
    options = TrainSettings(**TOY | changes)
    agent, steps, seen = Agent(mine, None, [END]), iter(range(10**6)), {}

    def ours():
        groups = sample(
            mine, prompts, size.step_group_size, size.new, 1.0, [END], seed=next(steps), max_num_seqs=1024
        )
        seen["lengths"] = [len(c.ids) for group in groups for c in group]
        update_by_ids(agent, reference, optimizer, prompts, groups, options)

    row = in_turn(settings, "step", beta, ours, trl_step(theirs, prompts, size, beta))
    limit = limit_seconds(size, mine, len(prompts), seen["lengths"], passes=4 if beta else 3)
    return {
        "what": "step",
        "size": settings.size,
        "peer": "trl.GRPOTrainer",
        **row,
        "limit_s": limit,
        "beta": beta,
    }


def trl_step(model, prompts: list[list[int]], size: Size, beta: float):
    """A function that takes one step of TRL's trainer on the same prompts, by its own training_step."""
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(WordLevel({f"w{i}": i for i in range(size.config["vocab_size"])}, unk_token="w0"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=f"w{END}", pad_token=f"w{END}", padding_side="left"
    )
    folder = tempfile.mkdtemp()
    config = trl.GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=size.step_group_size * len(prompts),
        num_generations=size.step_group_size,
        max_completion_length=size.new,
        temperature=1.0,
        learning_rate=1e-6,
        max_grad_norm=1.0,
        max_steps=10**6,
        **TRL,
    )
    rows = Dataset.from_dict({"prompt": [" ".join(f"w{i}" for i in p) for p in prompts]})
    trainer = trl.GRPOTrainer(
        model=model,
        args=config,
        train_dataset=rows,
        processing_class=tokenizer,
        reward_funcs=lambda completion_ids, **_: [reward_of_ids(ids) for ids in completion_ids],
    )
    trainer.create_optimizer_and_scheduler(10**6)
    batch = [{"prompt": row} for row in rows["prompt"] for _ in range(size.step_group_size)]
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    if beta:  # set by hand: the trainer would load its reference from the hub by name
        trainer.beta, trainer.ref_model = beta, build(size)
        trl.trainer.grpo_trainer.add_fused_lm_head(
            trainer.ref_model, temperature=1.0, cast_lm_head_to_fp32=False
        )

    def step():
        trainer._buffered_inputs = None
        trainer.training_step(trainer.model, batch, None)
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        trainer.state.global_step += 1
        trainer._step = 0

    return step


def bench_tricks(size: Size, settings: Settings) -> list[dict]:
    """Measure each trick against the same code without it. The code without the trick is the peer."""
    model, count = build(size), size.step_group_size
    prompts = torch.randint(
        3, size.config["vocab_size"], (size.prompts, size.prompt), generator=torch.Generator().manual_seed(0)
    ).tolist()
    generator = torch.Generator().manual_seed(
        1
    )  # random ids: sampling by the model would allocate its memory before the measurement
    answers = [
        torch.randint(3, size.config["vocab_size"], (n,), generator=generator).tolist()
        for n in torch.randint(1, size.new + 1, (count,), generator=generator).tolist()
    ]

    def draw(prompts: list[list[int]], group_size: int, stop: list[int]) -> None:
        sample(model, prompts, group_size, size.new, 1.0, stop, seed=0, max_num_seqs=64)

    def learn(prompts: list[list[int]], microbatch_tokens: int) -> None:
        for batch in microbatches(model, prompts, answers, microbatch_tokens=microbatch_tokens):
            batch.logps.sum().backward()
        model.zero_grad()

    def plain_attention(layer, query, key, value, scaling):
        options = {"is_causal": True, "scale": scaling, "enable_gqa": True}
        return F.scaled_dot_product_attention(query, key, value, **options)

    @torch.no_grad()
    def encode_whole() -> None:
        """Encode a prompt with all positions in the last layer."""
        forward(model, torch.tensor(prompts[:1]), torch.arange(size.prompt)[None], plain_attention)

    tricks = {
        "sampling: a prompt once for its group": (
            lambda: draw(prompts, size.group_size, [END]),
            lambda: draw([p for p in prompts for _ in range(size.group_size)], 1, [END]),
        ),
        "sampling: rows that have ended leave": (
            lambda: draw(prompts, size.group_size, [END]),
            lambda: draw(prompts, size.group_size, []),
        ),
        "prompt: one place in the last layer": (
            torch.no_grad()(lambda: encode_prompts(model, prompts[:1])),
            encode_whole,
        ),
        "update: a prompt once for its group": (
            lambda: learn(prompts[:1], 384),
            lambda: learn(prompts[:1] * count, 384),
        ),
        "update: micro-batches of like length": (
            lambda: learn(prompts[:1], 384),
            lambda: learn(prompts[:1], 10**9),
        ),
    }
    return [
        {
            "what": title,
            "size": settings.size,
            "peer": "without it",
            **in_turn(settings, "tricks", 0.0, *calls, (f"with {i}", f"without {i}")),
        }
        for i, (title, calls) in enumerate(tricks.items())
    ]


def main(argv: list[str] | None = None) -> int:
    """Run the selected measurements and print them."""
    settings = command_line(Settings, argv, __doc__)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(settings.threads)
    size, rows = SIZES[settings.size], []
    if settings.only in ("both", "sample"):
        rows += bench_sample(size, settings)
    if settings.only in ("both", "step"):
        rows += [bench_step(size, settings, beta) for beta in settings.beta]
    if settings.only == "tricks":
        rows += bench_tricks(size, settings)
    for row in rows:
        if settings.json:
            print(json.dumps(row))
        else:
            what = row["what"] + (f", beta {row['beta']}" if "beta" in row else "")
            limit = f"   limit {row['limit_s']:.2f} s" if "limit_s" in row else ""
            print(
                f"{what:38} {row['size']:5} ours {row['ours_s']:7.3f} s {row['ours_mib']:6.0f} MiB   "
                f"{row['peer']:25} {row['peer_s']:7.3f} s {row['peer_mib']:6.0f} MiB   "
                f"{row['ratio']:5.1f} x faster, "
                f"memory 1/{row['peer_mib'] / max(row['ours_mib'], 1):.1f}{limit}"
            )
    return 0


if __name__ == "__main__":
    run_main(main)
