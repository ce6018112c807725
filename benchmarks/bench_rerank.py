"""Reranking with a real model, against transformers' generate: one by one, and all windows padded together.

    python benchmarks/bench_rerank.py --model HuggingFaceTB/SmolLM2-135M-Instruct --input CANDIDATES

All sides decode the first window of the first `--windows` queries greedily, up to `--new` tokens, with the
same model, precision and prompts. A small model that was never trained for this ends its answers after a few
words. With `--whole`, each answer has `--new` tokens, since a model that reasons writes hundreds. The sides
run in turn. The ratio is that of the faster of the two ways to call generate.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from model import Agent, load_agent, sample
from prompts import encode_prompt
from support.cli import command_line, run_main, setting
from support.download import cache_folder
from support.files import read_candidates


@dataclasses.dataclass
class Settings:
    """Settings of the benchmark."""

    model: str = setting("", "A model folder or hub name.", required=True)
    input: str = setting("", "Candidates (default: DL19's, where `python data.py download dl19` puts them).")
    windows: int = setting(8, "Windows of 20 passages, of different queries.", minimum=1)
    new: int = setting(64, "Most tokens per answer.", minimum=1)
    whole: bool = setting(False, "Let every answer run to --new tokens.")
    dtypes: list[str] = setting(lambda: ["bfloat16", "float32"], "Precisions.", nargs="+")
    repeats: int = setting(3, "Rounds; medians are reported.", minimum=1)
    json: bool = setting(False, "One JSON line per measure instead of the table.")


def generate(agent: Agent, prompts: list[list[int]], new: int, whole: bool) -> list[list[int]]:
    """Run transformers' generate on left-padded prompts. Returns the new tokens of each prompt."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = agent.model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new,
                               min_new_tokens=new if whole else None,
                               eos_token_id=agent.stop_ids, pad_token_id=agent.stop_ids[0])
    return out[:, width:].tolist()


def compare(settings: Settings, dtype: str) -> dict:
    """Measure all sides. Returns their median seconds, and the number of answers whose first tokens agree."""
    agent = load_agent(settings.model, "cpu", dtype)
    path = settings.input or cache_folder() / "dl19" / "retrieve_results_dl19_top100.jsonl"
    lists = read_candidates(path)[:settings.windows]
    prompts = [encode_prompt(agent.tokenizer, c.query, c.texts[:20]) for c in lists]

    def ours() -> list[list[int]]:
        stop = () if settings.whole else agent.stop_ids
        answers = sample(agent.model, prompts, 1, settings.new, 0.0, stop, max_num_seqs=len(prompts))
        return [answer.ids for [answer] in answers]

    def one_by_one() -> list[list[int]]:
        return [generate(agent, [prompt], settings.new, settings.whole)[0] for prompt in prompts]

    def together() -> list[list[int]]:
        return generate(agent, prompts, settings.new, settings.whole)

    seconds, first = {side: [] for side in (ours, one_by_one, together)}, {}
    for _ in range(settings.repeats):
        for side in seconds:
            started = time.perf_counter()
            first[side] = [ids[0] for ids in side()]
            seconds[side].append(time.perf_counter() - started)
    peers = list(zip(seconds[one_by_one], seconds[together]))
    ratio = statistics.median(min(pair) / mine for pair, mine in zip(peers, seconds[ours]))
    alone, padded = (statistics.median(side) for side in zip(*peers))
    return {"what": "rerank", "size": dtype, "peer": "generate", "ours_s": statistics.median(seconds[ours]),
            "peer_s": min(alone, padded), "ratio": ratio, "ours_mib": None, "peer_mib": None,
            "repeats": settings.repeats, "one_by_one_s": alone, "together_s": padded,
            "prompt_tokens": sum(map(len, prompts)),
            "first_tokens_agree": sum(a == b for a, b in zip(first[ours], first[one_by_one]))}


def main(argv: list[str] | None = None) -> int:
    """Measure each precision and print it."""
    settings = command_line(Settings, argv, __doc__)
    for dtype in settings.dtypes:
        row = compare(settings, dtype)
        tokens = row["prompt_tokens"] // settings.windows
        line = (f"{dtype}: ours {row['ours_s']:.1f} s, generate one by one {row['one_by_one_s']:.1f} s, "
                f"padded together {row['together_s']:.1f} s: {row['ratio']:.1f} x the better; "
                f"{settings.windows} windows of {tokens:,} tokens")
        print(json.dumps(row) if settings.json else line, flush=True)
    return 0


if __name__ == "__main__":
    run_main(main)
