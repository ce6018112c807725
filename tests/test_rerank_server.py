"""The HTTP server of `rearank.py --serve`: requests to /rerank, replies, faults, slow clients."""

import contextlib
import http.client
import http.server
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from rearank import Reranker
from support import rerank_server
from support.cli import InputError
from support.rerank_server import serve

ROOT = Path(__file__).resolve().parents[1]
ASK = {"query": "fleas", "documents": ["a", {"text": "b"}, "c"]}


class Stop(BaseException):
    """Raised to end the serving thread, as Ctrl-C would."""


class Model:
    """A stand-in whose `rank_many` reverses each list. Some queries make it wait, fail or stop."""

    def __init__(self):
        self.calls, self.threads, self.free, self.asked = [], set(), threading.Event(), threading.Event()

    def rank_many(self, lists):
        queries = [query for query, _ in lists]
        self.calls.append(queries)
        self.threads.add(threading.get_ident())
        if "stop" in queries:
            raise Stop
        if "hold" in queries:
            self.asked.set()
            assert self.free.wait(10)
        if "too long" in queries:
            raise InputError("20 passages do not fit")
        if "too much" in queries:
            try:
                raise RuntimeError("CUDA out of memory")
            except RuntimeError:
                raise InputError("too little memory") from None
        if "bug" in queries:
            raise ZeroDivisionError("division\nby zero")
        return [self.ranking(query, texts) for query, texts in lists]

    def ranking(self, query, texts):
        class Ranking(list):
            windows = [types.SimpleNamespace(error="", status="ok", tokens=5, prompt_tokens=70),
                       types.SimpleNamespace(error="HTTP 500: gone" * (query == "no server"), status="ok",
                                             tokens=2, prompt_tokens=30)]
        return Ranking(types.SimpleNamespace(index=i) for i in reversed(range(len(texts))))


class Recorded(http.server.ThreadingHTTPServer):
    """Keeps the server that `serve` creates, so that tests can read its port and its queue."""

    made = []

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.made.append(self)


def start(rank_many, **options):
    """Run `serve` in a thread, on a free port. Returns the http.server object."""
    def run():
        with contextlib.suppress(Stop):
            serve(rank_many, 0, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http.server, "ThreadingHTTPServer", Recorded)
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        wait_until(lambda: Recorded.made and hasattr(Recorded.made[-1], "key"))
    return Recorded.made.pop()


def wait_until(fits):
    """Wait until `fits()` is true, at most five seconds."""
    deadline = time.monotonic() + 5
    while not fits():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture(scope="module")
def running():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("REARANK_SERVE_KEY", raising=False)
        model = Model()
        web = start(lambda lists: model.rank_many(lists), model="Rearank-7B")
        web.of = model
        yield web
        model.__init__()
        post(web, {"query": "stop", "documents": ["a"]}, wait=False)
        web.shutdown()
        web.server_close()


@pytest.fixture
def web(running):
    running.of.__init__()
    yield running
    running.of.free.set()


def post(web, body, path="/rerank", method="POST", wait=True, **head):
    """Send a request. Returns (status, the reply's JSON), or the open connection if wait=False."""
    body = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    connection = http.client.HTTPConnection(*web.server_address[:2], timeout=5)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in head.items()})
    return reply(connection) if wait else connection


def reply(connection):
    with contextlib.closing(connection):
        response = connection.getresponse()
        assert response.headers["Content-Type"] == "application/json"
        return response.status, json.loads(response.read())


def order(answer):
    status, content = answer
    assert status == 200, content
    return [result["index"] for result in content["results"]]


# --- the form of requests and replies


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank", "/v1/rerank?trace=1"])
def test_a_ranking_has_the_form_of_cohere_and_jina(web, path):
    status, content = post(web, ASK | {"model": "any", "top_n": 2, "return_documents": True}, path)
    assert status == 200 and len(content.pop("id")) == 16
    assert content == {
        "model": "Rearank-7B",
        "meta": {"tokens": {"input_tokens": 100, "output_tokens": 7}, "statuses": ["ok", "ok"]},
        "results": [{"index": 2, "relevance_score": 1.0, "document": {"text": "c"}},
                    {"index": 1, "relevance_score": 0.5, "document": {"text": "b"}}]}


