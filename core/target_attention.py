"""The target's attention over concatenated sequences: each by itself, so that no mask of tokens x tokens exists.

While `each_alone` is open, transformers calls `attend` in the place of its own kernels (AttentionInterface) and makes
no masks. Windows, soft caps and sinks are computed in chunks of queries, as torch has no kernel for the latter two.
Sizes: T tokens, A heads, G key-value heads, D of a head.
"""

import contextlib
import contextvars

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from core import attention

NAME = "eagle3_each_alone"  # of an implementation, to transformers
WINDOWS = ("sliding_window", "attention_chunk_size")  # where families keep how far their layers see
SCORES = 2**24  # heads x queries x keys whose scores exist at a time
LENGTHS = contextvars.ContextVar("lengths")


@contextlib.contextmanager
def each_alone(decoder, lengths):
    """A forward of `decoder` over concatenated sequences of `lengths` tokens, none of which sees another."""
    token = LENGTHS.set(lengths)
    own = decoder.config._attn_implementation
    decoder.config._attn_implementation = NAME
    try:
        yield
    finally:
        decoder.config._attn_implementation = own
        LENGTHS.reset(token)


def attend(
    module,
    query,  # [1, A, T, D]
    key,  # [1, G, T, D]
    value,  # [1, G, T, Dv]
    attention_mask,  # None
    scaling=None,
    sliding_window=None,
    softcap=None,
    s_aux=None,  # [A]: sinks
    **_,
):
    """An implementation of transformers' AttentionInterface: outputs [1, T, A, Dv], and None for the weights."""
    lengths = LENGTHS.get()
    outputs = []
    for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True):
        outputs.append(attend_sequence(q, k, v, scaling, sliding_window, softcap, s_aux))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)


def attend_sequence(q, k, v, scale, window=None, softcap=None, sinks=None):
    """Causal attention [1, A, S, Dv] of one sequence: q [1, A, S, D], k [1, G, S, D], v [1, G, S, Dv].

    window: the last tokens that a query sees, itself included; None or 0: all.
    """
    length = q.shape[2]
    width = v.shape[-1]
    has_kernel = softcap is None and sinks is None
    if has_kernel and width < q.shape[-1]:  # kernels take values as wide as keys (MLA)
        v = F.pad(v, (0, q.shape[-1] - width))
    if has_kernel and not (window and window < length):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return out[..., :width]
    size = max(SCORES // (q.shape[1] * min(length, window or length)), 16)
    outputs = []
    for at in range(0, length, size):
        end = min(at + size, length)
        first = max(at + 1 - window, 0) if window else 0
        seen = visible(at, end, first, window, q.device)
        part = (q[:, :, at:end], k[:, :, first:end], v[:, :, first:end], seen)
        if has_kernel:
            out = F.scaled_dot_product_attention(*part, scale=scale, enable_gqa=True)
        else:
            out = attend_plainly(*part, scale, softcap, sinks)
        outputs.append(out)
    return torch.cat(outputs, dim=2)[..., :width]


def visible(at, end, first, window, device):
    """bool [end - at, end - first]: which keys from `first` on each query from `at` on sees."""
    queries = torch.arange(at, end, device=device)[:, None]
    keys = torch.arange(first, end, device=device)
    seen = keys <= queries
    if window:
        seen &= keys > queries - window
    return seen


def attend_plainly(q, k, v, seen, scale, softcap, sinks):
    """Attention [1, A, N, Dv] with soft-capped scores and sinks, scores whose probability goes to no value."""
    shared = q.shape[1] // k.shape[1]  # heads that share a key head
    k = k.repeat_interleave(shared, dim=1)
    v = v.repeat_interleave(shared, dim=1)
    scores = attention.upcast(q @ k.transpose(2, 3)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(dim=-1).to(v.dtype)
    return weights[..., : v.shape[2]] @ v


@contextlib.contextmanager
def narrowed(decoder, size):
    """Windows and chunks of `size` tokens, so that few tokens show whether a forward keeps to them."""
    changed = []
    for part in (decoder.config, *decoder.modules()):
        for name in WINDOWS:
            value = getattr(part, name, None)
            if type(value) is int and value > size:
                changed.append((part, name, value))
                setattr(part, name, size)
    try:
        yield
    finally:
        for part, name, value in changed:
            setattr(part, name, value)
