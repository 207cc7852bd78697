"""FlexAttention has no backward on CPUs: what stands in for its kernel, and computes what its block mask says."""

import torch
from torch.nn.attention.flex_attention import AuxOutput


def visible(block_mask, heads, queries, keys):
    """bool [heads, queries, keys]: what a BlockMask lets through, read off its tables of partial and full blocks."""
    seen = torch.zeros(heads, queries, keys, dtype=torch.bool)
    size = block_mask.BLOCK_SIZE[0]
    head = torch.arange(heads)[:, None, None]
    tables = (
        (block_mask.kv_num_blocks, block_mask.kv_indices, False),
        (block_mask.full_kv_num_blocks, block_mask.full_kv_indices, True),
    )
    for counts, indices, full in tables:
        for row, count in enumerate(counts[0, 0].tolist()):
            for column in indices[0, 0, row, :count].tolist():
                rows = slice(row * size, (row + 1) * size)
                columns = slice(column * size, (column + 1) * size)
                assert not seen[:, rows, columns].any(), "a block is visited twice"
                q, k = torch.arange(queries)[rows, None], torch.arange(keys)[columns]
                seen[:, rows, columns] = full or block_mask.mask_mod(0, head, q, k)
    return seen


def in_plain_torch(q, k, v, block_mask, enable_gqa, return_aux):
    """flex_attention as core/attention.py calls it."""
    assert enable_gqa and return_aux.lse
    assert q.shape[2] % block_mask.BLOCK_SIZE[0] == k.shape[2] % block_mask.BLOCK_SIZE[1] == 0
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~visible(block_mask, *q.shape[1:3], k.shape[2]), -torch.inf)
    return scores.softmax(-1) @ v, AuxOutput(lse=scores.logsumexp(-1))