@pytest.mark.parametrize("options", [{}, {"top_n": None, "return_documents": None},
                                     {"top_n": 9, "return_documents": False}])
def test_without_options_all_documents_come_as_numbers_and_scores_from_1_to_0(web, options):
    _, content = post(web, ASK | options)
    assert content["results"] == [{"index": 2, "relevance_score": 1.0}, {"index": 1, "relevance_score": 0.5},
                                  {"index": 0, "relevance_score": 0.0}]


def test_one_document_has_the_score_1(web):
    assert post(web, ASK | {"documents": ["a"]})[1]["results"] == [{"index": 0, "relevance_score": 1.0}]


def test_the_server_can_be_asked_whether_it_is_there_while_the_model_works(web):
    held = post(web, ASK | {"query": "hold"}, wait=False)
    assert web.of.asked.wait(5)
    assert post(web, None, "/health", "GET") == (200, {"status": "ok"})
    web.of.free.set()
    assert order(reply(held)) == [2, 1, 0]


def test_cohere_s_own_client_reads_it(web, monkeypatch):
    cohere = pytest.importorskip("cohere")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    address = f"http://127.0.0.1:{web.server_port}"
    got = cohere.ClientV2("key", base_url=address).rerank(model="m", query="fleas", documents=["a", "b", "c"],
                                                          top_n=2)
    assert [(r.index, r.relevance_score) for r in got.results] == [(2, 1.0), (1, 0.5)]
    assert got.meta.tokens.output_tokens == 7
    got = cohere.Client("key", base_url=address).rerank(query="fleas", documents=["a", {"text": "b"}],
                                                        return_documents=True)
    assert [r.document.text for r in got.results] == ["b", "a"]
    with pytest.raises(cohere.BadRequestError, match="documents: expected"):
        cohere.ClientV2("key", base_url=address).rerank(model="m", query="fleas", documents=[])


def test_a_reranker_s_own_rank_many_is_served(web, toy, monkeypatch):
    reranker = Reranker(toy, prompt="toy", max_new_tokens=4, window=3, stride=2)
    monkeypatch.setattr(web.of, "rank_many", reranker.rank_many)
    ask = {"query": "oak", "documents": ["oak leaf", "storm", "flour", "loan"]}
    status, content = post(web, ask)
    ranking = reranker.rank(ask["query"], ask["documents"])
    assert order((status, content)) == [result.index for result in ranking]
    assert content["meta"]["tokens"] == {"input_tokens": sum(w.prompt_tokens for w in ranking.windows),
                                         "output_tokens": sum(w.tokens for w in ranking.windows)}


# --- bad requests


@pytest.mark.parametrize("body, reason", [
    (b"", "Expecting value"), (b'{"query": "a", "docu', "Unterminated string"),
    (b'{"query": "\xff"}', "can't decode"), (b"[" * 100_000, "RecursionError"),
    ([], "expected a JSON object"), ({"documents": ["a"]}, "query: expected a text"),
    (ASK | {"query": 3}, "query: expected a text"), (ASK | {"query": " "}, "query: expected a text"),
    ({"query": "a"}, "documents: expected a list"), (ASK | {"documents": "a"}, "documents: expected a list"),
    (ASK | {"documents": []}, "documents: expected a list of 1 to 1000"),
    (ASK | {"documents": ["a"] * 1001}, "documents: expected a list of 1 to 1000"),
    (ASK | {"documents": ["a", 3]}, 'documents: expected strings or {"text"}'),
    (ASK | {"documents": ["a", {"title": "b"}]}, 'documents: expected strings or {"text"}'),
    (ASK | {"top_n": 0}, "top_n: expected a number"), (ASK | {"top_n": True}, "top_n: expected a number"),
    (ASK | {"top_n": float("nan")}, "top_n: expected a number"),
    (ASK | {"top_n": "2"}, "top_n: expected a number"),
    (ASK | {"return_documents": 1}, "return_documents: expected true or false"),
    (ASK | {"query": "\ud800"}, "surrogates not allowed"),
    (ASK | {"documents": ["a", "\ud800"]}, "surrogates not allowed")])
