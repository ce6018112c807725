"""A fake chat server. Each test tells it how to answer and which requests to refuse."""

import http.server
import json
import threading

import pytest

from rearank import Reranker
from support import openai_client


class Fake(http.server.BaseHTTPRequestHandler):
    """A chat server that is controlled by the class attributes below."""

    script: list = []  # replies to successive chats; a function is called with the handler instead
    rule = None  # a function of a request's body. It returns (status, error) to refuse it, else None
    models = (200, {"data": [{"id": "first"}]})
    seen: list = []  # (body, headers) of each chat
    paths: list = []
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def send(self, code, body, kind="application/json", **head):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in ({"Content-Type": kind, "Content-Length": str(len(body))} | head).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.paths.append(self.path)
        self.send(*self.models)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((body, dict(self.headers)))
        self.paths.append(self.path)
        if refusal := self.rule and self.rule(body):
            self.send(*refusal)
            return
        act = self.script.pop(0) if self.script else answer("<think> x </think> <answer> [2] > [1] </answer>")
        if callable(act):
            act(self)
        else:
            self.send(200, act)


def answer(content, finish="stop", **message):
    return {"choices": [{"message": {"role": "assistant", "content": content} | message,
                         "finish_reason": finish}], "usage": {"completion_tokens": 9, "prompt_tokens": 70}}


ORDER = "<think> x </think> <answer> [2] > [1] </answer>"


@pytest.fixture
def server(monkeypatch):
    for name, value in {"script": [], "seen": [], "paths": [], "slept": [], "rule": None}.items():
        monkeypatch.setattr(Fake, name, value, raising=False)
    monkeypatch.setattr(Fake, "models", Fake.models)
    monkeypatch.setattr(openai_client.time, "sleep", Fake.slept.append)
    for variable in ("REARANK_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Fake) as web:
        threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}/v1"
        web.shutdown()


def first_window(server, *script, **options):
    """Rank two passages by a server that replies with `script`. Returns the first window."""
    Fake.script.extend(script)
    return Reranker(server=server, **options).rank("q", ["a", "b"]).windows[0]
