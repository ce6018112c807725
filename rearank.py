"""REARANK, the agent: a language model that reads a window of passages, thinks, and answers a better order.

    python rearank.py --model le723z/Rearank-7B --input candidates.jsonl --output reranked.trec
    python rearank.py --model runs/toy/checkpoint --prompt toy --window 6 --step 3 --max-new-tokens 64 --input runs/toy/long.jsonl --output long.trec

From top to bottom: the prompts; attention over a shared prompt; sampling with a key-value cache; the sliding window;
`Reranker`, which joins them; the command line.

Where it departs from the paper (arXiv 2505.20046) and the authors' code:
- n = 100, window 20, step 10 makes 9 windows, not 10; lists of every length are ranked to their very head (`sliding_window`).
- The prompt is an explicit choice and never guessed from a model's name.
- Inference needs no vLLM: the sampler below encodes a prompt once, however many answers are drawn from it.

Letters in shape comments: R rows (answers being written), S prompts, G rows per prompt, P prompt tokens, T answer tokens,
V vocabulary, H query heads, K key-value heads, D size of a head.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from data import Candidates, InputError, command_line, read_candidates, run_main, setting, write_run
from reward import Ranking, parse_ranking

# ---------------------------------------------------------------------------------------------------------------------
# Prompts (PAPER.md section 2). The released weights expect exactly these strings, blanks and line ends included.

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
    """A chat: system, first user turn, one turn per passage, last user turn. {query} and {num} are filled in."""

    system: str
    first: str
    last: str
    passage_chars: int
    received: str = "Received passage [{i}]."
    opening: str = "Okay, please provide the passages."


PROMPTS = {
    "rearank": Prompt(
        system="You are DeepRerank, an intelligent assistant that can rank passages based on their relevancy to the search query. "
               "You first thinks about the reasoning process in the mind and then provides the user with the answer.",
        first="I will provide you with passages, each indicated by number identifier []. "
              "Rank the passages based on their relevance to the search query."
              "Search Query: {query}. \nRank the {num} passages above based on their relevance to the search query."
              + BEST_FIRST + FORMAT,
        last='Please rank these passages according to their relevance to the search query: "{query}"'
             + "".join("\n" + (" " * 12 + line if line else "") for line in STEPS),
        passage_chars=400),
    "rankgpt": Prompt(
        system="You are RankGPT, an intelligent assistant that can rank passages based on their relevancy to the query.",
        first="I will provide you with {num} passages, each indicated by number identifier []. \n"
              "Rank the passages based on their relevance to query: {query}.",
        last="Search Query: {query}. \nRank the {num} passages above based on their relevance to the search query. "
             + BEST_FIRST + "The output format should be [] > [], e.g., [1] > [2]. "
             "Only response the ranking results, do not say any word or explain.",
        passage_chars=300),
    # For toy models of a hundred thousand parameters: nothing but the query and the passages.
    "toy": Prompt(system="", first="{query}", last="{query}", passage_chars=400, received="", opening=""),
}


def build_messages(query: str, passages: list[str], prompt: str = "rearank", passage_chars: int | None = None) -> list[dict]:
    """The chat that asks for an order of `passages` (in their present order, numbered from 1).

    Passages have their white space collapsed and are cut to `passage_chars` (default: the prompt's own, 400 for rearank,
    300 for rankgpt). Returns [{"role", "content"}, ...] for a tokenizer's chat template; empty turns are left out.
    """
    if prompt not in PROMPTS:
        raise ValueError(f"unknown prompt {prompt!r}: expected one of {', '.join(PROMPTS)}")
    form, limit = PROMPTS[prompt], passage_chars or PROMPTS[prompt].passage_chars
    # str.replace and not str.format: a query may hold braces.
    fill = lambda text: text.replace("{num}", str(len(passages))).replace("{query}", query)  # noqa: E731
    turns = [("system", form.system), ("user", fill(form.first)), ("assistant", form.opening)]
    for i, passage in enumerate(passages, 1):
        turns.append(("user", f"[{i}] {' '.join(passage.split())[:limit]}"))
        turns.append(("assistant", form.received.replace("{i}", str(i))))
    turns.append(("user", fill(form.last)))
    return [{"role": role, "content": content} for role, content in turns if content]


def encode_prompt(tokenizer, query: str, passages: list[str], prompt: str = "rearank", max_tokens: int = 4096,
                  answer_start: str = "") -> list[int]:
    """Token ids of the whole prompt, ready for the model's answer (which begins with `answer_start`, if given).

    A prompt over `max_tokens` (some BRIGHT queries have thousands of tokens) is made to fit: first the query is cut to
    a quarter of the room, then the passages are cut shorter and shorter. InputError where even that is too long.
    """
    def encode(query: str, chars: int | None) -> list[int]:
        text = tokenizer.apply_chat_template(build_messages(query, passages, prompt, chars), tokenize=False,
                                             add_generation_prompt=True)
        return tokenizer(text + answer_start, add_special_tokens=False)["input_ids"]

    ids = encode(query, None)
    if len(ids) <= max_tokens:
        return ids
    query = tokenizer.decode(tokenizer(query, add_special_tokens=False)["input_ids"][:max_tokens // 4])
    for chars in (None, 300, 200, 100, 50):
        if len(ids := encode(query, chars)) <= max_tokens:
            return ids
    raise InputError(f"a prompt of {len(passages)} passages does not fit into {max_tokens} tokens: use a smaller window")


# ---------------------------------------------------------------------------------------------------------------------
# Attention over a shared prompt. All answers of a group read the same prompt, so its keys and values exist once: every
# call below is the model's own forward pass, with its attention replaced by one that knows where the prompt's keys are.


@contextlib.contextmanager
def shared_attention(model) -> Iterator[None]:
    """Within this block the model's attention is `memory.attend`, for the `memory` passed to each forward call.

    Backward passes of checkpointed layers run the forward again, so they belong inside the block too.
    """
    before = model.config._attn_implementation
    model.config._attn_implementation = "shared_prompt"
    try:
        yield
    finally:
        model.config._attn_implementation = before


def _shared_prompt_attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, scaling: float,
                             memory=None, **_) -> tuple[Tensor, None]:
    if memory is None:
        raise RuntimeError("this model drops forward arguments on their way to attention: it cannot share a prompt")
    out = memory.attend(module.layer_idx, query, key, value, scaling)  # [R, H, T, D]
    return out.transpose(1, 2).contiguous(), None


# No mask function is registered beside it, so transformers builds no mask: the memories below make their own.
ALL_ATTENTION_FUNCTIONS.register("shared_prompt", _shared_prompt_attention)


class PromptMemory:
    """Causal attention of S prompts over themselves; keeps each layer's keys and values [S, K, P, D]."""

    def __init__(self):
        self.keys, self.values = {}, {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self.keys[layer], self.values[layer] = key, value
        gqa = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=gqa)


