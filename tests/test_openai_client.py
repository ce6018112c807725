"""The client for OpenAI-compatible servers: refused fields, addresses and keys, faults, retries."""

import contextlib
import json
import re
import threading
import time
from email.utils import formatdate

import pytest
from fake_server import ORDER, Fake, answer, first_window

import rearank
from prompts import build_messages
from rearank import Reranker
from support.cli import InputError
from support.files import read_run, write_candidates
from support.openai_client import Server
from toy import toy_task


def test_a_server_is_the_policy(server, monkeypatch, capsys):
    monkeypatch.setenv("REARANK_API_KEY", "secret-key")
    reranker = Reranker(server=server)
    assert capsys.readouterr().err == f"--server {server}: its only model is first\n"
    ranking = reranker.rank("how do <|im_end|> bees", ["wax", "honey"])
    window = ranking.windows[0]
    assert [r.index for r in ranking] == [1, 0]
    assert (window.status, window.reasoning, window.tokens, window.prompt_tokens) == ("ok", "x", 9, 70)
    [(body, head)] = Fake.seen
    assert body["model"] == "first" and head["Authorization"] == "Bearer secret-key"
    assert body["messages"] == build_messages("how do <|im_end|> bees", ["wax", "honey"])
    assert "<|im_end|>" not in json.dumps(body) and body["max_tokens"] == 2048
    assert Reranker("second", server=server).client.model == "second"


# --- fields that a server refuses


def refused(field, code, error):
    """A rule for Fake: it refuses requests with this field."""
    return lambda body: (code, error) if field in body else None


MAX_TOKENS = {"error": {"message": "Unsupported parameter: 'max_tokens' is not supported with this model. "
                        "Use 'max_completion_tokens' instead.", "param": "max_tokens",
                        "code": "unsupported_parameter"}}

SEED = {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "input": 7,
                    "msg": "Extra inputs are not permitted"}]}

TEMPERATURE = {"error": {"message": "Unsupported value: 'temperature' does not support 0 with this model. "
                         "Only the default (1) value is supported.", "param": "temperature"}}


@pytest.mark.parametrize("field, code, error, instead", [
    ("max_tokens", 400, MAX_TOKENS, "max_completion_tokens"), ("seed", 422, SEED, None),
    ("seed", 400, {"error": "json: unknown field \"seed\""}, None),
    ("seed", 400, b"Unrecognized request argument supplied: seed", None),
    ("seed", 500, {"object": "error", "message": "Unknown name 'seed': Cannot find field."}, None),
    ("seed", 200, {"error": {"code": 400, "message": "property 'seed' is unsupported"}}, None),
    ("temperature", 400, TEMPERATURE, None),
    ("temperature", 422, {"error": "Input validation error: `temperature` must be strictly positive"}, None),
    ("temperature", 400, {"error": {"message": "Unsupported value", "param": "temperature"}}, None)])
def test_a_refused_field_is_found_out_once_and_said_once(server, capsys, monkeypatch, field, code, error,
                                                         instead):
    monkeypatch.setattr(Fake, "rule", staticmethod(refused(field, code, error)))
    rankings = Reranker("m", server=server, concurrency=4).rank_many([("q", ["a", "b"])] * 12)
    assert [ranking.windows[0].status for ranking in rankings] == ["ok"] * 12
    bodies = [body for body, _ in Fake.seen]
    assert 13 <= len(bodies) <= 12 + 4 and not Fake.slept
    taken = [body for body in bodies if field not in body]
    assert len(taken) == 12 and all(instead in body for body in taken if instead)
    assert {*bodies[0]} - {*taken[-1]} == {field} and bodies[0]["messages"] == taken[-1]["messages"]
    [line] = capsys.readouterr().err.splitlines()
    assert field in line and server in line


def test_several_refused_fields_are_found_out_one_after_the_other(server, capsys, monkeypatch):
    rules = [refused("max_tokens", 400, MAX_TOKENS), refused("seed", 422, SEED),
             refused("temperature", 400, TEMPERATURE)]
    monkeypatch.setattr(Fake, "rule", staticmethod(
        lambda body: next((found for rule in rules if (found := rule(body))), None)))
    assert first_window(server, model="m").status == "ok" and len(Fake.seen) == 4
    assert {*Fake.seen[-1][0]} == {"model", "messages", "max_completion_tokens"}
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_what_was_asked_for_is_not_left_out(server, capsys, monkeypatch):
    monkeypatch.setattr(Fake, "rule", staticmethod(refused("temperature", 400, TEMPERATURE)))
    window = first_window(server, model="m", temperature=0.6)
    assert window.status == "error" and window.order == [0, 1] and len(Fake.seen) == 1
    assert "the server refuses temperature 0.6, which was asked for: HTTP 400" in window.error
    rules = [refused("max_tokens", 400, MAX_TOKENS),
             refused("max_completion_tokens", 400, {"error": "extra input max_completion_tokens"})]
    monkeypatch.setattr(Fake, "rule", staticmethod(lambda body: rules[0](body) or rules[1](body)))
    window = first_window(server, model="m")  # a request needs a limit on the answer
    assert window.status == "error" and "max_completion_tokens" in window.error and len(Fake.seen) == 3


