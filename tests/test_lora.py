"""support/lora.py: gradients against those of the merged model, shared base weights, saved adapters."""

import copy
import csv
import json

import pytest
import torch
from conftest import arguments, one_window, quick, random_prompts, tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import grpo
from grpo import grpo_loss, train
from model import load_agent, microbatches, sample
from support.lora import LORA_SCALE, LoRALinear, add_lora, merged_state, save_adapter
from support.memory import count_parameters
from support.optimizer import MasterAdamW
from support.run_folder import RunFolder
from toy import toy_agent


def moved(model, rank: int = 3):
    """Add LoRA with a random B instead of 0, as after some training. Returns the model."""
    add_lora(model, rank)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, 0, 0.1)
    return model


def merged_model(model):
    plain = tiny_model(seed=5)
    plain.load_state_dict(merged_state(model))
    return plain


def test_nothing_changes_at_first_and_only_the_thin_matrices_are_trained(model):
    ids, before = torch.tensor(random_prompts(9)), copy.deepcopy(model)
    add_lora(model, 3)
    assert torch.equal(model(ids).logits, before(ids).logits)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 7 and all(".lora_" in name and 3 in p.shape for name, p in trained)
    assert sum(p.numel() for _, p in trained) == count_parameters(model.config, 3)
    # Per layer, four projections of attention and three of the MLP.
    assert sum(isinstance(m, LoRALinear) for m in model.modules()) == 2 * 7


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_merged_models_by_the_chain_rule(checkpointing):
    """With W' = W + s B A, the chain rule gives dB = s dW' A^T and dA = s B^T dW'."""
    model = moved(tiny_model())
    plain = merged_model(model)
    prompts, answers = random_prompts(14, 30), random_prompts(3, 9, 1, 6, seed=1)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
    for m in (model, plain):
        for batch in microbatches(m, prompts, answers, microbatch_tokens=12, checkpointing=checkpointing):
            grpo_loss(batch.logps, None, advantages[batch.rows], batch.lengths, 0.0).backward()
    compared = 0
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            dW = plain.get_submodule(name).weight.grad
            dB, dA = LORA_SCALE * dW @ module.lora_A.T, LORA_SCALE * module.lora_B.T @ dW
            torch.testing.assert_close(module.lora_B.grad, dB, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(module.lora_A.grad, dA, atol=1e-5, rtol=1e-4)
            assert module.weight.grad is None and module.lora_A.grad.abs().max() > 1e-4
            compared += 1
    assert compared == 14


def test_sampling_is_the_merged_models():
    model = moved(tiny_model())
    prompts = random_prompts(14, 30)
    ours, plain = (sample(m, prompts, 3, 12, 1.0, [3], seed=4) for m in (model, merged_model(model)))
    assert ours == plain


def test_in_bfloat16_the_thin_matrices_stay_float32_and_learn():
    model = tiny_model().to(torch.bfloat16)
    add_lora(model, 3)
    optimizer = MasterAdamW(list(model.parameters()))
    assert not optimizer.hooks and len(optimizer.params) == 28  # float32 needs no masters
    for batch in microbatches(model, random_prompts(14), random_prompts(3, 9)):
        batch.logps.sum().backward()
    assert optimizer.step(1e-4, 1.0) > 0
    assert all(p.dtype == torch.float32 and p.abs().max() > 0 for p in optimizer.params)


def test_the_adapter_on_the_base_is_the_merged_checkpoint(tmp_path):
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    model = moved(copy.deepcopy(base))
    save_adapter(model, tmp_path / "adapter", str(tmp_path / "base"))
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert config["r"] == 3 and config["lora_alpha"] == 6 and len(tensors) == 28
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj",
                                        "v_proj"]
    for name, W in base.state_dict().items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{key}A.weight" in tensors:
            W = W + config["lora_alpha"] / config["r"] * tensors[f"{key}B.weight"] @ tensors[f"{key}A.weight"]
        torch.testing.assert_close(merged_state(model)[name], W)


def test_peft_reads_the_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    base, ids = tiny_model(), torch.tensor(random_prompts(9))
    base.save_pretrained(tmp_path / "base")
    model = moved(copy.deepcopy(base))
    save_adapter(model, tmp_path / "adapter", str(tmp_path / "base"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(again, tmp_path / "adapter")
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits)


def test_a_lora_run_has_one_copy_of_the_weights_and_resumes_as_the_unbroken_one(tmp_path, monkeypatch):
    references, honest = [], grpo.policy_microbatches

    def recorded(agent, reference, *more):
        references.append(reference)
        return honest(agent, reference, *more)

    monkeypatch.setattr(grpo, "policy_microbatches", recorded)

    def run(name, steps, **changes):
        settings = quick(tmp_path, out=str(tmp_path / name), steps=steps, reward="random", beta=0.05, lr=1e-2,
                         lora_rank=2, decay=False, **changes)
        agent = toy_agent(0)
        add_lora(agent.model, 2)
        train(agent, one_window(), settings, RunFolder(settings))
        return agent

    agent = run("whole", 4)
    fresh = toy_agent(0).model
    for name, p in agent.model.named_parameters():
        other = references[0].get_parameter(name)
        assert (other is p) == (".lora_" not in name)
        assert ".lora_" in name or torch.equal(p, fresh.get_parameter(name))
    log = list(csv.DictReader(open(tmp_path / "whole/log.csv")))
    assert float(log[0]["kl"]) < 1e-6 and float(log[-1]["kl"]) > 1e-4
    run("broken", 2)
    run("broken", 4, resume=True)
    state = "saves/grpo-000004/state/optimizer.safetensors"
    for file in ("checkpoint/model.safetensors", "adapter/adapter_model.safetensors", state):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "broken" / file).read_bytes()
    assert len(load_file(tmp_path / "whole" / state)) == 4 * len(references[0].model.layers) * 14
    ids = torch.tensor([[5, 6, 7]])
    again = load_agent(str(tmp_path / "whole/checkpoint"), "cpu").model
    torch.testing.assert_close(again(ids).logits, agent.model(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_model_folder_trains_with_lora_also_after_supervised_steps(folder):
    data = ["--data", str(folder / "i.jsonl"), "--lora-rank", "2", "--sft-steps", "2", "--sft-lr", "1e-2"]
    assert grpo.main(arguments(folder, *data)) == 0
    [row] = csv.DictReader(open(folder / "o/log.csv"))
    # The reference has learnt from the supervised steps too.
    assert float(row["kl"]) == pytest.approx(0, abs=1e-6)
    config = json.loads((folder / "o/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder / "m")
    folders = (folder / "o/saves/sft-000002/checkpoint", folder / "m")
    sft, before = (load_agent(str(path), "cpu").model for path in folders)
    assert not torch.equal(sft.model.layers[0].mlp.up_proj.weight, before.model.layers[0].mlp.up_proj.weight)


def test_a_warm_start_before_lora_has_no_adapter_to_save(toy, tmp_path):
    settings = quick(tmp_path, lora_rank=2)
    grpo.supervised(toy, iter([[([5, 6], [7, 1])]]), 1, 1e-3, settings, folder=RunFolder(settings))
    assert (tmp_path / "run/checkpoint").exists() and not (tmp_path / "run/adapter").exists()
