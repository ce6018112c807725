"""Read a model's files with clear errors. Write files that transformers 4 and 5, vLLM and peft can load."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import tokenizers
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config, tokenizer_class_from_name
from transformers.utils import find_adapter_config_file, logging

from support.cli import InputError
from support.device import out_of_memory
from support.download import hub_answers
from support.lora import merged_state
from support.model_files import OPTIONAL, VOCABULARY, WEIGHTS, check_content, present, read_json


@contextlib.contextmanager
def reading(name: str, what: str):
    """Turn any error raised while `what` of model `name` is read into an InputError of one line.

    On damaged files the libraries raise exceptions of every kind; a panic in tokenizers' Rust code is not
    even an Exception. transformers' warnings are silenced, and its progress bars if stderr is no terminal.
    """
    try:
        with quiet(bars=sys.stderr.isatty()):
            yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        reason = "".join(c for c in " ".join(str(error).split()) if c.isprintable())
        if out_of_memory(error):
            reason = "too little memory; use a smaller model"
        elif not isinstance(error, InputError):
            advice = "without a network, pass a folder that `hf download` has written elsewhere"
            if Path(name).is_dir():
                advice = (f"it may be damaged, or need newer libraries than transformers "
                          f"{transformers.__version__} and tokenizers {tokenizers.__version__}")
            reason = f"{what} cannot be loaded ({type(error).__name__}: {reason[:200]}); {advice}"
        raise InputError(f"--model {name}: {reason}") from None


@contextlib.contextmanager
def quiet(bars: bool = False):
    """Silence transformers' warnings and, without `bars`, its progress bars."""
    verbosity, enabled = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if enabled:
            logging.enable_progress_bar()


def read_config(name: str):
    """The configuration of a model, and the keyword arguments with which to load the rest.

    Code in the folder is never run: transformers would ask for consent and wait for the answer.
    """
    folder = Path(name)
    a_path = name.startswith((".", "/", "~")) or folder.exists() or name.count("/") != 1
    local = a_path or not hub_answers()
    with reading(name, "config.json"):
        if a_path and not folder.is_dir():
            raise InputError("no such model folder (one with config.json, as save_pretrained writes it; or "
                             "pass a hub name like Qwen/Qwen2.5-7B)")
        if (folder / "checkpoint/config.json").is_file():
            raise InputError(f"this is the folder of a run of grpo.py; pass {folder / 'checkpoint'}")
        if adapter := find_adapter_config_file(name, local_files_only=local):
            raise adapter_error(Path(adapter).absolute())
        if a_path:
            check_content(present(folder, ["config.json"]))
        source = {"local_files_only": local, "trust_remote_code": False}
        config = AutoConfig.from_pretrained(name, **source)
    config._attn_implementation = "eager"  # always installed, and not used: attention is ours
    return config, source


def check_folder(name: str) -> str:
    """Check the files of a model folder. Returns the name of the file of weights, or of their index.

    InputError names a file that is absent, damaged or a stand-in. A name on the hub is not checked.
    """
    folder = Path(name)
    if not folder.is_dir():
        return "its weights"
    with reading(name, "model.safetensors.index.json"):
        weights = present(folder, WEIGHTS)
        files = [weights, present(folder, VOCABULARY)]
        files += [path for path in sorted(folder.iterdir()) if path.name in OPTIONAL]
        if weights.suffix == ".json":
            files += [folder / shard for shard in sorted(set(read_json(weights)["weight_map"].values()))]
        for path in files:
            check_content(path)
    return weights.name


def load_weights(name: str, weights: str, config, dtype: str, device, **source):
    """The model on `device`. `weights` names the file in messages.

    InputError names a tensor that the config or the weights lack, or that is not finite. transformers ignores
    tensors for which the config has no place. In the layers or the head they belong to the forward pass.
    """
    with reading(name, f"{weights} or generation_config.json"):
        model, found = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True,
            **source)
        model = model.to(device).eval()
        faults = [f"its config asks for {tensor}, which its weights lack" for tensor in found["missing_keys"]]
        faults += [f"{tensor} is {list(there)} in its weights, {list(wanted)} by its config"
                   for tensor, there, wanted in found["mismatched_keys"]]
        faults += [f"its weights hold {tensor}, for which its config has no place"
                   for tensor in found["unexpected_keys"] if tensor.startswith(("model.", "lm_head."))]
        faults += [f"{tensor} holds NaN or infinity; its weights are damaged, or too large for {p.dtype}"
                   for tensor, p in model.named_parameters() if not p.isfinite().all()]
        if faults:
            raise InputError(min(faults))
    return model