@pytest.mark.parametrize("code, error", [
    (400, "'max_tokens' or 'max_completion_tokens' is too large: 2048. This model's maximum context length "
          "is 1024 tokens and your request has 900 input tokens"),
    (400, "max_tokens must be at least 1, got -5."), (401, "unknown key; seed"),
    (400, "not supported: " + "x" * 200 + json.dumps({"messages": ["when to seed a lawn"], "seed": 5}))])
def test_an_error_of_another_kind_teaches_nothing(server, capsys, monkeypatch, code, error):
    window = first_window(server, lambda handler: handler.send(code, {"error": error}), model="m")
    assert window.status == "error" and error[:40] in window.error and len(Fake.seen) == 1
    assert first_window(server, model="m").status == "ok"
    assert {"seed", "max_tokens", "temperature"} < {*Fake.seen[-1][0]} and not capsys.readouterr().err


@pytest.mark.parametrize("code, error", [
    (400, {"object": "error", "message": "System role not supported", "type": "BadRequestError"}),
    (500, {"error": {"code": 500, "message": "Conversation roles must alternate user/assistant/user/..."}}),
    (400, {"error": "Only user and assistant roles are supported!"}),
    (400, {"error": {"message": "Unsupported value: 'messages[0].role' does not support 'system'"}}),
    (400, {"error": {"message": "Developer instruction is not enabled for models/gemma-3-27b-it"}}),
    (422, {"detail": [{"loc": ["body", "messages", 0, "role"], "msg": "Input should be 'user'"}]})])
def test_a_refused_system_turn_begins_the_first_user_turn(server, capsys, monkeypatch, code, error):
    monkeypatch.setattr(Fake, "rule", staticmethod(
        lambda body: (code, error) if body["messages"][0]["role"] == "system" else None))
    reranker = Reranker("m", server=server, concurrency=4)
    rankings = reranker.rank_many([("q", ["a", "b"])] * 8)
    assert [ranking.windows[0].status for ranking in rankings] == ["ok"] * 8
    assert len(Fake.seen) <= 8 + 4 and not Fake.slept
    system, user, *others = build_messages("q", ["a", "b"])
    sent = Fake.seen[-1][0]
    folded = {"role": "user", "content": f"{system['content']}\n\n{user['content']}"}
    assert sent["messages"] == [folded, *others]
    assert {"seed", "max_tokens", "temperature"} < {*sent}
    assert len(capsys.readouterr().err.splitlines()) == 1


# --- model, address and key


@pytest.mark.parametrize("code, body", [
    (400, {"error": "no"}), (404, b""), (405, b"Method Not Allowed"), (501, b""), (500, b"x"), (302, b""),
    (200, b"<html>a page</html>"), (200, {"data": []}), (200, {"data": None}), (200, [1]),
    (200, {"data": [{"id": "first"}, {"id": "second"}]}), (403, {"error": "Missing scopes: api.model.read"})])
def test_a_model_that_is_named_needs_no_list_of_models(server, capsys, monkeypatch, code, body):
    monkeypatch.setattr(Fake, "models", (code, body))
    assert first_window(server, model="m").status == "ok" and Fake.seen[0][0]["model"] == "m"
    assert not capsys.readouterr().err
    with pytest.raises(InputError, match="--model") as refusal:
        Reranker(server=server)
    assert "\n" not in str(refusal.value) and server in str(refusal.value)


@pytest.mark.parametrize("listed", [
    {"data": [{"id": "one"}]}, {"models": [{"name": "one"}], "object": "list"}, [{"id": "one"}], ["one"],
    {"data": ["one"]}, {"data": [{"id": "one"}, {"id": "one"}, {"id": None}, {}]}])
def test_the_only_model_of_a_list_is_taken_and_named(server, capsys, monkeypatch, listed):
    monkeypatch.setattr(Fake, "models", (200, listed))
    assert Server(server).model == "one" and "its only model is one" in capsys.readouterr().err


