"""Slots: which drafts are supervised, where they are, and what they read.

Slot j of a document drafts x[j+2+i] at ttt_step i from the token x[j+1+i]. `plan_slots` turns the loss mask of a
micro-batch into a `Plan` on the CPU, so that no step of the training waits for the device.
"""

import bisect
import itertools
import math
from typing import NamedTuple

import numpy as np
import torch

from core import common

QUERY_CHUNK = 128  # slots whose attention is computed at a time
BLOCK = 128  # slots and keys in a block of FlexAttention
HEAD_ROWS = 1024  # rows of draft logits that exist at a time
HEAD_TOKENS = 512  # tokens of teacher logits that exist at a time


# ==================== What is supervised =============================================================================


def positions_of(lengths, device=None):
    """Position ids [sum(lengths)] int64 that restart with every sequence."""
    return torch.cat([torch.arange(n, device=device) for n in lengths])


def documents_of(lengths):
    """The index of its sequence for every token, [sum(lengths)] int64."""
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))


def supervised_slots(loss_mask, document_ids, ttt_length):
    """Which slots are supervised at which ttt_step: slot j at step i iff x[j+1] ... x[j+2+i] all are the assistant's.

    loss_mask [T] (1 = produced by the assistant), document_ids [T]; returns bool [ttt_length, T]. A chain starts after
    a token that the target itself produced and ends with the reply; once dead it stays dead.
    """

    def mask_ahead(n):
        """loss_mask n tokens ahead, 0 beyond the document."""
        inside = torch.zeros_like(loss_mask, dtype=torch.bool)
        rest = max(len(loss_mask) - n, 0)
        inside[:rest] = document_ids[n:] == document_ids[:-n]
        return inside & loss_mask.bool().roll(-n)

    alive = mask_ahead(1)
    rows = []
    for i in range(ttt_length):
        alive = alive & mask_ahead(2 + i)
        rows.append(alive)
    return torch.stack(rows)


def acceptance_walk(accepted, loss_mask):
    """Walk each reply of one document as serving does; returns the accepted drafts n_j of every pass of the target.

    accepted: n_j per slot, loss_mask: per token (sequences of int). The target itself produces the reply's first token;
    each pass accepts n_j drafts and adds one token of the target's own, so the walk advances by n_j + 1 slots.
    """
    passes = []
    start = 0
    for supervised, run in itertools.groupby(loss_mask):
        end = start + len(list(run))
        slot = max(start - 1, 0)
        while supervised and slot + 2 < end:
            passes.append(accepted[slot])
            slot += accepted[slot] + 1
        start = end
    return passes


def walk_replies(accepted, loss_mask, lengths):
    """acceptance_walk over concatenated documents of `lengths` tokens; accepted, loss_mask: tensors [T]."""
    passes = []
    for drafts, mask in zip(accepted.split(lengths), loss_mask.split(lengths), strict=True):
        passes += acceptance_walk(drafts.tolist(), mask.tolist())
    return passes


def tokens_read(loss_mask):
    """(n, teachers): training reads the auxiliary states of the first n tokens, and the last states of teachers [U].

    loss_mask [T] of one sequence. No key after the last supervised slot is seen. A teacher is the token after a slot of
    step 0; later steps have the same teachers, further ahead.
    """
    one_document = torch.zeros_like(loss_mask)
    (supervised,) = supervised_slots(loss_mask, one_document, 1)
    live = supervised.nonzero().flatten()
    count = int(live[-1]) + 1 if len(live) else 0
    return count, live + 1


def measure_read(split):
    """(n, number of teachers) of each row, as `tokens_read` defines them: int64 [rows] twice."""
    counts = []
    teachers = []
    for batch in split.select_columns("loss_mask").with_format("arrow").iter(batch_size=1000):
        mask = batch["loss_mask"].combine_chunks()
        values = mask.flatten().to_numpy()
        row = mask.value_parent_indices().to_numpy()
        first = np.cumsum(mask.value_lengths()) - mask.value_lengths()
        live = np.flatnonzero(values[1:-1] & values[2:] & (row[:-2] == row[2:]))  # slots of step 0, of all rows
        count = np.zeros(len(mask), np.int64)
        count[row[live]] = live + 1 - first[row[live]]  # the last slot of a row overwrites the others
        counts.append(count)
        teachers.append(np.bincount(row[live], minlength=len(mask)))
    return np.concatenate(counts), np.concatenate(teachers)


def check_slots(name, split, steps=1):
    """How many rows of a split have a slot that is supervised at all of the first `steps` steps.

    Ends the program if none has.
    """
    count = 0
    for batch in split.select_columns("loss_mask").with_format("arrow").iter(batch_size=1000):
        mask = batch["loss_mask"].combine_chunks()
        count += count_rows(mask.flatten().to_numpy(), mask.value_parent_indices().to_numpy(), steps)
    if count:
        return count
    remedy = ": give a smaller --block_size" if steps > 1 else ""
    common.fail(
        f"{name}: nothing to train on, none of {len(split)} rows has {steps + 1} supervised tokens in a row{remedy}"
    )


