"""AdamW over float32 master weights, whatever precision the model computes in, on one or several ranks.

In bfloat16 an update of 1e-6 is smaller than the spacing of the weights and would round to nothing. So the
weights have float32 copies, the masters; updates add up there, and the model gets the rounded result.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from support import distributed
from support.distributed import from_slices, gather, my_slice, sum_of_slices


class MasterAdamW:
    """AdamW over float32 masters of the trainable parameters.

    Gradients are summed in float32 too, on the model's device: a hook takes each gradient as soon as the
    backward pass has made it (`remove_hooks` ends that). With `offload`, masters and moments live in host
    memory, where one gradient at a time follows them. float32 weights without offload are their own masters.

    On several ranks this is ZeRO-2 (arXiv 1910.02054): each rank has all weights, to sample with, and the
    masters and moments of its slice of every weight. FSDP2 does not fit here: it would gather the weights for
    every token sampled, its hooks are bypassed by our `forward`, and it hangs where ranks have different
    numbers of micro-batches. ZeroRedundancyOptimizer keeps no float32 masters.
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], weight_decay: float = 0.0, offload: bool = False,
                 betas: tuple[float, float] = (0.9, 0.999)):
        self.params = [p for p in params if p.requires_grad]
        self.masters = []
        self.updates = 0  # how many updates have begun
        for p in self.params:
            place = torch.device("cpu") if offload else p.device
            if p.dtype == torch.float32 and place == p.device and distributed.world_size() == 1:
                self.masters.append(p)
            else:
                mine = my_slice(p.detach()).to(place, torch.float32, copy=True)
                self.masters.append(torch.nn.Parameter(mine))
        self.grad_sums: dict[torch.nn.Parameter, Tensor] = {}
        self.hooks = [p.register_post_accumulate_grad_hook(self._accumulate)
                      for p, master in zip(self.params, self.masters) if p is not master]
        # One AdamW per weight, so that each can step by itself.
        self.optimizers = [torch.optim.AdamW([master], 0.0, betas, weight_decay=weight_decay, fused=True)
                           for master in self.masters]

    def _accumulate(self, param: torch.nn.Parameter) -> None:
        """Add a new gradient to the float32 sum and free it."""
        grad = param.grad.float()
        param.grad = None
        if param in self.grad_sums:
            self.grad_sums[param].add_(grad)
        else:
            self.grad_sums[param] = grad

    def remove_hooks(self) -> None:
        """Let another optimizer train the model."""
        for hook in self.hooks:
            hook.remove()

    @torch.no_grad()
    def step(self, lr: float, grad_clip: float, skip: bool = False) -> float:
        """Update the weights at learning rate `lr`, and clear the gradients. Returns their norm, not clipped.

        Gradients are summed over ranks; every rank must call this. The norm is clipped to `grad_clip`. With
        `skip`, or if the norm is not finite, the weights stay as they are.
        """
        grads = []
        for param in self.params:
            grad = self.grad_sums.pop(param, param.grad)
            if grad is None:  # this rank had nothing to learn from; the others may have
                grad = torch.zeros_like(param, dtype=torch.float32)
            grads.append(sum_of_slices(grad))
        norm = math.sqrt(sum(gather([float(torch.nn.utils.get_total_norm(grads)) ** 2])))
        self.updates += 1
        for param, master, optimizer, grad in zip(self.params, self.masters, self.optimizers, grads):
            if math.isfinite(norm) and not skip:
                master.grad = grad.mul_(min(1.0, grad_clip / (norm + 1e-6))).to(master.device)
                optimizer.param_groups[0]["lr"] = lr
                optimizer.step()
                if param is not master:
                    param.copy_(from_slices(master.to(param.dtype), param))
            param.grad = master.grad = None
        return norm

    def state(self) -> dict[str, Tensor]:
        """All that a resumed run needs, by name: moments, step counts, float32 weights.

        The same for any number of ranks. Every rank must call this; only rank 0 gets the tensors.
        """
        named = {}
        for i, (param, master, optimizer) in enumerate(zip(self.params, self.masters, self.optimizers)):
            for name, value in {"master": master.detach(), **optimizer.state[master]}.items():
                if value.dim():  # a step count is a scalar and has no slices
                    value = from_slices(value, param)
                if distributed.rank() == 0:
                    alone = distributed.world_size() == 1
                    named[f"{name}.{i}"] = value.contiguous() if alone else value.cpu()
        return named

    @torch.no_grad()
    def load_state(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Restore what `state` returned, one tensor at a time. The model's weights are set too."""
        for name, value in named:
            key, _, index = name.rpartition(".")
            param, master, optimizer = (x[int(index)] for x in (self.params, self.masters, self.optimizers))
            if key == "master":
                master.copy_(my_slice(value))
                param.copy_(value)
            else:
                value = my_slice(value) if value.dim() else value
                optimizer.state[master][key] = value.to(master.device, copy=distributed.world_size() > 1)


def learning_rate(step: int, steps: int, peak: float, warmup: int, decay: bool) -> float:
    """Linear warm-up, then constant or, with `decay`, falling linearly to a tenth. Steps count from 1."""
    fall = 1.0 - 0.9 * max(0, step - warmup) / max(1, steps - warmup) if decay else 1.0
    return peak * min(1.0, step / max(1, warmup)) * fall