def test_of_several_models_none_is_taken(server, monkeypatch):
    monkeypatch.setattr(Fake, "models", (200, {"data": [{"id": f"model-{n}"} for n in range(30)]}))
    with pytest.raises(InputError, match="lists 30 models: model-0, model-1, .*name one with --model"):
        Server(server)


@pytest.mark.parametrize("model", ["", "name"])
def test_no_server_at_all_is_one_line(model):
    with pytest.raises(InputError, match="--server http://127.0.0.1:9/v1: .*expected the address"):
        Server("http://127.0.0.1:9/v1", model, timeout=2)


@pytest.mark.parametrize("end, query", [
    ("", ""), ("/", ""), ("//", ""), ("/chat/completions", ""), ("/chat/completions/", ""), ("/models", ""),
    ("?api-version=1", "?api-version=1"), ("/chat/completions?api-version=1", "?api-version=1"), ("#x", "")])
def test_what_stands_behind_the_address_is_understood(server, end, query):
    assert first_window(server + end).status == "ok"
    assert Fake.paths == [f"/v1/models{query}", f"/v1/chat/completions{query}"]


@pytest.mark.parametrize("address", [
    "localhost:8000/v1", "host", "file:///etc/passwd", "ftp://host/v1", "http://", "http:///v1",
    "http://host:port/v1", "http://host:99999/v1", "http://[::1/v1", "http://::1:8000/v1", "https:host/v1",
    "http://user:hidden@host/v1", "user:hidden@host/v1", "http://u:hidden/@host:8000",
    "http://host/v1 ?key=hidden", "http://ho st/v1", "http://host/v1\nx", "http://host/v1?key=hidden\x00",
    "http://h\u00f6st\ud83d/v1", "http://" + "a" * 70 + ".example/v1"])
@pytest.mark.parametrize("model", ["", "m"])
def test_an_address_that_is_none_is_one_line_without_a_password(address, model):
    with pytest.raises(InputError, match="^--server .*expected") as refusal:
        Server(address, model, timeout=2)
    assert "hidden" not in str(refusal.value) and str(refusal.value).count("\n") == 0


