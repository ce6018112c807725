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
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError

from tqdm import tqdm

from data import (Candidates, InputError, atomic_write, check_run, command_line, read_candidates, read_text,
                  run_main, setting, write_run)
from model import (Agent, Completion, has_native_bfloat16, load_agent, out_of_memory, pick_device,
                   sample)
from report import sentences
from reward import parse_ranking

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
def added_ids(tokenizer) -> tuple[frozenset[int], bool]:
    """(ids that text must not bring about, whether all are written with more than words and punctuation)."""
    added = {token: id for token, id in tokenizer.get_added_vocab().items() if id != tokenizer.unk_token_id}
    return frozenset(added.values()), not any(PLAIN.fullmatch(token) for token in added)


PLAIN = re.compile(r"[\w\s.,;:'\"!?()-]*")


def as_content(text: str, tokenizer=None) -> str:
    """Text from outside as text and nothing else: no identifier of ours, no tag of an answer, no chat mark.

    `[12]` becomes `(12)`, `</answer>` `< /answer>`; what `tokenizer` would read as a special or added token
    gets a blank inside. Without one, for a server, so does all that looks like a mark, `<|...|>`. Half a
    surrogate pair becomes "?". Other text stays exactly as it is.
    """
    text = text.encode("utf-8", "replace").decode()
    text = re.sub(r"\[(\s*\d+\s*)\]", r"(\1)", text)
    text = re.sub(r"<(?=/?(?:think|answer)>)", "< ", text)
    if tokenizer is None:
        return re.sub(r"<(?=[|｜]|/?(?:s|bos|eos|start_of_turn|end_of_turn)>)|\[(?=/?INST)", r"\g<0> ", text)
    added, marked = added_ids(tokenizer)
    if marked and PLAIN.fullmatch(text):
        return text  # most texts: asking the tokenizer takes its time
    if tokenizer.unk_token and tokenizer.unk_token in text:
        text = text.replace(tokenizer.unk_token, " ".join(tokenizer.unk_token))
    for _ in range(10):  # a break can let a second mark appear around it
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = [span for id, span in zip(encoded["input_ids"], encoded["offset_mapping"]) if id in added]
        if not spans:
            return text
        for start, end in reversed(spans):
            text = text[:start + 1] * (end > start + 1) + " " + text[start + 1:]
    return re.sub(r"[^\w\s]", " ", text)  # a tokenizer that takes blanks out: nothing but words is left


def build_messages(query: str, passages: list[str], prompt: str = "rearank",
                   passage_chars: int | None = None, tokenizer=None) -> list[dict]:
    """The chat that asks for an order of `passages` (in their present order, numbered from 1).

    Passages have their white space collapsed and are cut to `passage_chars` (default: the prompt's own, 400
    for rearank, 300 for rankgpt); they and the query go through `as_content`. Returns [{"role", "content"},
    ...] for a chat template; empty turns are left out.
    """
    if prompt not in PROMPTS:
        raise InputError(f"unknown prompt {prompt!r}: expected one of {', '.join(PROMPTS)}")
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
    folded = messages
    if messages[0]["role"] == "system":
        content = f"{messages[0]['content']}\n\n{messages[1]['content']}"
        folded = [{"role": "user", "content": content}, *messages[2:]]
    for turns in (messages, folded):
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
    """What a prompt leaves out: whether it had to be cut to fit; characters of the query; passages that were
    cut, which is the rule beyond `passage_chars`, and their characters."""

    to_fit: bool = False
    query: int = 0
    passages: int = 0
    chars: int = 0


