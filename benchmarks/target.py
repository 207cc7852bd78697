"""Peak memory per rank of a target that ranks share, beside what the arithmetic says; and what a forward costs.

In:  nothing: two random targets are made, a Llama and a Qwen3-MoE of 400 MB each; or a --target_model_path.
Out: a Markdown table on stdout and, with --output, in a file.

    python benchmarks/target.py                              # 1, 2 and 4 ranks, every way to share: half an hour
    python benchmarks/target.py --ranks 1 2 --ways none zero3 --output table.md
    python benchmarks/target.py --target_model_path /models/Llama-3.1-8B-Instruct --ranks 8 --ways tp zero3

Every row is a start of its own. Each rank loads and runs a tiny target first, so that libraries, thread pools and
buffers are there, and then the target. MiB are those of the rank with the most, above what it had before:

computed     its share of the layers; the embedding table and the head, whole; the shares of these that the model keeps
held         the tensors that exist after forwards, counted one by one
in a forward computed: and the layers that zero3 gathers at a time; peak: the measured one, activations included
loading      the peak while the target is loaded and tried: own memory, and mapped pages of the target's files. Ranks
             share those, and the system may take them back
moved        what one forward moves to the rank, computed: weights under zero3, sums of hidden states under tp

On a CPU the memory is the resident one, sampled every 2 ms. The C library gives freed blocks back at once here; in
training it keeps them, which is faster, and so it does while forwards are timed. Weights that need no change stay in
the mapped file: the peak counts them as if they were copied, as on a GPU. On GPUs it is what torch has allocated.
A forward reads a text for each rank that shares it; ratio: its seconds to those of whole copies on as many ranks.
"""

import argparse
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
    "hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 4096, "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}  # fmt: skip
TARGETS = {
    "llama": LlamaConfig(**SIZES),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128),
}
TINY = LlamaConfig(**SIZES | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 8, "head_dim": 16})
WAYS = {  # to share: what load_target is given; "tp" stands for each size that divides the ranks
    "none": {}, "tp": {"sharding": "tp"}, "zero3": {"sharding": "zero3"},
    "zero3_cpu": {"sharding": "zero3", "offload": "cpu"}, "zero3_nvme": {"sharding": "zero3", "offload": "nvme"},
}  # fmt: skip
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

# ==================== One rank =======================================================================================


def give_back_freed_memory():
    """Undo keep_freed_memory: glibc maps every block of 64 KiB on its own and gives it back when it is freed."""
    for option in ((-3, 2**16), (-4, 2**20), (-1, 2**16)):  # M_MMAP_THRESHOLD, M_MMAP_MAX, M_TRIM_THRESHOLD
        ctypes.CDLL(None).mallopt(*option)


