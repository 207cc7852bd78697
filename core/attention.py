"""Attention of slots: over the step-0 keys up to the slot in its document, and over the slot's own keys of later steps.

Two implementations with the same numbers: `SlotAttention` runs everywhere, `flex_slots` uses FlexAttention's kernel on
GPUs. Sizes: n slots, T tokens, A heads, G key-value heads, D of a head.
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from core import slots

MASKED_KERNEL = ("cpu",)  # devices with an attention kernel that takes any mask and returns the logsumexp


@functools.cache
def compiled(function):
    """torch.compile of a function, once, for any length."""
    return torch.compile(function, dynamic=True, fullgraph=True)


def upcast(x):
    """x in fp32 at least: half-precision inputs are normalised and summed in fp32, float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ==================== Keys ============================================================================================


class Keys(NamedTuple):
    """Keys and values that slots attend to, in one layer."""

    first: tuple = ()  # step 0's, of all slots: k, v [T, G, D]
    own: tuple = ()  # the live slots' own of steps 1 to i: k, v [n, G, i, D]

    def select(self, places):
        """The Keys of the slots at these places [n'] among the live ones."""
        own = tuple(x.index_select(0, places) for x in self.own)
        return Keys(self.first, own)

    def add(self, k, v):
        """The Keys with those [n, G, D] that the live slots add in a further step."""
        k = k[:, :, None]
        v = v[:, :, None]
        if self.own:
            before_k, before_v = self.own
            k = torch.cat([before_k, k], dim=2)
            v = torch.cat([before_v, v], dim=2)
        return Keys(self.first, (k, v))


# ==================== A part of the keys =============================================================================


def attend_keys(q, k, v, mask):
    """softmax(q k^T / sqrt(D) + mask) v and its logsumexp.

    q [1, G, N, D], k and v [1, G, M, D], mask [1, 1, N, M]; returns [1, G, N, D] and [1, G, N].
    """
    if q.device.type in MASKED_KERNEL:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(q, k, v, 0.0, False, attn_mask=mask)
    scale = q.shape[-1] ** -0.5
    products = upcast(q @ k.transpose(2, 3))
    scores = products * scale + mask
    weights = scores.softmax(-1).to(q.dtype)
    return weights @ v, scores.logsumexp(-1)


def attend_keys_backward(
    grad,  # [1, G, N, D]
    q,
    k,
    v,
    out,  # [1, G, N, D]
    lse,  # [1, G, N]
    mask,
):
    """Gradients of q, k and v, if these keys are a part of a softmax whose output is `out` and whose logsumexp `lse`.

    A part needs nothing else of the other keys (ring attention, arXiv 2310.01889).
    """
    if q.device.type in MASKED_KERNEL:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return kernel(grad, q, k, v, out, lse, 0.0, False, attn_mask=mask)
    scale = q.shape[-1] ** -0.5
    products = upcast(q @ k.transpose(2, 3))
    scores = products * scale + mask
    lse = lse[..., None]
    weights = (scores - lse).exp()
    score_grad = gradient_of_scores(grad, v, out, weights, scale)
    score_grad = score_grad.to(q.dtype)
    weights = weights.to(q.dtype)
    dq = score_grad @ k
    dk = score_grad.transpose(2, 3) @ q
    dv = weights.transpose(2, 3) @ grad
    return dq, dk, dv


def gradient_of_scores(grad, v, out, weights, scale):
    """The gradient of q k^T [..., N, M] in fp32 at least, from that of the output [..., N, D]."""
    delta = (upcast(grad) * out).sum(-1, keepdim=True)
    weight_grad = upcast(grad @ v.transpose(2, 3))
    return (weight_grad - delta) * weights * scale


