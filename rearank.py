"""REARANK, the agent: a language model that reads a window of passages, thinks, and answers a better order.

    python rearank.py --model le723z/Rearank-7B --input candidates.jsonl --output reranked.trec
    python rearank.py --model MODEL --query "how long do fleas live" documents.txt --explain
    python rearank.py --server http://host:8000/v1 --input candidates.jsonl --output reranked.trec

From top to bottom: the prompts; the sliding window; the policies, a model here or on a server; `Reranker`;
the command line.

Where it departs from the paper (arXiv 2505.20046) and the authors' code:
- n = 100, window 20, step 10 makes 9 windows, not 10; lists of every length are ranked to their very head.
- The prompt is an explicit choice and never guessed from a model's name.
- Inference needs no vLLM: model.py encodes a prompt once, however many answers are drawn from it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import http.client
import itertools
import json
import os
import random
import re
import statistics
import sys
import threading
import time
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from email.utils import mktime_tz, parsedate_tz
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from tqdm import tqdm

from data import (Candidates, InputError, atomic_write, check_run, command_line, read_candidates, read_text,
                  run_main, setting, write_run)
from model import (Agent, Completion, has_native_bfloat16, load_agent, out_of_memory, pick_device,
                   sample)
from reward import parse_ranking, sentences

# ------------------------------------------------------------------------------------------------------------
# Prompts, the authors' to the letter. The released weights expect exactly these strings, blanks and line ends
# included.

FORMAT = "The output format should be <answer> [] > [] </answer>, e.g., <answer> [1] > [2] </answer>."
BEST_FIRST = ("The passages should be listed in descending order using identifiers. "
              "The most relevant passages should be listed first. ")
STEPS = ("Follow these steps exactly:",
         "1. First, within <think> tags, analyze EACH passage individually:",
         "- Evaluate how well it addresses the query",
         "- Note specific relevant information or keywords",
         "",
         "2. Then, within <answer> tags, provide ONLY the final ranking in descending order of relevance "
         "using the format: [X] > [Y] > [Z]")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A chat: system, first user turn, one turn per passage, last user turn. Fills in {query} and {num}."""

    system: str
    first: str
    last: str
    passage_chars: int
    received: str = "Received passage [{i}]."
    opening: str = "Okay, please provide the passages."


PROMPTS = {
    "rearank": Prompt(
        system="You are DeepRerank, an intelligent assistant that can rank passages based on their relevancy "
               "to the search query. You first thinks about the reasoning process in the mind and then "
               "provides the user with the answer.",
        first="I will provide you with passages, each indicated by number identifier []. "
              "Rank the passages based on their relevance to the search query."
              "Search Query: {query}. \n"
              "Rank the {num} passages above based on their relevance to the search query."
              + BEST_FIRST + FORMAT,
        last='Please rank these passages according to their relevance to the search query: "{query}"'
             + "".join("\n" + (" " * 12 + line if line else "") for line in STEPS),
        passage_chars=400),
    "rankgpt": Prompt(
        system="You are RankGPT, an intelligent assistant that can rank passages based on their relevancy to "
               "the query.",
        first="I will provide you with {num} passages, each indicated by number identifier []. \n"
              "Rank the passages based on their relevance to query: {query}.",
        last="Search Query: {query}. \n"
             "Rank the {num} passages above based on their relevance to the search query. "
             + BEST_FIRST + "The output format should be [] > [], e.g., [1] > [2]. "
             "Only response the ranking results, do not say any word or explain.",
        passage_chars=300),
    # For toy models of a hundred thousand parameters: nothing but the query and the passages.
    "toy": Prompt(system="", first="{query}", last="{query}", passage_chars=400, received="", opening=""),
}


@functools.lru_cache(maxsize=8)
def added_ids(tokenizer) -> frozenset[int]:
    """The ids of special and added tokens, which no text may bring about."""
    return frozenset(tokenizer.get_added_vocab().values()) - {tokenizer.unk_token_id}


