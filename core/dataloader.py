"""The data loader: the prepared folder's reader, the order of rows, their assignment to ranks, batches.

In:  a folder written by prepare_data.py; the number of ranks and the sizes of batches.
Out: per rank and optimizer step its micro-batches: complete sequences, concatenated without padding, and beside each
     what a source of hidden states (core/states.py) fetches for it. It knows no draft: the trainer hands in
     `collate`, which makes a Batch of rows.
"""

import contextlib
import functools
import heapq
import itertools
import json
import math
import os
import shutil
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from core import common, slots, waits

FORMAT_VERSION = 3  # part of the fingerprint: raise it whenever the same input would give other rows
COLUMNS = ("input_ids", "loss_mask")
PARTS = {  # of a prepared folder
    "data_config.json", "dataset_dict.json", "token_freq.pt", "rejected.jsonl", "train", "validation",
}  # fmt: skip
SHARED_MEMORY = Path("/dev/shm")
SHARED_PATIENCE = 60  # seconds that a worker waits for room there

# ==================== The prepared folder ============================================================================


def open_data(folder):
    """(DatasetDict, data_config) of a prepared folder; columns input_ids int32, loss_mask uint8, length int32.

    None, of a dry run without data: no splits.
    """
    from datasets import DatasetDict

    if folder is None:
        return DatasetDict(), {"fingerprint": None, "splits": {}}
    is_saved = Path(folder, "state.json").is_file() or Path(folder, "dataset_dict.json").is_file()
    if is_saved and not Path(folder, "data_config.json").is_file():
        common.fail(
            f"{folder} is a data set, but not one that prepare_data.py wrote (data_config.json is missing): python "
            f"prepare_data.py --dataset {folder} --target_model_path TARGET --output_path {folder}.prepared"
        )
    for name in ("data_config.json", "dataset_dict.json", "token_freq.pt", "train"):
        if not Path(folder, name).exists():
            common.fail(f"{folder} is not a complete prepared data set: {name} is missing; run prepare_data.py again")
    config = read_config(folder)
    try:
        return DatasetDict.load_from_disk(str(folder)), config
    except Exception as error:  # of several libraries; what damaged files raise
        problem = common.find_damage(folder, config["files"]) or f"{type(error).__name__}: {error}"
        common.fail(f"{folder} is damaged: {problem}; run prepare_data.py again")


def read_config(folder):
    """The data_config.json of a prepared folder; ends the program if it is of another version or damaged."""
    path = Path(folder, "data_config.json")
    config = common.read_sealed(path)
    if config and config["format_version"] == FORMAT_VERSION:
        return config
    problem = f"{path} is not as it was written"
    with contextlib.suppress(ValueError, AttributeError, RecursionError):
        found = json.loads(path.read_text())
        version = found.get("format_version")
        if version != FORMAT_VERSION:
            problem = f"{folder} has format version {version}, this program reads {FORMAT_VERSION}"
        elif "hash" not in found:
            problem = f"{folder} has no checksums, an earlier version has written it"
    common.fail(f"{problem}: run prepare_data.py again")


