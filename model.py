"""The language model: forward pass, sampling, log-probabilities, each prompt encoded once for its answers.

    agent = load_agent("Qwen/Qwen2.5-7B-Instruct")
    [[answer]] = sample(agent.model, [prompt_ids], max_new_tokens=100, stop_ids=agent.stop_ids)

One long prompt (20 passages) is shared by many short answers, and that is what makes this file fast: a
prompt's keys and values are computed and kept once, and an answer's attention is put together from two parts,
the prompt's and its own. `sample` decodes that way, a token of each answer at a time; `microbatches` gives
whole answers' log-probabilities and gradients. One algorithm for every device, in float32 and bfloat16.

Letters in shape comments: R rows (answers), S prompts, G rows of a prompt, T answer tokens, P prompt tokens,
V vocabulary, H query heads, K key-value heads, n = H / K query heads to a key-value head, D size of a head.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from support.architecture import check_supported, miniature
from support.checkpoint import (check_folder, check_tokenizer, find_stop_ids, load_tokenizer, load_weights,
                                read_config, reading)
from support.cli import InputError
from support.device import free_memory, pick_device
from support.memory import count_parameters

# cuDNN's attention, torch's first choice on Hopper cards, gave NaN gradients at some lengths (pytorch issue
# 196678), and it plans anew for every shape it meets, which here is nearly every call.
torch.backends.cuda.enable_cudnn_sdp(False)

# ------------------------------------------------------------------------------------------------------------
# The forward pass, over the modules that transformers has loaded. It is written out because attention is the
# caller's: all answers to a prompt read one copy of its keys and values, wherever the caller keeps it.

# layer, query [B, H, T, D], key, value [B, K, T, D], scaling -> [B, H, T, D]
Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]


def forward(model, ids: Tensor, positions: Tensor, attend: Attend, only: Tensor | None = None,
            checkpointing: bool = False) -> Tensor:
    """Final hidden states [B, T, hidden] of tokens ids [B, T] at `positions` [B, T] or [1, T].

    With `only` [B], just those of one place in each row, [B, 1, hidden]: elsewhere the last layer computes
    keys and values alone. `checkpointing`: keep each layer's input, compute the rest again going backward.
    """
    core = model.base_model
    x = core.embed_tokens(ids)
    cos, sin = core.rotary_emb(x, positions)
    half = sin.shape[-1] // 2
    rotary = cos[:, None], torch.cat([-sin[..., :half], sin[..., half:]], -1)[:, None]  # [B, 1, T, D]
    for i, layer in enumerate(core.layers):
        block = functools.partial(transformer_block, layer, rotary=rotary, attend=attend,
                                  only=only if i == len(core.layers) - 1 else None)
        again = checkpointing and torch.is_grad_enabled()
        x = checkpoint(block, x, use_reentrant=False) if again else block(x)
    return rms_norm(core.norm, x)


def transformer_block(layer, x: Tensor, rotary: tuple, attend: Attend, only: Tensor | None) -> Tensor:
    """One layer of Qwen2, Qwen3, Llama or Mistral: attention and MLP, each added to x [B, T, hidden]."""
    attention, normed = layer.self_attn, rms_norm(layer.input_layernorm, x)
    query, key, value = (project(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
                         for project in (attention.q_proj, attention.k_proj, attention.v_proj))
    if hasattr(attention, "q_norm"):  # Qwen3
        query, key = rms_norm(attention.q_norm, query), rms_norm(attention.k_norm, key)
    query, key = rotate(query, *rotary), rotate(key, *rotary)  # [B, H, T, D], [B, K, T, D]
    if only is not None:
        rows = torch.arange(len(x), device=x.device)
        x, query = x[rows, only][:, None], query[rows, :, only][:, :, None]  # [B, 1, hidden], [B, H, 1, D]
    mixed = attend(attention.layer_idx, query, key, value, attention.scaling)
    x = x + attention.o_proj(mixed.transpose(1, 2).flatten(2))
    return x + layer.mlp(rms_norm(layer.post_attention_layernorm, x))


def rms_norm(module, x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps), times the module's weight, over the last dimension."""
    return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding: x cos + rotate_half(x) sin turns each pair (x[d], x[d + D/2]) by an angle.

    Instead of half of x, half of `sin` is negated, once for all layers.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def token_mask(lengths: Tensor, width: int) -> Tensor:
    """[B] -> [B, width], True at the first `lengths` places. (Not from ids: pad may equal the end token.)"""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Lists of token ids as one tensor [B, longest], zeros behind the shorter ones."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)


