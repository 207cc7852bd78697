"""The store: hidden states of rows on disk, written by prepare_hidden_states.py or while training, read by training.

A folder has index.json (target, layers, tokenizer, data, dtype; the rows of each shard and their checksums) and shards
in safetensors. A row SPLIT/NUMBER has input_ids, loss_mask, aux_hidden_states [n, layers·Ht] of the n tokens that are
read, and last_hidden_states [U, Ht] (after the final norm) of the U tokens that teach; in fp8 with scales.
"""

import concurrent.futures
import contextlib
import functools
import json
import os
import re
import socket
import sys
import tempfile
import time
import zlib
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from core import common, dataloader, slots, target_files

FP8 = torch.float8_e4m3fn
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "fp8": FP8}
STATES = ("aux_hidden_states", "last_hidden_states")  # of a row
LEFTOVER_SECONDS = 3600  # after which what another host left half-written is removed
SHARD_BYTES = 256 * 2**20  # a shard is closed when it has grown beyond that

# ==================== A row ==========================================================================================


def to_stored(input_ids, loss_mask, auxiliary, last, dtype):
    """A row's tensors in the store, on the CPU; auxiliary [T, layers·Ht], last [T, Ht]."""
    count, teachers = slots.tokens_read(loss_mask)
    tensors = {"input_ids": input_ids.int(), "loss_mask": loss_mask.to(torch.uint8)}
    hidden_size = last.shape[1]
    last = last[teachers.to(last.device)]
    for name, states in zip(STATES, (auxiliary[:count], last), strict=True):
        if dtype == FP8:
            states, scale = scaled(states, hidden_size)
            tensors[f"{name}_scale"] = scale
        tensors[name] = states.to(dtype)
    return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def scaled(states, hidden_size):
    """States [n, layers·Ht] in the range of fp8, and their scale [n, layers]: one per token and layer."""
    parts = states.float().unflatten(-1, (-1, hidden_size))  # [n, layers, Ht]
    most = parts.abs().amax(-1).clamp(min=1e-30)
    scale = most / torch.finfo(FP8).max
    return (parts / scale[..., None]).flatten(1), scale


def from_stored(tensors, name, dtype):
    """States [n, ...] of `to_stored`'s tensors in dtype."""
    states = tensors[name]
    scale = tensors.get(f"{name}_scale")
    if scale is not None:
        parts = states.float().unflatten(-1, (scale.shape[1], -1))
        states = (parts * scale[..., None]).flatten(1)
    return states.to(dtype)


def row_bytes(tokens, count, teachers, hidden_size, layers, dtype):
    """Bytes that a row takes in the store, for numbers or arrays.

    count, teachers: the tokens whose auxiliary states, and whose last ones, are read.
    """
    part = hidden_size * dtype.itemsize
    if dtype == FP8:
        part += 4  # the scale
    return 5 * tokens + (count * layers + teachers) * part


def checksum(tensors):
    """CRC-32 over the bytes of a row's tensors, in the order of their names."""
    value = 0
    for name in sorted(tensors):
        data = tensors[name].contiguous().flatten().view(torch.uint8)
        value = zlib.crc32(data.numpy(), value)
    return value


# ==================== The folder =====================================================================================


def store_settings(model_dir, layers, data_config):
    """What hidden states were made from, by name; each must be the same where they are read."""
    return {
        "target": target_files.hash_target(model_dir),
        "layers": list(layers),
        "tokenizer": data_config["ingredients"]["tokenizer"],
        "data": data_config["fingerprint"],
    }


@functools.lru_cache(maxsize=64)
def open_shard(path):
    return safe_open(path, "pt")


