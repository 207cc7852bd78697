"""Blocks: which anchors a draft is trained at, what its blocks read, and which predictions count.

A block behind slot j has its anchor x[j+1] and then masks. Its prediction i is about x[j+2+i], which follows the token
x[j+1+i]: so slot j is supervised at prediction i as it is at ttt_step i of EAGLE-3 (core/slots.py), where all tokens
from the anchor on are the assistant's, in one reply. DFlash has a prediction at each mask, DSpark at each token of the
block.
"""

import itertools
from typing import NamedTuple

import torch

from core import slots


class Plan(NamedTuple):
    """The N blocks of a micro-batch, of P predictions each. Rows are predictions, block by block: R = N · P in all."""

    slots: torch.Tensor  # [N]: the token before each anchor, ascending
    valid: torch.Tensor  # bool [N, P]: which predictions count; the first of each block
    views: dict  # {window: slots.View}: which keys of the context blocks see
    teachers: torch.Tensor  # [U]: the tokens whose teacher is read, ascending
    order: torch.Tensor  # [R]: the rows as they are
    places: torch.Tensor  # [R]: the place of each row's teacher in `teachers`
    chunks: list  # (first teacher, end teacher, first row, end row): whole blocks that the head computes at a time


def plan_blocks(supervised, chosen, lengths, windows, size):
    """The Plan of blocks of `size` tokens behind the slots `chosen` (bool [T]).

    supervised bool [P, T]: at each prediction, the chosen ones at the first; windows: of each layer, 0 = none.
    """
    live = chosen.nonzero().flatten()
    valid = supervised[:, live].T
    starts = torch.tensor([0, *itertools.accumulate(lengths)])
    views = {window: view_context(live, starts, window, size) for window in set(windows)}

    # A prediction that does not count takes the teacher of the block's last one that does.
    ahead = torch.arange(len(supervised)).minimum(valid.sum(dim=1, keepdim=True) - 1)  # [N, P]
    tokens = live[:, None] + 1 + ahead
    teachers, places = tokens.unique(return_inverse=True)
    return Plan(
        slots=live,
        valid=valid,
        views=views,
        teachers=teachers,
        order=torch.arange(valid.numel()),
        places=places.flatten(),
        chunks=cut_chunks(places),
    )


def view_context(live, starts, window, size):
    """The View of blocks of `size` tokens behind the slots live [N]; starts [documents + 1]."""
    begin = starts[torch.searchsorted(starts, live, right=True) - 1]
    first = slots.first_keys(begin, live, 1, window)  # of the anchor
    last = slots.first_keys(begin, live, size, window)  # of the block's last token
    spans = slots.cut_spans(live, starts, first, max(slots.QUERY_CHUNK // size, 1))
    found = slots.find_blocks(live, first, last)
    return slots.View(window, [spans], found, [found.shape[1]])


def cut_chunks(places):
    """Blocks in chunks of at most slots.HEAD_ROWS rows and slots.HEAD_TOKENS teachers: [(first, end teacher, first, end
    row)].

    places [N, P]: of the teachers that each block reads; ascending from block to block.
    """
    count = places.shape[1]
    firsts = places[:, 0].tolist()
    ends = places[:, -1] + 1
    chunks = []
    at = 0
    while at < len(firsts):
        fitting = int(torch.searchsorted(ends, firsts[at] + slots.HEAD_TOKENS, right=True))
        stop = min(fitting, at + slots.HEAD_ROWS // count)
        stop = max(stop, at + 1)
        chunks.append((firsts[at], int(ends[stop - 1]), at * count, stop * count))
        at = stop
    return chunks