def measure_files(folder):
    """{name: common.measure_file} of the files of a prepared folder, without data_config.json."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file() and path.name != "data_config.json")
    return {str(path.relative_to(folder)): common.measure_file(path) for path in paths}


def is_of(folder, fingerprint):
    """Whether a prepared folder has this fingerprint and is as it was written."""
    path = folder / "data_config.json"
    config = common.read_sealed(path) if path.is_file() else None
    return bool(config) and config["fingerprint"] == fingerprint and not common.find_damage(folder, config["files"])


def check_replaceable(output):
    """End the program if a folder, which is to be replaced by a prepared one, holds anything else than such a one.

    A volume may have what a killed program has left: files without data_config.json, which is written last.
    """
    leftovers = {f".{output.name}.building", f".{output.name}.preparing", "lost+found"}  # an empty volume has the last
    held = {path.name for path in output.glob("*")} - leftovers
    others = sorted(held - PARTS)
    is_prepared = "data_config.json" in held
    if is_prepared and others:
        names = ", ".join(others[:3])
        common.fail(f"output_path {output} holds {names} beside prepared data: move it, or choose another folder")
    if others or output.is_file() or (held and not is_prepared and not os.path.ismount(output)):
        common.fail(f"output_path {output} holds something that is not a prepared data set: choose another folder")


def caches_of(output):
    """Where the caches of a prepared folder lie while it is written: output may be mounted storage."""
    place = [socket.gethostname(), str(output)]  # containers may share HF_HOME, and name other folders alike
    return Path(huggingface_hub.constants.HF_HOME) / "eagle3" / common.hash_of(place)[:16]


def replace_folder(output, place, fingerprint, write):
    """Have write(new folder, folder of caches) called in `place`, then put the new folder in the place of output.

    Both are renamed, so that a killed build never looks complete. A mount point, which is empty, is filled: place is
    output itself. What is complete stays if it cannot be renamed, and the next call with its fingerprint renames it.
    """
    scratch = place / f".{output.name}.building"
    new = scratch / "new"
    old = scratch / "old"
    caches = caches_of(output)
    if old.exists() and not output.exists():  # killed between two renames
        old.rename(output)
    complete = is_of(new, fingerprint)
    if not complete:
        common.remove(scratch)
        common.remove(caches)
    try:
        if not complete:
            write(new, caches)
        complete = True
        if place == output:
            for path in sorted(new.iterdir(), key=lambda path: path.name == "data_config.json"):  # which comes last
                common.remove(output / path.name)
                path.rename(output / path.name)
        else:
            if output.exists():
                output.rename(old)
            new.rename(output)
        complete = False
    except Exception as error:
        problem = common.disk_problem(error)
        if complete and old.exists() and not output.exists():
            old.rename(output)
        if complete:
            common.fail(
                f"output_path {output} cannot be replaced: {problem or error}; the complete data are in {new}, and "
                "the same command tries again"
            )
        if problem:
            common.fail(f"output_path {output}, or HF_HOME, where caches lie in {caches}: {problem}")
        raise
    finally:
        common.remove(caches)
        if not complete:
            common.remove(scratch)


def check_files(folder, config):
    """End the program if a file of a prepared folder is not as it was written."""
    if problem := common.find_damage(folder, config["files"]):
        common.fail(f"{folder} is damaged: {problem}; run prepare_data.py again")


def check_tokens(folder, data, data_config, vocab_size):
    """End the program if a row has a token that the target's embedding table of vocab_size rows does not have."""
    for split in data:
        largest = data_config["splits"][split]["largest_token"]
        if largest >= vocab_size:
            common.fail(
                f"{folder} has token {largest} ({split} split), the target's embedding table {vocab_size} rows: its "
                "tokenizer has tokens that the model does not have; give the target a resized table, or prepare the "
                "data without such tokens"
            )


def largest_token(split):
    """The largest token id of a split's rows."""
    batches = split.select_columns("input_ids").with_format("arrow").iter(batch_size=1000)
    return max(int(batch["input_ids"].combine_chunks().flatten().to_numpy().max()) for batch in batches)


@functools.lru_cache(maxsize=2)
def epoch_order(num_rows, seed, epoch):
    """Permutation of the rows in one epoch, int64 [num_rows], read-only; the same on every rank and machine."""
    # RandomState, because NumPy promises that its stream never changes: a run resumed years later sees the same order.
    order = np.random.RandomState([seed % 2**32, epoch]).permutation(num_rows).astype(np.int64)
    order.setflags(write=False)  # it is kept for the epoch's other steps
    return order


