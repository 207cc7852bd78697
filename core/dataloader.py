"""dataloader."""

import functools
import itertools
import json
import math
import signal
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from core import common, slots

FORMAT_VERSION = 1  # part of the fingerprint: raise it whenever the same input would give other rows


# ---------------------------------------------------------------------------- reading what this script wrote
def open_data(folder):
    """(DatasetDict, data_config) of a prepared folder; columns input_ids int32, loss_mask uint8, length int32."""
    from datasets import DatasetDict

    for name in ("data_config.json", "dataset_dict.json", "token_freq.pt", "train"):
        if not Path(folder, name).exists():
            common.fail(f"{folder} is not a complete prepared data set: {name} is missing; run prepare_data.py again")
    config = json.loads(Path(folder, "data_config.json").read_text())
    if (version := config.get("format_version")) != FORMAT_VERSION:
        common.fail(
            f"{folder} has format version {version}, this program reads {FORMAT_VERSION}: run prepare_data.py again"
        )
    return DatasetDict.load_from_disk(str(folder)), config


COLUMNS = ("input_ids", "loss_mask")

STATES = ("aux_hidden_states", "last_hidden_states")  # of a row on the disk


@functools.lru_cache(maxsize=2)
def epoch_order(num_rows, seed, epoch):
    """Permutation of the rows in one epoch, int64 [num_rows], read-only; the same on every rank and machine."""
    # RandomState, because NumPy promises that its stream never changes: a run resumed years later sees the same order.
    order = np.random.RandomState([seed % 2**32, epoch]).permutation(num_rows).astype(np.int64)
    order.setflags(write=False)  # it is kept for the epoch's other steps
    return order


def measure_rows(split):
    """(tokens, supervised tokens) of each row: int64 [rows] twice."""
    lengths, supervised = [], []
    for batch in split.select_columns("loss_mask").with_format("arrow").iter(batch_size=1000):
        mask = batch["loss_mask"].combine_chunks()
        lengths.append(mask.value_lengths())
        supervised.append(np.bincount(mask.value_parent_indices(), mask.flatten(), minlength=len(mask)))
    return tuple(np.concatenate(parts).astype(np.int64) for parts in (lengths, supervised))


def pack(rows, count, sizes, room, work):
    """rows in `count` lists of sizes up to `room` in all: each in turn into that of least work; None if none fits."""
    lists, load, free = [[] for _ in range(count)], np.zeros(count), np.full(count, room)
    for row in rows:
        fits = free >= sizes[row]
        if not fits.any():
            return None
        least = np.where(fits, load, np.inf).argmin()  # the first of equals
        lists[least].append(row)
        load[least] += work[row]
        free[least] -= sizes[row]
    return lists


def assign(rows, lengths, work, world_size, micro_batch_size, total_seq_len=0):
    """Micro-batches of every rank in an optimizer step on these rows: [rank][micro-batch], each a list of row numbers.

    lengths (tokens), work (any unit): arrays by row number. A micro-batch has at most micro_batch_size rows or, if
    total_seq_len is given, at most so many tokens. The ranks get about the same work and, to stay in step, the same
    number of micro-batches, the last of which may be empty.
    """
    place, longest = {int(row): i for i, row in enumerate(rows)}, lengths[rows].max()
    assert not 0 < total_seq_len < longest, f"total_seq_len {total_seq_len}, but a row has {longest} tokens"
    one, nothing = np.ones_like(lengths), np.zeros_like(work)
    sizes, room = (lengths, total_seq_len) if total_seq_len else (one, micro_batch_size)
    most = len(rows) if total_seq_len else math.ceil(len(rows) / (room * world_size)) * room  # rows of a rank
    shares = pack(sorted(place, key=lambda row: -work[row]), world_size, one, most, work)  # heaviest first
    # First-fit decreasing, as among lists without work the first with room is taken, tells how many a rank needs. The
    # same number of lists is then filled evenly if that fits as well.
    packs = [pack(sorted(share, key=lambda row: -lengths[row]), len(rows), sizes, room, nothing) for share in shares]
    count = max(sum(map(bool, lists)) for lists in packs)
    dealt = [pack(share, count, sizes, room, work) or tight[:count] for share, tight in zip(shares, packs, strict=True)]
    return [[sorted(part, key=place.get) for part in lists] for lists in dealt]


