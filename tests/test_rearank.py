"""The agent: prompts, cached sampling over a shared prompt, sliding windows, the command line."""

import dataclasses
import gzip
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import random_prompts, tiny_model

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import rearank
from data import Candidates, InputError, read_run, toy_task, write_candidates
from rearank import (Agent, Decoder, Reranker, Settings, build_messages, encode_prompt, encode_prompts, load_agent,
                     pick_tokens, rerank_file, sample, sliding_window, windows_of)

# --- prompts


def test_the_rearank_prompt_is_the_papers_to_the_letter():
    first, *_, last = [m["content"] for m in build_messages("a {b} c", ["one  two\nthree", "four"]) if m["role"] == "user"]
    assert first == ("I will provide you with passages, each indicated by number identifier []. "
                     "Rank the passages based on their relevance to the search query."
                     "Search Query: a {b} c. \nRank the 2 passages above based on their relevance to the search query."
                     "The passages should be listed in descending order using identifiers. "
                     "The most relevant passages should be listed first. "
                     "The output format should be <answer> [] > [] </answer>, e.g., <answer> [1] > [2] </answer>.")
    indent = "\n" + " " * 12
    assert last == ('Please rank these passages according to their relevance to the search query: "a {b} c"' + indent
                    + "Follow these steps exactly:" + indent + "1. First, within <think> tags, analyze EACH passage individually:" + indent
                    + "- Evaluate how well it addresses the query" + indent + "- Note specific relevant information or keywords\n" + indent
                    + "2. Then, within <answer> tags, provide ONLY the final ranking in descending order of relevance using the format: "
                    "[X] > [Y] > [Z]")


def test_a_conversation_receives_each_passage_in_turn():
    messages = build_messages("q", ["one  two\nthree", "x" * 500])
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant", "user", "assistant", "user"]
    assert [m["content"] for m in messages[2:6]] == ["Okay, please provide the passages.", "[1] one two three", "Received passage [1].",
                                                      "[2] " + "x" * 400]
    system = messages[0]["content"]
    assert system.startswith("You are DeepRerank, an intelligent assistant") and "You first thinks" in system


def test_the_rankgpt_prompt_asks_for_no_reasoning_and_cuts_at_300_characters():
    messages = build_messages("q", ["x" * 500], prompt="rankgpt")
    assert messages[1]["content"] == ("I will provide you with 1 passages, each indicated by number identifier []. \n"
                                      "Rank the passages based on their relevance to query: q.")
    assert messages[3]["content"] == "[1] " + "x" * 300
    assert messages[-1]["content"].startswith("Search Query: q. \nRank the 1 passages above") and "think" not in str(messages)
    assert messages[-1]["content"].endswith("e.g., [1] > [2]. Only response the ranking results, do not say any word or explain.")


def test_the_prompt_is_never_guessed():
    with pytest.raises(ValueError, match="unknown prompt"):
        build_messages("q", ["p"], prompt="Rearank-7B")


def test_a_long_query_is_cut_so_that_the_prompt_fits(toy):
    ids = encode_prompt(toy.tokenizer, "rain " * 1000, ["bread oven"] * 10, "toy", max_tokens=200)
    assert len(ids) <= 200
    with pytest.raises(InputError, match="smaller window"):
        encode_prompt(toy.tokenizer, "rain", ["bread"] * 100, "rearank", max_tokens=50)


# --- sampling


def plain_sample(model, prompt, uniforms, temperature, stop):
    """The sampler without any trick: a full forward pass for every token."""
    written = []
    for u in uniforms:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + written])).logits[:, -1]
        written.append(int(pick_tokens(logits, temperature, u[None])))
        if written[-1] in stop:
            break
    return written


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.6])
def test_cached_sampling_draws_the_tokens_of_a_full_forward_sampler(model, temperature):
    prompts, group, length, stop = random_prompts(13, 40, 27, 9), 3, 25, [3, 5, 7, 11]
    answers = sample(model, prompts, group, length, temperature, stop, seed=5)
    uniforms = torch.rand(len(prompts) * group, length, generator=torch.Generator().manual_seed(5))
    for p, prompt in enumerate(prompts):
        for g in range(group):
            assert answers[p][g].ids == plain_sample(model, prompt, uniforms[p * group + g], temperature, stop)
            assert answers[p][g].finished == (answers[p][g].ids[-1] in stop)
    if temperature:
        assert {len(c.ids) for row in answers for c in row} > {length}  # some ended early, some were cut: both were tested


