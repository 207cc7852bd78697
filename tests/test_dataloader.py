"""How tokenised rows are read for training: which rank reads which row in which micro-batch of which optimizer step."""

import contextlib
import itertools
import math
import os
import pickle
import signal
import time
from random import Random
from typing import NamedTuple

import datasets
import numpy as np
import pytest
import torch

import train_eagle3
from core import dataloader, slots, states
from helpers import training

FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "loss_mask": datasets.List(datasets.Value("uint8")),
        "length": datasets.Value("int32"),
    }
)


def random_rows(count, seed=0, longest=40):
    """[(input_ids, loss_mask)]; the first token of each row is its number, so that rows can be told apart."""
    random = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        length = int(random.integers(1, longest + 1))
        mask = (random.random(length) < random.choice([0.0, 0.2, 0.9, 1.0])).astype(int).tolist()
        rows.append(([number, *random.integers(0, 100, length - 1).tolist()], mask))
    return rows


def as_dataset(rows):
    ids, masks = zip(*rows, strict=True)
    columns = {"input_ids": ids, "loss_mask": masks, "length": [len(part) for part in ids]}
    return datasets.Dataset.from_dict(columns, features=FEATURES)


def log_normal(count, random, longest=2048):
    """(lengths, work) as chats have them: tokens, and tokens and supervised tokens together."""
    lengths = np.clip(random.lognormal(6.0, 0.9, count), 2, longest).astype(np.int64)
    return lengths, lengths + (lengths * random.uniform(0.1, 1.0, count)).astype(np.int64)


def first_fit_decreasing(lengths, budget):
    """How many bins it takes: the longest first, each into the first bin with room for it."""
    bins = []
    for length in sorted(lengths, reverse=True):
        open_bins = [i for i, used in enumerate(bins) if used + length <= budget]
        if open_bins:
            bins[open_bins[0]] += length
        else:
            bins.append(length)
    return len(bins)


def cases(count):
    """Random arguments of `deal`; also short steps, ranks without rows, equal rows, work unlike the lengths."""
    random = np.random.default_rng(1)
    for case in range(count):
        total, size = int(random.integers(1, 200)), int(random.integers(1, 65))
        lengths, work = log_normal(total, random) if case % 4 else (np.full(total, 7), np.full(total, 9))
        work = random.permutation(work) if case % 4 == 1 else work
        rows = random.permutation(total)[:size]
        yield rows, lengths, work, int(random.integers(1, 12)), int(random.integers(1, 6)), random


# ---------------------------------------------------------------------------- measuring
def test_rows_are_measured_as_by_counting(tmp_path):
    rows = random_rows(2300)
    whole = as_dataset(rows)
    parts = datasets.concatenate_datasets([as_dataset(rows[:3]), as_dataset(rows[3:1700]), as_dataset(rows[1700:])])
    assert parts.data.column("loss_mask").num_chunks == 3
    chosen = np.random.default_rng(0).permutation(len(rows))[:1500].tolist()
    whole.save_to_disk(str(tmp_path / "disk"), num_shards=3)
    for split, expected in (
        (whole, rows),
        (parts, rows),
        (datasets.load_from_disk(str(tmp_path / "disk")), rows),
        (parts.select(range(5, 1900)), rows[5:1900]),
        (parts.select(chosen), [rows[i] for i in chosen]),
        (
            as_dataset([([1, 2], [1, 1]), ([], []), ([3], [0]), ([], [])]),
            [("ab", [1, 1]), ("", []), ("c", [0]), ("", [])],
        ),
    ):
        (lengths, supervised), (counts, teachers) = dataloader.measure_rows(split), slots.measure_read(split)
        assert lengths.dtype == supervised.dtype == counts.dtype == teachers.dtype == np.int64
        assert lengths.tolist() == [len(ids) for ids, _ in expected]
        assert supervised.tolist() == [sum(mask) for _, mask in expected]
        # A slot of step 0 has two supervised tokens behind it; all up to the last one are read, and one teacher each.
        live = [[j for j in range(len(mask) - 2) if mask[j + 1] and mask[j + 2]] for _, mask in expected]
        assert counts.tolist() == [max(several, default=-1) + 1 for several in live]
        assert teachers.tolist() == list(map(len, live))


