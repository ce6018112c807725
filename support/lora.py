"""LoRA by hand: two thin matrices beside each linear map of a layer, which alone are trained."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

LORA_SCALE = 2.0  # peft's lora_alpha / r


class LoRALinear(torch.nn.Linear):
    """y = W x + 2 B A x (arXiv 2106.09685, equation 3). W is frozen; A [r, in] and B [out, r] are float32."""

    def __init__(self, linear: torch.nn.Linear, rank: int):
        """Take over the weight and bias of `linear`. B begins as zeros, so nothing changes yet."""
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        device, bound = linear.weight.device, linear.in_features ** -0.5
        A = torch.empty(rank, linear.in_features, device=device).uniform_(-bound, bound)
        self.lora_A = torch.nn.Parameter(A)
        self.lora_B = torch.nn.Parameter(torch.zeros(linear.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        thin = F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        return super().forward(x) + LORA_SCALE * thin


def add_lora(model, rank: int, seed: int = 0) -> None:
    """Freeze the model and replace the linear modules of its layers by LoRALinear."""
    torch.manual_seed(seed)
    for layer in model.requires_grad_(False).base_model.layers:
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(parent, name, LoRALinear(child, rank))


@torch.no_grad()
def merged_state(model) -> dict[str, Tensor]:
    """The state dict of the plain model that computes the same. Merged weights are in host memory."""
    state = {name: x for name, x in model.state_dict().items() if ".lora_" not in name}
    for name, m in model.named_modules():
        if isinstance(m, LoRALinear):
            state[f"{name}.weight"] = (m.weight + LORA_SCALE * m.lora_B @ m.lora_A).to(m.weight.dtype).cpu()
    return state


def save_adapter(model, folder: Path, base: str) -> None:
    """Write LoRA's A and B, if the model has any, as an adapter of `base` that peft and vLLM can load."""
    tensors = {f"base_model.model.{name}.weight": p.detach() for name, p in model.named_parameters()
               if ".lora_" in name}
    if not tensors:
        return
    rank = next(len(x) for name, x in tensors.items() if "lora_A" in name)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank,
              "lora_alpha": LORA_SCALE * rank, "target_modules": sorted({n.split(".")[-3] for n in tensors})}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