@pytest.mark.parametrize("max_rows", [1, 4, 6, 1000])
def test_dropping_finished_rows_and_taking_in_new_prompts_changes_no_token(model, max_rows):
    prompts = random_prompts(13, 40, 27, 9, 22)
    together = sample(model, prompts, 4, 30, 1.0, [3, 5, 7, 11], seed=1, max_rows=20)
    assert sample(model, prompts, 4, 30, 1.0, [3, 5, 7, 11], seed=1, max_rows=max_rows) == together


class Recording(TorchDispatchMode):
    """What a CUDA graph is, on a CPU: the operations that ran and the tensors they ran on; `replay` runs them again on the same addresses.

    Numbers that Python computed are frozen, and what Python would allocate anew is written to the old place.
    """

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), "would wait for the device"
        out = func(*args, **(kwargs or {}))
        storage = lambda x: x.untyped_storage().data_ptr()  # noqa: E731
        before = {storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        fresh = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor) and storage(x) not in before]
        if fresh or func._schema.is_mutable:  # else it is a view, which needs no second run
            self.operations.append((func, args, kwargs or {}, fresh))
        return out

    def replay(self):
        for func, args, kwargs, fresh in self.operations:
            again = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, torch.Tensor)]
            for old, new in zip(fresh, again):
                old.copy_(new)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_step_recorded_once_and_replayed_draws_the_same_tokens(model, monkeypatch, temperature):
    """What CUDA graphs ask of the decoder, as far as a CPU can tell: no step depends on a new address or a number of Python's, or waits."""
    prompts, stop = random_prompts(13, 40, 27, 9, 22, 40, 13, 35, 5), [3]
    expected = sample(model, prompts, 4, 300, temperature, stop, seed=1, max_rows=12)
    assert max(len(c.ids) for row in expected for c in row) == 300 > 256  # the answers' buffers have grown, and some rows left early
    replays, eager = [], []

    def captured(advance, pool):
        with Recording() as recording:
            advance()
        # Recording has run the step, as capturing does not: its first replay is left out.
        return lambda: recording.replay() if recording in replays else replays.append(recording)

    advance = Decoder.advance
    monkeypatch.setattr(Decoder, "advance", lambda self: eager.append(0) or advance(self))
    monkeypatch.setattr(rearank, "captured", captured)
    monkeypatch.setattr(rearank, "Decoder", lambda *a, graphs, **k: Decoder(*a, graphs=True, **k))
    assert sample(model, prompts, 4, 300, temperature, stop, seed=1, max_rows=12) == expected
    assert len(replays) > 3 and len(eager) < 200  # nearly all steps were replays, of a few shapes


def test_cached_decoding_equals_a_full_forward(model):
    prompts, answer = random_prompts(17, 30), random_prompts(12, seed=9)[0]
    with torch.no_grad():
        decoder, steps = Decoder(model, 4, 30, 100), []
        decoder.admit(prompts, 2, torch.zeros(4, 100))
        for token in answer:
            decoder.tokens[:4] = token
            decoder.widen()
            steps.append(decoder.next_logits()[[0, 1, 2]])  # [R, V] each
            decoder.step()
    for row, prompt in enumerate([prompts[0], prompts[0], prompts[1]]):
        with torch.no_grad():
            full = model(torch.tensor([prompt + answer])).logits[0, len(prompt):]
        torch.testing.assert_close(torch.stack([s[row] for s in steps]), full, atol=1e-5, rtol=0)


def test_a_prompt_encoded_once_and_shared_equals_the_prompt_repeated(model):
    prompt = random_prompts(21)[0]
    once = sample(model, [prompt], 4, 20, 1.0, [3], seed=2)[0]
    repeated = sample(model, [prompt] * 4, 1, 20, 1.0, [3], seed=2)
    assert once == [row[0] for row in repeated]