def test_a_bad_request_gets_one_line_and_does_not_reach_the_model(web, body, reason):
    status, content = post(web, body)
    assert status == 400 and reason in content["message"] and "\n" not in content["message"]
    assert content == {"message": content["message"], "detail": content["message"]}
    assert web.of.calls == []


@pytest.mark.parametrize("method, path, status, reason", [
    ("POST", "/", 404, "unknown path"), ("GET", "/v3/rerank", 404, "unknown path"),
    ("GET", "/rerank", 405, "expected POST"), ("PUT", "/v1/rerank", 405, "expected POST"),
    ("DELETE", "/rerank", 405, "expected POST"), ("POST", "/health", 405, "expected GET")])
def test_another_path_or_method_is_refused(web, method, path, status, reason):
    found, content = post(web, ASK, path, method)
    assert found == status and reason in content["message"]


@pytest.mark.parametrize("length, status", [("", 411), ("1x", 411), ("-1", 411), ("9" * 5000, 413),
                                            (str(8 * 2**20 + 1), 413)])
def test_a_length_must_be_a_number_of_at_most_8_mib(web, length, status):
    assert post(web, None, Content_Length=length)[0] == status


def test_a_body_in_chunks_needs_a_length(web):
    connection = http.client.HTTPConnection(*web.server_address[:2], timeout=5)
    connection.request("POST", "/rerank", iter([b"{}"]))
    assert reply(connection)[0] == 411


@pytest.mark.parametrize("path, status", [("/rerank", 413), ("/elsewhere", 404)])
def test_a_client_that_sends_all_of_a_large_body_still_gets_the_reply(web, path, status):
    assert post(web, b" " * (9 * 2**20), path)[0] == status


def test_a_body_of_8_mib_is_read(web):
    body = json.dumps(ASK).encode()
    assert order(post(web, body + b" " * (8 * 2**20 - len(body)))) == [2, 1, 0]


def test_what_follows_a_refused_request_is_not_read_as_another(web):
    with socket.create_connection(web.server_address) as client:
        client.sendall(b"POST /nowhere HTTP/1.1\r\nContent-Length: 24\r\n\r\nGET /health HTTP/1.1\r\n\r\n")
        client.shutdown(socket.SHUT_WR)
        received = b"".join(iter(lambda: client.recv(2**16), b""))
    assert received.count(b"HTTP/1.") == 1 and b" 404 " in received


@pytest.mark.parametrize("given, status", [(None, 401), ("Bearer wrong", 401), ("secret", 401),
                                           ("Bearer schl\xfcssel", 401), ("Bearer secret", 200)])
def test_a_key_is_asked_for(web, monkeypatch, given, status):
    monkeypatch.setattr(web, "key", "secret")
    head = {"Authorization": given} if given else {}
    assert post(web, ASK, **head)[0] == status
    assert post(web, None, "/health", "GET")[0] == 200


# --- faults of the model


@pytest.mark.parametrize("query, status, reason", [
    ("too long", 400, "20 passages do not fit"), ("too much", 500, "too little memory"),
    ("bug", 500, "ZeroDivisionError: division by zero"), ("no server", 502, "HTTP 500: gone")])
def test_a_fault_is_a_line_for_client_and_log_and_the_server_goes_on(web, capsys, query, status, reason):
    assert post(web, ASK | {"query": query}) == (status, {"message": reason, "detail": reason})
    assert order(post(web, ASK)) == [2, 1, 0]
    assert reason in capsys.readouterr().err


# --- many requests at once


def ask_while_held(web, asks):
    """Send these requests while the model works on another one. Returns their replies."""
    held = post(web, ASK | {"query": "hold"}, wait=False)
    assert web.of.asked.wait(5)
    sent = [post(web, ask, wait=False) for ask in asks]
    wait_until(lambda: web.waiting.qsize() == len(asks))
    web.of.free.set()
    replies = [reply(connection) for connection in sent]
    assert order(reply(held)) == [2, 1, 0]
    return replies


def test_requests_that_wait_together_share_a_batch_and_one_thread_asks_the_model(web):
    asks = [{"query": str(n), "documents": ["a"] * (n + 1)} for n in range(10)]
    for n, got in enumerate(ask_while_held(web, asks)):
        assert order(got) == [*reversed(range(n + 1))]
    first, second = web.of.calls
    assert first == ["hold"] and sorted(second) == [str(n) for n in range(10)]
    assert len(web.of.threads) == 1


