"""hidden_states."""

import concurrent.futures
import functools
import itertools
import json
import os
import sys
import zlib
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from core import common, dataloader, ranks, server, slots, target_files, target_model, vllm_states

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


# (name, type, default, help, least value if any): see read_conversations.parse_flags
SOURCE_FLAGS = [
    ("hidden_states_path", str, None, "folder of prepare_hidden_states.py or hs_N.safetensors; none: target in memory"),
    ("on_missing", ("generate", "skip", "warn", "raise"), "generate", "rows that it lacks; generate: by the target"),
    ("on_generate", ("cache", "delete"), "delete", "whether what is generated is kept there"),
    ("hidden_states_dtype", tuple(DTYPES), "bfloat16", "of a new folder; fp8: e4m3, a scale per token and layer"),
    *vllm_states.SERVER_FLAGS,
]


def open_target(args, model_dir, device, layers, data, data_config):
    """The Target, or with args.hidden_states_path a Source: then the target is loaded only to generate missing rows."""
    load = functools.partial(target_model.load_as_asked, args, model_dir, device, layers)
    generate, server = args.on_missing == "generate", None
    if args.vllm_endpoint and not generate:
        common.fail(f"vllm_endpoint generates missing rows: it needs on_missing generate, not {args.on_missing}")
    if generate and args.vllm_endpoint and not args.hidden_states_path:
        args.hidden_states_path = str(Path(args.output_dir) / "hidden_states")
    if not args.hidden_states_path:
        return load()
    rows = [f"{name}/{n}" for name in data for n in range(len(data[name]))]
    shape = len(layers) + 1, target_files.read_target_config(model_dir, args.trust_remote_code)[0].hidden_size
    extracted = any(Path(args.hidden_states_path).glob("hs_*.safetensors"))

    def open_store(settings=None, create=None):
        folder = args.hidden_states_path
        return vllm_states.VllmFiles(folder, data, shape) if extracted else Store(folder, settings, create=create)

    def look():
        if extracted and generate and args.on_generate == "cache":
            common.fail(
                f"on_generate cache: {args.hidden_states_path} has hs_*.safetensors, which are only read: give "
                "another folder, or on_generate delete"
            )
        settings = None if extracted else store_settings(model_dir, layers, data_config)
        store = open_store(settings, args.hidden_states_dtype if generate else None)
        lacking = [row for row in rows if row not in store.rows]
        if lacking and args.on_missing == "raise":
            common.fail(
                f"{store.folder} lacks {len(lacking)} of {len(rows)} rows, such as {lacking[0]}: write them with "
                "prepare_hidden_states.py, or choose another on_missing"
            )
        if not generate and len(lacking) == len(rows):
            common.fail(
                f"{store.folder} has none of the {len(rows)} rows: on_missing {args.on_missing} would leave out all"
            )
        if generate and args.on_generate == "cache":
            store.remove_rests()
        print(f"{store.folder}: {len(rows) - len(lacking):,} of {len(rows):,} rows are there")
        longest = max(part["longest"] for part in data_config["splits"].values())
        model = vllm_states.served_model(args, model_dir, longest) if generate and args.vllm_endpoint else None
        return settings, bool(lacking), model

    settings, lacking, model = ranks.on_first_rank(look)
    store, whole = open_store(settings), generate and lacking and not model
    head = (
        None if whole and not extracted else target_model.load_head(model_dir, device, layers, args.trust_remote_code)
    )
    if model:
        server = vllm_states.Server(args, model, shape)
    return Source(args, load() if whole else head, store, load, head and head.norm, server)