def as_content(text: str, tokenizer=None) -> str:
    """Text from outside as text and nothing else: no identifier of ours, no tag of an answer, no chat mark.

    `[12]` becomes `(12)`, `</answer>` `< /answer>`; what `tokenizer` would read as a special or added token
    gets a blank inside. Without one, for a server, so does all that looks like a mark, `<|...|>`. Half a
    surrogate pair becomes "?". Other text stays exactly as it is.
    """
    text = re.sub(r"\[(\s*\d+\s*)\]", r"(\1)", text.encode("utf-8", "replace").decode())
    text = re.sub(r"<(?=/?(?:think|answer)>)", "< ", text)
    if tokenizer is None:
        marks = r"<(?=[|｜]|<SYS|/?(?:s|unk|pad|bos|eos|\w+_of_turn)>)|\[(?=/?[A-Z_]{4,}\])"
        return re.sub(marks, r"\g<0> ", text)
    if tokenizer.unk_token:
        text = text.replace(tokenizer.unk_token, " ".join(tokenizer.unk_token))
    for _ in range(10):  # a break can let a second mark appear around it
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = [(start, end) for id, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"])
                 if id in added_ids(tokenizer) and text[start:end].strip()]  # blanks do no harm
        if not spans:
            return text
        for start, end in reversed(spans):
            start = end - len(text[start:end].lstrip())  # some marks take the blanks before them
            text = text[:start + (end - start > 1)] + " " + text[start + 1:]
    return re.sub(r"[^\w\s]", " ", text)  # a tokenizer that takes blanks out: nothing but words is left


def build_messages(query: str, passages: list[str], prompt: str = "rearank",
                   passage_chars: int | None = None, tokenizer=None) -> list[dict]:
    """The chat that asks for an order of `passages` (in their present order, numbered from 1).

    Passages have their white space collapsed and are cut to `passage_chars` (default: the prompt's own, 400
    for rearank, 300 for rankgpt); they and the query go through `as_content`. Returns [{"role", "content"},
    ...] for a chat template; empty turns are left out.
    """
    if prompt not in PROMPTS:
        raise ValueError(f"unknown prompt {prompt!r}: expected one of {', '.join(PROMPTS)}")
    form, limit = PROMPTS[prompt], passage_chars or PROMPTS[prompt].passage_chars
    query = as_content(query, tokenizer)
    # str.replace and not str.format: a query may hold braces.
    first, last = (text.replace("{num}", str(len(passages))).replace("{query}", query)
                   for text in (form.first, form.last))
    turns = [("system", form.system), ("user", first), ("assistant", form.opening)]
    for i, passage in enumerate(passages, 1):
        turns.append(("user", f"[{i}] {as_content(' '.join(passage.split())[:limit], tokenizer)}"))
        turns.append(("assistant", form.received.replace("{i}", str(i))))
    turns.append(("user", last))
    return [{"role": role, "content": content} for role, content in turns if content]


def render_chat(tokenizer, messages: list[dict]) -> str:
    """The chat as text by the tokenizer's own template, up to where the model's answer begins.

    Where a template refuses a system turn (Mistral's), its text begins the first user turn. InputError where
    it refuses that too.
    """
    for turns in (messages, fold_system(messages)):
        try:
            return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # whatever a template raises
            reason = " ".join(str(error).split())
    raise InputError(f"the model's chat template cannot write this chat: {reason}")


def answer_start(tokenizer, think: bool = True) -> tuple[str, str]:
    """(what the template has opened of the answer, what we add to the prompt): what a response begins with.

    Templates of reasoning models open <think> themselves, which belongs to the response: else it could never
    earn format1. Without thinking an empty block is filled in, or the open one closed.
    """
    text = render_chat(tokenizer, [{"role": "user", "content": "x"}])
    opened = text[text.rindex("<think>"):] if text.rstrip().endswith("<think>") else ""
    return opened, "" if think else "</think>" if opened else "<think> </think>"


def encode_prompt(tokenizer, query: str, passages: list[str], prompt: str = "rearank", max_tokens: int = 4096,
                  start: str = "") -> list[int]:
    """Token ids of the prompt and of `start`, with which the answer is to begin. See `fit_prompt`."""
    return fit_prompt(tokenizer, query, passages, prompt, max_tokens, start)[0]


class Cut(NamedTuple):
    """How a prompt was cut: whether it had to be, to fit; characters of the query; what is left of a passage,
    which is cut beyond `passage_chars` in every prompt."""

    prompt_cut: bool
    query_chars_cut: int
    passage_chars: int


