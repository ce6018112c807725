"""Model folders of others: a fault is one line that names its cause. Other libraries can load ours."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import change, quick, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from model import Agent, load_agent
from support.checkpoint import reading, write_model
from support.cli import InputError
from support.lora import add_lora, save_adapter
from support.optimizer import MasterAdamW
from support.run_folder import RunFolder

ROOT = Path(__file__).parent.parent


def change_tensors(folder, tensors: dict) -> None:
    """Add or replace these tensors in model.safetensors."""
    path = folder / "model.safetensors"
    save_file(load_file(path) | tensors, path, {"format": "pt"})


# --- files


@pytest.mark.parametrize("file, entries, cause", [
    ("tokenizer.json", {"pre_tokenizer": {"type": "OfALaterLibrary"}}, "PreTokenizer"),
    ("tokenizer.json", {"model": {"type": "OfALaterLibrary", "vocab": {}}}, "Model"),
    ("tokenizer_config.json", {"eos_token": {"content": "x", "new": 1}}, "eos_token"),
    ("tokenizer_config.json", {"tokenizer_class": 5}, "TypeError"),
    ("config.json", {"model_type": "of_a_later_library"}, "of_a_later_library"),
    ("config.json", {"model_type": ["qwen2"]}, "TypeError"),
    ("config.json", {"hidden_size": "64"}, "hidden_size.*str"),
    ("config.json", {"num_attention_heads": 0}, "ZeroDivisionError"),
    ("config.json", {"hidden_act": "of_a_later_library"}, "of_a_later_library"),
    ("config.json", {"dtype": "float12"}, "float12"),
    ("config.json", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "factor"),
    ("generation_config.json", {"cache_implementation": "of_a_later_library"}, "of_a_later_library")])
def test_what_a_library_cannot_read_is_named_with_the_versions_that_may_be_too_old(saved, refusal, file,
                                                                                  entries, cause):
    change(saved / file, **entries)
    newer = r"newer libraries than transformers [\d.]+ and tokenizers [\d.]+"
    assert re.search(rf"{re.escape(file)}.* cannot be loaded \(.*{cause}.*{newer}", refusal(saved))


def test_a_panic_in_the_tokenizers_library_is_one_line_too(saved):
    """A Rust panic is a BaseException, not an Exception. (The library has already written to stderr.)"""
    change(saved / "tokenizer.json", normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})
    with pytest.raises(InputError, match="tokenizer.json.*cannot be loaded"):
        load_agent(str(saved), "cpu")


def test_only_faults_become_input_errors_and_the_librarys_own_warnings_come_back():
    before = logging.get_verbosity()
    for stop in (KeyboardInterrupt, SystemExit):
        with pytest.raises(stop), reading("m", "config.json"):
            assert logging.get_verbosity() == logging.ERROR != before
            raise stop
        assert logging.get_verbosity() == before


class RunsCode:
    """Creates a file when it is unpickled. Tests check that this does not happen."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_no_code_of_a_folder_is_run_and_nobody_is_asked(saved, refusal, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    ran = saved / "ran"
    (saved / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    code = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    change(saved / "config.json", auto_map=code)
    change(saved / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Tokenizer", None]})
    agent = load_agent(str(saved), "cpu")  # a known model type: transformers uses its own code
    write_model(agent, saved.parent / "written")
    for file in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads((saved.parent / "written" / file).read_text())
    change(saved / "config.json", model_type="of_the_folders_own")
    assert refusal(saved).startswith("config.json cannot be loaded (ValueError: ")
    change(saved / "config.json", model_type="qwen2")
    torch.save({"x": RunsCode(ran)}, saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    assert refusal(saved).startswith("pytorch_model.bin ")
    assert not ran.exists()


def test_a_config_that_asks_for_an_attention_that_is_not_installed_loads(saved):
    change(saved / "config.json", _attn_implementation="flash_attention_2")
    load_agent(str(saved), "cpu")


@pytest.mark.slow
def test_a_fault_of_the_model_ends_the_command_with_status_2_and_one_line(saved, tmp_path):
    tensors = load_file(saved / "model.safetensors")
    del tensors["model.norm.weight"]  # transformers reports this with a table, after its progress bar
    save_file(tensors, saved / "model.safetensors", {"format": "pt"})
    candidates, output = tmp_path / "c.jsonl", tmp_path / "run.trec"
    candidates.write_text('{"query": "a", "hits": [{"qid": "1", "docid": "1", "content": "b"}]}\n')
    command = [sys.executable, "rearank.py", "--model", saved, "--input", candidates, "--output", output]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 2 and len(ran.stderr.splitlines()) == 1 and "model.norm.weight" in ran.stderr
    assert not list(tmp_path.glob("run*"))


# --- adapters


def test_an_adapter_is_named_with_its_base_and_what_to_pass_instead(saved, tmp_path, refusal):
    model = tiny_model()
    add_lora(model, 2)
    (tmp_path / "run").mkdir()
    save_adapter(model, tmp_path / "run/adapter", "Qwen/Qwen2.5-7B")
    adapter = tmp_path / "run/adapter"
    said = "adapter_config.json says that this is a LoRA adapter of Qwen/Qwen2.5-7B; "
    assert refusal(adapter) == said + "merge it into its base (peft's merge_and_unload) and pass the result"
    saved.rename(tmp_path / "run/checkpoint")  # as in a run of ours
    assert refusal(adapter) == said + f"pass {tmp_path}/run/checkpoint, where it is merged"


def test_an_adapter_beside_weights_is_not_passed_over(saved, refusal):
    change(saved / "adapter_config.json", peft_type="LORA", base_model_name_or_path="base")
    assert re.match("adapter_config.json .*adapter of base; merge it .*or remove", refusal(saved))


# --- weights


def test_weights_that_are_not_finite_are_named(saved, refusal):
    for name, value in (("model.norm.weight", torch.inf), ("model.layers.1.mlp.up_proj.weight", torch.nan)):
        tensor = load_file(saved / "model.safetensors")[name]
        spoilt = tensor.clone()
        spoilt.view(-1)[7] = value
        change_tensors(saved, {name: spoilt})
        assert refusal(saved).startswith(f"{name} holds NaN or infinity")
        change_tensors(saved, {name: tensor})
    load_agent(str(saved), "cpu")


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.o_proj.bias", "model.layers.3.mlp.up_proj.weight",
                                  "model.layers.0.self_attn.q_proj.lora_A.weight", "lm_head.bias"])
def test_weights_that_the_config_has_no_place_for_are_named(saved, refusal, name):
    """transformers ignores such weights, so it would compute the outputs of another model."""
    change_tensors(saved, {name: torch.ones(64)})
    assert refusal(saved).startswith(f"its weights hold {name}")


def test_weights_outside_the_language_model_are_left_out(saved):
    change_tensors(saved, {"v_head.weight": torch.ones(1, 64), "model.rotary_emb.inv_freq": torch.ones(8)})
    load_agent(str(saved), "cpu")


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("own_head", [False, True])
def test_a_written_checkpoint_says_whether_the_head_is_tied(saved, toy, tmp_path, own_head, lora):
    """Some configs say "tied" although a head is saved. Other loaders then use the embeddings as the head."""
    if own_head:
        change_tensors(saved, {"lm_head.weight": torch.randn_like(toy.model.lm_head.weight)})
    agent, ids = load_agent(str(saved), "cpu"), torch.tensor([[5, 6, 7]])
    assert agent.model.config.tie_word_embeddings  # as in the folder's config
    if lora:
        add_lora(agent.model, 2)
    write_model(agent, tmp_path / "written")
    config = json.loads((tmp_path / "written/config.json").read_text())
    tensors = load_file(tmp_path / "written/model.safetensors")
    assert config["tie_word_embeddings"] == (not own_head) == ("lm_head.weight" not in tensors)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "written")
    if config["tie_word_embeddings"]:  # as loaders do that trust the config
        theirs.lm_head.weight = theirs.model.embed_tokens.weight
    torch.testing.assert_close(theirs(ids).logits, agent.model(ids).logits)


