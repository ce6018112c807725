"""Replies of chat servers: which field has the text, why it ended, and in which format it comes."""

import gzip
import json
import time

import pytest
from fake_server import ORDER, Fake, answer, first_window

from rearank import Reranker
from support.chat_replies import tagged_text


@pytest.mark.parametrize("reasoning, finish, status, order, thought", [
    ("<think> a </think> <answer> [2] > [1] </answer>", "stop", "ok", [1, 0], "a"),
    ("a </think> <answer> [2] > [1] </answer>", "stop", "ok", [1, 0], "a"),
    ("<answer> [2] > [1] </answer>", "stop", "ok", [1, 0], ""),
    ("a <answer> [2] > [1] </answer>", "stop", "ok", [1, 0], "a"),
    ("In <answer> tags. </think> <answer> [2] > [1] </answer>", "stop", "ok", [1, 0], "In <answer> tags."),
    ("The <answer> has [1] > [2] or not. <answer> [2] > [1] </answer>", "stop", "ok", [1, 0], "The"),
    ("[1] is wax, so [1] > [2]? No. [2] > [1]", "stop", "untagged", [1, 0], "[1] is wax, so [1] > [2]? No."),
    ("2 > 1", "stop", "untagged", [1, 0], ""),
    ("[2] is honey. [1] is", "stop", "malformed", [0, 1], "[2] is honey. [1] is"),  # ended while it reasons
    ("a </think> <answer> [2] > [1", "length", "truncated", [1, 0], "a"),
    ("a [2] > [1] or", "length", "truncated", [0, 1], "a [2] > [1] or")])
@pytest.mark.parametrize("content", [None, "", "\n\n", []])
def test_an_answer_that_is_all_in_the_reasoning_field_is_read(server, reasoning, finish, status, order,
                                                              thought, content):
    window = first_window(server, answer(content, finish, reasoning_content=reasoning))
    assert (window.status, window.order, window.reasoning) == (status, order, thought)
    assert window.finished == (finish == "stop")


@pytest.mark.parametrize("packed", [False, True])
def test_a_long_answer_is_read_to_its_end(server, packed):
    thought = "wax " * 50_000
    body = json.dumps(answer(f"<think> {thought} </think> <answer> [2] > [1] </answer>")).encode()
    body, head = (gzip.compress(body), {"Content_Encoding": "gzip"}) if packed else (body, {})
    window = first_window(server, lambda handler: handler.send(200, body, **head))
    assert (window.status, window.order, window.reasoning) == ("ok", [1, 0], thought.strip())


def test_reading_the_reasoning_field_is_linear(server):
    for text in ("1" * 8000, "[" * 8000, "[1" * 8000, "[1] > " * 8000, "[1]" + " " * 8000):
        began = time.perf_counter()
        tagged_text({"content": None, "reasoning": text}, finished=True)
        assert time.perf_counter() - began < 1, text[:20]


TEXT = {"type": "text", "text": "<answer> [2] > [1] </answer>"}


@pytest.mark.parametrize("message", [
    {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "wax"}]}, TEXT]},
    {"content": [{"type": "thinking", "thinking": "wax", "signature": "s"}, TEXT,
                 {"type": "image", "text": "[1]"}, {"type": "text", "text": 7}, None]},
    {"content": [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "wax"}]},
                 {"type": "redacted_thinking", "data": "x"}, TEXT | {"type": "output_text"}]},
    {"content": [TEXT["text"]], "reasoning_content": ["wax"]},
    {"content": TEXT, "reasoning": {"content": "wax"}},
    {"content": TEXT["text"], "reasoning": "wax", "reasoning_content": "wax"},
    {"content": TEXT["text"], "reasoning_details": [{"type": "reasoning.text", "text": "wax"},
                                                    {"type": "reasoning.encrypted", "data": "x"}]}])
def test_content_and_reasoning_may_come_in_parts(server, message):
    window = first_window(server, {"choices": [{"message": message, "finish_reason": "stop"}]})
    assert (window.status, window.order, window.reasoning) == ("ok", [1, 0], "wax")