def fit_prompt(tokenizer, query: str, passages: list[str], prompt: str, max_tokens: int, start: str = "",
               passage_chars: int = 0) -> tuple[list[int], Cut]:
    """(token ids of the prompt, what was cut).

    One over `max_tokens` (some BRIGHT queries have thousands) is made to fit: first the query is cut to a
    quarter of the room, then the passages shorter and shorter. InputError where even that is too long.
    """
    limit, short = passage_chars or PROMPTS[prompt].passage_chars, query
    ids = tokenizer(as_content(query, tokenizer), add_special_tokens=False)["input_ids"]
    if len(ids) > max_tokens // 4:
        short = tokenizer.decode(ids[:max_tokens // 4])
    for asked, chars in ((query, limit), *((short, c) for c in (limit, 300, 200, 100, 50) if c <= limit)):
        text = render_chat(tokenizer, build_messages(asked, passages, prompt, chars, tokenizer))
        ids = tokenizer(text + start, add_special_tokens=False)["input_ids"]
        if len(ids) <= max_tokens:
            return ids, Cut((asked, chars) != (query, limit), max(0, len(query) - len(asked)), chars)
    raise InputError(f"{len(passages)} passages do not fit into {max_tokens} tokens: use a smaller window")


def fit_context(config, max_prompt_tokens: int, max_new_tokens: int) -> tuple[int, int]:
    """(prompt tokens, new tokens): at most these, and together no more than the model's positions."""
    positions = getattr(config, "max_position_embeddings", None) or max_prompt_tokens + max_new_tokens
    new = min(max_new_tokens, positions // 2)
    if new < max_new_tokens:
        print(f"the model has {positions} positions: answers end at {new} tokens", file=sys.stderr)
    return min(max_prompt_tokens, positions - new), new


# ------------------------------------------------------------------------------------------------------------
# The sliding window


def window_bounds(n: int, window: int = 20, step: int = 10) -> list[tuple[int, int]]:
    """(start, end) of each window over n ranks, in the order of ranking: from the end to the head.

    The last one begins at rank 0 for every n; a list no longer than `window` has one, one under two items
    none. ValueError unless 0 < step <= window: else some ranks would never be read.

    >>> window_bounds(45, window=20, step=10)
    [(25, 45), (15, 35), (5, 25), (0, 15)]
    """
    if not 0 < step <= window:
        raise ValueError(f"window {window}, step {step}: expected 0 < step <= window, or ranks are skipped")
    bounds, end = [], n
    while n > 1 and (not bounds or bounds[-1][0] > 0):
        bounds.append((max(0, end - window), end))
        end -= step
    return bounds


def sliding_window(items: list, rank_window: Callable[[list], list[int]], window: int = 20,
                   step: int = 10) -> list:
    """Rerank a list by windows that slide from its end to its head: the best bubble up. Section 3.1, eq. 2.

    `rank_window` gets a window's items in present order and returns their 0-based positions, best first.
    Returns a new list. ValueError unless 0 < step <= window and each order is a permutation.
    """
    items = list(items)
    for start, end in window_bounds(len(items), window, step):
        present = items[start:end]
        order = rank_window(present)
        if sorted(order) != list(range(len(present))):
            raise ValueError(f"expected a permutation of the window's {len(present)} positions, got {order}")
        items[start:end] = [present[i] for i in order]
    return items


# ------------------------------------------------------------------------------------------------------------
# The policy: a model here, or one behind an OpenAI-compatible server


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
            raise InputError(f"{self.shown}: expected an address like http://host:8000/v1, without a password")
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


# ------------------------------------------------------------------------------------------------------------
# The reranker


@dataclasses.dataclass
class Window:
    """One call of the model: the window's positions in the input list, the answer, how it was read."""

    positions: list[int]
    response: str
    status: str  # of `parse_ranking`, or "error": no answer came, and the order stays
    order: list[int]  # positions in the input list, best first
    tokens: int
    prompt_tokens: int
    cut: Cut
    finished: bool
    error: str = ""
    samples: list[tuple[str, str, list[int]]] = dataclasses.field(default_factory=list)  # of several answers

    @property
    def reasoning(self) -> str:
        """What stands before </think>, less a <think> (which some servers keep); empty without a tag."""
        before, closed, _ = self.response.partition("</think>")
        _, opened, inside = before.partition("<think>")
        return (inside if opened else before if closed else "").strip()


@dataclasses.dataclass
class Result:
    """A document in its new place: `index` in the input (from 0), `rank` in the output (from 1), its text,
    and the document as it was given."""

    index: int
    rank: int
    text: str
    document: object = None


class Reranking(list):
    """A list of `Result`, best first, with every window's reasoning and status beside it in `.windows`."""

    def __init__(self, results: Iterable[Result], windows: list[Window]):
        super().__init__(results)
        self.windows = windows


def document_text(document: str | dict, place: str) -> str:
    """The text of a document, a string or a dict with "text" and perhaps a "title". TypeError."""
    fields = document if isinstance(document, dict) else {"text": document}
    text, title = fields.get("text"), fields.get("title")
    if not isinstance(text, str):
        raise TypeError(f'{place}: expected a string, or a dict with "text", found {document!r:.60}')
    return f"{title} {text}" if title else text


def fuse(orders: Sequence[Sequence[int]], size: int) -> list[int]:
    """Reciprocal rank fusion: by the sum of 1 / (60 + rank), rank from 1; ties stay in place."""
    scores = [sum(1 / (61 + order.index(i)) for order in orders) for i in range(size)]
    return sorted(range(size), key=lambda i: -round(scores[i], 12))


@dataclasses.dataclass
class Options:
    """What a reranker can be told, from Python and from the command line."""

    model: str | Agent = setting("", "A model folder, a name on the hub, e.g. le723z/Rearank-7B, or on the "
                                 "server.")
    prompt: str = setting("rearank", "The prompt the model was trained with (rankgpt: zero-shot).",
                          choices=tuple(PROMPTS))
    window: int = setting(20, "Passages in a window.", least=2)
    step: int = setting(10, "Ranks the window slides by.", least=1)
    think: bool = setting(True, "Let the model reason; --no-think fills in an empty think block.")
    temperature: float = setting(0.0, "Sampling temperature; 0 is greedy.", least=0)
    samples: int = setting(1, "Answers to each window, fused by reciprocal ranks.", least=1)
    passage_chars: int = setting(0, "Characters of a passage that are shown; 0: the prompt's own.", least=0)
    max_new_tokens: int = setting(2048, "Longest answer.", least=1)
    max_prompt_tokens: int = setting(4096, "Longer prompts are cut: first the query, then passages.", least=1)
    max_rows: int = setting(32, "Windows (of different queries) answered at a time.", least=1)
    seed: int = setting(0, "Seed of the sampling.")
    server: str = setting("", "An OpenAI-compatible server, http://host:8000/v1, instead of a model here.")
    concurrency: int = setting(8, "Requests in flight at the server.", least=1)
    timeout: float = setting(600.0, "Seconds to wait for an answer of the server.", least=0.1)
    device: str = setting("auto", "cuda, mps, cpu or auto.")
    dtype: str = setting("auto", "Precision; auto: bfloat16, but float32 on CPUs that lack bfloat16.",
                         choices=("auto", "float32", "bfloat16"))


@dataclasses.dataclass
class Reranker(Options):
    """Rerank search results with a language model, listwise, by a sliding window.

        reranker = Reranker("le723z/Rearank-7B")
        for result in reranker.rank("how long do fleas live", documents):
            print(result.rank, result.index, result.text)

    model: a folder, a hub name, an `Agent` already loaded or, with `server`, a name that it knows. prompt:
    "rearank" (thinks, then answers) or "rankgpt" (zero-shot, no reasoning): the one the model was trained
    with. The random numbers of a window depend on seed, query and window alone. ValueError for settings that
    make no sense; InputError from loading.
    """

    def __post_init__(self):
        build_messages("", [], self.prompt)  # raises for an unknown prompt, before anything is loaded
        window_bounds(0, self.window, self.step)
        if self.samples < 1 or self.samples > 1 and not self.temperature:
            raise ValueError(f"samples {self.samples}: expected 1, or several at a temperature above 0")
        self.opened = self.added = ""
        if self.server:
            if not self.think:
                raise ValueError("think=False: a server cannot be made to begin with an empty think block")
            self.policy = Server(self.server, self.model, self.timeout)
            return
        if not isinstance(self.model, Agent):
            native = self.dtype == "auto" and pick_device(self.device).type == "cpu" and has_native_bfloat16()
            self.model = load_agent(self.model, self.device, "bfloat16" if native else self.dtype)
        self.agent = self.model
        self.opened, self.added = answer_start(self.agent.tokenizer, self.think)
        limits = fit_context(self.agent.model.config, self.max_prompt_tokens, self.max_new_tokens)
        self.max_prompt_tokens, self.max_new_tokens = limits

    def rank(self, query: str, documents: Sequence[str | dict], top_k: int | None = None) -> Reranking:
        """The documents in the model's order, the best `top_k` of them (default: all).

        Dicts come back untouched as `.document`. TypeError and ValueError before the model is asked.
        """
        if not isinstance(query, str):
            raise TypeError(f"query: expected a string, found {query!r:.60}")
        if isinstance(documents, (str, bytes, dict)) or not isinstance(documents, Iterable):
            raise TypeError(f"documents: expected a list of strings or of dicts, found {documents!r:.60}")
        if top_k is not None and (not isinstance(top_k, int) or top_k < 0):
            raise ValueError(f"top_k: expected a number from 0, found {top_k!r}")
        documents = list(documents)
        texts = [document_text(document, f"documents[{i}]") for i, document in enumerate(documents)]
        [ranking] = self.rank_many([(query, texts)])
        for result in ranking:
            result.document = documents[result.index]
        return Reranking(ranking[:top_k], ranking.windows)

    def rank_many(self, lists: Sequence[tuple[str, list[str]]],
                  progress: Callable[[int], None] | None = None) -> list[Reranking]:
        """Rerank many (query, texts) lists; windows of different queries share a batch.

        `progress` is called with the number of answers just ended.
        """
        bounds = [window_bounds(len(texts), self.window, self.step) for _, texts in lists]
        orders = [list(range(len(texts))) for _, texts in lists]
        windows: list[list[Window]] = [[] for _ in lists]
        for turn in range(max(map(len, bounds), default=0)):
            asked = [i for i, slides in enumerate(bounds) if turn < len(slides)]
            positions = [orders[i][slice(*bounds[i][turn])] for i in asked]
            for i, window in zip(asked, self._answer([lists[i] for i in asked], positions, turn, progress)):
                orders[i][slice(*bounds[i][turn])] = window.order
                windows[i].append(window)
        return [Reranking((Result(i, rank, texts[i]) for rank, i in enumerate(order, 1)), answered)
                for (_, texts), order, answered in zip(lists, orders, windows)]

    def _answer(self, lists: list, positions: list[list[int]], turn: int, progress) -> list[Window]:
        """What is answered to each list's window, which holds the texts at these positions."""
        asked = [(query, [texts[p] for p in window]) for (query, texts), window in zip(lists, positions)]
        keys = [f"{self.seed}\t{query}\t{turn}".encode("utf-8", "replace") for query, _ in asked]
        seeds = [int.from_bytes(hashlib.sha256(key).digest()[:6], "big") for key in keys]
        ask = self._ask_server if self.server else self._ask_model
        windows = []
        for window, (cut, answers) in zip(positions, ask(asked, seeds, progress)):
            read = [parse_ranking(a.text, len(window)) for a in answers]
            statuses = ["error" if a.error else r.status for a, r in zip(answers, read)]
            votes = [r.order for a, r, status in zip(answers, read, statuses)
                     if status in ("ok", "repaired", "untagged")  # and cut off, but not before an order began
                     or status == "truncated" and "<answer>" in a.text]
            orders = [[window[i] for i in order]
                      for order in (fuse(votes, len(window)), *(r.order for r in read))]
            windows.append(Window(
                positions=window, response=answers[0].text, cut=cut, order=orders[0],
                status=next((status for status in statuses if status != "ok"), "ok"),
                error=next((a.error for a in answers if a.error), ""), tokens=sum(a.tokens for a in answers),
                prompt_tokens=answers[0].prompt_tokens, finished=all(a.finished for a in answers),
                samples=[*zip((a.text for a in answers), statuses, orders[1:])] if self.samples > 1 else []))
        return windows

    def _ask_model(self, asked: list, seeds: list[int], progress) -> list[tuple[Cut, list[Answer]]]:
        prompts = [fit_prompt(self.agent.tokenizer, query, passages, self.prompt, self.max_prompt_tokens,
                              self.added, self.passage_chars) for query, passages in asked]
        try:
            groups: list[list[Completion]] = sample(
                self.agent.model, [ids for ids, _ in prompts], self.samples, self.max_new_tokens,
                self.temperature, self.agent.stop_ids, seeds, self.max_rows, progress)
        except (RuntimeError, MemoryError) as error:  # torch's own is a RuntimeError
            if not out_of_memory(error):
                raise
            raise InputError("too little memory for these prompts: lower --max-rows") from None
        opened = self.opened + self.added
        return [(cut, [Answer(opened + self.agent.decode(c), len(c.ids), len(ids), c.finished)
                       for c in group]) for (ids, cut), group in zip(prompts, groups)]

    def _ask_server(self, asked: list, seeds: list[int], progress) -> list[tuple[Cut, list[Answer]]]:
        def one(job):
            messages, seed = job
            answer = self.policy.answer(messages, temperature=self.temperature, seed=seed % 2**31,
                                        max_tokens=self.max_new_tokens)
            if progress:
                progress(1)
            return answer

        chats = [build_messages(*ask, self.prompt, self.passage_chars or None) for ask in asked]
        jobs = [(chat, seed + k) for chat, seed in zip(chats, seeds) for k in range(self.samples)]
        with ThreadPool(self.concurrency) as threads:  # daemons: Ctrl-C waits for no answer
            answers = iter(threads.map(one, jobs, 1))
        cut = Cut(False, 0, self.passage_chars or PROMPTS[self.prompt].passage_chars)
        return [(cut, [*itertools.islice(answers, self.samples)]) for _ in asked]


# ------------------------------------------------------------------------------------------------------------
# Command line


@dataclasses.dataclass
class Settings(Options):
    """Settings of `python rearank.py`."""

    documents: str = setting("", "With --query: a file of passages, one a line; - is standard input.",
                             positional=True, nargs="?", metavar="DOCUMENTS")
    query: str = setting("", "Rank the lines of DOCUMENTS for this query, and print them.")
    explain: bool = setting(False, "With --query: print what the reasoning says beside each passage.")
    input: str = setting("", "Candidates: rank_llm JSONL or JSON, RankGPT JSON, .gz of each.")
    output: str = setting("", "What to write; the reasoning goes to OUTPUT.jsonl (report.py shows it).")
    format: str = setting("text", "With --query: how it is printed.", choices=("text", "tsv", "json"))
    top_k: int = setting(100, "Rerank only this many candidates of a query; the rest stay behind.", least=1)
    limit: int = setting(0, "Only the first so many queries; 0 is all.", least=0)
    resume: bool = setting(False, "Go on with an OUTPUT that was interrupted.")
    stats: str = setting("", "A file for the closing line's counts, as JSON.")
    tag: str = setting("rearank", "The run's name, the last column of the TREC run.")
    check_stability: int = setting(0, "Instead: shuffle each list so many times, rerank each, and print how "
                                   "far the orders agree.", least=0)


def make_reranker(settings: Settings, agent: Agent | None = None) -> Reranker:
    """The reranker of these settings. What makes no sense is an InputError here."""
    options = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Reranker)}
    try:
        return Reranker(**options | {"model": agent or settings.model})
    except ValueError as error:
        raise InputError(str(error)) from None


def rerank_file(settings: Settings, agent: Agent | None = None) -> Counter:
    """Rerank a file of candidates into a run and a JSONL of windows. Returns the closing line's counts.

    Queries are worked through in batches. What is finished when the program is interrupted is kept: the JSONL
    grows with each batch, the run of the finished queries is written on the way out, and --resume goes on
    from there.
    """
    lists, k = read_candidates(settings.input)[:settings.limit or None], settings.top_k
    trace, started, taken = Path(settings.output + ".jsonl"), time.time(), {os.path.realpath(settings.input)}
    check_run(settings.output, {c.qid: c.docids for c in lists}, settings.tag)  # now, not after the work
    check_run(trace, {}, settings.tag)
    for name in filter(None, (settings.output, trace, settings.stats)):
        if os.path.realpath(name) in taken:
            raise InputError(f"{name}: would overwrite the input or another output; expected another name")
        taken.add(os.path.realpath(name))
    identity = run_identity(settings)
    batch_size = settings.concurrency if settings.server else settings.max_rows
    unit = 1 if settings.server else batch_size  # what a model here says depends, in rounding, on its batch
    lines = finished_lines(trace, identity, len(lists), unit) if settings.resume else []
    there = trace.read_bytes().count(b'"texts": ') if trace.exists() and not settings.resume else 0
    if 0 < there < len(lists):
        raise InputError(f"{trace} holds {there} of the {len(lists)} queries: pass --resume to go on with it, "
                         "or remove it")
    reranker = make_reranker(settings, agent)
    run: dict[str, list[str]] = {}
    counts = Counter()
    total = sum(len(window_bounds(min(len(c.docids), k), settings.window, settings.step)) for c in lists)

    def note(row: dict) -> None:
        if "texts" in row:
            run[row["qid"]] = row["order"]
        else:
            counts.update(window_counts(row))

    with atomic_write(trace, "wb") as file:
        file.writelines(lines)
    for line in lines:
        note(json.loads(line))
    try:
        with open(trace, "a", encoding="utf-8", errors="replace", newline="\n") as file, \
                tqdm(total=total * settings.samples, initial=counts["calls"], unit="answer") as bar:
            for first in range(len(run), len(lists), batch_size):
                batch = lists[first:first + batch_size]
                rankings = reranker.rank_many([(c.query, c.texts[:k]) for c in batch], bar.update)
                for c, ranking in zip(batch, rankings):
                    for row in trace_rows(c, ranking, k, identity):
                        note(row)
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
    finally:
        if run:
            write_run(settings.output, run, settings.tag)
        if len(run) < len(lists):
            print(f"stopped early: {settings.output if run else 'nothing'} holds {len(run)} of {len(lists)} "
                  "queries; --resume goes on", file=sys.stderr)
    counts.update(queries=len(run), seconds=round(time.time() - started))
    if counts["error"]:
        with open(trace, encoding="utf-8") as file:
            reason = next(row["error"] for row in map(json.loads, file) if row.get("error"))
        print(f"{counts['error']} windows without an answer, the first: {reason}; --resume asks again",
              file=sys.stderr)
    return counts


FREE_TO_CHANGE = ("output", "resume", "stats", "limit", "format", "explain", "tag", "concurrency", "timeout",
                  "device", "documents", "query", "check_stability")


def run_identity(settings: Settings) -> dict:
    """What a resumed run must share: all settings that can change an answer, and a hash of the input."""
    same = {k: v for k, v in dataclasses.asdict(settings).items() if k not in FREE_TO_CHANGE}
    return same | {"input": hashlib.sha256(Path(settings.input).read_bytes()).hexdigest()[:16]}


def finished_lines(trace: Path, identity: dict, queries: int, batch_size: int) -> list[bytes]:
    """The JSONL's lines of whole batches, so that a resumed run has the batches of an unbroken one.

    A line cut off, or a window that got no answer, ends them. InputError where they are another run's.
    """
    lines = trace.read_bytes().splitlines(True) if trace.exists() else []
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    try:
        rows = [json.loads(line) for line in lines]
        starts = [n for n, row in enumerate(rows) if "texts" in row]  # where each query begins
        begun_with = [rows[n]["run"] for n in starts]
        if rows and (starts[0] != 0 or not all(isinstance(run, dict) for run in begun_with)):
            raise ValueError("the first line is no query")
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"--resume: {trace} is not what rearank.py writes ({error})") from None
    for run in begun_with:
        for name in {**identity, **run}:
            if run.get(name) != identity.get(name):
                found = "another input" if name == "input" else f"--{name.replace('_', '-')} {run.get(name)!r}"
                raise InputError(f"--resume: {trace} was begun with {found}")
    end = next((n for n, row in enumerate(rows) if row.get("status") == "error"), len(rows))
    starts = [n for n in starts if n < end]
    if starts and end - starts[-1] > rows[starts[-1]]["windows"]:  # the last query is whole
        starts.append(end)
    whole = max(0, len(starts) - 1)
    kept = whole if whole >= queries else whole // batch_size * batch_size
    return lines[:starts[kept]] if starts else []


