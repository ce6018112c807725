"""A client for OpenAI-compatible chat servers: vLLM, SGLang, llama.cpp, Ollama, hosted models.

    answer = Server("http://localhost:8000/v1").answer(messages, temperature=0.0, seed=0, max_tokens=2048)

Servers differ in what they refuse and in how they answer. This file hides the differences.
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
from collections.abc import Iterator
from email.utils import mktime_tz, parsedate_tz
from typing import NamedTuple
from urllib.parse import urlsplit

from support.cli import InputError

# Servers differ: what they refuse in a chat.


def fold_system(messages: list[dict]) -> list[dict]:
    """The chat without a system turn: its text begins the first user turn."""
    if messages[0]["role"] != "system":
        return messages
    content = f"{messages[0]['content']}\n\n{messages[1]['content']}"
    return [{"role": "user", "content": content}, *messages[2:]]


# What a server may refuse, the least harmful first: what is sent in its place, and what is reported once.
WAYS_OUT = {
    "system": ("user", "takes no system turn: its text now begins the first user turn"),
    "seed": ("", "takes no seed: answers cannot be repeated exactly"),
    "max_tokens": ("max_completion_tokens", "takes no max_tokens: max_completion_tokens is sent instead"),
    "temperature": ("", "takes no temperature 0: its own default is used, and answers may vary")}
SYSTEM = r"(?:system|developer)\W{0,2}(?:role|message|prompt|instruction)s?|roles?"
NOT_TAKEN = (r"unsupported|not (?:\w+ )?(?:support|permit|allow|accept|enable|valid|recogni)|n't support|"
             r"unrecogni|unknown|unexpected|extra|forbid|deprecat|cannot find|instead")
BAD_VALUE = r"|only|must|should|invalid|incorrect|greater|range"


def refuses(text: str, name: str) -> bool:
    """Whether an error text refuses the field `name`: it says so near the name. It may quote our chat too."""
    # A max_tokens that is too large for one prompt is not refused for all of them.
    words = f"(?:{NOT_TAKEN if name.startswith('max_') else NOT_TAKEN + BAD_VALUE})"
    name = rf"\b(?:{SYSTEM if name == 'system' else name})\b"
    return re.search(f"{words}.{{0,80}}{name}|{name}.{{0,80}}{words}", text, re.I | re.S) is not None


def way_out(text: str, body: dict) -> str | None:
    """What an error text refuses in the request `body`, if the next one can do without it: a key of WAYS_OUT.

    A temperature above 0 was asked for, so no request goes without it.
    """
    sent = {body["messages"][0]["role"], *body}
    if body.get("temperature"):
        sent.remove("temperature")
    return next((name for name in WAYS_OUT if name in sent and refuses(text, name)), None)


# Servers differ: how they answer.


@dataclasses.dataclass
class Answer:
    """What a policy says to one prompt. `error`: why there is no answer; `text` is then empty."""

    text: str
    tokens: int = 0
    prompt_tokens: int = 0
    finished: bool = True
    error: str = ""


def text_parts(field, reasoning: bool = False) -> Iterator[tuple[bool, str]]:
    """Each text in a field of a server's message, as (whether it is reasoning, text).

    A field is a string, a part such as {"type": "thinking", "thinking": field}, or a list of these. Parts of
    other types are skipped.
    """
    if isinstance(field, str):
        yield reasoning, field
    elif isinstance(field, list):
        for part in field:
            yield from text_parts(part, reasoning)
    elif isinstance(field, dict):
        kind = str(field.get("type") or "text")
        reasoning = reasoning or kind.startswith(("thinking", "reasoning"))
        if reasoning or kind in ("text", "output_text"):
            for name in ("text", "thinking", "reasoning", "summary", "content", "value"):
                yield from text_parts(field.get(name), reasoning)


CHAIN = re.compile(r"\[?\d{1,9}\]?(?:\s*>\s*\[?\d{1,9}\]?)+")  # [2] > [1]


def tagged_text(message: dict, finished: bool) -> str | None:
    """The text of a server's message, with the reasoning in think tags. None if it holds no text.

    Some servers put the reasoning into a field or into parts of its own. They look for </think>, and if there
    is none they take the whole answer for reasoning. The answer then begins at its tag; without tags it is
    the last "[2] > [1]".
    """
    parts = [*text_parts(message.get("content"))]
    text = "".join(part for is_reasoning, part in parts if not is_reasoning)
    thought = "".join(part for is_reasoning, part in parts if is_reasoning)
    for name in ("reasoning_content", "reasoning", "reasoning_details", "thinking"):  # may say the same
        thought = thought or "".join(part for _, part in text_parts(message.get(name), True))
    if not thought.strip() or "<think>" in text:
        return text if parts else None
    if not text.strip():
        chains = [match.start() for match in CHAIN.finditer(thought)] if finished else []
        starts = [thought.find("</think>"), thought.find("<answer>"), *chains[-1:], len(thought)]
        start = next(start for start in starts if start >= 0)
        thought, text = thought[:start], thought[start:].removeprefix("</think>")
    thought = thought.lstrip().removeprefix("<think>")
    return f"<think>{thought}</think>{text}" if text or finished else f"<think>{thought}"


ENDED = re.compile(r"stop|eos|end_turn|\bcomplete|tool|function")  # in a finish_reason


def read_completion(reply: dict) -> Answer:
    """The answer in a chat completion. It raises nothing: a reply without a text becomes an error."""
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
        elif finished and not ENDED.search(reason):
            error = f"the answer did not end by itself: finish_reason {reason!r}"
        elif text is not None or not finished:
            error = ""
    text = "" if error else (text or "").encode("utf-8", "replace").decode()
    return Answer(text, *counts, finished, error)


def listed_models(reply: dict) -> list[str]:
    """The names in a list of models; llama.cpp and Ollama have other forms of it too."""
    listed = reply.get("data") or reply.get("models")
    names = [entry.get("id") or entry.get("name") if isinstance(entry, dict) else entry
             for entry in (listed if isinstance(listed, list) else [])]
    return [*dict.fromkeys(name for name in names if isinstance(name, str))]


class Fault(NamedTuple):
    """No answer. `code`: HTTP's status, 0 if no reply came. `wait`: the seconds that the server asks for."""

    code: int
    text: str
    wait: float | None = None


