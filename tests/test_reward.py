"""The reward: the parser (the 7 points of INTERFACES.md), NDCG, and the reward of equations 5 and 6.

Each test's name states the property and often its reason, so that a failure explains what the line was for.
"""

import dataclasses
import doctest
import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reward
from reward import SCHEMES, Ranking, Score, ndcg, parse_ranking, rank_reward, score_response

STATUSES = {"ok", "repaired", "untagged", "truncated", "malformed", "empty"}
LABELS = [0, 3, 1, 0, 2]
BEST = "<think> grades </think> <answer> [2] > [5] > [3] > [1] > [4] </answer>"


def read(text, n=3):
    """Parse a text. Returns (status, order), with 1-based ids, as they stand in the text."""
    ranking = parse_ranking(text, n)
    return ranking.status, [i + 1 for i in ranking.order]


def answer(ids, think="<think> t </think> "):
    return f"{think}<answer> {' > '.join(f'[{i}]' for i in ids)} </answer>"


def test_the_examples_in_the_docstrings_are_true():
    assert doctest.testmod(reward) == (0, 12)


# -- the parser: contract 1 to 4, where the answer is
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nothing", [None, "", " \n\t ", b"<answer> [2] </answer>", 7, ["[2]"], float("nan")])
def test_nothing_to_read_keeps_the_present_order(nothing):
    assert read(nothing) == ("empty", [1, 2, 3])


@pytest.mark.parametrize("text", ["<answer> [2] > [3] > [1] </answer>", "<answer>[2]>[3]>[1]</answer>",
                                  "<think>[1]</think><answer>[2] > [3] > [1]</answer>",
                                  "Sure! <answer>\n2 > 3 > 1\n</answer> I hope this helps: [1]",
                                  "[1] reasons </think> <answer> [2] > [3] > [1] </answer>"])
def test_a_complete_block_with_every_id_once_is_ok_whatever_surrounds_it(text):
    assert read(text) == ("ok", [2, 3, 1])


def test_the_last_block_counts_because_models_repeat_the_format_before_they_answer():
    text = "The format is <answer> [1] > [2] > [3] </answer>. So: <answer> [3] > [2] > [1] </answer>"
    assert read(text) == ("ok", [3, 2, 1])


def test_the_nearest_opening_tag_counts_because_models_mention_the_tag_in_passing():
    assert read("I use <answer> with [1] first. <answer> [3] > [2] > [1] </answer>") == ("ok", [3, 2, 1])


def test_a_block_that_names_nothing_gives_way_to_the_last_earlier_one_that_does():
    text = ("<answer> [1] </answer> <answer> [3] > [2] > [1] </answer> "
            "<answer> see above </answer> <answer> [9] </answer>")
    assert read(text) == ("ok", [3, 2, 1])


def test_a_stray_second_closing_tag_does_not_hide_the_list():
    assert read("<answer> 3 > 2 > 1 </answer> </answer>") == ("ok", [3, 2, 1])
    # The block ends at the last closing tag, as the contract says.
    assert read("<answer> [3] > [2] </answer> and [1] </answer>") == ("ok", [3, 2, 1])


def test_an_answer_inside_the_reasoning_is_not_the_answer():
    think = "<think> maybe <answer> [3] > [2] > [1] </answer> </think>"
    assert read(f"{think} <answer> [2] > [1] > [3] </answer>") == ("ok", [2, 1, 3])
    assert read(think) == ("malformed", [1, 2, 3])
    assert read(f"{think} <answer> none </answer>") == ("malformed", [1, 2, 3])


def test_a_second_closing_think_tag_does_not_hide_the_answer_before_it():
    text = "<think> a </think> <answer> [3] > [2] > [1] </answer> </think>"
    assert read(text) == ("ok", [3, 2, 1])
    assert read(f"{text} <answer> [2] > [1] > [3] </answer>") == ("ok", [2, 1, 3])


