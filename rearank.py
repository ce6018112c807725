"""REARANK, the agent: a language model that reads a window of passages, thinks, and answers a better order.

    python rearank.py --model le723z/Rearank-7B --input candidates.jsonl --output reranked.trec
    python rearank.py --model runs/toy/checkpoint --prompt toy --window 6 --step 3 --max-new-tokens 64 \\
        --input runs/toy/long.jsonl --output long.trec

From top to bottom: the prompts; the forward pass; decoding over a shared prompt, and sampling; loading a model; the sliding
window; `Reranker`, which joins them; the command line.

Where it departs from the paper (arXiv 2505.20046) and the authors' code:
- n = 100, window 20, step 10 makes 9 windows, not 10; lists of every length are ranked to their very head (`sliding_window`).
- The prompt is an explicit choice and never guessed from a model's name.
- Inference needs no vLLM: the sampler below encodes a prompt once, however many answers are drawn from it.

Letters in shape comments: R rows (answers being written), S prompts, G rows per prompt, P prompt tokens, T answer tokens,
V vocabulary, H query heads, K key-value heads, D size of a head.
"""

from __future__ import annotations

import dataclasses
import functools
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
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from data import Candidates, InputError, check_run, command_line, read_candidates, run_main, setting, write_run
from reward import Ranking, parse_ranking

# ---------------------------------------------------------------------------------------------------------------------
# Prompts, the authors' to the letter. The released weights expect exactly these strings, blanks and line ends included.

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
# The forward pass, over the modules that transformers has loaded. It is written out because attention is the caller's: all
# answers of a group read one copy of their prompt's keys and values, wherever the caller keeps it.

# layer, query [B, H, T, D], key, value [B, K, T, D], scaling -> [B, H, T, D]
Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]


def forward(model, ids: Tensor, positions: Tensor, attend: Attend, only: Tensor | None = None, checkpointing: bool = False) -> Tensor:
    """Final hidden states [B, T, hidden] of tokens ids [B, T] at `positions` [B, T] or [1, T]: Qwen2, Qwen3, Llama, Mistral.

    With `only` [B], just those of one place in each row, [B, 1, hidden]: then the last layer computes nothing else but keys and values.
    `checkpointing`: keep each layer's input for the backward pass and compute the rest again there.
    """
    core = model.base_model
    x = core.embed_tokens(ids)
    cos, sin = core.rotary_emb(x, positions)
    half = sin.shape[-1] // 2
    rotary = cos[:, None], torch.cat([-sin[..., :half], sin[..., half:]], -1)[:, None]  # [B, 1, T, D]
    for i, layer in enumerate(core.layers):
        block = functools.partial(transformer_block, layer, rotary=rotary, attend=attend, only=only if i == len(core.layers) - 1 else None)
        x = checkpoint(block, x, use_reentrant=False) if checkpointing and torch.is_grad_enabled() else block(x)
    return rms_norm(core.norm, x)


def transformer_block(layer, x: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend, only: Tensor | None) -> Tensor:
    """One layer: attention and MLP, each added to x [B, T, hidden]."""
    own = layer.self_attn
    split = lambda y: y.unflatten(-1, (-1, own.head_dim)).transpose(1, 2)  # noqa: E731  [B, T, H * D] -> [B, H, T, D]
    normed = rms_norm(layer.input_layernorm, x)
    query, key, value = split(own.q_proj(normed)), split(own.k_proj(normed)), split(own.v_proj(normed))
    if hasattr(own, "q_norm"):  # Qwen3
        query, key = rms_norm(own.q_norm, query), rms_norm(own.k_norm, key)
    query, key = rotate(query, *rotary), rotate(key, *rotary)
    if only is not None:
        rows = torch.arange(len(x), device=x.device)
        x, query = x[rows, only][:, None], query[rows, :, only][:, :, None]
    x = x + own.o_proj(attend(own.layer_idx, query, key, value, own.scaling).transpose(1, 2).flatten(2))
    return x + layer.mlp(rms_norm(layer.post_attention_layernorm, x))


