"""Write the hidden states that training reads of a target to disk, so that the draft is trained without the target.

In:  a target, and a folder written by prepare_data.py.
Out: a folder with index.json (of which target, layers and data; the rows of each shard and their checksums) and shards
     of safetensors. Per row SPLIT/NUMBER: input_ids, loss_mask, aux_hidden_states [n, 3·Ht] of the n tokens that are
     read, last_hidden_states [U, Ht] (after the final norm) of the U tokens that teach; fp8 with scales beside them.

One device:     python prepare_hidden_states.py --target_model_path M --data_path prepared --output_path hidden_states
Eight devices:  deepspeed --num_gpus 8 prepare_hidden_states.py --target_model_path M --data_path prepared \\
                    --output_path hidden_states --hidden_states_dtype fp8

Started again after an interruption it goes on where it stopped. train_eagle3.py --hidden_states_path reads the folder.
"""

import concurrent.futures
import functools
import hashlib
import itertools
import json
import os
import shutil
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

# isort: off
# (it would give every name a line of its own)
from ask_vllm import SERVER_FLAGS, Extracted, Server, ServerFailed, served_model
from deal_batches import COLUMNS, STATES, deal_forwards, join_forwards, measure_read, tokens_read
from load_target import SHARING_FLAGS, check_heads, check_sharding, default_layer_ids, load_head, load_target
from load_target import read_target_config, resolve_target
from prepare_data import hash_tokenizer, load_tokenizer, open_data
from read_conversations import boolean, drop_foreign, fail, open_to_all, parse_flags, write_atomic
from run_ranks import on_each_node, on_first_rank, run_together, start_distributed
# isort: on

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "fp8": torch.float8_e4m3fn}
SHARD_BYTES = 256 * 2**20  # a shard is closed when it has grown beyond that
SAMPLE = 2**20  # bytes of a weight file that are hashed, at its beginning, in its middle and at its end


# ----------------------------------------------------------------------------------------------------------------------
# One row


def to_stored(input_ids, loss_mask, auxiliary, last, dtype):
    """A row's tensors in the store, on the CPU; auxiliary [T, 3·Ht], last [T, Ht]; fp8: a scale per token and layer."""
    count, teachers = tokens_read(loss_mask)
    tensors = {"input_ids": input_ids.int(), "loss_mask": loss_mask.to(torch.uint8)}
    for name, states in zip(STATES, (auxiliary[:count], last[teachers.to(last.device)]), strict=True):
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


# ----------------------------------------------------------------------------------------------------------------------
# The folder