def test_right_padding_changes_nothing_for_the_shorter_prompt(model):
    short, long = random_prompts(8, 50)
    with torch.no_grad():
        alone, padded = encode_prompts(model, [short]), encode_prompts(model, [long, short])
    torch.testing.assert_close(padded.last_hidden[1], alone.last_hidden[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(padded.keys[1][1, :, :8], alone.keys[1][0], atol=1e-5, rtol=0)


def test_sampling_follows_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -30.0]]).expand(20000, 4)
    drawn = torch.bincount(pick_tokens(logits, 1.0, torch.rand(20000, generator=torch.Generator().manual_seed(0))), minlength=4) / 20000
    torch.testing.assert_close(drawn, logits[0].softmax(0), atol=0.01, rtol=0)
    assert pick_tokens(logits[:1], 1.0, torch.tensor([0.9999999])).item() < 3  # no impossible token, even at the very edge


def model_of_kind(kind: str, **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                                  num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.15, eos_token_id=3,
                                  pad_token_id=3, bos_token_id=None, **changes)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


LINEAR = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}}


@pytest.mark.parametrize(("kind", "changes"), [("qwen2", {}), ("qwen3", {"head_dim": 32}), ("llama", {}), ("llama", LINEAR),
                                               ("mistral", {"sliding_window": None})])
def test_the_forward_pass_written_out_is_that_of_the_model(kind, changes):
    model, (prompt,) = model_of_kind(kind, **changes), random_prompts(21)
    rearank.check_shared_prompt(kind, model)
    with torch.no_grad():
        for layer in model.model.layers:  # random weights leave the norms at 1 and the biases at 0: they must count too
            for p in [*layer.input_layernorm.parameters(), *layer.self_attn.parameters()]:
                p.add_(torch.randn(p.shape) * 0.1)
    uniforms = torch.rand(1, 15, generator=torch.Generator().manual_seed(0))
    assert sample(model, [prompt], 1, 15, 1.0, [], seed=0)[0][0].ids == plain_sample(model, prompt, uniforms[0], 1.0, [])


@pytest.mark.parametrize(("kind", "changes"), [("gemma", {"head_dim": 16}), ("olmo2", {}), ("granite", {"logits_scaling": 8.0}),
                                               ("phi3", {}), ("gpt_neox", {})])
def test_a_model_whose_forward_pass_is_another_is_refused_and_not_wrong(kind, changes):
    with pytest.raises(InputError, match="Qwen2, Qwen3, Llama and Mistral"):
        rearank.check_shared_prompt(kind, model_of_kind(kind, **changes))


def test_every_end_of_turn_token_ends_an_answer(toy):
    toy.model.generation_config.eos_token_id = [0]
    assert rearank.stop_ids(toy.model, toy.tokenizer) == [0, 1]  # the generation config's own, and the tokenizer's <|end|>


def test_position_embeddings_that_change_with_the_length_are_refused():
    with pytest.raises(InputError, match="dynamic position embeddings"):
        Agent(tiny_model(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}), None, [])


def test_decoding_in_bfloat16_keeps_its_scores_in_float32():
    torch.manual_seed(0)
    query, keys, values = torch.randn(1, 1, 4, 64), torch.randn(1, 1, 300, 64), torch.randn(1, 1, 300, 64)
    keys += 20  # a bias all keys share: large scores
    query, keys, values = (x.bfloat16() for x in (query.abs(), keys, values))
    exact = F.scaled_dot_product_attention(query.double(), keys.double(), values.double())
    out, _ = rearank.attend_part(query, keys, values, 64**-0.5)
    assert (out - exact).norm() < 0.01 * exact.norm()


def test_a_model_with_sliding_attention_is_refused():
    with pytest.raises(InputError, match="full attention"):
        Agent(tiny_model(use_sliding_window=True, sliding_window=16, max_window_layers=1), None, [])


# --- windows


@pytest.mark.parametrize("n", range(1, 102))
def test_every_rank_is_seen_for_every_list_length(n):
    seen = []
    result = sliding_window(list(range(n)), lambda items: seen.append(set(items)) or list(range(len(items))))
    assert result == list(range(n))
    assert set().union(*seen) == (set(range(n)) if n > 1 else set())
    assert n < 2 or 0 in seen[-1]  # the last window begins at rank 0
    assert all(len(s) <= 20 for s in seen) and len(seen) == windows_of(n, 20, 10)