def test_tags_are_case_sensitive():
    assert read("<Answer> [3] > [2] > [1] </Answer>")[0] == "untagged"
    assert read("<think> [2] </THINK> [3] > [2] > [1]") == ("truncated", [1, 2, 3])


@pytest.mark.parametrize("text, order", [("<answer> [3] > [1] > [2", [3, 1, 2]),
                                         ("<answer> [1] <answer> [3] > [1]", [3, 1, 2]),
                                         ("<think> t <answer> [3]", [3, 1, 2]),
                                         ("<answer> [3] > [1] </ans", [3, 1, 2]),
                                         ("a <answer>", [1, 2, 3]),
                                         ("<answer> [3] > [1] </think>", [3, 1, 2])])
def test_an_open_answer_is_read_as_far_as_it_goes_and_called_truncated(text, order):
    assert read(text) == ("truncated", order)


def test_a_bare_number_at_the_very_end_may_be_cut_and_is_not_trusted():
    """The answer was cut off: "[1" may be the beginning of "[12]"."""
    assert read("<answer> [3] > [1", 12)[1][:3] == [3, 1, 2]
    assert read("<answer> 3 > 2", 12)[1][:3] == [3, 1, 2]
    assert read("<answer> 3 > 2 ", 12)[1][:3] == [3, 2, 1]  # the space ends the number
    assert read("<answer> [3] > [2]", 12)[1][:3] == [3, 2, 1]  # the bracket ends the number
    assert parse_ranking("<answer> [12] > [1", 12).order[0] == 11


def test_reasoning_that_never_ends_gives_no_order_although_it_names_passages():
    assert read("<think> [3] is about the topic, [2] is not") == ("truncated", [1, 2, 3])
    assert read("<think> a </think> <think> [3] > [2]") == ("truncated", [1, 2, 3])


@pytest.mark.parametrize("text", ["[3] > [1] > [2]", "3, 1, 2", "The order is [3] > [1] > [2].",
                                  "<think> [2] </think>\n[3] > [1] > [2]", "[3] > [1] </answer>",
                                  "<think> I write <answer> before [2]. </think> [3] > [1] > [2]"])
def test_zero_shot_models_that_answer_without_tags_are_understood(text):
    assert read(text) == ("untagged", [3, 1, 2])


@pytest.mark.parametrize("text", ["I cannot rank these.", "<answer> none </answer>", "<answer></answer>",
                                  "<answer> [0] > [4] </answer>", "[7] > [8]",
                                  "<answer> the 3rd, then number 2 </answer>", "<think> [3] </think>",
                                  "</answer> <think> [3] </think>"])
def test_a_text_that_names_no_passage_is_malformed_and_changes_nothing(text):
    assert read(text) == ("malformed", [1, 2, 3])


def test_a_complete_block_that_names_nothing_is_the_answer_although_another_one_was_begun():
    assert read("<answer> none </answer> <answer> [3] > [2") == ("malformed", [1, 2, 3])


# -- the parser: contract 5 to 7, which numbers are ids
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["3 > 1 > 2", "3, 1, 2", "3; 1; 2", "3 1 2", "[3, 1, 2]", "(3) > (1) > (2)",
                                  "[3] = [1] < [2]", "3\n1\n2", "[[3], [1], [2]]",
                                  "Passage 3 > passage 1 > PASSAGE 2", "doc3, DOC1, Document 2",
                                  "id 3 > ID 1 > [id 2]", "3\u00a0>\u00a01\u00a0>\u00a02"])
def test_in_a_text_that_is_nothing_but_a_list_every_integer_is_an_id(text):
    assert read(f"<answer>{text}</answer>") == ("ok", [3, 1, 2])