@dataclasses.dataclass
class EncodedPrompts:
    """S prompts' keys and values, one tensor [S, K, P, D] a layer, right-padded to P; `lengths` [S] counts real tokens.

    `last_hidden` [S, hidden] is the final hidden state of each prompt's last token: what predicts the first answer token.
    """

    keys: list[Tensor]
    values: list[Tensor]
    lengths: Tensor
    last_hidden: Tensor

    def mask(self) -> Tensor:
        """[S, P], True at real tokens."""
        return torch.arange(self.keys[0].shape[2], device=self.lengths.device) < self.lengths[:, None]


def encode_prompts(model, prompts: Sequence[Sequence[int]], pad_to: int = 0) -> EncodedPrompts:
    """One forward pass over S prompts. Right padding is harmless: attention is causal, so no real token sees it."""
    device = model.get_input_embeddings().weight.device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    width = max(pad_to, *(len(p) for p in prompts))
    ids = torch.tensor([list(p) + [0] * (width - len(p)) for p in prompts], device=device)  # [S, P]
    memory = PromptMemory()
    positions = torch.arange(width, device=device)[None]
    hidden = model.base_model(input_ids=ids, position_ids=positions, use_cache=False, memory=memory).last_hidden_state
    layers = sorted(memory.keys)
    return EncodedPrompts([memory.keys[i] for i in layers], [memory.values[i] for i in layers], lengths,
                          hidden[torch.arange(len(prompts), device=device), lengths - 1])


