"""A client for OpenAI-compatible chat servers: vLLM, SGLang, llama.cpp, Ollama, hosted models.

    answer = Server("http://localhost:8000/v1").answer(messages, temperature=0.0, seed=0, max_tokens=2048)

Servers differ in the fields that they refuse and in the form of their answers (chat_replies.py).
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import os
import re
import sys
import threading
import time
import urllib.request
import zlib

from support.chat_replies import (FALLBACKS, Answer, Fault, check_reply, fold_system, read_completion,
                                  refused_field, retry_after)
from support.cli import InputError


class Server:
    """An OpenAI-compatible server that answers chats.

    `url` usually ends in /v1; its query (Azure's api-version) is sent with every request. `model` may be left
    out if the server has only one. The key, if needed, is read from REARANK_API_KEY or OPENAI_API_KEY.
    InputError if no server answers, if it refuses the key, or if it is not clear which model is meant.
    """

    def __init__(self, url: str, model: str = "", timeout: float = 600.0):
        variable = "REARANK_API_KEY" if os.environ.get("REARANK_API_KEY") else "OPENAI_API_KEY"
        self.key = os.environ.get(variable, "").strip()
        if not (self.key.isascii() and self.key.isprintable()):
            raise InputError(f"{variable}: expected a key in one line, of ASCII characters")
        url = url.strip()
        address, _, self.query = url.partition("#")[0].partition("?")
        self.label = "--server " + self.one_line(re.sub(r"^(\w+://)?.*@", r"\1", address))
        parts = re.fullmatch(r"(https?://([\w.-]+|\[[\w:.%]+\])(?::\d+)?)(/\S*)?", address, re.I)
        if not parts or " " in url or not url.isprintable():
            raise InputError(f"{self.label}: expected an address like http://host:8000/v1, no password")
        origin, host, path = parts.groups("")
        self.base = origin + re.sub(r"/+((chat/)?completions|models)?/*$", "", path)
        self.head = {"Content-Type": "application/json", "User-Agent": "rearank"}  # some block Python's own
        if self.key:
            self.head["Authorization"] = f"Bearer {self.key}"
        here = host.lower() in ("localhost", "127.0.0.1", "[::1]")  # not behind a proxy
        proxy = urllib.request.ProxyHandler({} if here else None)
        # Not build_opener: it would also follow redirects, and send the key along.
        self.opener = urllib.request.OpenerDirector()
        for handler in (proxy, urllib.request.HTTPHandler(), urllib.request.HTTPSHandler()):
            self.opener.add_handler(handler)
        self.timeout, self.replaced, self.lock = timeout, {}, threading.Lock()
        self.model = self.find_model(model)

    def find_model(self, model: str) -> str:
        """The name of the model: the given one, else the only one that the server lists."""
        names, usable = [], True
        try:
            reply = self.exchange("/models")
            listed = reply.get("data") or reply.get("models")  # "models": llama.cpp, Ollama
            for entry in listed if isinstance(listed, list) else []:
                names.append(entry.get("id") or entry.get("name") if isinstance(entry, dict) else entry)
            names = [*dict.fromkeys(name for name in names if isinstance(name, str))]
            found = f"lists {len(names)} models: {', '.join(names[:10])}"
        except Fault as fault:
            code, found, _ = fault.args
            # A key may be good for chats but not for this list: the text then speaks of its "scope".
            usable = code not in (0, 401, 403) or "scope" in found
        if model and usable:
            return model
        if len(names) == 1:
            print(f"{self.label}: its only model is {self.one_line(names[0])}", file=sys.stderr)
            return names[0]
        hint = ("name one with --model" if names else "expected the address of an OpenAI-compatible server "
                "(http://host:8000/v1), --model NAME if it lists none")
        raise InputError(f"{self.label}: {self.one_line(found)}; {hint}")

    def one_line(self, text: str) -> str:
        """The beginning of a server's text in one line. The key is hidden: a server may send it back."""
        text = text.replace(self.key, "***") if self.key else text
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:300]

    def answer(self, messages: list[dict], **options) -> Answer:
        """The answer to one chat. options: temperature, seed, max_tokens.

        A refused field is replaced from then on. Faults that may pass are tried again after growing pauses.
        """
        tries = 0
        while True:
            named = {self.replaced.get(name, name): value for name, value in options.items()}
            named.pop("", None)
            chat = fold_system(messages) if "system" in self.replaced else messages
            body = {"model": self.model, "messages": chat} | named
            try:
                answer = read_completion(self.exchange("/chat/completions", body))
                return dataclasses.replace(answer, error=self.one_line(answer.error))
            except Fault as fault:
                code, text, wait = fault.args
            refused = refused_field(text, body) if code in (400, 422, 500) else None
            if refused == "temperature" and options[refused]:
                text = f"the server refuses temperature {options[refused]}, which was asked for: {text}"
            elif refused:
                with self.lock:  # several threads may find it; it is reported once
                    if refused not in self.replaced:
                        _, _, self.replaced[refused], note = FALLBACKS[refused]
                        print(f"{self.label} {note}", file=sys.stderr)
                continue
            may_pass = code < 300 or code in (408, 409, 425, 429) or code >= 500 and code != 501
            if tries == 4 or not may_pass:
                return Answer("", error=self.one_line(text))
            time.sleep(wait or min(30.0, 0.5 * 2**tries))
            tries += 1

    def exchange(self, path: str, body: dict | None = None) -> dict:
        """Send one request (GET, or POST with a body) and return its reply. Raises Fault."""
        code, wait = 0, None
        try:
            url = f"{self.base}{path}?{self.query}".removesuffix("?")
            request = urllib.request.Request(url, json.dumps(body).encode() if body else None, self.head)
            with self.opener.open(request, timeout=self.timeout) as reply:
                code, head = reply.status, reply.headers
                wait = retry_after(head["Retry-After"])
                raw = reply.read(None if code < 300 else 4000)
            if raw.startswith(b"\x1f\x8b"):  # gzip, though nobody asked for it
                raw = zlib.decompressobj(31).decompress(raw)
        except (OSError, http.client.HTTPException, ValueError, OverflowError, zlib.error) as error:
            raise Fault(code, f"{type(error).__name__}: {error}", wait) from None
        text = raw.decode("utf-8-sig", "replace").strip()
        if code >= 300:
            moved = f"moved to {head['Location']}, the address to give"
            raise Fault(code, f"HTTP {code}: {moved if code < 400 else text}", wait)
        try:
            found = json.loads(text, strict=False)
            if isinstance(found, list) and not body:  # of models
                found = {"data": found}
            check_reply(found, wait)
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
            raise Fault(code, f"expected a JSON object, found {text!r:.100}", wait) from None
        return found
