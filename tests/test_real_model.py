"""Checks of a real model's tokenizer, template and weights. REARANK_TEST_MODEL names its folder."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import full_logps
from test_memory import cpu_corrections

from grpo import TrainSettings, grpo_loss
from model import load_agent, load_config, microbatches, sample
from prompts import encode_prompt
from rearank import Reranker
from support.checkpoint import write_model
from support.cli import InputError
from support.memory import count_parameters, memory_rows
from support.optimizer import MasterAdamW

FOLDER = os.environ.get("REARANK_TEST_MODEL", "")
pytestmark = pytest.mark.skipif(not FOLDER, reason="REARANK_TEST_MODEL is not set")
QUERY = "how do bees make honey"
PASSAGES = ["Beeswax candles smell of honey.", "Foragers bring nectar to the hive, where fanning dries it."]


@pytest.fixture(scope="module")
def agents():
    """{dtype: the model in this precision}."""
    return {dtype: load_agent(FOLDER, "cpu", dtype) for dtype in ("float32", "bfloat16")}


def test_greedy_answers_are_those_of_generate(agents):
    agent = agents["float32"]
    prompt = encode_prompt(agent.tokenizer, QUERY, PASSAGES)
    [[answer]] = sample(agent.model, [prompt], 1, 24, 0.0, agent.stop_ids)
    wanted = agent.model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24,
                                  eos_token_id=agent.stop_ids, pad_token_id=agent.stop_ids[0])
    assert answer.ids == wanted[0, len(prompt):].tolist()


def test_bfloat16_log_probabilities_are_near_those_of_float32(agents):
    prompt = encode_prompt(agents["float32"].tokenizer, QUERY, PASSAGES)
    text = "<think> [2] says how. </think> <answer> [2] > [1] </answer>"
    answer = agents["float32"].tokenizer(text)["input_ids"]
    logps = {}
    with torch.no_grad():
        for dtype, agent in agents.items():
            [batch] = microbatches(agent.model, [prompt], [answer])
            logps[dtype] = batch.logps[0]
        exact = full_logps(agents["float32"].model, prompt, answer)
        theirs = full_logps(agents["bfloat16"].model, prompt, answer)
    torch.testing.assert_close(logps["float32"], exact, atol=1e-3, rtol=0)
    ours, peers = ((x - exact).abs().mean() for x in (logps["bfloat16"], theirs))
    assert ours < 1.5 * peers + 0.01  # no further from float32 than transformers' own bfloat16


def test_an_update_in_bfloat16_and_its_checkpoint(agents, tmp_path):
    agent = agents["bfloat16"]
    prompt = encode_prompt(agent.tokenizer, QUERY, PASSAGES)
    groups = sample(agent.model, [prompt], 4, 12, 1.0, agent.stop_ids, seed=1)
    answers = [answer.ids for answer in groups[0]]
    optimizer = MasterAdamW(list(agent.model.parameters()), offload=True)
    before = agent.model.model.layers[0].mlp.up_proj.weight.clone()
    for batch in microbatches(agent.model, [prompt], answers, checkpointing=True):
        advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])[batch.rows]
        grpo_loss(batch.logps, None, advantages, batch.lengths, 0.0).backward()
    assert 0 < optimizer.step(1e-3, 1.0) < float("inf")
    assert not torch.equal(before, agent.model.model.layers[0].mlp.up_proj.weight)
    write_model(agent, tmp_path / "checkpoint")
    again = load_agent(str(tmp_path / "checkpoint"), "cpu", "bfloat16")
    assert again.stop_ids == agent.stop_ids
    assert encode_prompt(again.tokenizer, QUERY, PASSAGES) == prompt
    for a, b in zip(agent.model.parameters(), again.model.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype, mean, largest", [("float32", 1e-4, 1e-3), ("bfloat16", 0.1, 1.0)])
def test_the_sampler_and_the_update_agree_on_log_probabilities(agents, dtype, mean, largest):
    """The log's logp_diff and logp_diff_max measure this. In bfloat16: 0.034 and 0.16 (2026-11-25)."""
    agent = agents[dtype]
    prompt = encode_prompt(agent.tokenizer, QUERY, PASSAGES)
    [answers] = sample(agent.model, [prompt], 4, 24, 1.0, agent.stop_ids, seed=1)
    with torch.no_grad():
        apart = torch.cat([
            (logps[:length] - torch.tensor(answers[row].logps)).abs()
            for batch in microbatches(agent.model, [prompt], [answer.ids for answer in answers])
            for row, logps, length in zip(batch.rows.tolist(), batch.logps, batch.lengths.tolist())])
    assert 0 < apart.mean() < mean and apart.max() < largest


def test_an_untrained_model_is_reranked_by_and_counted_honestly(agents):
    ranking = Reranker(agents["bfloat16"], max_new_tokens=24).rank(QUERY, PASSAGES)
    assert sorted(result.index for result in ranking) == [0, 1]
    assert ranking.windows[0].status in ("ok", "repaired", "untagged", "truncated", "malformed", "empty")


UPDATE = """
import resource, sys
from model import load_agent, microbatches

def update(P, T, G):
    for batch in microbatches(model, [[1] * P], [[1] * T] * G, microbatch_tokens=1024, checkpointing={again}):
        batch.logps.sum().backward()

model = load_agent(sys.argv[1], "cpu", "float32").model
update(8, 4, 2)  # leaves gradients, as an earlier micro-batch does
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
update(2200, 128, 8)
status = open("/proc/self/status").read()  # getrusage's maximum starts at the parent's size
print(int(status.split("VmHWM:")[1].split()[0]) * 1024 - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("again", [True, False])
def test_the_plan_is_within_15_percent_of_what_the_process_takes(again):
    config, _ = load_config(FOLDER)
    settings = TrainSettings(beta=0.0, checkpointing=again, group_size=8, max_num_seqs=8,
                             microbatch_tokens=1024, prompt_batch_tokens=2200, max_prompt_tokens=2200,
                             max_new_tokens=128)
    table = memory_rows(config, count_parameters(config), settings, 4)
    there = ("weights", "masters and moments", "gradients in float32")
    planned = sum(update for what, (_, update, _) in table.items() if what not in there)
    planned += cpu_corrections(config, settings, 1 if again else config.num_hidden_layers)
    done = subprocess.run([sys.executable, "-c", UPDATE.format(again=again), FOLDER], capture_output=True,
                          text=True, check=True, cwd=Path(__file__).parents[1],
                          env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "100000"})  # return freed memory
    standing = 8 * count_parameters(config)  # weights and gradients, which existed before
    assert planned + standing == pytest.approx(int(done.stdout) + standing, rel=0.15)


@pytest.mark.skipif(not importlib.util.find_spec("uvicorn") or not importlib.util.find_spec("fastapi"),
                    reason='needs pip install "transformers[serving]"')
def test_a_real_server_is_a_policy():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = Path(sys.executable).with_name("transformers")
    with subprocess.Popen([command, "serve", FOLDER, "--host", "127.0.0.1", "--port", str(port)],
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            reranker, deadline = None, time.time() + 120
            while not reranker:
                assert process.poll() is None and time.time() < deadline
                try:
                    reranker = Reranker(server=f"http://127.0.0.1:{port}/v1", max_new_tokens=12)
                except InputError:  # the server is not ready yet
                    time.sleep(0.5)
            ranking = reranker.rank(QUERY, PASSAGES)
        finally:
            process.kill()
    window = ranking.windows[0]
    assert sorted(result.index for result in ranking) == [0, 1]
    assert window.status != "error" and window.response and 0 < window.tokens <= 12 < window.prompt_tokens
