"""Fixtures and helpers that the tests share: tiny random models and small files. No network, no weights."""

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # must precede the import of transformers: no test asks the hub

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import grpo
import rearank
import toy as toy_task
from beside import Beside, Job
from fake_server import server  # noqa: F401 (a fixture)
from model import Agent, Completion, load_agent
from prompts import Shortened
from rearank import RerankSettings
from support.chat_replies import Answer
from support.cli import InputError
from support.files import Instance, write_candidates, write_instances, write_qrels
from support.prompt_file import read_prompt_file

torch.set_num_threads(1)  # the other cores are for the background jobs of beside.py


# --- background jobs: beside.py


@pytest.hookimpl(tryfirst=True)  # before -m deselects tests, so that it sees the mark `slow`
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("beside") is not None)
    for item in items:
        if item.get_closest_marker("beside"):
            item.add_marker("slow")


def pytest_collection_finish(session):
    session.beside = Beside()
    marked = [item for item in session.items if item.get_closest_marker("beside")]
    if marked and not session.config.option.collectonly:
        folder = session.config._tmp_path_factory.mktemp("beside")
        for item in marked:
            session.beside.add(item, folder)


def pytest_runtest_setup(item):
    item.session.beside.advance(1)


def pytest_sessionfinish(session):
    if hasattr(session, "beside"):
        session.beside.stop()


@pytest.fixture
def beside(request) -> Job:
    """The finished job of the command that this test's mark names."""
    return request.session.beside.result(request.node.job)


# --- models, settings and files


def tiny_model(seed: int = 0, kind: str = "qwen2", **changes) -> torch.nn.Module:
    """A random 2-layer model of transformers' type `kind`, with `changes` to its config.

    It has grouped-query attention (4 query heads, 2 key-value heads). Padding and end token share one id, as
    in many models.
    """
    torch.manual_seed(seed)
    small = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
             "initializer_range": 0.15, "eos_token_id": 3, "pad_token_id": 3, "bos_token_id": None}
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**small | changes)).eval()


def toy_settings(**changes) -> grpo.TrainSettings:
    """The settings of the toy run, with these changes."""
    return grpo.TrainSettings(**toy_task.TOY | changes)


def quick(tmp_path: Path, **changes) -> grpo.TrainSettings:
    """Settings of a short run in tmp_path / "run": two steps of one prompt and eight answers, all saved."""
    few = {"prompts_per_step": 1, "group_size": 8, "steps": 2, "max_new_tokens": 12, "beta": 0.0,
           "save_every": 1, "out": str(tmp_path / "run")}
    return toy_settings(**few | changes)


def one_window() -> list[Instance]:
    texts = ["oak leaf forest oak", "storm flour loan leaf"]
    return [Instance("q", "rain bread coin", ["a", "b"], texts, [0, 3], [0, 3])]


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def toy() -> Agent:
    """The toy run's own model and tokenizer, untrained."""
    return toy_task.toy_agent(seed=0)


@pytest.fixture
def folder(toy, tmp_path) -> Path:
    """A folder with a model (the toy's, in place of a real one), candidates, judgements and instances."""
    toy.model.save_pretrained(tmp_path / "m")
    toy.tokenizer.save_pretrained(tmp_path / "m")
    candidates, qrels = toy_task.toy_task(3, 12, seed=1)
    write_candidates(tmp_path / "c.jsonl", candidates)
    write_qrels(tmp_path / "q.txt", qrels)
    write_instances(tmp_path / "i.jsonl", one_window())
    return tmp_path


def arguments(folder: Path, *more: str) -> list[str]:
    """The command line of a short run of `python grpo.py --model`, with the files of the fixture `folder`."""
    return ["--model", str(folder / "m"), "--out", str(folder / "o"), "--prompt", "toy", "--window", "5",
            "--group-size", "2", "--prompts-per-step", "2", "--steps", "1", "--max-new-tokens", "5",
            "--device", "cpu", *more]


def random_prompts(*lengths: int, seed: int = 0, vocab: int = 97) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in lengths]