def measure_rows(split):
    """(tokens, supervised tokens) of each row: int64 [rows] twice."""
    lengths = []
    supervised = []
    for batch in split.select_columns("loss_mask").with_format("arrow").iter(batch_size=1000):
        mask = batch["loss_mask"].combine_chunks()
        lengths.append(mask.value_lengths())
        supervised.append(np.bincount(mask.value_parent_indices(), mask.flatten(), minlength=len(mask)))
    return np.concatenate(lengths).astype(np.int64), np.concatenate(supervised).astype(np.int64)


# ==================== Rows to ranks ==================================================================================


def pack(rows, count, sizes, room, work):
    """rows in `count` lists of sizes up to `room` each: every row into the list of least work that has room for it.

    Returns None if a row fits in no list.
    """
    lists = [[] for _ in range(count)]
    load = np.zeros(count)
    free = np.full(count, room)
    for row in rows:
        fits = free >= sizes[row]
        if not fits.any():
            return None
        least = np.where(fits, load, np.inf).argmin()  # the first of equals
        lists[least].append(row)
        load[least] += work[row]
        free[least] -= sizes[row]
    return lists


def deal(rows, count, most, work):
    """`count` lists of at most `most` rows: each row, the heaviest first, goes to the list of least work so far."""
    order = rows[np.argsort(-work[rows], kind="stable")]
    lists = [[] for _ in range(count)]
    loads = [(0, number) for number in range(count)]  # a heap: the first of equals comes first
    for row, weight in zip(order.tolist(), work[order].tolist(), strict=True):
        load, number = loads[0]
        lists[number].append(row)
        if len(lists[number]) == most:
            heapq.heappop(loads)
        else:
            heapq.heapreplace(loads, (load + weight, number))
    return lists


def count_lists(shares, sizes, room):
    """The most lists of `room` that first-fit decreasing needs for one of the shares (lists of rows)."""
    width = max(map(len, shares))
    table = np.zeros((len(shares), width), dtype=np.int64)  # sizes of each share's rows, the largest first
    for line, share in zip(table, shares, strict=True):
        line[: len(share)] = np.sort(sizes[share])[::-1]
    free = np.full((len(shares), width), room)
    each = np.arange(len(shares))
    for size in table.T:  # of all shares at once
        first = (free >= size[:, None]).argmax(axis=1)
        free[each, first] -= size
    return int((free < room).sum(axis=1).max())


class Assignment:
    """[rank][micro-batch]: lists of row numbers of an optimizer step. A rank's are made when they are asked for."""

    def __init__(self, shares, place, empty, count, sizes, room, work):
        self.shares = shares  # rows of each rank
        self.place = place  # {row: place in the step}
        self.empty = empty  # what a micro-batch without rows is
        self.count = count  # micro-batches
        self.sizes = sizes
        self.room = room
        self.work = work

    def __len__(self):
        return len(self.shares)

    def __getitem__(self, rank):
        share = self.shares[rank]
        lists = pack(share, self.count, self.sizes, self.room, self.work)
        if lists is None:  # first-fit decreasing finds room, as without work the first list with room is taken
            longest_first = sorted(share, key=lambda row: -self.sizes[row])
            lists = pack(longest_first, self.count, self.sizes, self.room, np.zeros_like(self.work))
        return [sorted(part, key=self.place.get) or list(self.empty) for part in lists]


def assign(rows, lengths, work, world_size, micro_batch_size, total_seq_len=0, empty=()):
    """The Assignment of an optimizer step on these rows.

    lengths (tokens), work (any unit): arrays by row number. A micro-batch has at most micro_batch_size rows or, with
    total_seq_len, at most that number of tokens. The ranks get about the same work and, to stay in step, the same
    number of micro-batches, the last of which may be empty.
    """
    rows = np.asarray(rows)
    place = {row: i for i, row in enumerate(rows.tolist())}
    longest = lengths[rows].max()
    assert not 0 < total_seq_len < longest, f"total_seq_len {total_seq_len}, but a row has {longest} tokens"
    if total_seq_len:
        shares = deal(rows, world_size, len(rows), work)
        count = count_lists(shares, lengths, total_seq_len)
        return Assignment(shares, place, empty, count, lengths, total_seq_len, work)
    count = math.ceil(len(rows) / (micro_batch_size * world_size))
    shares = deal(rows, world_size, count * micro_batch_size, work)
    count = math.ceil(max(map(len, shares)) / micro_batch_size)
    return Assignment(shares, place, empty, count, np.ones_like(lengths), micro_batch_size, work)


