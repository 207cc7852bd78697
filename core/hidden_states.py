"""hidden_states."""

import concurrent.futures
import functools
import json
import os
import sys
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from core import common, dataloader, slots, target_files

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "fp8": torch.float8_e4m3fn}

SHARD_BYTES = 256 * 2**20  # a shard is closed when it has grown beyond that


def to_stored(input_ids, loss_mask, auxiliary, last, dtype):
    """A row's tensors in the store, on the CPU; auxiliary [T, 3·Ht], last [T, Ht]; fp8: a scale per token and layer."""
    count, teachers = slots.tokens_read(loss_mask)
    tensors = {"input_ids": input_ids.int(), "loss_mask": loss_mask.to(torch.uint8)}
    for name, states in zip(dataloader.STATES, (auxiliary[:count], last[teachers.to(last.device)]), strict=True):
        if dtype == torch.float8_e4m3fn:
            parts = states.float().unflatten(-1, (-1, last.shape[1]))
            scale = parts.abs().amax(-1).clamp(min=1e-30) / torch.finfo(dtype).max
            tensors[f"{name}_scale"] = scale
            states = (parts / scale[..., None]).flatten(1)
        tensors[name] = states.to(dtype)
    return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def from_stored(tensors, name, dtype):
    """States [n, ...] of `to_stored`'s tensors in dtype."""
    states, scale = tensors[name], tensors.get(f"{name}_scale")
    if scale is not None:
        states = (states.float().unflatten(-1, (scale.shape[1], -1)) * scale[..., None]).flatten(1)
    return states.to(dtype)


def row_bytes(tokens, count, teachers, hidden_size, layers, dtype):
    """Bytes that a row takes in the store; count, teachers: numbers of tokens that are read of its first layers and of
    the last one. Arrays work too."""
    parts = count * layers + teachers
    return 5 * tokens + parts * (hidden_size * dtype.itemsize + 4 * (dtype == torch.float8_e4m3fn))


