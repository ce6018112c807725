"""Several ranks: the processes that torchrun starts, one per card (gloo on a CPU, nccl on GPUs).

With one process every function here gives back what it gets. Each rank works on its share of the prompts;
the optimizer keeps a slice of every tensor per rank (optimizer.py, ZeRO-2).
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from support.cli import InputError


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def say(text: str, **options) -> None:
    """Print on rank 0 only, above the progress bars. `options` are those of tqdm.write (file=...)."""
    if rank() == 0:
        tqdm.write(text, **options)


def my_share(n: int) -> range:
    """Which of n items are this rank's."""
    return range(n * rank() // world_size(), n * (rank() + 1) // world_size())


def gather(items: list) -> list:
    """The items of all ranks, in the ranks' order, on every rank. Every rank must call this."""
    parts = [items] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def slices(x: Tensor) -> Tensor:
    """[...] -> [ranks, n]: cut a tensor into one slice per rank, the last one padded with zeros."""
    return F.pad(x.reshape(-1), (0, -x.numel() % world_size())).view(world_size(), -1)


def my_slice(x: Tensor) -> Tensor:
    """[...] -> [n], this rank's slice. With one rank: x as it is."""
    return x if world_size() == 1 else slices(x)[rank()]


def sum_of_slices(x: Tensor) -> Tensor:
    """[...] -> [n]: this rank's slice of the sum of x over all ranks (reduce-scatter)."""
    if world_size() == 1:
        return x
    parts = slices(x)
    mine = torch.empty_like(parts[0])
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # torch 2.11
    reduce_scatter(mine, parts.flatten())
    return mine


def from_slices(mine: Tensor, like: Tensor) -> Tensor:
    """The inverse of `my_slice` (all-gather): slices [n] of all ranks -> `like`'s shape, on its device."""
    if world_size() == 1:
        return mine
    whole = mine.new_empty(mine.numel() * world_size(), device=like.device)
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.11
    all_gather(whole, mine.to(like.device))
    return whole[:like.numel()].view_as(like)


def on_all_ranks(run: Callable[[], int], on_cards: bool) -> int:
    """Call run() in each process that torchrun has started (or in this one). Returns its exit status.

    A fault that all ranks meet is printed once, by the first to meet it. InputError where another rank ended.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return run()
    store, number, ranks = next(dist.rendezvous("env://"))
    if on_cards:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    patience = datetime.timedelta(hours=2)  # ranks wait while one saves, or writes longer answers
    dist.init_process_group("nccl" if on_cards else "gloo", timeout=patience, store=store, rank=number,
                            world_size=ranks)
    try:
        return run()
    except InputError as error:
        if store.add(f"fault: {error}", 1) > 1:
            raise SystemExit(2) from None
        raise
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):  # gloo's is a plain one
            raise
        raise InputError(f"rank {number}: another rank has ended, which stops the run; go on from the newest "
                         "save with --resume") from None
    finally:
        dist.destroy_process_group()
