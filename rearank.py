"""REARANK, the agent: a language model that reads a window of passages, thinks, and answers a better order.

    python rearank.py --model le723z/Rearank-7B --input candidates.jsonl --output reranked.trec
    python rearank.py --model MODEL --query "how long do fleas live" documents.txt --explain
    python rearank.py --server http://host:8000/v1 --input candidates.jsonl --output reranked.trec
    python rearank.py --model MODEL --serve 8000

From top to bottom: the sliding window; `Reranker`; the command line.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.pool import ThreadPool

from tqdm import tqdm

from model import Agent, Completion, load_agent, sample
from prompts import (Shortened, answer_start, build_messages,
                     encode_prompt,  # for `from rearank import encode_prompt`
                     fit_context, fit_prompt, load_prompt)
from reward import parse_ranking, sentences
from support.chat_replies import Answer
from support.cli import InputError, command_line, refuse, run_main, setting
from support.device import has_native_bfloat16, memory_advice, pick_device
from support.files import read_candidates
from support.fusion import fuse, pairs_won
from support.openai_client import Server
from support.rerank_run import CLOSING, RunOnDisk
from support.rerank_server import serve
from support.rounds import Rounds, one_by_one, run_rounds
from support.streams import atomic_write, read_text

# ------------------------------------------------------------------------------------------------------------
# Which windows of a list are ranked. A generator of rounds (support/rounds.py) yields the windows of one
# round, which do not depend on each other, is sent their orders, and returns the whole new list.


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
    return one_by_one(sliding_rounds(items, window, stride), rank_window)


def sliding_rounds(items: list, window: int, stride: int, passes: int = 1) -> Rounds:
    """The windows of `sliding_window`, one per round. `passes`: so many slides over the list (figure 7)."""
    items = list(items)
    for start, end in window_bounds(len(items), window, stride) * passes:
        present = items[start:end]
        [order] = yield [present]
        items[start:end] = [present[i] for i in order]
    return items


def top_down(items: list, rank_window: Callable[[list], list[int]], window: int = 20) -> list:
    """Rerank a list by comparing it with a pivot from its top (arXiv 2405.14589). As `sliding_window`.

    For those who want the first k = min(10, window // 2) alone: a perfect ranker puts them right. ValueError
    unless window >= 2 and each order is a permutation.
    """
    return one_by_one(top_down_rounds(items, window), rank_window)


def top_down_rounds(items: list, window: int) -> Rounds:
    """The windows of `top_down`: the first one, then all others beside its k-th item, the pivot.

    In each of these the pivot stands first, and what is ranked above it becomes a candidate. If there are new
    candidates, the same again on all of them.
    """
    if window < 2:
        raise ValueError(f"window {window}: expected at least 2")
    items, behind, k = list(items), [], min(10, window // 2)
    while len(items) > 1:
        first, rest = items[:window], items[window:]
        [order] = yield [first]
        first = [first[i] for i in order]
        if not rest:
            return first + behind
        pivot, parts = first[k - 1], []
        for start in range(0, len(rest), window - 1):
            parts.append([pivot, *rest[start:start + window - 1]])
        above, below = [], []
        orders = yield parts
        for part, order in zip(parts, orders):
            place = order.index(0)  # the pivot's
            above += [part[i] for i in order[:place]]
            below += [part[i] for i in order[place + 1:]]
        items, behind = first[:k] + above, first[k:] + below + behind
        if not above:
            break
    return items + behind

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
    part: int = 0  # the window's number within its round
    samples: list[tuple[str, str, list[int]]] = dataclasses.field(default_factory=list)  # of several answers
    # Only with shuffle: the positions as each answer read them; the share of its pairs that each position of
    # `order` won. Shares of different windows do not compare.
    shown: list[list[int]] = dataclasses.field(default_factory=list)
    shares: list[float] = dataclasses.field(default_factory=list)

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


@dataclasses.dataclass
class Options:
    """The options of a reranker, in Python and on the command line."""

    model: str | Agent = setting("", "A model folder, a name on the hub, e.g. le723z/Rearank-7B, or on the "
                                 "server.", group="model")
    prompt: str = setting("rearank", "The prompt the model was trained with: rearank, toy, rankgpt "
                          "(zero-shot) or a template of rank_llm, FILE.yaml.")
    window: int = setting(20, "Passages in a window.", minimum=2, group="windows and answers")
    stride: int = setting(10, "Ranks by which the window slides.", minimum=1)
    passes: int = setting(1, "How many times the window slides over the list.", minimum=1)
    algorithm: str = setting("sliding", "top-down: fewer rounds, for the first ten ranks.",
                             choices=("sliding", "top-down"))
    think: bool = setting(True, "Let the model reason; --no-think fills in an empty think block.")
    temperature: float = setting(0.0, "Sampling temperature; 0 is greedy.", minimum=0)
    samples: int = setting(1, "Answers per window, fused by reciprocal ranks.", minimum=1)
    shuffle: bool = setting(False, "Each of --samples reads another order of the window; pairs won decide.")
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
        load_prompt(self.prompt)  # faults in it are found before anything is loaded
        if self.algorithm not in ("sliding", "top-down") or self.passes < 1:
            raise ValueError(f"expected sliding or top-down, and 1 pass or more; found {self.algorithm}")
        if self.algorithm == "top-down" and self.passes > 1:
            raise ValueError("passes belong to the sliding window, not to top-down")
        if self.algorithm == "sliding":
            window_bounds(0, self.window, self.stride)
        if self.samples < 1 or self.samples > 1 and not self.temperature and not self.shuffle:
            raise ValueError(f"samples {self.samples}: expected 1, or several at a temperature above 0 or "
                             "with shuffle; else all answers are the same")
        if self.shuffle and self.samples == 1:
            raise ValueError("shuffle: expected samples of 2 or more")
        self.opened = self.added = ""
        if self.server:
            if not self.think:
                raise ValueError("--no-think (think=False): a server's answers cannot be made to begin with "
                                 "an empty think block")
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
        windows: list[list[Window]] = [[] for _ in lists]

        def rank_windows(turn: int, asked: list) -> list[list[int]]:
            answered = self._answer(lists, asked, turn, progress)
            for (i, *_), window in zip(asked, answered):
                windows[i].append(window)
            return [[w.positions.index(p) for p in w.order] for w in answered]

        rounds = []
        for _, texts in lists:
            positions = list(range(len(texts)))
            rounds.append(top_down_rounds(positions, self.window) if self.algorithm == "top-down" else
                          sliding_rounds(positions, self.window, self.stride, self.passes))
        return [Reranking((Result(i, rank, texts[i]) for rank, i in enumerate(order, 1)), of_list)
                for (_, texts), order, of_list in zip(lists, run_rounds(rounds, rank_windows), windows)]

    def _answer(self, lists: list, asked: list[tuple[int, int, list[int]]], turn: int,
                progress) -> list[Window]:
        """Let the model answer the windows of one round: (list, number within the round, positions)."""
        shown, prompts, seeds = [], [], []
        for i, part, positions in asked:
            query, texts = lists[i]
            key = f"{self.seed}\t{query}\t{turn}" + (f"\t{part}" if part else "")
            seed = int.from_bytes(hashlib.sha256(key.encode("utf-8", "replace")).digest()[:6], "big")
            orders = [positions]
            if self.shuffle:  # a prompt per answer, the first in the present order
                orders += [random.Random(f"{seed} {k}").sample(positions, len(positions))
                           for k in range(1, self.samples)]
            shown.append(orders)
            prompts += [(query, [texts[p] for p in order]) for order in orders]
            seeds += [seed + k for k in range(len(orders))]
        ask = self._ask_server if self.server else self._ask_model
        replies = iter(ask(prompts, seeds, 1 if self.shuffle else self.samples, progress))
        windows = []
        for (_, part, positions), orders in zip(asked, shown):
            shortened, answers = zip(*itertools.islice(replies, len(orders)))
            windows.append(self._read(positions, part, shortened[0], sum(answers, []), orders))
        return windows

    def _read(self, positions: list[int], part: int, shortened: Shortened, answers: list[Answer],
              shown: list[list[int]]) -> Window:
        """Read the answers to one window. `shown`: its positions in the order that each answer read, or one
        order that all read.

        An answer votes if it named an order. Without votes the window keeps its order.
        """
        votes, samples = [], []
        for answer, read in zip(answers, shown if self.shuffle else shown * len(answers)):
            ranking = parse_ranking(answer.text, len(positions))
            order = [read[i] for i in ranking.order]
            status = "error" if answer.error else ranking.status
            order_begun = status == "truncated" and "<answer>" in answer.text
            if status in ("ok", "repaired", "untagged") or order_begun:
                votes.append(([positions.index(p) for p in order], ranking.named))
            samples.append((answer.text, status, order))
        if self.shuffle and votes:
            won = pairs_won(votes, len(positions))
            best = sorted(range(len(positions)), key=lambda i: -won[i])  # ties keep their order
        else:
            won, best = [], fuse([order for order, _ in votes], len(positions))
        statuses = [status for _, status, _ in samples]
        return Window(
            positions=positions, response=answers[0].text, shortened=shortened, part=part,
            order=[positions[i] for i in best], shares=[won[i] for i in best] if won else [],
            status=next((status for status in statuses if status != "ok"), "ok"),
            error=next((answer.error for answer in answers if answer.error), ""),
            tokens=sum(answer.tokens for answer in answers),
            prompt_tokens=sum(answer.prompt_tokens for answer in answers[:len(shown)]),
            finished=all(answer.finished for answer in answers), samples=samples if len(samples) > 1 else [],
            shown=shown if self.shuffle else [])

    def _ask_model(self, asked: list, seeds: list[int], samples: int,
                   progress) -> list[tuple[Shortened, list[Answer]]]:
        """`samples` answers of the model here to each (query, passages), and how its prompt was shortened."""
        prompts = [fit_prompt(self.agent.tokenizer, query, passages, self.prompt, self.max_prompt_tokens,
                              self.added, self.passage_chars) for query, passages in asked]
        with memory_advice("for these prompts: lower --max-num-seqs"):
            groups: list[list[Completion]] = sample(
                self.agent.model, [ids for ids, _ in prompts], samples, self.max_new_tokens,
                self.temperature, self.agent.stop_ids, seeds, self.max_num_seqs, progress)
        opened = self.opened + self.added
        return [(shortened, [Answer(opened + self.agent.decode(c), len(c.ids), len(ids), c.finished)
                             for c in group]) for (ids, shortened), group in zip(prompts, groups)]

    def _ask_server(self, asked: list, seeds: list[int], samples: int,
                    progress) -> list[tuple[Shortened, list[Answer]]]:
        """The same of the server, to which up to `concurrency` requests are sent at a time."""
        def one(messages, seed):
            answer = self.client.answer(messages, temperature=self.temperature, seed=seed % 2**31,
                                        max_tokens=self.max_new_tokens)
            if progress:
                progress(1)
            return answer

        chats = [build_messages(*ask, self.prompt, self.passage_chars or None) for ask in asked]
        jobs = [(chat, seed + k) for chat, seed in zip(chats, seeds) for k in range(samples)]
        with ThreadPool(self.concurrency) as threads:  # its threads are daemons: Ctrl-C waits for no answer
            answers = iter(threads.starmap(one, jobs, 1))
        shortened = Shortened(False, 0, self.passage_chars or load_prompt(self.prompt).passage_chars)
        return [(shortened, [*itertools.islice(answers, samples)]) for _ in asked]


# ------------------------------------------------------------------------------------------------------------
# Command line


@dataclasses.dataclass
class Files:
    """What the command reads and writes."""

    input: str = setting("", "Candidates: JSONL or JSON of rank_llm, RankGPT or Rankify, .gz too.",
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

    serve: int | None = setting(None, "Instead: rerank what other programs send to /rerank at this port.",
                                type=int, minimum=0, group="for other programs")
    host: str = setting("127.0.0.1", "With --serve: the address to listen at.")


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
    calls = None  # not known beforehand for top-down
    if settings.algorithm == "sliding":
        slides = [window_bounds(min(len(c.docids), k), settings.window, settings.stride) for c in lists]
        calls = sum(map(len, slides)) * settings.passes * settings.samples
    try:
        with tqdm(total=calls, initial=run.counts["calls"], unit="answer") as bar:
            for first in range(len(run.orders), len(lists), batch_size):
                batch = lists[first:first + batch_size]
                rankings = reranker.rank_many([(c.query, c.texts[:k]) for c in batch], bar.update)
                for c, ranking in zip(batch, rankings):
                    run.add(c, ranking)
                if run.counts["error"] == run.counts["windows"] >= 8 and len(run.orders) < len(lists):
                    raise InputError("no window has got an answer so far; the other queries were not asked")
    finally:
        run.close(len(lists))
    run.counts.update(queries=len(run.orders), seconds=round(time.time() - started))
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
    load_prompt(settings.prompt)
    needs = [(settings.model or settings.server, "--model (or --server)")]
    files = "input output resume stats tag limit".split()
    if settings.serve is not None:
        refuse(settings, [*files, "query", "documents", "explain", "format", "top_k"],
               "has no effect with --serve")
    elif settings.query or settings.documents:
        needs += [(settings.query, "--query"), (settings.documents, "DOCUMENTS")]
        refuse(settings, files, "has no effect with --query")
    else:
        needs += [(settings.input, "--input (or --query)"), (settings.output, "--output")]
        refuse(settings, ["explain", "format"], "has no effect without --query")
    if settings.server:
        refuse(settings, ["device", "dtype", "max_num_seqs", "max_prompt_tokens"],
               "has no effect with --server")
    else:
        refuse(settings, ["concurrency", "timeout"], "has no effect without --server")
    if settings.serve is None:
        refuse(settings, ["host"], "has no effect without --serve")
    if settings.samples == 1:
        refuse(settings, ["shuffle"], "has no effect without --samples 2 or more")
    if settings.algorithm == "top-down":
        refuse(settings, ["stride", "passes"], "has no effect with --algorithm top-down")
    elif settings.stride > settings.window and "stride" not in settings.given:
        raise InputError(f"--window {settings.window}: expected a --stride of at most that beside it; its "
                         f"default is {settings.stride}")
    if missing := [name for given, name in needs if not given]:
        raise InputError(f"expected {' and '.join(missing)}; --help lists all options")


def main(argv: list[str] | None = None) -> int:
    """Rerank as the command line says. Status 1 where a window had no answer."""
    settings = command_line(RerankSettings, argv, "\n\n".join(__doc__.split("\n\n")[:2]))
    check_options(settings)
    if settings.query:
        return rank_lines(settings)
    if settings.serve is not None:
        serve(make_reranker(settings).rank_many, settings.serve, settings.host, settings.model)
    counts = rerank_file(settings)
    print(f"{counts['queries']} queries, {counts['calls']} calls in {counts['rounds']} rounds, "
          f"{counts['seconds']} s:",
          ", ".join(f"{counts[name]:,} {name}" for name in CLOSING))
    print(f"{settings.output} is the run, {settings.output}.jsonl the reasoning (report.py shows it)")
    if not counts["ok"] + counts["repaired"] + counts["untagged"] and counts["windows"] > counts["error"]:
        print(f"no answer held an order: was the model trained with --prompt {settings.prompt}? For other "
              "models, try --prompt rankgpt", file=sys.stderr)
    if settings.stats:
        with atomic_write(settings.stats) as file:
            json.dump(dict.fromkeys(CLOSING, 0) | counts, file, indent=1)
    return int(counts["error"] > 0)


if __name__ == "__main__":
    run_main(main)