# ---------------------------------------------------------------------------- dealing rows out
def test_every_row_is_dealt_once_and_all_ranks_stay_in_step():
    for rows, lengths, work, world, micro, random in cases(150):
        for budget in (0, int(lengths.max() * random.uniform(1, 3))):
            ranks = dataloader.assign(rows, lengths, work, world, micro, budget)
            assert len(ranks) == world and len({len(batches) for batches in ranks}) == 1
            dealt = [row for batches in ranks for batch in batches for row in batch]
            assert sorted(dealt) == sorted(rows.tolist()) and all(type(row) is int for row in dealt)
            place = {row: i for i, row in enumerate(rows.tolist())}
            for batches in ranks:
                assert all([place[row] for row in batch] == sorted(place[row] for row in batch) for batch in batches)
                filled = [bool(batch) for batch in batches]
                assert filled == sorted(filled, reverse=True)  # the empty ones come last
            assert any(batches[-1] for batches in ranks)  # and not on all ranks
            assert list(ranks) == list(dataloader.assign(rows.copy(), lengths, work, world, micro, budget))


def test_a_micro_batch_has_its_number_of_rows_and_a_step_no_more_micro_batches_than_it_takes():
    for rows, lengths, work, world, micro, _ in cases(150):
        ranks = dataloader.assign(rows, lengths, work, world, micro)
        assert len(ranks[0]) == math.ceil(len(rows) / (micro * world))
        assert max(len(batch) for batches in ranks for batch in batches) <= micro
    full = dataloader.assign(np.arange(48), *log_normal(48, np.random.default_rng(0)), 4, 3)
    assert {len(batch) for batches in full for batch in batches} == {3}


def test_a_micro_batch_stays_within_the_token_budget_and_as_few_are_made_as_by_first_fit_decreasing():
    tight = 0
    for rows, lengths, work, world, micro, random in cases(150):
        budget = int(lengths.max() * random.uniform(1, 3))
        ranks = dataloader.assign(rows, lengths, work, world, micro, budget)
        assert max(lengths[batch].sum() for batches in ranks for batch in batches if batch) <= budget
        shares = [[row for batch in batches for row in batch] for batches in ranks]
        assert len(ranks[0]) == max(first_fit_decreasing(lengths[share], budget) for share in shares if share)
        tight += sum(lengths[rows]) > 0.9 * budget * world * len(ranks[0])
    assert tight > 5


def test_a_budget_that_only_the_tightest_packing_meets():
    lengths = np.array([6, 4, 5, 5, 7, 3])
    work = np.array([9, 9, 1, 1, 5, 5])  # by work alone 6 + 5 or 7 + 4 would come together
    ranks = dataloader.assign(np.arange(6), lengths, work, 1, 1, 10)
    assert sorted(lengths[batch].sum() for batch in ranks[0]) == [10, 10, 10]


def test_a_row_beyond_the_budget_is_refused_with_the_numbers():
    with pytest.raises(AssertionError, match="total_seq_len 9, but a row has 10 tokens"):
        dataloader.assign(np.arange(3), np.array([3, 10, 4]), np.ones(3), 2, 1, 9)
    assigned = dataloader.assign(np.array([0, 2]), np.array([3, 10, 4]), np.ones(3), 2, 1, 9)
    assert list(assigned) == [[[0]], [[2]]]  # row 1 is not in it


def plain_assign(rows, lengths, work, world, micro, total):
    """The assignment stated without heaps and arrays: every list is looked at for every row."""

    def pack(rows, count, sizes, room, work):
        lists = [[] for _ in range(count)]
        for row in rows:
            fits = [part for part in lists if sum(sizes[other] for other in part) + sizes[row] <= room]
            if not fits:
                return None
            min(fits, key=lambda part: sum(work[other] for other in part)).append(row)  # the first of equals
        return lists

    rows = rows.tolist()
    ones = dict.fromkeys(rows, 1)
    nothing = dict.fromkeys(rows, 0)
    sizes, room = (lengths, total) if total else (ones, micro)
    most = len(rows) if total else math.ceil(len(rows) / (micro * world)) * micro
    shares = pack(sorted(rows, key=lambda row: -work[row]), world, ones, most, work)
    tight = [pack(sorted(share, key=lambda row: -sizes[row]), len(share), sizes, room, nothing) for share in shares]
    count = max(sum(map(bool, lists)) for lists in tight)
    found = []
    for share, lists in zip(shares, tight, strict=True):
        lists = pack(share, count, sizes, room, work) or [part for part in lists if part]
        lists += [[]] * (count - len(lists))
        found.append([sorted(part, key=rows.index) for part in lists])
    return found