def count_rows(mask, rows, steps):
    """check_slots of rows behind one another: their loss mask [T], and the row of each token [T], ascending."""
    supervised = mask.astype(np.int8)  # a copy
    supervised[np.flatnonzero(np.diff(rows, prepend=-1))] = 0  # no slot is before the first token of a row
    edges = np.diff(supervised, prepend=0, append=0)
    first = np.flatnonzero(edges == 1)
    end = np.flatnonzero(edges == -1)
    long = first[end - first > steps]
    return len(np.unique(rows[long]))


# ==================== The plan of a micro-batch ======================================================================


class View(NamedTuple):
    """Which step-0 keys queries see: one entry for the live slots of each ttt_step.

    A further entry is for all slots at step 0: of a layer whose outputs are the next layer's keys.
    """

    window: int  # 0: none
    spans: list  # lists of (first query, end query, first key, end key): at most QUERY_CHUNK queries of one document
    blocks: torch.Tensor  # [4, sum of sizes]: a query block's first key block, first full one, their end, end
    sizes: list  # blocks of queries in each entry


class Chains(NamedTuple):
    """What the Plan of a further ttt_step is made of, where each step decides which chains go on."""

    supervised: torch.Tensor  # bool [K, T]
    starts: list  # the first token of each document, and the end
    windows: tuple
    draws: torch.Tensor | None  # [T] in [0, 1): a chain goes on while its survival is above; None: all go on


class Plan(NamedTuple):
    """Where the live slots of a micro-batch are, for K ttt_steps or, with `chains`, for one.

    Rows are the live slots of its first step, then of the next one, and so on: R in all.
    """

    first: int  # ttt_step
    counts: list  # K ints n_i: live slots of each step
    live: torch.Tensor  # [R]: the slots, ascending in each step
    keep: torch.Tensor  # [R]: their places among the slots of the step before, at step 0 among all
    views: dict  # {window: View}; window 0: all keys of the document
    teachers: torch.Tensor  # [U]: the tokens whose teacher is read, ascending
    order: torch.Tensor  # [R]: rows sorted by the token of their teacher
    places: torch.Tensor  # [R]: in that order, the place of the token in `teachers`
    chunks: list  # (first teacher, end teacher, first row, end row): what the head computes at a time
    chains: Chains | None = None  # None: the plan has all steps
    weights: torch.Tensor | None = None  # [T] of each slot; None: all weigh the same


class Queries(NamedTuple):
    """The slots that have a query in a layer."""

    step: int  # ttt_step
    entry: int  # theirs in a View; -1: of all slots
    slots: torch.Tensor  # [n]


def plan_slots(supervised, lengths, windows=(0,)):
    """The Plan of concatenated documents of `lengths` tokens; supervised bool [K, T], by any rule that only shrinks.

    windows: of each layer of the draft, 0 = none.
    """
    starts = [0, *itertools.accumulate(lengths)]
    live = [row.nonzero().flatten() for row in supervised]
    keep = [live[0]]
    for before, now in itertools.pairwise(live):
        keep.append(torch.searchsorted(before, now))
    return make_plan(0, live, keep, starts, windows)


def plan_chains(supervised, lengths, windows=(0,), draws=None):
    """The Plan of step 0 for chains that `plan_next` carries on; arguments as of plan_slots and Chains."""
    plan = plan_slots(supervised[:1], lengths, windows)
    starts = [0, *itertools.accumulate(lengths)]
    return plan._replace(chains=Chains(supervised, starts, windows, draws))


def plan_next(plan, survival):
    """(Plan of the next step or None, survival [n] of its slots); survival [n] of the slots of `plan`.

    It waits for the device: the plan is made on the CPU.
    """
    chains = plan.chains
    i = plan.first + 1
    if chains is None or i == len(chains.supervised):
        return None, None
    goes_on = chains.supervised[i, plan.live]
    if chains.draws is not None:
        goes_on &= chains.draws[plan.live] < survival
    places = goes_on.nonzero().flatten()
    device = places.device
    live = plan.live[places].cpu()
    following = make_plan(i, [live], [places], chains.starts, chains.windows)
    following = common.map_parts(following, torch.Tensor, lambda tensor: tensor.to(device))
    return following._replace(chains=chains, weights=plan.weights), survival[places]


def choose_slots(candidates, lengths, most, draws):
    """At most `most` candidates of each document, those of the smallest draws: bool [T].

    candidates bool [T], draws [T]; lengths: tokens of each document.
    """
    chosen = torch.zeros_like(candidates)
    parts = (x.split(lengths) for x in (candidates, draws, chosen))
    for allowed, numbers, marks in zip(*parts, strict=True):
        places = allowed.nonzero().flatten()
        if len(places) > most:
            places = places[numbers[places].argsort()[:most]]
        marks[places] = True
    return chosen