@pytest.mark.parametrize("text", ["Of the 2 good ones [3] wins, then [1], [2].", "First [ 3 ], then [1, 2]!",
                                  "best: [03] > [1] > [2]", "See [3.1], [-2]: [3] > [1] > [2]",
                                  "1. [3] 2. [1] 3. [2]", "[note] [3] > [1] > [2]", "**[3] > [1] > [2]**"])
def test_in_prose_only_integers_in_square_brackets_are_ids_because_prose_has_years_and_counts(text):
    assert read(f"<answer>{text}</answer>") == ("ok", [3, 1, 2])


@pytest.mark.parametrize("text", ["about 3", "[3.1]", "[-2]", "-2", "3.1", "3 > 2!", "(3)!", "see [3",
                                  "3]!", "[٣]", "³", "[see 3]", "3 > 2 > ıd 1", "1e3"])
def test_what_only_looks_like_an_id_is_none(text):
    assert read(f"<answer>{text}</answer>")[0] == "malformed"


def test_numbers_of_more_than_nine_digits_are_ignored():
    assert read("<answer> [3] > [1] > [1234567890] > [2] </answer>") == ("ok", [3, 1, 2])
    assert read("<answer> [3] > [1] > [123456789] > [2] </answer>") == ("repaired", [3, 1, 2])
    # int() refuses 5,000 digits with an error.
    assert read(f"<answer> [{'1' * 5000}] </answer>") == ("malformed", [1, 2, 3])


@pytest.mark.parametrize("text, order", [("[3] > [3] > [1] > [3]", [3, 1, 2]), ("[2]", [2, 1, 3]),
                                         ("[4] > [2] > [0]", [2, 1, 3]), ("[3] > [2] > [1] > [4]", [3, 2, 1]),
                                         ("[3] > [2] > [1] > [3]", [3, 2, 1])])
def test_a_block_that_needs_mending_is_repaired_first_mention_wins_and_missing_ones_keep_order(text, order):
    assert read(f"<answer>{text}</answer>") == ("repaired", order)


def test_missing_passages_follow_in_their_present_order_and_not_sorted_after_the_last_id():
    assert parse_ranking("<answer> [4] > [2] </answer>", 6).order == [3, 1, 0, 2, 4, 5]


FRAGMENTS = st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "[1]", "[2] > ", "[3, 1]", " 2",
                             "13", "99999999999", "-", "x", ".", " ", "\n", "[", "]", ">", "passage ", "İd",
                             "٣", "\ud800", "</ans", "<"])
TEXTS = st.lists(st.one_of(FRAGMENTS, FRAGMENTS, st.text(max_size=3)), max_size=14).map("".join)


@settings(max_examples=500, deadline=None)
@given(TEXTS, st.integers(0, 4))
def test_whatever_a_model_writes_comes_back_as_a_permutation(text, n):
    ranking = parse_ranking(text, n)
    assert sorted(ranking.order) == list(range(n)) and ranking.status in STATUSES
    assert ranking.status not in ("malformed", "empty") or ranking.order == list(range(n))
    assert set(map(type, ranking.order)) <= {int}


def literal_block(text):
    """The answer block by contract 2: after the last </think>, else after the first, else anywhere."""
    thoughts = text.split("</think>")
    places = dict.fromkeys((thoughts[-1], text.partition("</think>")[2])) if len(thoughts) > 1 else [text]
    for place in places:
        end = place.rfind("</answer>")
        begin = place.rfind("<answer>", 0, max(end, 0))
        if begin >= 0:
            return place[begin + len("<answer>"):end]
    return None


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "[1]", "[2]", " 2 > 1 "]),
                max_size=9).map("".join))
def test_one_backward_pass_finds_the_block_that_the_contract_describes_in_three_steps(text):
    block, ranking = literal_block(text), parse_ranking(text, 2)
    if block is None:
        assert ranking.status in ("untagged", "truncated", "malformed", "empty")
    elif "</think>" not in block:
        alone = parse_ranking(f"<answer>{block}</answer>", 2)
        assert ranking == alone or alone.status == "malformed"