def trace_rows(c: Candidates, ranking: Reranking, k: int, identity: dict) -> Iterable[dict]:
    """The JSONL's rows of one query: the query with its texts and final order, then a row for each window."""
    order = [c.docids[result.index] for result in ranking] + c.docids[k:]
    yield {"qid": c.qid, "query": c.query, "docids": c.docids, "texts": c.texts, "order": order,
           "windows": len(ranking.windows), "run": identity}
    for w in ranking.windows:
        shown, order = ([c.docids[p] for p in places] for places in (w.positions, w.order))
        over = [max(0, len(" ".join(c.texts[p].split())) - w.cut.passage_chars) for p in w.positions]
        yield {"qid": c.qid, "docids": shown, "status": w.status, "order": order, "reasoning": w.reasoning,
               "response": w.response, "tokens": w.tokens, "prompt_tokens": w.prompt_tokens,
               "finished": w.finished, "error": w.error, "prompt_cut": w.cut.prompt_cut,
               "query_chars_cut": w.cut.query_chars_cut, "passages_cut": sum(map(bool, over)),
               "chars_cut": sum(over),
               "samples": [{"response": text, "status": status, "order": [c.docids[p] for p in places]}
                           for text, status, places in w.samples]}


def window_counts(row: dict) -> dict[str, int]:
    """What the closing line and --stats count of one window, in the closing line's words."""
    return {"calls": len(row["samples"]) or 1, "windows": 1, row["status"]: 1,
            "unchanged": int(row["order"] == row["docids"]), "cut at the limit": int(not row["finished"]),
            "prompts cut to fit": int(row["prompt_cut"]), "queries cut": int(row["query_chars_cut"] > 0),
            "passages": len(row["docids"]), "passages shortened": row["passages_cut"],
            "characters cut": row["chars_cut"], "prompt tokens": row["prompt_tokens"],
            "new tokens": row["tokens"]}