class Source:
    """Hidden states for training out of a store and, under on_missing generate, of target or server for what it lacks.

    target: maybe its head and embedding alone; load(): the whole, should a row turn out to be damaged. norm: the
    target's last, for states from before it.
    """

    def __init__(self, args, target, store, load, norm=None, server=None):
        self.args, self.target, self.store, self.load, self.counts = args, target, store, load, Counter()
        self.norm, self.server = norm, server
        self.head, self.embedding, self.config, self.decoder = (
            getattr(target, name) for name in ("head", "embedding", "config", "decoder")
        )

    def epochs(self, steps, length):
        """`steps` (a range) epoch by epoch, `length` steps each: what is generated in one, the next ones read."""
        borders = [steps.start, *(at for at in steps[1:] if at % length == 0), steps.stop]
        for part in itertools.pairwise(borders) if self.args.on_missing == "generate" else [(steps.start, steps.stop)]:
            self.take_up()
            yield range(*part)
        self.take_up()

    def take_up(self):
        """Write what is still in memory; see what all ranks wrote; say how many rows were not there."""
        self.keep(functools.partial(self.store.flush, wait=True))
        every = [None] * dist.get_world_size()
        dist.all_gather_object(every, self.counts)
        self.store.refresh()
        if (counts := sum(every, Counter())) and dist.get_rank() == 0:
            fate = {"generate": "generated", "warn": "left out", "skip": "left out"}[self.args.on_missing]
            print(f"{self.store.folder}: {', '.join(f'{what} {n:,}' for what, n in counts.items())} ({fate})")
        self.counts.clear()

    def keep(self, write):
        """write(), which may find the disk full: the training goes on; what is not kept is generated again."""
        try:
            write()
        except OSError as error:
            print(f"hidden states are not kept from here on: {error}", file=sys.stderr)
            self.args.on_generate, self.store.writing, self.store.new, self.store.size = "delete", None, {}, 0

    def ahead(self, loader, data):
        """loader's items; a server is asked for what one lacks while training is busy with the one before."""
        waiting = []
        for item in loader:
            for row, reason, _ in itertools.chain(*(batch["stored"] for batch in item[1])):
                if reason and self.server:
                    self.server.ask(f"{data.name}/{row}", data.row(row)[0].tolist())
            waiting.append(item)
            if len(waiting) > bool(self.server):
                yield waiting.pop(0)
        yield from waiting

    def expect(self, batches, data):
        """Deal with what is missing in batches of an optimizer step, before its first forward: returns them."""
        wrong = [[(row, reason) for row, reason, _ in batch["stored"] if reason] for batch in batches]
        for row, reason in itertools.chain(*wrong):
            self.counts[f"{data.name} rows {reason}"] += 1
            shard, _ = self.store.rows.get(f"{data.name}/{row}", ("", None))
            message = f"row {data.name}/{row} of {self.store.folder / shard} is {reason}"
            if self.args.on_missing == "raise":
                remove = "remove this file, " * (reason != "missing")
                common.fail(f"{message}: {remove}write it with prepare_hidden_states.py, or choose another on_missing")
            if self.args.on_missing == "warn":
                print(f"{message}: left out", file=sys.stderr)
        if self.args.on_missing != "generate":
            return batches
        if self.server:
            return self.collect(batches, wrong, data.name)
        dealt, rank = [[[row for row, _ in part] for part in wrong]], 0
        _, together, in_step = data.forwards
        if in_step > 1:  # the target's ranks run as many forwards, of the same sequences
            rank, dealt = dist.get_rank(), [None] * dist.get_world_size()
            dist.all_gather_object(dealt, [[row for row, _ in part] for part in wrong])
        if self.target.decoder is None and any(itertools.chain(*dealt)):  # here, as its ranks load it together
            print(f"{self.store.folder} has damaged rows: loading the target", file=sys.stderr)
            self.target = self.load()
        for batch, lists in zip(batches, dataloader.assign_forwards(dealt, rank, *data.forwards), strict=True):
            batch |= dataloader.join_forwards([([data.row(row)[0] for row in rows], *mine) for rows, *mine in lists])
            batch["forward_ids"], batch["split"] = batch["forward_ids"].to(self.embedding.device), data.name
        return batches

    def collect(self, batches, wrong, split):
        """Wait for what the server was asked for. ServerFailed on all ranks if one of them does not get it."""
        every, failed = [None] * dist.get_world_size(), ""
        try:
            for batch, rows in zip(batches, wrong, strict=True):
                batch |= {"split": split, "served": [self.server.take(f"{split}/{row}") for row, _ in rows]}
        except server.ServerFailed as error:
            failed = str(error)
        dist.all_gather_object(every, failed)
        if any(every):
            self.keep(functools.partial(self.store.flush, wait=True))
            raise server.ServerFailed(next(filter(None, every)))
        return batches

    def states(self, batches):
        """Yield (auxiliary [T, 3·Ht], last [T, Ht]) of each batch; zeros where nothing is read."""
        ready = []
        for batch in batches:
            for states in batch.pop("served", ()):
                states = states.to(self.embedding)
                ready.append((states[:, :-1].flatten(1), self.norm(states[:, -1])))
            if batch.get("forwards"):
                ready += self.target.run(batch)
            tokens, width = len(batch["input_ids"]), self.embedding.shape[1]
            states = []
            layers = len(self.store.index["layers"])
            for name, at, several in zip(dataloader.STATES, ("aux_at", "last_at"), (layers, 1), strict=True):
                states.append(self.embedding.new_zeros(tokens, several * width))
                if at in batch:
                    part = from_stored(batch, name, states[-1].dtype)
                    before_norm = isinstance(self.store, vllm_states.VllmFiles) and at == "last_at"
                    states[-1][batch[at]] = self.norm(part) if before_norm else part
            for (row, reason, start), length in zip(batch["stored"], batch["lengths"], strict=True):
                if reason and self.args.on_missing == "generate":
                    new = ready.pop(0)
                    for whole, part in zip(states, new, strict=True):
                        whole[start : start + length] = part
                    if self.args.on_generate == "cache":
                        sequence = [batch[name][start : start + length].cpu() for name in dataloader.COLUMNS]
                        tensors = to_stored(*sequence, *new, self.store.dtype)
                        self.keep(functools.partial(self.store.add, f"{batch['split']}/{row}", tensors))
                        # As it will be read: the training does not depend on which rows were there already.
                        count, teachers = slots.tokens_read(sequence[1])
                        for whole, name, at in zip(states, dataloader.STATES, (slice(count), teachers), strict=True):
                            whole[start : start + length][at] = from_stored(tensors, name, whole.dtype).to(whole.device)
            yield tuple(states)