class Forward(NamedTuple):
    """A forward of the target that a rank takes part in; rows[first:end] are the rank's own."""

    rows: list
    first: int
    end: int


def assign_forwards(assigned, rank, batch_size, group_size=1, in_step=1):
    """The target's forwards that `rank` takes part in before each micro-batch: [micro-batch][Forward].

    batch_size of a rank's rows share a forward, in the order of its micro-batches.
    assigned: [rank][micro-batch] lists of rows, none of them empty. Groups of group_size consecutive ranks read each
    other's rows; groups of in_step ranks do the same number of forwards, if need be on a row -1 that nobody reads: the
    target's layers talk to the group in each of them, the draft's to all ranks in between.
    """
    member = rank % group_size
    group = [assigned[rank - member + other] for other in range(group_size)]
    first_in_step = rank // in_step * in_step
    others = [assigned[first_in_step + other] for other in range(in_step)]
    rows = [list(itertools.chain(*lists)) for lists in group]
    counts = zip(*(itertools.accumulate(map(len, lists)) for lists in others), strict=True)
    done = 0
    forwards = []
    for count in counts:
        due = math.ceil(max(count) / batch_size)
        before_batch = []
        for at in range(done * batch_size, due * batch_size, batch_size):
            parts = [part[at : at + batch_size] for part in rows]
            first = sum(map(len, parts[:member]))
            together = list(itertools.chain(*parts)) or [-1]
            before_batch.append(Forward(together, first, first + len(parts[member])))
        forwards.append(before_batch)
        done = due
    return forwards


# ==================== Batches ========================================================================================


@dataclass
class Batch:
    """A micro-batch: complete sequences, concatenated without padding; T tokens."""

    input_ids: torch.Tensor  # [T] int64
    position_ids: torch.Tensor  # [T], restarting with every sequence
    loss_mask: torch.Tensor  # [T], 1 = produced by the assistant
    lengths: list  # tokens of each sequence
    rows: list  # the row number of each sequence; -1: four unsupervised tokens that stand for nothing
    epoch: int  # what is random in a row depends on the seed, the epoch and the row alone: see `random_of`
    plan: object  # the trainer's own: what its `collate` adds
    normaliser: int  # what the loss sum of this batch counts, and is divided by over the optimizer step
    states: object = None  # what the source of hidden states fetched for it

    def to(self, device):
        """The Batch with its tensors on a device."""
        return unpack(pack_tensors([self]), device)[0]


def concatenate(rows, epoch=0):
    """The fields of a Batch that rows [(number, input_ids [S], loss_mask [S])] give, as a dictionary."""
    numbers, input_ids, masks = zip(*rows, strict=True)
    lengths = [len(ids) for ids in input_ids]
    return {
        "input_ids": torch.cat(input_ids),
        "position_ids": slots.positions_of(lengths),
        "loss_mask": torch.cat(masks),
        "lengths": lengths,
        "rows": list(numbers),
        "epoch": epoch,
    }


def random_of(seed, epoch, row, stream=0):
    """NumPy's generator of what is random in a row in an epoch, whatever the ranks, workers and batches are.

    Streams are independent of each other.
    """
    return np.random.default_rng([seed % 2**32, epoch, row + 1, stream])


def draw(seed, epoch, rows, lengths, stream=0):
    """A number in [0, 1) for each token of concatenated rows: float64 [T]."""
    parts = [random_of(seed, epoch, row, stream).random(length) for row, length in zip(rows, lengths, strict=True)]
    return torch.from_numpy(np.concatenate(parts))