def rms_norm(module, x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps), times the module's weight, over the last dimension."""
    return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding: each pair (x[d], x[d + D/2]) turned by its position's angle. `sin` comes with its first half negated."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class PromptMemory:
    """Causal attention of S prompts over themselves; keeps each layer's keys and values [S, K, P, D]."""

    def __init__(self, lengths: Tensor):
        self.keys, self.values, self.lengths = {}, {}, lengths

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self.keys.setdefault(layer, key)  # the first: a checkpointed layer comes here again in the backward pass
        self.values.setdefault(layer, value)
        last = query.shape[2] < key.shape[2]  # one query a prompt, that of its last token: it sees the whole prompt and no padding
        mask = token_mask(self.lengths, key.shape[2])[:, None, None] if last else None
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=not last, scale=scaling,
                                              enable_gqa=query.shape[1] != key.shape[1])


def token_mask(lengths: Tensor, width: int) -> Tensor:
    """[B] -> [B, width], True at the first `lengths` places: from lengths, never from ids, since pad may equal the end token."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


@dataclasses.dataclass
class EncodedPrompts:
    """S prompts' keys and values, one tensor [S, K, P, D] a layer, right-padded to P; `lengths` [S] counts real tokens.

    `last_hidden` [S, hidden] is the final hidden state of each prompt's last token: what predicts the first answer token.
    """

    keys: list[Tensor]
    values: list[Tensor]
    lengths: Tensor
    last_hidden: Tensor


def encode_prompts(model, prompts: Sequence[Sequence[int]], checkpointing: bool = False) -> EncodedPrompts:
    """One forward pass over S prompts. Right padding is harmless: attention is causal, so no real token sees it."""
    device = model.get_input_embeddings().weight.device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    width = max(map(len, prompts))
    ids = torch.tensor([list(p) + [0] * (width - len(p)) for p in prompts], device=device)  # [S, P]
    memory = PromptMemory(lengths)
    hidden = forward(model, ids, torch.arange(width, device=device)[None], memory.attend, lengths - 1, checkpointing)
    layers = sorted(memory.keys)
    return EncodedPrompts([memory.keys[i] for i in layers], [memory.values[i] for i in layers], lengths, hidden[:, 0])


def attend_part(query: Tensor, keys: Tensor, values: Tensor, scaling: float, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention to one part of what a token may read, scores and softmax in float32.

    query [B, K, n, D]; keys, values [B, K, P, D]; bias, -inf at places out of sight, broadcasts to [B, K, n, P]. Returns the
    output [B, K, n, D] and the logarithm of the softmax's normaliser [B, K, n, 1], both float32.
    """
    if query.is_cuda and query.dtype != torch.float32:  # half factors, float32 products: large scores in bfloat16 are off by whole units
        scores = torch.bmm(query.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2), out_dtype=torch.float32).unflatten(0, query.shape[:2])
        scores *= scaling  # [B, K, n, P]
    else:
        scores = (query.float() * scaling) @ keys.float().transpose(-1, -2)
    if bias is not None:
        scores += bias
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    return (weights.to(values.dtype) @ values).float() / total, top + total.log()


