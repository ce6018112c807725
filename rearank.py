"""REARANK, the agent: a language model that reads a window of passages, thinks, and answers a better order.

    python rearank.py --model le723z/Rearank-7B --input candidates.jsonl --output reranked.trec
    python rearank.py --model MODEL --query "how long do fleas live" documents.txt --explain
    python rearank.py --server http://host:8000/v1 --input candidates.jsonl --output reranked.trec

From top to bottom: the sliding window; `Reranker`; a run on disk; the command line.

Where it departs from the paper (arXiv 2505.20046) and the authors' code:
- 100 passages with window 20 and stride 10 make 9 windows, not 10. Lists of every length are ranked to the
  top.
- The prompt is an explicit choice, never guessed from a model's name (prompts.py).
- Inference needs no vLLM: model.py encodes a prompt once, however many answers are drawn from it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

from tqdm import tqdm

from model import Agent, Completion, load_agent, sample
from prompts import (PROMPTS, Shortened, answer_start, build_messages,
                     encode_prompt,  # for `from rearank import encode_prompt`
                     fit_context, fit_prompt)
from reward import parse_ranking, sentences
from support.cli import InputError, command_line, refuse, run_main, setting
from support.device import has_native_bfloat16, out_of_memory, pick_device
from support.files import Candidates, check_run, read_candidates, write_run
from support.openai_client import Answer, Server
from support.streams import atomic_write, read_text

# ------------------------------------------------------------------------------------------------------------
# The sliding window


def window_bounds(n: int, window: int = 20, stride: int = 10) -> list[tuple[int, int]]:
    """(start, end) of each window over n ranks, in the order they are ranked: from the end to the top.

    The last one begins at rank 0 for every n. A list no longer than `window` has one window, a list of under
    two items none. ValueError unless 0 < stride <= window: otherwise some ranks would never be read.

    >>> window_bounds(45, window=20, stride=10)
    [(25, 45), (15, 35), (5, 25), (0, 15)]
    """
    if not 0 < stride <= window:
        raise ValueError(f"window {window}, stride {stride}: expected 0 < stride <= window")
    bounds, end = [], n
    while n > 1 and (not bounds or bounds[-1][0] > 0):
        bounds.append((max(0, end - window), end))
        end -= stride
    return bounds


def sliding_window(items: list, rank_window: Callable[[list], list[int]], window: int = 20,
                   stride: int = 10) -> list:
    """Rerank a list by windows that slide from its end to its top: the best move up. Section 3.1, eq. 2.

    `rank_window` gets a window's items in present order and returns their 0-based positions, best first.
    Returns a new list. ValueError unless 0 < stride <= window and each order is a permutation.
    """
    items = list(items)
    for start, end in window_bounds(len(items), window, stride):
        present = items[start:end]
        order = rank_window(present)
        if sorted(order) != list(range(len(present))):
            raise ValueError(f"expected a permutation of the window's {len(present)} positions, got {order}")
        items[start:end] = [present[i] for i in order]
    return items


# ------------------------------------------------------------------------------------------------------------
# The reranker


@dataclasses.dataclass
class Window:
    """One window: the answer of the model, and how it was read. Positions are those in the input list."""

    positions: list[int]
    response: str
    status: str  # of `parse_ranking`, or "error": no answer came, and the order stays
    order: list[int]  # positions, best first
    tokens: int
    prompt_tokens: int
    shortened: Shortened
    finished: bool
    error: str = ""
    samples: list[tuple[str, str, list[int]]] = dataclasses.field(default_factory=list)  # of several answers

    @property
    def reasoning(self) -> str:
        """The text before </think>, without <think> (which some servers keep). Empty if there is no tag."""
        before, closed, _ = self.response.partition("</think>")
        _, opened, inside = before.partition("<think>")
        if opened:
            return inside.strip()
        return before.strip() if closed else ""


@dataclasses.dataclass
class Result:
    """A document in its new place: `index` in the input (from 0), `rank` in the output (from 1), its text,
    and the document as it was given."""

    index: int
    rank: int
    text: str
    document: object = None


class Reranking(list):
    """A list of `Result`, best first. `.windows` has every window's reasoning and status."""

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
    """Reciprocal rank fusion: sort by the sum of 1 / (60 + rank), rank from 1. Ties keep their order."""
    scores = [sum(1 / (61 + order.index(i)) for order in orders) for i in range(size)]
    return sorted(range(size), key=lambda i: -round(scores[i], 12))