def add_noise(auxiliary, batch, seed, size):
    """Auxiliary states [T, n·Ht] of a batch with uniform noise in ±size, as speculators adds it."""
    noisy = []
    for states, row in zip(auxiliary.split(batch.lengths), batch.rows, strict=True):
        number = int(random_of(seed, batch.epoch, row).integers(2**63))
        generator = torch.Generator(states.device).manual_seed(number)
        noise = torch.rand(states.shape, generator=generator, device=states.device)
        noisy.append(states + (size * (2 * noise - 1)).to(states.dtype))
    return torch.cat(noisy)


class TensorSlot(NamedTuple):
    """Where a tensor was taken out of a packed batch."""

    dtype: torch.dtype
    shape: torch.Size


def pack_tensors(batches):
    """(batches with a TensorSlot for each tensor, {dtype: all tensors of it as one [N]}), whatever they hold.

    A worker needs a file descriptor for each tensor that it hands over, and few tensors are pinned and copied.
    """
    taken = {}

    def take(tensor):
        taken.setdefault(tensor.dtype, []).append(tensor.flatten())
        return TensorSlot(tensor.dtype, tensor.shape)

    batches = common.map_parts(batches, torch.Tensor, take)
    return batches, {dtype: torch.cat(parts) for dtype, parts in taken.items()}


def unpack(packed, device):
    """The batches of pack_tensors with their tensors on a device."""
    batches, tensors = packed
    tensors = {dtype: flat.to(device, non_blocking=True) for dtype, flat in tensors.items()}
    used = dict.fromkeys(tensors, 0)

    def put_back(slot):
        start = used[slot.dtype]
        end = start + math.prod(slot.shape)
        used[slot.dtype] = end
        return tensors[slot.dtype][start:end].view(slot.shape)

    return common.map_parts(batches, TensorSlot, put_back)


