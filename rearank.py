"""REARANK, the agent: a language model that reads a window of passages, thinks, and answers a better order.

    python rearank.py --model le723z/Rearank-7B --input candidates.jsonl --output reranked.trec
    python rearank.py --model runs/toy/checkpoint --prompt toy --window 6 --step 3 --max-new-tokens 64 \\
        --input runs/toy/long.jsonl --output long.trec

From top to bottom: the prompts; the sliding window; `Reranker`; the command line.

Where it departs from the paper (arXiv 2505.20046) and the authors' code:
- n = 100, window 20, step 10 makes 9 windows, not 10; lists of every length are ranked to their very head.
- The prompt is an explicit choice and never guessed from a model's name.
- Inference needs no vLLM: model.py encodes a prompt once, however many answers are drawn from it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from data import (Candidates, InputError, check_run, command_line, read_candidates, run_main, setting,
                  write_run)
from model import Agent, Completion, has_native_bfloat16, load_agent, pick_device, sample
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


def build_messages(query: str, passages: list[str], prompt: str = "rearank",
                   passage_chars: int | None = None) -> list[dict]:
    """The chat that asks for an order of `passages` (in their present order, numbered from 1).

    Passages have their white space collapsed and are cut to `passage_chars` (default: the prompt's own, 400
    for rearank, 300 for rankgpt). Returns [{"role", "content"}, ...] for a chat template; empty turns are
    left out.
    """
    if prompt not in PROMPTS:
        raise ValueError(f"unknown prompt {prompt!r}: expected one of {', '.join(PROMPTS)}")
    form, limit = PROMPTS[prompt], passage_chars or PROMPTS[prompt].passage_chars
    # str.replace and not str.format: a query may hold braces.
    first, last = (text.replace("{num}", str(len(passages))).replace("{query}", query)
                   for text in (form.first, form.last))
    turns = [("system", form.system), ("user", first), ("assistant", form.opening)]
    for i, passage in enumerate(passages, 1):
        turns.append(("user", f"[{i}] {' '.join(passage.split())[:limit]}"))
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


def fit_prompt(tokenizer, query: str, passages: list[str], prompt: str, max_tokens: int,
               start: str = "") -> tuple[list[int], bool]:
    """(token ids of the prompt, whether it had to be cut).

    One over `max_tokens` (some BRIGHT queries have thousands) is made to fit: first the query is cut to a
    quarter of the room, then the passages shorter and shorter. InputError where even that is too long.
    """
    def encode(query: str, chars: int | None) -> list[int]:
        text = render_chat(tokenizer, build_messages(query, passages, prompt, chars))
        return tokenizer(text + start, add_special_tokens=False)["input_ids"]

    ids = encode(query, None)
    if len(ids) <= max_tokens:
        return ids, False
    query = tokenizer.decode(tokenizer(query, add_special_tokens=False)["input_ids"][:max_tokens // 4])
    for chars in (None, 300, 200, 100, 50):
        if len(ids := encode(query, chars)) <= max_tokens:
            return ids, True
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
# The reranker


@dataclasses.dataclass
class Window:
    """One call of the model: the window's positions in the input list, the answer, how it was read."""

    positions: list[int]
    response: str
    status: str
    order: list[int]  # positions in the input list, best first
    tokens: int
    prompt_tokens: int
    prompt_cut: bool  # whether query or passages had to be cut for the prompt to fit
    finished: bool

    @property
    def reasoning(self) -> str:
        """What stands between <think> and </think> (empty where there is none)."""
        _, _, rest = self.response.partition("<think>")
        return rest.partition("</think>")[0].strip()


@dataclasses.dataclass
class Result:
    """A document in its new place: `index` in the input (from 0), `rank` in the output (from 1)."""

    index: int
    rank: int
    text: str


class Reranking(list):
    """A list of `Result`, best first, with every window's reasoning and status beside it in `.windows`."""

    def __init__(self, results: list[Result], windows: list[Window]):
        super().__init__(results)
        self.windows = windows


