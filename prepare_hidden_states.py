"""The target model: what it reads at a time, which of its layers are read, how it is loaded, what it says about a text.

In:  a target in a Hugging Face folder (one safetensors file or several, tied embeddings or not); tokens and loss masks
     of prepare_data.py, dealt to ranks and put behind one another without padding.
Out: per token the auxiliary hidden states [3·Ht] and the last hidden state [Ht] (after the final norm), and from the
     latter the teacher: the distribution over the draft vocabulary and the full-vocabulary argmax.

train_eagle3.py imports this file and keeps the target in memory. To look at what a target gives for a text:

    python prepare_hidden_states.py --target_model_path meta-llama/Llama-3.1-8B-Instruct --text "Hello, how are you?"
"""

import argparse
import atexit
import bisect
import contextlib
import ctypes
import datetime
import functools
import hashlib
import itertools
import json
import math
import os
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from prepare_data import SMALL_FILES, boolean, fail, load_tokenizer, locate, normalise_argv

QUERY_CHUNK = 128  # slots whose attention is formed at a time
BLOCK = 128  # slots and keys of a block of FlexAttention
HEAD_ROWS, HEAD_TOKENS = 1024, 512  # rows of draft logits, and tokens of teacher logits, that exist at a time
MIN_TARGET_LAYERS = 7  # below that 2, L//2 and L-3 are not three distinct layers
# Keys under which transformers' model families keep a factor of their logits. Some multiply by it and some divide
# (Granite divides by logits_scaling, HyperCLOVA X multiplies): which one holds is found out by a forward of the model.
LOGIT_SCALE_KEYS = ("logits_scaling", "logit_scale", "lm_head_multiplier", "output_multiplier")


def start_distributed(timeout, local_rank=-1):
    """Join the process group that the variables of a launcher or a service describe, or be a group of one.

    timeout: minutes that a collective may take. local_rank: the launcher's flag, -1 = from the variables. Returns the
    device of this rank.
    """
    import deepspeed

    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if "RANK" in missing:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        os.environ.update(zip((*names, "LOCAL_RANK"), ("0", "1", "127.0.0.1", port, "0"), strict=True))
    elif missing:
        fail(f"RANK is set, but not {', '.join(missing)}: set all of {', '.join(names)}, or none of them for one rank")
    cuda = torch.cuda.is_available()
    if local_rank < 0:  # some services set RANK alone: ranks are dealt to a node's devices in turn
        local_rank = int(os.environ["RANK"]) % torch.cuda.device_count() if cuda else 0
    os.environ.setdefault("LOCAL_RANK", str(local_rank))
    # DeepSpeed builds its C++ helper with the ninja that it finds: the environment's own, activated or not.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
        with contextlib.suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as way:
            # gloo listens at the address of the host's name, on many systems the loopback's: rather towards rank 0.
            way.connect((os.environ["MASTER_ADDR"], 1))  # sends nothing
            for name, addresses in psutil.net_if_addrs().items():
                if way.getsockname()[0] in (entry.address for entry in addresses):
                    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    timeout = datetime.timedelta(minutes=timeout)
    # Groups that DeepSpeed and device meshes make name no timeout: they take these defaults, not that of the world.
    dist.distributed_c10d.default_pg_timeout = dist.distributed_c10d.default_pg_nccl_timeout = timeout
    deepspeed.init_distributed("nccl" if cuda else "gloo", timeout=timeout, verbose=False)
    if dist.get_world_size() > 1 and not Watch.running:
        Watch.running = Watch(max(timeout.total_seconds() / 2, 10))  # names a rank before a collective gives up
    return device