HOSTILE = ["<answer>", "<answer></answer>", "<answer>[9]</answer>", "<answer>1", "</answer>", "<think>",
           "</think>", "</think><answer>", "</answer><answer>", "[", "]", "[1, ", "[ 1", "1", "1 ", " ",
           "doc", "docu", "[1] > ", "<", "</answer ", "\n"]


@pytest.mark.parametrize("frame", ["{}", "x{}", "<answer>{}x", "<answer>{}</answer>", "<answer>x{}</answer>",
                                   "<think></think><answer>[1]{}</answer>x"])
def test_the_time_is_linear_in_the_text_because_a_training_model_writes_anything(frame):
    """200,000 characters take about 10 ms, in quadratic code minutes. 1 s is safe on a busy machine."""
    for unit in HOSTILE:
        text = frame.format(unit * (200_000 // len(unit)))
        started = time.process_time()
        score_response(text, LABELS * 4)
        assert time.process_time() - started < 1, f"{frame} with {unit!r}"


def test_a_hundred_thousand_empty_blocks_are_read_once():
    started = time.process_time()
    assert read("<answer></answer>" * 100_000) == ("malformed", [1, 2, 3])
    assert read("<answer>[2]</answer>" + "<answer>[9]</answer>" * 100_000) == ("repaired", [2, 1, 3])
    assert time.process_time() - started < 3


# -- NDCG
# ------------------------------------------------------------------------------------------------------------


def test_ndcg_is_the_formula_of_the_paper():
    dcg, best = 0 / math.log2(2) + 3 / math.log2(3) + 1 / math.log2(4), 3 / math.log2(2) + 1 / math.log2(3)
    assert ndcg([0, 3, 1]) == pytest.approx(dcg / best, abs=1e-15)


def test_the_gain_is_the_label_itself_and_not_two_to_its_power():
    assert ndcg([1, 3]) == pytest.approx((1 + 3 / math.log2(3)) / (3 + 1 / math.log2(3)))


def test_nothing_below_rank_k_counts():
    assert ndcg([0] * 10 + [3]) == 0.0
    assert ndcg([0] * 9 + [3]) == pytest.approx(1 / math.log2(11))
    assert ndcg([0, 3], k=1) == 0.0 and ndcg([3, 0], k=1) == 1.0


def test_the_ideal_is_over_all_judged_passages_so_that_a_list_without_the_best_ones_is_not_perfect():
    assert ndcg([1, 0], ideal=[0, 1, 3, 3]) == pytest.approx(1 / (3 + 3 / math.log2(3) + 1 / 2))
    assert ndcg([1] * 10, ideal=[1] * 50) == 1.0  # more relevant passages than ranks: ten are perfect


def test_negative_labels_gain_nothing_as_in_trec_eval():
    assert ndcg([-2, 1]) == ndcg([0, 1]) and ndcg([-1, -2]) == 0.0
    assert ndcg([1], ideal=[1, -2]) == 1.0


def test_without_a_relevant_passage_ndcg_is_zero_and_not_an_error():
    assert ndcg([]) == ndcg([0, 0]) == ndcg([0], ideal=[]) == 0.0
    assert isinstance(ndcg([]), float)


def test_labels_from_numpy_give_plain_floats_because_logs_and_json_want_them():
    assert type(ndcg(np.array([0, 3, 1]))) is float
    assert type(score_response(BEST, np.array(LABELS)).reward) is float


@given(st.lists(st.integers(-1, 3), max_size=25), st.integers(1, 12), st.randoms(use_true_random=False))
def test_ndcg_is_one_for_the_ideal_order_and_between_zero_and_one_for_every_other(labels, k, random):
    ideal = sorted(labels, reverse=True)
    assert ndcg(ideal, k) == (1.0 if any(label > 0 for label in labels) else 0.0)
    shuffled = random.sample(labels, len(labels))
    assert 0.0 <= ndcg(shuffled, k, ideal=labels) <= 1.0
    same_gains = [max(0, x) for x in shuffled[:k]] == [max(0, x) for x in ideal[:k]]
    assert (ndcg(shuffled, k) == ndcg(ideal, k)) == same_gains


def test_ndcg_agrees_with_the_field_s_reference():
    pytrec_eval = pytest.importorskip("pytrec_eval")
    for case in range(40):
        labels = [(case * 7 + i * i * (case + 3)) % 5 - 1 for i in range(15)]
        qrels = {"q": {f"d{i}": label for i, label in enumerate(labels)}}
        run = {"q": {f"d{i}": 99.0 - i for i in range(12)}}
        got = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10"}).evaluate(run)
        assert ndcg(labels[:12], ideal=labels) == pytest.approx(got["q"]["ndcg_cut_10"], abs=1e-12)


# -- the reward
# ------------------------------------------------------------------------------------------------------------


def test_the_best_order_in_perfect_format_pays_exactly_one():
    assert score_response(BEST, LABELS) == Score(reward=1.0, rank=1.0, format1=1.0, format2=1.0, ndcg=1.0)


def test_the_reward_is_equation_six_over_equation_five():
    labels, text = [1, 0, 3], answer([1, 3, 2])
    initial, reranked, best = ndcg(labels), ndcg([1, 3, 0]), ndcg([3, 1, 0])
    score = score_response(text, labels)
    assert score.rank == pytest.approx((reranked - initial) / (best - initial)) and 0 < score.rank < 1
    assert score.reward == pytest.approx(0.8 * score.rank + 0.1 + 0.1) and score.ndcg == reranked


def test_the_reward_comes_from_the_new_order_and_not_from_scores_that_stay_with_the_positions():
    """If labels or scores stayed with the positions, every answer would get the NDCG of the old order."""
    scores = {score_response(answer(ids), [0, 1, 3]).ndcg for ids in itertools.permutations([1, 2, 3])}
    assert len(scores) == 6
    assert score_response(answer([1, 2, 3]), [0, 1, 3]).rank == 0.0


@given(st.integers(2, 8).flatmap(lambda n: st.tuples(st.lists(st.integers(0, 3), min_size=n, max_size=n),
                                                     st.permutations(range(n)), st.permutations(range(n)))))
def test_the_reward_does_not_depend_on_which_number_a_passage_carries(case):
    """The window is permuted and the response's ids are renamed to match: the passages' order is equal."""
    labels, order, place = case  # passage i of the first window is passage place[i] of the second
    moved = [labels[place.index(i)] for i in range(len(labels))]
    first = score_response(answer(i + 1 for i in order), labels)
    second = score_response(answer(place[i] + 1 for i in order), moved)
    assert (first.ndcg, first.format1, first.format2) == (second.ndcg, second.format1, second.format2)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=8), st.lists(st.integers(0, 3), max_size=8),
       st.randoms(use_true_random=False))