@dataclasses.dataclass
class Reranker:
    """Rerank search results with a language model, listwise, by a sliding window.

        reranker = Reranker("le723z/Rearank-7B")
        for result in reranker.rank("how long do fleas live", documents):
            print(result.rank, result.index, result.text)

    model: a folder, a hub name, or an `Agent` already loaded. prompt: "rearank" (thinks, then answers) or
    "rankgpt" (zero-shot, no reasoning): the one the model was trained with. think=False fills in an empty
    think block, so that the model answers at once. ValueError for an unknown prompt or a step over the
    window; InputError from loading.
    """

    model: str | Agent
    prompt: str = "rearank"
    window: int = 20
    step: int = 10
    think: bool = True
    temperature: float = 0.0
    max_new_tokens: int = 2048
    max_prompt_tokens: int = 4096
    max_rows: int = 32
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self):
        build_messages("", [], self.prompt)  # raises for an unknown prompt, before anything is loaded
        window_bounds(0, self.window, self.step)
        if not isinstance(self.model, Agent):
            native = self.dtype == "auto" and pick_device(self.device).type == "cpu" and has_native_bfloat16()
            self.model = load_agent(self.model, self.device, "bfloat16" if native else self.dtype)
        self.agent, self.calls = self.model, 0
        self.opened, self.added = answer_start(self.agent.tokenizer, self.think)
        limits = fit_context(self.agent.model.config, self.max_prompt_tokens, self.max_new_tokens)
        self.max_prompt_tokens, self.max_new_tokens = limits

    def rank(self, query: str, documents: list[str], top_k: int | None = None) -> Reranking:
        """The documents in the model's order, the best `top_k` of them (default: all)."""
        [ranking] = self.rank_many([(query, documents)])
        return Reranking(ranking[:top_k], ranking.windows)

    def rank_many(self, lists: Sequence[tuple[str, list[str]]],
                  progress: Callable[[int], None] | None = None) -> list[Reranking]:
        """Rerank many (query, documents) lists; windows of different queries share a batch.

        `progress` is called with the number of windows just answered.
        """
        bounds = [window_bounds(len(documents), self.window, self.step) for _, documents in lists]
        orders = [list(range(len(documents))) for _, documents in lists]
        windows: list[list[Window]] = [[] for _ in lists]
        for turn in range(max(map(len, bounds), default=0)):
            asked = [i for i, slides in enumerate(bounds) if turn < len(slides)]
            positions = [orders[i][slice(*bounds[i][turn])] for i in asked]
            for i, window in zip(asked, self._answer([lists[i] for i in asked], positions, progress)):
                orders[i][slice(*bounds[i][turn])] = window.order
                windows[i].append(window)
        return [Reranking([Result(i, rank, documents[i]) for rank, i in enumerate(order, 1)], answered)
                for (_, documents), order, answered in zip(lists, orders, windows)]

    def _answer(self, lists: Sequence[tuple], positions: list[list[int]], progress) -> list[Window]:
        """One model call for each list's window, which holds the documents at these positions."""
        agent, prompts = self.agent, []
        for (query, documents), window in zip(lists, positions):
            passages = [documents[p] for p in window]
            prompts.append(fit_prompt(agent.tokenizer, query, passages, self.prompt, self.max_prompt_tokens,
                                      self.added))
        self.calls += 1
        seed = self.seed * 1_000_003 + self.calls  # no two calls draw the same random numbers
        answers: list[list[Completion]] = sample(
            agent.model, [ids for ids, _ in prompts], 1, self.max_new_tokens, self.temperature,
            agent.stop_ids, seed, self.max_rows, progress)
        windows = []
        for window, (ids, cut), [answer] in zip(positions, prompts, answers):
            response = self.opened + self.added + agent.decode(answer)
            ranking = parse_ranking(response, len(window))
            windows.append(Window(
                positions=window, response=response, status=ranking.status,
                order=[window[i] for i in ranking.order], tokens=len(answer.ids), prompt_tokens=len(ids),
                prompt_cut=cut, finished=answer.finished))
        return windows


# ------------------------------------------------------------------------------------------------------------
# Command line


@dataclasses.dataclass
class Settings:
    """Settings of `python rearank.py`."""

    model: str = setting("", "A model folder or a name on the hub, e.g. le723z/Rearank-7B.", required=True)
    input: str = setting("", "Candidates: rank_llm JSONL or JSON, RankGPT JSON, .gz of each.", required=True)
    output: str = setting("", "The TREC run to write; the reasoning goes to OUTPUT.jsonl.", required=True)
    prompt: str = setting("rearank", "The prompt the model was trained with (rankgpt: zero-shot).",
                          choices=tuple(PROMPTS))
    think: bool = setting(True, "Let the model reason; --no-think fills in an empty think block.")
    window: int = setting(20, "Passages in a window.", least=2)
    step: int = setting(10, "Ranks the window slides by.", least=1)
    top_k: int = setting(100, "Rerank only this many candidates of a query; the rest stay behind.", least=1)
    temperature: float = setting(0.0, "Sampling temperature; 0 is greedy.", least=0)
    max_new_tokens: int = setting(2048, "Longest answer.", least=1)
    max_prompt_tokens: int = setting(4096, "Longer prompts are cut: first the query, then passages.", least=1)
    max_rows: int = setting(32, "Windows (of different queries) answered at a time.", least=1)
    limit: int = setting(0, "Only the first so many queries; 0 is all.", least=0)
    seed: int = setting(0, "Seed of the sampling.")
    tag: str = setting("rearank", "The run's name, the last column of the TREC run.")
    device: str = setting("auto", "cuda, mps, cpu or auto.")
    dtype: str = setting("auto", "Precision; auto: bfloat16, but float32 on CPUs that lack bfloat16.",
                         choices=("auto", "float32", "bfloat16"))