def test_an_assignment_is_that_of_the_plain_statement():
    random = np.random.default_rng(4)
    for _ in range(200):
        lengths = random.integers(1, 41, int(random.integers(1, 40)))
        work = lengths + random.integers(0, 41, len(lengths))
        rows = random.permutation(len(lengths))
        world, micro = int(random.integers(1, 9)), int(random.integers(1, 4))
        total = int(random.choice([0, lengths.max(), 3 * lengths.max()]))
        given = rows, lengths, work, world, micro, total
        assert list(dataloader.assign(*given)) == plain_assign(*given)


@pytest.mark.parametrize("total", [0, 8192])
@pytest.mark.parametrize("sequences", [1, 4, 32])
def test_the_plan_of_a_step_at_1024_ranks_takes_little_time(sequences, total):
    """50 ms a rank are allowed, on a machine of its own; the plain statement takes seconds."""
    random = np.random.default_rng(0)
    lengths, work = log_normal(1024 * sequences, random)
    rows = random.permutation(len(lengths))
    seconds = []
    for _ in range(3):
        started = time.process_time()
        dataloader.assign(rows, lengths, work, 1024, sequences, total)[5]
        seconds.append(time.process_time() - started)
    assert min(seconds) < 0.15


@pytest.mark.parametrize("budget", [0, 4096])
@pytest.mark.parametrize(("world", "micro"), [(2, 1), (8, 1), (8, 4), (16, 2)])
def test_ranks_get_the_same_work(world, micro, budget):
    random, ours, in_turn, slowest, cut = np.random.default_rng(2), [], [], [], []
    for _ in range(10):
        count = 16 * world
        lengths, work = log_normal(5 * count, random)
        rows = random.permutation(5 * count)[:count]
        ranks = dataloader.assign(rows, lengths, work, world, micro, budget)
        mean = work[rows].sum() / world
        ours.append(max(work[sum(batches, [])].sum() for batches in ranks) / mean)
        in_turn.append(max(work[rows[rank::world]].sum() for rank in range(world)) / mean)
        # Ranks in step wait for the slowest in each micro-batch. To compare: rows in turn, cut into micro-batches.
        slowest.append(sum(max(work[batch].sum() for batch in batches) for batches in zip(*ranks, strict=True)) / mean)
        shares = [work[rows[rank::world]] for rank in range(world)]
        cut.append(sum(max(share[i : i + micro].sum() for share in shares) for i in range(0, 16, micro)) / mean)
    assert max(ours) < 1.03 and np.mean(ours) - 1 < 0.1 * (np.mean(in_turn) - 1)
    assert np.mean(slowest) < 1.15 and np.mean(slowest) - 1 < 0.25 * (np.mean(cut) - 1)


# ---------------------------------------------------------------------------- steps
def fetch(data, assigned):
    """As a source of states that has nothing beside the rows."""
    for numbers in assigned[data.rank]:
        yield [data.row(number) for number in numbers], None


def collate(rows, epoch):
    return dataloader.Batch(**dataloader.concatenate(rows, epoch), plan=None, normaliser=0)


def steps_of(split, seed, size, rank, world, micro_batch_size, total_seq_len=0):
    sizes = (seed, size, micro_batch_size, total_seq_len, rank, world)
    return dataloader.Steps(split, fetch, collate, "train", *sizes)


def plain(packed):
    """What the objective reads, without the rows -1 that keep the ranks in step."""
    found = []
    for batch in dataloader.unpack(packed, "cpu"):
        parts = zip(batch.rows, batch.input_ids.split(batch.lengths), batch.loss_mask.split(batch.lengths), strict=True)
        found.append([(ids.tolist(), mask.tolist()) for row, ids, mask in parts if row >= 0])
    return found