def test_a_server_on_this_machine_is_asked_without_a_proxy(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert first_window(server).status == "ok"


@pytest.mark.parametrize("code", [401, 403])
@pytest.mark.parametrize("model", ["", "m"])
def test_a_key_that_is_refused_is_one_line(server, monkeypatch, model, code):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    monkeypatch.setattr(Fake, "models", (code, {"error": "Incorrect API key provided: secret-key"}))
    with pytest.raises(InputError, match=rf"HTTP {code}: .*\*\*\*") as refusal:
        Server(server, model)
    assert "secret-key" not in str(refusal.value)


@pytest.mark.parametrize("key", ["two\nlines", "kéy", "\udcff", "“quoted”", "a\tb"])
def test_a_key_that_cannot_be_sent_is_one_line_that_does_not_show_it(server, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(InputError, match="OPENAI_API_KEY: expected a key in one line") as refusal:
        Server(server, "m")
    assert key not in str(refusal.value)
    monkeypatch.setenv("OPENAI_API_KEY", " good \n")
    assert Server(server, "m").key == "good"


# --- faults, and which of them are retried


def fails(code, **head):
    return lambda handler: handler.send(code, {"error": "no"}, **head)


def cuts(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def stalls(handler):
    time.sleep_really(1.0)
    handler.close_connection = True


@pytest.mark.parametrize("bad", [
    fails(429, Retry_After="2"), fails(500), fails(503), fails(529), fails(408), fails(409), fails(425), cuts,
    stalls,
    lambda handler: handler.send(200, b"<html>busy</html>", "text/html"), [1, 2]])
def test_what_may_pass_is_tried_again(server, monkeypatch, bad):
    time.sleep_really = threading.Event().wait  # `time.sleep` is replaced in this test
    Fake.script = [bad, bad]
    window = Reranker(server=server, timeout=0.3).rank("q", ["a", "b"]).windows[0]
    assert window.status == "ok" and len(Fake.seen) == 3


@pytest.mark.parametrize("bad", [
    {"error": {"code": 429, "message": "slow down"}}, {"error": {"code": "503", "message": "busy"}},
    {"error": {"code": "rate_limit_exceeded", "message": "slow down"}}, {"error": "Overloaded"},
    {"choices": [{"error": {"code": 502, "message": "upstream"}, "finish_reason": "error",
                  "message": {"content": "<answer> [1"}}]}])
def test_a_passing_fault_inside_a_200_is_tried_again(server, bad):
    window = first_window(server, bad, bad)
    assert window.status == "ok" and window.order == [1, 0] and len(Fake.seen) == 3 and len(Fake.slept) == 2


@pytest.mark.parametrize("header, seconds", [
    ("7", 7), ("1.5", 1.5), ("300", 60), ("inf", 60), ("0", 0.5), ("-3", 0.5), ("nan", 0.5), ("soon", 0.5),
    ("in 30 s", pytest.approx(30, abs=5)), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.5),
    ("Wed, 21 Oct 99999 07:28:00 GMT", 0.5)])
@pytest.mark.parametrize("code", [429, 503])
def test_retry_after_is_obeyed(server, header, seconds, code):
    busy = {"error": {"code": code, "message": "busy"}}
    if header == "in 30 s":
        header = formatdate(time.time() + 30, usegmt=True)
    assert first_window(server, fails(code, Retry_After=header)).status == "ok"
    assert Fake.slept == [seconds]
    assert first_window(server, lambda handler: handler.send(200, busy, Retry_After=header)).status == "ok"
    assert Fake.slept == [seconds] * 2


def test_pauses_grow(server):
    assert first_window(server, *[fails(503)] * 4).status == "ok" and Fake.slept == [0.5, 1, 2, 4]


@pytest.mark.parametrize("bad, times, words", [
    (fails(400), 1, "HTTP 400"), (fails(401), 1, "HTTP 401"), (fails(500), 5, "HTTP 500"),
    (answer(None), 1, "expected a chat completion"), ({"choices": []}, 1, "expected a chat completion"),
    ({"choices": [{"message": {"content": [1]}}]}, 1, "expected a chat completion"),
    ({"choices": None}, 1, "expected a chat completion"), ({}, 1, "expected a chat completion"),
    ({"choices": [None]}, 1, "expected a chat completion"),
    ({"choices": [{"message": None}]}, 1, "expected a chat completion"),
    (fails(501), 1, "HTTP 501"), (fails(413), 1, "HTTP 413"),
    ({"error": "\ud83d\x1b[2J\nno"}, 1, "no"), ({"choices": 7}, 5, "expected a JSON object"),
    (lambda handler: handler.send(200, b'data: {"choices": []}'), 5, "found 'data: {"),
    (lambda handler: handler.send(200, b"[" * 100_000), 5, "found '[[["),
    (lambda handler: handler.send(200, b""), 5, "found ''")])
def test_an_error_is_never_an_answer(server, bad, times, words):
    Fake.script = [bad] * 9
    window = Reranker(server=server).rank("q", ["a", "b"]).windows[0]
    assert window.status == "error" and words in window.error and window.order == [0, 1]
    assert len(Fake.seen) == times and window.error.isprintable()


def test_the_key_is_never_shown(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    Fake.script = [lambda handler: handler.send(400, {"error": handler.headers["Authorization"]})]
    window = Reranker(server=server).rank("q", ["a", "b"]).windows[0]
    assert "secret-key" not in window.error and "***" in window.error


def test_a_redirect_is_not_followed_with_the_key(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    Fake.script = [fails(302, Location=f"{server}/elsewhere")]
    window = Reranker(server=server).rank("q", ["a", "b"]).windows[0]
    assert window.status == "error" and f"HTTP 302: moved to {server}/elsewhere" in window.error
    assert len(Fake.seen) == 1


# --- reranking by a server


def test_the_answers_to_a_window_have_a_seed_each(server):
    def seeds(seed):
        Fake.seen.clear()
        reranker = Reranker(server=server, temperature=1.0, samples=4, window=2, stride=1, seed=seed)
        windows = reranker.rank("q", ["a", "b", "c"]).windows
        assert [len(window.samples) for window in windows] == [4, 4]
        assert [(window.tokens, window.prompt_tokens) for window in windows] == [(36, 70)] * 2
        assert {body["temperature"] for body, _ in Fake.seen} == {1.0}
        found = {}
        for body, _ in Fake.seen:
            found.setdefault(json.dumps(body["messages"]), set()).add(body["seed"])
        return sorted(map(sorted, found.values()))

    first = seeds(0)
    assert [len(of_window) for of_window in first] == [4, 4] and len({*first[0], *first[1]}) == 8
    assert all(type(seed) is int and 0 <= seed < 2**31 for of_window in first for seed in of_window)
    assert seeds(0) == first and not {*seeds(1)[0]} & {*first[0], *first[1]}


def test_so_many_requests_are_in_flight_and_each_window_gets_its_own_answer(server, monkeypatch):
    three, four, crowded = threading.Barrier(3, timeout=10), threading.Barrier(4), []

    def by_query(body):
        three.wait()  # wait for two more requests
        with contextlib.suppress(threading.BrokenBarrierError):
            crowded.append(four.wait(0.2))
        number = int(re.search(r'query: "(\d+)"', body["messages"][-1]["content"])[1])
        return 200, answer(f"<answer> [{number % 3 + 1}] </answer>")

    monkeypatch.setattr(Fake, "rule", staticmethod(by_query))
    lists = [(str(n), ["a", "b", "c"]) for n in range(12)]
    rankings = Reranker(server=server, concurrency=3).rank_many(lists)
    assert [ranking[0].index for ranking in rankings] == [0, 1, 2] * 4 and not crowded


def test_a_filtered_answer_has_no_vote(server):
    window = first_window(server, answer(ORDER, "content_filter"), answer("<answer> [1] > [2] </answer>"),
                          answer(ORDER, "content_filter"), temperature=1, samples=3, concurrency=1)
    assert window.status == "error" and window.order == [0, 1]
    assert [order for _, _, order in window.samples] == [[0, 1]] * 3


def test_reasoning_that_was_cut_off_has_no_vote(server):
    votes = [answer(text, finish) for text, finish in (
        ("<think> [1] > [2], [1] > [2]", "length"), ("<think> [1] > [2] and", "length"), (ORDER, "stop"))]
    window = first_window(server, *votes, temperature=1.0, samples=3, concurrency=1)
    assert [status for _, status, _ in window.samples] == ["truncated", "truncated", "ok"]
    assert window.order == [1, 0] and window.status == "truncated"


def test_errors_of_a_server_are_counted_and_end_with_status_1(server, tmp_path, capsys):
    write_candidates(tmp_path / "c.jsonl", toy_task(3, 3, seed=0)[0])
    Fake.script = [fails(400)]
    files = ["--input", str(tmp_path / "c.jsonl"), "--output", str(tmp_path / "r"), "--server", server]
    assert rearank.main([*files, "--concurrency", "1", "--stats", str(tmp_path / "s.json")]) == 1
    stats = json.loads((tmp_path / "s.json").read_text())
    assert (stats["error"], stats["repaired"], stats["new tokens"], stats["calls"]) == (1, 2, 18, 3)
    told = capsys.readouterr()
    assert "1 error" in told.out and "HTTP 400" in told.err and len(read_run(tmp_path / "r")) == 3
    before = len(Fake.seen)
    assert rearank.main([*files, "--concurrency", "1", "--resume"]) == 0  # asks from the failed query on
    assert len(Fake.seen) == before + 3 and "0 error" in capsys.readouterr().out


def test_a_server_that_answers_nothing_is_not_asked_for_every_query(server, tmp_path, capsys):
    """The address may be wrong. The run can be resumed, and the message does not blame the prompt."""
    write_candidates(tmp_path / "c.jsonl", toy_task(20, 3, seed=0)[0])
    Fake.script = [fails(404)] * 20
    files = ["--input", str(tmp_path / "c.jsonl"), "--output", str(tmp_path / "r"), "--server", server,
             "--concurrency", "4"]
    with pytest.raises(InputError, match="no window has got an answer so far; the other queries were not"):
        rearank.main(files)
    told = capsys.readouterr()
    assert "8 windows without an answer, the first: HTTP 404" in told.err and "rankgpt" not in told.err
    assert len(Fake.seen) == 8
    Fake.script = []
    assert rearank.main([*files, "--resume"]) == 0 and len(read_run(tmp_path / "r")) == 20


def test_where_no_window_got_an_answer_the_prompt_is_not_blamed(server, tmp_path, capsys):
    write_candidates(tmp_path / "c.jsonl", toy_task(2, 3, seed=0)[0])
    Fake.script = [fails(400)] * 2
    assert rearank.main(["--input", str(tmp_path / "c.jsonl"), "--output", str(tmp_path / "r"),
                         "--server", server]) == 1
    told = capsys.readouterr()
    assert "2 error" in told.out and "rankgpt" not in told.err


def test_a_query_that_gets_no_answer_ends_with_status_1(server, tmp_path, capsys):
    (tmp_path / "lines.txt").write_text("wax\nhoney\n")
    command = ["--server", server, "--query", "q", str(tmp_path / "lines.txt")]
    assert rearank.main(command) == 0
    capsys.readouterr()
    Fake.script.append(fails(400))
    assert rearank.main(command) == 1
    told = capsys.readouterr()
    assert told.out.splitlines() == ["  1. [1] wax", "  2. [2] honey"] and "HTTP 400" in told.err