def round_up(n: int, multiple: int) -> int:
    """The least multiple that is not below n."""
    return -(-n // multiple) * multiple


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def close_ranks(n: int, gone: Sequence[int]) -> tuple[list[int], list[int]]:
    """Of n in a row, some go and the last take their places: the places filled, and who moves to each."""
    left, stay = set(gone), n - len(gone)
    return [i for i in range(stay) if i in left], [i for i in range(stay, n) if i not in left]


def captured(advance: Callable[[], object], pool) -> Callable[[], None]:
    """`advance` as a CUDA graph: every kernel it launches, recorded once, launched again by one call on the same addresses."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        advance()
    return graph.replay


class Decoder:
    """R rows (answers being written) over the S prompts they share; `step` gives each row one token more.

    A row attends to its prompt and to its own answer apart, and the two are joined by their softmax normalisers. The
    prompt's part is one matrix product a prompt, [G rows x D] @ [D x P], where a cache expanded to the rows would be read R times.

    Keys, values and state live in buffers with room for more; who leaves is overwritten by who stands last. So nothing but
    a buffer that grows is copied whole, and a step finds everything at the addresses of the step before. That is what a CUDA
    graph needs: with `graphs`, shapes are rounded up to a few and each is captured once and then replayed, for at a few dozen
    rows a GPU would otherwise wait for Python. Rounding adds rows and places that nobody reads; it changes no token.
    """

    def __init__(self, model, max_rows: int, prompt_width: int, max_new_tokens: int, temperature: float = 1.0, graphs: bool = False):
        self.model, self.temperature, self.graphs = model, temperature, graphs
        self.prompt_width, self.answer_width = prompt_width, round_up(max_new_tokens, 256 if graphs else 1)
        self.device = model.get_input_embeddings().weight.device
        self.owner: list[int] = []  # [R], each row's prompt
        self.ages: list[int] = []  # [R], what `lengths` holds, known without asking the device
        self.prompts: list[int] = []  # [S], lengths of the prompts
        self.own: list[Tensor] = []  # a layer: keys and values of the answers, [2, room, K, T, D]
        self.shared: list[Tensor] = []  # a layer: keys and values of the prompts, [2, room, K, P, D]
        numbers = lambda n: torch.zeros(n, dtype=torch.long, device=self.device)  # noqa: E731
        room = round_up(max_rows, 16)
        self.tokens, self.lengths, self.starts = numbers(room), numbers(room), numbers(room)  # newest token; answer before it; prompt
        self.uniforms = torch.zeros(room, max_new_tokens if temperature else 1, device=self.device)  # random numbers, one a token
        self.prompt_lengths, self.slot_of, self.row_at = numbers(0), numbers(room), numbers(0)
        self.replays: dict[tuple, Callable[[], None] | None] = {}
        self.pool = None  # the memory that captured steps share

    # --- prompts and rows come and go

    def admit(self, prompts: Sequence[Sequence[int]], group: int, uniforms: Tensor) -> Tensor:
        """Encode prompts, begin `group` answers to each, with random numbers uniforms [S * G, T]. Returns their first tokens [S * G]."""
        encoded = encode_prompts(self.model, prompts)
        R, S, width = len(self.owner), len(self.prompts), encoded.keys[0].shape[2]
        owner = torch.arange(len(prompts), device=self.device).repeat_interleave(group)
        self.prompts += map(len, prompts)
        self.owner += (S + owner).tolist()
        self.ages += [0] * len(owner)
        self.make_room(encoded.keys[0], len(encoded.keys))
        for shared, keys, values in zip(self.shared, encoded.keys, encoded.values):
            shared[0, S:len(self.prompts), :, :width], shared[1, S:len(self.prompts), :, :width] = keys, values
        self.prompt_lengths[S:len(self.prompts)] = encoded.lengths
        new = slice(R, len(self.owner))
        self.uniforms[new], self.lengths[new], self.starts[new] = uniforms.to(self.device), 0, encoded.lengths[owner]
        self.tokens[new] = pick_tokens(self.model.lm_head(encoded.last_hidden)[owner], self.temperature, self.uniforms[new, 0])
        self.arrange()
        return self.tokens[new]

    def retire(self, rows: Sequence[int]) -> tuple[list[int], list[int]]:
        """These rows go, and with them the prompts that nobody reads any more. Returns `close_ranks` of the rows."""
        places, movers = close_ranks(len(self.owner), rows)
        if movers:
            to, who, width = torch.tensor(places, device=self.device), torch.tensor(movers, device=self.device), max(self.ages)
            for own in self.own:
                own[:, to, :, :width] = own[:, who, :, :width]
            for state in (self.tokens, self.lengths, self.starts, self.uniforms):
                state[to] = state[who]
        for state in (self.owner, self.ages):
            for place, mover in zip(places, movers):
                state[place] = state[mover]
            del state[len(state) - len(rows):]

        S, used = len(self.prompts), set(self.owner)
        places_of_prompts, moved = close_ranks(S, [p for p in range(S) if p not in used])
        for place, mover in zip(places_of_prompts, moved):
            for shared in self.shared:
                shared[:, place] = shared[:, mover]
            self.prompt_lengths[place], self.prompts[place] = self.prompt_lengths[mover], self.prompts[mover]
        del self.prompts[len(used):]
        renamed = dict(zip(moved, places_of_prompts))
        self.owner = [renamed.get(p, p) for p in self.owner]
        self.arrange()
        return places, movers

    def make_room(self, like: Tensor, layers: int) -> None:
        """Buffers large enough for the prompts there are."""
        K, D, room = like.shape[1], like.shape[3], power_of_two(len(self.prompts))
        if not self.own:
            width = min(256 if self.graphs else 64, self.answer_width)
            self.own = [like.new_zeros(2, len(self.tokens), K, width, D) for _ in range(layers)]
            self.shared = [like.new_zeros(2, 0, K, self.prompt_width, D) for _ in range(layers)]
        if room > len(self.prompt_lengths):
            for layer in range(layers):  # one at a time: all of them twice would be a great deal of memory
                self.shared[layer] = self.grown(self.shared[layer], 1, room)
            self.prompt_lengths = self.grown(self.prompt_lengths, 0, room)

    def grown(self, x: Tensor, dim: int, size: int) -> Tensor:
        """x with room for `size` in `dim`, filled with ones (a prompt of length 0 would make NaN). Its address is new: what was captured is
        void, and the memory of those graphs ends with them."""
        self.replays.clear()
        self.pool = torch.cuda.graph_pool_handle() if self.graphs and self.device.type == "cuda" else None
        return F.pad(x, [0, 0] * (x.dim() - 1 - dim) + [0, size - x.shape[dim]], value=1)

    def arrange(self) -> None:
        """Where each row stands when the rows meet their prompts as [S, G], and the sizes of the coming steps. G is the largest group still
        alive, so stragglers of other prompts cost empty slots."""
        R, S = len(self.owner), len(self.prompts)
        most = max(Counter(self.owner).values(), default=0)
        self.R, self.S, self.G, self.reach = R, S, most, max(self.prompts, default=0)
        if self.graphs:
            self.R, self.G, self.reach = round_up(R, 16), round_up(most, 8), min(round_up(self.reach, 256), self.prompt_width)
            self.S = min(round_up(S, 4), len(self.prompt_lengths))
        if S == 1:
            self.S, self.G = 1, self.R
        row_at, slot_of, taken = [0] * (self.S * self.G), [0] * self.R, Counter()
        for row, prompt in enumerate(self.owner if S != 1 else [0] * self.R):
            slot = prompt * self.G + taken[prompt]
            taken[prompt] += 1
            row_at[slot], slot_of[row] = row, slot
        self.in_order = row_at == list(range(self.R))  # then there is nothing to move
        if len(row_at) > len(self.row_at):
            self.row_at = self.grown(self.row_at, 0, power_of_two(len(row_at)))
        self.row_at[:len(row_at)] = torch.tensor(row_at, dtype=torch.long)
        self.slot_of[:self.R] = torch.tensor(slot_of, dtype=torch.long)
        self.lengths[R:] = 0  # rows nobody reads: never longer than the others

    # --- one step

    def step(self) -> Tensor:
        """One token more for each row: draws and returns them, [R]."""
        self.widen()
        shape = (self.R, self.S, self.G, self.reach, self.width, self.in_order)
        if not self.graphs or shape not in self.replays:
            self.replays[shape] = None  # a shape's first step is the warm-up that capturing asks for
            self.advance()
        else:
            self.replays[shape] = self.replays[shape] or captured(self.advance, self.pool)
            self.replays[shape]()
        self.ages = [age + 1 for age in self.ages]
        return self.tokens[:len(self.owner)]

    def widen(self) -> None:
        """Set how many places of the answers the coming step reads; it writes the last of them in the longest row."""
        self.width = round_up(max(self.ages) + 1, 256 if self.graphs else 1)
        if self.width > self.own[0].shape[3]:
            for layer, own in enumerate(self.own):
                self.own[layer] = self.grown(own, 3, min(power_of_two(self.width), self.answer_width))

    def advance(self) -> None:
        """The step itself. It reads and writes buffers only: nothing here waits for the device or depends on a value in it."""
        logits, R = self.next_logits(), self.R
        self.lengths[:R] += 1
        drawn = self.lengths[:R].clamp(max=self.uniforms.shape[1] - 1)
        self.tokens[:R] = pick_tokens(logits, self.temperature, self.uniforms[:R].gather(1, drawn[:, None])[:, 0])

    def next_logits(self) -> Tensor:
        """Feed each row its newest token; the logits of the next, [R, V]."""
        R, lengths = self.R, self.lengths[:self.R]
        self.rows = torch.arange(R, device=self.device)
        # Where all are of one length no mask is needed. A captured step must do for all lengths.
        even, even_prompts = not self.graphs and min(self.ages) + 1 == self.width, not self.graphs and min(self.prompts) == self.reach
        self.own_bias = None if even else self.bias(lengths + 1, self.width)
        self.prompt_bias = None if even_prompts else self.bias(self.prompt_lengths[:self.S], self.reach)
        hidden = forward(self.model, self.tokens[:R, None], (self.starts[:R] + lengths)[:, None], self.attend)
        return self.model.lm_head(hidden[:, 0])

    def bias(self, lengths: Tensor, width: int) -> Tensor:
        """[n] -> [n, 1, 1, width]: 0 at the first `lengths` places, -inf behind them."""
        behind = torch.arange(width, device=self.device) >= lengths[:, None]
        return torch.zeros(behind.shape, device=self.device).masked_fill_(behind, -torch.inf)[:, None, None]

    def to_slots(self, x: Tensor) -> Tensor:
        """[R, K, n, e] -> [S, K, G * n, e]; in empty slots stands some row, which nobody reads."""
        x = x if self.in_order else x[self.row_at[:self.S * self.G]]
        return x.reshape(self.S, self.G, *x.shape[1:]).transpose(1, 2).reshape(self.S, x.shape[1], self.G * x.shape[2], x.shape[3])

    def to_rows(self, x: Tensor, n: int) -> Tensor:
        """[S, K, G * n, e] -> [R, K, n, e]: the inverse of `to_slots`."""
        K, e = x.shape[1], x.shape[3]
        x = x.view(self.S, K, self.G, n, e).transpose(1, 2).reshape(self.S * self.G, K, n, e)
        return x if self.in_order else x[self.slot_of[:self.R]]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        R, H, _, D = query.shape
        K, n = key.shape[1], H // key.shape[1]  # n query heads share one key-value head
        (own_keys, own_values), (prompt_keys, prompt_values) = self.own[layer], self.shared[layer]
        self.own[layer][:, self.rows, :, self.lengths[:R]] = torch.cat([key, value], 2).transpose(1, 2)  # [R, 2, K, D]
        query, S, reach, width = query.reshape(R, K, n, D), self.S, self.reach, self.width
        prompt, prompt_norm = attend_part(self.to_slots(query), prompt_keys[:S, :, :reach], prompt_values[:S, :, :reach], scaling,
                                          self.prompt_bias)
        own, own_norm = attend_part(query, own_keys[:R, :, :width], own_values[:R, :, :width], scaling, self.own_bias)
        share = torch.sigmoid(self.to_rows(prompt_norm, n) - own_norm)  # of the whole softmax that lies on the prompt, [R, K, n, 1]
        return torch.lerp(own, self.to_rows(prompt, n), share).to(value.dtype).view(R, H, 1, D)


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


@torch.inference_mode()
def sample(model, prompts: Sequence[Sequence[int]], group: int = 1, max_new_tokens: int = 2048, temperature: float = 1.0,
           stop_ids: Sequence[int] = (), seed: int = 0, max_rows: int = 128, progress: Callable[[int], None] | None = None,
           cuda_graphs: bool = True) -> list[list[Completion]]:
    """Draw `group` answers to each prompt. Returns one list of completions per prompt, in the prompts' order.

    Each prompt is encoded once for its whole group. Rows that have ended leave the batch and the rows of the next
    prompts take their places, so that about `max_rows` answers are written at any time. The same seed gives the same
    tokens whatever `max_rows` is (up to rounding). `progress` is called with the number of answers just ended.
    `cuda_graphs`: on CUDA, capture the decoding step and replay it.
    """
    device, total = model.get_input_embeddings().weight.device, len(prompts) * group
    uniforms = torch.rand(total, max_new_tokens if temperature else 1, generator=torch.Generator().manual_seed(seed))
    written: list[list[int]] = [[] for _ in range(total)]  # answer a belongs to prompt a // group
    finished = [False] * total
    stop, longest, most = set(stop_ids), max(map(len, prompts), default=0), max(group, min(max_rows, total))
    decoder = Decoder(model, most, longest, max_new_tokens, temperature, graphs=cuda_graphs and device.type == "cuda")
    at_once = max(1, (2048 if device.type == "cpu" else 16384) // max(longest, 1))  # prompts encoded in one forward pass
    admitted, rows = 0, []  # rows[r] is the answer that the decoder's row r writes
    while admitted < len(prompts) or rows:
        if admitted < len(prompts) and len(rows) + group <= most:
            count = min((most - len(rows)) // group, at_once, len(prompts) - admitted)
            writing = range(admitted * group, (admitted + count) * group)
            tokens = decoder.admit(prompts[admitted:admitted + count], group, uniforms[writing.start:writing.stop])
            rows, admitted = rows + list(writing), admitted + count
        else:
            writing, tokens = rows, decoder.step()
        for answer, token in zip(writing, tokens.tolist()):
            written[answer].append(token)
            finished[answer] = token in stop
        ended = [r for r, answer in enumerate(rows) if finished[answer] or len(written[answer]) >= max_new_tokens]
        if ended:
            for place, mover in zip(*decoder.retire(ended)):
                rows[place] = rows[mover]
            del rows[len(rows) - len(ended):]
            if progress:
                progress(len(ended))
    return [[Completion(written[p * group + g], finished[p * group + g]) for g in range(group)] for p in range(len(prompts))]


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
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if config.model_type not in ("qwen2", "qwen3", "llama", "mistral") or rope in ("dynamic", "longrope"):
        raise InputError(f"{config.model_type} with {rope} position embeddings: only Qwen2, Qwen3, Llama and Mistral are supported, "
                         "with embeddings that do not change with the length of the text")
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
        encoded, decoder = encode_prompts(model, ids[:, :-1].tolist()), Decoder(model, 1, 7, 2)
        decoder.admit(ids[:, :-1].tolist(), 1, torch.zeros(1, 2))
        decoder.tokens[0] = ids[0, -1]
        decoder.widen()
        ours = torch.cat([model.lm_head(encoded.last_hidden), decoder.next_logits()]).float()
        same = (ours - own).abs().max() <= (1e-3 if model.dtype == torch.float32 else 0.1) * own.abs().max().clamp(min=1)
    except (AttributeError, TypeError, RuntimeError) as error:
        raise InputError(f"--model {name}: {model.config.model_type} cannot share a prompt's keys and values "
                         f"({str(error).splitlines()[0]}); Qwen2, Qwen3, Llama and Mistral can") from None
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
                 seed: int = 0, device: str = "auto", dtype: str = "auto", cuda_graphs: bool = True):
        if prompt not in PROMPTS:
            raise ValueError(f"unknown prompt {prompt!r}: expected one of {', '.join(PROMPTS)}")
        if not 0 < step <= window:
            raise ValueError(f"window {window}, step {step}: expected 0 < step <= window")
        self.agent = load_agent(model, device, dtype) if isinstance(model, str) else model
        self.prompt, self.window, self.step, self.temperature, self.seed = prompt, window, step, temperature, seed
        self.max_new_tokens, self.max_prompt_tokens, self.max_rows = max_new_tokens, max_prompt_tokens, max_rows
        self.answer_start, self.calls, self.cuda_graphs = "" if think else "<think> </think>", 0, cuda_graphs

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
                             self.seed * 1_000_003 + self.calls, self.max_rows, progress, self.cuda_graphs)
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
    cuda_graphs: bool = setting(True, "On CUDA, decode by captured graphs instead of launching each kernel from Python.")


def rerank_file(settings: Settings, agent: Agent | None = None) -> Counter:
    """Rerank a file of candidates into a TREC run and a JSONL of windows; return the counts of the closing line.

    Queries are worked through in batches. What is finished when the program is interrupted is kept: the JSONL grows with
    each batch, and the run of the finished queries is written on the way out.
    """
    lists = read_candidates(settings.input)[:settings.limit or None]
    check_run(settings.output, {c.qid: c.docids for c in lists}, settings.tag)  # before the work, not after it
    reranker = Reranker(agent or settings.model, settings.prompt, settings.window, settings.step, settings.think, settings.temperature,
                        settings.max_new_tokens, settings.max_prompt_tokens, settings.max_rows, settings.seed, settings.device,
                        settings.dtype, settings.cuda_graphs)
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