def fit_prompt(tokenizer, query: str, passages: list[str], prompt: str, max_tokens: int, start: str = "",
               passage_chars: int = 0) -> tuple[list[int], Cut]:
    """(token ids of the prompt, what was cut).

    One over `max_tokens` (some BRIGHT queries have thousands) is made to fit: first the query is cut to a
    quarter of the room, then the passages shorter and shorter. InputError where even that is too long.
    """
    limit, asked = passage_chars or PROMPTS[prompt].passage_chars, query
    for attempt, chars in enumerate((limit, limit, *(c for c in (300, 200, 100, 50) if c < limit))):
        if attempt == 1:
            ids = tokenizer(as_content(query, tokenizer), add_special_tokens=False)["input_ids"]
            query = tokenizer.decode(ids[:max_tokens // 4])
        text = render_chat(tokenizer, build_messages(query, passages, prompt, chars, tokenizer))
        ids = tokenizer(text + start, add_special_tokens=False)["input_ids"]
        if len(ids) <= max_tokens:
            return ids, what_is_cut(passages, chars)._replace(to_fit=attempt > 0,
                                                              query=max(0, len(asked) - len(query)))
    raise InputError(f"{len(passages)} passages do not fit into {max_tokens} tokens: use a smaller window")


def what_is_cut(passages: list[str], chars: int) -> Cut:
    """How many of the passages are longer than `chars`, and by how many characters together."""
    over = [length - chars for p in passages if (length := len(" ".join(p.split()))) > chars]
    return Cut(passages=len(over), chars=sum(over))


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
        raise InputError(f"window {window}, step {step}: expected 0 < step <= window, or ranks are skipped")
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


@dataclasses.dataclass
class Answer:
    """What a policy says to one prompt. `error`: why there is no answer, which is then never parsed."""

    text: str
    tokens: int = 0
    prompt_tokens: int = 0
    finished: bool = True
    error: str = ""


class StaysHere(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the key would go along."""

    def redirect_request(self, *_):
        return None


class Server:
    """Chat completions over HTTP, as vLLM, SGLang, llama.cpp, Ollama and hosted models have them.

    url: what ends in /v1. The key, if one is needed, is read from REARANK_API_KEY or OPENAI_API_KEY and never
    shown. Timeouts, 429 and 5xx are tried again, `retries` times with growing pauses. InputError where no
    server answers at all.
    """

    def __init__(self, url: str, model: str = "", concurrency: int = 8, timeout: float = 600.0,
                 retries: int = 4):
        self.url, self.concurrency, self.timeout = url.rstrip("/"), concurrency, timeout
        self.key = os.environ.get("REARANK_API_KEY") or os.environ.get("OPENAI_API_KEY") or ""
        self.opener, self.retries = urllib.request.build_opener(StaysHere), 0
        models = self.call("/models")  # is it there?
        self.model, self.retries, reason = model, retries, models if isinstance(models, str) else "no model"
        if not model and not isinstance(models, str):
            self.model = next((m["id"] for m in models.get("data") or [] if isinstance(m, dict)), "")
        if not self.model or isinstance(models, str) and not models.startswith(("HTTP", "expected")):
            raise InputError(f"--server {url}: {reason}; expected the address of an OpenAI-compatible server "
                             "(http://host:8000/v1), and --model NAME where it lists none")

    def call(self, path: str, body: dict | None = None) -> dict | str:
        """The JSON object that the server sends, or in one line why there is none."""
        request = urllib.request.Request(self.url + path, json.dumps(body).encode() if body else None,
                                         {"Content-Type": "application/json"})
        if self.key:
            request.add_header("Authorization", f"Bearer {self.key}")
        for attempt in itertools.count():
            wait = min(30.0, 0.5 * 2**attempt)
            try:
                with self.opener.open(request, timeout=self.timeout) as reply:
                    found = json.loads(reply.read())
                if isinstance(found, dict):
                    return found
                reason = f"expected a JSON object, found {found!r:.80}"
            except HTTPError as error:
                text = " ".join(error.read(2000).decode("utf-8", "replace").split())
                reason = f"HTTP {error.code}: {text:.200}"
                if error.code != 429 and error.code < 500:
                    return self.hide(reason)
                after = error.headers.get("Retry-After") or ""
                wait = min(60.0, float(after)) if after.isdigit() else wait
            except json.JSONDecodeError as error:
                reason = f"expected JSON, found {error.doc!r:.80}"
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = f"{type(error).__name__}: {error}"
            if attempt >= self.retries:
                return self.hide(reason)
            time.sleep(wait)

    def hide(self, text: str) -> str:
        """Without the key, should a server send it back."""
        return text.replace(self.key, "***") if self.key else text

    def answer(self, messages: list[dict], **options) -> Answer:
        """One chat. A reasoning field of its own is put in front of the content, in think tags."""
        reply = self.call("/chat/completions", {"model": self.model, "messages": messages, **options})
        if isinstance(reply, str):
            return Answer("", error=reply)
        try:
            [choice, *_], usage = reply["choices"], reply.get("usage") or {}
            content, thought = choice["message"].get("content"), None
            for name in ("reasoning_content", "reasoning"):
                thought = thought or choice["message"].get(name)
            if not isinstance(content or thought, str):
                raise TypeError("no text")
            text, finished = content or "", choice.get("finish_reason") != "length"
            if isinstance(thought, str) and "<think>" not in text:
                text = f"<think>{thought}</think>{text}" if content or finished else f"<think>{thought}"
            tokens = [usage.get(name) or 0 for name in ("completion_tokens", "prompt_tokens")]
            return Answer(text, *map(int, tokens), finished)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            return Answer("", error=self.hide(f"expected a chat completion, found {json.dumps(reply):.200} "
                                              f"({type(error).__name__}: {error})"))


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
        """What stands between <think> and </think> (empty where there is none)."""
        _, _, rest = self.response.partition("<think>")
        return rest.partition("</think>")[0].strip()


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
    text, title = fields.get("text"), fields.get("title") or ""
    if not isinstance(text, str) or not isinstance(title, str):
        found = fields if isinstance(document, dict) else document
        raise TypeError(f'{place}: expected a string, or a dict with "text", found {found!r:.60}')
    return f"{title} {text}" if title else text


def fuse(orders: Sequence[Sequence[int]], size: int) -> list[int]:
    """Reciprocal rank fusion: by the sum of 1 / (60 + rank), rank from 1; ties stay in place."""
    sums = Counter({i: 0.0 for i in range(size)})
    for order in orders:
        sums.update({i: 1 / (60 + rank) for rank, i in enumerate(order, 1)})
    return sorted(range(size), key=lambda i: -round(sums[i], 12))


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
            raise InputError(f"samples {self.samples}: expected 1, or several at a temperature above 0")
        self.opened = self.added = ""
        if self.server:
            if not self.think:
                raise InputError("think=False: a server cannot be made to begin with an empty think block")
            self.policy = Server(self.server, self.model, self.concurrency, self.timeout)
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

        `progress` is called with the number of windows just answered.
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
        seeds = [int.from_bytes(hashlib.sha256(key).digest()[:6]) for key in keys]
        ask = self._ask_server if self.server else self._ask_model
        windows = []
        for window, (cut, answers) in zip(positions, ask(asked, seeds, progress)):
            read = [(a, parse_ranking(a.text, len(window))) for a in answers]
            statuses = ["error" if answer.error else ranking.status for answer, ranking in read]
            orders = [ranking.order for (answer, ranking), status in zip(read, statuses)
                      if status in ("ok", "repaired", "untagged", "truncated")]
            first = answers[0]
            windows.append(Window(
                positions=window, response=first.text, cut=cut, error=first.error,
                status=next((status for status in statuses if status != "ok"), "ok"),
                order=[window[i] for i in fuse(orders, len(window))], tokens=sum(a.tokens for a in answers),
                prompt_tokens=first.prompt_tokens, finished=all(a.finished for a in answers),
                samples=[(a.text, status, [window[i] for i in ranking.order])
                         for (a, ranking), status in zip(read, statuses)] if self.samples > 1 else []))
        return windows

    def _ask_model(self, asked: list, seeds: list[int], progress) -> list[tuple[Cut, list[Answer]]]:
        prompts = [fit_prompt(self.agent.tokenizer, query, passages, self.prompt, self.max_prompt_tokens,
                              self.added, self.passage_chars) for query, passages in asked]
        try:
            groups: list[list[Completion]] = sample(
                self.agent.model, [ids for ids, _ in prompts], self.samples, self.max_new_tokens,
                self.temperature, self.agent.stop_ids, seeds, self.max_rows,
                progress and (lambda ended: progress(ended if self.samples == 1 else ended / self.samples)))
        except (RuntimeError, MemoryError) as error:  # torch's own is a RuntimeError
            if not out_of_memory(error):
                raise
            raise InputError("too little memory for these prompts: lower --max-rows") from None
        opened = self.opened + self.added
        return [(cut, [Answer(opened + self.agent.decode(c), len(c.ids), len(ids), c.finished)
                       for c in group]) for (ids, cut), group in zip(prompts, groups)]

    def _ask_server(self, asked: list, seeds: list[int], progress) -> list[tuple[Cut, list[Answer]]]:
        def one(job):
            (query, passages), seed = job
            chat = build_messages(query, passages, self.prompt, self.passage_chars or None)
            answer = self.policy.answer(chat, temperature=self.temperature, max_tokens=self.max_new_tokens,
                                        seed=seed % 2**31)
            if progress:
                progress(1 if self.samples == 1 else 1 / self.samples)
            return answer

        jobs = [(ask, seed + k) for ask, seed in zip(asked, seeds) for k in range(self.samples)]
        with ThreadPoolExecutor(self.concurrency) as threads:
            answers = list(threads.map(one, jobs))
        chars = self.passage_chars or PROMPTS[self.prompt].passage_chars
        return [(what_is_cut(passages, chars), answers[i * self.samples:(i + 1) * self.samples])
                for i, (_, passages) in enumerate(asked)]


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
    """The reranker of these settings."""
    options = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Options)}
    return Reranker(**options | {"model": agent or settings.model})


def rerank_file(settings: Settings, agent: Agent | None = None) -> Counter:
    """Rerank a file of candidates into a run and a JSONL of windows. Returns the closing line's counts.

    Queries are worked through in batches. What is finished when the program is interrupted is kept: the JSONL
    grows with each batch, the run of the finished queries is written on the way out, and --resume goes on
    from there.
    """
    lists = read_candidates(settings.input)[:settings.limit or None]
    check_run(settings.output, {c.qid: c.docids for c in lists}, settings.tag)  # now, not after the work
    if Path(settings.input).resolve() in (Path(settings.output + end).resolve() for end in ("", ".jsonl")):
        raise InputError(f"--output {settings.output}: would overwrite the input; expected another name")
    trace, identity = Path(settings.output + ".jsonl"), run_identity(settings)
    batch_size = settings.concurrency if settings.server else settings.max_rows
    unit = 1 if settings.server else batch_size  # what a model here says depends, in rounding, on its batch
    rows = finished_rows(trace, identity, lists, unit) if settings.resume else []
    reranker = make_reranker(settings, agent)
    run: dict[str, list[str]] = {}
    counts, started = Counter(), time.time()
    trace.parent.mkdir(parents=True, exist_ok=True)
    k, slide = settings.top_k, (settings.window, settings.step)
    total = sum(len(window_bounds(min(len(c.docids), k), *slide)) for c in lists)

    def note(row: dict) -> None:
        if "texts" in row:
            run[row["qid"]] = row["order"]
        else:
            counts.update(window_counts(row))

    try:
        with atomic_write(trace) as file:  # of the batches that are whole
            for row in rows:
                note(row)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        done = len(run)
        with open(trace, "a", encoding="utf-8") as file, \
                tqdm(total=total, initial=counts["calls"], unit="window") as bar:
            for first in range(done, len(lists), batch_size):
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
            there = settings.output if run else "nothing"
            print(f"stopped early: {there} holds {len(run)} of {len(lists)} queries; --resume goes on",
                  file=sys.stderr)
    counts["queries"], counts["seconds"] = len(run), round(time.time() - started)
    return counts


def run_identity(settings: Settings) -> str:
    """A hash of the input and of all settings that can change an answer: what a resumed run must share."""
    free = ("output", "resume", "stats", "format", "explain", "tag", "concurrency", "timeout", "device")
    same = {k: v for k, v in dataclasses.asdict(settings).items() if k not in free}
    return hashlib.sha256(json.dumps(same).encode() + Path(settings.input).read_bytes()).hexdigest()[:16]


def finished_rows(trace: Path, identity: str, lists: list[Candidates], batch_size: int) -> list[dict]:
    """The JSONL's rows of whole batches, so that a resumed run has the batches of an unbroken one.

    A line that was cut off ends them. InputError where they are another run's.
    """
    groups: list[list[dict]] = []
    for line in trace.read_text(encoding="utf-8").splitlines() if trace.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            break
        if "texts" in row:
            groups.append([])
            if row.get("run") != identity or row["qid"] != lists[min(len(groups), len(lists)) - 1].qid:
                raise InputError(f"--resume: {trace} was begun with other settings or another input")
        groups[-1].append(row)
    whole = groups[:-1] if groups and len(groups[-1]) <= groups[-1][0]["windows"] else groups
    count = len(whole) if len(whole) == len(lists) else len(whole) // batch_size * batch_size
    return [row for group in whole[:count] for row in group]


def trace_rows(c: Candidates, ranking: Reranking, k: int, identity: str) -> Iterable[dict]:
    """The JSONL's rows of one query: the query with its texts and final order, then a row for each window."""
    order = [c.docids[result.index] for result in ranking] + c.docids[k:]
    yield {"qid": c.qid, "query": c.query, "docids": c.docids, "texts": c.texts, "order": order,
           "windows": len(ranking.windows), "run": identity}
    for w in ranking.windows:
        named = [[c.docids[p] for p in places] for places in (w.positions, w.order)]
        row = {"qid": c.qid, "docids": named[0], "status": w.status, "order": named[1],
               "reasoning": w.reasoning, "response": w.response, "tokens": w.tokens,
               "prompt_tokens": w.prompt_tokens, "finished": w.finished, "prompt_cut": w.cut.to_fit,
               "query_chars_cut": w.cut.query, "passages_cut": w.cut.passages, "chars_cut": w.cut.chars}
        if w.error:
            row["error"] = w.error
        if w.samples:
            row["samples"] = [{"response": text, "status": status, "order": [c.docids[p] for p in places]}
                              for text, status, places in w.samples]
        yield row


def window_counts(row: dict) -> dict[str, int]:
    """What the closing line and --stats count of one window."""
    return {"calls": max(1, len(row.get("samples", ()))), "windows": 1, row["status"]: 1,
            "cut": int(not row["finished"]), "unchanged": int(row["order"] == row["docids"]),
            "prompts cut": int(row["prompt_cut"]), "queries cut": int(row["query_chars_cut"] > 0),
            "passages": len(row["docids"]), "passages cut": row["passages_cut"],
            "characters cut": row["chars_cut"], "prompt tokens": row["prompt_tokens"],
            "new tokens": row["tokens"]}


def rank_lines(settings: Settings) -> int:
    """Rank the lines of a file for --query and print them, with --explain beside what is said of each."""
    name = settings.documents
    lines = (sys.stdin.read() if name == "-" else read_text(name)).splitlines()
    lines = [line for line in lines if line.strip()]
    ranking = make_reranker(settings).rank(settings.query, lines[:settings.top_k])
    rows = [{"rank": r.rank, "line": r.index + 1, "text": r.text} for r in ranking]
    rows += [{"rank": n, "line": n, "text": line} for n, line in enumerate(lines, 1) if n > settings.top_k]
    for row in rows if settings.explain else ():
        said = [sentence.strip() for w in ranking.windows if (place := row["line"] - 1) in w.positions
                for sentence, named in sentences(w.reasoning) if w.positions.index(place) + 1 in named]
        row["reasoning"] = " ".join(said)
    if settings.format == "json":
        print(json.dumps(rows, ensure_ascii=False, indent=1))
    elif settings.format == "tsv":
        for row in [dict(zip(rows[0], rows[0])), *rows] if rows else ():
            print("\t".join(" ".join(str(value).split()) for value in row.values()))
    else:
        for row in rows:
            print(f"{row['rank']:3}. [{row['line']}] {row['text']}")
            if row.get("reasoning"):
                print(f"     {row['reasoning']}")
    for w in ranking.windows:
        if w.status != "ok":
            print(f"answer {w.status}: {w.error or w.response!r:.200}", file=sys.stderr)
    return int(any(w.status == "error" for w in ranking.windows))


def check_stability(settings: Settings, agent: Agent | None = None) -> dict[str, float]:
    """How far the orders of one list agree when it comes in another order: Kendall's tau (1: the same, 0: no
    relation) and the overlap of the top 10, means over pairs of shuffles and over queries."""
    lists = read_candidates(settings.input)[:settings.limit or None]
    reranker, taus, overlaps = make_reranker(settings, agent), [], []
    with tqdm(lists, unit="query") as bar:
        for c in bar:
            texts, orders = c.texts[:settings.top_k], []
            for k in range(settings.check_stability):
                places = random.Random(f"{settings.seed}\t{c.qid}\t{k}").sample(range(len(texts)), len(texts))
                orders.append([places[r.index] for r in reranker.rank(c.query, [texts[p] for p in places])])
            for one, other in itertools.combinations(orders, 2):
                ranks = {p: rank for rank, p in enumerate(other)}
                pairs = [ranks[a] < ranks[b] for a, b in itertools.combinations(one, 2)]
                taus.append(2 * statistics.fmean(pairs) - 1 if pairs else 1.0)
                overlaps.append(len({*one[:10]} & {*other[:10]}) / max(1, min(10, len(one))))
    return {"queries": len(lists), "shuffles": settings.check_stability, "tau": statistics.fmean(taus),
            "top10_overlap": statistics.fmean(overlaps)}


def main(argv: list[str] | None = None) -> int:
    """Rerank as the command line says. Status 1 where a window had no answer."""
    settings = command_line(Settings, argv, __doc__.split("\n\n")[0] + "\n\n" + __doc__.split("\n\n")[1])
    window_bounds(0, settings.window, settings.step)  # before anything is loaded
    needs = {"--model (or --server)": settings.model or settings.server}
    if settings.query or settings.documents:
        needs |= {"--query": settings.query, "DOCUMENTS": settings.documents}
    else:
        needs |= {"--input (or --query)": settings.input,
                  "--output": settings.output or settings.check_stability}
    if missing := [name for name, value in needs.items() if not value]:
        raise InputError(f"expected {' and '.join(missing)}; --help lists all options")
    if settings.query:
        return rank_lines(settings)
    if settings.check_stability:
        if settings.check_stability < 2:
            raise InputError("--check-stability 1: expected at least 2, to compare them")
        found = check_stability(settings)
        print("{queries} queries, {shuffles} shuffles of each: Kendall's tau {tau:.3f}, overlap of the top "
              "10 {top10_overlap:.3f}".format(**found))
    else:
        found = rerank_file(settings)
        kinds = ("ok", "repaired", "untagged", "truncated", "malformed", "empty", "error")
        statuses = ", ".join(f"{found[kind]} {kind}" for kind in kinds)
        print(f"{found['queries']} queries, {found['calls']} calls in {found['seconds']} s: {statuses}; "
              f"{found['unchanged']} changed nothing; {found['cut']} cut at the limit, "
              f"{found['prompts cut']} prompts cut to fit, {found['queries cut']} queries cut, "
              f"{found['passages cut']} of {found['passages']} passages shortened, by "
              f"{found['characters cut']:,} characters; {found['prompt tokens']:,} prompt and "
              f"{found['new tokens']:,} new tokens\n{settings.output} is the run, {settings.output}.jsonl "
              "the reasoning (python report.py shows it)")
    if settings.stats:
        with atomic_write(settings.stats) as file:
            json.dump(found, file, indent=1)
    return int(bool(found.get("error")))


if __name__ == "__main__":
    run_main(main)
