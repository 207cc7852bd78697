"""Sources of the target's hidden states: `Online` runs the target, `Stored` reads a store and generates what it misses.

Both have the same three methods. `fetch(data, assigned)` runs in the data loader's workers and yields, for each
micro-batch of this rank, its rows and what the source needs beside them. `steps(data, steps, load)` yields the batches
of each optimizer step. `states(batches)` yields (auxiliary [T, n·Ht], last [T, Ht]) of each batch, in the target's
dtype. `target` has the head and the embedding.
"""

import functools
import itertools
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from core import common, dataloader, hidden_states, ranks, server, slots, target_files, target_model, vllm_states


class Forward(NamedTuple):
    """The tokens of a forward of the target, in which several ranks may take part."""

    input_ids: torch.Tensor  # [N] int64: concatenated sequences
    lengths: list  # of the sequences
    first: int  # the sequences first to end are this rank's
    end: int

    def run(self, target):
        """[(auxiliary [S, n·Ht], last [S, Ht])] of this rank's sequences."""
        auxiliary, last = target.hidden_states(self.input_ids, self.lengths, self.first, self.end)
        lengths = self.lengths[self.first : self.end]
        return list(zip(auxiliary.split(lengths), last.split(lengths), strict=True))


def forward_of(part, read):
    """The Forward of a dataloader.Forward, which names rows; read(number) -> (number, input_ids, loss_mask)."""
    input_ids = [read(number)[1] for number in part.rows]
    return Forward(torch.cat(input_ids), [len(ids) for ids in input_ids], part.first, part.end)


class Online:
    """Hidden states of the target in memory.

    batch_size: sequences per rank in one forward. Groups of group_size ranks share the sequences of a forward; groups
    of in_step ranks do the same number of forwards.
    """

    def __init__(self, target, batch_size, group_size=1, in_step=1):
        self.target = target
        self.sizes = (batch_size, group_size, in_step)

    def fetch(self, data, assigned):
        read = functools.cache(data.row)
        forwards = dataloader.assign_forwards(assigned, data.rank, *self.sizes)
        for numbers, parts in zip(assigned[data.rank], forwards, strict=True):
            rows = [read(number) for number in numbers]
            yield rows, [forward_of(part, read) for part in parts]

    def steps(self, data, steps, load):
        return load(steps)

    def states(self, batches):
        ready = []  # the forwards before a batch may be about later ones too
        for batch in batches:
            for forward in batch.states:
                ready += forward.run(self.target)
            count = len(batch.lengths)
            auxiliary, last = zip(*ready[:count], strict=True)
            ready = ready[count:]
            yield torch.cat(auxiliary), torch.cat(last)


@dataclass
class Fetched:
    """What Stored has for a batch: states from the store, and how missing ones are generated."""

    split: str
    tensors: dict = field(
        default_factory=dict
    )  # as in the store, concatenated; "aux_at", "last_at": tokens of the batch
    problems: list = field(
        default_factory=list
    )  # of each sequence: why its states are not in the store, "" if they are
    forwards: list = field(default_factory=list)  # of the target, before this batch
    served: list = field(default_factory=list)  # hidden states [S, layers, Ht] from a server