def test_a_separate_reasoning_field_becomes_the_think_block(server):
    for name in ("reasoning_content", "reasoning"):
        Fake.script = [answer("<answer> [2] > [1] </answer>", **{name: "wax is not honey"})]
        window = Reranker(server=server).rank("q", ["a", "b"]).windows[0]
        assert window.status == "ok" and window.reasoning == "wax is not honey"
    Fake.script = [answer(None, "length", reasoning="and so on")]
    window = Reranker(server=server).rank("q", ["a", "b"]).windows[0]
    assert window.status == "truncated" and not window.finished


@pytest.mark.parametrize("finish", ["stop", None, "", "STOP", "eos_token", "end_turn", "COMPLETE",
                                    "tool_calls"])
def test_an_answer_that_ended_is_read(server, finish):
    window = first_window(server, answer(ORDER, finish))
    assert (window.status, window.order, window.finished) == ("ok", [1, 0], True)


@pytest.mark.parametrize("finish", ["length", "MAX_TOKENS", "model_length"])
def test_an_answer_that_was_cut_off_is_truncated(server, finish):
    window = first_window(server, answer("<think> x </think> <answer> [2] > [1", finish))
    assert (window.status, window.order, window.finished) == ("truncated", [1, 0], False)
    window = first_window(server, answer(None, finish))  # hidden reasoning used all its tokens
    assert (window.status, window.order, window.finished) == ("empty", [0, 1], False)


@pytest.mark.parametrize("reply, words", [
    (answer(ORDER, "content_filter"), "content_filter"), (answer(None, "content_filter"), "content_filter"),
    (answer(ORDER, "error"), "error"), (answer(ORDER, "abort"), "abort"),
    (answer(ORDER, "insufficient_system_resource"), "insufficient_system_resource"),
    (answer(ORDER, "incomplete"), "incomplete"),
    (answer(None, refusal="I cannot help with that."), "the server refused: I cannot help with that."),
    (answer(ORDER, refusal="I cannot help with that."), "the server refused: I cannot help with that."),
    (answer(None, "tool_calls", tool_calls=[{"function": {"name": "rank"}}]), "rank"),
    ({"error": {"code": 402, "message": "no credits left"}}, "no credits left"),
    ({"choices": [{"error": {"message": "too bad"}, "finish_reason": "error"}]}, "too bad")])
def test_an_answer_that_did_not_end_by_itself_is_an_error_with_its_reason(server, reply, words):
    window = first_window(server, reply)
    assert window.status == "error" and words in window.error and len(Fake.seen) == 1
    assert window.order == [0, 1] and window.response == "" and window.finished


@pytest.mark.parametrize("usage", [
    None, [], "many", {"completion_tokens": None}, {"completion_tokens": -1, "prompt_tokens": "70"},
    {"completion_tokens": float("nan"), "prompt_tokens": float("inf")}, {"completion_tokens": {"text": 9}}])
def test_a_usage_that_cannot_be_read_counts_nothing(server, usage):
    window = first_window(server, answer(ORDER) | {"usage": usage})
    assert (window.status, window.tokens, window.prompt_tokens) == ("ok", 0, 0)


GOOD = json.dumps(answer(ORDER)).encode()


@pytest.mark.parametrize("body, head", [
    (b"\xef\xbb\xbf" + GOOD, {}), (b"\n \n" + GOOD, {}), (gzip.compress(GOOD), {"Content_Encoding": "gzip"}),
    (GOOD.replace(b"> x <", b"> \xff <"), {}), (GOOD.replace(b"> x <", b"> \n <"), {}),
    (GOOD.replace(b"> x <", b"> \\ud83d <"), {}),
    (GOOD.replace(b'"message"', b'"error": null, "message"'), {}),
    (json.dumps({"choices": [{"text": ORDER, "finish_reason": None}]}).encode(), {})])
def test_a_reply_is_read_in_whatever_form_it_comes(server, body, head):
    window = first_window(server, lambda handler: handler.send(200, body, **head))
    assert window.status == "ok" and window.order == [1, 0] and len(Fake.seen) == 1
    json.dumps(window.response, ensure_ascii=False).encode()