def test_the_papers_setting_makes_nine_windows():
    starts = []
    sliding_window(list(range(100)), lambda items: starts.append(items[0]) or list(range(len(items))))
    assert starts == [80, 70, 60, 50, 40, 30, 20, 10, 0]


@pytest.mark.parametrize(("window", "step"), [(4, 2), (5, 5), (20, 10), (3, 1)])
def test_good_passages_bubble_up_by_at_most_window_minus_step(window, step):
    items = list(range(50))  # the larger the better; the best stands last
    result = sliding_window(items, lambda w: sorted(range(len(w)), key=lambda i: -w[i]), window, step)
    assert sorted(result) == items
    assert result[:window - step] == sorted(items, reverse=True)[:window - step]


def test_a_step_that_would_skip_items_is_refused():
    for window, step in ((10, 11), (10, 0), (10, -1)):
        with pytest.raises(ValueError, match="0 < step <= window"):
            sliding_window([1, 2, 3], lambda w: [0, 1, 2], window, step)
    with pytest.raises(ValueError, match="permutation"):
        sliding_window([1, 2, 3], lambda w: [0, 0, 1])


def test_the_input_list_is_left_alone():
    items = [3, 1, 2]
    assert sliding_window(items, lambda w: [2, 1, 0]) == [2, 1, 3] and items == [3, 1, 2]


# --- the reranker


def test_windows_of_many_queries_answer_as_each_query_alone(toy):
    lists = [(c.query, c.texts) for c in toy_task(3, 13, seed=4)[0]] + [("rain", ["bread"]), ("rain", [])]
    reranker = Reranker(toy, "toy", window=6, step=3, max_new_tokens=12)
    together = list(reranker.rank_many(lists))
    assert [[r.index for r in t] for t in together] == [[r.index for r in reranker.rank(*one)] for one in lists]
    assert [len(t.windows) for t in together] == [4, 4, 4, 0, 0]


def test_results_carry_their_place_in_the_input_and_their_text(toy):
    ranking = Reranker(toy, "toy", max_new_tokens=8).rank("rain bread", ["a", "b", "c"], top_k=2)
    assert [r.rank for r in ranking] == [1, 2] and all("abc"[r.index] == r.text for r in ranking)
    assert ranking.windows[0].status in ("ok", "repaired", "untagged", "truncated", "malformed", "empty")



def answering(monkeypatch, toy, answer: str) -> None:
    ids = toy.tokenizer(answer)["input_ids"] + [1]
    monkeypatch.setattr(rearank, "sample", lambda model, prompts, *_, **__: [[rearank.Completion(ids, True)] for _ in prompts])


def test_the_order_of_the_run_is_the_models(monkeypatch, toy):
    answering(monkeypatch, toy, "<think> [1] rain 1 </think> <answer> [3] > [1] > [2] </answer>")
    ranking = Reranker(toy, "toy").rank("rain", ["a", "b", "c"])
    assert [r.index for r in ranking] == [2, 0, 1]
    assert ranking.windows[0].status == "ok" and ranking.windows[0].reasoning == "[1] rain 1"


def test_a_run_file_keeps_the_models_order_and_a_trace_of_each_window(monkeypatch, toy, tmp_path):
    answering(monkeypatch, toy, "<answer> [2] > [1] > [3] </answer>")
    write_candidates(tmp_path / "c.jsonl", [Candidates("q1", "rain", ["d1", "d2", "d3", "d4"], ["a", "b", "c", "d"], [4.0, 4.0, 4.0, 1.0])])
    counts = rerank_file(Settings(input=str(tmp_path / "c.jsonl"), output=str(tmp_path / "r.trec"), prompt="toy", top_k=3), toy)
    run = read_run(tmp_path / "r.trec")["q1"]
    assert sorted(run, key=run.get, reverse=True) == ["d2", "d1", "d3", "d4"] and len(set(run.values())) == 4  # no tie can undo it
    trace = [json.loads(line) for line in (tmp_path / "r.trec.jsonl").read_text().splitlines()]
    assert trace[0]["order"] == ["d2", "d1", "d3"] and trace[0]["status"] == "ok" and trace[0]["docids"] == ["d1", "d2", "d3"]
    assert counts["calls"] == 1 and counts["ok"] == 1 and counts["queries"] == 1