def test_the_choice_of_the_ideal_cancels_in_equation_five(labels, others, random):
    text = answer(random.sample(range(1, len(labels) + 1), len(labels)))
    if ndcg(labels) < ndcg(sorted(labels, reverse=True)):
        of_all = score_response(text, labels, ideal=labels + others)
        assert score_response(text, labels).rank == pytest.approx(of_all.rank)


@given(st.lists(st.integers(0, 3), min_size=3, max_size=8),
       st.lists(st.randoms(use_true_random=False), min_size=3, max_size=8))
def test_inside_a_group_the_three_schemes_are_affine_images_where_nothing_is_clipped(labels, draws):
    """After the z-score they give the same advantages, unless the format rewards differ."""
    ids = range(1, len(labels) + 1)
    texts = [answer(draw.sample(ids, len(ids))) for draw in draws] + ["no order at all"]
    normalized, absolute, difference = ([score_response(text, labels, scheme=scheme).rank for text in texts]
                                        for scheme in SCHEMES)
    initial, best = ndcg(labels), ndcg(sorted(labels, reverse=True))
    if best > initial and min(normalized) > -1:
        assert difference == pytest.approx([x - initial for x in absolute])
        assert normalized == pytest.approx([x / (best - initial) for x in difference])


def test_an_almost_ideal_window_cannot_pay_less_than_minus_one():
    labels = [3, 3, 3, 2, 2, 2, 1, 1, 0, 1]
    assert score_response(answer(range(10, 0, -1)), labels).rank == -1.0
    assert score_response(answer(range(10, 0, -1)), labels, scheme="difference").rank > -1