def weigh_slots(supervised, chosen, lengths, average):
    """(weights [T] float64, normaliser): a sequence's chosen slots stand for all of its slots.

    supervised, chosen: bool [T], slots of step 0. average: tokens, where each slot counts the same, or sequences, where
    each sequence's mean does.
    """
    weights = []
    count = 0
    for every, part in zip(supervised.split(lengths), chosen.double().split(lengths), strict=True):
        stands_for = every.sum() if average == "tokens" else every.any()
        weights.append(part * stands_for / part.sum().clamp(min=1))
        count += int(stands_for)
    return torch.cat(weights), count


def make_plan(first, live, keep, starts, windows):
    """The Plan of the live slots [n_i] of the ttt_steps from `first` on; keep: as in Plan, step by step."""
    queries = list(enumerate(live, first))
    tokens = torch.cat([slots + 1 + i for i, slots in queries])
    tokens, order = tokens.sort(stable=True)
    teachers, places = tokens.unique_consecutive(return_inverse=True)
    if first == 0 and len(windows) > 1:
        queries.append((0, torch.arange(starts[-1])))
    starts = torch.tensor(starts)
    views = {window: view_keys(queries, starts, window) for window in set(windows)}
    return Plan(
        first=first,
        counts=[len(slots) for slots in live],
        live=torch.cat(live),
        keep=torch.cat(keep),
        views=views,
        teachers=teachers,
        order=order,
        places=places,
        chunks=cut_chunks(places.bincount(minlength=len(teachers))),
    )


def first_keys(begin, slots, i, window):
    """The first step-0 key that each of slots [n] sees at ttt_step i; begin [n]: the first token of its document.

    A window holds the last `window` positions up to the query's own, j + i: it moves on with the chain.
    """
    return torch.maximum(begin, slots + (i + 1 - window)) if window else begin


def view_keys(queries, starts, window):
    """The View of queries [(ttt_step, slots [n])]; starts [documents + 1]: documents' first tokens, and the end."""
    spans = []
    blocks = []
    for i, slots in queries:
        begin = starts[torch.searchsorted(starts, slots, right=True) - 1]
        begin = first_keys(begin, slots, i, window)
        spans.append(cut_spans(slots, starts, begin))
        blocks.append(find_blocks(slots, begin))
    sizes = [part.shape[1] for part in blocks]
    return View(window, spans, torch.cat(blocks, dim=1), sizes)


def cut_spans(slots, starts, begin, size=None):
    """Queries in chunks of one document: [(first query, end query, first key, end key)].

    slots [n] ascending; starts [documents + 1]; begin [n]: the first key that each slot sees; size: of a chunk, none:
    QUERY_CHUNK.
    """
    size = size or QUERY_CHUNK
    spans = []
    borders = torch.searchsorted(slots, starts).tolist()
    for first, end in itertools.pairwise(borders):
        for at in range(first, end, size):
            stop = min(at + size, end)
            spans.append((at, stop, int(begin[at]), int(slots[stop - 1]) + 1))
    return spans


def find_blocks(slots, begin, latest=None):
    """[4, ceil(n / BLOCK)]: per block of queries its first key block, its full key blocks' first and end, its end.

    A key block is full if every query of the block sees all of it: it begins after what the last query sees begins,
    and ends before the first query. begin [n] ascends as slots do. latest [n]: the first key that all queries of a slot
    see, if they differ.
    """
    latest = begin if latest is None else latest
    head = torch.arange(0, len(slots), BLOCK)  # first query of each block
    tail = (head + BLOCK - 1).clamp(max=len(slots) - 1)  # last query
    first = begin[head] // BLOCK
    end = slots[tail] // BLOCK + 1
    full = torch.minimum((latest[tail] + BLOCK - 1) // BLOCK, end)
    full_end = torch.maximum(full, (slots[head] + 1) // BLOCK)
    return torch.stack([first, full, full_end, end])


def cut_chunks(rows_of_teacher):
    """Teachers in chunks of at most HEAD_TOKENS, their rows at most HEAD_ROWS: [(first, end teacher, first, end row)].

    rows_of_teacher [U]: the number of rows that read each teacher, at most K.
    """
    ends = rows_of_teacher.cumsum(0).tolist()
    chunks = []
    first = row = 0
    while first < len(ends):
        fitting = bisect.bisect_right(ends, row + HEAD_ROWS)
        end = min(max(fitting, first + 1), first + HEAD_TOKENS)
        chunks.append((first, end, row, ends[end - 1]))
        first = end
        row = ends[end - 1]
    return chunks


def block_count(count):
    """Blocks of FlexAttention that hold `count` slots."""
    return math.ceil(count / BLOCK)