class Stored:
    """Hidden states from a store and, under on_missing generate, from the target or a server for missing rows.

    target: maybe its head and embedding alone; load() gives the complete one, should a row turn out to be damaged.
    keeps: whether generated states are added to the store. sizes: (batch_size, group_size, in_step) as of Online.
    """

    def __init__(self, store, target, load, on_missing, keeps, sizes, vllm=None):
        self.store = store
        self.target = target
        self.load = load
        self.on_missing = on_missing
        self.keeps = keeps
        self.sizes = sizes
        self.vllm = vllm
        self.counts = Counter()  # missing rows by split and problem
        self.embedding = target.embedding
        self.norm = target.norm

    # --- in a worker ---

    def fetch(self, data, assigned):
        for numbers in assigned[data.rank]:
            rows = []
            fetched = Fetched(data.name)
            parts = {}
            start = 0
            for number in numbers:
                row, tensors, problem = self.read(data, number)
                for name, tensor in self.placed(tensors, row, start):
                    parts.setdefault(name, []).append(tensor)
                rows.append(row)
                fetched.problems.append(problem)
                start += len(row[1])
            fetched.tensors = {name: torch.cat(several) for name, several in parts.items()}
            yield rows, fetched

    def read(self, data, number):
        """A row (number, input_ids, loss_mask), its tensors in the store or None, and "" or what the problem is."""
        row = data.row(number)
        if number < 0:
            return row, None, ""
        tensors, problem = self.store.read(f"{data.name}/{number}")
        if tensors and not all(same(tensors.pop(name), x) for name, x in zip(dataloader.COLUMNS, row[1:], strict=True)):
            tensors = None
            problem = "of other tokens"
        if problem and self.on_missing in ("skip", "warn"):
            _, *nothing = data.row(-1)
            row = (number, *nothing)
        return row, tensors, problem

    def placed(self, tensors, row, start):
        """(name, tensor) of a row's states, and of the tokens of the batch that they belong to."""
        if tensors:
            count, teachers = slots.tokens_read(row[2])
            yield "aux_at", torch.arange(start, start + count)
            yield "last_at", start + teachers
            yield from tensors.items()

    # --- in the main process ---

    def steps(self, data, steps, load):
        """Epoch by epoch, if rows are generated: what is generated in one, the next ones read."""
        borders = [steps.start, steps.stop]
        if self.on_missing == "generate":
            borders[1:1] = [at for at in steps[1:] if at % len(data) == 0]
        for start, stop in itertools.pairwise(borders):
            self.synchronise()
            for batches in self.ask_ahead(load(range(start, stop)), data):
                self.handle_missing(batches, data)
                yield batches
        self.synchronise()

    def synchronise(self):
        """Write what is still in memory, see what all ranks wrote, print how many rows were missing."""
        self.flush()
        gathered = ranks.gather(self.counts)
        self.store.refresh()
        counts = sum(gathered, Counter())
        if counts and dist.get_rank() == 0:
            fate = "generated" if self.on_missing == "generate" else "left out"
            numbers = ", ".join(f"{what} {count:,}" for what, count in counts.items())
            print(f"{self.store.folder}: {numbers} ({fate})")
        self.counts.clear()

    def flush(self):
        try:
            self.store.flush(wait=True)
        except OSError as error:
            self.give_up_keeping(error)

    def keep(self, row, tensors):
        try:
            self.store.add(row, tensors)
        except OSError as error:
            self.give_up_keeping(error)

    def give_up_keeping(self, error):
        """The disk is full: the training goes on, and generates again what is not kept."""
        print(f"hidden states are not kept from here on: {error}", file=sys.stderr)
        self.keeps = False
        self.store.drop_unwritten()

    def ask_ahead(self, loaded, data):
        """The batches of each step; a server is asked for missing rows while training is busy with the step before."""
        if not self.vllm:
            yield from loaded
            return
        waiting = None
        for batches in loaded:
            for number in missing_rows(batches):
                _, input_ids, _ = data.row(number)
                self.vllm.ask(f"{data.name}/{number}", input_ids.tolist())
            if waiting is not None:
                yield waiting
            waiting = batches
        if waiting is not None:
            yield waiting

    def handle_missing(self, batches, data):
        """Do about missing rows what on_missing says, before the first forward of an optimizer step."""
        for batch in batches:
            for number, problem in zip(batch.rows, batch.states.problems, strict=True):
                if problem:
                    self.report(data.name, number, problem)
        if self.on_missing != "generate":
            return
        if self.vllm:
            self.collect(batches, data.name)
        else:
            self.plan_forwards(batches, data)

    def report(self, split, number, problem):
        self.counts[f"{split} rows {problem}"] += 1
        row = f"{split}/{number}"
        shard, _ = self.store.rows.get(row, ("", None))
        message = f"row {row} of {self.store.folder / shard} is {problem}"
        if self.on_missing == "raise":
            remove = "" if problem == "missing" else "remove this file, "
            common.fail(f"{message}: {remove}write it with prepare_hidden_states.py, or choose another on_missing")
        if self.on_missing == "warn":
            print(f"{message}: left out", file=sys.stderr)

    def plan_forwards(self, batches, data):
        """Assign the target's forwards for missing rows; all ranks that share the target take part."""
        missing = [missing_rows([batch]) for batch in batches]
        assigned = [missing]
        rank = 0
        if self.sizes[2] > 1:
            assigned = ranks.gather(missing)
            rank = dist.get_rank()
        if self.target.decoder is None and any(itertools.chain(*assigned)):  # here, as its ranks load it together
            print(f"{self.store.folder} has damaged rows: loading the target", file=sys.stderr)
            self.target = self.load()
        forwards = dataloader.assign_forwards(assigned, rank, *self.sizes)
        for batch, parts in zip(batches, forwards, strict=True):
            for part in parts:
                forward = forward_of(part, data.row)
                input_ids = forward.input_ids.to(self.embedding.device)
                batch.states.forwards.append(forward._replace(input_ids=input_ids))

    def collect(self, batches, split):
        """Wait for what the server was asked for. ServerFailed on all ranks if one of them does not get it."""
        failed = ""
        try:
            for batch in batches:
                batch.states.served = [self.vllm.take(f"{split}/{number}") for number in missing_rows([batch])]
        except server.ServerFailed as error:
            failed = str(error)
        failures = [failed for failed in ranks.gather(failed) if failed]
        if failures:
            self.flush()
            raise server.ServerFailed(failures[0])

    def states(self, batches):
        ready = []  # generated states, which may be for later batches
        for batch in batches:
            ready += self.generate(batch.states)
            auxiliary, last = self.read_states(batch)
            start = 0
            for number, problem, length in zip(batch.rows, batch.states.problems, batch.lengths, strict=True):
                if problem and self.on_missing == "generate":
                    tokens = slice(start, start + length)
                    row = f"{batch.states.split}/{number}"
                    sequence = (batch.input_ids[tokens], batch.loss_mask[tokens])
                    self.place(row, sequence, ready.pop(0), auxiliary[tokens], last[tokens])
                start += length
            yield auxiliary, last

    def generate(self, fetched):
        """[(auxiliary, last)] of the rows that a server gave, or that the target's forwards give."""
        for states in fetched.served:
            states = states.to(self.embedding)
            yield states[:, :-1].flatten(1), self.norm(states[:, -1])
        for forward in fetched.forwards:
            yield from forward.run(self.target)

    def read_states(self, batch):
        """(auxiliary [T, n·Ht], last [T, Ht]) of a batch from the store; zeros where it has nothing."""
        width = self.embedding.shape[1]
        tensors = batch.states.tensors
        auxiliary = self.embedding.new_zeros(len(batch.input_ids), self.store.layer_count * width)
        last = self.embedding.new_zeros(len(batch.input_ids), width)
        if tensors:
            aux_states, last_states = read_back(tensors, last.dtype)
            auxiliary[tensors["aux_at"]] = aux_states
            last[tensors["last_at"]] = self.norm(last_states) if self.store.before_norm else last_states
        return auxiliary, last

    def place(self, row, sequence, generated, auxiliary, last):
        """Put generated states of a row into its part of the batch's, and keep them in the store.

        Kept ones are used as they will be read: the training does not depend on which rows were there already.
        """
        auxiliary[:], last[:] = generated
        if not self.keeps:
            return
        input_ids, loss_mask = (x.cpu() for x in sequence)
        tensors = hidden_states.to_stored(input_ids, loss_mask, *generated, self.store.dtype)
        self.keep(row, tensors)
        count, teachers = slots.tokens_read(loss_mask)
        aux_states, last_states = read_back(tensors, last.dtype)
        auxiliary[:count] = aux_states.to(auxiliary.device)
        last[teachers] = last_states.to(last.device)