def merge_own(q, out, lse, own, mask=None):
    """Step-0 keys (out [n, A, D], lse [n, A]) and the slot's own keys as one softmax: its output and logsumexp.

    own: keys [n, G, i, D] and values [n, G, i, D] of i later steps. mask [A/G, i] is added to their scores.
    """
    keys, values = own
    groups = keys.shape[1]
    scale = q.shape[-1] ** -0.5
    grouped = q.unflatten(1, (groups, -1))  # [n, G, A/G, D]
    scores = upcast(grouped @ keys.transpose(2, 3)) * scale  # [n, G, A/G, i]
    if mask is not None:
        scores = scores + mask
    scores = scores.flatten(1, 2)  # [n, A, i]
    total = torch.logaddexp(lse, scores.logsumexp(-1))  # [n, A]
    weights = (scores - total[..., None]).exp()
    weights = weights.to(q.dtype).unflatten(1, (groups, -1))
    own_out = (weights @ values).flatten(1, 2)  # [n, A, D]
    share = (lse - total).exp().to(q.dtype)  # [n, A]: of the step-0 keys
    return out * share[..., None] + own_out, total


# ==================== Any device =====================================================================================


class SlotAttention(torch.autograd.Function):
    """One softmax over the step-0 keys up to the slot in its document and over the slot's own keys of later steps.

    q [n, A, D]; k, v [T, G, D]; live [n]: the slots; begin [n]: the first key of each, None where spans begin with it;
    spans: of the plan; mask: as of merge_own; own: keys and values of i later steps, [n, G, i, D] each. Where begin is
    [n, B], the heads of a key head are B queries of each of A/G/B heads. It runs in chunks of queries: nothing of n x T
    is kept.
    """

    @staticmethod
    def forward(
        ctx,
        q,
        k,
        v,
        live,
        begin,
        spans,
        mask,
        *own,
    ):
        wide = torch.promote_types(q.dtype, torch.float32)
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:2], dtype=wide)
        for span in spans:
            queries, _ = slices(span)
            inputs = span_inputs(q, k, v, live, begin, span)
            part_out, part_lse = attend_keys(*inputs)
            out[queries] = ungrouped(part_out, queries)
            lse[queries] = ungrouped(part_lse, queries)
        if own:
            out, lse = merge_own(q, out, lse, own, mask)
        ctx.save_for_backward(q, k, v, live, begin, mask, out, lse, *own)
        ctx.spans = spans
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, live, begin, own_mask, out, lse, *own = ctx.saved_tensors
        groups = k.shape[1]
        wide = lse.dtype
        dq = torch.empty_like(q)
        dk = torch.zeros_like(k, dtype=wide)  # added up over spans in fp32
        dv = torch.zeros_like(v, dtype=wide)
        for span in ctx.spans:
            queries, keys = slices(span)
            *inputs, mask = span_inputs(q, k, v, live, begin, span)
            span_grad = grouped(grad[queries], groups)
            span_out = grouped(out[queries], groups)
            span_lse = grouped(lse[queries], groups)
            part_dq, part_dk, part_dv = attend_keys_backward(
                span_grad,
                *inputs,
                span_out,
                span_lse,
                mask,
            )
            dq[queries] = ungrouped(part_dq, queries)
            dk[keys] += part_dk[0].transpose(0, 1)
            dv[keys] += part_dv[0].transpose(0, 1)
        own_grads = ()
        if own:
            own_dq, *own_grads = own_backward(grad, q, out, lse, own, own_mask)
            dq += own_dq
        return dq, dk.to(q.dtype), dv.to(q.dtype), None, None, None, None, *own_grads


def own_backward(grad, q, out, lse, own, mask=None):
    """Gradients of q [n, A, D] and of the slot's own keys and values, which are a part of the softmax."""
    keys, values = own
    groups = keys.shape[1]
    scale = q.shape[-1] ** -0.5
    shape = (groups, -1)
    q = q.unflatten(1, shape)  # [n, G, A/G, D]
    grad = grad.unflatten(1, shape)
    out = out.unflatten(1, shape)
    lse = lse.unflatten(1, shape)[..., None]
    scores = upcast(q @ keys.transpose(2, 3)) * scale
    if mask is not None:
        scores = scores + mask
    weights = (scores - lse).exp()
    score_grad = gradient_of_scores(grad, values, out, weights, scale)
    score_grad = score_grad.to(q.dtype)
    weights = weights.to(q.dtype)
    dq = (score_grad @ keys).flatten(1, 2)
    dk = score_grad.transpose(2, 3) @ q
    dv = weights.transpose(2, 3) @ grad
    return dq, dk, dv