def test_an_interrupted_run_keeps_the_finished_queries(monkeypatch, toy, tmp_path):
    write_candidates(tmp_path / "c.jsonl", toy_task(4, 3, seed=0)[0])
    calls = []

    def interrupted(model, prompts, *_, **__):
        calls.append(len(prompts))
        if len(calls) > 1:
            raise KeyboardInterrupt
        return [[rearank.Completion([1], True)] for _ in prompts]

    monkeypatch.setattr(rearank, "sample", interrupted)
    settings = Settings(input=str(tmp_path / "c.jsonl"), output=str(tmp_path / "r.trec"), prompt="toy", max_rows=2)
    with pytest.raises(KeyboardInterrupt):
        rerank_file(settings, toy)
    assert list(read_run(tmp_path / "r.trec")) == ["train0", "train1"]


# --- loading


def test_a_folder_written_by_save_pretrained_loads_and_answers_alike(toy, tmp_path):
    toy.model.save_pretrained(tmp_path / "m")
    toy.tokenizer.save_pretrained(tmp_path / "m")
    again = load_agent(str(tmp_path / "m"), device="cpu")
    prompt = [encode_prompt(toy.tokenizer, "rain", ["bread", "oak"], "toy")]
    assert [encode_prompt(again.tokenizer, "rain", ["bread", "oak"], "toy")] == prompt
    assert sample(again.model, prompt, 2, 10, 1.0, again.stop_ids) == sample(toy.model, prompt, 2, 10, 1.0, toy.stop_ids)


def test_a_model_that_cannot_be_used_is_refused_in_one_sentence(toy, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no such model folder"):
        load_agent(str(tmp_path / "nowhere"))
    toy.model.save_pretrained(tmp_path / "m")
    toy.tokenizer.chat_template = None
    toy.tokenizer.save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match="no chat template"):
        load_agent(str(tmp_path / "m"), device="cpu")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="cannot be loaded") as refused:
        load_agent("nobody/there-is-no-such-model")
    assert "\n" not in str(refused.value)


def test_a_model_larger_than_the_memory_is_refused_before_it_is_loaded(toy, monkeypatch):
    config = toy.model.config
    config.num_hidden_layers, config.layer_types, config.intermediate_size = 4, ["full_attention"] * 4, 2**40 // 64
    with pytest.raises(InputError, match="weights take .* GiB"):
        rearank.check_memory("big", config, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("changes", [{"tag": "my run"}, {"output": "."}])
def test_what_cannot_be_written_is_refused_before_the_work(toy, tmp_path, monkeypatch, changes):
    monkeypatch.setattr(rearank, "sample", lambda *a, **k: pytest.fail("the model was asked"))
    (tmp_path / "c.jsonl").write_text(json.dumps({"query": {"text": "q", "qid": "1"}, "candidates": [
        {"docid": d, "score": 1.0, "doc": {"contents": d}} for d in "ab"]}))
    settings = Settings(input=str(tmp_path / "c.jsonl"), output=str(tmp_path / "run"), prompt="toy")
    with pytest.raises(InputError, match="expected"):
        rerank_file(dataclasses.replace(settings, **changes), toy)
    assert [p.name for p in tmp_path.iterdir()] == ["c.jsonl"]


# --- real files


def test_real_dl19_candidates_become_a_run(toy, tmp_path):
    source = rearank.Path(__file__).parent / "../../shared/data/dl19_eval_dev/retrieve_results_dl19_top100.jsonl.gz"
    if not source.exists():
        pytest.skip("no ../shared/data here")
    small = tmp_path / "small.jsonl"
    small.write_bytes(b"".join(gzip.open(source).readlines()[:2]))
    counts = rerank_file(Settings(input=str(small), output=str(tmp_path / "r.trec"), prompt="toy", max_new_tokens=4), toy)
    assert counts["calls"] == 18 and all(len(docs) == 100 for docs in read_run(tmp_path / "r.trec").values())