def missing_rows(batches):
    """The row numbers of batches whose states are not in the store."""
    found = []
    for batch in batches:
        found += [number for number, problem in zip(batch.rows, batch.states.problems, strict=True) if problem]
    return found


def read_back(tensors, dtype):
    """(auxiliary, last) of tensors of the store, in dtype."""
    auxiliary, last = (hidden_states.from_stored(tensors, name, dtype) for name in hidden_states.STATES)
    return auxiliary, last


def same(a, b):
    return a.tolist() == b.tolist()


# ==================== Choosing a source ==============================================================================


def add_source_flags(parser):
    """The flags that say where hidden states come from."""
    add = parser.add_argument_group("hidden states on disk").add_argument
    dtypes = list(hidden_states.DTYPES)
    add("--hidden_states_path", help="folder of prepare_hidden_states.py or hs_N.safetensors; none: target in memory")
    missing = ("generate", "skip", "warn", "raise")
    add(
        "--on_missing", choices=missing, default="generate", help="rows that are missing there; generate: by the target"
    )
    keeping = ("cache", "delete")
    add("--on_generate", choices=keeping, default="delete", help="whether generated states are kept there")
    add("--hidden_states_dtype", choices=dtypes, default="bfloat16", help="of a new folder; fp8: e4m3 with scales")
    vllm_states.add_server_flags(add)


def check_source_flags(args, default):
    """End the program if a flag about hidden states on disk would not be read; default: of each flag, by name."""
    if args.vllm_endpoint and args.on_missing != "generate":
        common.fail(f"vllm_endpoint generates missing rows: it needs on_missing generate, not {args.on_missing}")
    if args.on_generate == "cache" and args.on_missing != "generate":
        common.fail(f"on_generate cache keeps generated rows: it needs on_missing generate, not {args.on_missing}")
    makes_folder = choose_folder(args) and args.on_missing == "generate"
    if args.hidden_states_dtype != default["hidden_states_dtype"] and not makes_folder:
        common.fail(
            "hidden_states_dtype applies only to a new folder: it needs hidden_states_path and on_missing generate"
        )
    if not args.vllm_endpoint:
        for name in ("request_timeout", "max_retries"):
            if getattr(args, name) != default[name]:
                common.fail(f"{name} applies only to requests to a server: it needs vllm_endpoint")
    names = [name for name in ("on_missing", "on_generate") if getattr(args, name) != default[name]]
    if names and not choose_folder(args):
        asked = f"{names[0]} {getattr(args, names[0])}"
        beside = f"; {args.data_path} has no folder hidden_states either" if args.data_path else ""
        common.fail(f"{asked} is about hidden states on disk: give hidden_states_path, or drop it{beside}")


