"""GRPO: advantages, loss, log-probabilities through a shared prompt, the optimizer, the training loop."""

import copy
import csv
import dataclasses
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import full_logps, random_prompts, tiny_model

import grpo
from data import (Instance, InputError, read_qrels, read_run, toy_answer, toy_combinations, toy_keywords, toy_task, write_candidates,
                  write_qrels)
from eval import evaluate
from grpo import (MasterAdamW, Microbatch, RunFolder, ToySettings, batch_of, group_advantages, grpo_loss, k3, learning_rate, project_logps,
                  supervised, through_groups, token_mask, train)
from rearank import Completion, PromptMemory, encode_prompt, forward, load_agent, sample

# --- advantages


def test_advantages_are_z_scores_inside_each_group():
    rewards = torch.tensor([[0.0, 1.0, 2.0, 3.0], [10.0, 10.0, 10.0, 14.0]])
    advantages = group_advantages(rewards)
    torch.testing.assert_close(advantages.mean(-1), torch.zeros(2))
    torch.testing.assert_close(advantages.std(-1), torch.ones(2))
    torch.testing.assert_close(advantages[1], torch.tensor([-0.5, -0.5, -0.5, 1.5]))


@pytest.mark.parametrize("value", [0.7, 0.1 + 0.2, 1e-3, -1.0])
def test_a_flat_group_gets_exact_zeros_and_not_its_rounding_error(value):
    assert not group_advantages(torch.full((3, 32), value)).any()
    nearly = torch.full((8,), value)
    nearly[3] = torch.nextafter(nearly[3], torch.tensor(9.0))
    assert not group_advantages(nearly).any()


def test_a_group_of_one_has_nothing_to_be_compared_with():
    assert group_advantages(torch.tensor([[3.0]])).tolist() == [[0.0]]


# --- loss


def test_k3_estimates_the_exact_kl_far_from_zero():
    generator = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(2, 6, generator=generator) * 1.5).log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum()
    assert exact > 0.5
    drawn = torch.multinomial(policy.exp(), 400_000, replacement=True, generator=generator)
    estimates = k3(policy[drawn], reference[drawn])
    assert (estimates >= 0).all()
    assert abs(estimates.mean() - exact) < 0.02 * exact
    assert abs(k3(reference[drawn], policy[drawn]).mean() - exact) > 0.1 * exact  # arguments swapped: another quantity


def test_the_penalty_pulls_the_policy_back_to_the_reference():
    logits = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True)
    reference = torch.tensor([[0.0, 0.0, 0.0]]).log_softmax(-1)
    policy = logits.log_softmax(-1)
    exact = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)[0]
    expected = sum(policy[0, a].exp().detach() * torch.autograd.grad(  # the expectation over tokens the policy draws
        grpo_loss(policy[:, a:a + 1], reference[:, a:a + 1], torch.zeros(1), torch.tensor([1]), beta=1.0), logits, retain_graph=True)[0]
        for a in range(3))
    assert (torch.sign(expected) == torch.sign(exact)).all() and expected.abs().sum() > 0  # k1 as a loss would give 0 here


def test_every_answer_counts_alike_however_long_and_every_token_alike_inside_it():
    logps = torch.zeros(2, 4, requires_grad=True)
    loss = grpo_loss(logps, None, torch.tensor([1.0, -2.0]), torch.tensor([1, 4]), beta=0.0)
    loss.backward()
    torch.testing.assert_close(logps.grad, torch.tensor([[-0.5, 0, 0, 0], [0.25, 0.25, 0.25, 0.25]]))  # A / (2 outputs * |o|)
    assert loss.item() == pytest.approx(0.5)  # minus the mean advantage


def test_lengths_and_a_mask_say_the_same():
    logps, ref, advantages, lengths = torch.randn(3, 5), torch.randn(3, 5), torch.randn(3), torch.tensor([2, 5, 1])
    by_mask = grpo_loss(logps, ref, advantages, token_mask(lengths, 5), 0.1)
    torch.testing.assert_close(grpo_loss(logps, ref, advantages, lengths, 0.1), by_mask)