class Steps(torch.utils.data.Dataset):
    """steps[s]: the packed batches of this rank in optimizer step s >= 0, epoch after epoch.

    len(steps): the steps of one epoch. No micro-batch is empty, so that the ranks stay in step: row -1 takes its place.
    """

    def __init__(
        self,
        split,
        fetch,
        collate,
        name,
        seed,
        global_batch_size,
        micro_batch_size,
        total_seq_len,
        rank,
        world,
    ):
        self.split = split.with_format("torch", columns=list(COLUMNS))
        self.name = name
        self.fetch = fetch
        self.collate = collate
        self.lengths, supervised = measure_rows(split)
        self.work = self.lengths + supervised  # an 8B target's forward, seven steps of its draft: about equal
        self.seed = seed
        self.size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.total_seq_len = total_seq_len
        self.rank = rank
        self.world = world

    def __len__(self):
        return math.ceil(len(self.split) / self.size)

    def __getitem__(self, step):
        packed = self.read(step)
        if torch.utils.data.get_worker_info():
            share(packed[1].values())
        return packed

    def read(self, step):
        """The packed batches of an optimizer step."""
        batches = []
        for rows, states in self.fetch(self, self.assigned(step)):
            batch = self.collate(rows, step // len(self))
            batch.states = states
            batches.append(batch)
        return pack_tensors(batches)

    def assigned(self, step):
        """The Assignment of an optimizer step; a micro-batch without rows has row -1."""
        epoch, index = divmod(step, len(self))
        order = epoch_order(len(self.split), self.seed, epoch)
        rows = order[index * self.size : (index + 1) * self.size]
        sizes = (self.world, self.micro_batch_size, self.total_seq_len)
        return assign(rows, self.lengths, self.work, *sizes, empty=[-1])

    def row(self, number):
        """(number, input_ids, loss_mask) of a row, int64 [S] each; of row -1 four unsupervised tokens."""
        if number < 0:
            nothing = torch.zeros(4, dtype=torch.int64)
            return number, nothing, nothing
        row = self.split[number]
        return number, row["input_ids"], row["loss_mask"]


class SharedMemoryFull(Exception):
    """/dev/shm has no room for what workers hand over."""


def share(tensors):
    """Move tensors to shared memory, in which a worker hands them over. SharedMemoryFull if there is no room for long.

    Training frees it step by step. torch would do the same in a thread of its own, and lose the step if that fails.
    """
    end = time.monotonic() + SHARED_PATIENCE
    for tensor in tensors:
        while not tensor.is_shared():
            try:
                tensor.share_memory_()
            except RuntimeError as error:
                if time.monotonic() > end:
                    raise SharedMemoryFull(str(error)) from error
                time.sleep(0.5)


def find_shortage(packed, steps):
    """What /dev/shm lacks for this number of steps that each rank of a node reads ahead; "" if nothing.

    packed: one of the steps.
    """
    given = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"  # torchrun's, deepspeed's
    here = int(given) if given.isdecimal() else 1
    needed = here * steps * sum(tensor.nbytes for tensor in packed[1].values())
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.exists() else math.inf
    if needed <= free:
        return ""
    ahead = f"{steps} steps that are read ahead" + (f" by each of {here} ranks" if here > 1 else "")
    return f"{ahead} take {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free"


def fail_for_room(problem):
    """End the program because shared memory is too small."""
    common.fail(
        f"{SHARED_MEMORY} is too small: {problem}; give the container more (docker run --shm-size 16g), or read less "
        "ahead with --prefetch_factor or --num_workers; --num_workers 0 needs none"
    )


def read_steps(
    split,
    source,
    collate,
    device,
    steps=None,
    *,
    name="train",
    seed,
    global_batch_size,
    micro_batch_size,
    total_seq_len=0,
    num_workers=0,
    prefetch_factor=None,
):
    """Yield this rank's batches of each of `steps` (a range; default: an epoch), read ahead by num_workers processes.

    source: states.Online or Stored, whose `fetch` runs in the workers; collate(rows, epoch) -> Batch; name: of
    the split.
    """
    data = Steps(
        split,
        source.fetch,
        collate,
        name,
        seed,
        global_batch_size,
        micro_batch_size,
        total_seq_len,
        dist.get_rank(),
        dist.get_world_size(),
    )
    steps = range(len(data)) if steps is None else steps

    ahead = num_workers * (prefetch_factor or 2)  # steps of a rank, 2 is the loader's own default
    shortage = find_shortage(data.read(steps[0]), min(ahead, len(steps))) if ahead and len(steps) else ""
    if shortage and name == "train":
        fail_for_room(shortage)
    if shortage:  # an evaluation beside what is read ahead for training
        num_workers = 0

    def load(part):
        loader = DataLoader(
            data,
            sampler=part,
            batch_size=None,
            num_workers=num_workers,
            pin_memory=device.type == "cuda",
            prefetch_factor=prefetch_factor if num_workers else None,
            worker_init_fn=ignore_stop_signals,
            generator=torch.Generator(),  # it would draw from the global one, more often in a resumed run
        )
        before = signal.pthread_sigmask(signal.SIG_BLOCK, waits.STOP_SIGNALS)  # until workers ignore them
        batches = iter(loader)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            while True:
                with waits.waiting_for("the next step's data"):
                    packed = next(batches, None)
                if packed is None:
                    return
                yield unpack(packed, device)
        except SharedMemoryFull as error:
            fail_for_room(str(error).strip().splitlines()[-1])
        finally:
            if num_workers:  # they ignore SIGTERM, with which Python would end them, and wait for them, at its exit
                batches._shutdown_workers()
                for worker in batches._workers:  # one that was stopped
                    worker.kill()

    yield from source.steps(data, steps, load)


def ignore_stop_signals(worker):
    """In a worker process: leave signals that ask for an end to the training, which still needs what is read ahead.

    They are blocked from its first moment on: torch has SIGTERM end a worker until this is called.
    """
    for number in waits.STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, waits.STOP_SIGNALS)
