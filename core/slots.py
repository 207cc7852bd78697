"""slots."""

import bisect
import itertools
from typing import NamedTuple

import numpy as np
import torch

QUERY_CHUNK = 128  # slots whose attention is formed at a time

BLOCK = 128  # slots and keys of a block of FlexAttention

HEAD_ROWS, HEAD_TOKENS = 1024, 512  # rows of draft logits, and tokens of teacher logits, that exist at a time


def positions_of(lengths, device=None):
    """Position ids [sum(lengths)] int64 that restart with every sequence."""
    return torch.cat([torch.arange(n, device=device) for n in lengths])


def supervised_slots(loss_mask, document_ids, steps):
    """Which slots are supervised at which step: slot j at step i iff x[j+1] ... x[j+2+i] all are the assistant's.

    loss_mask [T] (1 = produced by the assistant), document_ids [T]; returns bool [steps, T]. A chain starts behind a
    token that the target itself produced and ends with the reply; once dead it stays dead.
    """

    def ahead(n):
        """loss_mask n tokens further on, 0 beyond the document."""
        inside = torch.zeros_like(loss_mask, dtype=torch.bool)
        inside[: max(len(loss_mask) - n, 0)] = document_ids[n:] == document_ids[:-n]
        return inside & loss_mask.bool().roll(-n)

    alive, rows = ahead(1), []
    for i in range(steps):
        alive = alive & ahead(2 + i)
        rows.append(alive)
    return torch.stack(rows)


def acceptance_walk(accepted, loss_mask):
    """Walk each reply of one document as serving does; returns the accepted drafts n_j of every pass of the target.

    accepted: n_j per slot, loss_mask: per token (sequences of int). The target itself produces the reply's first token;
    each pass accepts n_j drafts and adds one token of the target's own, so the walk moves on by n_j + 1 slots.
    """
    passes, start = [], 0
    for supervised, run in itertools.groupby(loss_mask):
        end = start + len(list(run))
        slot = max(start - 1, 0)
        while supervised and slot + 2 < end:
            passes.append(accepted[slot])
            slot += accepted[slot] + 1
        start = end
    return passes


class Plan(NamedTuple):
    """Where the live slots of a micro-batch are, for K steps; made on the CPU, so that no step waits for the device.

    Rows are the live slots of step 0, then of step 1, and so on: R in all.
    """

    counts: list  # K ints n_i: live slots of each step
    live: torch.Tensor  # [R]: the slots, ascending in each step
    keep: torch.Tensor  # [R]: their places among those of the step before, at step 0 among all
    spans: list  # K of [(first, end, first key, end)]: at most QUERY_CHUNK queries of one document, and their keys
    blocks: torch.Tensor  # [4, sum n_i / BLOCK]: a query block's first key block, first full one, end of these, end
    teachers: torch.Tensor  # [U]: the tokens whose teacher is read, ascending
    order: torch.Tensor  # [R]: rows by the token of their teacher
    places: torch.Tensor  # [R]: in that order, the place of the token in `teachers`
    chunks: list  # [(first, end teacher, first, end row)]: what the head computes at a time


def plan_slots(supervised, lengths):
    """The Plan for documents of `lengths` tokens behind one another; supervised bool [K, T]: of any shrinking rule."""
    *first_tokens, _ = bounds = [0, *itertools.accumulate(lengths)]
    starts = torch.tensor(bounds)
    live = [row.nonzero().flatten() for row in supervised]
    keep = live[:1] + [torch.searchsorted(before, now) for before, now in itertools.pairwise(live)]
    spans, blocks = [], []
    for slots in live:
        borders = itertools.pairwise(torch.searchsorted(slots, starts).tolist())
        pieces = zip(first_tokens, borders, strict=True)
        cuts = [(at, min(at + QUERY_CHUNK, end), begin) for begin, (first, end) in pieces
                for at in range(first, end, QUERY_CHUNK)]  # fmt: skip
        spans.append([(at, end, begin, int(slots[end - 1]) + 1) for at, end, begin in cuts])
        head = torch.arange(0, len(slots), BLOCK)
        tail = (head + BLOCK - 1).clamp(max=len(slots) - 1)
        begin = starts[torch.searchsorted(starts, slots, right=True) - 1]  # of each slot's document
        first, end = begin[head] // BLOCK, slots[tail] // BLOCK + 1
        # Full: seen whole by every query of the block, so behind the last one's document begins, up to the first slot.
        full = torch.minimum(-(-begin[tail] // BLOCK), end)
        blocks.append(torch.stack([first, full, torch.maximum(full, (slots[head] + 1) // BLOCK), end]))
    tokens, order = torch.cat([slots + 1 + i for i, slots in enumerate(live)]).sort(stable=True)
    teachers, places = tokens.unique_consecutive(return_inverse=True)
    ends, chunks, first, row = places.bincount(minlength=len(teachers)).cumsum(0).tolist(), [], 0, 0
    while first < len(teachers):
        end = min(max(bisect.bisect_right(ends, row + HEAD_ROWS), first + 1), first + HEAD_TOKENS)
        chunks.append((first, end, row, ends[end - 1]))
        first, row = end, ends[end - 1]
    counts, flat = [len(slots) for slots in live], (torch.cat(live), torch.cat(keep))
    return Plan(counts, *flat, spans, torch.cat(blocks, dim=1), teachers, order, places, chunks)


def tokens_read(loss_mask):
    """(n, teachers): training reads the auxiliary states of the first n tokens, and the last ones of teachers [U].

    loss_mask [T] of one sequence. Behind the last slot that is supervised no key is seen. A teacher is the token behind
    a slot of step 0; later steps have the same ones, further on.
    """
    live = supervised_slots(loss_mask, torch.zeros_like(loss_mask), 1)[0].nonzero().flatten()
    return (int(live[-1]) + 1 if len(live) else 0), live + 1


def measure_read(split):
    """(n, number of teachers) of each row, as `tokens_read` says: int64 [rows] twice."""
    counts, teachers = [], []
    for batch in split.select_columns("loss_mask").with_format("arrow").iter(batch_size=1000):
        mask = batch["loss_mask"].combine_chunks()
        values, row = mask.flatten().to_numpy(), mask.value_parent_indices().to_numpy()
        first = np.cumsum(mask.value_lengths()) - mask.value_lengths()
        live = np.flatnonzero(values[1:-1] & values[2:] & (row[:-2] == row[2:]))  # slots of step 0, of all rows
        counts.append(np.zeros(len(mask), np.int64))
        counts[-1][row[live]] = live + 1 - first[row[live]]  # of a row's slots the last one stays
        teachers.append(np.bincount(row[live], minlength=len(mask)))
    return np.concatenate(counts), np.concatenate(teachers)