@pytest.mark.parametrize("labels", [[3, 1, 0], [0, 0, 0], [2, 2, 2]])
def test_with_nothing_to_gain_an_order_that_is_still_best_pays_one(labels):
    assert score_response(answer([1, 2, 3]), labels).rank == 1.0


def test_with_nothing_to_gain_an_order_that_loses_pays_what_it_lost():
    score = score_response(answer([3, 2, 1]), [3, 1, 0])
    assert score.rank == pytest.approx(ndcg([0, 1, 3]) - 1) and -1 < score.rank < 0


@pytest.mark.parametrize("labels", [[3, 1, 0], [0, 1, 3], [0, 0, 0]])
@pytest.mark.parametrize("text", ["", None, "[1] > [2] > [3]", "<answer> [1] > [2",
                                  "<think> t </think> <answer> none </answer>", "<answer> [0] </answer>"])
def test_what_cannot_be_read_pays_nothing_even_where_the_window_was_already_best(text, labels):
    score = score_response(text, labels)
    assert score.rank == 0.0 and score.format2 == 0.0 and score.ndcg == ndcg(labels)
    assert score_response(text, labels, scheme="absolute").rank == ndcg(labels)
    assert score_response(text, labels, scheme="difference").rank == 0.0


@pytest.mark.parametrize("text, status", [
    ("[2] > [5] > [3] > [1] > [4]", "untagged"),
    ("<think> t </think> [2] > [5] > [3] > [1] > [4]", "untagged"),
    ("<answer> [2] > [5] > [3] > [1] > [4]", "truncated"),
    ("<think> t <answer> [2] > [5] > [3] > [1] > [4] </answer>", "ok"),
    ("<think> a </think> <think> b <answer> [2] > [5] > [3] > [1] > [4] </answer>", "ok")])
def test_users_get_an_order_from_texts_that_the_reward_does_not_read(text, status):
    """Inference is lenient, the reward is strict: it must not teach to omit tags or to leave <think> open."""
    assert read(text, 5) == (status, [2, 5, 3, 1, 4])
    assert score_response(text, LABELS) == Score(0.0, 0.0, 0.0, 0.0, ndcg(LABELS))


@pytest.mark.parametrize("text", [
    "<answer> [2] > [5] > [3] > [1] > [4] </answer>",
    "reasons </think> <answer> [2] > [5] > [3] > [1] > [4] </answer>",
    "<think> see <think> </think> <answer> [2] > [5] > [3] > [1] > [4] </answer>"])
def test_the_reward_reads_a_block_after_a_closed_or_absent_think_block(text):
    score = score_response(text, LABELS)
    assert (score.rank, score.format1, score.format2) == (1.0, 0.0, 1.0)
    assert score.reward == pytest.approx(0.9)


def test_a_think_tag_after_the_block_does_not_close_the_block_off():
    text = "<answer> [2] > [5] > [3] > [1] > [4] </answer> <think> more" + " <answer> x </answer>" * 20
    assert score_response(text, LABELS).rank == 1.0


@pytest.mark.parametrize("text", ["<think></think><answer></answer>",
                                  " <think> a\nb </think>\n\n<answer> [2] </answer>\n",
                                  "<think> a </think> <answer> anything </answer>"])
