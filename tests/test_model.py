"""The language model: shared prompts, sampling, log-probabilities and their gradients, loading."""

import copy
import json
import time
import weakref

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import full_logps, random_prompts, relative_error, tiny_model
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_module
from grpo import grpo_loss
from model import (Agent, Completion, DecodeBatch, SharedAttention, answer_losses, attend_part,
                   chunks, encode_prompts, load_agent, microbatches, pick_tokens,
                   project_logps, read_tokens, sample)
from prompts import encode_prompt
from support.cli import InputError
from support.download import hub_answers

# --- sampling


def plain_sample(model, prompt, uniforms, temperature, stop):
    """Sample one answer without a cache: a full forward pass per token. Returns its ids."""
    written = []
    for u in uniforms:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + written])).logits[:, -1]
        written.append(int(pick_tokens(logits, temperature, u[None])[0]))
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
            wanted = plain_sample(model, prompt, uniforms[p * group + g], temperature, stop)
            assert answers[p][g].ids == wanted
            assert answers[p][g].finished == (wanted[-1] in stop)
    if temperature:
        assert {len(c.ids) for row in answers for c in row} > {length}  # some ended early, some hit the limit


@pytest.mark.parametrize("lengths", [(13, 40, 27, 9), (13, 13)])  # prompts of one length are padded too
@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.6])
def test_in_bfloat16_tokens_and_their_log_probabilities_are_those_of_a_full_forward(lengths, temperature):
    """Rounding differs, so each token is compared given our tokens before it, within a few rounding errors.

    In bfloat16, prompts and answers are padded to a multiple of 8. No query may attend to this padding, also
    after finished rows have left the batch.
    """
    model, group, length = tiny_model().to(torch.bfloat16), 6, 25
    prompts = random_prompts(*lengths)
    answers = sum(sample(model, prompts, group, length, temperature, [3, 5, 7, 11], seed=5), [])
    uniforms = torch.rand(len(answers), length, generator=torch.Generator().manual_seed(5))
    assert len({len(answer.ids) for answer in answers}) > 1  # some rows left early
    for row, answer in enumerate(answers):
        prompt, ids = prompts[row // group], torch.tensor(answer.ids)[:, None]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer.ids])).logits[0, len(prompt) - 1:-1].float()
        if not temperature:
            assert (logits.amax(-1) - logits.gather(1, ids)[:, 0]).max() < 0.05
            continue
        probs = (logits / temperature).softmax(-1)
        upper = probs.cumsum(-1).gather(1, ids)[:, 0]  # upper end of the numbers that draw this token
        lower, drawn = upper - probs.gather(1, ids)[:, 0], uniforms[row, :len(ids)]
        assert (lower - drawn).max() < 0.03 and (drawn - upper).max() < 0.03
    if temperature:
        logps = collected(model, prompts, [answer.ids for answer in answers], temperature=temperature)
        wrong = [abs(logp - ours) for ours, answer in zip(logps.tolist(), answers)
                 for logp, ours in zip(answer.logps, ours)]
        assert max(wrong) < 0.1 and sum(wrong) / len(wrong) < 0.01


@pytest.mark.parametrize("max_num_seqs", [1, 4, 6, 8, 12, 1000])
def test_dropping_finished_rows_and_taking_in_new_prompts_changes_no_token(model, max_num_seqs):
    prompts = random_prompts(13, 40, 27, 9, 22)
    together = sample(model, prompts, 4, 30, 1.0, [3, 5, 7, 11], seed=1, max_num_seqs=20)
    assert sample(model, prompts, 4, 30, 1.0, [3, 5, 7, 11], seed=1, max_num_seqs=max_num_seqs) == together


def test_encoding_prompts_in_several_passes_changes_no_token(model, monkeypatch):
    prompts = random_prompts(13, 40, 27, 9, 22)
    together = sample(model, prompts, 4, 30, 1.0, [3], seed=1)
    monkeypatch.setattr(model_module, "chunks", lambda prompts, tokens: chunks(prompts, 30))
    assert sample(model, prompts, 4, 30, 1.0, [3], seed=1) == together


def test_the_answers_room_grows_as_often_as_it_must(model):
    prompts = random_prompts(13, 22)
    # 130 tokens are more than the cache's first sizes of 32, 64 and 96 places.
    answers = sample(model, prompts, 2, 130, 1.0, [], seed=1)
    uniforms = torch.rand(4, 130, generator=torch.Generator().manual_seed(1))
    assert answers[1][1].ids == plain_sample(model, prompts[1], uniforms[3], 1.0, [])


def test_cached_decoding_equals_a_full_forward(model):
    prompts, answer = random_prompts(17, 30), random_prompts(12, seed=9)[0]
    with torch.no_grad():
        batch, steps = DecodeBatch(model, prompts, 2, range(4)), []
        for token in answer:
            batch.tokens = torch.full((4,), token)
            read_tokens(model, [batch])
            steps.append(batch.logits[[0, 1, 2]])  # [R, V] each
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
    assert padded.lengths.tolist() == [50, 8]


def test_sampling_follows_the_distribution():
    logits, uniforms = torch.tensor([[0.0, 1.0, 2.0, -30.0]]).expand(20000, 4), torch.rand(20000)
    for temperature in (1.0, 0.5):
        drawn = torch.bincount(pick_tokens(logits, temperature, uniforms)[0], minlength=4) / 20000
        torch.testing.assert_close(drawn, (logits[0] / temperature).softmax(0), atol=0.02, rtol=0)
    # Even at the upper edge, a token without probability is not drawn.
    assert pick_tokens(logits[:1], 1.0, torch.tensor([0.9999999]))[0].item() < 3


def test_bfloat16_logits_are_drawn_from_in_float32():
    """In bfloat16, the cumulative sum over a large vocabulary would be off by several tokens."""
    logits = torch.randn(50, 3000, generator=torch.Generator().manual_seed(0)).bfloat16()
    drawn, wanted = (pick_tokens(x, 0.7, torch.linspace(0, 0.99, 50)) for x in (logits, logits.float()))
    assert torch.equal(drawn[0], wanted[0]) and torch.equal(drawn[1], wanted[1])


def test_progress_counts_every_answer_once(model):
    ended = []
    sample(model, random_prompts(13, 40, 27), 5, 20, 1.0, [3, 5, 7, 11], max_num_seqs=10,
           progress=ended.append)
    assert sum(ended) == 15 and len(ended) > 2


class Waits(TorchDispatchMode):
    """Counts operations that would make the host wait for a value of the GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waiting = func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        self.count += waiting
        return func(*args, **(kwargs or {}))


def test_a_decoding_step_never_waits_for_a_value(model):
    with torch.no_grad():
        batches = [DecodeBatch(model, random_prompts(*lengths), 2, range(2 * len(lengths)))
                   for lengths in ((13, 20), (9,))]
        for batch in batches:
            batch.tokens = batch.logits.argmax(-1)
        with Waits() as waits:
            for _ in range(2):
                read_tokens(model, batches)
    assert waits.count == 0


def test_rows_begun_later_read_no_places_that_only_older_rows_have_filled(model):
    with torch.no_grad():
        old, young = (DecodeBatch(model, random_prompts(13), 2, [0, 1]) for _ in range(2))
        old.tokens = young.tokens = torch.tensor([5, 6])
        for _ in range(50):
            read_tokens(model, [old])
        read_tokens(model, [old, young])
    assert (old.length, young.length) == (51, 1) and young.cache[0].shape[3] == 32 < old.cache[0].shape[3]


# --- attention joined from two parts


def test_a_prompt_is_never_attended_to_by_cudnns_kernel():
    """cuDNN's kernel gave NaN gradients on Hopper cards (pytorch issue 196678)."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_decoding_in_bfloat16_keeps_its_scores_in_float32():
    torch.manual_seed(0)
    query, keys, values = torch.randn(1, 1, 4, 64), torch.randn(1, 1, 300, 64), torch.randn(1, 1, 300, 64)
    keys += 20  # an offset of all keys makes the scores large
    query, keys, values = (x.bfloat16() for x in (query.abs(), keys, values))
    exact = F.scaled_dot_product_attention(query.double(), keys.double(), values.double())
    out, _ = attend_part(query, keys, values, 64**-0.5)
    assert (out - exact).norm() < 0.01 * exact.norm()


def shared_attention_problem(dtype=torch.float64):
    """Inputs of SharedAttention: two prompts of 7 and 4 tokens (padded to 7), five answers of 5 tokens.

    Answers 0 to 2 belong to the first prompt, 3 and 4 to the second. There are 4 query and 2 key-value heads.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = (5, 4, 5, 8), (5, 2, 5, 8), (5, 2, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8)
    tensors = [torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in sizes]
    return tensors, [(0, slice(0, 3), 7), (1, slice(3, 5), 4)]


def plain_attention(query, key, value, prompt_keys, prompt_values, parts, scaling):
    """Attention of each answer alone: one softmax over the prompt's keys and the answer's keys."""
    outputs = []
    for prompt, rows, length in parts:
        for r in range(rows.start, rows.stop):
            # [H, length + T, D] each
            keys, values = (torch.cat([shared[prompt, :, :length], own[r]], 1).repeat_interleave(2, 0)
                            for shared, own in ((prompt_keys, key), (prompt_values, value)))
            mask = torch.ones(5, length + 5, dtype=torch.bool).tril(length)
            scores = (query[r] @ keys.transpose(1, 2) * scaling).masked_fill(~mask, -torch.inf)
            outputs.append(scores.softmax(-1) @ values)
    return torch.stack(outputs)


def test_attention_in_two_parts_and_its_gradients_are_those_of_one_softmax():
    tensors, parts = shared_attention_problem(torch.float32)
    ours = SharedAttention.apply(*tensors, parts, 0.3)
    torch.testing.assert_close(ours, plain_attention(*tensors, parts, 0.3), atol=1e-6, rtol=1e-5)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad((ours * weights).sum(), tensors)
    wanted = torch.autograd.grad((plain_attention(*tensors, parts, 0.3) * weights).sum(), tensors)
    assert relative_error(got, wanted) < 2e-6
    assert not got[3][1, :, 4:].any()  # a prompt's padding has no gradient


def test_half_precision_weights_sum_to_one_in_the_backward_pass():
    """If the weights did not sum to one, every value's gradient would be off.

    Summed over all values, P * grad must give the sum of grad.
    """
    (query, key, value, keys, values), parts = shared_attention_problem(torch.bfloat16)
    out = SharedAttention.apply(query * 4, key + 5, value, keys + 5, values, parts, 1.0)
    grad = torch.ones_like(out)
    dvalue, dvalues = torch.autograd.grad(out, (value, values), grad)
    total = dvalue.float().sum() + dvalues.float().sum()
    assert total.item() == pytest.approx(grad.sum().item(), rel=0.01)


# --- log-probabilities and gradients


def collected(model, prompts, answers, **sizes) -> torch.Tensor:
    logps = torch.zeros(len(answers), max(map(len, answers)))
    with torch.no_grad():
        for batch in microbatches(model, prompts, answers, **sizes):
            logps[batch.rows, :batch.logps.shape[1]] = batch.logps
    return logps


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_through_a_shared_prompt_equal_a_full_forward(model, temperature):
    prompts, answers = random_prompts(11, 25), random_prompts(1, 7, 4, 12, 2, 9, seed=1)
    logps = collected(model, prompts, answers, temperature=temperature, microbatch_tokens=20)
    for row, answer in enumerate(answers):
        with torch.no_grad():
            wanted = full_logps(model, prompts[row // 3], answer, temperature)
        torch.testing.assert_close(logps[row, :len(answer)], wanted, atol=1e-5, rtol=0)
        assert not logps[row, len(answer):].any()


def problem():
    prompts, answers = random_prompts(14, 30, 8), random_prompts(3, 9, 1, 6, 12, 5, 2, 8, 10, seed=1)
    generator = torch.Generator().manual_seed(0)
    advantages, ref = torch.randn(9, generator=generator), torch.randn(9, 12, generator=generator) - 4
    return prompts, answers, advantages, ref, 0.3


def naive_gradients(model, prompts, answers, advantages, ref, beta) -> list[torch.Tensor]:
    """Gradients of the GRPO loss by one plain forward pass per answer, over prompt and answer."""
    model, losses = copy.deepcopy(model), []
    for row, answer in enumerate(answers):
        logps = full_logps(model, prompts[row // 3], answer)[None]
        own = ref[row:row + 1, :len(answer)], advantages[row:row + 1], torch.tensor([len(answer)])
        losses.append(grpo_loss(logps, *own, beta))
    torch.stack(losses).mean().backward()
    return [p.grad for p in model.parameters()]


def shared_gradients(model, prompts, answers, advantages, ref, beta, **sizes) -> list[torch.Tensor]:
    model = copy.deepcopy(model)
    for batch in microbatches(model, prompts, answers, **sizes):
        rows, width = batch.logps.shape
        loss = grpo_loss(batch.logps, ref[batch.rows, :width], advantages[batch.rows], batch.lengths, beta)
        (loss * rows / len(answers)).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"kind": "qwen3", "head_dim": 32},
                                     {"kind": "llama", "num_key_value_heads": 4}])
def test_gradients_through_a_shared_prompt_equal_those_of_the_repeated_prompt(changes):
    model = tiny_model(**changes)
    assert relative_error(shared_gradients(model, *problem()), naive_gradients(model, *problem())) <= 1e-5


@pytest.mark.parametrize("sizes", [
    {"microbatch_tokens": 1}, {"microbatch_tokens": 20}, {"prompt_batch_tokens": 1},
    {"prompt_batch_tokens": 60, "microbatch_tokens": 30}, {"checkpointing": True}])
def test_the_gradient_does_not_depend_on_how_the_work_is_cut(model, sizes):
    cut = shared_gradients(model, *problem(), **sizes)
    assert relative_error(cut, shared_gradients(model, *problem())) <= 1e-5


def test_projecting_in_chunks_changes_no_gradient(model, monkeypatch):
    plain, whole = shared_gradients(model, *problem()), model_module.answer_logps
    monkeypatch.setattr(model_module, "answer_logps", lambda *arguments: whole(*arguments, chunk=3))
    assert relative_error(shared_gradients(model, *problem()), plain) <= 1e-5


@pytest.mark.parametrize("options", [{}, {"max_tokens": 1}, {"max_tokens": 60},
                                     {"max_tokens": 60, "checkpointing": True}])
def test_supervised_losses_and_gradients_are_those_of_a_plain_forward_pass(model, options):
    """With one answer per prompt, the loss is the cross-entropy of its tokens, including the end token."""
    prompts, answers = random_prompts(14, 30, 8), random_prompts(3, 9, 1, seed=1)
    other, total = copy.deepcopy(model), 0.0
    for loss in answer_losses(model, prompts, answers, **options):
        loss.backward()
        total += loss.item()
    wanted = -sum(full_logps(other, p, a).sum() for p, a in zip(prompts, answers))
    wanted.backward()
    assert total == pytest.approx(wanted.item(), rel=1e-5)
    assert relative_error([p.grad for p in model.parameters()], [p.grad for p in other.parameters()]) < 1e-5


def test_a_supervised_micro_batch_has_no_more_tokens_than_it_may(model, monkeypatch):
    seen, honest = [], model_module.forward
    monkeypatch.setattr(model_module, "forward", lambda model, ids, *rest: seen.append(ids.numel()) or honest(
        model, ids, *rest))
    prompts, answers = random_prompts(14, 30, 8, 12), random_prompts(3, 9, 1, 6, seed=1)
    list(answer_losses(model, prompts, answers, max_tokens=50))
    assert len(seen) == 3 and max(seen) <= 50


def test_only_the_groups_asked_for_are_visited_and_rows_keep_their_numbers(model):
    prompts, answers, *_ = problem()
    rows = [r for batch in microbatches(model, prompts, answers, groups=[0, 2], microbatch_tokens=20)
            for r in batch.rows.tolist()]
    assert sorted(rows) == [0, 1, 2, 6, 7, 8]


def test_bfloat16_gradients_point_where_float32_ones_do(model):
    halves = shared_gradients(copy.deepcopy(model).to(torch.bfloat16), *problem())
    for got, wanted in zip(halves, shared_gradients(model, *problem()), strict=True):
        assert F.cosine_similarity(got.float().flatten(), wanted.flatten(), 0) > 0.99


def test_a_checkpointed_prompt_keeps_no_second_graph_alive(monkeypatch):
    """The backward pass recomputes each layer. If its keys stayed alive, they would keep the whole graph."""
    model, made, alive = tiny_model(num_key_value_heads=4), [], []
    honest = F.scaled_dot_product_attention

    def watched(query, key, *rest, **options):
        made.append(weakref.ref(key))
        return honest(query, key, *rest, **options)

    monkeypatch.setattr(model_module.F, "scaled_dot_product_attention", watched)
    encoded = encode_prompts(model, random_prompts(20), checkpointing=True)
    first = len(made)
    embedding = model.get_input_embeddings().weight  # its gradient is computed last
    embedding.register_post_accumulate_grad_hook(
        lambda _: alive.extend(key() is not None for key in made[first:]))
    encoded.last_hidden.sum().backward()
    assert alive == [False, False]


def test_chunks_are_as_large_as_they_may_be():
    prompts = random_prompts(10, 10, 30, 5, 50)
    assert list(chunks(prompts, 60)) == [slice(0, 2), slice(2, 4), slice(4, 5)]  # 2 x 30 fit, 3 x 30 do not
    assert list(chunks(prompts, 1)) == [slice(i, i + 1) for i in range(5)]
    assert list(chunks(prompts, 10**6)) == [slice(0, 5)] and list(chunks([], 9)) == []


def test_the_end_token_has_a_gradient_where_pad_and_end_are_one_token(model):
    assert model.config.pad_token_id == model.config.eos_token_id == 3
    prompt, answer = random_prompts(9)[0], [*random_prompts(4, seed=1)[0], 3]
    for batch in microbatches(model, [prompt], [answer]):
        (-batch.logps[0, 4]).backward()  # the end token alone
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    (-full_logps(model, prompt, answer)[4]).backward()
    assert relative_error(got, [p.grad for p in model.parameters()]) <= 1e-5


def test_entropy_is_that_of_the_distribution():
    hidden, head = torch.randn(5, 8), torch.nn.Linear(8, 30)
    for temperature in (1.0, 0.6):
        logps = (head(hidden) / temperature).log_softmax(-1)
        entropy = project_logps(hidden, head, torch.zeros(5, dtype=torch.long), temperature)[1]
        torch.testing.assert_close(entropy, -(logps.exp() * logps).sum(-1))


# --- loading


def test_decode_drops_the_end_token_of_a_finished_answer_and_no_other(toy):
    ids = toy.tokenizer("rain bread")["input_ids"]
    assert toy.decode(Completion([*ids, 1], True)) == "rain bread"
    assert toy.decode(Completion(ids, False)) == "rain bread"  # hit the limit: its last token is text
    assert toy.decode(Completion([*ids, 5], True)) == "rain bread"  # any id can have ended it


def test_every_end_of_turn_token_ends_an_answer(toy):
    toy.model.generation_config.eos_token_id, toy.model.config.eos_token_id = 5, [6, 7]
    toy.tokenizer.add_tokens(["<|eot_id|>"])  # another end of turn, beside <|end|> (id 1)
    toy.tokenizer.eos_token = "<think>"  # id 3
    assert model_module.find_stop_ids(toy.model, toy.tokenizer) == [1, 3, 5, 6, 7, 68]


def test_a_supervised_answer_ends_as_a_turn_does(toy):
    """It ends with <|im_end|> if the tokenizer has it. A base model's end token is the end of a document."""
    agent = Agent(toy.model, toy.tokenizer, [0, 1])
    assert agent.end_id == 1  # the tokenizer's end token
    toy.tokenizer.add_tokens(["<|im_end|>"])
    assert agent.end_id == 68


def test_a_folder_written_by_save_pretrained_loads_and_answers_alike(toy, tmp_path):
    toy.model.save_pretrained(tmp_path / "m")
    toy.tokenizer.save_pretrained(tmp_path / "m")
    again = load_agent(str(tmp_path / "m"), device="cpu")
    prompt = [encode_prompt(toy.tokenizer, "rain", ["bread", "oak"], "toy")]
    assert [encode_prompt(again.tokenizer, "rain", ["bread", "oak"], "toy")] == prompt
    answers = sample(again.model, prompt, 2, 10, 1.0, again.stop_ids)
    assert answers == sample(toy.model, prompt, 2, 10, 1.0, toy.stop_ids)
    assert load_agent(str(tmp_path / "m"), "cpu", "bfloat16").model.dtype == torch.bfloat16


def test_a_model_that_cannot_be_used_is_refused_in_one_sentence(toy, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no such model folder"):
        load_agent(str(tmp_path / "nowhere"))
    toy.model.save_pretrained(tmp_path / "m")
    toy.tokenizer.chat_template = None
    toy.tokenizer.save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match="--model .*no chat template"):
        load_agent(str(tmp_path / "m"), device="cpu")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="cannot be loaded") as refused:
        load_agent("nobody/there-is-no-such-model")
    assert "\n" not in str(refused.value)