@dataclasses.dataclass
class Options:
    """The options of a reranker, in Python and on the command line."""

    model: str | Agent = setting("", "A model folder, a name on the hub, e.g. le723z/Rearank-7B, or on the "
                                 "server.", group="model")
    prompt: str = setting("rearank", "The prompt the model was trained with (rankgpt: zero-shot).",
                          choices=tuple(PROMPTS))
    window: int = setting(20, "Passages in a window.", minimum=2, group="windows and answers")
    stride: int = setting(10, "Ranks by which the window slides.", minimum=1)
    think: bool = setting(True, "Let the model reason; --no-think fills in an empty think block.")
    temperature: float = setting(0.0, "Sampling temperature; 0 is greedy.", minimum=0)
    samples: int = setting(1, "Answers per window, fused by reciprocal ranks.", minimum=1)
    passage_chars: int = setting(0, "Characters of a passage that are shown; 0: the prompt's own.", minimum=0)
    max_new_tokens: int = setting(2048, "Longest answer.", minimum=1)
    max_prompt_tokens: int = setting(4096, "Longer prompts are shortened: first the query, then passages.",
                                     minimum=1)
    max_num_seqs: int = setting(32, "Windows (of different queries) answered at a time.", minimum=1)
    seed: int = setting(0, "Seed of the sampling.")
    server: str = setting("", "An OpenAI-compatible server, http://host:8000/v1, instead of a model here.",
                          group="server")
    concurrency: int = setting(8, "Requests in flight at the server.", minimum=1)
    timeout: float = setting(600.0, "Seconds to wait for an answer of the server.", minimum=0.1)
    device: str = setting("auto", "cuda, mps, cpu or auto.", group="device")
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
    with. A window's random numbers depend on seed, query and window alone. ValueError for options that do
    not fit together; InputError from loading.
    """

    def __post_init__(self):
        build_messages("", [], self.prompt)  # an unknown prompt raises, before anything is loaded
        window_bounds(0, self.window, self.stride)
        if self.samples < 1 or self.samples > 1 and not self.temperature:
            raise ValueError(f"samples {self.samples}: expected 1, or several at a temperature above 0")
        self.opened = self.added = ""
        if self.server:
            if not self.think:
                raise ValueError("think=False: a server cannot be made to begin with an empty think block")
            self.client = Server(self.server, self.model, self.timeout)
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
        """Rerank many (query, texts) lists. Windows of different queries share a batch.

        `progress` is called with the number of answers that have just ended.
        """
        bounds = [window_bounds(len(texts), self.window, self.stride) for _, texts in lists]
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
        """Let the model answer one window per list: the texts at these positions, in the windows' turn."""
        asked, seeds = [], []
        for (query, texts), window in zip(lists, positions):
            asked.append((query, [texts[p] for p in window]))
            key = f"{self.seed}\t{query}\t{turn}".encode("utf-8", "replace")
            seeds.append(int.from_bytes(hashlib.sha256(key).digest()[:6], "big"))
        ask = self._ask_server if self.server else self._ask_model
        return [self._read(window, shortened, answers)
                for window, (shortened, answers) in zip(positions, ask(asked, seeds, progress))]

    def _read(self, window: list[int], shortened: Shortened, answers: list[Answer]) -> Window:
        """Read the answers to one window, which holds these positions.

        An answer votes if it named an order. Without votes the window keeps its order.
        """
        votes, samples = [], []
        for answer in answers:
            ranking = parse_ranking(answer.text, len(window))
            status = "error" if answer.error else ranking.status
            order_begun = status == "truncated" and "<answer>" in answer.text
            if status in ("ok", "repaired", "untagged") or order_begun:
                votes.append(ranking.order)
            samples.append((answer.text, status, [window[i] for i in ranking.order]))
        order = [window[i] for i in fuse(votes, len(window))]
        statuses = [status for _, status, _ in samples]
        return Window(
            positions=window, response=answers[0].text, shortened=shortened, order=order,
            status=next((status for status in statuses if status != "ok"), "ok"),
            error=next((answer.error for answer in answers if answer.error), ""),
            tokens=sum(answer.tokens for answer in answers), prompt_tokens=answers[0].prompt_tokens,
            finished=all(answer.finished for answer in answers), samples=samples if len(samples) > 1 else [])

    def _ask_model(self, asked: list, seeds: list[int], progress) -> list[tuple[Shortened, list[Answer]]]:
        """The answers of the model here to each (query, passages), and how its prompt was shortened."""
        prompts = [fit_prompt(self.agent.tokenizer, query, passages, self.prompt, self.max_prompt_tokens,
                              self.added, self.passage_chars) for query, passages in asked]
        try:
            groups: list[list[Completion]] = sample(
                self.agent.model, [ids for ids, _ in prompts], self.samples, self.max_new_tokens,
                self.temperature, self.agent.stop_ids, seeds, self.max_num_seqs, progress)
        except (RuntimeError, MemoryError) as error:  # torch's own out-of-memory error is a RuntimeError
            if not out_of_memory(error):
                raise
            raise InputError("too little memory for these prompts: lower --max-num-seqs") from None
        opened = self.opened + self.added
        return [(shortened, [Answer(opened + self.agent.decode(c), len(c.ids), len(ids), c.finished)
                             for c in group]) for (ids, shortened), group in zip(prompts, groups)]

    def _ask_server(self, asked: list, seeds: list[int], progress) -> list[tuple[Shortened, list[Answer]]]:
        """The same of the server, to which up to `concurrency` requests are sent at a time."""
        def one(job):
            messages, seed = job
            answer = self.client.answer(messages, temperature=self.temperature, seed=seed % 2**31,
                                        max_tokens=self.max_new_tokens)
            if progress:
                progress(1)
            return answer

        chats = [build_messages(*ask, self.prompt, self.passage_chars or None) for ask in asked]
        jobs = [(chat, seed + k) for chat, seed in zip(chats, seeds) for k in range(self.samples)]
        with ThreadPool(self.concurrency) as threads:  # its threads are daemons: Ctrl-C waits for no answer
            answers = iter(threads.map(one, jobs, 1))
        shortened = Shortened(False, 0, self.passage_chars or PROMPTS[self.prompt].passage_chars)
        return [(shortened, [*itertools.islice(answers, self.samples)]) for _ in asked]


