"""A /rerank address in Cohere's and Jina's form: serve(reranker.rank_many, 8000).

A thread per connection reads the request, puts it into a queue and waits. The thread that called `serve`
alone asks the model, and takes all requests that wait at that moment as one batch.
"""

import hmac
import http.server
import json
import os
import queue
import socket
import socketserver
import sys
import threading
import uuid
from concurrent.futures import Future

from support.cli import InputError

METHODS = {"/health": "GET", "/rerank": "POST", "/v1/rerank": "POST", "/v2/rerank": "POST"}
MAX_BODY, MAX_BATCH = 8 * 2**20, 32  # bytes of a request, requests


class Refused(Exception):
    """A request that gets no ranking. args: HTTP's status, the reason."""


def expect(fits: bool, what: str, found) -> None:
    """Refused with status 400 unless it `fits`: `what` was expected, and what was found."""
    if not fits:
        raise Refused(400, f"{what}, found {found!r:.60}")


def read_request(body: bytes) -> tuple[str, list[str], int | None, bool]:
    """(query, texts, top_n, return_documents) of a request's body. Refused if something in it is wrong."""
    try:
        request = json.loads(body)
        expect(isinstance(request, dict), "expected a JSON object", request)
        query, documents, top_n, wanted = map(request.get, ("query", "documents", "top_n", "return_documents"))
        expect(isinstance(query, str) and query.strip() != "", "query: expected a text", query)
        expect(isinstance(documents, list) and 0 < len(documents) <= 1000,
               'documents: expected a list of 1 to 1000 strings or {"text"}', documents)
        expect(top_n is None or type(top_n) is int and top_n > 0, "top_n: expected a number from 1", top_n)
        expect(wanted is None or type(wanted) is bool, "return_documents: expected true or false", wanted)
        texts = []
        for i, document in enumerate(documents):
            fields = document if isinstance(document, dict) else {"text": document}
            text, title = fields.get("text"), fields.get("title") or ""
            expect(isinstance(text, str) and isinstance(title, str),
                   f'documents[{i}]: expected a string or {{"text"}}', document)
            texts.append(f"{title} {text}" if title else text)
        "".join([query, *texts]).encode()  # half a surrogate pair would stop the tokenizer
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"expected JSON in UTF-8: {error}") from None
    return query, texts, top_n, bool(wanted)


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"  # several requests may come over a connection
    timeout = 30  # seconds that a client may stay silent
    disable_nagle_algorithm = True  # a reply's head does not wait for its body

    def do_POST(self):
        """Reply to a request of any method."""
        try:
            self.reply(200, self.answer())
        except Refused as refusal:
            self.send_error(*refusal.args)

    do_GET = do_HEAD = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_POST

    def answer(self) -> dict:
        """The reply's content, when the model has answered. Refused if there is no ranking."""
        path = self.path.partition("?")[0]
        if path not in METHODS:
            raise Refused(404, f"unknown path; expected one of {', '.join(METHODS)}")
        if self.command != METHODS[path]:
            raise Refused(405, f"{path}: expected {METHODS[path]}")
        if path == "/health":
            self.close_connection = True  # a body, if it has one, is not read
            return {"status": "ok"}
        key, given = self.server.key, self.headers.get("Authorization", "")
        if key and not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
            raise Refused(401, "expected 'Authorization: Bearer KEY' with this server's key")
        query, texts, top_n, return_documents = read_request(self.read_body())
        self.asked, self.ranking = (query, texts), Future()
        self.server.waiting.put(self)
        ranking = self.ranking.result()
        results = []
        for rank, result in enumerate(ranking[:top_n]):
            score = 1 - rank / max(1, len(texts) - 1)  # 1 for the first of all documents, 0 for the last
            results.append({"index": result.index, "relevance_score": score})
            if return_documents:
                results[-1]["document"] = {"text": texts[result.index]}
        tokens = {"input_tokens": sum(w.prompt_tokens for w in ranking.windows),
                  "output_tokens": sum(w.tokens for w in ranking.windows)}
        warnings = [f"window {i}: answer {w.status}" for i, w in enumerate(ranking.windows, 1) if w.status != "ok"]
        return {"id": str(uuid.uuid4()), "model": self.server.model, "results": results,
                "meta": {"api_version": {"version": "2"}, "tokens": tokens, "warnings": warnings},
                "usage": {"total_tokens": sum(tokens.values())}}

    def read_body(self) -> bytes:
        """The request's body. Refused if its length is missing, wrong or too large."""
        length = ",".join(self.headers.get_all("Content-Length", []))
        if "Transfer-Encoding" in self.headers or not length:
            raise Refused(411, "expected a body with Content-Length")
        expect(length.isdecimal() and len(length) < 19, "Content-Length: expected a number", length)
        if int(length) > MAX_BODY:
            raise Refused(413, f"expected a body of at most {MAX_BODY} bytes")
        body = self.rfile.read(int(length))
        expect(len(body) == int(length), f"expected a body of {length} bytes", len(body))
        return body

    def reply(self, status: int, content: dict) -> None:
        """Send a reply, and write a line to the log."""
        data = json.dumps(content).encode()
        self.log_request(status, content.get("message", "-"))
        self.send_response_only(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Connection", "close" if self.close_connection else "keep-alive")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Reply with one line, and end the connection. http.server calls this too."""
        line = " ".join((message or http.HTTPStatus(code).phrase).split())[:300]
        self.close_connection = True
        self.reply(code, {"message": line, "detail": line})  # Cohere's field, Jina's field
        self.connection.shutdown(socket.SHUT_WR)
        while self.connection.recv(2**16):  # a client reads the reply when it has sent its whole body
            pass


class Server(socketserver.ThreadingTCPServer):
    """The listening socket, and the requests that wait. (http.server's own looks up the host's name.)"""

    daemon_threads = allow_reuse_address = True
    request_queue_size = 128  # connections that wait for their thread

    def handle_error(self, request, client_address):
        """A client hung up, say."""
        print(f"{client_address[0]}: {sys.exc_info()[1]!r}", file=sys.stderr)


def rank_batch(rank_many, requests: list[Handler]) -> None:
    """Rank these requests together; after a fault, one by one, since it may be the fault of only one."""
    try:
        for request, ranking in zip(requests, rank_many([request.asked for request in requests])):
            error = next((window.error for window in ranking.windows if window.error), "")
            ...