def test_a_batch_is_bounded(web, monkeypatch):
    monkeypatch.setattr(rerank_server, "MAX_BATCH", 4)
    ask_while_held(web, [ASK] * 10)
    assert [len(call) for call in web.of.calls] == [1, 4, 4, 2]


@pytest.mark.parametrize("bad, status", [("too long", 400), ("too much", 500), ("bug", 500)])
def test_a_bad_request_does_not_spoil_those_in_its_batch(web, bad, status):
    first, second, third = ask_while_held(web, [ASK, ASK | {"query": bad}, ASK])
    assert order(first) == order(third) == [2, 1, 0] and second[0] == status


# --- slow clients, lost clients


def half_a_request(web):
    client = socket.create_connection(web.server_address, timeout=5)
    client.sendall(b'POST /rerank HTTP/1.1\r\nContent-Length: 500\r\n\r\n{"query": ')
    return client


def test_a_slow_client_blocks_nobody_and_is_given_up(web, monkeypatch):
    assert rerank_server.Handler.timeout <= 60
    monkeypatch.setattr(rerank_server.Handler, "timeout", 0.1)
    with half_a_request(web) as client:
        assert order(post(web, ASK)) == [2, 1, 0]
        assert b"TimeoutError" in b"".join(iter(lambda: client.recv(2**16), b""))


def test_half_a_body_is_a_bad_request(web):
    with half_a_request(web) as client:
        client.shutdown(socket.SHUT_WR)
        assert b"JSONDecodeError" in b"".join(iter(lambda: client.recv(2**16), b""))


def test_a_client_that_hangs_up_blocks_nobody_and_makes_no_traceback(web, capfd):
    connections = [half_a_request(web)]
    held = post(web, ASK | {"query": "hold"}, wait=False)
    assert web.of.asked.wait(5)
    connections += [post(web, ASK, wait=False).sock, held.sock]
    wait_until(lambda: web.waiting.qsize() == 1)
    for client in connections:  # close by a reset, not regularly
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
    web.of.free.set()
    assert order(post(web, ASK)) == [2, 1, 0]
    wait_until(lambda: not [thread for thread in threading.enumerate() if "process_request" in thread.name])
    assert "Traceback" not in capfd.readouterr().err


# --- the address


def test_only_this_machine_is_served_unless_another_host_is_given(web):
    assert web.server_address[0] == "127.0.0.1"


def test_an_address_that_cannot_be_used_is_one_line(web):
    with pytest.raises(InputError, match=f"^--serve {web.server_port}: cannot listen on 127.0.0.1: .*in use"):
        serve(None, web.server_port)
    for port, host in ((70000, "127.0.0.1"), (0, "192.0.2.1"), (0, "\xfc" * 70)):
        with pytest.raises(InputError, match=f"^--serve {port}: cannot listen on {host}: [^\n]+$"):
            serve(None, port, host)


SCRIPT = """
import signal, sys, time
from support.cli import run_main
from support.rerank_server import serve
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore SIGINT
run_main(lambda: serve(lambda lists: (print("asked", file=sys.stderr), time.sleep(60)), 0))
"""


@pytest.mark.parametrize("sign, busy", [(signal.SIGINT, False), (signal.SIGINT, True),
                                        (signal.SIGTERM, False)])
def test_ctrl_c_ends_it_with_status_130_also_while_the_model_works(sign, busy):
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"REARANK_SERVE_KEY": "secret"})
    guard = threading.Timer(10, process.kill)  # a test that hangs must fail
    guard.start()
    try:
        line = process.stderr.readline()
        assert line.startswith("listening on http://127.0.0.1:") and line.endswith("/rerank\n")
        web = types.SimpleNamespace(server_address=("127.0.0.1", int(line.split(":")[2].split("/")[0])))
        assert post(web, ASK)[0] == 401  # the key is read from the environment
        if busy:
            post(web, ASK, wait=False, Authorization="Bearer secret")
            assert any(line == "asked\n" for line in process.stderr)
        process.send_signal(sign)
        _, errors = process.communicate()
    finally:
        guard.cancel()
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted" and "Traceback" not in errors