class Watch:
    """Ends this rank when another one has died, hangs or has failed, with a line that names that one.

    Each rank has a connection with rank 0, and sends every second what its peer shall say when it is gone. The kernel
    closes the connection of a process that dies, however it does. Rank 0 then ends with the same words, and so all do.
    A rank that ends as it should leaves an empty line.
    """

    running = None

    def __init__(self, limit):
        self.limit, self.peers, self.sending, self.ending = limit, [], threading.Lock(), threading.Lock()
        self.me = f"rank {dist.get_rank()} (host {socket.gethostname()}, pid {os.getpid()})"
        self.words = f"{self.me} has died: it was killed, or its own output says why"
        both = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
        server = socket.create_server(("", 0), backlog=4096, **both)
        port = [server.getsockname()[1]]
        dist.broadcast_object_list(port)
        atexit.register(self.tell, "")
        threading.Thread(target=self.beat, args=[server, *port], daemon=True).start()

    def beat(self, server, port):
        """Connect, rank 0 with whoever comes and another rank with rank 0, and repeat this rank's words for good."""
        server.settimeout(1)
        if dist.get_rank():
            peer = socket.create_connection((os.environ["MASTER_ADDR"], port))
            threading.Thread(target=self.hear, args=[peer], daemon=True).start()
        while True:
            with contextlib.suppress(TimeoutError):  # on other ranks nobody comes: it takes a second
                threading.Thread(target=self.hear, args=[server.accept()[0]], daemon=True).start()
            self.tell()

    def hear(self, peer):
        """Listen to a peer until its end, or until it is silent for `limit` seconds."""
        os.register_at_fork(after_in_child=functools.partial(os.close, peer.fileno()))  # else a worker keeps it open
        peer.settimeout(self.limit)
        words = ""
        try:
            peer.sendall(f"{self.words}\n".encode())
            self.peers.append(peer)
            for line in peer.makefile():
                words = line
        except OSError as error:  # or a reset, as the end left something unread
            if isinstance(error, TimeoutError):
                name = words.partition(")")[0]
                words = f"{name}) has not been heard of for {self.limit:.0f} s: it hangs or cannot be reached"
        if words.startswith("rank"):  # no stranger, and not the empty line
            self.end(words.strip())

    def tell(self, words=None):
        """Send this rank's words, from now on the given ones."""
        with self.sending:
            self.words = self.words if words is None else words
            for peer in self.peers:
                with contextlib.suppress(OSError):  # gone: `hear` sees it
                    peer.sendall(f"{self.words}\n".encode())

    def end(self, why):
        """End this rank, on rank 0 all others too."""
        self.ending.acquire()  # for good: the first reason counts
        self.tell(why)
        sys.stdout.flush()
        print(f"error: {why}", file=sys.stderr, flush=True)
        os._exit(1)


