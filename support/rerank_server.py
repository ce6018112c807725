"""A /rerank address in the form of Cohere and Jina, for other people's programs."""

import http.server
import json
import os
import queue
import sys
import threading
from concurrent.futures import Future
from secrets import compare_digest, token_hex

from support.cli import InputError

METHODS = {"/health": "GET", "/rerank": "POST", "/v1/rerank": "POST", "/v2/rerank": "POST"}
MAX_BODY, MAX_BATCH = 8 * 2**20, 32  # bytes of a request; requests of a batch


def check(fits: bool, reason: str, status: int = 400) -> None:
    """InputError with this reason, and HTTP's status for the reply, unless it `fits`."""
    if not fits:
        error = InputError(reason)
        error.status = status
        raise error


class Handler(http.server.BaseHTTPRequestHandler):
    """A connection: one request and its reply. Then it ends, so nothing unread is taken for a request."""

    timeout = 30  # seconds that a client may be silent

    def do_POST(self):
        try:
            status, data = 200, json.dumps(self.answer())
        except Exception as error:  # without a status: the request could not be read
            reason = " ".join(f"{type(error).__name__}: {error}".removeprefix("InputError: ").split())[:300]
            status, data = getattr(error, "status", 400), json.dumps({"message": reason, "detail": reason})
            self.log_error("%s", reason)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data.encode())
        while self.connection.recv(2**16):  # clients send their whole body before they read a reply
            pass

    do_GET = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_POST

    def answer(self) -> dict:
        """The content of the reply, when the model has answered. Raises if there is no ranking."""
        path, key = self.path.partition("?")[0], self.server.key
        check(path in METHODS, f"unknown path: expected one of {', '.join(METHODS)}", 404)
        check(self.command == METHODS[path], f"{path}: expected {METHODS[path]}", 405)
        if path == "/health":
            return {"status": "ok"}
        given, length = (self.headers.get(name, "") for name in ("Authorization", "Content-Length"))
        check(not key or compare_digest(given.encode(), f"Bearer {key}".encode()), "wrong key, or none", 401)
        check(length.isdecimal(), "Content-Length: expected a number", 411)
        check(len(length) < 9 and int(length) <= MAX_BODY, f"body: expected at most {MAX_BODY} bytes", 413)
        request = json.loads(self.rfile.read(int(length)))
        check(isinstance(request, dict), "expected a JSON object")
        query, docs, top_n, with_texts = map(request.get, "query documents top_n return_documents".split())
        check(isinstance(query, str) and query.strip(), "query: expected a text")
        check(isinstance(docs, list) and 0 < len(docs) <= 1000, "documents: expected a list of 1 to 1000")
        texts = [doc.get("text") if isinstance(doc, dict) else doc for doc in docs]
        check(all(isinstance(text, str) for text in texts), 'documents: expected strings or {"text"}')
        check(top_n is None or type(top_n) is int and top_n > 0, "top_n: expected a number from 1")
        check(with_texts is None or type(with_texts) is bool, "return_documents: expected true or false")
        "".join([query, *texts]).encode()  # ValueError: half a surrogate pair, which no tokenizer takes
        ranked = Future()
        self.server.waiting.put((ranked, query, texts))
        ranking = ranked.result()
        for window in ranking.windows:
            check(not window.error, window.error, 502)
        results = []
        for rank, result in enumerate(ranking[:top_n]):
            score = 1 - rank / max(1, len(texts) - 1)  # from 1, of the first one, to 0, of the last one
            document = {"document": {"text": texts[result.index]}} if with_texts else {}
            results.append({"index": result.index, "relevance_score": score, **document})
        tokens = {"input_tokens": sum(window.prompt_tokens for window in ranking.windows),
                  "output_tokens": sum(window.tokens for window in ranking.windows)}
        meta = {"tokens": tokens, "statuses": [window.status for window in ranking.windows]}
        return {"id": token_hex(8), "model": self.server.model, "results": results, "meta": meta}

def serve(rank_many, port: int, host: str = "127.0.0.1", model: str = "") -> None:
    """Answer requests until Ctrl-C. Port 0 is any free one. InputError if the address cannot be used.
    Only this thread asks the model: all requests that wait, up to MAX_BATCH, are one batch."""
    try:
        server = http.server.ThreadingHTTPServer((host, port), Handler)
    except (OSError, OverflowError, TypeError) as error:
        raise InputError(f"--serve {port}: cannot listen on {host}: {error}") from None
    server.socket.listen(128)  # connections that may wait for their thread; socketserver's 5 are too few
    server.handle_error = lambda *_: None  # a client has hung up
    server.waiting, server.model, server.key = queue.Queue(), model, os.environ.get("REARANK_SERVE_KEY", "")
    print(f"listening on http://{host}:{server.server_port}/rerank", file=sys.stderr)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    retry = []  # the requests of a batch that failed: they are asked one by one
    while True:
        count = max(1, min(MAX_BATCH, server.waiting.qsize()))
        batch = [retry.pop()] if retry else [server.waiting.get() for _ in range(count)]
        try:
            for (ranked, *_), ranking in zip(batch, rank_many([(query, texts) for _, query, texts in batch])):
                ranked.set_result(ranking)
        except Exception as error:
            # 500 where another error led to this one, as in InputErrors about memory.
            error.status = 400 if isinstance(error, ValueError) and not error.__context__ else 500
            if len(batch) == 1:
                batch[0][0].set_exception(error)
            else:
                retry = batch