class DecodeMemory:
    """Attention of R rows, one new token each, over their prompts (shared) and their own answers so far.

    The scores against the prompts are one matrix product a prompt, [G rows x D] @ [D x P], where a cache expanded to the
    group would read P keys R times over. `slots` [R] says where row r stands in that padded [S, G] arrangement.
    """

    def __init__(self, prompts: EncodedPrompts, owner: Tensor, capacity: int):
        self.prompts, self.owner, self.lengths = prompts, owner, torch.zeros_like(owner)  # [R], [R]
        like = prompts.keys[0]
        shape = (len(owner), like.shape[1], capacity, like.shape[3])  # [R, K, T, D]
        self.keys = [like.new_zeros(shape) for _ in prompts.keys]
        self.values = [like.new_zeros(shape) for _ in prompts.keys]
        self.arrange()

    def arrange(self) -> None:
        """Recompute what depends on which rows are present. Rows of a prompt stand together."""
        counts = torch.bincount(self.owner, minlength=len(self.prompts.lengths))
        self.per_prompt = int(counts.max())
        place = torch.arange(len(self.owner), device=self.owner.device) - (counts.cumsum(0) - counts)[self.owner]
        self.slots = self.owner * self.per_prompt + place
        self.full = bool((counts == self.per_prompt).all())  # then the slots are just 0..R-1: nothing to move
        mask = self.prompts.mask()
        self.prompt_bias = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -torch.inf)  # [S, P]

    def begin_step(self, width: int) -> None:
        """The coming token is written at each row's present length; its row sees its first `width` places at most."""
        self.width = width
        places = torch.arange(width, device=self.lengths.device)
        self.rows = torch.arange(len(self.owner), device=self.lengths.device)
        self.own_bias = torch.zeros(len(self.owner), width, device=self.lengths.device)
        self.own_bias.masked_fill_(places > self.lengths[:, None], -torch.inf)  # [R, T]

    def to_slots(self, x: Tensor) -> Tensor:
        """[R, K, n, e] -> [S, K, G * n, e], zeros in empty slots."""
        S, G = len(self.prompts.lengths), self.per_prompt
        if not self.full:
            x = x.new_zeros(S * G, *x.shape[1:]).index_copy(0, self.slots, x)
        return x.view(S, G, *x.shape[1:]).transpose(1, 2).reshape(S, x.shape[1], G * x.shape[2], x.shape[3])

    def to_rows(self, x: Tensor, n: int) -> Tensor:
        """[S, K, G * n, e] -> [R, K, n, e]: the inverse of `to_slots`."""
        S, K, _, e = x.shape
        x = x.view(S, K, self.per_prompt, n, e).transpose(1, 2).reshape(S * self.per_prompt, K, n, e)
        return x if self.full else x[self.slots]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        R, H, _, D = query.shape
        K, n = key.shape[1], H // key.shape[1]  # n query heads share one key-value head
        self.keys[layer][self.rows, :, self.lengths] = key[:, :, 0]
        self.values[layer][self.rows, :, self.lengths] = value[:, :, 0]
        own_keys, own_values = self.keys[layer][:, :, :self.width], self.values[layer][:, :, :self.width]
        query = query.view(R, K, n, D)
        own = (query @ own_keys.transpose(-1, -2)).float() * scaling + self.own_bias[:, None, None]  # [R, K, n, T]
        shared = self.to_slots(query) @ self.prompts.keys[layer].transpose(-1, -2)  # [S, K, G * n, P]
        shared = self.to_rows(shared.float() * scaling + self.prompt_bias[:, None, None], n)  # [R, K, n, P]
        P = shared.shape[-1]
        weights = torch.cat([shared, own], -1).softmax(-1).to(value.dtype)  # one softmax over prompt and answer
        out = weights[..., P:] @ own_values
        out = out + self.to_rows(self.to_slots(weights[..., :P]) @ self.prompts.values[layer], n)
        return out.view(R, H, 1, D)

    def keep(self, rows: Tensor) -> None:
        """Only these rows go on. Prompts that no row reads any more are let go."""
        used, self.owner = self.owner[rows].unique(return_inverse=True)
        if len(used) < len(self.prompts.lengths):
            self.prompts = EncodedPrompts([k[used] for k in self.prompts.keys], [v[used] for v in self.prompts.values],
                                          self.prompts.lengths[used], self.prompts.last_hidden[used])
        self.lengths = self.lengths[rows]
        for cache in (self.keys, self.values):
            for layer in range(len(cache)):  # one at a time: both caches twice would be a great deal of memory
                cache[layer] = cache[layer][rows]
        self.arrange()

    def join(self, other: DecodeMemory) -> None:
        """Take in the prompts and rows of `other`, behind our own."""
        a, b = self.prompts, other.prompts
        both = lambda x, y: [torch.cat(pair) for pair in zip(x, y)]  # noqa: E731
        self.owner = torch.cat([self.owner, other.owner + len(a.lengths)])
        self.prompts = EncodedPrompts(both(a.keys, b.keys), both(a.values, b.values), torch.cat([a.lengths, b.lengths]),
                                      torch.cat([a.last_hidden, b.last_hidden]))
        self.lengths = torch.cat([self.lengths, other.lengths])
        self.keys, self.values = both(self.keys, other.keys), both(self.values, other.values)
        self.arrange()

    def grow(self, capacity: int) -> None:
        """Room for `capacity` answer tokens a row."""
        for cache in (self.keys, self.values):
            for layer, x in enumerate(cache):
                cache[layer] = F.pad(x, (0, 0, 0, capacity - x.shape[2]))


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