def hash_target(model_dir):
    """Hash of a target's configuration and of samples of its weights: to read all of them takes minutes."""
    model_dir = Path(model_dir)
    digest = hashlib.sha256((model_dir / "config.json").read_bytes())
    for path in sorted([*model_dir.glob("*.safetensors"), *model_dir.glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for at in (0, size // 2, max(size - SAMPLE, 0)):
                file.seek(at)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def store_settings(model_dir, layers, data_config):
    """What hidden states were made from, by name; each must be the same where they are read."""
    tokenizer, data = data_config["ingredients"]["tokenizer"], data_config["fingerprint"]
    return {"target": hash_target(model_dir), "layers": list(layers), "tokenizer": tokenizer, "data": data}


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
                write_atomic(path, json.dumps(new, indent=1) + "\n")
        except OSError as error:
            fail(f"{folder} cannot be written: {error}")
        try:
            self.index = dict(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            fail(f"{folder} is not a folder of hidden states: {error}")
        for name, value in settings.items():
            if self.index.get(name) != value:
                fail(f"the hidden states in {folder} are of another {name}: {self.index.get(name)}, not {value}")
        self.dtype, self.pool = DTYPES[self.index["dtype"]], concurrent.futures.ThreadPoolExecutor(1)
        self.writing, self.number = None, 0
        self.refresh()

    def __getstate__(self):
        """For the workers that read: without what writes."""
        return {name: value for name, value in vars(self).items() if name not in ("pool", "writing", "new")}

    def remove_rests(self):
        """Remove what an interruption left half-written; while nobody writes."""
        for path in [*self.folder.glob(".*.building"), *self.folder.glob(".index.json.*.tmp")]:
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
            scales = [f"{name}_scale" for name in STATES if self.dtype == torch.float8_e4m3fn]
            names = [*COLUMNS, *STATES, *scales]
            tensors = {name: file.get_tensor(f"{row}.{name}") for name in names}
        except (OSError, SafetensorError) as error:
            return None, "missing" if isinstance(error, FileNotFoundError) else "damaged"
        return (tensors, "") if checksum(tensors) == crc else (None, "damaged")

    def add(self, row, tensors):
        """Keep a row for the next shard; False, and a line that names it, if its states are not finite."""
        states = [tensors.get(f"{name}_scale", tensors[name]) for name in STATES]  # a scale is as finite as its numbers
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
        write_atomic(self.folder / "index.json", json.dumps(self.index, indent=1) + "\n")


def write_shard(path, rows):
    """One file of rows {row: tensors}; it appears when it is whole. OSError if it cannot be written."""
    building = path.with_name(f".{path.name}.building")
    try:
        tensors = {f"{row}.{name}": tensor for row, part in rows.items() for name, tensor in part.items()}
        save_file(tensors, building, {"rows": json.dumps({row: checksum(part) for row, part in rows.items()})})
        with building.open("rb") as file:
            os.fsync(file.fileno())
        open_to_all(building)
        building.rename(path)
    except (OSError, SafetensorError) as error:
        building.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error}") from error


# ----------------------------------------------------------------------------------------------------------------------
# Reading while training


# (name, type, default, help, least value if any): see read_conversations.parse_flags
SOURCE_FLAGS = [
    ("hidden_states_path", str, None, "folder of prepare_hidden_states.py or hs_N.safetensors; none: target in memory"),
    ("on_missing", ("generate", "skip", "warn", "raise"), "generate", "rows that it lacks; generate: by the target"),
    ("on_generate", ("cache", "delete"), "delete", "whether what is generated is kept there"),
    ("hidden_states_dtype", tuple(DTYPES), "bfloat16", "of a new folder; fp8: e4m3, a scale per token and layer"),
    *SERVER_FLAGS,
]


def load_as_asked(args, model_dir, device, layers):
    """The Target, shared by the ranks as the flags say."""
    return load_target(
        model_dir, device, layer_ids=layers, trust_remote_code=args.trust_remote_code, sharding=args.target_sharding,
        tp_size=args.tp_size, offload=args.target_offload, offload_path=args.target_offload_path,
    )  # fmt: skip


def open_target(args, model_dir, device, layers, data, data_config):
    """The Target, or with args.hidden_states_path a Source: then the target is loaded only to generate missing rows."""
    load = functools.partial(load_as_asked, args, model_dir, device, layers)
    generate, server = args.on_missing == "generate", None
    if args.vllm_endpoint and not generate:
        fail(f"vllm_endpoint generates missing rows: it needs on_missing generate, not {args.on_missing}")
    if generate and args.vllm_endpoint and not args.hidden_states_path:
        args.hidden_states_path = str(Path(args.output_dir) / "hidden_states")
    if not args.hidden_states_path:
        return load()
    rows = [f"{name}/{n}" for name in data for n in range(len(data[name]))]
    shape = len(layers) + 1, read_target_config(model_dir, args.trust_remote_code)[0].hidden_size
    extracted = any(Path(args.hidden_states_path).glob("hs_*.safetensors"))

    def open_store(settings=None, create=None):
        folder = args.hidden_states_path
        return Extracted(folder, data, shape) if extracted else Store(folder, settings, create=create)

    def look():
        if extracted and generate and args.on_generate == "cache":
            fail(f"on_generate cache: {args.hidden_states_path} has hs_*.safetensors, which are only read: give "
                 "another folder, or on_generate delete")  # fmt: skip
        settings = None if extracted else store_settings(model_dir, layers, data_config)
        store = open_store(settings, args.hidden_states_dtype if generate else None)
        lacking = [row for row in rows if row not in store.rows]
        if lacking and args.on_missing == "raise":
            fail(f"{store.folder} lacks {len(lacking)} of {len(rows)} rows, such as {lacking[0]}: write them with "
                 "prepare_hidden_states.py, or choose another on_missing")  # fmt: skip
        if not generate and len(lacking) == len(rows):
            fail(f"{store.folder} has none of the {len(rows)} rows: on_missing {args.on_missing} would leave out all")
        if generate and args.on_generate == "cache":
            store.remove_rests()
        print(f"{store.folder}: {len(rows) - len(lacking):,} of {len(rows):,} rows are there")
        longest = max(part["longest"] for part in data_config["splits"].values())
        model = served_model(args, model_dir, longest) if generate and args.vllm_endpoint else None
        return settings, bool(lacking), model

    settings, lacking, model = on_first_rank(look)
    store, whole = open_store(settings), generate and lacking and not model
    head = None if whole and not extracted else load_head(model_dir, device, layers, args.trust_remote_code)
    if model:
        server = Server(args, model, shape)
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
                fail(f"{message}: {remove}write it with prepare_hidden_states.py, or choose another on_missing")
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
        for batch, lists in zip(batches, deal_forwards(dealt, rank, *data.forwards), strict=True):
            batch |= join_forwards([([data.row(row)[0] for row in rows], *mine) for rows, *mine in lists])
            batch["forward_ids"], batch["split"] = batch["forward_ids"].to(self.embedding.device), data.name
        return batches

    def collect(self, batches, wrong, split):
        """Wait for what the server was asked for. ServerFailed on all ranks if one of them does not get it."""
        every, failed = [None] * dist.get_world_size(), ""
        try:
            for batch, rows in zip(batches, wrong, strict=True):
                batch |= {"split": split, "served": [self.server.take(f"{split}/{row}") for row, _ in rows]}
        except ServerFailed as error:
            failed = str(error)
        dist.all_gather_object(every, failed)
        if any(every):
            self.keep(functools.partial(self.store.flush, wait=True))
            raise ServerFailed(next(filter(None, every)))
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
            for name, at, several in zip(STATES, ("aux_at", "last_at"), (layers, 1), strict=True):
                states.append(self.embedding.new_zeros(tokens, several * width))
                if at in batch:
                    part = from_stored(batch, name, states[-1].dtype)
                    before_norm = isinstance(self.store, Extracted) and at == "last_at"
                    states[-1][batch[at]] = self.norm(part) if before_norm else part
            for (row, reason, start), length in zip(batch["stored"], batch["lengths"], strict=True):
                if reason and self.args.on_missing == "generate":
                    new = ready.pop(0)
                    for whole, part in zip(states, new, strict=True):
                        whole[start : start + length] = part
                    if self.args.on_generate == "cache":
                        sequence = [batch[name][start : start + length].cpu() for name in COLUMNS]
                        tensors = to_stored(*sequence, *new, self.store.dtype)
                        self.keep(functools.partial(self.store.add, f"{batch['split']}/{row}", tensors))
                        # As it will be read: the training does not depend on which rows were there already.
                        count, teachers = tokens_read(sequence[1])
                        for whole, name, at in zip(states, STATES, (slice(count), teachers), strict=True):
                            whole[start : start + length][at] = from_stored(tensors, name, whole.dtype).to(whole.device)
            yield tuple(states)


# ----------------------------------------------------------------------------------------------------------------------
# Writing all rows


def groups_of(lengths, batch_size):
    """Rows (split, number) that share a forward, batch_size of them, by length, the longest first; lengths: by split.

    They are the same whatever has been written, so that a row's last bits do not depend on interruptions.
    """
    rows = [(-length, split, number) for split in lengths for number, length in enumerate(lengths[split])]
    rows = [(split, number) for _, split, number in sorted(rows)]
    return [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]


def row_lengths(data):
    """{split: tokens of each row}"""
    return {split: part["length"][:] for split, part in data.items()}


def plan_writing(args, config, store, data):
    """The groups that are not written yet; prints what they will take, and ends the program if that is too much."""
    layers, done, lengths, sizes = len(store.index["layers"]), store.rows, row_lengths(data), {}
    for split, part in data.items():
        read = np.array(lengths[split]), *measure_read(part)
        sizes[split] = row_bytes(*read, config.hidden_size, layers, store.dtype).tolist()
    pending = [group for group in groups_of(lengths, args.batch_size) if any(f"{s}/{n}" not in done for s, n in group)]
    rows = [(split, number) for group in pending for split, number in group if f"{split}/{number}" not in done]
    header = 110 * (4 if store.dtype.itemsize > 1 else 6) * len(rows)  # names, shapes and places of the tensors
    tokens, size = (sum(of[split][number] for split, number in rows) for of in (lengths, sizes))
    size += header
    plain = 4 * 2 * config.hidden_size * tokens
    print(f"{len(rows):,} of {sum(map(len, data.values())):,} rows to write: {size / 1e9:.3f} GB, "
          f"{size / max(tokens, 1):,.0f} bytes a token ({size / max(plain, 1):.0%} of four layers of every token in "
          f"bfloat16)")  # fmt: skip
    free = shutil.disk_usage(args.output_path).free / 1e9
    for name, room in (("max_disk", args.max_disk), (f"the disk of {args.output_path}", free)):
        if room is not None and size / 1e9 > room:
            fail(f"{name} has room for {room:.3f} GB, {size / 1e9:.3f} GB are to be written: use "
                 "--hidden_states_dtype fp8, fewer rows or another disk")  # fmt: skip
    return pending


def write_all(args, target, store, data, pending):
    """Run the target on all groups; rows whose states are not finite are reported and left out."""
    rank, world = dist.get_rank(), dist.get_world_size()
    copies, writes, tokens = world // args.tp_size, rank % args.tp_size == 0, row_lengths(data)
    total = sum(tokens[split][number] for group in pending for split, number in group)
    bar = tqdm(total=total, unit="tok", unit_scale=True, disable=rank > 0, dynamic_ncols=True,
               mininterval=0.1 if sys.stderr.isatty() else 30)  # fmt: skip
    bad, written = [], 0
    with bar:  # closed, or the line of an error stands behind it
        for at in range(0, len(pending), copies):
            group = pending[at : at + copies][rank // args.tp_size : rank // args.tp_size + 1]
            rows = [(f"{split}/{number}", data[split][number]) for part in group for split, number in part]
            if not rows and args.target_sharding != "zero3":  # there all ranks gather the layers in each forward
                continue
            ids = [torch.tensor(row["input_ids"]) for _, row in rows] or [torch.zeros(4, dtype=torch.int64)]
            lengths = [len(x) for x in ids]
            states = target.hidden_states(torch.cat(ids).to(target.embedding.device), lengths)
            sequences = zip(rows if writes else (), ids, *(x.split(lengths) for x in states), strict=False)
            for (name, row), *parts in sequences:
                if name in store.rows:  # its group was interrupted
                    continue
                tensors = to_stored(parts[0], torch.tensor(row["loss_mask"]), *parts[1:], store.dtype)
                if store.add(name, tensors):
                    written += sum(tensor.nbytes for tensor in tensors.values())
                else:
                    bad.append(name)
            passed = [row for part in pending[at : at + copies] for row in part]
            bar.update(sum(tokens[split][number] for split, number in passed))
            bar.set_postfix_str(f"{written / 1e9:.2f} GB by this rank", refresh=False)
        store.flush(wait=True)
    every = [None] * world
    dist.all_gather_object(every, bad)
    return [name for part in every for name in part]


# (name, type, default, help, least value if any): see read_conversations.parse_flags
FLAGS = {
    "target and data": [
        ("target_model_path", str, ..., "folder or hub id; a folder may hold one nested model or an MLflow model"),
        ("data_path", str, ..., "folder written by prepare_data.py"),
        ("target_layer_ids", [int], None, "auxiliary layers, i = after i layers; none: 2 L//2 L-3"),
        ("trust_remote_code", boolean, False, "run code that comes with the target"),
    ],
    "how ranks share the target": SHARING_FLAGS,
    "what is written": [
        ("output_path", str, ..., "folder to write, or to go on with"),
        ("hidden_states_dtype", tuple(DTYPES), "bfloat16", "fp8: e4m3 with a scale per token and layer"),
        ("max_disk", float, None, "GB that this start may write; none: what the disk has", 0),
        ("dist_timeout", float, 20, "minutes a collective may take", 0),
        ("local_rank", int, -1, "set by the launcher; -1 = from LOCAL_RANK"),
    ],
}


INSTEAD = (  # SpecForge's flags that this script lacks: see drop_foreign
    ("enable_aux_hidden_states", "true", "they are always written"),
    ("aux_hidden_states_layers", "", "write --target_layer_ids, which are higher by one"),
    ("chat_template|max_length|num_samples|train_only_last_turn", "",
     "prepare the conversations with prepare_data.py, which takes these, and give its folder as --data_path"),
    ("build_dataset_num_proc", "", "prepare the conversations with prepare_data.py, where it is num_proc"),
    ("is_preformatted", "", 'prepare_data.py takes rows of {"text": ...} as they are'),
    ("cache_(dir|key)|model_download_dir", "", "downloads are kept in HF_HOME: drop it"),
    ("target_model_backend", "hf", "transformers runs the target: drop it"),
    ("sglang_.*", "", "transformers runs the target: drop it"),
)  # fmt: skip


def parse_args(argv=None):
    args = parse_flags(__doc__, FLAGS, drop_foreign(argv, INSTEAD))
    if args.data_path.endswith((".json", ".jsonl")):
        fail(f"data_path {args.data_path} is a file: give the folder that prepare_data.py makes of it")
    return args


def main(args):
    device, world = start_distributed(args.dist_timeout, args.local_rank), dist.get_world_size()

    def prepare():
        check_sharding(args, world)
        data, data_config = open_data(args.data_path)
        model_dir = resolve_target(args.target_model_path)
        config, _ = read_target_config(model_dir, args.trust_remote_code)
        check_heads(config, args.tp_size)
        tokenizer = hash_tokenizer(load_tokenizer(args.target_model_path, args.trust_remote_code))
        if data_config["ingredients"]["tokenizer"] != tokenizer:
            fail(f"{args.data_path} was prepared with another tokenizer or chat template than the target's")
        layers = args.target_layer_ids or default_layer_ids(config.num_hidden_layers)
        settings = store_settings(model_dir, layers, data_config)
        store = Store(args.output_path, settings, create=args.hidden_states_dtype)
        if store.dtype != DTYPES[args.hidden_states_dtype]:
            fail(f"{args.output_path} is written in {store.index['dtype']}: give --hidden_states_dtype "
                 f"{store.index['dtype']}, or another folder")  # fmt: skip
        store.remove_rests()
        return args, layers, settings, plan_writing(args, config, store, data)

    args, layers, settings, pending = on_first_rank(prepare)
    data, _ = open_data(args.data_path)
    store = Store(args.output_path, settings)
    model_dir = on_each_node(lambda: resolve_target(args.target_model_path))
    target = load_as_asked(args, model_dir, device, layers) if pending else None
    try:
        bad = write_all(args, target, store, data, pending)
        if dist.get_rank() == 0:
            store.write_index()
    except OSError as error:
        fail(f"{error}; what has been written stays: make room and start again")
    if dist.get_rank() == 0:
        size = sum(path.stat().st_size for path in store.folder.glob("*.safetensors"))
        print(f"{args.output_path}: {len(store.rows):,} rows, {size / 1e9:.3f} GB, {len(bad)} rows left out")
        if bad and args.batch_size > 1:  # attention gives nan x 0 to the other rows of a forward
            print("rows that shared a forward with a bad one may be good: start again with --batch_size 1 to see")


if __name__ == "__main__":
    run_together(main, parse_args())