# ------------------------------------------------------------------------------------------------------------
# A run on disk: OUTPUT is the TREC run, OUTPUT.jsonl has a row per query and a row per window. It can be
# resumed.

# Options that cannot change an answer. All others must be the same when a run is resumed.
FREE_TO_CHANGE = ("input", "output", "resume", "stats", "limit", "format", "explain", "tag", "concurrency",
                  "timeout", "device", "documents", "query")
CLOSING = ("ok", "repaired", "untagged", "truncated", "malformed", "empty", "error", "unchanged", "hit limit",
           "prompts shortened", "queries shortened", "passages", "passages shortened", "characters removed",
           "prompt tokens", "new tokens")


class RunOnDisk:
    """The files of a reranking: OUTPUT.jsonl grows with each query, OUTPUT is written at the end.

    `done` counts the finished queries, `counts` is for the closing line. InputError, before any work, where
    the files cannot be written or are another run's.
    """

    def __init__(self, settings: RerankSettings, lists: list[Candidates], input_hash: str):
        self.settings, self.trace = settings, Path(settings.output + ".jsonl")
        self.check_outputs(lists)
        self.run: dict[str, list[str]] = {}
        self.counts = Counter()
        self.reason = ""  # why the first window without an answer has none
        self.identity = {name: value for name, value in dataclasses.asdict(settings).items()
                         if name not in FREE_TO_CHANGE}
        self.identity["input"] = input_hash
        self.identity["server"] = "some address" if settings.server else ""  # the address may change
        self.kept = self.finished_lines(len(lists)) if settings.resume else []
        for line in self.kept:
            self.count(json.loads(line))

    def begin(self) -> None:
        """Begin to write, behind the lines of the run that is resumed."""
        with atomic_write(self.trace, "wb") as file:
            file.writelines(self.kept)
        self.file = open(self.trace, "a", encoding="utf-8", errors="replace", newline="\n")

    @property
    def done(self) -> int:
        return len(self.run)

    def check_outputs(self, lists: list[Candidates]) -> None:
        """InputError where writing would fail, or overwrite something that is needed."""
        settings, trace = self.settings, self.trace
        check_run(settings.output, {c.qid: c.docids for c in lists}, settings.tag)
        check_run(trace, {}, settings.tag)
        taken = {os.path.realpath(settings.input)}
        for name in filter(None, (settings.output, trace, settings.stats)):
            if os.path.realpath(name) in taken:
                raise InputError(f"{name}: would overwrite the input or another output")
            taken.add(os.path.realpath(name))
        there = trace.read_bytes().count(b'"texts": ') if trace.exists() and not settings.resume else 0
        if 0 < there < len(lists):
            raise InputError(f"{trace} holds {there} of the {len(lists)} queries: pass --resume to go on, "
                             "or remove it")

    def finished_lines(self, queries: int) -> list[bytes]:
        """The lines of OUTPUT.jsonl that a resumed run keeps. InputError where they are another run's.

        An incomplete line, or a window that got no answer, ends them. The rounding of a local model's answers
        depends on what shares their batch, so only whole batches are kept.
        """
        lines = self.trace.read_bytes().splitlines(True) if self.trace.exists() else []
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        whole, runs, row = [], [], {}  # the lines of each query, and the options it was ranked with
        try:
            for line in lines:
                row = json.loads(line)
                if "texts" in row:
                    whole.append([])
                    runs.append({**row["run"], "windows": row["windows"]})
                whole[-1].append(line)
                if row.get("status") == "error":
                    break
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"--resume: {self.trace} is not what rearank.py writes ({error!r})") from None
        if whole and (len(whole[-1]) <= runs[-1]["windows"] or row.get("status") == "error"):
            whole.pop()
        for run in runs:
            for name in sorted({**self.identity, **run}.keys() - {"windows"}):
                if run.get(name) != self.identity.get(name):
                    found = f"--{name.replace('_', '-')} {run.get(name)!r}"
                    raise InputError(f"--resume: {self.trace} was begun with "
                                     f"{'another input' if name == 'input' else found}")
        batch = 1 if self.settings.server else self.settings.max_num_seqs
        kept = len(whole) if len(whole) >= queries else len(whole) // batch * batch
        return [line for lines in whole[:kept] for line in lines]

    def add(self, c: Candidates, ranking: Reranking) -> None:
        """Write a query's rows."""
        for row in self.rows(c, ranking):
            self.count(row)
            self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.file.flush()

    def rows(self, c: Candidates, ranking: Reranking) -> Iterator[dict]:
        """The query with its texts and final order, then a row per window."""
        order = [c.docids[result.index] for result in ranking] + c.docids[len(ranking):]
        yield {"qid": c.qid, "query": c.query, "docids": c.docids, "texts": c.texts, "order": order,
               "windows": len(ranking.windows), "run": self.identity}
        for w in ranking.windows:
            lengths = [len(" ".join(c.texts[p].split())) for p in w.positions]
            removed = [n - w.shortened.passage_chars for n in lengths if n > w.shortened.passage_chars]
            yield {"qid": c.qid, "docids": [c.docids[p] for p in w.positions], "status": w.status,
                   "order": [c.docids[p] for p in w.order], "reasoning": w.reasoning, "response": w.response,
                   "tokens": w.tokens, "prompt_tokens": w.prompt_tokens, "finished": w.finished,
                   "error": w.error, "prompt_shortened": w.shortened.prompt_shortened,
                   "query_chars_removed": w.shortened.query_chars_removed,
                   "passages_shortened": len(removed), "chars_removed": sum(removed),
                   "samples": [{"response": text, "status": status, "order": [c.docids[p] for p in places]}
                               for text, status, places in w.samples]}

    def count(self, row: dict) -> None:
        """Count a row, of this run or of the part that it resumes."""
        if "texts" in row:
            self.run[row["qid"]] = row["order"]
            return
        self.counts.update({
            "calls": len(row["samples"]) or 1, "windows": 1, row["status"]: 1,
            "unchanged": int(row["order"] == row["docids"]), "hit limit": int(not row["finished"]),
            "prompts shortened": int(row["prompt_shortened"]),
            "queries shortened": int(row["query_chars_removed"] > 0), "passages": len(row["docids"]),
            "passages shortened": row["passages_shortened"], "characters removed": row["chars_removed"],
            "prompt tokens": row["prompt_tokens"], "new tokens": row["tokens"]})
        self.reason = self.reason or row["error"]

    def close(self, queries: int) -> None:
        """Write the TREC run of the queries that are finished, and report problems."""
        self.file.close()
        if self.run:
            write_run(self.settings.output, self.run, self.settings.tag)
        if self.done < queries:
            there = self.settings.output if self.run else "nothing"
            print(f"stopped early: {there} holds {self.done} of {queries} queries; --resume goes on",
                  file=sys.stderr)
        if self.counts["error"]:
            print(f"{self.counts['error']} windows without an answer, the first: {self.reason}; when the "
                  "cause is mended, --resume asks again", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------
# Command line


@dataclasses.dataclass
class Files:
    """What the command reads and writes."""

    input: str = setting("", "Candidates: rank_llm JSONL or JSON, RankGPT JSON, .gz of each.",
                         group="input and output")
    output: str = setting("", "The TREC run to write; the reasoning goes to OUTPUT.jsonl (see report.py).")
    query: str = setting("", "Instead of --input: rank the lines of DOCUMENTS for this query, print them.")
    documents: str = setting("", "With --query: a file with one passage per line; - is standard input.",
                             positional=True, nargs="?", metavar="DOCUMENTS")
    explain: bool = setting(False, "With --query: print what the reasoning says of each passage.")
    format: str = setting("text", "With --query: how the ranking is printed.", choices=("text", "json"))
    top_k: int = setting(100, "Rerank only the first so many candidates; the rest stay behind.", minimum=1)
    limit: int = setting(0, "Only the first so many queries; 0 is all.", minimum=0)
    resume: bool = setting(False, "Go on with an OUTPUT that was interrupted.")
    stats: str = setting("", "A file for the closing line's counts, as JSON.")
    tag: str = setting("rearank", "The run's name, the last column of the TREC run.")


@dataclasses.dataclass
class RerankSettings(Options, Files):
    """Settings of `python rearank.py`. (--help lists those of Files first.)"""


def make_reranker(settings: RerankSettings, agent: Agent | None = None) -> Reranker:
    """The reranker of these settings. InputError for options that do not fit together."""
    options = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Reranker)}
    try:
        return Reranker(**options | {"model": agent or settings.model})
    except ValueError as error:
        raise InputError(str(error)) from None