def rerank_file(settings: Settings, agent: Agent | None = None) -> Counter:
    """Rerank a file of candidates into a TREC run and a JSONL of windows. Returns the closing line's counts.

    Queries are worked through in batches. What is finished when the program is interrupted is kept: the JSONL
    grows with each batch, and the run of the finished queries is written on the way out.
    """
    lists = read_candidates(settings.input)[:settings.limit or None]
    check_run(settings.output, {c.qid: c.docids for c in lists}, settings.tag)  # now, not after the work
    if Path(settings.input).resolve() in (Path(settings.output + end).resolve() for end in ("", ".jsonl")):
        raise InputError(f"--output {settings.output}: would overwrite the input; expected another name")
    options = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Reranker)}
    reranker = Reranker(**options | {"model": agent or settings.model})
    run: dict[str, list[str]] = {}
    counts, started, trace = Counter(), time.time(), Path(settings.output + ".jsonl")
    trace.parent.mkdir(parents=True, exist_ok=True)
    k, slide = settings.top_k, (settings.window, settings.step)
    total = sum(len(window_bounds(min(len(c.docids), k), *slide)) for c in lists)
    try:
        with open(trace, "w", encoding="utf-8") as file, tqdm(total=total, unit="window") as bar:
            for first in range(0, len(lists), settings.max_rows):
                batch = lists[first:first + settings.max_rows]
                rankings = reranker.rank_many([(c.query, c.texts[:k]) for c in batch], bar.update)
                for c, ranking in zip(batch, rankings):
                    run[c.qid] = [c.docids[r.index] for r in ranking] + c.docids[k:]
                    for window in ranking.windows:
                        file.write(json.dumps(trace_row(c, window), ensure_ascii=False) + "\n")
                        counts.update({"calls": 1, window.status: 1, "cut": int(not window.finished),
                                       "unchanged": int(window.order == window.positions),
                                       "prompts cut": int(window.prompt_cut),
                                       "prompt tokens": window.prompt_tokens, "new tokens": window.tokens})
    finally:
        if run:
            write_run(settings.output, run, settings.tag)
        if len(run) < len(lists):
            there = settings.output if run else "nothing"
            print(f"stopped early: {there} holds {len(run)} of {len(lists)} queries", file=sys.stderr)
    counts["queries"], counts["seconds"] = len(run), round(time.time() - started)
    return counts


def trace_row(candidates: Candidates, window: Window) -> dict:
    """One line of the JSONL: a window's docids, the model's response, how it was read, the new order."""
    docids = [candidates.docids[p] for p in window.positions]
    order = [candidates.docids[p] for p in window.order]
    return {"qid": candidates.qid, "query": candidates.query, "docids": docids, "status": window.status,
            "order": order, "reasoning": window.reasoning, "response": window.response,
            "tokens": window.tokens, "finished": window.finished, "prompt_cut": window.prompt_cut}


def main(argv: list[str] | None = None) -> int:
    """Rerank as the command line says."""
    settings = command_line(Settings, argv, __doc__.split("\n\n")[0])
    if settings.step > settings.window:
        raise InputError(f"--window {settings.window} --step {settings.step}: expected step <= window")
    counts = rerank_file(settings)
    kinds = ("ok", "repaired", "untagged", "truncated", "malformed", "empty")
    statuses = ", ".join(f"{counts[kind]} {kind}" for kind in kinds)
    print(f"{counts['queries']} queries, {counts['calls']} calls in {counts['seconds']} s: {statuses}; "
          f"{counts['unchanged']} changed nothing; {counts['cut']} cut at the limit, {counts['prompts cut']} "
          f"prompts cut to fit; {counts['prompt tokens']:,} prompt and {counts['new tokens']:,} new tokens\n"
          f"{settings.output} is the run, {settings.output}.jsonl the reasoning")
    return 0


if __name__ == "__main__":
    run_main(main)
