"""Which architectures our forward pass covers, and a miniature of one to compare it on."""

from __future__ import annotations

import copy

import torch
from transformers import AutoModelForCausalLM

from support.cli import InputError


def check_supported(config) -> None:
    """InputError for a configuration that asks for what our forward pass does not do."""
    kind, rope = config.model_type, (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if kind not in ("qwen2", "qwen3", "llama", "mistral") or rope in ("dynamic", "longrope"):
        raise InputError(f"{kind} with {rope} position embeddings: only Qwen2, Qwen3, Llama and Mistral are "
                         "supported, with embeddings that do not change with the length of the text")
    if getattr(config, "quantization_config", None):
        raise InputError("its weights are quantised, which can neither be trained nor read here; use the "
                         "unquantised model, or for reranking a server that reads them")
    layers = set(getattr(config, "layer_types", None) or [])
    if getattr(config, "sliding_window", None) or layers - {"full_attention"}:
        raise InputError(f"{kind} with sliding windows: only full attention in every layer is supported")


@torch.no_grad()
def miniature(config):
    """A float32 model of the same architecture: two small layers, all weights random, biases too."""
    config, small = copy.deepcopy(config), {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 48, "layer_types": ["full_attention"] * 2,
        "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    for name in small:
        if getattr(config, name, None) is not None:
            setattr(config, name, small[name])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    for p in model.parameters():
        p.normal_(0.0 if p.dim() > 1 else 1.0, 0.2)
    return model