@pytest.mark.parametrize("budget", [0, 90])
def test_every_epoch_reads_every_row_once_in_steps_of_the_global_batch(budget):
    rows, world, size = random_rows(53), 3, 12
    split = as_dataset(rows)
    ranks = [steps_of(split, 5, size, rank, world, 2, budget) for rank in range(world)]
    assert {len(steps) for steps in ranks} == {5}
    orders = []
    for epoch in range(3):
        read = []
        for step in range(5 * epoch, 5 * epoch + 5):
            parts = [steps[step] for steps in ranks]
            assert len({len(dataloader.unpack(part, "cpu")) for part in parts}) == 1
            for part in parts:
                assert list(part[1]) == [torch.int64]
                assert all(sum(len(ids) for ids, _ in batch) <= budget or not budget for batch in plain(part))
            items = [item for part in parts for batch in plain(part) for item in batch]
            assert len(items) == (size if step % 5 < 4 else 53 - 4 * size)
            assert all(rows[ids[0]] == (ids, mask) for ids, mask in items)
            assert {ids[0] for ids, _ in items} == set(
                dataloader.epoch_order(53, 5, epoch)[len(read) : len(read) + size].tolist()
            )
            read += [ids[0] for ids, _ in items]
        assert sorted(read) == list(range(53))
        orders.append(read)
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
def test_what_a_step_reads_does_not_depend_on_who_reads_it_and_when():
    split = as_dataset(random_rows(31))

    def fresh():
        return steps_of(split, 0, 8, 1, 2, 2, 100)

    expected = [plain(fresh()[step]) for step in range(9)]  # beyond two epochs of four steps
    for workers in (0, 1, 3):
        for first in (0, 6):
            loader = torch.utils.data.DataLoader(
                fresh(),
                sampler=range(first, 9),
                batch_size=None,
                num_workers=workers,
                prefetch_factor=2 if workers else None,
                collate_fn=plain,
            )
            assert list(loader) == expected[first:], (workers, first)
    copy = pickle.loads(pickle.dumps(fresh()))
    assert [plain(copy[step]) for step in reversed(range(9))] == expected[::-1]


def test_steps_balance_target_and_draft():
    """Two rows are all prompt, two are all reply, of as many tokens each: a rank reads one of both."""
    rows = [([number] * 10, [number % 2] * 10) for number in range(4)]
    for seed in range(10):
        for rank in (0, 1):
            part = plain(steps_of(as_dataset(rows), seed, 4, rank, 2, 2)[0])
            assert sum(sum(mask) for batch in part for _, mask in batch) == 10


def dealings(random, ranks):
    """[rank][micro-batch] of 1 to 4 rows each, as many micro-batches on each rank; every row once."""
    rows, count = iter(range(1000)), random.randrange(1, 5)
    return [[list(itertools.islice(rows, random.randrange(1, 5))) for _ in range(count)] for _ in range(ranks)]