def rerank_file(settings: RerankSettings, agent: Agent | None = None) -> Counter:
    """Rerank a file of candidates into a run and a JSONL of windows. Returns the closing line's counts.

    Queries are reranked in batches. Finished batches survive an interruption, and --resume goes on.
    """
    started, k = time.time(), settings.top_k
    lists = read_candidates(settings.input)
    content = json.dumps([dataclasses.astuple(c) for c in lists]).encode()
    lists = lists[:settings.limit or None]
    run = RunOnDisk(settings, lists, hashlib.sha256(content).hexdigest()[:16])
    reranker = make_reranker(settings, agent)
    run.begin()
    batch_size = settings.concurrency if settings.server else settings.max_num_seqs
    windows = sum(len(window_bounds(min(len(c.docids), k), settings.window, settings.stride)) for c in lists)
    try:
        with tqdm(total=windows * settings.samples, initial=run.counts["calls"], unit="answer") as bar:
            for first in range(run.done, len(lists), batch_size):
                batch = lists[first:first + batch_size]
                rankings = reranker.rank_many([(c.query, c.texts[:k]) for c in batch], bar.update)
                for c, ranking in zip(batch, rankings):
                    run.add(c, ranking)
    finally:
        run.close(len(lists))
    run.counts.update(queries=run.done, seconds=round(time.time() - started))
    return run.counts


