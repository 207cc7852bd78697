"""Peak memory per rank of a target that ranks share, against the arithmetic; and what its forward moves and takes.

In:  nothing: two random targets are made, a Llama and a Qwen3-MoE of 400 MB each; or a --target_model_path.
Out: a Markdown table on stdout and, with --output, in a file.

    python benchmarks/target.py                              # 1, 2 and 4 ranks, every way to share: half an hour
    python benchmarks/target.py --ranks 1 2 --ways none zero3 --output table.md
    python benchmarks/target.py --target_model_path /models/Llama-3.1-8B-Instruct --ranks 8 --ways tp zero3

Every row starts new processes. Each rank loads and runs a tiny target first, so that libraries, thread pools and
buffers exist, and then the target. MiB are those of the rank with the most, above what it had before:

computed     its share of the layers; the complete embedding table and head; the shares of these that the model keeps
held         the tensors that exist after forwards, counted one by one
in a forward computed: and the layers that zero3 gathers at a time; peak: the measured one, activations included
loading      the peak while the target is loaded and tried: own memory, and mapped pages of the target's files. Ranks
             share those, and the system can reclaim them
moved        what one forward moves to the rank, computed: weights under zero3, sums of hidden states under tp

On a CPU, memory is resident memory, sampled every 2 ms. The C library returns freed blocks at once here; in training it
keeps them, which is faster, and so it does while forwards are timed. Weights that need no conversion stay in the mapped
file: the peak counts them as if they were copied, as on a GPU. On GPUs, memory is what torch has allocated.
A forward reads a text for each rank that shares it; ratio: its seconds to those of full copies on as many ranks.
"""

import contextlib
import ctypes
import datetime
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import deepspeed
import torch
import torch.distributed as dist
import transformers
from deepspeed.ops.op_builder import AsyncIOBuilder
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core import common, ranks, target_files, target_model  # noqa: E402

MIB = 2**20
SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 4096,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
TARGETS = {"llama": LlamaConfig(**SIZES), "qwen3_moe": Qwen3MoeConfig(**SIZES, **EXPERTS)}
TINY_SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 8, "head_dim": 16}
TINY = LlamaConfig(**SIZES | TINY_SIZES)
WAYS = {  # to share a target: arguments of target_model.load; "tp" stands for each size that divides the ranks
    "none": {},
    "tp": {"sharding": "tp"},
    "zero3": {"sharding": "zero3"},
    "zero3_cpu": {"sharding": "zero3", "offload": "cpu"},
    "zero3_nvme": {"sharding": "zero3", "offload": "nvme"},
}
COLUMNS = (
    "ranks",
    "shared",
    "computed",
    "held",
    "in a forward, computed",
    "peak",
    "loading, own",
    "files",
    "moved",
    "s a forward",
    "ratio",
)

# ==================== Memory of a process ============================================================================


def give_back_freed_memory():
    """Undo keep_freed_memory: glibc maps every block from 64 KiB on its own and returns it when it is freed."""
    allocator = ctypes.CDLL(None)
    allocator.mallopt(-3, 2**16)  # M_MMAP_THRESHOLD
    allocator.mallopt(-4, 2**20)  # M_MMAP_MAX
    allocator.mallopt(-1, 2**16)  # M_TRIM_THRESHOLD


class Bytes(NamedTuple):
    """Memory of this rank. On a GPU what torch has allocated, and no files."""

    own: int
    files: int  # mapped pages


def used(device):
    """The Bytes in use now."""
    if device.type == "cuda":
        return Bytes(own=torch.cuda.memory_allocated(device), files=0)
    sizes = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Rss"):
            name, kib, _ = line.split()
            sizes[name] = int(kib) * 1024
    return Bytes(own=sizes["RssAnon:"] + sizes["RssShmem:"], files=sizes["RssFile:"])


@contextlib.contextmanager
def peaks(device, before):
    """Yield a dict that gets the highest bytes above `before`, own and files, at the end."""
    most = {"own": 0, "files": 0}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield most
        most["own"] = torch.cuda.max_memory_allocated(device) - before.own
        return
    done = threading.Event()

    def sample():
        while not done.wait(0.002):
            now = used(device)
            most["own"] = max(most["own"], now.own - before.own)
            most["files"] = max(most["files"], now.files - before.files)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def live_bytes():
    """Bytes of all tensors that exist in this process, local parts of shared ones: each place in memory once.

    Returns (those in memory of its own, those in mapped weight files). Of a file only the parts that tensors show
    count, as nothing reads the others.
    """
    gc.collect()
    lines = Path("/proc/self/maps").read_text().splitlines()
    weight_files = [line.split()[0].split("-") for line in lines if line.endswith(".safetensors")]
    maps = [(int(start, 16), int(end, 16)) for start, end in weight_files]
    places = {place_of(x) for x in gc.get_objects() if is_in_memory(x)}
    own = 0
    mapped = 0
    counted = 0  # the address up to which places are counted: views overlap
    for first, end in sorted(places):
        size = max(end - max(first, counted), 0)
        if any(start <= first < stop for start, stop in maps):
            mapped += size
        else:
            own += size
        counted = max(counted, end)
    return own, mapped