@pytest.mark.parametrize(("together", "in_step"), [(1, 1), (2, 2), (4, 4), (1, 4), (8, 8)])
def test_forwards_of_the_target_keep_ranks_in_step_and_give_each_its_rows_in_time(together, in_step):
    random = Random(together * 10 + in_step)
    for batch_size in (1, 2, 3, 7):
        dealt = dealings(random, 8)
        every = [dataloader.assign_forwards(dealt, rank, batch_size, together, in_step) for rank in range(8)]
        for rank, forwards in enumerate(every):
            got, wanted = [], []
            for part, lists in zip(dealt[rank], forwards, strict=True):
                assert all(0 < end - first <= batch_size or rows for rows, first, end in lists)
                got += [row for rows, first, end in lists for row in rows[first:end]]
                wanted += part
                assert got[: len(wanted)] == wanted, "each row in time, in order"
            assert got == wanted
            neighbours = range(rank // together * together, rank // together * together + together)
            for other in neighbours:
                assert [[rows for rows, *_ in lists] for lists in every[other]] == [
                    [rows for rows, *_ in lists] for lists in forwards
                ], "a group runs the same sequences"
            slices = [[mine for lists in every[other] for _, *mine in lists] for other in neighbours]
            for rows, *mine in zip((r for lists in forwards for r, *_ in lists), *slices, strict=True):
                assert [i for first, end in mine for i in range(first, end)] == list(range(len(rows))) or rows == [-1]
            for other in range(rank // in_step * in_step, rank // in_step * in_step + in_step):
                assert list(map(len, every[other])) == list(map(len, forwards)), "as many forwards before each batch"
            longest = max(
                sum(map(len, dealt[r])) for r in range(rank // in_step * in_step, (rank // in_step + 1) * in_step)
            )
            assert sum(map(len, forwards)) == -(-longest // batch_size), "and no more than the busiest rank needs"


def test_a_rank_without_rows_takes_part_in_the_forwards_and_has_a_batch_without_gradient():
    source = states.Online(None, 1, 1, 2)
    packed = []
    for rank in range(2):
        steps = steps_of(as_dataset(random_rows(5)), 0, 5, rank, 2, 4)
        steps.fetch, steps.collate = source.fetch, train_eagle3.batch_of(training.flags("--ttt_length", 3))
        packed.append(steps[0])
    idle, busy = sorted(
        (dataloader.unpack(part, "cpu") for part in packed), key=lambda part: sum(len(batch.rows) for batch in part)
    )
    assert [len(batch.states) for batch in busy] == [len(batch.states) for batch in idle]
    alone = [forward for batch in idle for forward in batch.states if forward.first == forward.end]
    assert alone and all(forward.input_ids.tolist() == [0] * 4 for forward in alone)
    assert all(batch.normaliser >= 0 for batch in idle)
    # A worker hands over one tensor, whatever a batch holds.
    assert all(list(tensors) == [torch.int64] for _, tensors in packed)


class Pair(NamedTuple):
    count: int
    values: torch.Tensor


def test_tensors_anywhere_in_a_batch_are_packed():
    """A `collate` of one's own may return any containers of tensors and plain values."""
    wide, narrow = torch.arange(6).view(2, 3), torch.tensor([0.5, 1.5])
    batches = [(3, wide), Pair(2, narrow), {"nothing": (), "lengths": [1, 2], "one": torch.tensor(7)}]
    packed, tensors = dataloader.pack_tensors(batches)
    assert {dtype: len(flat) for dtype, flat in tensors.items()} == {torch.int64: 7, torch.float32: 2}
    packed = pickle.loads(pickle.dumps(packed))
    (number, same_wide), pair, rest = dataloader.unpack((packed, tensors), "cpu")
    assert number == 3 and same_wide.equal(wide)
    assert type(pair) is Pair and pair.count == 2 and pair.values.equal(narrow)
    assert rest["nothing"] == () and rest["lengths"] == [1, 2] and rest["one"].equal(torch.tensor(7))


def test_an_epoch_is_one_order_for_all_and_another_one_for_each_seed_and_epoch():
    order = dataloader.epoch_order(21, 5, 0)
    assert order.dtype == np.int64 and sorted(order.tolist()) == list(range(21))
    assert order.tolist() == [1, 13, 14, 8, 17, 6, 11, 18, 10, 5, 7, 4, 0, 3, 9, 12, 15, 19, 20, 2, 16]
    others = [dataloader.epoch_order(21, 5, 1), dataloader.epoch_order(21, 6, 0), dataloader.epoch_order(21, 6, 1)]
    assert len({tuple(each.tolist()) for each in (order, *others)}) == 4
    with pytest.raises(ValueError, match="read-only"):
        order[0] = 1  # every later step of the epoch would read other rows


def test_a_worker_that_is_asked_to_end_in_its_first_moment_reads_on(monkeypatch):
    """The signal reaches all processes of a training at once. torch has it end a worker until its first line runs."""
    for name, value in {"get_rank": 0, "get_world_size": 1}.items():
        monkeypatch.setattr(dataloader.dist, name, lambda value=value: value)
    handlers = torch.utils.data._utils.signal_handling
    begin = handlers._set_worker_signal_handlers

    def begin_and_be_asked():
        begin()
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(handlers, "_set_worker_signal_handlers", begin_and_be_asked)
    args = training.flags("--num_workers", 2)
    steps = dataloader.read_steps(
        as_dataset(random_rows(9)),
        states.Online(None, 2),
        train_eagle3.batch_of(args),
        torch.device("cpu"),
        seed=0,
        global_batch_size=2,
        micro_batch_size=2,
        num_workers=2,
        prefetch_factor=2,
    )
    with contextlib.closing(steps):
        assert len(list(steps)) == 5
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set(), "the training itself has them blocked"


@pytest.mark.parametrize("steps", [1, 2, 5, 12])
def test_rows_with_a_slot_are_counted(steps):
    """Against the rule, row by row; also a row that is supervised from its first token on."""
    rows = [*random_rows(300, seed=steps), ([7] * 9, [1] * 9), ([7] * 2, [1] * 2), ([7], [1])]
    masks = [torch.tensor(mask) for _, mask in rows]
    expected = 0
    for mask in masks:
        expected += bool(slots.supervised_slots(mask, torch.zeros_like(mask), steps)[-1].any())
    assert 0 < expected < len(rows)
    assert slots.check_slots("data", as_dataset(rows), steps) == expected