@dataclasses.dataclass
class Completion:
    """One sampled answer: its token ids as drawn (the end token included), and whether it ended by itself."""

    ids: list[int]
    finished: bool


def pick_tokens(logits: Tensor, temperature: float, uniforms: Tensor) -> Tensor:
    """The next token of each row, [R]: the most likely at temperature 0, else the inverse of the distribution function.

    logits [R, V]; uniforms [R] in [0, 1). One number a token makes a row's draw independent of who shares its batch.
    """
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = (logits.float() / temperature).softmax(-1).cumsum(-1)  # [R, V]
    target = uniforms[:, None] * cumulative[:, -1:]  # not 1 exactly, because of rounding
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)


@torch.no_grad()
def sample(model, prompts: Sequence[Sequence[int]], group: int = 1, max_new_tokens: int = 2048, temperature: float = 1.0,
           stop_ids: Sequence[int] = (), seed: int = 0, max_rows: int = 128, progress: Callable[[int], None] | None = None,
           ) -> list[list[Completion]]:
    """Draw `group` answers to each prompt. Returns one list of completions per prompt, in the prompts' order.

    Each prompt is encoded once for its whole group. Rows that have ended leave the batch and the rows of the next
    prompts take their places, so that about `max_rows` answers are written at any time. The same seed gives the same
    tokens whatever `max_rows` is (up to rounding). `progress` is called with the number of answers just ended.
    """
    device, total = model.get_input_embeddings().weight.device, len(prompts) * group
    uniforms = torch.rand(total, max_new_tokens if temperature else 1, generator=torch.Generator().manual_seed(seed))
    written: list[list[int]] = [[] for _ in range(total)]  # answer r belongs to prompt r // group
    finished = [False] * total
    stop, longest = set(stop_ids), max(map(len, prompts), default=0)

    def choose(logits: Tensor, rows: list[int]) -> Tensor:
        """Draw and record one token for each row, [R, V] -> [R]."""
        steps = torch.tensor([len(written[r]) if temperature else 0 for r in rows])
        drawn = pick_tokens(logits, temperature, uniforms[torch.tensor(rows), steps].to(device))
        for r, token in zip(rows, drawn.tolist()):
            written[r].append(token)
            finished[r] = token in stop
        return drawn

    admitted, memory, rows, tokens = 0, None, [], torch.empty(0, dtype=torch.long, device=device)
    with shared_attention(model):
        while admitted < len(prompts) or rows:
            if admitted < len(prompts) and (not rows or len(rows) + group <= max_rows):
                count = max(1, min((max_rows - len(rows)) // group, 16384 // longest, len(prompts) - admitted))
                encoded = encode_prompts(model, prompts[admitted:admitted + count], pad_to=longest)
                new = list(range(admitted * group, (admitted + count) * group))
                owner = torch.arange(count, device=device).repeat_interleave(group)
                fresh = DecodeMemory(encoded, owner, capacity=memory.keys[0].shape[2] if memory else 64)
                if memory:
                    memory.join(fresh)
                else:
                    memory = fresh
                tokens = torch.cat([tokens, choose(model.lm_head(encoded.last_hidden)[owner], new)])
                rows, admitted = rows + new, admitted + count
            alive = [i for i, r in enumerate(rows) if not finished[r] and len(written[r]) < max_new_tokens]
            if len(alive) == len(rows):
                tokens = choose(decode_step(model, memory, tokens), rows)
                continue
            if progress:
                progress(len(rows) - len(alive))
            rows, index = [rows[i] for i in alive], torch.tensor(alive, dtype=torch.long, device=device)
            tokens = tokens[index]
            if rows:
                memory.keep(index)
            else:
                memory = None
    return [[Completion(written[p * group + g], finished[p * group + g]) for g in range(group)] for p in range(len(prompts))]


def decode_step(model, memory: DecodeMemory, tokens: Tensor) -> Tensor:
    """Feed each row its newest token [R] and return the logits of the next, [R, V]."""
    width = int(memory.lengths.max()) + 1
    if width > memory.keys[0].shape[2]:
        memory.grow(2 * memory.keys[0].shape[2])
    memory.begin_step(width)
    positions = memory.prompts.lengths[memory.owner] + memory.lengths
    hidden = model.base_model(input_ids=tokens[:, None], position_ids=positions[:, None], use_cache=False,
                              memory=memory).last_hidden_state
    memory.lengths = memory.lengths + 1
    return model.lm_head(hidden[:, -1])


# ---------------------------------------------------------------------------------------------------------------------
# The model


@dataclasses.dataclass
class Agent:
    """A causal language model with its tokenizer and the ids that end an answer."""

    model: torch.nn.Module
    tokenizer: object
    stop_ids: list[int]

    def __post_init__(self):
        check_architecture(self.model.config)

    def decode(self, completion: Completion) -> str:
        """The text of an answer, without the end token."""
        ids = completion.ids[:-1] if completion.finished else completion.ids
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def check_architecture(config) -> None:
    """InputError unless every layer attends to everything before it: a sliding or recurrent layer cannot share a prompt so."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(config, "sliding_window", None):
        raise InputError(f"{config.model_type}: layers of kind {', '.join(sorted(kinds))} with a window of "
                         f"{getattr(config, 'sliding_window', None)}: only models with full attention throughout are supported")


def stop_ids(model, tokenizer) -> list[int]:
    """Every id that ends a turn: a base model's own end token is rarely the one its chat template writes."""
    ids = {tokenizer.eos_token_id}
    for own in (model.generation_config.eos_token_id, model.config.eos_token_id):
        ids |= set(own if isinstance(own, list) else [own])
    ids |= {tokenizer.get_vocab().get(mark) for mark in ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")}
    return sorted(i for i in ids if isinstance(i, int))


def pick_device(device: str = "auto") -> torch.device:
    """The named device, or the best there is: cuda, mps, cpu."""
    if device not in ("auto", "cpu", "cuda", "mps") or device == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {device}: not to be had here; expected auto, cpu, cuda or mps")
    if device != "auto":
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def load_agent(name: str, device: str = "auto", dtype: str = "auto") -> Agent:
    """Load a model and its tokenizer from a folder or the Hugging Face hub: float32 on a CPU, bfloat16 on an accelerator.

    InputError, in one sentence with what to do, where that fails: no such folder, no network, no chat template, no memory.
    """
    place = pick_device(device)
    kind = {"auto": torch.float32 if place.type == "cpu" else torch.bfloat16, "float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    if (name.startswith((".", "/", "~")) or Path(name).exists() or name.count("/") != 1) and not (Path(name) / "config.json").is_file():
        raise InputError(f"--model {name}: no such model folder (a folder with config.json, as save_pretrained writes it, or a hub name "
                         "like Qwen/Qwen2.5-7B)")
    try:
        config = AutoConfig.from_pretrained(name)
        check_architecture(config)
        tokenizer = load_tokenizer(name)
        if not tokenizer.chat_template:
            raise InputError(f"--model {name}: its tokenizer has no chat template; use the model's instruct variant, or put a "
                             "chat_template.jinja into its folder")
        check_memory(name, config, kind, place)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=kind, attn_implementation="sdpa").to(place)
    except InputError:
        raise
    except torch.OutOfMemoryError:
        raise InputError(f"--model {name}: too little memory on {place}; use a smaller model or --device cpu") from None
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"--model {name}: cannot be loaded ({reason}); without a network, pass a folder that holds the "
                         "model, downloaded elsewhere with `hf download`") from None
    check_shared_prompt(name, model.eval())
    return Agent(model, tokenizer, stop_ids(model, tokenizer))


@torch.no_grad()
def check_shared_prompt(name: str, model) -> None:
    """InputError unless prefill and one decoding step over a shared prompt give the model's own logits: some architectures scale or cap
    their logits behind the head, or keep attention to themselves, and would otherwise be wrong without a word."""
    ids = torch.arange(1, 9, device=model.device)[None]
    try:
        own = model(input_ids=ids).logits[0, -2:].float()
        with shared_attention(model):
            encoded = encode_prompts(model, ids[:, :-1].tolist())
            memory = DecodeMemory(encoded, torch.zeros(1, dtype=torch.long, device=model.device), capacity=4)
            ours = torch.cat([model.lm_head(encoded.last_hidden), decode_step(model, memory, ids[0, -1:])]).float()
        same = (ours - own).abs().max() <= (1e-3 if model.dtype == torch.float32 else 0.1) * own.abs().max().clamp(min=1)
    except (AttributeError, TypeError, RuntimeError) as error:
        raise InputError(f"--model {name}: {model.config.model_type} cannot share a prompt's keys and values ({str(error).splitlines()[0]}); "
                         "Qwen2, Qwen3, Llama and Mistral can") from None
    if not same:
        raise InputError(f"--model {name}: {model.config.model_type} does something to its logits or its attention that sharing a prompt "
                         "leaves out; Qwen2, Qwen3, Llama and Mistral can be used")


def load_tokenizer(name: str):
    """The tokenizer a checkpoint declares. AutoTokenizer alone would, for a Qwen2 model, put Qwen's own splitting rules in
    the place of any other tokenizer.json: a checkpoint of the toy run would then read every word as unknown."""
    generic = get_tokenizer_config(name).get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
    return (PreTrainedTokenizerFast if generic else AutoTokenizer).from_pretrained(name)


def check_memory(name: str, config, dtype: torch.dtype, device: torch.device) -> None:
    """InputError where the bare weights are larger than the memory there is."""
    with torch.device("meta"):
        weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()) * dtype.itemsize
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif Path("/proc/meminfo").exists():
        free = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    else:
        return
    if weights > free:
        raise InputError(f"--model {name}: its weights take {weights / 2**30:.1f} GiB and {device} has {free / 2**30:.1f} GiB free; "
                         "use a smaller model" + ("" if device.type == "cpu" else " or --device cpu"))


# ---------------------------------------------------------------------------------------------------------------------
# The sliding window


def sliding_windows(items: list, window: int = 20, step: int = 10) -> Generator[list, list[int], list]:
    """Yield each window's items, from the end of the list to its head; be sent its order; return the whole new list.

    A generator, so that one caller can have the windows of many lists answered together (`Reranker.rank_many`).
    """
    if not 0 < step <= window:
        raise ValueError(f"window {window}, step {step}: expected 0 < step <= window, else some items would never be read")
    items, end = list(items), len(items)
    while end > 0 and len(items) > 1:
        start = max(0, end - window)
        present = items[start:end]
        order = yield present
        if sorted(order) != list(range(len(present))):
            raise ValueError(f"the order of a window of {len(present)} must be a permutation of its positions, got {order}")
        items[start:end] = [present[i] for i in order]
        end = end - step if start else 0
    return items


def sliding_window(items: list, rank_window: Callable[[list], list[int]], window: int = 20, step: int = 10) -> list:
    """Rerank a list by windows that slide from its end to its head, so that the best items bubble up. Paper, section 3.1.

    `rank_window` gets a window's items in present order and returns their 0-based positions, best first. The last window
    begins at rank 0 for every length; a list no longer than `window` gets one; under two items none. Returns a new list.
    ValueError unless 0 < step <= window and each order is a permutation.
    """
    slides = sliding_windows(items, window, step)
    try:
        present = next(slides)
        while True:
            present = slides.send(rank_window(present))
    except StopIteration as done:
        return done.value


# ---------------------------------------------------------------------------------------------------------------------
# The reranker


@dataclasses.dataclass
class Window:
    """One call of the model: the window's positions in the input list, its answer, how the parser read it, the new order."""

    positions: list[int]
    response: str
    status: str
    order: list[int]  # positions in the input list, best first
    tokens: int
    prompt_tokens: int
    finished: bool

    @property
    def reasoning(self) -> str:
        """What stands between <think> and </think> (empty where there is none)."""
        _, _, rest = self.response.partition("<think>")
        return rest.partition("</think>")[0].strip()


@dataclasses.dataclass
class Result:
    """A document in its new place: `index` its position in the input (0-based), `rank` its new one (1-based)."""

    index: int
    rank: int
    text: str


class Reranking(list):
    """A list of `Result`, best first, with every window's reasoning and status beside it in `.windows`."""

    def __init__(self, results: list[Result], windows: list[Window]):
        super().__init__(results)
        self.windows = windows


class Reranker:
    """Rerank search results with a language model, listwise, by a sliding window.

        reranker = Reranker("le723z/Rearank-7B")
        for result in reranker.rank("how long do fleas live", documents): print(result.rank, result.index, result.text)

    model: a folder, a hub name, or an `Agent` already loaded. prompt: "rearank" (thinks, then answers) or "rankgpt" (zero-shot,
    no reasoning): the prompt the model was trained with. think=False fills in an empty think block, so the model answers at once.
    """

    def __init__(self, model: str | Agent, prompt: str = "rearank", window: int = 20, step: int = 10, think: bool = True,
                 temperature: float = 0.0, max_new_tokens: int = 2048, max_prompt_tokens: int = 4096, max_rows: int = 32,
                 seed: int = 0, device: str = "auto", dtype: str = "auto"):
        if prompt not in PROMPTS:
            raise ValueError(f"unknown prompt {prompt!r}: expected one of {', '.join(PROMPTS)}")
        if not 0 < step <= window:
            raise ValueError(f"window {window}, step {step}: expected 0 < step <= window")
        self.agent = load_agent(model, device, dtype) if isinstance(model, str) else model
        self.prompt, self.window, self.step, self.temperature, self.seed = prompt, window, step, temperature, seed
        self.max_new_tokens, self.max_prompt_tokens, self.max_rows = max_new_tokens, max_prompt_tokens, max_rows
        self.answer_start, self.calls = "" if think else "<think> </think>", 0

    def rank(self, query: str, documents: list[str], top_k: int | None = None) -> Reranking:
        """The documents in the model's order, the best `top_k` of them (default: all)."""
        ranking = next(self.rank_many([(query, documents)]))
        return Reranking(ranking[:top_k], ranking.windows)

    def rank_many(self, lists: Sequence[tuple[str, list[str]]], progress: Callable[[int], None] | None = None) -> Iterator[Reranking]:
        """Rerank many (query, documents) lists; windows of different queries share a batch. Yields in the lists' order.

        `progress` is called with the number of windows just answered.
        """
        slides = [sliding_windows(list(range(len(documents))), self.window, self.step) for _, documents in lists]
        done: list[list[int] | None] = [None] * len(lists)
        windows: list[list[Window]] = [[] for _ in lists]
        answers: dict[int, list[int] | None] = {i: None for i in range(len(lists))}  # what each list waits to be sent
        while True:
            asked = {}
            for i, order in answers.items():
                try:
                    asked[i] = slides[i].send(order)
                except StopIteration as end:
                    done[i] = end.value
            if not asked:
                break
            answers = {}
            for i, window in zip(asked, self._answer([(lists[i][0], lists[i][1], asked[i]) for i in asked], progress)):
                windows[i].append(window)
                place = {position: n for n, position in enumerate(window.positions)}
                answers[i] = [place[position] for position in window.order]
        for (_, documents), order, calls in zip(lists, done, windows):
            yield Reranking([Result(index, rank, documents[index]) for rank, index in enumerate(order, 1)], calls)

    def _answer(self, asked: list[tuple[str, list[str], list[int]]], progress) -> list[Window]:
        """One model call for each (query, documents, positions of its window)."""
        prompts = [encode_prompt(self.agent.tokenizer, query, [documents[p] for p in positions], self.prompt,
                                 self.max_prompt_tokens, self.answer_start) for query, documents, positions in asked]
        self.calls += 1  # so that no two calls draw the same random numbers
        completions = sample(self.agent.model, prompts, 1, self.max_new_tokens, self.temperature, self.agent.stop_ids,
                             self.seed * 1_000_003 + self.calls, self.max_rows, progress)
        windows = []
        for (_, _, positions), prompt, (completion,) in zip(asked, prompts, completions):
            response = self.answer_start + self.agent.decode(completion)
            ranking: Ranking = parse_ranking(response, len(positions))
            windows.append(Window(positions, response, ranking.status, [positions[i] for i in ranking.order],
                                  len(completion.ids), len(prompt), completion.finished))
        return windows


# ---------------------------------------------------------------------------------------------------------------------
# Command line


@dataclasses.dataclass
class Settings:
    """Settings of `python rearank.py`."""

    model: str = setting("", "A model folder or a name on the Hugging Face hub, e.g. le723z/Rearank-7B.", required=True)
    input: str = setting("", "Candidates: rank_llm JSONL or JSON, RankGPT hits JSON, .gz of each.", required=True)
    output: str = setting("", "The TREC run to write; each window's reasoning goes to OUTPUT.jsonl beside it.", required=True)
    prompt: str = setting("rearank", "The prompt the model was trained with (rankgpt: zero-shot, no reasoning).", choices=tuple(PROMPTS))
    think: bool = setting(True, "Let the model reason; --no-think fills in an empty think block.")
    window: int = setting(20, "Passages in a window.", least=2)
    step: int = setting(10, "Ranks the window slides by.", least=1)
    top_k: int = setting(100, "Rerank only this many candidates of each query; the rest keep their order behind them.", least=1)
    temperature: float = setting(0.0, "Sampling temperature; 0 is greedy.", least=0)
    max_new_tokens: int = setting(2048, "Longest answer.", least=1)
    max_prompt_tokens: int = setting(4096, "Longer prompts are made to fit: first the query is cut, then the passages.", least=1)
    max_rows: int = setting(32, "Windows (of different queries) answered at a time.", least=1)
    limit: int = setting(0, "Only the first so many queries; 0 is all.", least=0)
    seed: int = setting(0, "Seed of the sampling.")
    tag: str = setting("rearank", "The run's name, the last column of the TREC run.")
    device: str = setting("auto", "cuda, mps, cpu or auto.")
    dtype: str = setting("auto", "Precision of the weights; auto: float32 on a CPU, bfloat16 elsewhere.",
                         choices=("auto", "float32", "bfloat16"))


def rerank_file(settings: Settings, agent: Agent | None = None) -> Counter:
    """Rerank a file of candidates into a TREC run and a JSONL of windows; return the counts of the closing line.

    Queries are worked through in batches. What is finished when the program is interrupted is kept: the JSONL grows with
    each batch, and the run of the finished queries is written on the way out.
    """
    lists = read_candidates(settings.input)[:settings.limit or None]
    reranker = Reranker(agent or settings.model, settings.prompt, settings.window, settings.step, settings.think, settings.temperature,
                        settings.max_new_tokens, settings.max_prompt_tokens, settings.max_rows, settings.seed, settings.device,
                        settings.dtype)
    run: dict[str, list[str]] = {}
    counts: Counter = Counter()
    started, trace = time.time(), Path(settings.output + ".jsonl")
    trace.parent.mkdir(parents=True, exist_ok=True)
    total = sum(windows_of(min(len(c.docids), settings.top_k), settings.window, settings.step) for c in lists)
    try:
        with open(trace, "w", encoding="utf-8") as file, tqdm(total=total, unit="window", desc="rerank") as bar:
            for first in range(0, len(lists), settings.max_rows):
                batch = lists[first:first + settings.max_rows]
                rankings = reranker.rank_many([(c.query, c.texts[:settings.top_k]) for c in batch], bar.update)
                for candidates, ranking in zip(batch, rankings):
                    run[candidates.qid] = [candidates.docids[r.index] for r in ranking] + candidates.docids[settings.top_k:]
                    for window in ranking.windows:
                        counts.update({"calls": 1, window.status: 1, "cut at the limit": int(not window.finished),
                                       "prompt tokens": window.prompt_tokens, "new tokens": window.tokens})
                        file.write(json.dumps(trace_row(candidates, window), ensure_ascii=False) + "\n")
    finally:
        if run:
            write_run(settings.output, run, settings.tag)
        if len(run) < len(lists):
            print(f"stopped early: {settings.output} holds {len(run)} of {len(lists)} queries", file=sys.stderr)
    counts["queries"], counts["seconds"] = len(run), round(time.time() - started)
    return counts


def windows_of(n: int, window: int, step: int) -> int:
    """How many windows a list of n items takes."""
    return 0 if n < 2 else 1 + max(0, -(-(n - window) // step))


def trace_row(candidates: Candidates, window: Window) -> dict:
    """One line of the JSONL: a window's docids, the model's whole response, how it was read, the new order."""
    return {"qid": candidates.qid, "query": candidates.query, "docids": [candidates.docids[p] for p in window.positions],
            "status": window.status, "order": [candidates.docids[p] for p in window.order], "reasoning": window.reasoning,
            "response": window.response, "tokens": window.tokens, "finished": window.finished}


def main(argv: list[str] | None = None) -> int:
    """Rerank as the command line says."""
    settings = command_line(Settings, argv, __doc__.split("\n\n")[0])
    if not 0 < settings.step <= settings.window:
        raise InputError(f"--window {settings.window} --step {settings.step}: expected 0 < step <= window")
    counts = rerank_file(settings)
    statuses = ", ".join(f"{counts[s]} {s}" for s in ("ok", "repaired", "untagged", "truncated", "malformed", "empty"))
    print(f"{counts['queries']} queries, {counts['calls']} calls in {counts['seconds']} s: {statuses}; "
          f"{counts['cut at the limit']} cut at {settings.max_new_tokens} tokens; {counts['prompt tokens']:,} prompt tokens, "
          f"{counts['new tokens']:,} new tokens\n{settings.output} is the run, {settings.output}.jsonl the reasoning")
    return 0


if __name__ == "__main__":
    run_main(main)