def rank_lines(settings: Settings) -> int:
    """Rank the lines of a file for --query and print them, with --explain beside what is said of each."""
    lines = re.split(r"\r\n|\r|\n", read_text(settings.documents))  # as editors count them: no form feeds
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    numbers, lines = [n for n, _ in numbered], [line for _, line in numbered]
    ranking = make_reranker(settings).rank(settings.query, lines[:settings.top_k])
    order = [r.index for r in ranking] + [*range(len(ranking), len(lines))]
    rows = [{"rank": rank, "line": numbers[i], "text": lines[i]} for rank, i in enumerate(order, 1)]
    for row, i in zip(rows, order) if settings.explain else ():
        said = [text.strip() for w in ranking.windows if i in w.positions
                for text, named in sentences(w.reasoning) if w.positions.index(i) + 1 in named]
        row["reasoning"] = " ".join(said)
    if settings.format == "json":
        print(json.dumps(rows, ensure_ascii=False, indent=1))
    elif settings.format == "tsv":
        for values in [rows[0].keys(), *(row.values() for row in rows)] if rows else ():
            print("\t".join(" ".join(str(value).split()) for value in values))
    else:
        for row in rows:
            reasoning = f"\n     {row['reasoning']}" if row.get("reasoning") else ""
            print(f"{row['rank']:3}. [{row['line']}] {row['text']}{reasoning}")
    for w in ranking.windows:
        if w.status != "ok":
            print(f"answer {w.status}: {w.error or w.response!r:.200}", file=sys.stderr)
    return int(any(w.status == "error" for w in ranking.windows))