def inner_fault(reply: dict, wait: float | None) -> Fault | None:
    """The error that some servers put into a reply of status 200, at the top or in the choice."""
    choice = (reply.get("choices") or [None])[0]
    error = reply.get("error") or (choice.get("error") if isinstance(choice, dict) else None)
    if not error:
        return None
    text = json.dumps(error, ensure_ascii=False)
    code = str(error.get("code")) if isinstance(error, dict) else ""
    if not re.fullmatch("[1-9][0-9]{2}", code):
        code = 429 if re.search("rate.?limit|overload|too many requests", text, re.I) else 400
    return Fault(int(code), f"an error in place of an answer: {text}", wait)


# The client.


def pause(header: str | None) -> float | None:
    """The seconds that a Retry-After header asks for, as a number or by a date. At most 60; None without."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        date = parsedate_tz(header)
        seconds = mktime_tz(date) - time.time() if date else float(header)
        return min(60.0, seconds) if seconds > 0 else None
    return None


class AsItCame(urllib.request.HTTPErrorProcessor):
    """Hands on a reply of any status, and follows no redirect: the key would go along."""

    def http_response(self, request, response):
        return response

    https_response = http_response


class Server:
    """Chat completions over HTTP, as vLLM, SGLang, llama.cpp, Ollama and hosted models offer them.

    url: usually ends in /v1; a query in it (Azure's api-version) goes with every request. model: a name that
    the server knows; may be left out if it has only one. The key, if one is needed, is read from
    REARANK_API_KEY or OPENAI_API_KEY and never shown. Faults that may pass are tried again with growing
    pauses. What the server refuses is left out from then on. InputError if no server answers, if it refuses
    the key, or if it is not clear which model is meant.
    """

    def __init__(self, url: str, model: str = "", timeout: float = 600.0):
        variable = "REARANK_API_KEY" if os.environ.get("REARANK_API_KEY") else "OPENAI_API_KEY"
        self.key = os.environ.get(variable, "").strip()
        if not (self.key.isascii() and self.key.isprintable()):
            raise InputError(f"{variable}: expected a key in one line, of ASCII characters")
        url = url.strip()
        self.shown = "--server " + self.one_line(re.sub(r"^(\w+://)?.*@", r"\1", url.partition("?")[0]))
        try:
            self.parts = parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            usable = False
        if not usable or "@" in parts.netloc or " " in url or not url.isprintable():
            raise InputError(f"{self.shown}: expected an address like http://host:8000/v1, no password")
        self.path = re.sub(r"/+((chat/)?completions|models)?/*$", "", parts.path)
        self.head = {"Content-Type": "application/json", "User-Agent": "rearank"}  # some block Python's own
        if self.key:
            self.head["Authorization"] = f"Bearer {self.key}"
        here = parts.hostname in ("localhost", "127.0.0.1", "::1")  # not behind a proxy
        self.opener = urllib.request.build_opener(AsItCame, *[urllib.request.ProxyHandler({})] * here)
        self.timeout, self.replaced, self.lock = timeout, {}, threading.Lock()
        self.model = self.find_model(model)

    def find_model(self, model: str) -> str:
        """The name of the model: the given one, else the only one that the server lists."""
        reply = self.call("/models", retries=0)
        if isinstance(reply, Fault):
            names, found = [], f": {self.one_line(reply.text)}"
            # A key may be good for chats and not for this list: its "scope".
            lost = reply.code == 0 or reply.code in (401, 403) and "scope" not in reply.text
        else:
            names, lost = listed_models(reply), False
            found = " " + self.one_line(f"lists {len(names)} models: {', '.join(names[:10])}")
        if model and not lost:
            return model
        if len(names) == 1:
            print(f"{self.shown}: its only model is {self.one_line(names[0])}", file=sys.stderr)
            return names[0]
        hint = ("name one with --model" if names else "expected the address of an OpenAI-compatible server "
                "(http://host:8000/v1), --model NAME if it lists none")
        raise InputError(f"{self.shown}{found}; {hint}")

    def one_line(self, text: str) -> str:
        """The beginning of a server's text in one line, without the key, should it be sent back."""
        text = text.replace(self.key, "***") if self.key else text
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:300]

    def call(self, path: str, messages: list[dict] | None = None, options: dict | None = None,
             retries: int = 4) -> dict | Fault:
        """The reply to GET `path`, or with `messages` to POST. Repeated if that can help, up to `retries`."""
        body, tries = None, 0
        while True:
            if messages:
                named = {self.replaced.get(name, name): value for name, value in options.items()}
                named.pop("", None)
                chat = fold_system(messages) if "system" in self.replaced else messages
                body = {"model": self.model, "messages": chat} | named
            reply = self.exchange(path, body)
            if not isinstance(reply, Fault):
                return reply
            code = reply.code
            refused = way_out(reply.text, body) if body and code in (400, 422, 500) else None
            if refused:
                self.replace(refused)
                continue
            may_pass = code < 300 or code in (408, 409, 425, 429) or code >= 500 and code != 501
            if tries == retries or not may_pass:
                return reply
            time.sleep(reply.wait or min(30.0, 0.5 * 2**tries))
            tries += 1

    def replace(self, refused: str) -> None:
        """From now on, send what WAYS_OUT has for a refused field. Reported once: several threads find it."""
        with self.lock:
            if refused not in self.replaced:
                self.replaced[refused], note = WAYS_OUT[refused]
                print(f"{self.shown} {note}", file=sys.stderr)

    def exchange(self, path: str, body: dict | None) -> dict | Fault:
        """One request and its reply."""
        code, wait = 0, None
        try:
            url = self.parts._replace(path=self.path + path, fragment="").geturl()
            request = urllib.request.Request(url, json.dumps(body).encode() if body else None, self.head)
            with self.opener.open(request, timeout=self.timeout) as reply:
                code, head = reply.status, reply.headers
                wait = pause(head["Retry-After"])
                raw = reply.read(None if code < 300 else 4000)
            if raw.startswith(b"\x1f\x8b"):  # gzip, though nobody asked for it
                raw = zlib.decompressobj(31).decompress(raw)
        except (OSError, http.client.HTTPException, ValueError, OverflowError, zlib.error) as error:
            return Fault(code if code >= 300 else 0, f"{type(error).__name__}: {error}", wait)
        text = raw.decode("utf-8-sig", "replace").strip()
        if code >= 300:
            if code < 400:
                text = f"moved to {head['Location']}, the address to give"
            return Fault(code, f"HTTP {code}: {text}", wait)
        try:
            found = json.loads(text, strict=False)
            if isinstance(found, list) and not body:  # of models
                found = {"data": found}
            return inner_fault(found, wait) or found
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
            return Fault(code, f"expected a JSON object, found {text!r:.100}", wait)

    def answer(self, messages: list[dict], **options) -> Answer:
        """The answer to one chat. options: temperature, seed, max_tokens."""
        reply = self.call("/chat/completions", messages, options)
        if not isinstance(reply, Fault):
            answer = read_completion(reply)
            return dataclasses.replace(answer, error=self.one_line(answer.error))
        text = reply.text
        if options.get("temperature") and refuses(text, "temperature"):
            text = f"the server refuses temperature {options['temperature']}, which was asked for: {text}"
        return Answer("", error=self.one_line(text))
