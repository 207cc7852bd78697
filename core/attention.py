"""attention."""

import functools
import math

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from core import slots

MASKED_KERNEL = ("cpu",)  # devices with an attention kernel that takes any mask and returns the logsumexp


def upcast(x):
    """x in fp32 at least: half-precision inputs are normalised and summed in fp32, float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def attend_keys(q, k, v, mask):
    """softmax(q k^T / sqrt(D) + mask) v and its logsumexp; q [1, G, N, D], k and v [1, G, M, D], mask [1, 1, N, M]."""
    if q.device.type in MASKED_KERNEL:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=mask)
    scores = upcast(q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5 + mask
    return scores.softmax(-1).to(q.dtype) @ v, scores.logsumexp(-1)


def attend_keys_backward(grad, q, k, v, out, lse, mask):
    """Gradients of q, k and v if these keys are part of a softmax with the whole output `out` and logsumexp `lse`."""
    if q.device.type in MASKED_KERNEL:
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return backward(grad, q, k, v, out, lse, 0.0, False, attn_mask=mask)
    scale = q.shape[-1] ** -0.5
    weights = (upcast(q @ k.transpose(2, 3)) * scale + mask - lse[..., None]).exp()
    delta = (upcast(grad) * out).sum(-1, keepdim=True)
    scores = ((upcast(grad @ v.transpose(2, 3)) - delta) * weights * scale).to(q.dtype)
    return scores @ k, scores.transpose(2, 3) @ q, weights.to(q.dtype).transpose(2, 3) @ grad


def merge_own(q, out, lse, own):
    """Attention over step-0 keys (out [n, A, D], lse [n, A]) and the slot's own keys as one softmax, and its logsumexp.

    own: keys [n, G, i, D] and values [n, G, i, D] of i later steps.
    """
    groups = own[0].shape[1]
    scores = upcast(q.unflatten(1, (groups, -1)) @ own[0].transpose(2, 3)).flatten(1, 2) * q.shape[-1] ** -0.5
    whole = torch.logaddexp(lse, scores.logsumexp(-1))
    weights = (scores - whole[..., None]).exp().to(q.dtype).unflatten(1, (groups, -1))
    out = out * (lse - whole).exp()[..., None].to(q.dtype) + (weights @ own[1]).flatten(1, 2)
    return out, whole


class SlotAttention(torch.autograd.Function):
    """One softmax over the step-0 keys up to the slot in its document and over the slot's own keys of later steps.

    q [n, A, D]; k, v [T, G, D]; live [n]: the slots; own: keys and values of i later steps, [n, G, i, D] each. Chunk by
    chunk of queries, nothing of n x T is kept. In the backward pass a part of a softmax needs no more than the whole's
    output and logsumexp (ring attention, arXiv 2310.01889).
    """

    @staticmethod
    def chunks(q, k, v, live, spans):
        """Per span its queries' slice, its keys' slice, q and k and v [1, G, ., D], and the mask."""
        groups = k.shape[1]
        for first, end, key, stop in spans:
            hidden = torch.arange(key, stop, device=live.device) > live[first:end, None]
            mask = q.new_zeros(hidden.shape).masked_fill_(hidden, -math.inf).repeat(q.shape[1] // groups, 1)
            parts = [SlotAttention.grouped(q[first:end], groups)] + [x[None, key:stop].transpose(1, 2) for x in (k, v)]
            yield slice(first, end), slice(key, stop), parts, mask[None, None]

    @staticmethod
    def grouped(x, groups):
        """[N, A, ...] -> [1, G, A/G · N, ...]: the heads that share a key head are further queries of it."""
        return x.unflatten(1, (groups, -1)).movedim(0, 2).flatten(1, 2)[None]

    @staticmethod
    def ungrouped(x, queries):
        """[1, G, A/G · N, ...] -> [N, A, ...]"""
        return x[0].unflatten(1, (-1, queries.stop - queries.start)).movedim(2, 0).flatten(1, 2)

    @staticmethod
    def forward(ctx, q, k, v, live, spans, *own):
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
        for queries, _, parts, mask in SlotAttention.chunks(q, k, v, live, spans):
            out[queries], lse[queries] = (SlotAttention.ungrouped(x, queries) for x in attend_keys(*parts, mask))
        if own:
            out, lse = merge_own(q, out, lse, own)
        ctx.save_for_backward(q, k, v, live, out, lse, *own)
        ctx.spans = spans
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, live, out, lse, *own = ctx.saved_tensors
        groups, scale = k.shape[1], q.shape[-1] ** -0.5
        dq, dk, dv = torch.empty_like(q), *(torch.zeros_like(x, dtype=upcast(x[:0]).dtype) for x in (k, v))
        for queries, keys, parts, mask in SlotAttention.chunks(q, k, v, live, ctx.spans):
            whole = [SlotAttention.grouped(x[queries], groups) for x in (grad, out, lse)]
            parts = attend_keys_backward(whole[0], *parts, *whole[1:], mask)
            dq[queries] = SlotAttention.ungrouped(parts[0], queries)
            dk[keys] += parts[1][0].transpose(0, 1)
            dv[keys] += parts[2][0].transpose(0, 1)
        if own:
            delta = (upcast(grad) * out).sum(-1, keepdim=True)
            q, grad, delta, lse = (x.unflatten(1, (groups, -1)) for x in (q, grad, delta, lse[..., None]))
            weights = (upcast(q @ own[0].transpose(2, 3)) * scale - lse).exp()
            scores = ((upcast(grad @ own[1].transpose(2, 3)) - delta) * weights * scale).to(q.dtype)
            dq += (scores @ own[0]).flatten(1, 2)
            own = scores.transpose(2, 3) @ q, weights.to(q.dtype).transpose(2, 3) @ grad
        return dq, dk.to(q.dtype), dv.to(q.dtype), None, None, *own


compiled = functools.cache(functools.partial(torch.compile, dynamic=True, fullgraph=True))


def flex_slots(q, k, v, own, live, begin, blocks):
    """What SlotAttention computes, with FlexAttention's kernel for the step-0 keys; n > 0.

    begin [n]: the first token of each slot's document; blocks: of the plan. Queries and keys are rounded up to whole
    blocks, and to two of them, so that no length is special and none has the kernel compiled anew.
    """
    count, rows = (
        len(q),
        torch.arange(max(-(-len(q) // slots.BLOCK), 2) * slots.BLOCK, device=q.device).clamp(max=len(q) - 1),
    )
    live, begin = live[rows], begin[rows]
    missing = max(-len(k) % slots.BLOCK, 2 * slots.BLOCK - len(k))
    keys, values = (F.pad(x, (0, 0, 0, 0, 0, missing)).transpose(0, 1)[None] for x in (k, v))
    first, full, full_end, end = blocks[
        :, None, None, rows[:: slots.BLOCK] // slots.BLOCK, None
    ].int()  # [1, 1, query blocks, 1]
    at = torch.arange(keys.shape[2] // slots.BLOCK, device=q.device, dtype=torch.int32)
    partial = torch.where(at < full - first, first + at, at + full_end - full + first)
    mask = BlockMask.from_kv_blocks(
        (full - first + end - full_end)[..., 0],
        partial.clamp(max=len(at) - 1),
        (full_end - full)[..., 0],
        (full + at).clamp(max=len(at) - 1),
        BLOCK_SIZE=slots.BLOCK,
        seq_lengths=(len(rows), keys.shape[2]),
        mask_mod=lambda b, h, q, key: (begin[q] <= key) & (key <= live[q]),
    )
    attend = compiled(flex_attention) if q.device.type == "cuda" else flex_attention
    queries = q.index_select(0, rows).transpose(0, 1)[None]
    out, aux = attend(queries, keys, values, block_mask=mask, enable_gqa=True, return_aux=AuxRequest(lse=True))
    out, lse = out[0].transpose(0, 1)[:count], aux.lse[0].transpose(0, 1)[:count]
    return merge_own(q, out, lse, own)[0] if own else out