# ------------------------------------------------------------------------------------------------------------
# Prompts, encoded once


@dataclasses.dataclass
class EncodedPrompts:
    """S prompts' keys and values, a tensor [S, K, P, D] a layer, right-padded to P.

    `sizes` counts real tokens; `lengths` [S] is the same as a tensor on the CPU. `last_hidden` [S, hidden] is
    the final hidden state of each prompt's last token, which predicts the first token of an answer.
    """

    keys: list[Tensor]
    values: list[Tensor]
    sizes: list[int]
    last_hidden: Tensor

    @property
    def lengths(self) -> Tensor:
        return torch.tensor(self.sizes)


def causal_attention(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float,
                     mask: Tensor | None = None) -> Tensor:
    """An `Attend`: each token attends to itself and to earlier tokens, or to what `mask` allows."""
    share = query.shape[1] // key.shape[1]
    if share > 1 and query.dtype == torch.float32:  # a GPU has no float32 kernel for shared heads
        key, value, share = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1), 1
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=scaling,
                                          enable_gqa=share > 1)


def encode_prompts(model, prompts: Sequence[Sequence[int]], checkpointing: bool = False) -> EncodedPrompts:
    """One forward pass over S prompts. Their right padding is harmless: no real token looks to its right."""
    ids = padded(prompts, model.device)  # [S, P]
    sizes = [len(p) for p in prompts]
    lengths, positions = torch.tensor(sizes, device=ids.device), torch.arange(ids.shape[1], device=ids.device)
    keys, values = {}, {}  # of each layer, [S, K, P, D]

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        keys.setdefault(layer, key)  # the first: checkpointing comes here again, backwards
        values.setdefault(layer, value)
        last = query.shape[2] < key.shape[2]  # the last layer computes only the last token, which sees all
        mask = token_mask(lengths, key.shape[2])[:, None, None] if last else None
        return causal_attention(layer, query, key, value, scaling, mask)

    hidden = forward(model, ids, positions[None], attend, lengths - 1, checkpointing)
    return EncodedPrompts(list(keys.values()), list(values.values()), sizes, hidden[:, 0])


def chunks(prompts: Sequence[Sequence[int]], tokens: int) -> Iterator[slice]:
    """Slices of neighbouring prompts, each at most `tokens` padded tokens, and at least one prompt."""
    start = 0
    while start < len(prompts):
        end, longest = start + 1, len(prompts[start])
        while end < len(prompts) and max(longest, len(prompts[end])) * (end + 1 - start) <= tokens:
            longest, end = max(longest, len(prompts[end])), end + 1
        yield slice(start, end)
        start = end


# ------------------------------------------------------------------------------------------------------------
# Attention joined from two parts. One softmax over prompt and answer gives the mean of the parts' outputs,
# weighted by exp(lse of the part - lse of the whole). lse (log-sum-exp) is the logarithm of the softmax's
# denominator. So a prompt's part can be one matrix product for all rows that share it.


def attention_scores(query: Tensor, keys: Tensor, scaling: float, attn_bias: Tensor | None = None) -> Tensor:
    """query [B, K, N, D], keys [B, K, P, D] -> scaling * products + attn_bias, [B, K, N, P], in float32.

    In bfloat16 large scores would be off by whole units. So the products of bfloat16 factors are kept in
    float32. CUDA's matrix product has an option for it; on other devices the factors are converted.
    """
    if query.is_cuda and query.dtype != torch.float32:
        query, keys, heads = query.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2), query.shape[:2]
        scores = torch.bmm(query, keys, out_dtype=torch.float32).unflatten(0, heads)
    else:
        scores = query.float() @ keys.float().transpose(-1, -2)
    scores *= scaling
    return scores if attn_bias is None else scores.add_(attn_bias)