def load_tokenizer(name: str, **source):
    """The tokenizer that a checkpoint declares, or its plain tokenizer.json if we do not know the class.

    For an unknown class AutoTokenizer would use Qwen2's splitting rules, which do not fit the toy's words.
    """
    declared = get_tokenizer_config(name, **source).get("tokenizer_class")
    known = tokenizer_class_from_name(declared) if declared else None
    generic = known in (None, PreTrainedTokenizerFast)
    return (PreTrainedTokenizerFast if generic else AutoTokenizer).from_pretrained(name, **source)


def adapter_error(config: Path) -> InputError:
    """The error for an adapter, which we do not load: it names the base and what to pass instead."""
    base, merged = read_json(config).get("base_model_name_or_path"), config.parent.with_name("checkpoint")
    advice = "merge it into its base (peft's merge_and_unload) and pass the result"
    if config.parent.name == "adapter" and (merged / "config.json").is_file():
        advice = f"pass {merged}, where it is merged"
    elif config.with_name("config.json").is_file():
        advice += ", or remove adapter_config.json if the weights beside it have it merged"
    return InputError(f"adapter_config.json says that this is a LoRA adapter of {base}; {advice}")


def check_tokenizer(tokenizer, rows: int) -> None:
    """InputError unless the tokenizer has a vocabulary, ids below `rows` and a chat template."""
    if not tokenizer("Is it [1]?")["input_ids"]:
        raise InputError("its tokenizer has no vocabulary; is tokenizer.json missing?")
    # Padding tokens are often added without an embedding. We do not use them.
    words = {i: word for word, i in tokenizer.get_vocab().items() if word != tokenizer.pad_token}
    if (top := max(words)) >= rows:
        raise InputError(f"its tokenizer has the id {top} for {words[top]!r}, and the model has only {rows} "
                         "embeddings; they are of two models, or the embeddings were not resized")
    if not tokenizer.chat_template:
        raise InputError("its tokenizer has no chat template; use the model's instruct variant, or put a "
                         "chat_template.jinja into its folder")


def find_stop_ids(model, tokenizer) -> list[int]:
    """Every id that ends a turn: a base model's own end token is rarely the one its chat template writes."""
    ids = {tokenizer.eos_token_id}
    for configured in (model.generation_config.eos_token_id, model.config.eos_token_id):
        ids |= set(configured if isinstance(configured, list) else [configured])
    vocabulary = tokenizer.get_vocab()
    ids |= {vocabulary.get(mark) for mark in ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")}
    return sorted(i for i in ids if isinstance(i, int))


def write_model(agent, folder: Path) -> None:
    """Write model and tokenizer, LoRA merged into the weights, in the form that other libraries read.

    transformers 4, and engines built on it, read RoPE's base and the precision under their older names (and
    take 10,000 for a base they do not find), and do not know the tokenizer class of transformers 5.
    """
    with quiet():  # transformers' bar would break up our own
        agent.model.save_pretrained(folder, state_dict=merged_state(agent.model))
    agent.tokenizer.save_pretrained(folder)
    config, tokenizer = (read_json(folder / name) for name in ("config.json", "tokenizer_config.json"))
    rope = config.get("rope_parameters") or {}
    config |= {"rope_theta": rope.get("rope_theta", 10_000.0), "torch_dtype": config.get("dtype")}
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    # A config may have said "tied" beside a head of its own, which other loaders would then drop.
    config["tie_word_embeddings"] = agent.model.lm_head.weight is agent.model.get_input_embeddings().weight
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name, content in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        content.pop("auto_map", None)  # names code in the model's folder, which was neither run nor copied
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