def checksum(tensors):
    """CRC-32 over the bytes of a row's tensors, in the order of their names."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].contiguous().flatten().view(torch.uint8).numpy(), value)
    return value


def store_settings(model_dir, layers, data_config):
    """What hidden states were made from, by name; each must be the same where they are read."""
    tokenizer, data = data_config["ingredients"]["tokenizer"], data_config["fingerprint"]
    return {"target": target_files.hash_target(model_dir), "layers": list(layers), "tokenizer": tokenizer, "data": data}


@functools.lru_cache(maxsize=64)
def open_shard(path):
    return safe_open(path, "pt")


class Store:
    """Rows of hidden states in a folder. A shard's header has its rows' checksums, and it has its name only when it is
    whole: so the folder is valid at any moment, and index.json, once it is written, spares reading headers.
    """

    def __init__(self, folder, settings, create=None):
        """settings: of `store_settings`; create: the dtype's name if the folder may be made. Ends the program if the
        folder is of anything else."""
        self.folder, self.rows, self.shards, self.new, self.size = Path(folder), {}, set(), {}, 0
        path = self.folder / "index.json"
        try:
            if create and not path.exists():
                new = {"format": 1, **settings, "dtype": create, "shards": {}}
                self.folder.mkdir(parents=True, exist_ok=True)
                common.write_atomic(path, json.dumps(new, indent=1) + "\n")
        except OSError as error:
            common.fail(f"{folder} cannot be written: {error}")
        try:
            self.index = dict(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            common.fail(f"{folder} is not a folder of hidden states: {error}")
        for name, value in settings.items():
            if self.index.get(name) != value:
                common.fail(f"the hidden states in {folder} are of another {name}: {self.index.get(name)}, not {value}")
        self.dtype, self.pool = DTYPES[self.index["dtype"]], concurrent.futures.ThreadPoolExecutor(1)
        self.writing, self.number = None, 0
        self.refresh()

    def __getstate__(self):
        """For the workers that read: without what writes."""
        return {name: value for name, value in vars(self).items() if name not in ("pool", "writing", "new")}

    def remove_rests(self):
        """Remove what an interruption left half-written; while nobody writes."""
        # `.tmp...`: safetensors writes under a name of its own first.
        patterns = (".*.building", ".index.json.*.tmp", ".tmp*")
        for path in [path for pattern in patterns for path in self.folder.glob(pattern)]:
            path.unlink(missing_ok=True)

    def refresh(self):
        """Take up shards that have come since. Of a row in several the last counts: it was damaged in the others."""
        for path in sorted(self.folder.glob("[0-9]*-*.safetensors")):
            if path.name not in self.shards:
                self.shards.add(path.name)
                self.number = max(self.number, int(path.name.partition("-")[0]) + 1)
                rows = self.index["shards"].get(path.name)
                try:
                    rows = rows or json.loads(safe_open(path, "pt").metadata()["rows"])
                except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
                    print(f"{path} is damaged, its rows are taken for missing: {error}", file=sys.stderr)
                    continue
                self.rows.update((row, (path.name, crc)) for row, crc in rows.items())

    def read(self, row):
        """(tensors, "") of a row, on the CPU, or (None, "missing" or "damaged")."""
        shard, crc = self.rows.get(row, (None, None))
        if shard is None:
            return None, "missing"
        try:
            file = open_shard(str(self.folder / shard))
            scales = [f"{name}_scale" for name in dataloader.STATES if self.dtype == torch.float8_e4m3fn]
            names = [*dataloader.COLUMNS, *dataloader.STATES, *scales]
            tensors = {name: file.get_tensor(f"{row}.{name}") for name in names}
        except (OSError, SafetensorError) as error:
            return None, "missing" if isinstance(error, FileNotFoundError) else "damaged"
        return (tensors, "") if checksum(tensors) == crc else (None, "damaged")

    def add(self, row, tensors):
        """Keep a row for the next shard; False, and a line that names it, if its states are not finite."""
        states = [
            tensors.get(f"{name}_scale", tensors[name]) for name in dataloader.STATES
        ]  # a scale is as finite as its numbers
        # Least and greatest tell: isfinite() of every number takes sixty times as long.
        if not all(torch.stack(x.aminmax()).isfinite().all() for x in states if len(x)):
            tqdm.write(f"row {row}: hidden states are not finite in {self.index['dtype']}", sys.stderr)
            return False
        self.new[row] = tensors
        self.size += sum(tensor.nbytes for tensor in tensors.values())
        if self.size > SHARD_BYTES:
            self.flush()
        return True

    before_norm = False  # whether the last hidden states are those before the final norm

    @property
    def layer_count(self):
        """Auxiliary layers."""
        return len(self.index["layers"])

    def drop_unwritten(self):
        """Forget the rows that are not written yet."""
        self.writing = None
        self.new = {}
        self.size = 0

    def flush(self, wait=False):
        """Write the rows kept as one shard, while the program goes on. OSError if this or the one before fails."""
        if self.writing:
            self.writing.result()
        if self.new:
            path = self.folder / f"{self.number:06d}-{dist.get_rank():05d}.safetensors"
            self.writing, self.new, self.size = self.pool.submit(write_shard, path, self.new), {}, 0
            self.number += 1
        if wait and self.writing:
            self.writing.result()

    def write_index(self):
        """All rows by shard in index.json; on one rank, when nobody writes any more."""
        self.refresh()
        shards = {name: {} for name in sorted(self.shards)}
        for row, (shard, crc) in self.rows.items():
            shards[shard][row] = crc
        self.index["shards"] = shards
        common.write_atomic(self.folder / "index.json", json.dumps(self.index, indent=1) + "\n")


def write_shard(path, rows):
    """One file of rows {row: tensors}; it appears when it is whole. OSError if it cannot be written."""
    building = path.with_name(f".{path.name}.building")
    try:
        tensors = {f"{row}.{name}": tensor for row, part in rows.items() for name, tensor in part.items()}
        save_file(tensors, building, {"rows": json.dumps({row: checksum(part) for row, part in rows.items()})})
        with building.open("rb") as file:
            os.fsync(file.fileno())
        common.open_to_all(building)
        building.rename(path)
    except (OSError, SafetensorError) as error:
        building.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error}") from error