def test_a_group_with_equal_rewards_has_no_gradient(model):
    answers = random_prompts(5, 6, 7, seed=3)
    advantages = group_advantages(torch.full((3,), 0.7))
    through_groups(model, random_prompts(9), answers, lambda b: grpo_loss(b.logps, None, advantages[b.rows], b.lengths, 0.0), learn=True)
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


# --- log-probabilities and gradients


def collected(model, prompts, answers, **road) -> torch.Tensor:
    logps = torch.zeros(len(answers), max(map(len, answers)))
    def keep(batch):
        logps[batch.rows, :batch.logps.shape[1]] = batch.logps
    through_groups(model, prompts, answers, keep, learn=False, **road)
    return logps


def test_log_probabilities_through_a_shared_prompt_equal_a_full_forward(model):
    prompts, answers = random_prompts(11, 25), random_prompts(1, 7, 4, 12, 2, 9, seed=1)
    logps = collected(model, prompts, answers)
    for row, answer in enumerate(answers):
        with torch.no_grad():
            torch.testing.assert_close(logps[row, :len(answer)], full_logps(model, prompts[row // 3], answer), atol=1e-5, rtol=0)
        assert not logps[row, len(answer):].any()


def test_log_probabilities_use_the_temperature_the_sampler_used(model):
    prompt, answer = random_prompts(11)[0], random_prompts(6, seed=1)[0]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1:-1] / 0.6
    expected = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
    torch.testing.assert_close(collected(model, [prompt], [answer], temperature=0.6)[0], expected, atol=1e-5, rtol=0)


def naive_gradients(model, prompts, answers, advantages, ref, beta) -> list[torch.Tensor]:
    """Every answer with its own copy of the prompt, one plain forward pass each."""
    model = copy.deepcopy(model)
    group = len(answers) // len(prompts)
    losses = []
    for row, answer in enumerate(answers):
        logps = full_logps(model, prompts[row // group], answer)[None]
        losses.append(grpo_loss(logps, ref[row:row + 1, :len(answer)], advantages[row:row + 1], torch.tensor([len(answer)]), beta))
    torch.stack(losses).mean().backward()
    return [p.grad for p in model.parameters()]


def shared_gradients(model, prompts, answers, advantages, ref, beta, **road) -> list[torch.Tensor]:
    model = copy.deepcopy(model)
    def loss_of(batch: Microbatch):
        width = batch.logps.shape[1]
        loss = grpo_loss(batch.logps, ref[batch.rows, :width], advantages[batch.rows], batch.lengths, beta)
        return loss * len(batch.rows) / len(answers)
    through_groups(model, prompts, answers, loss_of, learn=True, **road)
    return [p.grad for p in model.parameters()]


def problem():
    prompts, answers = random_prompts(14, 30, 8), random_prompts(3, 9, 1, 6, 12, 5, 2, 8, 10, seed=1)
    generator = torch.Generator().manual_seed(0)
    return prompts, answers, torch.randn(9, generator=generator), torch.randn(9, 12, generator=generator) - 4, 0.3


def relative_error(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("in_parts", [True, False])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}])
def test_gradients_through_a_shared_prompt_equal_those_of_the_repeated_prompt(changes, in_parts, monkeypatch):
    """In parts, as a CPU does it, and over keys copied to each answer, as a GPU does."""
    monkeypatch.setattr(grpo, "attends_in_parts", lambda device: in_parts)
    model = tiny_model(**changes)
    assert relative_error(shared_gradients(model, *problem()), naive_gradients(model, *problem())) <= 1e-5


@pytest.mark.parametrize("road", [{"answer_tokens": 1}, {"answer_tokens": 20}, {"prompt_tokens": 1},
                                  {"prompt_tokens": 60, "answer_tokens": 30}])
def test_the_gradient_does_not_depend_on_the_micro_batch_size(model, road):
    assert relative_error(shared_gradients(model, *problem(), **road), shared_gradients(model, *problem())) <= 1e-5


def test_gradient_checkpointing_changes_no_gradient(model):
    assert relative_error(shared_gradients(model, *problem(), checkpointing=True), shared_gradients(model, *problem())) <= 1e-5


def test_projecting_in_chunks_changes_no_gradient(model, monkeypatch):
    plain, whole = shared_gradients(model, *problem()), grpo.answer_logps
    monkeypatch.setattr(grpo, "answer_logps", lambda *args: whole(*args, chunk_elements=300))
    assert relative_error(shared_gradients(model, *problem()), plain) <= 1e-5


def test_bfloat16_gradients_point_where_float32_ones_do(model):
    half = copy.deepcopy(model).to(torch.bfloat16)
    for got, wanted in zip(shared_gradients(half, *problem()), shared_gradients(model, *problem()), strict=True):
        assert F.cosine_similarity(got.float().flatten(), wanted.flatten(), 0) > 0.99


def test_a_checkpointed_prompt_keeps_no_second_graph_alive(model):
    """The backward pass computes each layer again; the keys and values it then sees must not be kept: they hold its whole graph."""
    ids = torch.tensor(random_prompts(20))
    memory = PromptMemory(torch.tensor([20]))
    hidden = forward(model, ids, torch.arange(20)[None], memory.attend, checkpointing=True)
    first = dict(memory.keys)
    hidden.sum().backward()
    assert len(first) == 2 and all(memory.keys[layer] is key for layer, key in first.items())


def test_the_end_token_has_a_gradient_where_pad_and_end_are_one_token(model):
    assert model.config.pad_token_id == model.config.eos_token_id == 3
    prompt, answer = random_prompts(9)[0], [*random_prompts(4, seed=1)[0], 3]
    through_groups(model, [prompt], [answer], lambda batch: -batch.logps[0, 4], learn=True)  # of the end token alone
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    (-full_logps(model, prompt, answer)[4]).backward()
    assert relative_error(got, [p.grad for p in model.parameters()]) <= 1e-5


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_an_update_is_the_same_however_it_is_cut_into_micro_batches(beta):
    prompts, answers, *_ = problem()
    rollouts = grpo.Rollouts([], prompts, [Completion(a, True) for a in answers], [], [], 1.0)
    rewards = torch.tensor([[0.0, 1.0, 0.5], [1.0, 0.0, 0.0], [0.7, 0.7, 0.7]])
    results = []
    for answer_tokens in (1, 20, 10**6):
        model = tiny_model()
        optimizer = MasterAdamW(list(model.parameters()))
        settings = dataclasses.replace(ToySettings(), beta=beta, answer_tokens=answer_tokens)
        reference = tiny_model(seed=1) if beta else None
        results.append(grpo.update_policy(grpo.Agent(model, None, []), reference, optimizer, rollouts, rewards, 1e-3, settings))
    for name in ("grad_norm", "kl", "entropy", "loss"):
        assert results[0][name] == pytest.approx(results[2][name], rel=1e-4, abs=1e-6) == results[1][name]
    assert results[0]["grad_norm"] > 0.01 and (results[0]["kl"] > 0) == (beta > 0)


def test_entropy_is_that_of_the_distribution():
    hidden, head = torch.randn(5, 8), torch.nn.Linear(8, 30)
    logps = head(hidden).log_softmax(-1)
    torch.testing.assert_close(project_logps(hidden, head, torch.zeros(5, dtype=torch.long))[1], -(logps.exp() * logps).sum(-1))


# --- optimizer


def test_bfloat16_weights_move_by_updates_smaller_than_their_spacing():
    weight = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    optimizer = MasterAdamW([weight])
    for _ in range(600):  # AdamW moves each weight by lr: 600 times 1e-5 is 0.006, the spacing below 1 is 0.004
        weight.float().sum().backward()
        optimizer.step(1e-5, 1e9)
    torch.testing.assert_close(weight.float(), torch.full((1000,), 1 - 0.006), atol=0.004, rtol=0)
    assert (weight < 1).all()


def test_gradients_of_bfloat16_weights_are_added_up_in_float32():
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = MasterAdamW([weight])
    (weight * 256).sum().backward()
    for _ in range(100):
        (weight * 0.5).sum().backward()  # in bfloat16 256 + 0.5 is 256
    assert weight.grad is None and optimizer.sums[weight].item() == 306


def test_a_second_optimizer_can_take_over_the_model():
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    MasterAdamW([weight]).release()
    second = MasterAdamW([weight])
    (weight * 2).sum().backward()
    assert second.sums[weight].item() == 2 and second.step(1e-3, 1e9) == 2


def test_float32_training_is_torchs_adamw(model):
    other = copy.deepcopy(model)
    ours = MasterAdamW(list(model.parameters()), weight_decay=0.01)
    theirs = torch.optim.AdamW(other.parameters(), lr=1e-3, weight_decay=0.01)
    for _ in range(3):
        for m in (model, other):
            m(torch.tensor(random_prompts(9))).logits.square().mean().backward()
        ours.step(1e-3, 1e9)
        theirs.step()
        theirs.zero_grad()
    for a, b in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_the_learning_rate_warms_up_and_decays_to_a_tenth():
    assert [learning_rate(s, 100, 1.0, 4, False) for s in (1, 2, 4, 100)] == [0.25, 0.5, 1.0, 1.0]
    assert learning_rate(100, 100, 1.0, 4, True) == pytest.approx(0.1)


# --- training


def one_window() -> list[Instance]:
    return [Instance("q", "rain bread coin", ["a", "b"], ["oak leaf forest oak", "storm flour loan leaf"], [0, 3], [0, 3])]


def quick(tmp_path, **changes) -> ToySettings:
    return dataclasses.replace(ToySettings(), out=str(tmp_path / "run"), prompts_per_step=1, group=8, steps=2, max_new_tokens=12, beta=0.0,
                               save_every=1, **changes)


def test_a_tiny_model_learns_what_is_rewarded(toy, tmp_path, monkeypatch):
    """Reward a token: the policy writes it more often. This is the whole of GRPO, without the ranking."""
    wanted = toy.tokenizer.convert_tokens_to_ids("storm")
    share = lambda text: text.split().count("storm") / max(1, len(text.split()))  # noqa: E731
    monkeypatch.setattr(grpo, "score_response", lambda text, *_: grpo.Score(share(text), 0.0, 0.0, 0.0, 0.0))
    settings = dataclasses.replace(quick(tmp_path), prompts_per_step=2, group=16, steps=40, lr=3e-3, save_every=1000)
    train(toy, one_window() * 2, settings, RunFolder(settings))
    log = list(csv.DictReader(open(tmp_path / "run/log.csv")))
    assert float(log[0]["reward"]) < 0.1 < 0.5 < float(log[-1]["reward"])
    assert wanted in sample(toy.model, [encode_prompt(toy.tokenizer, "x", ["y"], "toy")], 1, 5, 0.0, [])[0][0].ids


def test_supervision_teaches_a_tiny_model_an_answer(toy):
    prompt, answer = encode_prompt(toy.tokenizer, "rain", ["oak"], "toy"), toy.tokenizer("<answer> [1] </answer>")["input_ids"] + [1]
    supervised(toy, itertools.repeat([(prompt, answer)]), 30, 1e-2, ToySettings())
    assert sample(toy.model, [prompt], 1, 9, 0.0, [1])[0][0] == Completion(answer, True)


def test_the_sampled_ids_are_trained_on_and_not_the_text_encoded_again(toy, tmp_path, monkeypatch):
    odd = [7, 0, 9, 1]  # decodes to a text whose encoding is other ids: <|pad|> stands for every unknown word too
    monkeypatch.setattr(grpo, "sample", lambda model, prompts, group, *_, **__: [[Completion(odd, True)] * group for _ in prompts])
    seen, through = [], grpo.through_groups
    monkeypatch.setattr(grpo, "through_groups",
                        lambda model, prompts, answers, *a, **k: seen.append(answers) or through(model, prompts, answers, *a, **k))
    settings = quick(tmp_path, reward="random")
    train(toy, one_window(), settings, RunFolder(settings))
    assert all(answers == [odd] * 8 for answers in seen) and seen


def test_a_resumed_run_ends_as_the_unbroken_one(tmp_path):
    instances = one_window() * 3
    def run(folder, steps, resume=False, agent=None):
        settings = dataclasses.replace(quick(tmp_path, reward="random"), out=str(tmp_path / folder), steps=steps, resume=resume,
                                       decay=False)
        agent = agent or grpo.toy_agent(0)
        train(agent, instances, settings, RunFolder(settings))
        return agent.model
    whole = run("a", 4)
    run("b", 2)
    again = run("b", 4, resume=True)  # from the starting model: the state holds the trained weights
    for a, b in zip(whole.parameters(), again.parameters()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert [r["step"] for r in csv.DictReader(open(tmp_path / "b/log.csv"))] == ["1", "2", "3", "4"]


def test_bfloat16_masters_survive_a_resume(tmp_path):
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    first = MasterAdamW([weight])
    weight.float().sum().backward()
    first.step(1e-4, 1.0)
    second = MasterAdamW([torch.nn.Parameter(weight.detach().clone())])
    second.load_state(first.state())
    torch.testing.assert_close(second.masters[0], first.masters[0], rtol=0, atol=0)


def test_ctrl_c_leaves_a_checkpoint_and_a_log(toy, tmp_path, monkeypatch):
    step = grpo.grpo_step
    monkeypatch.setattr(grpo, "grpo_step", lambda *a: step(*a) if a[-1] < 2 else (_ for _ in ()).throw(KeyboardInterrupt))
    settings = dataclasses.replace(quick(tmp_path), steps=9, save_every=100)
    with pytest.raises(KeyboardInterrupt):
        train(toy, one_window(), settings, RunFolder(settings))
    assert json.loads((tmp_path / "run/state/state.json").read_text()) == {"step": 1}
    assert len((tmp_path / "run/log.csv").read_text().splitlines()) == 2
    load_agent(str(tmp_path / "run/checkpoint"), "cpu")


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(grpo, "grpo_loss", lambda logps, *_: logps.sum() * float("nan"))
    before = [p.detach().clone() for p in toy.model.parameters()]
    settings = quick(tmp_path, reward="random")
    with pytest.raises(SystemExit, match="step 1: loss nan"):
        train(toy, one_window(), settings, RunFolder(settings))
    assert all(torch.equal(a, b) for a, b in zip(before, toy.model.parameters()))


def test_resuming_from_nothing_says_so(tmp_path):
    with pytest.raises(InputError, match="--resume"):  # at once, not after the warm start
        RunFolder(quick(tmp_path, resume=True))


def test_resuming_from_half_a_state_says_so(toy, tmp_path):
    settings = quick(tmp_path)
    train(toy, one_window(), settings, RunFolder(settings))
    next(tmp_path.rglob("optimizer.safetensors")).unlink()
    with pytest.raises(InputError, match="--resume"):
        RunFolder(dataclasses.replace(settings, resume=True))


def test_batches_walk_through_all_instances_before_any_comes_again():
    instances, settings = list(range(10)), dataclasses.replace(ToySettings(), prompts_per_step=4)
    drawn = [x for step in range(1, 6) for x in batch_of(instances, step, settings)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == instances and drawn[:10] != drawn[10:]


# --- the toy task


def test_no_combination_of_concepts_is_both_trained_and_held_out():
    assert not set(toy_combinations(True)) & set(toy_combinations(False))
    assert len(toy_combinations(True)) > 40


def test_a_toy_label_is_the_number_of_the_querys_concepts_a_passage_covers():
    candidates, qrels = toy_task(20, 12, seed=3)
    for c in candidates:
        assert [qrels[c.qid][d] for d in c.docids] == [len(toy_keywords(c.query, text)) for text in c.texts]
        assert c.scores == sorted(c.scores, reverse=True)


def test_the_toys_teacher_is_right_about_grades_and_vague_about_order():
    texts = ["oak leaf forest oak", "storm leaf oak forest", "storm flour loan leaf"]
    assert toy_answer("rain bread coin", texts, graded=True) == (
        "<think> [1] 0 [2] storm 1 [3] storm flour loan 3 </think> <answer> [3] > [2] > [1] </answer>")
    assert toy_answer("rain bread coin", texts, graded=False).endswith("<answer> [2] > [3] > [1] </answer>")


def test_the_toys_tokenizer_writes_and_reads_the_teachers_text(toy):
    text = toy_answer("rain bread coin", ["storm flour loan leaf"] * 2, graded=True)
    assert toy.tokenizer.decode(toy.tokenizer(text)["input_ids"]) == text


def test_the_toy_run_goes_from_data_to_a_table_of_its_own_trec_files(tmp_path, capsys):
    """The complete path, with too little training to learn anything: every file that is promised, and numbers that eval.py confirms."""
    out = tmp_path / "run"
    settings = dataclasses.replace(ToySettings(), out=str(out), sft_steps=2, steps=2, prompts_per_step=2, group=4, max_new_tokens=6,
                                   eval_queries=8)
    assert grpo.toy_run(settings) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert {"seed", "seconds", "queries", "first_stage", "warm_start", "warm_start_doubled", "grpo", "grpo_without_think", "sliding_window",
            "gain", "gain_over_doubled"} == set(summary)
    assert set(summary["sliding_window"]) == {"first_stage", "warm_start", "grpo"} and set(summary["gain"]) == {"mean", "low", "high"}
    assert summary["gain"]["mean"] == pytest.approx(summary["grpo"] - summary["warm_start"])
    scores = evaluate(read_qrels(out / "window.qrels"), read_run(out / "window.grpo.trec"), ["ndcg_cut.10"])
    assert sum(s["ndcg_cut_10"] for s in scores.values()) / len(scores) == pytest.approx(summary["grpo"])
    assert len((out / "log.csv").read_text().splitlines()) == 3 and "labels of [1]" in (out / "samples.txt").read_text()
    assert {"config.json", "checkpoint", "state", "long.jsonl"} <= {p.name for p in out.iterdir()}
    assert "after GRPO" in capsys.readouterr().out
    load_agent(str(out / "checkpoint"), "cpu")


def test_a_model_folder_trains_on_candidate_files(toy, tmp_path):
    """The road of `python grpo.py --model ...`, with the toy's own checkpoint standing for a real one."""
    toy.model.save_pretrained(tmp_path / "m")
    toy.tokenizer.save_pretrained(tmp_path / "m")
    candidates, qrels = toy_task(3, 12, seed=1)
    write_candidates(tmp_path / "c.jsonl", candidates)
    write_qrels(tmp_path / "q.txt", qrels)
    argv = ["--model", str(tmp_path / "m"), "--data", str(tmp_path / "c.jsonl"), "--qrels", str(tmp_path / "q.txt"),
            "--out", str(tmp_path / "o"),
            "--prompt", "toy", "--window", "5", "--prompts-per-step", "2", "--group", "2", "--steps", "1", "--sft-steps", "1",
            "--max-new-tokens", "5", "--device", "cpu", "--checkpointing"]
    assert grpo.main(argv) == 0
    row = list(csv.DictReader(open(tmp_path / "o/log.csv")))[0]
    assert row["step"] == "1" and float(row["kl"]) == pytest.approx(0, abs=1e-6)  # the first step still is the reference
    with pytest.raises(InputError, match="--resume"):
        grpo.main(argv)  # an earlier run is never overwritten without being asked
    with pytest.raises(InputError, match="need --model"):
        grpo.main(["--data", "x"])