def check_stability(settings: Settings, agent: Agent | None = None) -> dict[str, float]:
    """How far the orders of one list agree when it comes in another order: Kendall's tau (1: the same, 0: no
    relation) and the overlap of the top 10, means over pairs of shuffles and over queries."""
    lists, reranker = read_candidates(settings.input)[:settings.limit or None], make_reranker(settings, agent)
    taus, overlaps, errors = [], [], 0
    if settings.check_stability < 2:
        raise InputError("--check-stability 1: expected at least 2, to compare them")
    for c in tqdm(lists, unit="query"):
        n = min(len(c.texts), settings.top_k)
        shuffles = [random.Random(f"{settings.seed}\t{c.qid}\t{k}").sample(range(n), n)
                    for k in range(settings.check_stability)]
        rankings = reranker.rank_many([(c.query, [c.texts[p] for p in places]) for places in shuffles])
        errors += sum(w.status == "error" for ranking in rankings for w in ranking.windows)
        orders = [[places[r.index] for r in ranking] for places, ranking in zip(shuffles, rankings)]
        for one, other in itertools.combinations(orders, 2) if n > 1 else ():
            pairs = [other.index(a) < other.index(b) for a, b in itertools.combinations(one, 2)]
            taus.append(2 * statistics.fmean(pairs) - 1)
            overlaps.append(len({*one[:10]} & {*other[:10]}) / min(10, n))
    return {"queries": len(lists), "shuffles": settings.check_stability, "error": errors,
            "tau": statistics.fmean(taus or [1]), "top10_overlap": statistics.fmean(overlaps or [1])}