def attend_part(query: Tensor, keys: Tensor, values: Tensor, scaling: float,
                attn_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention to one part of what a token may read.

    query [B, K, N, D]; keys, values [B, K, P, D]; attn_bias, -inf where attention is masked, [B, K, N, P]
    or broadcastable to it. Returns the output [B, K, N, D] and the lse [B, K, N, 1], both float32.
    """
    scores = attention_scores(query, keys, scaling, attn_bias)
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    return (weights.to(values.dtype) @ values).float() / total, top + total.log()


def attend_part_backward(grad: Tensor, query: Tensor, keys: Tensor, values: Tensor, out: Tensor, lse: Tensor,
                         scaling: float, attn_bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, keys and values through one part, from the output and the lse of the whole.

    The softmax's textbook backward pass, dS = P * (dP - rowsum(dO * O)). It holds for each part by itself,
    since under the lse of the whole P are the weights that the part has in the whole. Shapes as in
    `attend_part`; scores are computed again just as there, or P would not sum to one in bfloat16.
    """
    weights = attention_scores(query, keys, scaling, attn_bias).sub_(lse).exp_()  # P
    dscores = attention_scores(grad, values, scaling)  # dP, scaled
    dscores -= scaling * (grad.float() * out.float()).sum(-1, keepdim=True)
    dscores = dscores.mul_(weights).to(query.dtype)  # dS
    return dscores @ keys, dscores.transpose(-1, -2) @ query, weights.to(grad.dtype).transpose(-1, -2) @ grad


def join(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> Tensor:
    """Two parts' outputs [..., D] as one softmax gives them: exp(a) / (exp(a) + exp(b)) is sigmoid(a - b)."""
    return torch.lerp(out, other, torch.sigmoid(other_lse - lse))


class SharedAttention(torch.autograd.Function):
    """Attention of whole answers over the prompt that they share and, causally, over themselves.

    query [R, H, T, D]; key, value [R, K, T, D]; prompt_keys, prompt_values [S, K, P, D]; `parts` lists
    (prompt, slice of its rows, its length). Returns [R, H, T, D]. Copies no prompt and keeps no scores.
    """

    @staticmethod
    def forward(ctx, query, key, value, prompt_keys, prompt_values, parts, scaling):
        (_, H, T, D), K = query.shape, key.shape[1]
        ctx.parts, ctx.scaling = parts, scaling
        causal = torch.full((T, T), -torch.inf, device=query.device).triu(1)
        ctx.attn_bias = causal.repeat(H // K, 1)  # [n T, T]
        grouped = query.reshape(-1, K, H // K * T, D)
        own, own_lse = attend_part(grouped, key, value, scaling, ctx.attn_bias)  # [R, K, n T, D or 1]
        shared, shared_lse = torch.empty_like(own), torch.empty_like(own_lse)
        for prompt, rows, length in parts:
            where = slice(prompt, prompt + 1), slice(None), slice(length)  # [1, K, length, D] of the prompts
            part = attend_part(to_one_row(grouped[rows]), prompt_keys[where], prompt_values[where], scaling)
            shared[rows], shared_lse[rows] = (from_one_row(x, grouped[rows]) for x in part)
        out = join(own, own_lse, shared, shared_lse).to(value.dtype)
        lse = torch.logaddexp(shared_lse, own_lse)
        ctx.save_for_backward(grouped, key, value, prompt_keys, prompt_values, out, lse)
        return out.view(query.shape)

    @staticmethod
    def backward(ctx, grad):
        query, key, value, prompt_keys, prompt_values, out, lse = ctx.saved_tensors
        shape, grad = grad.shape, grad.reshape(query.shape)
        dquery, dkey, dvalue = attend_part_backward(grad, query, key, value, out, lse, ctx.scaling,
                                                    ctx.attn_bias)
        dkeys, dvalues = torch.zeros_like(prompt_keys), torch.zeros_like(prompt_values)
        for prompt, rows, length in ctx.parts:
            where = slice(prompt, prompt + 1), slice(None), slice(length)
            g, q, o, norm = (to_one_row(x[rows]) for x in (grad, query, out, lse))
            part = attend_part_backward(g, q, prompt_keys[where], prompt_values[where], o, norm, ctx.scaling)
            dquery[rows] += from_one_row(part[0], query[rows])
            dkeys[where], dvalues[where] = part[1:]
        return dquery.view(shape), dkey, dvalue, dkeys, dvalues, None, None


def to_one_row(x: Tensor) -> Tensor:
    """[G, K, N, e] -> [1, K, G N, e]: all that reads a prompt's key-value head, for one matrix product."""
    return x.transpose(0, 1).flatten(1, 2)[None]


def from_one_row(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of `to_one_row`: [1, K, G N, e] -> [G, K, N, e], sizes as in `like`."""
    return x[0].unflatten(1, (len(like), -1)).transpose(0, 1)


# ------------------------------------------------------------------------------------------------------------
# Sampling


@dataclasses.dataclass
class Completion:
    """One sampled answer: its token ids as drawn (the end token included), whether it ended by itself, and
    each token's log-probability in the distribution that it was drawn from (0 at temperature 0)."""

    ids: list[int]
    finished: bool
    logps: list[float] = dataclasses.field(default_factory=list, compare=False)


def pick_tokens(logits: Tensor, temperature: float, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The next token of each row, the most likely at temperature 0, else by inverting the distribution; and
    its log-probability. [R] both.

    logits [R, V]; uniforms [R] in [0, 1): a number for each token, so that a draw depends on its row alone.
    """
    if temperature == 0:
        return logits.argmax(-1), torch.zeros_like(uniforms)
    probs = (logits.float() / temperature).softmax(-1)  # [R, V]
    cumulative = probs.cumsum(-1)
    target = uniforms[:, None] * cumulative[:, -1:]  # not 1 exactly, because of rounding
    tokens = torch.searchsorted(cumulative, target, right=True).clamp_max(logits.shape[-1] - 1)  # [R, 1]
    return tokens[:, 0], probs.gather(-1, tokens)[:, 0].log()


class DecodeBatch:
    """Answers that were begun together: R rows, a group per prompt, all of one length.

    Per layer, the keys and values of the S prompts exist once, [S, K, P, D]. The rows have `cache` [2, R, K,
    size, D] for their own, with more room than the `length` tokens read so far. Rows are in the order of
    their prompts. In bfloat16 the cache is read up to a multiple of 8 (the rest is masked), which the tensor
    cores of a GPU need.
    """

    def __init__(self, model, prompts: Sequence[Sequence[int]], group_size: int, answers: Sequence[int]):
        """Encode `prompts`. `answers` [R]: the numbers of the answers that the rows write."""
        self.answers, self.prompt_lengths = list(answers), [len(p) for p in prompts]
        at_once = 2048 if model.device.type == "cpu" else 16384  # tokens: a processor's cache is small
        parts = [encode_prompts(model, prompts[chunk]) for chunk in chunks(prompts, at_once)]
        self.pad_multiple = 1 if model.dtype == torch.float32 else 8
        width = -(-max(self.prompt_lengths) // self.pad_multiple) * self.pad_multiple
        self.keys, self.values = (
            [torch.cat([F.pad(x, (0, 0, 0, width - x.shape[2])) for x in layer]) for layer in zip(*kept)]
            for kept in ([part.keys for part in parts], [part.values for part in parts]))
        # [R] each row's prompt
        self.prompt_index = [p for p in range(len(prompts)) for _ in range(group_size)]
        self.device = model.device
        self.cache = [x.new_empty(2, len(self.answers), x.shape[1], 0, x.shape[3]) for x in self.keys]
        last_hidden = torch.cat([p.last_hidden for p in parts])
        self.tokens: Tensor | None = None  # [R] each row's newest token, not yet read
        self.arrange()
        self.advance(0, model.lm_head(last_hidden).repeat_interleave(group_size, 0))

    def advance(self, length: int, logits: Tensor) -> None:
        """Note that `length` tokens of each row have been read, which gave the next token's logits [R, V]."""
        self.length, self.logits, self.own_attn_bias = length, logits, None  # [cache_length]
        self.cache_length = -(-(length + 1) // self.pad_multiple) * self.pad_multiple  # at the next step
        if self.cache_length > length + 1:
            unread = torch.arange(self.cache_length, device=self.device) > length
            self.own_attn_bias = torch.where(unread, -torch.inf, 0.0)

    def arrange(self) -> None:
        """Map the live rows to slots [S, G], one line per prompt; G is the largest group still alive."""
        lengths, width = torch.tensor(self.prompt_lengths), self.keys[0].shape[2]
        # [R] each row's place in its group
        place = [r - self.prompt_index.index(p) for r, p in enumerate(self.prompt_index)]
        slots = torch.zeros(len(lengths), max(place) + 1, dtype=torch.long)  # an empty slot repeats row 0
        slots[self.prompt_index, place] = torch.arange(len(place))
        self.slots = slots.to(self.device)
        index = torch.tensor(self.prompt_index, device=self.device)
        self.slot_of_row = index, torch.tensor(place, device=self.device)
        self.starts = lengths[self.prompt_index].to(self.device)  # [R]
        self.attn_bias = None  # [S, 1, 1, P], -inf where a prompt has padding
        if min(self.prompt_lengths) < width:
            attn_bias = torch.zeros(len(lengths), width).masked_fill_(~token_mask(lengths, width), -torch.inf)
            self.attn_bias = attn_bias[:, None, None].to(self.device)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, and the prompts that no row reads any more."""
        alive, all_prompts = sorted({self.prompt_index[r] for r in rows}), len(self.prompt_lengths)
        index, kept = torch.tensor(rows, device=self.device), torch.tensor(alive, device=self.device)
        for layer in range(len(self.cache)):  # one at a time, to save memory
            self.cache[layer] = self.cache[layer][:, index]
            if len(alive) < all_prompts:
                self.keys[layer], self.values[layer] = self.keys[layer][kept], self.values[layer][kept]
        self.prompt_index = [alive.index(self.prompt_index[r]) for r in rows]
        self.answers = [self.answers[r] for r in rows]
        self.tokens = self.tokens[index]
        self.prompt_lengths = [self.prompt_lengths[p] for p in alive]
        self.arrange()

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attention of each row's newest token. query, result [R, H, 1, D]; key, value [R, K, 1, D]."""
        (R, H, _, D), K = query.shape, key.shape[1]
        if self.length == self.cache[layer].shape[3]:  # full: make half as much room again
            self.cache[layer] = F.pad(self.cache[layer], (0, 0, 0, max(32, self.length // 16 * 8)))
        self.cache[layer][:, :, :, self.length] = torch.stack([key, value])[:, :, :, 0]
        query = query.view(R, K, H // K, D)
        cache = self.cache[layer][:, :, :, :self.cache_length]
        own, own_lse = attend_part(query, *cache, scaling, self.own_attn_bias)
        by_prompt = query[self.slots].transpose(1, 2).flatten(2, 3)  # [S, K, G n, D]
        parts = attend_part(by_prompt, self.keys[layer], self.values[layer], scaling, self.attn_bias)
        shared, shared_lse = (x.unflatten(2, (-1, H // K)).transpose(1, 2)[self.slot_of_row] for x in parts)
        return join(own, own_lse, shared, shared_lse).to(value.dtype).view(R, H, 1, D)


def read_tokens(model, batches: Sequence[DecodeBatch]) -> None:
    """Let the model read each row's newest token, which gives the logits of its next one.

    One forward pass for all batches. Only attention is separate: a row begun later then reads the few tokens
    that it has, not as many as the oldest row.
    """
    rows = [len(batch.answers) for batch in batches]

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        parts = zip(batches, query.split(rows), key.split(rows), value.split(rows))
        return torch.cat([batch.attend(layer, q, k, v, scaling) for batch, q, k, v in parts])

    tokens = torch.cat([batch.tokens for batch in batches])[:, None]  # [R, 1], R of all batches together
    positions = torch.cat([batch.starts + batch.length for batch in batches])[:, None]
    logits = model.lm_head(forward(model, tokens, positions, attend)[:, 0])  # [R, V]
    for batch, part in zip(batches, logits.split(rows)):
        batch.advance(batch.length + 1, part)


@torch.inference_mode()
def sample(model, prompts: Sequence[Sequence[int]], group_size: int = 1, max_new_tokens: int = 2048,
           temperature: float = 1.0, stop_ids: Sequence[int] = (), seed: int | Sequence[int] = 0,
           max_num_seqs: int = 128, progress: Callable[[int], None] | None = None,
           first: int = 0) -> list[list[Completion]]:
    """Draw `group_size` answers to each prompt. Returns one list of completions per prompt, in their order.

    Each prompt is encoded once for its whole group. Up to `max_num_seqs` answers (at least one group) are
    written at a time: answers that have ended make room, and when a quarter is free the next prompts come
    in. `seed` is one number, or one per prompt. The same seed gives the same tokens (up to rounding) whatever
    `max_num_seqs` is, and whether `prompts` are a whole batch or its part from number `first` on. `progress`
    is called, now and then, with the number of answers that have ended since.
    """
    total, begun, batches = len(prompts) * group_size, 0, []
    seeds = [(one, group_size) for one in seed] if not isinstance(seed, int) else [
        (seed, first * group_size + total)]
    numbers = max_new_tokens if temperature else 1  # per answer
    # Draw the numbers of the whole batch and keep our part: a rank's share then has the batch's samples.
    uniforms = torch.cat([torch.rand(n, numbers, generator=torch.Generator().manual_seed(one))
                          for one, n in seeds])[-total:].to(model.device)  # one for each token of each answer
    answers = [Completion([], False) for _ in range(total)]  # number a: to prompt a // group_size
    at_once = max(group_size, min(max_num_seqs, total))
    while begun < len(prompts) or batches:
        free = at_once - sum(len(batch.answers) for batch in batches)
        if begun < len(prompts) and free >= max(group_size, at_once // 4):
            end = min(begun + free // group_size, len(prompts))
            numbers_of_rows = range(begun * group_size, end * group_size)
            written = [DecodeBatch(model, prompts[begun:end], group_size, numbers_of_rows)]
            batches, begun = batches + written, end
        else:
            read_tokens(model, batches)
            written = batches
        for batch in written:
            drawn = uniforms[batch.answers, batch.length if temperature else 0]
            batch.tokens, logps = pick_tokens(batch.logits, temperature, drawn)
            for a, token, logp in zip(batch.answers, batch.tokens.tolist(), logps.tolist()):
                if not answers[a].finished:
                    answers[a].ids.append(token)
                    answers[a].logps.append(logp)
                    answers[a].finished = token in stop_ids
            going = [r for r, a in enumerate(batch.answers)
                     if not answers[a].finished and len(answers[a].ids) < max_new_tokens]
            ended = len(batch.answers) - len(going)
            # Dropping rows copies the others, so not for each one. Until then an ended row goes on, ignored.
            if 8 * ended >= len(batch.answers):
                if going:
                    batch.keep(going)
                else:
                    batches = [other for other in batches if other is not batch]
                if progress:
                    progress(ended)
    return [answers[p * group_size:(p + 1) * group_size] for p in range(len(prompts))]


# ------------------------------------------------------------------------------------------------------------
# Log-probabilities of sampled answers, and their gradients


@dataclasses.dataclass
class Microbatch:
    """Some answers, numbered `rows` [R]: logps and entropy [R, T] (0 at padding), lengths [R]."""

    rows: Tensor
    logps: Tensor
    entropy: Tensor
    lengths: Tensor


def microbatches(model, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]],
                 groups: Sequence[int] | None = None, temperature: float = 1.0, microbatch_tokens: int = 8192,
                 prompt_batch_tokens: int = 8192, checkpointing: bool = False) -> Iterator[Microbatch]:
    """All answers, at most `microbatch_tokens` padded tokens at a time; with gradients, if they are enabled:

        for batch in microbatches(model, prompts, answers):
            loss_of(batch).backward()

    Run the loop to its end: after a prompt's last answer the gradients are sent on through the prompt.
    `answers` has len(prompts) groups of equal size, one after the other; `groups` are the numbers of those to
    visit (default: all). A prompt is encoded once, with its graph. Its keys, values and last hidden state are
    cut off as leaves, where the micro-batches' gradients add up; one backward pass carries the sums through
    the prompt. So the size of a micro-batch changes the memory, not the result (up to bfloat16's rounding).
    ValueError for an empty answer or no temperature.
    """
    if temperature <= 0 or not all(answers):
        raise ValueError("expected a temperature above 0 and no empty answer")
    groups = range(len(prompts)) if groups is None else groups
    G = len(answers) // max(1, len(prompts))
    for chunk in chunks([prompts[g] for g in groups], prompt_batch_tokens):
        encoded = encode_prompts(model, [prompts[g] for g in groups[chunk]], checkpointing)
        layers = len(encoded.keys)
        outputs = [*encoded.keys, *encoded.values, encoded.last_hidden]  # all that answers see of a prompt
        leaves = [x.detach().requires_grad_(x.requires_grad) for x in outputs]
        cut = EncodedPrompts(leaves[:layers], leaves[layers:-1], encoded.sizes, leaves[-1])
        # (prompt, row) of each answer. Those of like length share a micro-batch, which leaves little padding.
        waiting = [(s, g * G + i) for s, g in enumerate(groups[chunk]) for i in range(G)]
        waiting.sort(key=lambda pair: -len(answers[pair[1]]))
        while waiting:
            count = max(1, microbatch_tokens // len(answers[waiting[0][1]]))
            prompt_index, rows = zip(*sorted(waiting[:count]))
            waiting = waiting[count:]
            logps, entropy, lengths = answer_logps(model, cut, prompt_index, [answers[r] for r in rows],
                                                   temperature, checkpointing)
            yield Microbatch(torch.tensor(rows, device=model.device), logps, entropy, lengths)
        reached = [(x, leaf.grad) for x, leaf in zip(outputs, leaves) if leaf.grad is not None]
        if reached:
            torch.autograd.backward(*zip(*reached))


def answer_logps(model, prompts: EncodedPrompts, prompt_index: Sequence[int],
                 answers: Sequence[Sequence[int]], temperature: float = 1.0, checkpointing: bool = False,
                 chunk: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of R answers given their prompts, by a forward pass over the answers alone.

    `prompt_index` [R], ascending: which of the S encoded prompts each answer belongs to. Returns logps and
    entropy [R, T] (0 at padding) and lengths [R]. Logits [R, T, V] never exist: see `token_logps`.
    """
    ids = padded(answers, model.device)  # [R, T]
    (R, T), device = ids.shape, ids.device
    # The prompt's last hidden state predicts the first token.
    hidden = prompts.last_hidden[torch.tensor(prompt_index, device=device)][:, None]
    if T > 1:
        keys, values = prompts.keys, prompts.values
        shared = [(p, slice(prompt_index.index(p), prompt_index.index(p) + prompt_index.count(p)), size)
                  for p, size in enumerate(prompts.sizes) if p in prompt_index]

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
            return SharedAttention.apply(query, key, value, keys[layer], values[layer], shared, scaling)

        starts = prompts.lengths[list(prompt_index)][:, None]
        positions = (starts + torch.arange(T - 1)).to(device)
        hidden = torch.cat([hidden, forward(model, ids[:, :-1], positions, attend, None, checkpointing)], 1)
    places = [r * T + t for r, answer in enumerate(answers) for t in range(len(answer))]  # where tokens are
    place = torch.tensor(places, device=device)  # [N]
    hidden, targets = hidden.flatten(0, 1)[place], ids.flatten()[place]  # [N, hidden], [N]
    logps, entropy = (torch.zeros(R * T, device=device).index_copy(0, place, piece).view(R, T)
                      for piece in token_logps(model, hidden, targets, temperature, chunk))
    return logps, entropy, torch.tensor([len(a) for a in answers], device=device)


def token_logps(model, hidden: Tensor, targets: Tensor, temperature: float = 1.0,
                chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `targets` [N] given the hidden states [N, hidden] before them, and entropies.

    The LM head is applied to `chunk` tokens at a time, and a chunk's logits are computed again in the
    backward pass. Returns [N] both.
    """
    elements = 2**23 if hidden.device.type == "cpu" else 2**27  # of logits: 32 MiB, 512 MiB
    chunk = chunk or max(1, elements // model.lm_head.weight.shape[0])
    project = project_logps
    if len(targets) > chunk and torch.is_grad_enabled():
        project = functools.partial(checkpoint, project_logps, use_reentrant=False)
    pieces = zip(hidden.split(chunk), targets.split(chunk))
    logps, entropy = zip(*(project(h, model.lm_head, t, temperature) for h, t in pieces))
    return torch.cat(logps), torch.cat(entropy)


def project_logps(hidden: Tensor, head, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """[N, hidden] -> each target's log-probability, and the entropy (without gradient): [N] in float32."""
    logits = head(hidden).float() / temperature
    normaliser = logits.logsumexp(-1)
    logps = logits.gather(-1, targets[:, None])[:, 0] - normaliser
    with torch.no_grad():
        probs = (logits - normaliser[:, None]).exp_()
        entropy = normaliser - (probs * logits).sum(-1)
    return logps, entropy


def answer_losses(model, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]],
                  max_tokens: int = 8192, checkpointing: bool = False) -> Iterator[Tensor]:
    """Supervised learning: the cross-entropy of each prompt's one answer, summed over a micro-batch's tokens.

    Nothing is shared here, so prompt and answer are one row, padded on the right. At most `max_tokens` padded
    tokens (at least one row) go through the model together. Send each sum backward before asking for the
    next. The LM head is applied only to the hidden states that predict an answer's token.
    """
    rows = sorted(zip(prompts, answers), key=lambda pair: -len(pair[0]) - len(pair[1]))  # little padding
    texts = [[*prompt, *answer] for prompt, answer in rows]
    for chunk in chunks(texts, max_tokens):
        ids = padded(texts[chunk], model.device)  # [R, P + T]
        is_answer = padded([[0] * len(p) + [1] * len(a) for p, a in rows[chunk]], model.device).bool()
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        hidden = forward(model, ids, positions, causal_attention, None, checkpointing)
        before = hidden[:, :-1][is_answer[:, 1:]]  # the hidden state at a token predicts the next token
        yield -token_logps(model, before, ids[is_answer])[0].sum()


# ------------------------------------------------------------------------------------------------------------
# Loading


@dataclasses.dataclass
class Agent:
    """A causal language model, its tokenizer and the ids that end an answer."""

    model: torch.nn.Module
    tokenizer: object
    stop_ids: list[int]

    def __post_init__(self):
        check_architecture(self.model.config)

    @property
    def end_id(self) -> int:
        """What ends a supervised answer: the end of a turn, which a base model's own end token is not."""
        turn_end = self.tokenizer.get_vocab().get("<|im_end|>", self.tokenizer.eos_token_id)
        return self.stop_ids[0] if turn_end is None else turn_end

    def decode(self, completion: Completion) -> str:
        """The text of an answer, without the end token."""
        ids = completion.ids[:-1] if completion.finished else completion.ids
        return self.tokenizer.decode(ids, skip_special_tokens=False)


@torch.no_grad()
def check_architecture(config) -> None:
    """InputError unless `forward` computes what this configuration's model computes: else all would be wrong.

    Compared on a miniature with random weights in float32, so that neither the real weights nor their
    precision matter: the logits of two tokens, by prompt and by decoding step, against transformers' own.
    """
    check_supported(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, ids = miniature(config), torch.arange(1, 9)[None]
        batch = DecodeBatch(model, ids[:, :-1].tolist(), 1, [0])
        prefill, batch.tokens = batch.logits, ids[:, -1]
        read_tokens(model, [batch])
        ours, theirs = torch.cat([prefill, batch.logits]), model(input_ids=ids).logits[0, -2:]
        if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3):
            raise InputError(f"{config.model_type}: its configuration changes the forward pass that model.py "
                             "writes out")


def load_config(name: str):
    """(a checked configuration, how to load the rest), from a folder or the hub. InputError: see below."""
    config, source = read_config(name)
    with reading(name, "config.json"):
        check_architecture(config)
        count_parameters(config)  # fails where the sizes do not make a model
    return config, source


def load_agent(name: str, device: str = "auto", dtype: str = "auto") -> Agent:
    """Load a model and its tokenizer from a folder or the Hugging Face hub: float32 on a CPU, else bfloat16.

    InputError, in one line with what to do, where that fails or the parts do not belong together.
    """
    place, (config, source) = pick_device(device), load_config(name)
    if dtype == "auto":
        dtype = "float32" if place.type == "cpu" else "bfloat16"
    needed, free = count_parameters(config) * getattr(torch, dtype).itemsize, free_memory(place)
    if needed > free:
        raise InputError(f"--model {name}: its weights take {needed / 2**30:.1f} GiB and {place} has "
                         f"{free / 2**30:.1f} GiB free; use a smaller model, or --device cpu")
    weights = check_folder(name)
    with reading(name, "tokenizer.json or tokenizer_config.json"):
        tokenizer = load_tokenizer(name, **source)
        check_tokenizer(tokenizer, config.vocab_size)
    model = load_weights(name, weights, config, dtype, place, **source)
    return Agent(model, tokenizer, find_stop_ids(model, tokenizer))