def slices(span):
    """The slices of queries and of keys of a span (first query, end query, first key, end key)."""
    first, end, first_key, end_key = span
    return slice(first, end), slice(first_key, end_key)


def span_inputs(q, k, v, live, begin, span):
    """q, k, v and the mask of a span as attend_keys takes them."""
    queries, keys = slices(span)
    groups = k.shape[1]
    shared = q.shape[1] // groups  # heads that share a key head
    tokens = torch.arange(keys.start, keys.stop, device=live.device)
    unseen = tokens > live[queries, None]
    if begin is not None and begin.dim() == 2:
        before = tokens < begin[queries].T[..., None]  # [B, N, M]
        unseen = (before | unseen).flatten(0, 1)
    elif begin is not None:
        unseen |= tokens < begin[queries, None]
    mask = q.new_zeros(unseen.shape)
    mask.masked_fill_(unseen, -math.inf)
    count = queries.stop - queries.start
    mask = mask.repeat(shared * count // len(mask), 1)[None, None]
    q = grouped(q[queries], groups)
    k = k[None, keys].transpose(1, 2)
    v = v[None, keys].transpose(1, 2)
    return q, k, v, mask


def grouped(x, groups):
    """[N, A, ...] -> [1, G, A/G · N, ...]: the heads that share a key head are further queries of it."""
    x = x.unflatten(1, (groups, -1))  # [N, G, A/G, ...]
    return x.movedim(0, 2).flatten(1, 2)[None]


def ungrouped(x, queries):
    """[1, G, A/G · N, ...] -> [N, A, ...]"""
    count = queries.stop - queries.start
    x = x[0].unflatten(1, (-1, count))  # [G, A/G, N, ...]
    return x.movedim(2, 0).flatten(1, 2)


# ==================== GPUs ===========================================================================================


def flex_slots(
    q,  # [n, A, D]
    k,  # [T, G, D]
    v,
    own,
    live,  # [n]
    begin,  # [n]: the first key that each slot sees; or [n, B], as of SlotAttention
    blocks,  # of the plan
    own_mask=None,
):
    """What SlotAttention computes, with FlexAttention's kernel for the step-0 keys; n > 0.

    Queries and keys are padded to full blocks, two at least, so that no length is special and none has the kernel
    compiled again.
    """
    count = len(q)
    size = slots.BLOCK
    padded = max(slots.block_count(count), 2) * size
    rows = torch.arange(padded, device=q.device)
    rows = rows.clamp(max=count - 1)  # the last query fills the padding
    live = live[rows]
    begin = begin[rows]

    def visible(b, h, query, key):
        return (begin[query] <= key) & (key <= live[query])

    def visible_of_many(b, h, query, key):
        return (begin[query, h % begin.shape[1]] <= key) & (key <= live[query])

    queries = q.index_select(0, rows)
    queries = queries.transpose(0, 1)[None]  # [1, A, N, D]
    keys = padded_keys(k, size)  # [1, G, M, D]
    values = padded_keys(v, size)
    lengths = (queries.shape[2], keys.shape[2])
    mask = block_mask(blocks, rows, lengths, visible if begin.dim() == 1 else visible_of_many)
    attend = compiled(flex_attention) if q.is_cuda else flex_attention
    out, aux = attend(
        queries,
        keys,
        values,
        block_mask=mask,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
    )
    out = out[0].transpose(0, 1)[:count]
    lse = aux.lse[0].transpose(0, 1)[:count]
    if not own:
        return out
    out, _ = merge_own(q, out, lse, own, own_mask)
    return out


def padded_keys(x, size):
    """[T, G, D] -> [1, G, M, D], M a multiple of `size`, at least twice it."""
    length = max(math.ceil(len(x) / size), 2) * size
    missing = length - len(x)
    x = F.pad(x, (0, 0, 0, 0, 0, missing))
    return x.transpose(0, 1)[None]


def block_mask(blocks, rows, lengths, visible):
    """The BlockMask of a step: per block of queries its partial key blocks, then its full ones, as lists of indices.

    A block of queries sees key blocks first ... end, of which full ... full_end are seen completely.
    """
    size = slots.BLOCK
    of_queries = rows[::size] // size
    blocks = blocks[:, of_queries].int()
    first, full, full_end, end = blocks[:, None, None, :, None]  # [1, 1, query blocks, 1] each
    count = lengths[1] // size
    at = torch.arange(count, device=rows.device, dtype=torch.int32)
    full_count = full_end - full
    before = full - first  # partial blocks before the full ones; the others come after them
    partial_count = before + end - full_end
    partial = torch.where(at < before, first + at, first + at + full_count)
    last = count - 1
    return BlockMask.from_kv_blocks(
        partial_count[..., 0],
        partial.clamp(max=last),
        full_count[..., 0],
        (full + at).clamp(max=last),
        BLOCK_SIZE=size,
        seq_lengths=lengths,
        mask_mod=visible,
    )


# ==================== Either way =====================================================================================


def attend_slots(backend, view, position_ids, queries, q, keys):
    """Attention [n, A, D] of queries q over the step-0 keys in their view up to their slot, and over the slot's own."""
    k, v = keys.first
    live = queries.slots
    begin = None
    if view.window or backend == "flex_attention":
        begin = live - position_ids[live]  # the first token of each slot's document
        begin = slots.first_keys(begin, live, queries.step, view.window)
    if backend == "flex_attention" and len(live) > 0:
        blocks = view.blocks.split(view.sizes, dim=1)[queries.entry]
        return flex_slots(q, k, v, keys.own, live, begin, blocks)
    spans = view.spans[queries.entry]
    return SlotAttention.apply(q, k, v, live, begin, spans, None, *keys.own)


def attend_blocks(backend, view, is_causal, position_ids, live, q, context, own):
    """Attention of blocks behind the slots `live` [N], over the keys of the context up to the slot, and their own.

    q [N, B, A, D] -> [N, B, A, D]; context: k, v [T, G, D]; own: k, v [N, B, G, D]. A block sees all of itself, with
    is_causal each query up to itself. In a window the keys of the context move on with the queries of the block.

    The B queries of a block see the same keys: they are further heads of one query of SlotAttention.
    """
    k, v = context
    size = q.shape[1]
    groups = k.shape[1]
    q = q.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)  # [N, G, A/G, B, D]
    shape = q.shape
    shared = shape[2]
    q = q.flatten(1, 3)  # [N, A · B, D]
    own = [x.transpose(1, 2).contiguous() for x in own]  # [N, G, B, D]
    mask = None
    if is_causal:
        wide = torch.promote_types(q.dtype, torch.float32)
        mask = torch.full((size, size), -math.inf, dtype=wide, device=q.device)
        mask = mask.triu(1).repeat(shared, 1)  # [A/G · B, B]
    begin = None
    if view.window or backend == "flex_attention":
        begin = live - position_ids[live]
    if view.window:
        steps = torch.arange(1, size + 1, device=live.device)
        begin = slots.first_keys(begin[:, None], live[:, None], steps, view.window)  # [N, B]
    if backend == "flex_attention" and len(live) > 0:
        out = flex_slots(q, k, v, own, live, begin, view.blocks, mask)
    else:
        out = SlotAttention.apply(q, k, v, live, begin, view.spans[0], mask, *own)
    out = out.view(shape).permute(0, 3, 1, 2, 4)  # [N, B, G, A/G, D]
    return out.flatten(2, 3)