def full_logps(model, prompt: list[int], answer: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities [T] of an answer's tokens, by one plain forward pass over prompt and answer."""
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1:-1].float() / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


def relative_error(got, wanted) -> float:
    """The largest relative error (in norm) over pairs of tensors. Both lists must have the same length."""
    return max(float((a.float() - b).norm() / b.norm().clamp(min=1e-12))
               for a, b in zip(got, wanted, strict=True))


# --- model folders and prompt files


@pytest.fixture
def saved(toy, tmp_path):
    """A folder with the toy's model and tokenizer."""
    toy.model.save_pretrained(tmp_path / "m")
    toy.tokenizer.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def change(path, **entries) -> None:
    """Set these entries of a JSON file. The file is created if it does not exist."""
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | entries))


@pytest.fixture
def refusal(capfd):
    """A function that passes a faulty folder to load_agent and returns the error message.

    It checks that the message is one line and that nothing else is printed.
    """

    def load(folder) -> str:
        capfd.readouterr()
        with pytest.raises(InputError) as refused:
            load_agent(str(folder), "cpu")
        message = str(refused.value)
        assert message.startswith(f"--model {folder}: ") and message.isprintable()
        assert capfd.readouterr() == ("", "")
        return message.removeprefix(f"--model {folder}: ")

    return load


@pytest.fixture
def file(tmp_path):
    """A function that writes a prompt file and returns its path."""
    def write(text: str, name: str = "p.yaml") -> str:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        read_prompt_file.cache_clear()  # as in a new process
        return str(tmp_path / name)

    return write


# --- reranking


def perfect(seen=None):
    """A `rank_window` that sorts numbers, smallest first. Each window is appended to `seen`."""
    def rank_window(items):
        if seen is not None:
            seen.append(list(items))
        return sorted(range(len(items)), key=items.__getitem__)
    return rank_window


def reversing(monkeypatch, toy) -> None:
    """Replace the model by one that reverses every window."""
    def answers(model, prompts, *_, **__):
        sizes = [toy.tokenizer.decode(p).count("[") for p in prompts]  # a toy prompt numbers its passages
        orders = [" > ".join(f"[{i}]" for i in range(n, 0, -1)) for n in sizes]
        encoded = [toy.tokenizer(f"<answer> {order} </answer>")["input_ids"] + [1] for order in orders]
        return [[Completion(ids, True)] for ids in encoded]
    monkeypatch.setattr(rearank, "sample", answers)


def answering(monkeypatch, toy, answer: str) -> None:
    ids = toy.tokenizer(answer)["input_ids"] + [1]
    monkeypatch.setattr(rearank, "sample",
                        lambda model, prompts, *_, **__: [[Completion(ids, True)] for _ in prompts])


def words_in_order(seen=None):
    """A stand-in for the model. It names the two passages that come first in the alphabet."""
    def ask(self, asked, seeds, samples, progress):
        replies = []
        for query, passages in asked:
            if seen is not None:
                seen.append((query, "".join(passages), samples))
            best = sorted(range(len(passages)), key=lambda i: passages[i])[:2]
            text = "<answer> " + " > ".join(f"[{i + 1}]" for i in best) + " </answer>"
            replies.append((Shortened(False, 0, 400), [Answer(text, 5, 7)] * samples))
        return replies
    return ask


def settings_of(folder: Path, **changes) -> RerankSettings:
    """Settings of a reranking run that reads folder/c.jsonl and writes folder/r."""
    files = {"input": str(folder / "c.jsonl"), "output": str(folder / "r")}
    return RerankSettings(**{**files, "prompt": "toy", "max_new_tokens": 4, **changes})


def file_options(folder) -> list[str]:
    """Write candidates to folder/c.jsonl. Returns the options of a short run over them, without --output."""
    write_candidates(folder / "c.jsonl", toy_task.toy_task(4, 5, seed=0)[0])
    return ["--model", "m", "--prompt", "toy", "--max-new-tokens", "4", "--max-num-seqs", "2",
            "--device", "cpu", "--input", str(folder / "c.jsonl")]