def run_together(main, args):
    """Run main(args). A rank that fails says why, as it would alone; the others end with a line that names it."""
    try:
        main(args)
    except BaseException as error:
        watch, code = Watch.running, getattr(error, "code", 1)
        if not watch or not code:
            raise
        if not isinstance(error, SystemExit):
            time.sleep(1)  # if this follows from another rank's death, the watch has seen that, and ends this one
            print(f"{watch.me}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        watch.ending.acquire()
        watch.tell(f"{watch.me} ended by {error!r}: its own output says why")
        time.sleep(2)  # for ranks that fail for the same reason to say so
        sys.stdout.flush()
        os._exit(code)
    dist.destroy_process_group()


def keep_freed_memory():
    """On CPUs: have glibc keep what is freed. It would give large blocks back and page them in anew in every step."""
    with contextlib.suppress(AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped on its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def read_deepspeed_config(path, decided, device):
    """DeepSpeed's configuration of a JSON file, completed by what flags decide: {key: (flag, value)}.

    A value in the file that contradicts a flag ends the program.
    """
    try:
        config = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        fail(f"deepspeed_config {path} cannot be read: {error}")
    if not isinstance(config, dict) or config.get("fp16", {}).get("enabled"):
        fail(f"deepspeed_config {path} must be a JSON object, and without fp16: bf16 is what trains")
    for key, (flag, value) in decided.items():
        if config.get(key, "auto") not in ("auto", value):
            fail(f"{path}: {key} {config[key]} contradicts {flag} {value}; remove it from the file")
        config[key] = value
    for key in {"optimizer", "scheduler"} & config.keys():
        fail(f"{path}: {key} is decided by the flags of train_eagle3.py; remove it from the file")
    half = config.setdefault("bf16", {})
    if half.get("enabled", "auto") == "auto":  # CPUs train in fp32 unless the file asks for bf16
        half["enabled"] = device.type == "cuda"
    config.setdefault("steps_per_print", sys.maxsize)
    config.setdefault("timers", {"throughput": {"enabled": False}})  # it would wait for the device in every micro-batch
    return config


def flag_parser(description, groups):
    """The parser of {title: [(name, type, default, help, least value if any)]}.

    type: a tuple lists choices, [int] takes several values; default ... means required.
    """
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=form, allow_abbrev=False)
    for title, rows in groups.items():
        group = parser.add_argument_group(title)
        for name, kind, default, text, *_ in rows:
            # Of a path only the name: the help is the same wherever the repository lies.
            shown = "none" if default is None else Path(default).name if str(default).startswith("/") else default
            options = {"default": default, "help": f"{text} (default: {shown})"}
            if default is ...:
                options = {"required": True, "help": f"{text} (required)"}
            if isinstance(kind, tuple):
                options["choices"] = kind
            elif isinstance(kind, list):
                options |= {"type": kind[0], "nargs": "+"}
            else:
                options |= {"type": kind} | ({"nargs": "?", "const": True} if kind is boolean else {})
            group.add_argument(f"--{name}", **options)
    parser.error = fail
    return parser


def on_first_rank(work):
    """Run work() on rank 0 while the others wait, and give them its result; if it ends the program, all end."""
    result = [None, 1]
    if dist.get_rank() == 0:
        try:
            result = [work(), 0]
        except SystemExit as stop:
            result[1] = stop.code
            raise
        finally:
            dist.broadcast_object_list(result)
    else:
        dist.broadcast_object_list(result)
        if result[1]:
            sys.exit(result[1])
    return result[0]


def on_each_node(work):
    """Run work() on the first rank of each node, then on the others: they find what it downloaded."""
    for turn in (True, False):
        if turn == (os.environ["LOCAL_RANK"] == "0"):
            result = work()
        dist.barrier()
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Batches: concatenated documents, and which of their slots are supervised


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


def fill(rows, count, sizes, room, work):
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


def deal(rows, lengths, work, world_size, micro_batch_size, total_seq_len=0):
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
    shares = fill(sorted(place, key=lambda row: -work[row]), world_size, one, most, work)  # heaviest first
    # First-fit decreasing, as among lists without work the first with room is taken, tells how many a rank needs. The
    # same number of lists is then filled evenly if that fits as well.
    packs = [fill(sorted(share, key=lambda row: -lengths[row]), len(rows), sizes, room, nothing) for share in shares]
    count = max(sum(map(bool, lists)) for lists in packs)
    dealt = [fill(share, count, sizes, room, work) or tight[:count] for share, tight in zip(shares, packs, strict=True)]
    return [[sorted(part, key=place.get) for part in lists] for lists in dealt]


class Steps(torch.utils.data.Dataset):
    """steps[s]: what this rank reads in optimizer step s >= 0, epoch after epoch; len(steps): the steps of one epoch.

    A list of micro-batches, which `deal` made: lists of (input_ids, loss_mask), int64 [S] each, on the CPU. A loader
    whose workers return many should join them: each tensor on its way takes a file descriptor, often one of 1,024.
    """

    def __init__(self, split, seed, global_batch_size, rank, world_size, micro_batch_size, total_seq_len=0):
        self.split = split.with_format("torch", columns=["input_ids", "loss_mask"])
        self.lengths, supervised = measure_rows(split)
        self.work = self.lengths + supervised  # the forward pass of an 8B target, seven steps of its draft: about equal
        self.seed, self.size, self.rank = seed, global_batch_size, rank
        self.dealing = world_size, micro_batch_size, total_seq_len

    def __len__(self):
        return math.ceil(len(self.split) / self.size)

    def __getitem__(self, step):
        epoch, index = divmod(step, len(self))
        rows = epoch_order(len(self.split), self.seed, epoch)[index * self.size : (index + 1) * self.size]
        mine = deal(rows, self.lengths, self.work, *self.dealing)[self.rank]
        return [[(row["input_ids"], row["loss_mask"]) for row in map(self.split.__getitem__, part)] for part in mine]


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


def collate(micro_batches, steps):
    """Micro-batches, lists of (input_ids [S], loss_mask [S]), as target and objective read them; on the CPU.

    An empty one becomes four unsupervised tokens: its gradient is zero, and the ranks stay in step.
    Returns (all tensors in one int64 [N], the batches with sizes in their place): a worker needs a file descriptor for
    each tensor that it hands over, and one tensor is pinned and copied to the device at once.
    """
    batches, tensors, nothing = [], [], torch.zeros(4, dtype=torch.int64)
    for sequences in micro_batches:
        input_ids, masks = zip(*(sequences or [(nothing, nothing)]), strict=True)
        lengths, loss_mask = [len(ids) for ids in input_ids], torch.cat(masks)
        document_ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        plan = plan_slots(supervised_slots(loss_mask, document_ids, steps), lengths)
        batch = {"input_ids": torch.cat(input_ids), "position_ids": positions_of(lengths), "loss_mask": loss_mask}
        batch |= {"lengths": lengths, **plan._asdict()}
        tensors += [x.flatten() for x in batch.values() if torch.is_tensor(x)]
        batches.append({name: x.shape if torch.is_tensor(x) else x for name, x in batch.items()})
    return torch.cat(tensors), batches


def read_steps(split, args, device, steps=None, **sizes):
    """Yield this rank's micro-batches of each of `steps` (default: an epoch), read ahead by num_workers processes."""
    data = Steps(split, args.seed, rank=dist.get_rank(), world_size=dist.get_world_size(), **sizes)
    loader = DataLoader(
        data, sampler=range(len(data)) if steps is None else steps, batch_size=None, num_workers=args.num_workers,
        collate_fn=functools.partial(collate, steps=args.ttt_length), pin_memory=device.type == "cuda",
        prefetch_factor=args.prefetch_factor if args.num_workers else None,
    )  # fmt: skip
    for tensors, batches in loader:
        counts = [x.numel() for batch in batches for x in batch.values() if isinstance(x, torch.Size)]
        parts = iter(tensors.to(device, non_blocking=True).split(counts))
        yield [
            {name: next(parts).view(x) if isinstance(x, torch.Size) else x for name, x in batch.items()}
            for batch in batches
        ]


# ----------------------------------------------------------------------------------------------------------------------
# The target


@dataclass
class Head:
    """The target's output head: logits = scale · (W h + b), and with a soft cap c: c · tanh(logits / c)."""

    weight: torch.Tensor  # [V, Ht]
    bias: torch.Tensor | None = None  # [V]
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden):
        """Logits [N, V] of hidden states [N, Ht] (after the final norm), in fp32 at least."""
        logits = F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = logits * self.scale if self.scale != 1 else logits
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    def teach(self, hidden, draft_ids):
        """What the target says about the next token: p [N, Vd] over the draft vocabulary, in fp32 at least; mass [N],
        the share of the whole that this is; argmax [N] over the full vocabulary (the lowest id among equals).

        hidden [N, Ht]: few rows at a time, as [N, V] logits are formed. draft_ids [Vd]: target ids, ascending.
        """
        logits = self.logits(hidden)
        top, best = logits.max(dim=-1)
        share = logits.softmax(dim=-1).gather(1, best[:, None])[:, 0]  # so the logsumexp is top - log(share)
        if len(draft_ids) < logits.shape[1]:
            logits = logits[:, draft_ids]
        p = logits.softmax(dim=-1)
        drafted, index = logits.max(dim=-1)
        return p, (drafted - top).exp() * share / p.gather(1, index[:, None])[:, 0], best