def test_scaled_position_embeddings_are_written_for_older_readers_too(tmp_path, toy):
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
    model = tiny_model(kind="llama", rope_parameters=rope)
    write_model(Agent(model, toy.tokenizer, [1]), tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["rope_theta"] == 500.0 and config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    again, ids = load_agent(str(tmp_path / "model"), "cpu"), torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(again.model(ids).logits, model(ids).logits)


# --- tokenizers


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(saved, toy, refusal):
    toy.tokenizer.add_tokens(["<|im_start|>"])
    toy.tokenizer.save_pretrained(saved)
    assert refusal(saved).startswith("its tokenizer has the id 68 for '<|im_start|>'")
    change(saved / "tokenizer_config.json", pad_token="<|im_start|>")
    load_agent(str(saved), "cpu")  # allowed: the padding token is never used


@pytest.mark.parametrize("declared", [None, "OfALaterLibrary", "TokenizersBackend"])
def test_the_tokenizer_is_the_folders_own_whatever_class_it_declares(saved, toy, declared):
    """With the declared class, transformers would apply Qwen's splitting rules and know none of the words."""
    change(saved / "tokenizer_config.json", tokenizer_class=declared)
    if declared is None:
        (saved / "tokenizer_config.json").unlink()
    tokenizer, text = load_agent(str(saved), "cpu").tokenizer, "rain bread [3] > <answer>"
    assert tokenizer(text)["input_ids"] == toy.tokenizer(text)["input_ids"]


def test_a_folder_without_a_vocabulary_is_refused(saved, monkeypatch):
    """transformers creates an empty tokenizer if the folder has none."""
    monkeypatch.setattr("model.check_folder", lambda name: "")  # as for a model on the hub
    change(saved / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    (saved / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="its tokenizer has no vocabulary"):
        load_agent(str(saved), "cpu")


def test_the_folder_of_a_run_names_the_checkpoint_to_pass(saved, tmp_path, refusal):
    (tmp_path / "run/saves").mkdir(parents=True)
    saved.rename(tmp_path / "run/checkpoint")
    (tmp_path / "run/config.json").write_text('{"seed": 0}')
    assert refusal(tmp_path / "run") == (
        f"this is the folder of a run of grpo.py; pass {tmp_path / 'run/checkpoint'}")


def test_a_checkpoint_has_the_names_that_older_readers_look_for(toy, tmp_path):
    """transformers 4 uses rope_theta = 10,000 if it does not find the value at the top level."""
    settings, umask = quick(tmp_path), os.umask(0o022)
    try:
        RunFolder(settings).save(toy, MasterAdamW(list(toy.model.parameters())), "grpo", 1)
    finally:
        os.umask(umask)
    config = json.loads((tmp_path / "run/checkpoint/config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100.0
    assert config["torch_dtype"] == "float32"
    tokenizer = json.loads((tmp_path / "run/checkpoint/tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    files = [*(tmp_path / "run/checkpoint").iterdir(), *(tmp_path / "run/saves").glob("*/state/*")]
    assert {oct(f.stat().st_mode & 0o777) for f in files} == {"0o644"} and len(files) > 4
    again = load_agent(str(tmp_path / "run/checkpoint"), "cpu")
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(again.model(ids).logits, toy.model(ids).logits)
    text = "rain [1] > <answer>"
    assert again.tokenizer(text)["input_ids"] == toy.tokenizer(text)["input_ids"]