CLOSING = ("ok", "repaired", "untagged", "truncated", "malformed", "empty", "error", "unchanged",
           "cut at the limit", "prompts cut to fit", "queries cut", "passages", "passages shortened",
           "characters cut", "prompt tokens", "new tokens")


def main(argv: list[str] | None = None) -> int:
    """Rerank as the command line says. Status 1 where a window had no answer."""
    settings = command_line(Settings, argv, "\n\n".join(__doc__.split("\n\n")[:2]))
    needs = [(settings.model or settings.server, "--model (or --server)")]
    if settings.query or settings.documents:
        needs += [(settings.query, "--query"), (settings.documents, "DOCUMENTS")]
    else:
        needs += [(settings.input, "--input (or --query)"),
                  (settings.output or settings.check_stability, "--output")]
    if missing := [name for given, name in needs if not given]:
        raise InputError(f"expected {' and '.join(missing)}; --help lists all options")
    if settings.input and not os.path.isfile(settings.input):
        raise InputError(f"--input {settings.input}: no such file (no pipe either: it is read twice)")
    if os.path.isdir(settings.stats):
        raise InputError(f"--stats {settings.stats}: is a folder; expected the name of a file to write")
    if settings.query:
        return rank_lines(settings)
    if settings.check_stability:
        found = check_stability(settings)
        print("{queries} queries, {shuffles} shuffles of each: Kendall's tau {tau:.3f}, overlap of the top "
              "10 {top10_overlap:.3f}, {error} windows without an answer".format(**found))
    else:
        found = rerank_file(settings)
        print(f"{found['queries']} queries, {found['calls']} calls in {found['seconds']} s:",
              ", ".join(f"{found[name]:,} {name}" for name in CLOSING))
        print(f"{settings.output} is the run, {settings.output}.jsonl the reasoning (report.py shows it)")
    if settings.stats:
        with atomic_write(settings.stats) as file:
            every = {} if settings.check_stability else dict.fromkeys(CLOSING, 0)
            json.dump(every | found, file, indent=1)
    return int(found["error"] > 0)


if __name__ == "__main__":
    run_main(main)