def rank_lines(settings: RerankSettings) -> int:
    """Rank the lines of a file for --query and print them. Returns the exit status."""
    lines = re.split(r"\r\n|\r|\n", read_text(settings.documents))  # as editors count lines: no form feeds
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    numbers, lines = [n for n, _ in numbered], [line for _, line in numbered]
    ranking = make_reranker(settings).rank(settings.query, lines[:settings.top_k])
    order = [r.index for r in ranking] + [*range(len(ranking), len(lines))]
    rows = [{"rank": rank, "line": numbers[i], "text": lines[i]} for rank, i in enumerate(order, 1)]
    if settings.explain:
        for row, i in zip(rows, order):
            said = [text.strip() for w in ranking.windows if i in w.positions
                    for text, named in sentences(w.reasoning) if w.positions.index(i) + 1 in named]
            row["reasoning"] = " ".join(said)
    if settings.format == "json":
        print(json.dumps(rows, ensure_ascii=False, indent=1))
    else:
        for row in rows:
            reasoning = f"\n     {row['reasoning']}" if row.get("reasoning") else ""
            print(f"{row['rank']:3}. [{row['line']}] {row['text']}{reasoning}")
    for w in ranking.windows:
        if w.status != "ok":
            print(f"answer {w.status}: {w.error or w.response!r:.200}", file=sys.stderr)
    return int(any(w.status == "error" for w in ranking.windows))


