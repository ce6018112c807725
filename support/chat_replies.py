"""What OpenAI-compatible chat servers reply: answers in many forms, errors, fields that they refuse."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import time
from email.utils import mktime_tz, parsedate_tz

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