class Store:
    """Rows of hidden states in a folder.

    A shard's header has its rows' checksums, and a shard gets its name only when it is complete: so the folder is valid
    at any moment, and index.json, once it is written, spares reading headers.
    """

    before_norm = False  # whether the last hidden states are those before the final norm

    def __init__(self, folder, settings, create=None):
        """settings: of `store_settings`; create: the dtype's name, if the folder may be made.

        Ends the program if the folder belongs to another target, tokenizer, data set or layers.
        """
        self.folder = Path(folder)
        self.rows = {}  # row: (shard, CRC-32)
        self.shards = set()
        self.index = self.open_index(settings, create)
        remedy = "give another folder, and compute the hidden states again"
        target_files.check_version(f"the folder of hidden states {folder}", self.index.get("target"), remedy)
        for name, value in settings.items():
            if self.index.get(name) != value:
                common.fail(f"the hidden states in {folder} are of another {name}: {self.index.get(name)}, not {value}")
        self.dtype = DTYPES[self.index["dtype"]]
        # Of the rows that are added:
        self.number = 0  # of the next shard
        self.new = {}
        self.size = 0  # bytes
        self.pool = concurrent.futures.ThreadPoolExecutor(1)
        self.writing = None
        self.refresh()

    def open_index(self, settings, create):
        """index.json, made if it does not exist and `create` names a dtype."""
        path = self.folder / "index.json"
        try:
            if create and not path.exists():
                new = {"format": 1, **settings, "dtype": create, "shards": {}}
                self.folder.mkdir(parents=True, exist_ok=True)
                common.write_atomic(path, json.dumps(new, indent=1) + "\n")
        except OSError as error:
            common.fail(f"{self.folder} cannot be written: {error}")
        if not path.is_file():
            common.fail(
                f"{self.folder} has no hidden states, as its index.json cannot be read: give the folder that "
                "prepare_hidden_states.py has written"
            )
        index, problem = common.read_object(path)
        if not problem and not (str(index.get("dtype")) in DTYPES and isinstance(index.get("shards"), dict)):
            problem = "it has no dtype of these, or no shards"
        if problem:
            common.fail(f"{self.folder} is not a folder of hidden states: its index.json is broken: {problem}")
        return index

    @property
    def layer_count(self):
        """Auxiliary layers."""
        return len(self.index["layers"])

    def __getstate__(self):
        """For the workers that read: without what writes."""
        return {name: value for name, value in vars(self).items() if name not in ("pool", "writing", "new")}

    def remove_leftovers(self):
        """Remove what interruptions left half-written; of writers that may live nothing."""
        here = re.compile(rf"\.building-{re.escape(socket.gethostname())}-(\d+)-[^-]+")
        for path in [*self.folder.glob(".building-*"), *self.folder.glob(".index.json.*.tmp")]:
            of_here = here.fullmatch(path.name)
            with contextlib.suppress(OSError):  # it is gone
                is_old = time.time() - path.stat().st_mtime > LEFTOVER_SECONDS
                if is_old or (of_here and not psutil.pid_exists(int(of_here[1]))):
                    common.remove(path)

    # --- reading ---

    def refresh(self):
        """Take up new shards. Of a row in several shards the last counts: it was damaged in the others."""
        for path in sorted(self.folder.glob("[0-9]*-*.safetensors")):
            if path.name in self.shards:
                continue
            self.shards.add(path.name)
            number = int(path.name.partition("-")[0])
            self.number = max(self.number, number + 1)
            try:
                rows = dict(self.index["shards"].get(path.name) or rows_in_header(path))
            except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
                print(f"{path} is damaged, its rows are taken for missing: {error}", file=sys.stderr)
                continue
            for row, crc in rows.items():
                self.rows[row] = (path.name, crc)

    def read(self, row):
        """(tensors, "") of a row, on the CPU, or (None, "missing" or "damaged")."""
        if row not in self.rows:
            return None, "missing"
        shard, crc = self.rows[row]
        names = [*dataloader.COLUMNS, *STATES]
        if self.dtype == FP8:
            names += [f"{name}_scale" for name in STATES]
        try:
            file = open_shard(str(self.folder / shard))
            tensors = {name: file.get_tensor(f"{row}.{name}") for name in names}
        except FileNotFoundError:
            return None, "missing"
        except (OSError, SafetensorError):
            return None, "damaged"
        if checksum(tensors) != crc:
            return None, "damaged"
        return tensors, ""

    # --- writing ---

    def add(self, row, tensors):
        """Keep a row for the next shard; False, and a line that names it, if its states are not finite."""
        if not all(is_finite(tensors, name) for name in STATES):
            tqdm.write(f"row {row}: hidden states are not finite in {self.index['dtype']}", sys.stderr)
            return False
        self.new[row] = tensors
        self.size += sum(tensor.nbytes for tensor in tensors.values())
        if self.size > SHARD_BYTES:
            self.flush()
        return True

    def flush(self, wait=False):
        """Write the new rows as one shard, while the program goes on. OSError if this or the shard before fails."""
        if self.writing:
            self.writing.result()
        if self.new:
            self.writing = self.pool.submit(write_shard, self.folder, self.number, dist.get_rank(), self.new)
            self.new = {}
            self.size = 0
            self.number += 1
        if wait and self.writing:
            self.writing.result()

    def drop_unwritten(self):
        """Forget the rows that are not written yet."""
        self.writing = None
        self.new = {}
        self.size = 0

    def write_index(self):
        """All rows by shard in index.json; on one rank, when nobody writes any more."""
        self.refresh()
        shards = {name: {} for name in sorted(self.shards)}
        for row, (shard, crc) in self.rows.items():
            shards[shard][row] = crc
        self.index["shards"] = shards
        common.write_atomic(self.folder / "index.json", json.dumps(self.index, indent=1) + "\n")