def is_in_memory(x):
    """Whether an object is a tensor with memory of its own in this process."""
    kind = type(x)
    if not issubclass(kind, torch.Tensor) or issubclass(kind, DTensor) or x.device.type == "meta":
        return False
    return x.numel() > 0 and x.untyped_storage().nbytes() > 0  # FSDP leaves tensors without memory


def place_of(x):
    """(first, end) address of a tensor."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    first = x.data_ptr()
    return first, first + (last + 1) * x.itemsize


# ==================== Arithmetic =====================================================================================


def computed_bytes(model_dir, world, tokens, sharding="none", tp_size=1, offload="none", **_):
    """Bytes per rank, from shapes alone: (at rest, in a forward, moved to the rank by a forward of `tokens` tokens)."""
    config = transformers.AutoConfig.from_pretrained(model_dir)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    itemsize = (config.dtype or torch.float32).itemsize
    layers = [bytes_of(layer, itemsize) for layer in model.get_decoder().layers]
    table = bytes_of(model.get_input_embeddings(), itemsize)
    head = 0 if config.tie_word_embeddings else bytes_of(model.lm_head, itemsize)
    sharers = {"none": 1, "tp": tp_size, "zero3": world}[sharding]
    shared = sum(layers)
    if sharding == "tp":
        # The model keeps its own shares of table and head; with several copies, FSDP's wrappers leave the head's share
        # gathered once more after the forward that tries the logits.
        shared += table + head * (2 if world > tp_size else 1)
    rest = shared / sharers + table + head
    if offload == "nvme":
        rest = bytes_beside_nvme(model, itemsize, world) + table + head
    others = (sharers - 1) / sharers  # the part of what a rank needs that other ranks have
    moved = 0
    forward = rest
    if sharding == "tp":  # sums over attention, MLP and embeddings: reduced in parts, which are then gathered
        moved = (2 * len(layers) + 1) * tokens * config.hidden_size * itemsize * 2 * others
    elif sharding == "zero3":
        moved = sum(layers)
        if offload != "nvme":
            moved *= others
        if world > 1:  # at most two layers, and the buffer into which the next one is gathered
            forward += 3 * max(layers)
    return rest, forward, moved


def bytes_of(module, itemsize):
    return sum(p.numel() for p in module.parameters()) * itemsize


def bytes_beside_nvme(model, itemsize, world):
    """Bytes of layers in a rank's memory under nvme.

    DeepSpeed has five buffers, each for a rank's share of the largest tensor, and writes no shares below 1 MiB.
    """
    largest = max(p.numel() for p in model.parameters()) * itemsize / world
    shares = [p.numel() * itemsize / world for p in model.get_decoder().layers.parameters()]
    return 5 * largest + sum(share for share in shares if share < MIB)


# ==================== One rank =======================================================================================


def measure(job):
    """What a rank measures of a job {model_dir, tiny, way, tokens, rounds, result}; rank 0 writes all results."""
    device = ranks.start_distributed(10)
    way = job["way"]
    lengths = [job["tokens"]] * way.get("tp_size", 1)
    if device.type == "cpu":
        give_back_freed_memory()

    def forward(target):
        input_ids = torch.arange(sum(lengths), device=device) % len(target.embedding)
        target.hidden_states(input_ids, lengths)

    tiny = target_model.load(job["tiny"], device, **way)
    forward(tiny)
    del tiny
    live, _ = live_bytes()
    before = used(device)
    with peaks(device, before) as loading:
        target = target_model.load(job["model_dir"], device, **way)
    with peaks(device, before) as forwards:
        for _ in range(3):
            forward(target)
    own, mapped = live_bytes()
    found = {
        "loading": loading,
        "held": own + mapped - live,
        "peak": forwards["own"] + mapped,
        "seconds": [],
    }
    if device.type == "cpu":
        ranks.keep_freed_memory()
    for _ in range(job["rounds"] + 1):
        dist.barrier()
        started = time.perf_counter()
        forward(target)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found["seconds"].append(time.perf_counter() - started)
    gathered = ranks.gather(found)
    if dist.get_rank() == 0:
        Path(job["result"]).write_text(json.dumps(gathered))
    dist.destroy_process_group()


# ==================== The table ======================================================================================


def ways_of(args, world, folder):
    """(label, arguments of target_model.load) of every way to share a target among `world` ranks."""
    for name in args.ways:
        way = WAYS[name]
        if name == "none":
            yield "full copies", way
        elif name == "tp":
            for tp_size in range(2, world + 1):
                copies, left_over = divmod(world, tp_size)
                if left_over:
                    continue
                label = f"tp {tp_size}" if copies == 1 else f"tp {tp_size}, {copies} copies"
                yield label, way | {"tp_size": tp_size}
        elif name == "zero3_nvme":
            if AsyncIOBuilder().is_compatible():
                yield "zero3, nvme", way | {"offload_path": str(folder / "nvme")}
        else:
            yield name.replace("_", ", "), way


def row_of(args, model_dir, world, label, way, folder):
    """One row {column: value}, measured by `world` new processes."""
    job = {
        "model_dir": str(model_dir),
        "tiny": str(folder / "tiny"),
        "way": way,
        "tokens": args.tokens,
        "rounds": args.rounds,
        "result": str(folder / "result.json"),
    }
    found = run_job(job, world, label)
    rest, forward, moved = computed_bytes(model_dir, world, args.tokens * way.get("tp_size", 1), **way)
    rounds = zip(*(one["seconds"][1:] for one in found), strict=True)  # the first was a warm-up
    return {
        "ranks": world,
        "shared": label,
        "computed": rest / MIB,
        "held": max(one["held"] for one in found) / MIB,
        "in a forward, computed": forward / MIB,
        "peak": max(one["peak"] for one in found) / MIB,
        "loading, own": max(one["loading"]["own"] for one in found) / MIB,
        "files": max(one["loading"]["files"] for one in found) / MIB,
        "moved": moved / MIB,
        "s a forward": statistics.median(max(seconds) for seconds in rounds),
    }


def run_job(job, world, label):
    """Run a job on `world` ranks: what each rank found."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    threads = max(os.cpu_count() // world, 1)
    result = subprocess.run(
        [*launcher, __file__, "--rank_of", json.dumps(job)],
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
        env={"OMP_NUM_THREADS": str(threads), **os.environ},
    )
    if result.returncode:
        common.fail(f"{world} ranks, {label}: {result.stderr[-2000:]}")
    return json.loads(Path(job["result"]).read_text())