@dataclass
class Target:
    """A frozen target and its pieces. Sizes: Ht hidden, V vocabulary, L layers."""

    model: torch.nn.Module  # the whole causal language model
    config: object  # its text configuration
    head: Head
    embedding: torch.Tensor  # [V, Ht], without any factor that the family puts on its embeddings
    layer_ids: list  # in transformers' hidden_states indexing: 0 = embeddings, i = after i layers
    packs: bool = True  # whether the family ends attention at the borders of concatenated sequences
    captured: dict = field(default_factory=dict)

    def __post_init__(self):
        self.decoder = self.model.get_decoder()
        if not hasattr(self.decoder, "layers"):
            fail(f"the layers of model_type {self.config.model_type} are not where hooks look: it is not supported")
        for index in self.layer_ids:
            # hidden_states[0] is what enters the first layer; hidden_states[i] what the i-th leaves behind.
            if index == 0:
                self.decoder.layers[0].register_forward_pre_hook(self._keep_input, with_kwargs=True)
            else:
                self.decoder.layers[index - 1].register_forward_hook(self._keep_output(index))

    def _keep_input(self, module, args, kwargs):
        self.captured[0] = args[0] if args else kwargs["hidden_states"]

    def _keep_output(self, index):
        def hook(module, args, output):
            self.captured[index] = output[0] if isinstance(output, tuple) else output

        return hook

    def hidden_states(self, input_ids, lengths):
        """One forward over concatenated sequences, without the head.

        input_ids [T] int64 with T = sum(lengths). Positions restart and attention ends at every sequence's border: with
        neither mask nor cache, most families read the borders off the position ids. For those that do not, the
        sequences are padded at the right, which no causal model can see from the left.
        Returns auxiliary hidden states [T, 3·Ht] and the last hidden state [T, Ht], in the target's dtype.
        """
        keep, positions = 0, positions_of(lengths, input_ids.device)[None]
        input_ids = input_ids[None]
        if not self.packs:
            input_ids = pad_sequence(input_ids[0].split(lengths), batch_first=True)
            positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
            keep = positions < torch.tensor(lengths, device=input_ids.device)[:, None]
        with torch.inference_mode():
            output = self.decoder(input_ids=input_ids, position_ids=positions, use_cache=False)
        # Copied outside inference mode: autograd refuses to save an inference tensor for the draft's backward.
        return self.auxiliary(keep), output.last_hidden_state[keep].clone()

    def states(self, batches, batch_size):
        """Yield (auxiliary [T, 3·Ht], last [T, Ht]) of each of batches: {"input_ids" [T], "lengths": its sequences'}.

        batch_size sequences share one forward, across batches.
        """
        sequences = [ids for batch in batches for ids in batch["input_ids"].split(batch["lengths"])]
        ready = []
        for batch in batches:
            while len(ready) < len(batch["lengths"]):
                group, sequences = sequences[:batch_size], sequences[batch_size:]
                lengths = [len(ids) for ids in group]
                ready += zip(*(x.split(lengths) for x in self.hidden_states(torch.cat(group), lengths)), strict=True)
            mine, ready = ready[: len(batch["lengths"])], ready[len(batch["lengths"]) :]
            yield tuple(map(torch.cat, zip(*mine, strict=True)))

    def auxiliary(self, keep=0):
        """The auxiliary hidden states [T, 3·Ht] that the last forward left behind; keep: which of [batch, tokens]."""
        return torch.cat([self.captured.pop(index)[keep] for index in self.layer_ids], dim=-1)