def rows_in_header(path):
    """{row: CRC-32} in the header of a shard."""
    return json.loads(safe_open(path, "pt").metadata()["rows"])


def is_finite(tensors, name):
    """Whether all states of a row are finite; in fp8 a scale is as finite as its states."""
    states = tensors.get(f"{name}_scale", tensors[name])
    if not len(states):
        return True
    # The least and the greatest tell: isfinite() of every number takes sixty times as long.
    return bool(torch.stack(states.aminmax()).isfinite().all())


def write_shard(folder, number, rank, rows):
    """Write one file of rows {row: tensors}. OSError if it cannot be written.

    It gets its name when it is complete: that of this number or, where another writer has taken it, of a later one.
    """
    prefix = f".building-{socket.gethostname()}-{os.getpid()}-"
    tensors = {f"{row}.{name}": tensor for row, part in rows.items() for name, tensor in part.items()}
    checksums = {row: checksum(part) for row, part in rows.items()}
    try:
        with tempfile.TemporaryDirectory(prefix=prefix, dir=folder) as place:  # safetensors has a name of its own first
            building = Path(place, "shard.safetensors")
            save_file(tensors, building, {"rows": json.dumps(checksums)})
            with building.open("rb") as file:
                os.fsync(file.fileno())
            common.open_to_all(building)
            while not take_name(building, folder / f"{number:06d}-{rank:05d}.safetensors"):
                number += 1
    except (OSError, SafetensorError) as error:
        raise OSError(f"shard {number} of {folder} cannot be written: {error}") from error


def take_name(building, path):
    """Give a complete file its name; returns whether it was free."""
    try:
        os.link(building, path)  # fails if the name is taken, whatever another writer does meanwhile
        return True
    except FileExistsError:
        return False
    except OSError:  # storage without hard links
        return rename_to_free(building, path)


def rename_to_free(building, path):
    """take_name by a file that only one writer can create: a rename would replace what another one has named."""
    taken = path.with_name(f".{path.name}.taken")
    try:
        os.close(os.open(taken, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    try:
        if path.exists():
            return False
        building.rename(path)
        return True
    finally:
        taken.unlink()