def used(device):
    """(own, files): bytes of this rank now. On a GPU what torch has allocated; else resident pages, and mapped ones."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), 0
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    sizes = {words[0]: int(words[1]) * 1024 for words in lines if words and words[0].startswith("Rss")}
    return sizes["RssAnon:"] + sizes["RssShmem:"], sizes["RssFile:"]


@contextlib.contextmanager
def peaks(device, before):
    """Yield a dict; at the end: the highest bytes above `before`, a value of used(): own, files."""
    most = {"own": 0, "files": 0}
    done = threading.Event()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield most
        most["own"] = torch.cuda.max_memory_allocated(device) - before[0]
        return

    def sample():
        while not done.wait(0.002):
            own, files = (now - then for now, then in zip(used(device), before, strict=True))
            most.update(own=max(most["own"], own), files=max(most["files"], files))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def live_bytes():
    """Bytes of all tensors that exist in this process, local parts of shared ones: each place in memory once.

    Returns those in memory of its own, and those in mapped weight files: the parts that tensors show, as nobody reads
    the rest of the file.
    """
    gc.collect()
    places = set()
    lines = Path("/proc/self/maps").read_text().splitlines()
    maps = [line.split()[0].split("-") for line in lines if line.endswith(".safetensors")]
    for x in gc.get_objects():
        if issubclass(type(x), torch.Tensor) and not issubclass(type(x), DTensor) and x.device.type != "meta":
            span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
            if x.numel() and x.untyped_storage().nbytes():  # FSDP leaves tensors without memory behind
                places.add((x.data_ptr(), x.data_ptr() + span * x.itemsize))
    found = [0, 0]
    end = 0
    for first, last in sorted(places):
        mapped = any(int(start, 16) <= first < int(stop, 16) for start, stop in maps)
        found[mapped] += max(last - max(first, end), 0)
        end = max(end, last)
    return found


def computed_bytes(model_dir, world, tokens, sharding="none", tp_size=1, offload="none", **_):
    """Bytes by arithmetic on shapes alone: (at rest, in a forward, moved to a rank by a forward of so many tokens).

    Under nvme what rests in memory are DeepSpeed's five buffers, each for a rank's share of the largest tensor, and
    the shares below 1 MiB, which it does not write to the disk.
    """
    config = transformers.AutoConfig.from_pretrained(model_dir)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    size = (config.dtype or torch.float32).itemsize
    layers = [sum(p.numel() for p in layer.parameters()) * size for layer in model.get_decoder().layers]
    table, head = (module.weight.numel() * size for module in (model.get_input_embeddings(), model.lm_head))
    head = 0 if config.tie_word_embeddings else head
    sharers = {"none": 1, "tp": tp_size, "zero3": world}[sharding]
    # Under tp the model keeps its own shares of table and head; with several copies, FSDP's wrappers leave the head's
    # share gathered once more after the forward that tries the logits. With zero3 it got the whole ones back.
    kept = {"none": 0, "tp": table + head * (2 if world > tp_size else 1), "zero3": 0}[sharding]
    rest = (sum(layers) + kept) / sharers + table + head
    moved = 0
    if offload == "nvme":
        largest = max(p.numel() for p in model.parameters()) * size / world
        shares = [p.numel() * size / world for layer in model.get_decoder().layers for p in layer.parameters()]
        rest = table + head + 5 * largest + sum(share for share in shares if share < MIB)
    others = (sharers - 1) / sharers  # of what a rank needs, they have this part
    if sharding == "tp":  # of attention, MLP and embeddings; summed in parts, and the parts handed round
        moved = (2 * len(layers) + 1) * tokens * config.hidden_size * size * 2 * others
    elif sharding == "zero3":
        moved = sum(layers) * (1 if offload == "nvme" else others)
    forward = rest
    if sharding == "zero3" and world > 1:  # at most two layers, and the buffer into which the next is gathered
        forward += 3 * max(layers)
    return rest, forward, moved


def measure(job):
    """What this rank measures of a job {model_dir, tiny, way, tokens, rounds, result}; rank 0 writes all ranks'."""
    device = ranks.start_distributed(10)
    way = job["way"]
    texts = [job["tokens"]] * way.get("tp_size", 1)
    if device.type == "cpu":
        give_back_freed_memory()

    def forward(target):
        ids = torch.arange(sum(texts), device=device) % len(target.embedding)
        target.hidden_states(ids, texts)

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
    """(label, what load_target is given) for all ways to share among so many ranks."""
    for name in args.ways:
        if name == "none":
            yield "whole copies", {}
        elif name == "tp":
            for size in (n for n in range(2, world + 1) if world % n == 0):
                copies = world // size
                yield f"tp {size}" + f", {copies} copies" * (copies > 1), WAYS[name] | {"tp_size": size}
        elif name == "zero3_nvme":
            if AsyncIOBuilder().is_compatible():
                yield "zero3, nvme", WAYS[name] | {"offload_path": str(folder / "nvme")}
        else:
            yield name.replace("_", ", "), WAYS[name]