def assign_forwards(dealt, rank, batch_size, together=1, in_step=1):
    """The target's forwards that `rank` takes part in before each micro-batch: [micro-batch][forward] of (rows, first,
    end), where rows[first:end] are the rank's own, batch_size of them in the order of its micro-batches.

    dealt: [rank][micro-batch] lists of rows, none of them empty. Groups of `together` consecutive ranks read each
    other's rows; groups of `in_step` ranks do as many forwards as each other, if need be on a row -1 that nobody reads:
    the target's layers talk to the group in each of them, the draft's to all ranks in between.
    """
    member = rank % together
    group, others = (dealt[rank // size * size :][:size] for size in (together, in_step))
    rows = [list(itertools.chain(*lists)) for lists in group]
    counts = zip(*(itertools.accumulate(map(len, lists)) for lists in others), strict=True)
    due, done, forwards = [-(-max(count) // batch_size) for count in counts], 0, []
    for until in due:
        forwards.append([])
        for at in range(done * batch_size, until * batch_size, batch_size):
            parts = [part[at : at + batch_size] for part in rows]
            first = sum(map(len, parts[:member]))
            forwards[-1].append((list(itertools.chain(*parts)) or [-1], first, first + len(parts[member])))
        done = until
    return forwards


class Steps(torch.utils.data.Dataset):
    """steps[s]: what this rank reads in optimizer step s >= 0, epoch after epoch; len(steps): the steps of one epoch.

    A list of micro-batches, which `deal` made: (sequences, forwards, rows), on the CPU. sequences: (input_ids,
    loss_mask), int64 [S] each; row -1 has four unsupervised tokens, whose gradient is zero: no micro-batch is empty, so
    that the ranks stay in step. forwards: as `deal_forwards` says, with input_ids in the place of rows.

    With a store of hidden states (prepare_hidden_states.py) there are no forwards, but (number, tensors, what is wrong)
    of each sequence, and on_missing "skip" or "warn" puts row -1 in the place of one whose states are missing.
    """

    def __init__(self, split, seed, global_batch_size, rank, world_size, micro_batch_size, total_seq_len=0,
                 batch_size=1, together=1, in_step=1, store=None, name="train", on_missing="raise"):  # fmt: skip
        self.split = split.with_format("torch", columns=list(COLUMNS))
        self.lengths, supervised = measure_rows(split)
        self.work = self.lengths + supervised  # the forward pass of an 8B target, seven steps of its draft: about equal
        self.seed, self.size, self.rank = seed, global_batch_size, rank
        self.dealing, self.forwards = (world_size, micro_batch_size, total_seq_len), (batch_size, together, in_step)
        self.store, self.name, self.on_missing = store, name, on_missing

    def __len__(self):
        return math.ceil(len(self.split) / self.size)

    def __getitem__(self, step):
        epoch, index = divmod(step, len(self))
        rows = epoch_order(len(self.split), self.seed, epoch)[index * self.size : (index + 1) * self.size]
        dealt = assign(rows, self.lengths, self.work, *self.dealing)
        dealt = [[part or [-1] for part in lists] for lists in dealt]
        if self.store:
            return [(*self.stored(part), part) for part in dealt[self.rank]]
        read = functools.cache(self.row)
        return [
            ([read(row) for row in part],
             [([read(row)[0] for row in several], *mine) for several, *mine in forwards], part)
            for part, forwards in zip(dealt[self.rank], assign_forwards(dealt, self.rank, *self.forwards), strict=True)
        ]  # fmt: skip

    def stored(self, rows):
        sequences, states = [], []
        for number in rows:
            tensors, wrong = self.store.read(f"{self.name}/{number}") if number >= 0 else (None, "")
            sequence = self.row(number)
            if tensors and any(tensors.pop(x).tolist() != y.tolist() for x, y in zip(COLUMNS, sequence, strict=True)):
                tensors, wrong = None, "of other tokens"
            sequences.append(self.row(-1) if wrong and self.on_missing in ("skip", "warn") else sequence)
            states.append((number, tensors, wrong))
        return sequences, states

    def row(self, number):
        """(input_ids, loss_mask) of a row, int64 [S] each."""
        if number < 0:
            return (torch.zeros(4, dtype=torch.int64),) * 2
        row = self.split[number]
        return row["input_ids"], row["loss_mask"]


class Place(NamedTuple):
    """Where a tensor was."""

    dtype: torch.dtype
    shape: torch.Size


def collate(micro_batches, steps):
    """Micro-batches of `Steps` as target and objective read them; on the CPU.

    Returns ({dtype: all tensors of it as one [N]}, the batches with a Place for each tensor): a worker needs a file
    descriptor for each tensor that it hands over, and few are pinned and copied to the device.
    """
    batches, tensors = [], {}
    for sequences, states, rows in micro_batches:
        input_ids, masks = zip(*sequences, strict=True)
        lengths, loss_mask = [len(ids) for ids in input_ids], torch.cat(masks)
        document_ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        plan = slots.plan_slots(slots.supervised_slots(loss_mask, document_ids, steps), lengths)
        batch = {"input_ids": torch.cat(input_ids), "position_ids": slots.positions_of(lengths), "loss_mask": loss_mask}
        batch |= {"lengths": lengths, "rows": rows, **plan._asdict()}
        if states and isinstance(states[0][0], int):
            batch |= join_stored(states, sequences)
        else:
            batch |= join_forwards(states)
        for x in batch.values():
            if torch.is_tensor(x):
                tensors.setdefault(x.dtype, []).append(x.flatten())
        batches.append({name: Place(x.dtype, x.shape) if torch.is_tensor(x) else x for name, x in batch.items()})
    return {dtype: torch.cat(parts) for dtype, parts in tensors.items()}, batches


def put_back(tensors, batches, device):
    """The batches of `collate` with their tensors, on device, where it left a Place."""
    parts = {}
    for dtype, flat in tensors.items():
        places = [x for batch in batches for x in batch.values() if isinstance(x, Place) and x.dtype == dtype]
        parts[dtype] = iter(flat.to(device, non_blocking=True).split([math.prod(x.shape) for x in places]))
    return [
        {key: next(parts[x.dtype]).view(x.shape) if isinstance(x, Place) else x for key, x in batch.items()}
        for batch in batches
    ]


def join_forwards(forwards):
    """The target's forwards before a batch: their tokens behind one another, and [(lengths, first, end)]."""
    tokens = [ids for several, *_ in forwards for ids in several] or [torch.zeros(0, dtype=torch.int64)]
    lengths = [([len(ids) for ids in several], *mine) for several, *mine in forwards]
    return {"forward_ids": torch.cat(tokens), "forwards": lengths}


def join_stored(states, sequences):
    """Stored hidden states of a batch behind one another, where in the batch they belong, and what is `wrong`:
    [(row, reason or "", its first token)]."""
    joined, wrong, start = {}, [], 0
    for (number, tensors, reason), (input_ids, loss_mask) in zip(states, sequences, strict=True):
        wrong.append((number, reason, start))
        if tensors:
            count, teachers = slots.tokens_read(loss_mask)
            tensors |= {"aux_at": torch.arange(start, start + count), "last_at": start + teachers}
            for name, tensor in tensors.items():
                joined.setdefault(name, []).append(tensor)
        start += len(input_ids)
    return {"stored": wrong, **{name: torch.cat(parts) for name, parts in joined.items()}}


def read_steps(split, args, target, device, steps=None, name="train", **sizes):
    """Yield this rank's micro-batches of each of `steps` (default: an epoch), read ahead by num_workers processes.

    target: Target, or prepare_hidden_states.Source if hidden states are read from the disk; name: of the split there.
    """
    source = target if args.hidden_states_path else None
    rank, world = dist.get_rank(), dist.get_world_size()
    sizes |= {"batch_size": args.batch_size, "together": args.tp_size}
    sizes |= {"in_step": world if args.target_sharding == "zero3" else args.tp_size, "name": name}
    if source:
        sizes |= {"store": source.store, "on_missing": args.on_missing}
    data = Steps(split, args.seed, rank=rank, world_size=world, **sizes)
    steps = range(len(data)) if steps is None else steps
    for part in source.epochs(steps, len(data)) if source else [steps]:
        loader = DataLoader(
            data,
            sampler=part,
            batch_size=None,
            num_workers=args.num_workers,
            collate_fn=functools.partial(collate, steps=args.ttt_length),
            pin_memory=device.type == "cuda",
            prefetch_factor=args.prefetch_factor if args.num_workers else None,
            worker_init_fn=outlive_signals,
            generator=torch.Generator(),  # it would draw from the global one, more often in a resumed run
        )
        for tensors, batches in source.ahead(loader, data) if source else loader:
            batches = put_back(tensors, batches, device)
            yield source.expect(batches, data) if source else batches


def outlive_signals(worker):
    """In a worker process: leave signals that ask for an end to the training, which still needs what is read ahead."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