def choose_folder(args):
    """The folder of hidden states on disk, or None if the target in memory computes all of them.

    Without hidden_states_path: a server's are put into output_dir. Where a flag asks for states on disk, they may be in
    data_path, as speculators has them; without such a flag a folder that happens to be there decides nothing.
    """
    if args.hidden_states_path:
        return args.hidden_states_path
    if args.vllm_endpoint:
        return str(Path(args.output_dir) / "hidden_states")
    beside = Path(args.data_path or "") / "hidden_states"
    asked = args.on_missing != "generate" or args.on_generate == "cache"
    return str(beside) if asked and args.data_path and beside.is_dir() else None


class Opening(NamedTuple):
    """What rank 0 finds out about a store for all ranks."""

    settings: dict | None  # hidden_states.store_settings; None for files of vLLM's extractor
    has_missing: bool
    served_model: str | None  # the target's name on the server that generates missing rows


def open_source(args, sharding, model_dir, device, layers, data, data_config):
    """The source of hidden states that the flags ask for; the target is loaded as far as it is needed."""

    def load():
        return target_model.load_as_asked(args, sharding, model_dir, device, layers)

    in_step = dist.get_world_size() if sharding == "zero3" else args.tp_size
    sizes = (args.batch_size, args.tp_size, in_step)
    generates = args.on_missing == "generate"
    folder = choose_folder(args)
    if not folder:
        return Online(load(), *sizes)

    config, _ = target_files.read_target_config(model_dir, args.trust_remote_code)
    shape = (len(layers) + 1, config.hidden_size)
    opening = ranks.on_first_rank(lambda: look_into(args, folder, shape, model_dir, layers, data, data_config))
    store = open_store(folder, data, shape, opening.settings)
    vllm = None
    if opening.served_model:
        vllm = vllm_states.Server(args, opening.served_model, shape)
    target = None
    if generates and opening.has_missing and not vllm:
        target = load()
    if target is None or store.before_norm:  # the final norm is the head's
        head = target_model.load_head(model_dir, device, layers, args.trust_remote_code)
        if target is None:
            target = head
        target.norm = head.norm
    return Stored(store, target, load, args.on_missing, args.on_generate == "cache", sizes, vllm)


def is_extracted(folder):
    """Whether a folder has files of vLLM's extractor, as speculators names them."""
    return any(Path(folder).glob("hs_*.safetensors"))


def open_store(folder, data, shape, settings, create=None):
    if is_extracted(folder):
        return vllm_states.VllmFiles(folder, data, shape)
    return hidden_states.Store(folder, settings, create=create)


def look_into(args, folder, shape, model_dir, layers, data, data_config):
    """The Opening of a store; ends the program if it cannot serve this training."""
    generates = args.on_missing == "generate"
    keeps = args.on_generate == "cache"
    settings = None
    if not is_extracted(folder):
        settings = hidden_states.store_settings(model_dir, layers, data_config)
    elif generates and keeps:
        common.fail(
            f"on_generate cache: {folder} has hs_*.safetensors, which are only read: give another folder, or "
            "on_generate delete"
        )
    store = open_store(folder, data, shape, settings, args.hidden_states_dtype if generates else None)
    rows = [f"{name}/{number}" for name in data for number in range(len(data[name]))]
    missing = [row for row in rows if row not in store.rows]
    if missing and args.on_missing == "raise":
        common.fail(
            f"{folder}: {len(missing)} of {len(rows)} rows are missing, such as {missing[0]}: write them with "
            "prepare_hidden_states.py, or choose another on_missing"
        )
    if not generates and len(missing) == len(rows):
        common.fail(f"{folder} has none of the {len(rows)} rows: on_missing {args.on_missing} would leave out all")
    if generates and keeps:
        store.remove_leftovers()
    print(f"{store.folder}: {len(rows) - len(missing):,} of {len(rows):,} rows are there")
    model = None
    if generates and args.vllm_endpoint:
        longest = max(part["longest"] for part in data_config["splits"].values())
        model = vllm_states.served_model(args, model_dir, longest)
    return Opening(settings, bool(missing), model)
