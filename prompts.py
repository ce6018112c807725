"""From a query and passages to a chat, and from the chat to token ids.

    build_messages(query, passages)               the chat, as a list of {"role", "content"}
    encode_prompt(tokenizer, query, passages)     its token ids, by the tokenizer's own chat template

`prompt` is a built-in's name or a file in the format of rank_llm's templates. The built-in prompts are the
authors' to the letter (arXiv 2505.20046, their public code): the released weights expect exactly these
strings, blanks and line ends included. Queries and passages cannot inject chat markup or passage numbers:
such strings are escaped.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from typing import NamedTuple

from support.chat_replies import fold_system
from support.cli import InputError
from support.prompt_file import is_file, placeholders, read_prompt_file

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
    """A chat, by the field names of rank_llm's templates. Each passage gets the body's turns.

    They fill in {query} and {num}, the body {rank} and {candidate}. An assistant turn that is None does not
    exist: what the user says before and after it is one turn.
    """

    system_message: str = ""
    prefix_user: str = ""
    prefix_assistant: str | None = None
    body_user: str = "[{rank}] {candidate}"
    body_assistant: str | None = None
    suffix_user: str = ""
    passage_chars: int = 400


PROMPTS = {
    "rearank": Prompt(
        system_message="You are DeepRerank, an intelligent assistant that can rank passages based on their "
                       "relevancy to the search query. You first thinks about the reasoning process in the "
                       "mind and then provides the user with the answer.",
        prefix_user="I will provide you with passages, each indicated by number identifier []. "
                    "Rank the passages based on their relevance to the search query."
                    "Search Query: {query}. \n"
                    "Rank the {num} passages above based on their relevance to the search query."
                    + BEST_FIRST + FORMAT,
        prefix_assistant="Okay, please provide the passages.",
        body_assistant="Received passage [{rank}].",
        suffix_user='Please rank these passages according to their relevance to the search query: "{query}"'
                    + "".join("\n" + (" " * 12 + line if line else "") for line in STEPS)),
    "rankgpt": Prompt(
        system_message="You are RankGPT, an intelligent assistant that can rank passages based on their "
                       "relevancy to the query.",
        prefix_user="I will provide you with {num} passages, each indicated by number identifier []. \n"
                    "Rank the passages based on their relevance to query: {query}.",
        prefix_assistant="Okay, please provide the passages.",
        body_assistant="Received passage [{rank}].",
        suffix_user="Search Query: {query}. \n"
                    "Rank the {num} passages above based on their relevance to the search query. "
                    + BEST_FIRST + "The output format should be [] > [], e.g., [1] > [2]. "
                    "Only response the ranking results, do not say any word or explain.",
        passage_chars=300),
    # For the toy model of a hundred thousand parameters: only the query and the passages, each in a turn.
    "toy": Prompt(prefix_user="{query}", prefix_assistant="", body_assistant="", suffix_user="{query}"),
}


def load_prompt(prompt: str) -> Prompt:
    """The built-in prompt of this name, or the one in a file. InputError if it cannot be read.

    A file has one of rank_llm's templates (see support/prompt_file.py). It is read once per process.
    """
    if prompt in PROMPTS:
        return PROMPTS[prompt]
    try:
        if is_file(prompt):
            return Prompt(**read_prompt_file(prompt)[0])
        reason = "unknown prompt"
    except OSError as error:
        reason = error.strerror
    raise InputError(f"{reason} {str(prompt)!r}: expected {', '.join(PROMPTS)} or a template, FILE.yaml")


@functools.lru_cache(maxsize=8)
def added_ids(tokenizer) -> frozenset[int]:
    """The ids of special and added tokens, which no text from outside may produce."""
    return frozenset(tokenizer.get_added_vocab().values()) - {tokenizer.unk_token_id}


def as_content(text: str, tokenizer=None) -> str:
    """Escape a query or passage, so that it cannot inject passage numbers, answer tags or chat markup.

    `[12]` becomes `(12)`, and `</answer>` becomes `< /answer>`. What `tokenizer` would read as a special or
    added token gets a blank inside. Without a tokenizer (for a server), everything that looks like chat
    markup does, as `<|...|>`. Half a surrogate pair becomes "?". Other text stays exactly as it is.
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

    Passages have their white space collapsed and are shortened to `passage_chars` (default: the prompt's own,
    400 for rearank, 300 for rankgpt). They and the query go through `as_content`. Returns
    [{"role", "content"}, ...] for a chat template; empty turns are left out. InputError: see load_prompt.
    """
    form = load_prompt(prompt)
    limit = passage_chars or form.passage_chars
    whole = {"query": as_content(query, tokenizer), "num": len(passages)}
    turns = [("system", form.system_message, whole), ("user", form.prefix_user, whole),
             ("assistant", form.prefix_assistant, whole)]
    for rank, passage in enumerate(passages, 1):
        one = {"rank": rank, "candidate": as_content(" ".join(passage.split())[:limit], tokenizer)}
        turns += [("user", form.body_user, one), ("assistant", form.body_assistant, one)]
    turns.append(("user", form.suffix_user, whole))
    chat: list[dict] = []
    for role, text, fields in turns:
        if text is None:
            continue
        if not chat or chat[-1]["role"] != role:
            chat.append({"role": role, "content": ""})
        chat[-1]["content"] += text.format(**fields)  # braces in a query or a passage stay as they are
    return [turn for turn in chat if turn["content"]]


def render_chat(tokenizer, messages: list[dict]) -> str:
    """The chat as text, by the tokenizer's own template, up to where the model's answer begins.

    If a template refuses a system turn (Mistral's does), the system text begins the first user turn.
    InputError if the template refuses that too.
    """
    for turns in (messages, fold_system(messages)):
        try:
            return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template can raise anything
            reason = " ".join(str(error).split())
    raise InputError(f"the model's chat template cannot write this chat: {reason}")


def answer_start(tokenizer, think: bool = True) -> tuple[str, str]:
    """How a response begins: (what the template has opened of it, what we add to the prompt).

    Templates of reasoning models open <think> themselves. It belongs to the response, which could not earn
    format1 without it. With `think` False, an empty think block is added, or the open one is closed.
    """
    text = render_chat(tokenizer, [{"role": "user", "content": "x"}])
    opened = text[text.rindex("<think>"):] if text.rstrip().endswith("<think>") else ""
    return opened, "" if think else "</think>" if opened else "<think> </think>"


def encode_prompt(tokenizer, query: str, passages: list[str], prompt: str = "rearank", max_tokens: int = 4096,
                  start: str = "") -> list[int]:
    """Token ids of the prompt, followed by `start`, how the answer is to begin. See `fit_prompt`."""
    return fit_prompt(tokenizer, query, passages, prompt, max_tokens, start)[0]


class Shortened(NamedTuple):
    """How much of its contents a prompt shows."""

    prompt_shortened: bool  # whether more had to be taken away than usual, to fit
    query_chars_removed: int
    passage_chars: int  # a longer passage shows only so many characters


def fit_prompt(tokenizer, query: str, passages: list[str], prompt: str, max_tokens: int, start: str = "",
               passage_chars: int = 0) -> tuple[list[int], Shortened]:
    """(token ids of the prompt, how it was shortened).

    A prompt over `max_tokens` (some BRIGHT queries have thousands) is made to fit: first the query is
    shortened until all its places take half of the room, then the passages are, step by step. InputError if
    that is not enough.
    """
    form, short = load_prompt(prompt), query
    limit = passage_chars or form.passage_chars
    places = placeholders(form.prefix_user + (form.prefix_assistant or "") + form.suffix_user)
    room = max_tokens // (2 * places.count("{query}"))
    ids = tokenizer(as_content(query, tokenizer), add_special_tokens=False)["input_ids"]
    if len(ids) > room:
        short = tokenizer.decode(ids[:room])
    for asked, chars in ((query, limit), *((short, c) for c in (limit, 300, 200, 100, 50) if c <= limit)):
        text = render_chat(tokenizer, build_messages(asked, passages, prompt, chars, tokenizer))
        ids = tokenizer(text + start, add_special_tokens=False)["input_ids"]
        if len(ids) <= max_tokens:
            return ids, Shortened((asked, chars) != (query, limit), max(0, len(query) - len(asked)), chars)
    raise InputError(f"{len(passages)} passages do not fit into {max_tokens} tokens: use a smaller window")


def fit_context(config, max_prompt_tokens: int, max_new_tokens: int) -> tuple[int, int]:
    """(prompt tokens, new tokens), lowered where together they exceed the model's positions."""
    positions = getattr(config, "max_position_embeddings", None) or max_prompt_tokens + max_new_tokens
    new = min(max_new_tokens, positions // 2)
    if new < max_new_tokens:
        print(f"the model has {positions} positions: answers end at {new} tokens", file=sys.stderr)
    return min(max_prompt_tokens, positions - new), new