def test_format1_is_one_think_and_one_answer_block(text):
    score = score_response(text, LABELS)
    assert score.format1 == 1.0 and score.reward == pytest.approx(0.8 * score.rank + 0.1)


@pytest.mark.parametrize("text", [
    "<answer> [2] </answer>", "<think> a </think>", "Well, <think> a </think> <answer> [2] </answer>",
    "<think> a </think> <answer> [2] </answer>.", "<think> a </think> so <answer> [2] </answer>",
    "<answer> [2] </answer> <think> a </think>", "<think> <answer> a </think> [2] </answer>",
    "<think> a </think> <answer> [2] </answer> <answer> [2] </answer>",
    "<think> <think> a </think> <answer> [2] </answer>", "<think> a <answer> [2] </answer>"])
def test_format1_wants_each_tag_once_and_nothing_around_because_patterns_found_anywhere_reward_rambling(text):
    assert score_response(text, LABELS).format1 == 0.0


@pytest.mark.parametrize("inside", ["[1] > [2] > [3]", " [3] > [1] > [2] ", "[3]>[1]>[2]",
                                    "\n[3]\n>\n[1] > [2]"])
def test_format2_is_the_whole_list_and_nothing_else(inside):
    assert score_response(f"<answer>{inside}</answer>", [0, 1, 3]).format2 == 1.0


@pytest.mark.parametrize("inside", ["[3]", "[3] > [1]", "[3] > [1] > [2] > [2]", "[3] > [1] > [2] > [4]",
                                    "[3] > [1] > [2] > [12345678901]", "3 > 1 > 2", "[3], [1], [2]",
                                    "[3] > [1] > [2].", "Ranking: [3] > [1] > [2]", "[3] > [1] > [2] >",
                                    "[3, 1, 2]", "[ 3 ] > [1] > [2]", ""])
def test_format2_refuses_partial_lists_because_passages_not_named_keep_their_places_for_free(inside):
    assert score_response(f"<answer>{inside}</answer>", [0, 1, 3]).format2 == 0.0


@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=150, deadline=None)
@given(text=TEXTS, labels=st.lists(st.integers(-1, 3), max_size=12))
def test_every_reward_is_a_plain_float_inside_its_bounds(scheme, text, labels):
    score = score_response(text, labels, scheme=scheme)
    assert set(map(type, dataclasses.astuple(score))) == {float}
    assert -1 <= score.rank <= 1 and -0.8 <= score.reward <= 1 and 0 <= score.ndcg <= 1
    assert score.reward == pytest.approx(0.8 * score.rank + 0.1 * score.format1 + 0.1 * score.format2)


def test_an_unknown_scheme_is_refused_even_for_a_response_that_cannot_be_read():
    with pytest.raises(ValueError, match="normalized, absolute, difference"):
        score_response("", LABELS, scheme="normalised")
    with pytest.raises(ValueError):
        rank_reward(0.1, 0.2, 0.3, False, "random")


def test_the_same_text_is_read_alike_by_reward_and_inference_wherever_the_reward_reads_it():
    for ids in itertools.permutations([1, 2, 3], 2):  # incomplete: the two could complete them differently
        text, labels = answer(ids), [0, 1, 3]
        ranking = parse_ranking(text, 3)
        assert ranking == Ranking([i - 1 for i in ids] + [({1, 2, 3} - set(ids)).pop() - 1], "repaired")
        assert score_response(text, labels).ndcg == ndcg([labels[i] for i in ranking.order])


def test_passages_that_a_response_names_come_first_and_are_counted():
    assert parse_ranking("<answer> [0] > [3] > [3] > [9] > [1] </answer>", 5).named == 2
    assert parse_ranking("<answer> [2] > [1] </answer>", 2).named == 2 and parse_ranking("", 3).named == 0