def resolve_target(path_or_hub_id, weights=True):
    """The folder with config.json and weights of a snapshot, of the one model below a folder, of MLflow or a hub id.

    weights=False downloads only the small files of a hub id. Ends with one line if there is no such model.
    """
    model_dir = locate(path_or_hub_id, ["config.json"], SMALL_FILES + ["*.safetensors"] * weights)
    if weights and not any(model_dir.glob("*.safetensors")):  # on the hub there may be weights in the older format
        model_dir = locate(path_or_hub_id, ["config.json"], [*SMALL_FILES, "*.bin"])
    if model_dir.name == "config" and (model_dir.parent / "model").is_dir():
        return _link_together(model_dir, model_dir.parent / "model")
    return model_dir


def _link_together(*folders):
    """One folder of links in the hub's cache: transformers wants one folder, and the input may be mounted read-only."""
    files = {path.name: path for folder in folders for path in sorted(folder.iterdir()) if path.is_file()}
    name = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:16]
    merged = Path(constants.HF_HOME) / "mlflow_models" / name
    merged.mkdir(parents=True, exist_ok=True)
    for name, path in files.items():
        with contextlib.suppress(FileExistsError):  # another rank was faster
            (merged / name).symlink_to(path)
    return merged


def read_target_config(model_dir, trust_remote_code=False):
    """(text configuration, whole configuration) of a target folder; ends the program if it cannot train a draft."""
    try:
        config = AutoConfig.from_pretrained(model_dir, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        fail(f"target_model_path {model_dir}: its config.json cannot be read: {str(error).splitlines()[0]}")
    text = config.get_text_config()
    if text.num_hidden_layers < MIN_TARGET_LAYERS:
        fail(
            f"the target {model_dir} has {text.num_hidden_layers} layers; EAGLE-3 reads three distinct ones "
            f"(2, L//2, L-3), which needs at least {MIN_TARGET_LAYERS}"
        )
    return text, config


def default_layer_ids(num_layers):
    """The auxiliary layers 2, L//2, L-3 in hidden_states indexing (the default of SGLang and vLLM)."""
    return [2, num_layers // 2, num_layers - 3]


def load_target(model_dir, device="cpu", dtype="auto", layer_ids=None, trust_remote_code=False):
    """The target in memory, frozen, ready for hidden_states(); dtype "auto" is the one it was saved in.

    Loads with transformers, so single-file, sharded and tied weights need nothing here. Before it is used, its logits
    are compared with what Head makes of the last hidden state: a family that forms them otherwise ends the program.
    """
    text, _ = read_target_config(model_dir, trust_remote_code)
    layers, layer_ids = text.num_hidden_layers, list(layer_ids or default_layer_ids(text.num_hidden_layers))
    if not all(0 <= index <= layers for index in layer_ids) or len(set(layer_ids)) != len(layer_ids):
        fail(f"auxiliary layers {layer_ids}: must be distinct and within 0..{layers}, the layers of {model_dir}")
    try:
        model, info = AutoModelForCausalLM.from_pretrained(  # straight to the device: a copy a rank fits no host memory
            model_dir, dtype=dtype, device_map={"": device}, trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        fail(f"the target {model_dir} cannot be loaded: {str(error).strip().splitlines()[0]}")
    if info["missing_keys"]:  # transformers would go on with random values
        fail(f"the weights of the target {model_dir} lack {', '.join(sorted(info['missing_keys'])[:5])}")
    model.eval().requires_grad_(False)
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings().weight.detach()
    head = Head(output.weight.detach(), None if output.bias is None else output.bias.detach())
    target = Target(model, text, head, embedding, layer_ids)
    _fit_head(target)
    target.packs = _ends_at_borders(target)
    return target


def _probe(target, count):
    """`count` token ids to try the target on."""
    return torch.arange(1, count + 1, device=target.embedding.device) % len(target.embedding)


def _fit_head(target):
    """Find scale and soft cap of the target's logits by one forward of the whole model; fail if nothing fits."""
    config, head, ids = target.config, target.head, _probe(target, 8)
    with torch.inference_mode():
        own = target.model(input_ids=ids[None], use_cache=False).logits[0].float()
    _, last = target.hidden_states(ids, [len(ids)])
    scales = [1.0]
    for value in (getattr(config, key, None) for key in LOGIT_SCALE_KEYS):
        if isinstance(value, int | float) and not isinstance(value, bool) and value:
            scales += [float(value), 1 / value]
    cap = getattr(config, "final_logit_softcapping", None)
    gaps = {}
    for softcap in dict.fromkeys((cap or None, None)):
        for scale in scales:
            head.scale, head.softcap = scale, softcap
            gaps[scale, softcap] = float((head.logits(last) - own).abs().max())
    head.scale, head.softcap = best = min(gaps, key=gaps.get)  # the best, as small logits fit several
    tolerance = 1e-4 if head.weight.dtype == torch.float32 else 2e-2  # bf16 rounds logits to 3 digits
    if not gaps[best] <= tolerance * own.abs().max():
        fail(
            f"the target's logits are not its head applied to its last hidden state (model_type {config.model_type}, "
            f"tried scales {scales}, soft cap {cap}, smallest difference {gaps[best]:.3g} of logits up to "
            f"{own.abs().max():.3g}): this family is not supported"
        )


def _ends_at_borders(target):
    """Whether a sequence gets the same states behind another one as alone; some families ignore the position ids."""
    ids, count = _probe(target, 24), 16
    behind, alone = target.hidden_states(ids, [count, 8])[1][count:], target.hidden_states(ids[count:], [8])[1]
    gaps = (behind - alone).float().norm(dim=-1) / alone.float().norm(dim=-1)
    # The median, because rounding may send single tokens to other experts. What leaks in shows in every token.
    return bool(gaps.median() < (1e-4 if alone.dtype == torch.float32 else 2e-2))


def read_target_tensor(model_dir, names):
    """The first tensor of `names` that a target's safetensors files hold, read alone; if none, the program ends."""
    model_dir = Path(model_dir)
    index = model_dir / "model.safetensors.index.json"
    if index.exists():
        weight_map = json.loads(index.read_text())["weight_map"]
    elif (model_dir / "model.safetensors").exists():
        with safe_open(model_dir / "model.safetensors", "pt") as file:
            weight_map = dict.fromkeys(file.keys(), "model.safetensors")
    else:
        fail(f"{model_dir} has neither model.safetensors nor model.safetensors.index.json")
    for name in names:
        if name in weight_map:
            with safe_open(model_dir / weight_map[name], "pt") as file:
                return file.get_tensor(name)
    fail(f"{model_dir} holds none of the tensors {', '.join(names)}")


FLAGS = {
    "the target and a text": [
        ("target_model_path", str, ..., "folder or hub id of the target"),
        ("text", str, ..., "text to run the target on"),
        ("target_layer_ids", [int], None, "auxiliary layers, i = after i layers; none: 2 L//2 L-3"),
        ("trust_remote_code", boolean, False, "run code that comes with the target"),
    ]
}


def parse_args(argv=None):
    return flag_parser(__doc__, FLAGS).parse_args(normalise_argv(sys.argv[1:] if argv is None else argv))


def main(args):
    model_dir = resolve_target(args.target_model_path)
    tokenizer = load_tokenizer(args.target_model_path, args.trust_remote_code)
    ids = tokenizer(args.text)["input_ids"]
    if not ids:
        fail("text has no tokens")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = load_target(model_dir, device, layer_ids=args.target_layer_ids, trust_remote_code=args.trust_remote_code)
    ids = torch.tensor(ids, device=device)
    auxiliary, last = target.hidden_states(ids, [len(ids)])
    best, argmax = target.head.logits(last).log_softmax(dim=-1).max(dim=-1)
    print(f"layers {target.layer_ids} of {target.config.num_hidden_layers}, logit scale {target.head.scale}, "
          f"soft cap {target.head.softcap}, auxiliary {tuple(auxiliary.shape)}, last {tuple(last.shape)}")  # fmt: skip
    for token, follows, p in zip(ids.tolist(), argmax.tolist(), best.tolist(), strict=True):
        print(f"{tokenizer.decode([token])!r:>20} -> {tokenizer.decode([follows])!r:<20} {math.exp(p):.3f}")


if __name__ == "__main__":
    main(parse_args())