def check_options(settings: RerankSettings) -> None:
    """InputError for what is missing, or has no effect in the chosen mode."""
    needs = [(settings.model or settings.server, "--model (or --server)")]
    if settings.query or settings.documents:
        needs += [(settings.query, "--query"), (settings.documents, "DOCUMENTS")]
        refuse(settings, "input output resume stats tag limit".split(), "has no effect with --query")
    else:
        needs += [(settings.input, "--input (or --query)"), (settings.output, "--output")]
        refuse(settings, ["explain", "format"], "has no effect without --query")
    if settings.server:
        refuse(settings, ["device", "dtype", "max_num_seqs", "max_prompt_tokens"],
               "has no effect with --server")
    else:
        refuse(settings, ["concurrency", "timeout"], "has no effect without --server")
    if missing := [name for given, name in needs if not given]:
        raise InputError(f"expected {' and '.join(missing)}; --help lists all options")
    if os.path.isdir(settings.stats):
        raise InputError(f"--stats {settings.stats}: is a folder; expected the name of a file to write")


def main(argv: list[str] | None = None) -> int:
    """Rerank as the command line says. Status 1 where a window had no answer."""
    settings = command_line(RerankSettings, argv, "\n\n".join(__doc__.split("\n\n")[:2]))
    check_options(settings)
    if settings.query:
        return rank_lines(settings)
    counts = rerank_file(settings)
    print(f"{counts['queries']} queries, {counts['calls']} calls in {counts['seconds']} s:",
          ", ".join(f"{counts[name]:,} {name}" for name in CLOSING))
    print(f"{settings.output} is the run, {settings.output}.jsonl the reasoning (report.py shows it)")
    if not counts["ok"] + counts["repaired"] + counts["untagged"]:
        print(f"no answer held an order: was the model trained with --prompt {settings.prompt}? For other "
              "models, try --prompt rankgpt", file=sys.stderr)
    if settings.stats:
        with atomic_write(settings.stats) as file:
            json.dump(dict.fromkeys(CLOSING, 0) | counts, file, indent=1)
    return int(counts["error"] > 0)


if __name__ == "__main__":
    run_main(main)
