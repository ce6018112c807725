"""A client for OpenAI-compatible chat servers: vLLM, SGLang, llama.cpp, Ollama, hosted models.

    answer = Server("http://localhost:8000/v1").answer(messages, temperature=0.0, seed=0, max_tokens=2048)

Servers differ in the fields that they refuse and in the form of their answers. This file hides that.
"""

from __future__ import annotations

import contextlib
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
from email.utils import mktime_tz, parsedate_tz

from support.cli import InputError

# Words in an error text that refuse a field, or its value.
NOT_TAKEN = (r"unsupported|not (?:\w+ )?(?:support|permit|allow|accept|enable|valid|recogni)|n't support|"
             r"unrecogni|unknown|unexpected|extra|forbid|deprecat|cannot find|instead")
BAD_VALUE = NOT_TAKEN + r"|only|must|should|invalid|incorrect|greater|range"
SYSTEM = r"(?:system|developer)\W{0,2}(?:role|message|prompt|instruction)s?|roles?"
# For each field, the least important first: its name and the words near it in an error text, the field that
# is sent instead, and what is reported. A max_tokens too large for one prompt must not count as refused.
FALLBACKS = {
    "system": (SYSTEM, BAD_VALUE, "", "takes no system turn: its text now begins the first user turn"),
    "seed": ("seed", BAD_VALUE, "", "takes no seed: answers cannot be repeated exactly"),
    "max_tokens": ("max_tokens", NOT_TAKEN, "max_completion_tokens",
                   "takes no max_tokens: max_completion_tokens is sent instead"),
    "temperature": ("temperature", BAD_VALUE, "",
                    "takes no temperature 0: its own default is used, and answers may vary")}


def refused_field(text: str, body: dict) -> str | None:
    """The field of the request `body`, a key of FALLBACKS, that an error text refuses. None if none."""
    for field, (name, words, *_) in FALLBACKS.items():
        # The words must be near the name: some servers quote the whole chat in the error text.
        near = rf"(?:{words}).{{0,80}}\b(?:{name})\b|\b(?:{name})\b.{{0,80}}(?:{words})"
        if field in {body["messages"][0]["role"], *body} and re.search(near, text, re.I | re.S):
            return field
    return None


def fold_system(messages: list[dict]) -> list[dict]:
    """The chat without a system turn: its text begins the first user turn."""
    if messages[0]["role"] != "system":
        return messages
    content = f"{messages[0]['content']}\n\n{messages[1]['content']}"
    return [{"role": "user", "content": content}, *messages[2:]]


@dataclasses.dataclass
class Answer:
    """The answer to one prompt. `error` says why there is none; `text` is then empty."""

    text: str
    tokens: int = 0
    prompt_tokens: int = 0
    finished: bool = True
    error: str = ""


def collect(field, texts: list[str], thoughts: list[str]) -> None:
    """Append the strings in a field of a server's message to `texts`, and reasoning to `thoughts`.

    A field is a string, a dict such as {"type": "thinking", "thinking": field}, or a list of fields.
    """
    if isinstance(field, str):
        texts.append(field)
    elif isinstance(field, list):
        for part in field:
            collect(part, texts, thoughts)
    elif isinstance(field, dict):
        kind = str(field.get("type") or "text")
        if kind.startswith(("thinking", "reasoning")):
            texts = thoughts
        if texts is thoughts or kind in ("text", "output_text"):
            for name in ("text", "thinking", "reasoning", "summary", "content", "value"):
                collect(field.get(name), texts, thoughts)


CHAIN = re.compile(r"\[?\d{1,9}\]?(?:\s*>\s*\[?\d{1,9}\]?)+")  # [2] > [1]


def tagged_text(message: dict, finished: bool) -> str | None:
    """The text of a server's message, with the reasoning in think tags. None if it holds no text.

    A server that looks for </think> and finds none takes the whole answer for reasoning. The answer then
    begins at its tag, or without a tag at the last "[2] > [1]".
    """
    texts, thoughts = [], []
    collect(message.get("content"), texts, thoughts)
    for name in ("reasoning_content", "reasoning", "reasoning_details", "thinking"):
        if not any(thoughts):  # servers repeat one text under several names
            collect(message.get(name), thoughts, thoughts)
    text, thought = "".join(texts), "".join(thoughts)
    if not thought.strip() or "<think>" in text:
        return text if texts else None
    if not text.strip():
        chains = [match.start() for match in CHAIN.finditer(thought)] if finished else []
        starts = [thought.find("</think>"), thought.find("<answer>"), *chains[-1:], len(thought)]
        start = next(start for start in starts if start >= 0)
        thought, text = thought[:start], thought[start:].removeprefix("</think>")
    thought = thought.lstrip().removeprefix("<think>")
    return f"<think>{thought}</think>{text}" if text or finished else f"<think>{thought}"


def read_completion(reply: dict) -> Answer:
    """The answer in a chat completion. A reply without a text gives an Answer with an error."""
    usage = reply.get("usage") if isinstance(reply.get("usage"), dict) else {}
    counts = [usage.get(name) for name in ("completion_tokens", "prompt_tokens")]
    counts = [int(n) if isinstance(n, (int, float)) and 0 <= n < 1e12 else 0 for n in counts]
    text, finished, error = None, True, "expected a chat completion"
    with contextlib.suppress(AttributeError, LookupError, TypeError, RecursionError):
        error += f", found {json.dumps(reply)}"
        choice = reply["choices"][0]
        message = choice.get("message") or {"content": choice.get("text")}
        reason = str(choice.get("finish_reason") or "stop").lower()
        finished = "length" not in reason and "max" not in reason
        text = tagged_text(message, finished)
        if message.get("refusal"):
            error = f"the server refused: {message['refusal']}"
        elif finished and not re.search(r"stop|eos|end_turn|\bcomplete|tool|function", reason):
            error = f"the answer did not end by itself: finish_reason {reason!r}"
        elif text is not None or not finished:
            error = ""
    text = "" if error else (text or "").encode("utf-8", "replace").decode()
    return Answer(text, *counts, finished, error)


class Fault(Exception):
    """No answer. args: HTTP's status (0 if no reply came), the reason, the seconds to wait (or None)."""


def check_reply(reply: dict, wait: float | None) -> None:
    """Raise the error that some servers put into a reply of status 200, at the top or in the choice."""
    choice = (reply.get("choices") or [None])[0] or {}
    if error := reply.get("error") or choice.get("error"):
        text = json.dumps(error, ensure_ascii=False)
        code = re.search(r'"code": "?([1-9]\d\d)\b', text)
        busy = re.search("rate.?limit|overload|too many requests", text, re.I)
        raise Fault(int(code[1]) if code else 429 if busy else 400, f"an error, no answer: {text}", wait)


def retry_after(header: str | None) -> float | None:
    """The seconds that a Retry-After header asks for, as a number or a date: at most 60, None without it."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        date = parsedate_tz(header)
        seconds = mktime_tz(date) - time.time() if date else float(header)
        return min(60.0, seconds) if seconds > 0 else None
    return None


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