def changed_config(folder, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_a_model_larger_than_the_memory_is_refused_before_it_is_loaded(saved):
    changed_config(saved, intermediate_size=2**40 // 64)
    with pytest.raises(InputError, match="weights take .* GiB"):
        load_agent(str(saved), "cpu")


def test_a_tensor_that_is_missing_or_of_another_shape_is_named(saved, capfd):
    name, weights = "model.layers.1.mlp.up_proj.weight", load_file(saved / "model.safetensors")
    rest = {key: value for key, value in weights.items() if key != name}
    save_file(rest, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=name):
        load_agent(str(saved), "cpu")
    save_file(weights | {name: weights[name][:5].clone()}, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=rf"{name} is \[5, 64\] in its weights, \[128, 64\] by its config"):
        load_agent(str(saved), "cpu")
    save_file(weights, saved / "model.safetensors", {"format": "pt"})
    changed_config(saved, tie_word_embeddings=False)  # untied: the head is missing in the file
    with pytest.raises(InputError, match="lm_head.weight"):
        load_agent(str(saved), "cpu")
    assert "MISSING" not in capfd.readouterr().err  # transformers prints no table


def test_quantised_weights_are_refused_in_one_line(saved):
    for method in ({"quant_method": "awq", "bits": 4}, {"quant_method": "gptq", "bits": 4},
                   {"quant_method": "bitsandbytes", "load_in_4bit": True}):
        changed_config(saved, quantization_config=method)
        with pytest.raises(InputError, match="its weights are quantised") as refused:
            load_agent(str(saved), "cpu")
        assert "\n" not in str(refused.value)


def test_a_hub_name_without_a_network_is_one_line_within_seconds(monkeypatch):
    """The hub's client would retry for half a minute."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("urllib.request.getproxies", dict)
    started = time.monotonic()
    assert not hub_answers()
    with pytest.raises(InputError, match="cannot be loaded .*without a network") as refused:
        load_agent("nobody/there-is-no-such-model", "cpu")
    assert time.monotonic() - started < 3 and "\n" not in str(refused.value)


def test_memory_that_has_run_out_is_no_fault_of_the_models(saved, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes.")
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(InputError, match="too little memory"):
        load_agent(str(saved), "cpu")