def run(args, name, model_dir, folder):
    """The table of one target."""
    put(args, "", heading(args, name), "")
    put_row(args, COLUMNS)
    put(args, "|" + " ---: |" * len(COLUMNS))
    for world in args.ranks:
        of_copies = None  # seconds of a forward of full copies
        for label, way in ways_of(args, world, folder):
            row = row_of(args, model_dir, world, label, way, folder)
            seconds = row["s a forward"]
            if way == {}:
                of_copies = seconds
            row["s a forward"] = f"{seconds:.3g}"
            row["ratio"] = f"{seconds / of_copies:.2f}" if of_copies else "-"
            put_row(args, [cell(row[column]) for column in COLUMNS])


def heading(args, name):
    """What was measured, on what, with which versions and when."""
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
        machine = names[0] if names else platform.machine()
    versions = ", ".join(f"{x.__name__} {x.__version__}" for x in (torch, deepspeed, transformers))
    return (
        f"{name}: {machine}, {os.cpu_count()} CPU cores, Python {platform.python_version()}, {versions}, "
        f"{datetime.date.today()}, {args.tokens} tokens per rank, medians of {args.rounds} rounds"
    )


def cell(value):
    return f"{value:,.0f}" if isinstance(value, float) else str(value)


def put_row(args, cells):
    put(args, f"| {' | '.join(cells)} |")


def put(args, *lines):
    """Append lines to the report as soon as they are known, so that a stopped run keeps what it has measured."""
    print(*lines, sep="\n", flush=True)
    if args.output:
        with Path(args.output).open("a") as file:
            print(*lines, sep="\n", file=file)


# ==================== Command line ===================================================================================


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--target_model_path", help="folder or hub id; none: the random targets")
    add("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="random targets")
    add("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="ways to share; nvme needs libaio")
    add("--tokens", type=int, default=256, help="tokens of a rank's text")
    add("--rounds", type=int, default=5, help="timed forwards, of which the median counts")
    add("--folder", help="where targets and NVMe files are made and removed; none: a temporary folder")
    add("--output", help="file for the tables, beside stdout")
    add("--rank_of", type=json.loads, help="the job of a rank, which this program starts")
    return parser.parse_args(argv)


def main(args):
    if args.rank_of:
        measure(args.rank_of)
        return
    if args.output:
        Path(args.output).write_text("")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        folder = Path(folder)
        write_random_target(folder / "tiny", TINY)
        if args.target_model_path:
            model_dir = target_files.resolve_target(args.target_model_path)
            run(args, args.target_model_path, model_dir, folder)
            return
        for name in args.targets:
            write_random_target(folder / name, TARGETS[name])
            run(args, name, folder / name, folder)


def write_random_target(folder, config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)


if __name__ == "__main__":
    main(parse_args())