def row_of(args, model_dir, world, label, way, folder):
    """One row {column: value}, from a start of so many ranks."""
    job = {
        "model_dir": str(model_dir),
        "tiny": str(folder / "tiny"),
        "way": way,
        "tokens": args.tokens,
        "rounds": args.rounds,
        "result": str(folder / "result.json"),
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    result = subprocess.run(
        [*launch, __file__, "--rank_of", json.dumps(job)],
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
        env={"OMP_NUM_THREADS": str(max(os.cpu_count() // world, 1)), **os.environ},
    )
    if result.returncode:
        common.fail(f"{world} ranks, {label}: {result.stderr[-2000:]}")
    found = json.loads(Path(job["result"]).read_text())
    rest, forward, moved = computed_bytes(model_dir, world, args.tokens * way.get("tp_size", 1), **way)
    sizes = {
        "computed": rest, "held": max(one["held"] for one in found), "in a forward, computed": forward,
        "peak": max(one["peak"] for one in found),
        "loading, own": max(one["loading"]["own"] for one in found),
        "files": max(one["loading"]["files"] for one in found), "moved": moved,
    }  # fmt: skip
    row = {"ranks": world, "shared": label} | {name: value / MIB for name, value in sizes.items()}
    rounds = zip(*(one["seconds"][1:] for one in found), strict=True)  # the first was a warm-up
    return row | {"s a forward": statistics.median(map(max, rounds))}


def put(args, *lines):
    """Append lines to the report, as soon as they are known: a stopped run keeps what it has measured."""
    print(*lines, sep="\n", flush=True)
    if args.output:
        with Path(args.output).open("a") as file:
            print(*lines, sep="\n", file=file)


def run(args, name, model_dir, folder):
    """The table of one target."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    machine = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    versions = ", ".join(f"{x.__name__} {x.__version__}" for x in (torch, deepspeed, transformers))
    put(
        args,
        "",
        f"{name}: {machine}, {os.cpu_count()} CPU cores, Python {platform.python_version()}, {versions}, "
        f"{datetime.date.today()}, {args.tokens} tokens a rank, medians of {args.rounds} rounds",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{' ---: |' * len(COLUMNS)}",
    )
    for world in args.ranks:
        whole = None
        for label, way in ways_of(args, world, folder):
            row = row_of(args, model_dir, world, label, way, folder)
            whole = row["s a forward"] if way == {} else whole
            row["ratio"] = f"{row['s a forward'] / whole:.2f}" if whole else "-"
            row["s a forward"] = f"{row['s a forward']:.3g}"
            cells = (f"{x:,.0f}" if isinstance(x, float) else str(x) for x in map(row.get, COLUMNS))
            put(args, f"| {' | '.join(cells)} |")


# ==================== Command line ===================================================================================


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--target_model_path", help="folder or hub id (default: the two random targets)")
    add("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="random targets (default: both)")
    add("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks (default: 1 2 4)")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="ways to share (default: all; nvme needs libaio)")
    add("--tokens", type=int, default=256, help="tokens of a rank's text (default: 256)")
    add("--rounds", type=int, default=5, help="timed forwards, medians of them (default: 5)")
    add("--folder", help="where targets and NVMe files are made and removed (default: a temporary folder)")
    add("--output", help="file to write the tables to as well (default: stdout alone)")
    add("--rank_of", type=json.loads, help="what the ranks that this starts are given")
    parser.error = common.fail
    return parser.parse_args(argv)


def main(args):
    if args.rank_of:
        return measure(args.rank_of)
    if args.output:
        Path(args.output).write_text("")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        folder = Path(folder)
        configs = {"tiny": TINY} | {name: TARGETS[name] for name in args.targets if not args.target_model_path}
        for name, config in configs.items():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        given = (
            {args.target_model_path: target_files.resolve_target(args.target_model_path)}
            if args.target_model_path
            else {}
        )
        for name, model_dir in (given or {name: folder / name for name in args.targets}).items():
            run(args, name, model_dir, folder)


if __name__ == "__main__":
    main(parse_args())
